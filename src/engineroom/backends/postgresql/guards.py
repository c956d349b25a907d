"""The server's own deadlines: how they are told to it, and which of them an error came from."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .sqlstates import sqlstate

# Of the settings, by the names that the server has for them.
NAMES = {
    "idle_in_transaction_timeout": "idle_in_transaction_session_timeout",
    "statement_timeout": "statement_timeout",
    "lock_timeout": "lock_timeout",
}
CANCELLED, NO_LOCK, IDLE_TOO_LONG = "57014", "55P03", "25P03"
EARLY = 0.002  # seconds by which the server's clock may be ahead of ours


def milliseconds(seconds: float) -> int:
    """Return what the server counts in; 0 is "off" to it, so less than one is one."""
    return math.ceil(seconds * 1000)


def at_start(guards: Mapping[str, float]) -> str:
    """Write down the command line with which a session of the server begins."""
    told = [f"-c {NAMES[name]}={milliseconds(guards[name])}" for name in guards]
    return " ".join(told)


def for_transaction(guards: Mapping[str, float]) -> list[str]:
    """Write down the statements that set them until the transaction ends."""
    return [f"SET LOCAL {NAMES[name]} = {milliseconds(guards[name])}" for name in guards]


def which_struck(
    error: BaseException, guards: Mapping[str, float], idle: float, ran: float, is_lost: bool
) -> str | None:
    """Return the setting whose guard an error came from; None if it came from none.

    A server that cancels for a guard says the same as one that was asked to, and who was idle for
    too long often hears only that the connection is gone: what was asked, and for how long it took,
    tells them apart.

    Args:
        idle: Seconds for which the connection was idle before.
        ran: Seconds for which the statement ran.
        is_lost: Whether the connection is.
    """
    state = sqlstate(error)

    def may_be(name: str, seconds: float) -> bool:
        limit = guards.get(name, 0.0)
        return 0 < limit <= seconds + EARLY

    if (state == IDLE_TOO_LONG or is_lost) and may_be("idle_in_transaction_timeout", idle):
        return "idle_in_transaction_timeout"
    if state == CANCELLED and may_be("statement_timeout", ran):
        return "statement_timeout"
    if state == NO_LOCK and may_be("lock_timeout", ran):
        return "lock_timeout"
    return None
