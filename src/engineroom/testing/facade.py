"""What SQLAlchemy takes for connections inside a sandbox: facades of the one that there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, ClassVar, NoReturn, TypeVar

from sqlalchemy import NullPool
from sqlalchemy.engine import Engine
from sqlalchemy.util import await_only, greenlet_spawn

from ..backends import Role
from ..cancellation import settle
from ..engines import EngineRoom
from ..errors import NotInSandbox
from . import background
from .outer import OuterTransaction
from .parts import Part
from .texts import CURE

T = TypeVar("T")

# What cursors of the drivers do beside SQLAlchemy, and so beside the turns.
BEYOND = {"copy", "copy_expert", "copy_from", "copy_to", "callproc", "stream", "scroll"}
# What asyncpg's connection has for COPY, which can take its turn.
COPY = {
    "copy_records_to_table",
    "copy_to_table",
    "copy_from_table",
    "copy_from_query",
}


class Stage(NullPool):
    """The pool of an engine inside a sandbox. The engine's own stands behind it."""

    def __init__(
        self, engine: Engine, room: EngineRoom, role: Role, outer: OuterTransaction
    ) -> None:
        self.behind: Any = engine.pool
        reads = role is Role.READER
        part = partial(Part, room, stands_alone=reads, reads=reads)
        is_async = engine.dialect.is_async
        super().__init__(lambda: Facade(outer, part(), is_async), dialect=engine.dialect)

    def recreate(self) -> Stage:
        """Return itself: `engine.dispose()`, inside a sandbox, has nothing to close."""
        return self

    def dispose(self) -> None:
        """Close nothing."""

    async def reserve(self, entry: object) -> Unreserved:
        """Nothing has to be waited for: the turn comes with the first statement."""
        return Unreserved()


class Unreserved:
    """Stands in for a permit that was waited for."""

    def hand_to(self, thread: object) -> None:
        """There is nothing to hand over."""

    def cancel(self) -> None:
        """There is nothing to give back."""


class Facade:
    """A DBAPI connection whose transactions are parts of the outer one.

    What the dialects set on a connection is taken where it has a meaning here: AUTOCOMMIT, and
    read-only. The level of isolation is that of the outer transaction.
    """

    outer: OuterTransaction
    part: Part
    is_async: bool

    def __init__(self, outer: OuterTransaction, part: Part, is_async: bool) -> None:
        self.__dict__.update(outer=outer, part=part, is_async=is_async)

    def cursor(self, *args: Any, **kw: Any) -> FacadeCursor:
        """Return a cursor; it sends nothing yet."""
        return FacadeCursor(self, self.outer.connection.adapted, args, kw)

    def commit(self) -> None:
        """Commit, as far as the outer transaction lets anything be."""
        self.wait_for(self.outer.commit(self.part))

    def rollback(self) -> None:
        """Roll back what was done since the last commit."""
        if self.part.savepoint or self.part.is_lost:
            self.wait_for(self.outer.roll_back(self.part))

    def close(self) -> None:
        """Roll back; the real connection stays open."""
        self.rollback()
        self.part.is_closed = True

    terminate = close

    def run(self, call: Callable[[], T], statement: str = "", parameters: Any = None) -> T:
        """Run something on the real connection, when it is this one's turn."""
        return self.wait_for(self.outer.run(self.part, call, statement, parameters))

    def wait_for(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for what the background loop does; an interruption stops it there as well."""
        future = background.submit(coroutine)
        if self.is_async:
            return await_only(self._await(future))
        try:
            return future.result()
        except BaseException:
            if not future.done():  # Ctrl-C
                self._stop()
            raise

    async def _await(self, future: Future[T]) -> T:
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if not future.done():
                self._stop()
                await settle(background.wait(self.outer.rest(self.part)))
            waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            raise

    def _stop(self) -> None:
        background.submit(self.outer.stop(self.part))

    def tpc_begin(self, *xid: object) -> NoReturn:
        """Refuse a transaction in two phases."""
        raise NotInSandbox(
            f"A transaction in two phases cannot be a part of a sandbox's own. {CURE}"
        )

    # -- what dialects and drivers set --------------------------------------------------------

    def set_isolation_level(self, level: Any) -> None:
        """Take AUTOCOMMIT, by its name (asyncpg) or number (psycopg2)."""
        if level is not None:  # psycopg, after `autocommit`
            self.part.stands_alone = level in ("autocommit", 0)

    def set_autocommit(self, value: bool) -> None:
        """Let each statement stand alone, or not."""
        self.part.stands_alone = value

    def set_read_only(self, value: bool | None) -> None:
        """Have the server refuse writes, or not."""
        self.part.reads = bool(value)

    def set_deferrable(self, value: bool | None) -> None:
        """Nothing: the snapshot is that of the outer transaction."""

    SETTERS: ClassVar[dict[str, Callable[[Facade, Any], None]]] = {
        "autocommit": set_autocommit,
        "read_only": set_read_only,
        "readonly": set_read_only,
        "isolation_level": set_isolation_level,
        "deferrable": set_deferrable,
    }

    def __setattr__(self, name: str, value: Any) -> None:
        self.SETTERS[name](self, value)

    @property
    def autocommit(self) -> bool:
        """Whether each statement stands alone."""
        return self.part.stands_alone

    @property
    def real_driver(self) -> Any:
        """The driver's own connection, for those who know when its turn is."""
        return self.outer.connection.driver

    @property
    def driver_connection(self) -> RawDriver:
        """What stands for the driver's own connection, which everyone here shares."""
        return RawDriver(self)

    async def copy(self, verb: str, *args: Any, **kw: Any) -> Any:
        """Run a COPY of asyncpg's, when it is this one's turn."""
        call = partial(getattr(self.real_driver, verb), *args, **kw)
        running = self.outer.run(self.part, lambda: await_only(call()), "COPY")
        return await self._await(background.submit(running))

    def run_async(self, work: object) -> NoReturn:
        """Refuse to work on the driver's own connection."""
        refuse_raw()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.outer.connection.adapted, name)


class FacadeCursor:
    """A cursor whose calls to the server run when it is their turn."""

    def __init__(
        self, connection: Facade, real: Any, args: Sequence[Any], options: dict[str, Any]
    ) -> None:
        streams = bool(args or options)  # by its name, or as `server_side`
        if args and hasattr(real, "get_backend_pid"):  # psycopg2 sees no transaction, and refuses
            options = {"withhold": True, **options}
        make = partial(real.cursor, *args, **options)
        cursor = connection.run(make) if streams else at_once(make)
        if streams:
            connection.part.cursors.append(cursor)
        self.__dict__.update(_connection=connection, _real=cursor, _streams=streams)

    def execute(self, operation: Any, *parameters: Any) -> Any:
        """Execute a statement."""
        call = partial(self._real.execute, operation, *parameters)
        given = parameters[0] if parameters else None
        return self._connection.run(call, text_of(operation, self._connection.real_driver), given)

    def executemany(self, operation: Any, parameters: Any) -> Any:
        """Execute a statement for each set of parameters."""
        call = partial(self._real.executemany, operation, parameters)
        return self._connection.run(call, text_of(operation, self._connection.real_driver))

    def fetchone(self) -> Any:
        """Fetch a row."""
        return self._fetch(self._real.fetchone)

    def fetchmany(self, *args: Any, **kw: Any) -> Any:
        """Fetch some rows."""
        return self._fetch(partial(self._real.fetchmany, *args, **kw))

    def fetchall(self) -> Any:
        """Fetch the rows that are left."""
        return self._fetch(self._real.fetchall)

    def close(self) -> None:
        """Close the cursor."""
        if self._streams and self._connection.part.savepoint:
            self._connection.run(self._real.close)
        elif not self._streams:
            at_once(self._real.close)

    def _fetch(self, fetch: Callable[[], T]) -> T:
        return self._connection.run(fetch) if self._streams else fetch()

    def __iter__(self) -> Iterator[Any]:
        while (row := self.fetchone()) is not None:
            yield row

    @property
    def connection(self) -> Facade:
        """The connection that made it."""
        facade: Facade = self._connection
        return facade

    def __getattr__(self, name: str) -> Any:
        if name in BEYOND:
            raise NotInSandbox(
                f"cursor.{name}() speaks to the driver's own connection, which all sessions of the "
                f"sandbox share. {CURE}"
            )
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


def text_of(operation: Any, connection: Any) -> str:
    """Return a statement as text: the drivers take bytes, too, and objects of their own."""
    if hasattr(operation, "as_string"):  # psycopg.sql
        operation = operation.as_string(connection)
    return operation.decode() if isinstance(operation, bytes) else str(operation)


def at_once(work: Callable[[], T]) -> T:
    """Do what is written for a greenlet but waits for nothing, as psycopg's adapter makes cursors.

    Raises:
        AssertionError: it does wait for something.
    """
    coroutine = greenlet_spawn(work)
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise AssertionError(f"{work} has something to wait for")


class RawDriver:
    """Stands for the driver's own connection, which belongs to the background loop."""

    pgconn = None  # (the question whether psycopg's has begun anything)

    def __init__(self, connection: Facade) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        if (
            name in COPY
            and self._connection.is_async
            and hasattr(self._connection.real_driver, name)
        ):
            return partial(self._connection.copy, name)
        return refuse_raw()


def refuse_raw() -> NoReturn:
    """Refuse the driver's own connection.

    Raises:
        NotInSandbox: always.
    """
    raise NotInSandbox(
        "The driver's own connection was asked for inside a sandbox, where all sessions share one "
        f"that lives in another event loop. Use SQLAlchemy's. Or: {CURE}"
    )
