"""Which of the server's deadlines an error came from."""

from __future__ import annotations

from collections.abc import Mapping

EARLY = 0.002  # seconds by which the server's clock may be ahead of ours


def which_struck(
    may_have: Mapping[str, bool], guards: Mapping[str, float], idle: float, ran: float
) -> tuple[str, float] | None:
    """Return the guard that an error came from, and how long it is; None if it came from none.

    A server that cancels for a guard says the same as one that was asked to, and who was idle for
    too long often hears only that the connection is gone: what was asked, and for how long it took,
    tells them apart.

    Args:
        may_have: For which of them the error may stand.
        guards: Their seconds; 0 of one that is off.
        idle: Seconds for which the connection was idle before.
        ran: Seconds for which the statement ran.
    """
    for name, may in may_have.items():
        limit = guards.get(name, 0.0)
        took = idle if name == "idle_in_transaction_timeout" else ran
        if may and 0 < limit <= took + EARLY:
            return name, limit
    return None
