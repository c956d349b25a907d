"""Database: the synchronous front door."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, NoReturn, Self, TextIO, Unpack

from sqlalchemy import MetaData
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import DeclarativeBase, Session

from . import drain, models
from .backends import Role, Side
from .checking import Check, CheckResult, Wait
from .engines import EngineRoom, Stats
from .errors import WrongWith
from .schema import SchemaScope, create_once
from .scopes import ConnectScope, LooseScope, SessionScope
from .secrecy import unseen
from .settings import Guards, Options


class Database:
    """One database, synchronous: for scripts, Flask, Celery and Alembic.

    It resolves its settings when it is made and is open from then on, without having connected.

    >>> with Database("sqlite://") as db:
    ...     with db.session() as session:
    ...         session.scalar(text("SELECT 40 + 2"))
    42
    """

    Base: ClassVar[type[DeclarativeBase]] = models.Base

    @unseen
    def __init__(
        self,
        database_url: str | URL | None = None,
        *,
        url: str | URL | None = None,
        **options: Unpack[Options],
    ) -> None:
        """Resolve the settings and open.

        Args:
            database_url: Where the database is; without it, `DATABASE_URL` or `DB_URL` says so.
            url: The same, by its shorter name.
            options: Any field of `DatabaseSettings`, and `session_class`, `async_session_class`,
                `metadata` and `engine_options` (passed on to SQLAlchemy's `create_engine`).

        Raises:
            ConfigurationError: a setting, an option or the URL cannot work.
        """
        self._room = EngineRoom(type(self).__name__)
        self._room.open(database_url, url, options)
        self._room.credentials.refuse_coroutines()

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
    ) -> SessionScope:
        """Open a session in a transaction: it commits at the end, or rolls back on any exception.

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

    def reader(self) -> SessionScope:
        """Open a session without a transaction: each statement stands alone, in one round trip.

        The server refuses writes. What needs a transaction needs `session(read_only=True)`:
        savepoints, `SET LOCAL`, locks, and on PostgreSQL streams (`yield_per`).
        """
        return SessionScope(self._room, "reader", Role.READER)

    def connect(self, *, isolation_level: str | None = None) -> ConnectScope:
        """Take a connection in a transaction, for Core.

        Args:
            isolation_level: Of this transaction; "AUTOCOMMIT" for VACUUM and the like.
        """
        return ConnectScope(self._room, "connect", Role.PRIMARY, False, isolation_level)

    def check(self, *, schema: bool = False, wait: float | None = None) -> CheckResult:
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
        room, place = self._room, (Side.SYNC, Role.READER)
        waiting, check = Wait(room, wait), Check(room, schema=schema)
        while True:
            try:
                check.begin()
                if waiting.is_asked or room.must_wait(*place):
                    room.work_apart(*place, check.ask, seconds=waiting.limit)
                else:
                    with ConnectScope(room, "check", Role.READER) as connection:
                        check.ask(connection)
            except Exception as error:  # noqa: BLE001
                pause = waiting.pause_after(error)
            else:
                return check.result()
            time.sleep(pause)

    def create_all(self, metadata: MetaData | None = None) -> None:
        """Create the tables that are not there yet, once for all who start at the same time.

        Args:
            metadata: Whose tables; those of the option `metadata` (by default `Base`'s) without it.

        Raises:
            SchemaLocked: another one who does so was not ready within `schema_timeout`.
        """
        wanted = self._room.metadata if metadata is None else metadata
        with SchemaScope(self._room, "create_all") as connection:
            create_once(connection, wanted, self._room.settings.schema_timeout)

    def stats(self) -> Stats:
        """Take a snapshot: the open scopes with their lines, and the pools. Nothing is asked."""
        return self._room.stats()

    def dump(self, file: TextIO | None = None) -> None:
        """Print who holds a connection and who waits for one: since when, from which line.

        Args:
            file: Where to; the standard error stream without it.
        """
        print(self._room.report(), file=file or sys.stderr)

    def close(self, timeout: float | None = None) -> None:
        """Take no new scopes, let the running ones end, and leave no connection behind.

        Those that do not end in time are rolled back, their lines are logged, and their next use
        raises. Closing twice, or before `init`, does nothing.

        Args:
            timeout: Seconds for running scopes to end; the setting `close_timeout` without it.

        Raises:
            CloseInsideScope: it was called inside a scope that it would wait for.
        """
        drain.close(self._room, timeout)

    @property
    def engine(self) -> Engine:
        """The engine; made at first use, from `init` to `close`."""
        return self._room.engine(Side.SYNC)

    def get_engine(self) -> Engine:
        """Return the engine."""
        return self.engine

    def get_session(self) -> Session:
        """Return a new session, which the caller commits and closes."""
        return LooseScope(self._room, "get_session").open()

    @classmethod
    def get_base(cls) -> type[DeclarativeBase]:
        """Return the declarative base."""
        return cls.Base

    if not TYPE_CHECKING:  # a type checker finds this mistake by itself

        async def __aenter__(self) -> NoReturn:
            raise WrongWith(
                "A Database was entered with 'async with'. Write 'with', or take a "
                "DatabaseSessionManager."
            )

        async def __aexit__(self, *args: object) -> None: ...

    def __enter__(self) -> Self:
        """Open, if it is not open already."""
        if self._room.life.allows("init"):
            self.init()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()
