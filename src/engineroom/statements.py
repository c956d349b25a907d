"""What each lent connection is running: noted around the dialect's own verbs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, cast

from sqlalchemy.engine import Dialect, ExecutionContext, RootTransaction
from sqlalchemy.engine.interfaces import ExecuteStyle
from sqlalchemy.pool import PoolProxiedConnection

from .ledger import LENT, berth_of, permit_of
from .lending import ROLLING_BACK
from .slots import NO_OPTIONS

UNKNOWN_OUTCOME = (
    "The interruption struck while COMMIT was under way: whether the transaction was committed is "
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
    overridden.execution_ctx_cls = streaming(overridden.execution_ctx_cls)
    overridden.do_commit = noting_commit(dialect.do_commit, dialect)
    overridden.do_rollback = noting_rollback(dialect.do_rollback)


def begin_anew(cursor: Any, context: ExecutionContext, error: Exception) -> bool:
    """Take another connection where the first BEGIN of a holder met a dead one.

    It was not answered: so the statement was not sent or, in a pipeline, sent with it in vain; and
    no COMMIT was, so nothing that stays could be done twice.

    Returns:
        Whether `context` has another cursor, to execute the statement with.
    """
    connection, dialect = context.root_connection, cast(Any, context.dialect)
    lent = connection.connection
    berth = berth_of(lent)
    lender = None if berth is None else berth.lender()
    if (
        lender is None
        # (A signal's handler may raise anything; asyncpg raises what its socket has, as it is.)
        or not (isinstance(error, dialect.loaded_dbapi.Error) or dialect.is_async)
        # (SQLAlchemy has a batch of rows go through the cursor that it knows already.)
        or context.execute_style is ExecuteStyle.INSERTMANYVALUES
        or type(connection.get_transaction()) is not RootTransaction
        or not lender.backend.awaits_begin(lent, cursor)
        or not lender.is_dead(lent, error)
    ):
        return False
    with suppress(Exception):
        cursor.close()
    try:
        lender.replace(lent, error)
    except Exception as failure:  # noqa: BLE001  # it goes on as if nobody had tried
        error.add_note(f"Another connection could not be opened: {failure!r}")
        return False
    for name, value in connection.get_execution_options().items():
        if name in dialect.connection_characteristics:
            dialect.connection_characteristics[name].set_connection_characteristic(
                dialect, connection, lent.dbapi_connection, value
            )
    permit = permit_of(lent)
    entry = None if permit is None else permit.scope
    lender.backend.guard(connection, {} if entry is None else entry.guards or {})
    context.cursor = context.create_cursor()
    return True


def note_failure(permit: Any, before: float) -> None:
    """Note for how long the connection was idle until the statement that failed, and that ran."""
    began = permit.statement_since
    permit.mark().failed_after = began - (before or began), time.monotonic() - began


def noting(execute: Callable[..., None]) -> Callable[..., None]:
    """Wrap a way to execute."""

    def noted(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        permit = LENT.get(id(context.root_connection.connection))  # `permit_of`, written out
        if permit is None:
            return execute(cursor, statement, parameters, context)
        is_first = not permit.statement
        before = permit.statement_since
        permit.statement, permit.options = statement, context.execution_options
        permit.cursor, permit.statement_since = cursor, time.monotonic()
        permit.running = True
        try:
            execute(cursor, statement, parameters, context)
        except Exception as error:
            if permit.marks.epitaph:
                error.add_note(permit.marks.epitaph)
                raise
            permit.running, permit.cursor = False, None
            if not (is_first and begin_anew(cursor, context, error)):
                note_failure(permit, before)
                raise
            noted(context.cursor, statement, parameters, context)
        finally:
            permit.running, permit.cursor = False, None
            permit.statement_since = permit.answered = time.monotonic()
        return None

    return noted


class Stream:
    """A cursor of the server's, which is asked for rows again and again: each time is noted."""

    __slots__ = ("_lent", "_streamed")

    def __init__(self, cursor: Any, lent: PoolProxiedConnection) -> None:
        object.__setattr__(self, "_streamed", cursor)
        object.__setattr__(self, "_lent", lent)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streamed, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._streamed, name, value)

    def __iter__(self) -> Iterator[Any]:
        while (row := self.fetchone()) is not None:
            yield row

    def fetchone(self) -> Any:
        """Ask for a row."""
        return self._noted(self._streamed.fetchone)

    def fetchmany(self, *size: Any) -> Any:
        """Ask for some."""
        return self._noted(self._streamed.fetchmany, *size)

    def fetchall(self) -> Any:
        """Ask for the rest."""
        return self._noted(self._streamed.fetchall)

    def close(self) -> None:
        """Part with it."""
        self._noted(self._streamed.close)

    def _noted(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        permit = permit_of(self._lent)
        if permit is None:
            return ask(*arguments)
        permit.cursor, permit.statement_since, permit.running = self, time.monotonic(), True
        try:
            return ask(*arguments)
        except Exception as error:
            if permit.marks.epitaph:
                error.add_note(permit.marks.epitaph)
            with suppress(Exception):  # SQLAlchemy does not, and psycopg would warn of it
                self._streamed.close()
            raise
        finally:
            permit.running, permit.cursor = False, None
            permit.statement_since = time.monotonic()


@cache
def streaming(base: Any) -> Any:
    """Make a class of execution contexts whose cursors of the server's are noted."""

    def create_server_side_cursor(self: Any) -> Any:
        lent = self.root_connection.connection
        permit = permit_of(lent)
        entry = None if permit is None else permit.scope
        if entry is not None:
            entry.streams = True
        return Stream(base.create_server_side_cursor(self), lent)

    own = {"create_server_side_cursor": create_server_side_cursor}
    return type(base.__name__, (base,), own)


def noting_no_parameters(execute: Callable[..., None]) -> Callable[..., None]:
    """Wrap the way to execute that takes no parameters."""

    def without(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
        execute(cursor, statement, context)

    noted = noting(without)
    return lambda cursor, statement, context=None: noted(cursor, statement, None, context)


def noting_commit(commit: Callable[[Any], None], dialect: Dialect) -> Callable[[Any], None]:
    """Wrap COMMIT, which leaves its caller without an answer where it is interrupted.

    By a cancellation, or by what a signal's handler raises, which may be any `Exception`.
    """

    def noted(connection: Any) -> None:
        permit = LENT.get(id(connection))
        if permit is not None:
            before = permit.statement_since
            permit.statement, permit.statement_since = "COMMIT", time.monotonic()
            permit.options = NO_OPTIONS
            permit.running = True
        try:
            commit(connection)
        except BaseException as error:
            if permit is not None and permit.marks.epitaph and isinstance(error, Exception):
                error.add_note(permit.marks.epitaph)
            elif not isinstance(error, dialect.loaded_dbapi.Error):
                error.add_note(UNKNOWN_OUTCOME)
            elif permit is not None:
                note_failure(permit, before)
            raise
        finally:
            if permit is not None:
                permit.running = False

    return noted


def noting_rollback(rollback: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap ROLLBACK. SQLAlchemy asks for one after each COMMIT, so this does the least it can."""

    def noted(connection: Any) -> None:
        ROLLING_BACK[connection] = time.monotonic()
        try:
            rollback(connection)
        finally:
            ROLLING_BACK.pop(connection, None)

    return noted
