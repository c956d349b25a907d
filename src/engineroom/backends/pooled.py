"""PostgreSQL behind a pooler: what nobody may rely on there, and what stands in for it.

PgBouncer and its kin refuse what they do not know when one connects, and answer with process ids
that are nobody's. In transaction mode, moreover, the next transaction may run in another session of
the server: whatever one has prepared, set or locked there belongs to whoever comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from ..errors import InvalidOption, NotBehindPooler
from . import POOLER, Role, Side
from .postgresql import AdvisoryLock, PostgreSQL
from .postgresql.settling import BREAK_OFF_LIMIT

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
        if role is Role.READER:
            engine.update_execution_options(**self.read_only_options())
            dialect: Any = engine.dialect
            dialect.do_execute = _alone(dialect.do_execute)
            dialect.do_executemany = _alone(dialect.do_executemany)
            dialect.do_execute_no_params = _alone(dialect.do_execute_no_params)

    def end(
        self,
        connections: Sequence[PoolProxiedConnection],
        execute: Callable[[str], None],
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

    def cancel(self, driver: Any, is_abandoned: bool) -> None:
        """Ask in a way that stops nobody else, where the driver has one."""
        if is_abandoned or not hasattr(driver, "cancel_safe"):
            super().cancel(driver, is_abandoned)
        elif asked := driver.cancel_safe(timeout=BREAK_OFF_LIMIT):  # of a loop
            await_only(asked)


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
        connection = call[-1].root_connection.connection.dbapi_connection  # the last: its context
        try:
            execute(*call)
        except Exception:
            with suppress(Exception):  # it may be lost
                connection.rollback()
            raise
        connection.commit()

    return executed
