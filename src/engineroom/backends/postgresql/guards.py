"""The server's own deadlines, as PostgreSQL is told them and says that one has struck."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..guards import which_struck
from .sqlstates import sqlstate

# Of the settings, by the names that the server has for them.
NAMES = {
    "idle_in_transaction_timeout": "idle_in_transaction_session_timeout",
    "statement_timeout": "statement_timeout",
    "lock_timeout": "lock_timeout",
}
CANCELLED, NO_LOCK, IDLE_TOO_LONG = "57014", "55P03", "25P03"


def milliseconds(seconds: float) -> int:
    """Return what the server counts in; 0 is "off" to it, so less than one is one."""
    return math.ceil(seconds * 1000)


def at_start(guards: Mapping[str, float]) -> str:
    """Write down the command line with which a session of the server begins."""
    told = [f"-c {NAMES[name]}={milliseconds(guards[name])}" for name in guards]
    return " ".join(told)


def for_transaction(guards: Mapping[str, float]) -> list[str]:
    """Write down the statements that set them until the transaction ends.

    One `SELECT set_config(…)` would do for all, but it is a query: its snapshot would be that of
    the transaction, whose isolation level could not be set any more.
    """
    return [f"SET LOCAL {NAMES[name]} = {milliseconds(guards[name])}" for name in guards]


def struck(
    error: BaseException, guards: Mapping[str, float], idle: float, ran: float, is_lost: bool
) -> tuple[str, float] | None:
    """Return the guard that an error came from, and how long it is; None if it came from none."""
    state = sqlstate(error)
    may_have = {
        "idle_in_transaction_timeout": state == IDLE_TOO_LONG or is_lost,
        "statement_timeout": state == CANCELLED,
        "lock_timeout": state == NO_LOCK,
    }
    return which_struck(may_have, guards, idle, ran)
