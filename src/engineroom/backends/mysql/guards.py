"""The server's own deadlines, as MariaDB and MySQL are told them and say that one has struck."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..guards import which_struck

NAMES = {
    "idle_in_transaction_timeout": "idle_transaction_timeout",
    "statement_timeout": "max_statement_time",
    "lock_timeout": "innodb_lock_wait_timeout",
}
NAMES_OF_MYSQL = {  # it limits SELECT alone, and counts that in milliseconds
    "statement_timeout": "max_execution_time",
    "lock_timeout": "innodb_lock_wait_timeout",
}
FOR_EVER = 100_000_000  # seconds: to wait for none is what 0 means to innodb_lock_wait_timeout
TOO_SLOW, NO_LOCK = (1969, 3024), (1205,)  # of MariaDB, and MySQL


def is_mariadb(version: str) -> bool:
    """Ask the version that the server says when one connects."""
    return "mariadb" in version.lower()


def at_start(guards: Mapping[str, float], version: str) -> str:
    """Write down the statement that sets them; "" if there is none that this server has."""
    names = NAMES if is_mariadb(version) else NAMES_OF_MYSQL
    told = {names[name]: in_units(names[name], guards[name]) for name in guards if name in names}
    return f"SET SESSION {', '.join(f'{name} = {n}' for name, n in told.items())}" if told else ""


def in_units(variable: str, seconds: float) -> float:
    """Return what the server counts a deadline in."""
    if variable == "max_statement_time":
        return seconds
    if variable == "max_execution_time":
        return math.ceil(seconds * 1000)
    whole = math.ceil(seconds)
    return whole or (FOR_EVER if variable == "innodb_lock_wait_timeout" else 0)


def struck(
    number: int | None, guards: Mapping[str, float], idle: float, ran: float, is_lost: bool
) -> tuple[str, float] | None:
    """Return the guard that an error came from, and how long it is; None if it came from none."""
    may_have = {
        "idle_in_transaction_timeout": is_lost,
        "statement_timeout": number in TOO_SLOW,
        "lock_timeout": number in NO_LOCK,
    }
    return which_struck(may_have, guards, idle, ran)
