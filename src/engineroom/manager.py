"""DatabaseSessionManager: the asynchronous front door, with the synchronous one beside it."""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, TextIO, Unpack

from sqlalchemy import MetaData
from sqlalchemy.engine import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from . import drain
from .backends import Role, Side
from .checking import Check, CheckResult, Wait
from .database import Database
from .engines import EngineRoom, Stats
from .errors import WrongWith
from .schema import AsyncSchemaScope, create_once
from .scopes import AsyncConnectScope, AsyncSessionScope, SessionScope
from .secrecy import unseen
from .settings import Guards, Options


class DatabaseSessionManager:
    """One database, asynchronous; `.sync` is its synchronous twin, a `Database`.

    >>> import asyncio
    >>> async def main():
    ...     async with DatabaseSessionManager().init("sqlite://") as manager:
    ...         async with manager.session() as db:
    ...             return await db.scalar(text("SELECT 40 + 2"))
    >>> asyncio.run(main())
    42
    """

    sync: Database
    """The synchronous side of the same database: opened, closed and drained with this one."""

    def __init__(self) -> None:
        """Make a manager that is not open: `init` opens it."""
        self._room = EngineRoom(type(self).__name__)
        self.sync = Database.__new__(Database)
        self.sync._room = self._room

    @unseen
    def init(
        self,
        database_url: str | URL | None = None,
        *,
        url: str | URL | None = None,
        **options: Unpack[Options],
    ) -> Self:
        """Open; nothing is connected yet.

        Args:
            database_url: Where the database is; without it, `DATABASE_URL` or `DB_URL` says so.
            url: The same, by its shorter name.
            options: Any field of `DatabaseSettings`, and `session_class`, `async_session_class`,
                `metadata` and `engine_options` (passed on to SQLAlchemy's `create_engine`).

        Raises:
            AlreadyInitialized: it is open.
            ConfigurationError: a setting, an option or the URL cannot work.
        """
        self._room.open(database_url, url, options)
        return self

    def session(
        self,
        *,
        read_only: bool = False,
        isolation_level: str | None = None,
        **guards: Unpack[Guards],
    ) -> AsyncSessionScope:
        """Open a session in a transaction: it commits at the end, or rolls back on any exception.

        Args:
            read_only: Begin a transaction in which the server refuses writes.
            isolation_level: Of this transaction, as SQLAlchemy names it ("SERIALIZABLE"). One that
                the database does not have is an `InvalidOption` at the scope's enter.
            guards: `statement_timeout`, `lock_timeout` and `idle_in_transaction_timeout`: deadlines
                that the server keeps in this session, in seconds; 0 for none.
        """
        return AsyncSessionScope(
            self._room, "session", Role.PRIMARY, read_only, isolation_level, guards=guards
        )

    def reader(self) -> AsyncSessionScope:
        """Open a session without a transaction: each statement stands alone, in one round trip.

        The server refuses writes. What needs a transaction needs `session(read_only=True)`:
        savepoints, `SET LOCAL`, locks, and on PostgreSQL streams (`yield_per`).
        """
        return AsyncSessionScope(self._room, "reader", Role.READER)

    def connect(self, *, isolation_level: str | None = None) -> AsyncConnectScope:
        """Take a connection in a transaction, for Core.

        Args:
            isolation_level: Of this transaction; "AUTOCOMMIT" for VACUUM and the like.
        """
        return AsyncConnectScope(self._room, "connect", Role.PRIMARY, False, isolation_level)

    async def check(self, *, schema: bool = False, wait: float | None = None) -> CheckResult:
        """Ask the database what it is and how it is reached, and return what is wrong with that.

        Where the pool has no connection to lend, it is asked over one of its own.

        Args:
            schema: Ask as well whether it stands where this code needs it: at the head of the
                migrations (`alembic_ini`), or with all tables of the models where there are none.
            wait: Seconds to wait for one that does not answer yet: that is starting up, not there,
                or whose name does not resolve. A password that is refused is not tried again.

        Raises:
            SchemaMismatch: it does not.
            sqlalchemy.exc.SQLAlchemyError, OSError: whatever the driver says when it did not
                answer, with a note of what to do.
        """
        room, place = self._room, (Side.ASYNC, Role.READER)
        waiting, make = Wait(room, wait), partial(Check, room, schema=schema)
        check = await asyncio.to_thread(make) if schema else make()  # it reads files
        while True:
            try:
                check.begin()
                if waiting.is_asked or room.must_wait(*place):
                    await greenlet_spawn(room.work_apart, *place, check.ask, seconds=waiting.limit)
                else:
                    async with AsyncConnectScope(room, "check", Role.READER) as connection:
                        await connection.run_sync(check.ask)
            except Exception as error:  # noqa: BLE001
                pause = await asyncio.to_thread(waiting.pause_after, error)
            else:
                return check.result()
            await asyncio.sleep(pause)

    async def create_all(self, metadata: MetaData | None = None) -> None:
        """Create the tables that are not there yet, once for all who start at the same time.

        Args:
            metadata: Whose tables; those of the option `metadata` (by default `Base`'s) without it.

        Raises:
            SchemaLocked: another one who does so was not ready within `schema_timeout`.
        """
        wanted = self._room.metadata if metadata is None else metadata
        async with AsyncSchemaScope(self._room, "create_all") as connection:
            timeout = self._room.settings.schema_timeout
            await connection.run_sync(create_once, wanted, timeout)

    def stats(self) -> Stats:
        """Take a snapshot: the open scopes with their lines, and the pools. Nothing is asked."""
        return self._room.stats()

    def dump(self, file: TextIO | None = None) -> None:
        """Print who holds a connection and who waits for one: since when, from which line.

        Args:
            file: Where to; the standard error stream without it.
        """
        print(self._room.report(), file=file or sys.stderr)

    async def close(self, timeout: float | None = None) -> None:
        """Take no new scopes, let the running ones end, and leave no connection behind.

        Those that do not end in time are rolled back, their lines are logged, and their next use
        raises. Closing twice, or before `init`, does nothing.

        Args:
            timeout: Seconds for running scopes to end; the setting `close_timeout` without it.

        Raises:
            CloseInsideScope: it was called inside a scope that it would wait for.
        """
        await drain.aclose(self._room, timeout)

    @property
    def engine(self) -> AsyncEngine:
        """The engine; made at first use, from `init` to `close`."""
        bind: AsyncEngine = self._room.bind(Side.ASYNC, Role.PRIMARY)
        return bind

    @property
    def sync_engine(self) -> Engine:
        """The engine of the synchronous side, short for `.sync.engine` (Alembic takes it)."""
        return self.sync.engine

    def sync_session(
        self,
        *,
        read_only: bool = False,
        isolation_level: str | None = None,
        **guards: Unpack[Guards],
    ) -> SessionScope:
        """Open a session on the synchronous side, short for `.sync.session()`.

        Args:
            read_only: Begin a transaction in which the server refuses writes.
            isolation_level: Of this transaction, as SQLAlchemy names it ("SERIALIZABLE"). One that
                the database does not have is an `InvalidOption` at the scope's enter.
            guards: `statement_timeout`, `lock_timeout` and `idle_in_transaction_timeout`: deadlines
                that the server keeps in this session, in seconds; 0 for none.
        """
        return SessionScope(
            self._room, "session", Role.PRIMARY, read_only, isolation_level, guards=guards
        )

    if not TYPE_CHECKING:  # a type checker finds this mistake by itself

        def __enter__(self) -> NoReturn:
            raise WrongWith(
                "A DatabaseSessionManager was entered with 'with'. Write 'async with' inside of a "
                "coroutine; where there is none, take a Database."
            )

        def __exit__(self, *args: object) -> None: ...

    async def __aenter__(self) -> Self:
        """Open, if it is not open already."""
        if self._room.life.allows("init"):
            self.init()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.close()


session_manager: DatabaseSessionManager = DatabaseSessionManager()
"""The application's own manager: importing it connects to nothing, `init()` opens it."""
