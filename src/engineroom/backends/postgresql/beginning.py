"""Whether psycopg has sent a statement, or still waits for the answer to its own BEGIN."""

from __future__ import annotations

from functools import cache
from typing import Any


def tell_what_is_sent(driver: Any) -> None:
    """Have the cursors of a connection of psycopg tell."""
    if hasattr(driver, "server_cursor_factory"):
        driver.cursor_factory = _telling(driver.cursor_factory)
        driver.server_cursor_factory = _telling(driver.server_cursor_factory)


def has_sent(cursor: Any) -> bool:
    """Whether a cursor has sent its statement, or is about to: BEGIN was answered.

    `Cursor._query` is in psycopg's documentation, to look at after a failure; SQLAlchemy's adapter
    of the asynchronous one keeps it as `_cursor`. A test in `tests/test_private_names.py` fails
    when either goes.
    """
    return getattr(cursor, "_cursor", cursor)._query is not None


def forget_what_is_sent(cursor: Any) -> None:
    """Have a cursor look as if it had sent nothing: no BEGIN was answered, and none will be."""
    cursor._query = None


@cache
def _telling(base: Any) -> Any:
    """Make a class of cursors that have their `_query` as soon as BEGIN was answered.

    psycopg itself sets it only of what it has not prepared. `Cursor._convert_query` is the step
    between BEGIN and sending; the same test fails when it goes.
    """
    if getattr(base, "tells_what_is_sent", False):
        return base

    def convert(self: Any, *arguments: Any) -> Any:
        self._query = query = base._convert_query(self, *arguments)
        return query

    own = {"__slots__": (), "tells_what_is_sent": True, "_convert_query": convert}
    return type(base.__name__, (base,), own)
