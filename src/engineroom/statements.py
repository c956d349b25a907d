"""What each lent connection is running: noted around the dialect's own verbs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import Dialect
from sqlalchemy.pool import PoolProxiedConnection

from .slots import NO_OPTIONS

UNKNOWN_OUTCOME = (
    "The cancellation struck while COMMIT was under way: whether the transaction was committed is "
    "unknown. Look for what it wrote, or make the work such that it may be done again."
)


def note_statements(dialect: Dialect) -> None:
    """Note each statement on the permit of its connection, for whoever asks who holds the pool.

    Instead of SQLAlchemy's events, which cost every statement several times as much.
    """
    overridden: Any = dialect
    overridden.do_execute = noting(dialect.do_execute)
    overridden.do_executemany = noting(dialect.do_executemany)
    overridden.do_execute_no_params = noting_no_parameters(dialect.do_execute_no_params)
    overridden.do_commit = noting_commit(dialect.do_commit)


def permit_of(connection: PoolProxiedConnection) -> Any:
    """Return the permit against which a connection is lent; None if it is not."""
    try:
        berth = connection.info.get("berth")
    except NotImplementedError:  # what SQLAlchemy initializes a dialect with has no `info`
        return None
    return None if berth is None else berth.permit


def note_failure(permit: Any, before: float) -> None:
    """Note for how long the connection was idle until the statement that failed, and that ran."""
    began = permit.statement_since
    permit.failed_after = began - (before or began), time.monotonic() - began


def noting(execute: Callable[..., None]) -> Callable[..., None]:
    """Wrap a way to execute."""

    def noted(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        permit = permit_of(context.root_connection.connection)
        if permit is None:
            return execute(cursor, statement, parameters, context)
        before = permit.statement_since
        permit.statement, permit.options = statement, context.execution_options
        permit.statement_since = time.monotonic()
        permit.running = True
        try:
            execute(cursor, statement, parameters, context)
        except Exception:
            note_failure(permit, before)
            raise
        finally:
            permit.running = False
            permit.statement_since = time.monotonic()
        return None

    return noted


def noting_no_parameters(execute: Callable[..., None]) -> Callable[..., None]:
    """Wrap the way to execute that takes no parameters."""

    def without(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
        execute(cursor, statement, context)

    noted = noting(without)
    return lambda cursor, statement, context=None: noted(cursor, statement, None, context)


def noting_commit(commit: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap COMMIT, which leaves its caller without an answer where it is interrupted."""

    def noted(connection: Any) -> None:
        permit = permit_of(connection)
        if permit is not None:
            before = permit.statement_since
            permit.statement, permit.statement_since = "COMMIT", time.monotonic()
            permit.options = NO_OPTIONS
            permit.running = True
        try:
            commit(connection)
        except BaseException as error:
            if not isinstance(error, Exception):
                error.add_note(UNKNOWN_OUTCOME)
            elif permit is not None:
                note_failure(permit, before)
            raise
        finally:
            if permit is not None:
                permit.running = False

    return noted
