"""What each lent connection is running: noted around the dialect's own three ways to execute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import Dialect


def note_statements(dialect: Dialect) -> None:
    """Note each statement on the permit of its connection, for whoever asks who holds the pool.

    Instead of SQLAlchemy's events, which cost every statement several times as much.
    """
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, noting(getattr(dialect, name)))


def noting(execute: Callable[..., None]) -> Callable[..., None]:
    """Wrap one way to execute."""

    def noted(cursor: Any, statement: str, *rest: Any) -> None:
        info = rest[-1].root_connection.connection.record_info  # the last one is the context
        lent = None if info is None else info.get("lent")
        if lent is None:
            return execute(cursor, statement, *rest)
        permit = lent.permit
        permit.statement = statement
        permit.statement_since = time.monotonic()
        permit.running = True
        try:
            execute(cursor, statement, *rest)
        finally:
            permit.running = False
            permit.statement_since = time.monotonic()
        return None

    return noted
