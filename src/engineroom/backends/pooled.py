"""PostgreSQL behind a pooler: what nobody may rely on there, and what stands in for it.

PgBouncer and its kin refuse what they do not know when one connects, and answer with process ids
that are nobody's. In transaction mode, moreover, the next transaction may run in another session of
the server: whatever one has prepared, set or locked there belongs to whoever comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from ..errors import InvalidOption, NotBehindPooler
from . import POOLER, Leaving, Role, Sent, Side
from .postgresql import NO_GUARDS, AdvisoryLock, PostgreSQL
from .postgresql.cancelling import BREAK_OFF_LIMIT
from .postgresql.guards import for_transaction

# What asyncpg and SQLAlchemy's adapter of it, or psycopg, keep prepared: nothing, and no name.
UNPREPARED: dict[str, dict[str, Any]] = {
    "asyncpg": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
    "psycopg": {"prepare_threshold": None},
    "psycopg2": {},
}
UNNAMED = {"prepared_statement_name_func": str}  # asyncpg parses again what has no name


class SessionPooled(PostgreSQL):
    """Behind a pooler whose connections keep their session of the server until they are closed."""

    pooler: str | None = "session"
    start_guards: Mapping[str, float] = NO_GUARDS  # they would be refused

    def engine_options(
        self, side: Side, role: Role, connect_args: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the same options for every role: a reader's parameter would be refused."""
        return super().engine_options(side, Role.PRIMARY, connect_args)

    def attach(
        self, engine: Engine, role: Role, before_write: Callable[[Connection], None]
    ) -> None:
        """Give each statement of a reader a transaction of its own, in which nothing is written.

        A setting of the session would do in one trip instead of three; but where the pooler is in
        transaction mode after all, it would have strangers write nothing.
        """
        self.tune(engine)
        guards = {name: seconds for name, seconds in self._guards.items() if seconds}
        if role is Role.PRIMARY and guards:
            dialect: Any = engine.dialect
            dialect.do_begin = _guarded(dialect.do_begin, "; ".join(for_transaction(guards)))
        if role is Role.READER:
            engine.update_execution_options(**self.read_only_options())
            dialect = engine.dialect
            dialect.do_execute = _alone(dialect.do_execute)
            dialect.do_executemany = _alone(dialect.do_executemany)
            dialect.do_execute_no_params = _alone(dialect.do_execute_no_params)

    def guard(self, connection: Connection, guards: Mapping[str, float]) -> None:
        """Set them beside those of every transaction."""
        super().guard(connection, {**self._guards, **guards})

    def end(
        self,
        connections: Sequence[PoolProxiedConnection],
        apart: Callable[[Callable[[Connection], object]], None],
        *,
        is_abandoned: bool = False,
    ) -> None:
        """Cancel what runs, through the pooler, and close: it ends the transaction then.

        Nobody could be asked to end the backends: their numbers, only the pooler knows.
        """
        for connection in connections:
            with suppress(Exception):
                self.stop(connection.driver_connection, is_abandoned)

    async def break_off(self, driver: Any) -> None:
        """End asyncpg's connection, once the pooler has taken its cancel request to the server.

        PgBouncer 1.18 ends, for all its clients, where who has sent one does not wait for that; and
        asyncpg's own `close()` sends another, and does not.
        """
        if hasattr(driver, "get_server_pid") and not driver.is_closed():
            await asyncio.wait(_asyncpg_cancelling(driver), timeout=BREAK_OFF_LIMIT)
            driver.terminate()


class TransactionPooled(SessionPooled):
    """Behind a pooler that lends a session of the server for one transaction."""

    pooler: str | None = "transaction"

    def engine_options(
        self, side: Side, role: Role, connect_args: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the options of a role: no statement is prepared that another session would meet.

        Raises:
            InvalidOption: the user's say otherwise.
        """
        options = super().engine_options(side, role, connect_args)
        driver = self.engine_url(side).get_driver_name()
        ours = UNPREPARED[driver]
        for name, value in {**self._parameters, **connect_args}.items():
            if name in ours and str(value) != str(ours[name]):
                raise InvalidOption(
                    f"{name}={value!r} cannot be used where pooler='transaction' (DB_POOLER): a "
                    "statement that is prepared in one session of the server would be looked for "
                    "in another. Leave it out; engineroom sets it."
                )
        names = UNNAMED if driver == "asyncpg" else {}
        return options | {"connect_args": options["connect_args"] | ours | names}

    def attach(
        self, engine: Engine, role: Role, before_write: Callable[[Connection], None]
    ) -> None:
        """Tell whoever is connected by it that no session is its own."""
        super().attach(engine, role, before_write)
        engine.update_execution_options(**{POOLER: "transaction"})

    def watch(self, driver: Any, note: Callable[[Leaving, Sent], None]) -> None:
        """What a session of the server was left with is the pooler's business."""

    def clean(self, connection: ConnectionPoolEntry, hooks: Sequence[Sent]) -> None:
        """Clean nothing: it would be a stranger's session by now."""


@contextmanager
def _no_block() -> Generator[None]:
    """Refuse to leave a transaction, and with it the lock of the schema.

    Raises:
        NotBehindPooler: always.
    """
    raise NotBehindPooler(
        "A migration has an autocommit_block(), which cannot be had behind a pooler in transaction "
        "mode: the lock of the schema would go with the transaction, and another starter begin in "
        "the middle. Run the migrations on the server itself: alembic -x url=… with its own "
        "address, and DB_POOLER not set."
    )
    yield


class TransactionLock(AdvisoryLock):
    """The schema's lock where no session is ours: one transaction has it, and does everything."""

    autocommit_block: Callable[[], AbstractContextManager[None]] | None = staticmethod(_no_block)

    def set_guards(self, connection: Connection, *, whole_session: bool) -> None:
        """Wait with that for the lock: until then, a transaction does not last."""

    def try_take(self, connection: Connection, *, whole_session: bool) -> bool:
        """Take it for the transaction, and keep the server's deadlines from that."""
        taken = super().try_take(connection, whole_session=False)
        if taken:
            super().set_guards(connection, whole_session=False)
        return taken

    def rest(self, connection: Connection) -> None:
        """Give back the session of the server: the pooler has few, and others wait."""
        connection.rollback()

    def finish(self, connection: Connection) -> None:
        """Commit all of it, and the lock goes."""
        connection.commit()

    def release(self, connection: Connection) -> None:
        """It went with the transaction."""


def _asyncpg_cancelling(driver: Any) -> Collection[asyncio.Task[None]]:
    """Return the cancel requests that asyncpg has under way, or begin one.

    Its `close()` cuts them off, and no public name leads to them. `tests/test_private_names.py`
    fails when these go.
    """
    if requests := frozenset(driver._cancellations):
        return requests
    loop = asyncio.get_running_loop()
    return [loop.create_task(driver._cancel(loop.create_future()))]


def _alone(execute: Callable[..., None]) -> Callable[..., None]:
    """Wrap a way to execute, such that the transaction that it begins ends with it."""

    def executed(*call: Any) -> None:
        lent = call[-1].root_connection.connection  # the last: its context
        try:
            execute(*call)
        except Exception:
            with suppress(Exception):  # it may be lost
                lent.dbapi_connection.rollback()
            raise
        lent.dbapi_connection.commit()  # another one, where the first was found dead

    return executed


def _guarded(begin: Callable[[Any], None], guards: str) -> Callable[[Any], None]:
    """Wrap BEGIN, which asyncpg sends them with; the others need a round trip more."""

    def begun(connection: Any) -> None:
        begin(connection)
        driver = connection.driver_connection
        if connection.dbapi_connection.autocommit:
            return
        if hasattr(driver, "get_server_pid"):
            driver.with_begin = guards
        else:
            cursor = connection.cursor()
            cursor.execute(guards)
            cursor.close()

    return begun
