"""What differs from database to database and driver to driver: one file each, one Protocol."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy.engine import URL, Connection, Dialect, Engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from ..errors import DriverNotInstalled, InvalidOption, InvalidURL
from ..settings import Guards
from ..urls import ACCOUNT, masked

if TYPE_CHECKING:
    from ..settings import DatabaseSettings

MYSQL = ("mysql", "mariadb")  # SQLAlchemy has a name for each; the drivers are the same
SUPPORTED = ("postgresql", *MYSQL, "sqlite")


# The execution option that tells whose connection stands behind a pooler, and in which mode.
POOLER = "engineroom_pooler"


class Side(StrEnum):
    """Which of the twins an engine serves."""

    SYNC = "sync"
    ASYNC = "async"


class Role(StrEnum):
    """What an engine's connections are for."""

    PRIMARY = "primary"
    READER = "reader"


@dataclass(frozen=True, slots=True)
class Reached:
    """What a database says of itself, and how it was reached."""

    server: str
    role: str
    address: str | None
    tls: str | None
    pooler: str | None
    latency: float
    skew: float | None
    problems: tuple[str, ...] = ()


ASK_FOR = 2.0  # seconds, at most, for a server that lets nobody in to say why


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a database does not answer."""

    passes: bool
    """Whether it may answer later, though nobody changes anything."""
    what: str
    cure: str
    is_certain: bool = True
    is_reached: bool = True
    """Whether the server itself was there to say so."""
    is_silent: bool = False
    """Whether nobody said anything, for as long as was waited."""


class Leaving(IntEnum):
    """What a session may leave on its connection, as far as its texts tell."""

    NOTHING = 0
    CALLED = 1
    """A function was called for its effect, which no client sees."""
    STATE = 2
    """What `clean` takes away."""
    RELATIONS = 3
    """What only a new connection is free of."""


Sent = tuple[str, tuple[Any, ...]]
"""A verb of the driver, and what it was called with."""


class Backend(Protocol):
    """One database, as this process meets it through one URL."""

    has_server: bool
    """Whether there is somebody who may fall silent."""
    keeps_time: bool
    """Whether a synchronous driver connects in the time that `limit_connect` tells it: not to a
    name, which may have several addresses, and the driver takes so long for each."""

    def engine_url(self, side: Side) -> URL:
        """Return the URL with the driver of a side.

        Raises:
            DriverNotInstalled: no driver of that side is installed.
        """

    def engine_options(
        self, side: Side, role: Role, connect_args: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what `create_engine` needs for a side and role.

        Args:
            connect_args: The user's, which are part of it.
        """

    def read_only_options(self) -> dict[str, Any]:
        """Return the execution options of a transaction that only reads."""

    def attach(
        self, engine: Engine, role: Role, before_write: Callable[[Connection], None]
    ) -> None:
        """Attach the events that make this database behave to a new engine.

        Args:
            before_write: asked before a transaction that excludes every other writer.
        """

    def way_to_connect(self, dialect: Dialect) -> Callable[..., Any]:
        """Return what opens a connection of the driver, below all that is added to it."""

    def limit_connect(self, arguments: dict[str, Any], seconds: float) -> None:
        """Add to the arguments of a synchronous driver how long it may take to connect."""

    def limit_each_host(self, arguments: dict[str, Any], seconds: float) -> None:
        """Divide the time among several hosts, for an asynchronous driver: one may be silent."""

    def may_be_refused(self, error: Exception) -> bool:
        """Whether a connect failed by its user or password, as far as the driver tells."""

    def look(self, connection: Connection, driver: Any, wanted: int) -> Reached:
        """Ask the database what it is, in one round trip, and see how it was reached.

        Args:
            driver: Its driver's connection; None where a sandbox stands before that.
            wanted: How many connections one pool may open.
        """

    def diagnose(self, error: BaseException, seconds: float = ...) -> Diagnosis | None:
        """Tell why a connect failed; None where that is not known.

        Args:
            seconds: For the server to be asked, which is not always needed.
        """

    def descriptor(self, driver: Any) -> int | None:
        """Return the file descriptor of a driver's connection; None where it has no socket."""

    def is_closed(self, driver: Any) -> bool:
        """Whether the driver has closed its socket, whose number may be another's by now."""

    def tells_rest(self, driver: str) -> Callable[[Any], bool]:
        """Return what tells whether a driver's connection does nothing, in no transaction."""

    def ping(self, connection: PoolProxiedConnection, engine: Engine) -> None:
        """Ask the server, in one round trip, whether the connection lives; raise if not."""

    def awaits_begin(self, connection: PoolProxiedConnection, cursor: Any) -> bool:
        """Whether a statement has not been sent, for the BEGIN before it was not answered.

        Asked while it runs, and after it failed. One that was sent with a BEGIN that nobody will
        answer any more, for its connection is gone, counts as not sent.

        Args:
            cursor: What it was to be executed with.
        """

    def begins_with(self, driver: Any) -> bool:
        """Whether a BEGIN travels with the statement that runs, and was not answered yet."""

    def watch(self, driver: Any, note: Callable[[Leaving, Sent], None]) -> None:
        """Have a connection that was opened just now tell what its user leaves on it."""

    def clean(self, connection: ConnectionPoolEntry, hooks: Sequence[Sent]) -> None:
        """Make a connection like new again, which is in no transaction; raise where that fails.

        Args:
            hooks: What the application's hooks sent at connect, to be sent again.
        """

    def guard(self, connection: Connection, guards: Mapping[str, float]) -> None:
        """Set the server's deadlines of the transaction that begins, in its first trip if possible.

        Args:
            guards: By their settings' names, in seconds.

        Raises:
            InvalidOption: the database has none.
        """

    def struck(
        self, error: BaseException, own: Mapping[str, float], idle: float, ran: float, is_lost: bool
    ) -> tuple[str, float] | None:
        """Return which of those deadlines an error came from, and how long it is; None: from none.

        Args:
            own: Those of the session, which come before the settings'.
            idle: Seconds for which the connection was idle before its last statement.
            ran: Seconds for which that ran.
            is_lost: Whether the connection is.
        """

    def holds_write_lock(self, connection: PoolProxiedConnection) -> bool:
        """Whether the connection keeps every other writer out, from what the client knows."""

    def end(
        self,
        connections: Sequence[PoolProxiedConnection],
        apart: Callable[[Callable[[Connection], object]], None],
        *,
        is_abandoned: bool = False,
    ) -> None:
        """End, from outside, whatever these connections do, and roll it back.

        Args:
            apart: Does something with a new connection of its own; where several hosts are given,
                perhaps to another one.
            is_abandoned: Their event loop has ended.
        """

    def interrupt(self, driver: Any) -> None:
        """Stop what a thread runs on a synchronous connection.

        It may come too early, or be late and strike the next statement: so ask until it has ended,
        and use the connection no more.
        """

    async def break_off(self, driver: Any) -> None:
        """Stop what a cancelled call left running; the connection is closed next."""

    def say_farewell(self, driver: Any) -> None:
        """Close an idle connection whose driver would wait for the server to do so as well."""

    def cut(self, driver: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Close a driver's connection of a loop that does not run: nothing can be awaited there."""

    def disown(self, drivers: Iterable[Any]) -> None:
        """Part with the parent's connections in a forked child, without a word to its server."""

    def dispose(self) -> None:
        """Remove what the backend itself has made (a private file)."""


class SchemaLock(Protocol):
    """The lock that the database holds while one of many starters changes its schema.

    It works on connections of any origin, engineroom's own or not, and ends with its holder.
    """

    longest_pause: float
    """Seconds between two tries to take it."""
    autocommit_block: Callable[[], AbstractContextManager[None]] | None
    """What stands in for Alembic's own, which leaves the transaction; None where that may be."""

    def options(self) -> dict[str, Any]:
        """Return the execution options of a connection that is to take it."""

    def look_options(self) -> dict[str, Any]:
        """Return those of a connection that only looks whether there is anything to do."""

    def begin(self, connection: Connection, *, writes: bool) -> None:
        """Begin a transaction to take the lock in, or one that only looks.

        Nothing of that stays on the connection, which is lent again: each of its transactions would
        state it from then on.
        """

    def looking(self, connection: Connection) -> AbstractContextManager[None]:
        """Have the database refuse whatever would be written meanwhile."""

    def is_refusal(self, error: BaseException | None) -> bool:
        """Whether this error of the driver says that a write was refused so."""

    def set_guards(self, connection: Connection, *, whole_session: bool) -> None:
        """Keep the server's deadlines from the work that is done under the lock.

        Args:
            whole_session: For more than the transaction, until `release` puts back what was there.
        """

    def try_take(self, connection: Connection, *, whole_session: bool) -> bool:
        """Take the lock, if nobody has it; it goes with the transaction.

        Args:
            whole_session: Keep it until `release`; where a transaction is needed for that, it is
                begun here, and otherwise none is left open.

        Raises:
            InvalidOption: it would go at once, for the connection is in AUTOCOMMIT.
        """

    def rest(self, connection: Connection) -> None:
        """Hold nothing until the next try, in a transaction in which nothing was done yet."""

    def minding_drops(self, connection: Connection) -> AbstractContextManager[None]:
        """Refuse to drop what cannot be dropped in a transaction that somebody else has begun."""

    def finish(self, connection: Connection) -> None:
        """Commit what was done while the whole session had it, if it may be."""

    def release(self, connection: Connection) -> None:
        """Give back what `whole_session` had taken, if it was; no transaction is open any more."""

    def holder(self, connection: Connection) -> str:
        """Say who holds the lock: since when, and doing what, as far as the database tells."""

    def cure(self) -> str:
        """Say how to find or end who holds it."""


def find_schema_lock(place: Engine | Connection) -> SchemaLock | None:
    """Find the lock of a database by what is connected to it; None where engineroom knows none."""
    name = place.dialect.name
    if name == "postgresql" and place.get_execution_options().get(POOLER) == "transaction":
        from .pooled import TransactionLock

        return TransactionLock()
    if name == "postgresql":
        from .postgresql import AdvisoryLock

        return AdvisoryLock()
    if name == "sqlite":
        from .sqlite import FileLock

        return FileLock()
    if name in MYSQL:
        from .mysql.named_lock import NamedLock

        return NamedLock()
    return None


def find_backend(url: URL, settings: DatabaseSettings) -> Backend:
    """Find the backend of a URL.

    Raises:
        InvalidURL: no backend supports this database.
    """
    name = url.get_backend_name()
    if name == "postgresql" and settings.pooler is not None:
        from .pooled import SessionPooled, TransactionPooled

        if settings.pipeline == "on":
            raise InvalidOption(
                f"pipeline='on' (DB_PIPELINE) cannot be had behind a pooler "
                f"(pooler={settings.pooler!r}). Leave it out."
            )
        return (SessionPooled if settings.pooler == "session" else TransactionPooled)(
            url, settings.guards
        )
    if name == "postgresql":
        from .postgresql import PostgreSQL

        return PostgreSQL(url, settings.guards, settings.pipeline)
    if name == "sqlite":
        from .sqlite import SQLite

        for name in settings.given & ACCOUNT.keys():
            raise InvalidOption(
                f"{name}= says nothing for SQLite: a file has no users. Leave it out."
            )
        for name in settings.given & Guards.__annotations__.keys():
            raise InvalidOption(
                f"{name}= says nothing for SQLite, which has no server. Leave it out."
            )
        return SQLite(url, settings.busy_timeout)
    if name in MYSQL:
        from .mysql import MySQL

        return MySQL(url, settings.guards)
    nearest = difflib.get_close_matches(name, SUPPORTED, 1)
    hint = f"Did you mean {nearest[0]}://? " if nearest else ""
    *some, last = (f"{each}://" for each in SUPPORTED)
    raise InvalidURL(
        f"{masked(url)}: engineroom does not support {name!r}. {hint}Supported are "
        f"{', '.join(some)} and {last}."
    )


def refuse_unknown_driver(url: URL, drivers: dict[Side, dict[str, str]]) -> None:
    """Refuse a URL that names a driver of neither side.

    Raises:
        InvalidURL: it does.
    """
    name, _, driver = url.drivername.partition("+")
    known = [one for names in drivers.values() for one in names]
    if driver and driver not in known:
        raise InvalidURL(
            f"{masked(url)}: engineroom does not support the driver {driver!r}. Write {name}://, "
            f"which takes the best that is installed, or one of {', '.join(dict.fromkeys(known))}."
        )


APART = {"psycopg2": "psycopg2-binary"}  # the package of a driver that no extra brings


def choose_driver(url: URL, drivers: dict[str, str], extra: str) -> URL:
    """Return the URL with the first driver that is installed.

    Args:
        url: Where a driver is named that is among `drivers`, no other is considered.
        drivers: SQLAlchemy's name of each driver, best first, and the module that it needs.
        extra: The extra of engineroom that brings them.

    Raises:
        DriverNotInstalled: none is installed.
    """
    named = url.drivername.partition("+")[2]
    names = [named] if named in drivers else list(drivers)
    for name in names:
        if find_spec(drivers[name]) is not None:
            return url.set(drivername=f"{url.get_backend_name()}+{name}")
    package = APART.get(names[0], f'"engineroom[{extra}]"')
    raise DriverNotInstalled(
        f"{masked(url)} needs {' or '.join(drivers[name] for name in names)} here, and "
        f"{'it is not' if len(names) == 1 else 'neither is'} installed. "
        f"Install it: pip install {package}."
    )
