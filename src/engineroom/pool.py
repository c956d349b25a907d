"""Who lends connections: SQLAlchemy's pools, one per event loop, with liveness and clean return."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import select
import threading
import time
import weakref
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy.engine import Engine
from sqlalchemy.pool import (
    AsyncAdaptedQueuePool,
    ConnectionPoolEntry,
    PoolProxiedConnection,
    QueuePool,
)
from sqlalchemy.util import await_only, greenlet_spawn

from .backends import Backend
from .cancellation import settle
from .errors import PoolExhausted
from .ledger import Ledger, current_task, owner_name
from .slots import Permit, Slots

logger: logging.Logger = logging.getLogger("engineroom.pool")

# POLLRDHUP, where the platform has it: the other side has closed its half of the connection.
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR | select.POLLNVAL
SPOKE = select.POLLIN


class Lender(QueuePool):
    """A pool that lends against permits, and looks at a connection before it hands it out.

    A permit is taken in `connect()`, before SQLAlchemy's own queue is touched, so that queue never
    waits. Two classes below add how a caller waits: in a thread, or on an event loop.
    """

    backend: ClassVar[Backend]
    ledger: ClassVar[Ledger]
    engine: ClassVar[Engine]
    ping_after: ClassVar[float]  # seconds idle; 0: ask the server at every checkout

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: float = 30.0,
        **kw: Any,
    ) -> None:
        super().__init__(creator, pool_size, max_overflow, timeout, **kw)
        self.slots: Slots = Slots(pool_size + max_overflow)
        self.wait_limit: float = timeout  # seconds
        self.ended: bool = False  # what comes back is closed, not kept
        self._drivers: weakref.WeakSet[Any] = weakref.WeakSet()  # all that it has open

    def connect(self) -> PoolProxiedConnection:
        """Lend a connection that lives.

        Raises:
            PoolExhausted: none came free in time.
        """
        permit = self.slots.take() or self.wait_for(self.slots)
        permit.since = time.monotonic()
        permit.thread = threading.get_ident()
        permit.task = current_task()
        try:
            connection = super().connect()
            while not self._lives(connection):
                self._discard(connection)
                connection = super().connect()
        except BaseException:
            self.slots.give(permit)
            raise
        permit.connection = weakref.ref(connection)
        connection.record_info["permit"] = permit  # type: ignore[index]
        return connection

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        """Take a connection back, and give its permit to the next in the queue.

        The one private name of SQLAlchemy's pool that we need: it is the only point that every
        return passes, `detach()` and the garbage collector's included; the `checkin` event is not.
        `tests/test_private_names.py` fails when it goes.
        """
        info: Any = record.record_info
        permit = info.pop("permit", None)
        record.info["returned"] = time.monotonic()
        try:
            try:
                if self.ended or (self.overflow() > 0 and self.checkedin() >= self.size()):
                    self._close(record)  # SQLAlchemy would, but where it can be interrupted
            finally:
                super()._do_return_conn(record)
        finally:
            if permit is not None:
                self.slots.give(permit)

    def _lives(self, connection: PoolProxiedConnection) -> bool:
        """Look at a connection: its socket first, which costs nothing; the server when in doubt."""
        info = connection.info
        poll = info.get("poll")
        if poll is None:  # it was opened just now
            info["poll"] = self._watch(connection)
            return True
        if poll is NO_SOCKET:
            return True
        if self.backend.descriptor(connection.driver_connection) is None:
            return False  # the driver has closed it: the number may be another socket's by now
        events = poll(0)
        if events and events[0][1] & HUNG_UP:
            return False
        if not events and time.monotonic() - info["returned"] < self.ping_after:
            return True
        return self._answers(connection)

    def _answers(self, connection: PoolProxiedConnection) -> bool:
        """Ask the server, in one round trip."""
        try:
            self.backend.ping(connection, self.engine)
        except Exception as error:  # noqa: BLE001  # whatever it says, it is dead
            logger.info("A pooled connection was found dead and is replaced: %r", error)
            return False
        except BaseException:
            self._discard(connection)
            raise
        return True

    def _close(self, record: ConnectionPoolEntry) -> None:
        """Close a connection that came back."""
        record.close()

    def _discard(self, connection: PoolProxiedConnection) -> None:
        """Close a connection that was lent, and free its place in the pool."""
        connection.invalidate()

    def _watch(self, connection: PoolProxiedConnection) -> Any:
        driver = connection.driver_connection
        descriptor = self.backend.descriptor(driver)
        if descriptor is not None or self._is_asyncio:
            self._drivers.add(driver)  # (sqlite3 has no weak references, and needs none of this)
        if descriptor is None:
            return NO_SOCKET
        watcher = select.poll()
        watcher.register(descriptor, SPOKE | HUNG_UP)
        return watcher.poll

    def wait_for(self, slots: Slots) -> Permit:
        """Wait in the queue for a permit; how, the two classes below say."""
        raise NotImplementedError

    def _exhausted(self) -> PoolExhausted:
        holders = ", ".join(self._describe(permit) for permit in self.slots.held)
        return PoolExhausted(
            f"No connection came free within {self.wait_limit:g} s: all {len(self.slots.permits)} "
            f"are lent (pool_size {self.size()} and overflow), and {self.slots.waiting} more "
            f"callers wait. Held by {holders}. Hold connections for a shorter time, or raise "
            "pool_size."
        )

    def _describe(self, permit: Permit) -> str:
        """Say who holds a permit: the scope whose connection it is, or just the task or thread."""
        seconds = f"for {time.monotonic() - permit.since:.1f} s"
        held = permit.connection
        for entry in self.ledger:
            if entry.connection is not None and held is not None and entry.connection() is held():
                return f"the {entry.kind} that {entry.owner} opened at {entry.where}, {seconds}"
        return f"{owner_name(permit.thread, permit.task)}, {seconds}"

    def lent(self) -> list[PoolProxiedConnection]:
        """Return the connections that are lent."""
        references = [permit.connection for permit in self.slots.held]
        connections = [reference() for reference in references if reference is not None]
        return [connection for connection in connections if connection is not None]

    def end(self) -> None:
        """Close what is idle, and from now on whatever comes back."""
        if not self.ended:
            self.ended = True
            self.dispose()

    def disown(self) -> None:
        """Forget every connection after a fork: they are the parent's.

        No destructor of theirs may run, since it would write to the parent's sockets: the objects
        are kept for ever.
        """
        self.ended = True
        self.backend.disown(list(self._drivers))
        for inherited in (self, *self.lent()):
            make_immortal(inherited)

    def reap(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cut every connection of a loop that does not run any more."""
        self.ended = True
        for driver in list(self._drivers):
            self.backend.cut(driver, loop)


# What `_watch` leaves for a connection that has no socket.
NO_SOCKET: Any = object()


def part_event_loops() -> None:
    """Give the event loops that a forked child inherited an epoll set of their own.

    A fork shares the set itself: a child that leaves its inherited loop, by returning through
    `asyncio.run`, would take out of it what the parent's loop waits for.
    """
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():  # no Linux, no epoll: a kqueue is not inherited
        return
    for descriptor in list(descriptors.iterdir()):
        try:
            if str(descriptor.readlink()) == "anon_inode:[eventpoll]":
                with select.epoll() as empty:
                    os.dup2(empty.fileno(), int(descriptor.name), inheritable=False)
        except OSError:  # the descriptor of the listing itself is gone by now
            continue


def make_immortal(forgotten: object) -> None:
    """Keep an object from ever being destroyed, the interpreter's own end included."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(forgotten))


class ThreadPool(Lender):
    """The synchronous side's pool: a thread waits for its permit on a lock."""

    def wait_for(self, slots: Slots) -> Permit:
        """Wait on a lock."""
        bell = threading.Lock()
        bell.acquire()
        ticket = slots.queue(bell.release)
        try:
            bell.acquire(timeout=self.wait_limit)
        except BaseException:
            slots.leave(ticket)
            raise
        if ticket.give_up():
            raise self._exhausted()
        return ticket.granted


class Shelf(AsyncAdaptedQueuePool, Lender):
    """The connections of one event loop: a task waits for its permit on a future."""

    keeper: AsyncGenerator[None]  # ends the shelf with its loop

    def end_here(self) -> None:
        """Close what is idle, and from now on whatever comes back."""
        super().end()

    def end(self) -> None:
        """End the shelf, and with it what would have ended it later."""
        await_only(self.keeper.aclose())

    # Both in a task of its own: interrupted, SQLAlchemy's pool would log it and miss the place.

    def _close(self, record: ConnectionPoolEntry) -> None:
        if record.dbapi_connection is None:  # (the garbage collector's is closed already)
            return
        try:
            await_only(settle(greenlet_spawn(super()._close, record)))
        except asyncio.CancelledError as error:
            error.add_note(
                "The cancellation struck after the transaction had ended, as its connection was "
                "closed: what was committed stays committed."
            )
            raise

    def _discard(self, connection: PoolProxiedConnection) -> None:
        await_only(settle(greenlet_spawn(super()._discard, connection)))

    def wait_for(self, slots: Slots) -> Permit:
        """Wait on an event of the loop."""
        return await_only(self._wait_on_loop(slots))

    async def _wait_on_loop(self, slots: Slots) -> Permit:
        loop = asyncio.get_running_loop()
        granted = asyncio.Event()
        ticket = slots.queue(partial(loop.call_soon_threadsafe, granted.set))
        try:
            async with asyncio.timeout(self.wait_limit):
                await granted.wait()
        except TimeoutError:
            pass
        except BaseException:
            slots.leave(ticket)
            raise
        if ticket.give_up():
            raise self._exhausted()
        return ticket.granted


class LoopPool(AsyncAdaptedQueuePool):
    """The asynchronous side's pool: a shelf for each event loop, behind one engine.

    A connection belongs to the loop that opened it. So this pool lends nothing itself: it finds the
    shelf of the running loop, or makes it, and ends it when its loop ends.
    """

    shelf_class: ClassVar[type[Shelf]]

    def __init__(self, creator: Any, **kw: Any) -> None:
        super().__init__(creator, **kw)
        kw.pop("_dispatch", None)
        self._make_shelf = partial(self.shelf_class, creator, **kw)
        self.shelves: dict[asyncio.AbstractEventLoop, Shelf] = {}
        self._first = Slots(1)
        self._initialized = False

    def connect(self) -> PoolProxiedConnection:
        """Lend a connection of the running loop."""
        loop = asyncio.get_running_loop()
        shelf = self.shelves.get(loop) or self._open(loop)
        return shelf.connect() if self._initialized else self._connect_first(shelf)

    def _connect_first(self, shelf: Shelf) -> PoolProxiedConnection:
        """Make the first connection, which initializes the dialect, in one loop at a time.

        SQLAlchemy guards that moment with a lock of one event loop, and there may be several.
        """
        turn = self._first.take() or shelf.wait_for(self._first)
        try:
            if not self._initialized:
                connection = shelf.connect()
                self._initialized = True
                return connection
        finally:
            self._first.give(turn)
        return shelf.connect()

    def _open(self, loop: asyncio.AbstractEventLoop) -> Shelf:
        self.reap()
        shelf = self._make_shelf()
        shelf.dispatch = self.dispatch  # the engine's listeners hear the connections of all loops
        shelf.keeper = self._end_with_loop(loop, shelf)
        self.shelves[loop] = shelf
        await_only(anext(shelf.keeper))  # runs to its yield, without giving way to other tasks
        return shelf

    async def _end_with_loop(
        self, loop: asyncio.AbstractEventLoop, shelf: Shelf
    ) -> AsyncGenerator[None]:
        """Stand at the `yield` until `loop.shutdown_asyncgens()`: the only hook at a loop's end."""
        try:
            yield
        finally:
            self.shelves.pop(loop, None)
            await greenlet_spawn(shelf.end_here)

    def reap(self) -> None:
        """Part with the loops that were closed by hand, of which no hook told us."""
        for loop in list(self.shelves):  # (other threads add theirs meanwhile)
            shelf = self.shelves.pop(loop, None) if loop.is_closed() else None
            if shelf is not None:
                shelf.reap(loop)

    def dispose(self) -> None:
        """Close what is idle in every loop; `AsyncEngine.dispose()` comes here."""
        self.reap()
        for loop, shelf in list(self.shelves.items()):
            if loop is asyncio.get_running_loop():
                shelf.end()
            elif loop.is_running():
                asyncio.run_coroutine_threadsafe(shelf.keeper.aclose(), loop)
            else:
                self.shelves.pop(loop).reap(loop)
