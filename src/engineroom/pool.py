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
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, ClassVar, cast

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
from .errors import ConnectTimeout, Holder, ManagerClosed, PoolDeadlock, PoolExhausted
from .ledger import current_owner, describe
from .slots import GROW_AFTER, WAITING, Permit, Slots

logger: logging.Logger = logging.getLogger("engineroom.pool")

# POLLRDHUP, where the platform has it: the other side has closed its half of the connection.
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR | select.POLLNVAL
SPOKE = select.POLLIN

LEAST_CONNECT = 0.1  # seconds that connecting has, though waiting took all but that of the time
SLACK = 0.01  # seconds by which a timer may be early


class Watch:
    """What a pool needs to look at one of its connections without asking the server."""

    __slots__ = ("driver", "poll", "returned")

    def __init__(self, driver: Any, descriptor: int) -> None:
        self.driver: weakref.ref[Any] = weakref.ref(driver)
        self.returned: float = 0.0
        watcher = select.poll()
        watcher.register(descriptor, SPOKE | HUNG_UP)
        self.poll: Callable[[int], list[tuple[int, int]]] = watcher.poll


class Lent(weakref.ref[PoolProxiedConnection]):
    """What was lent against which permit: a reference that keeps nothing alive."""

    __slots__ = ("permit",)

    permit: Permit


class Opener:
    """What a pool opens its connections with: SQLAlchemy's creator, counted and given a deadline.

    `Pool.recreate()` passes on what the pool was made with: the creator is taken out of it again.
    """

    def __init__(self, lender: Lender, creator: Any) -> None:
        self.creator: Any = creator.creator if isinstance(creator, Opener) else creator
        self.lender: weakref.ref[Lender] = weakref.ref(lender)

    def __call__(self, record: ConnectionPoolEntry) -> Any:
        """Open a connection in the time that its caller has left."""
        lender = cast(Lender, self.lender())  # who calls it is there
        connecting = lender.slots.connecting
        connecting.add(record)
        try:
            opened = lender.open_in_time(partial(self.creator, record), lender.seconds_left())
        finally:
            connecting.discard(record)
        lender.slots.connected()
        return opened


class Lender(QueuePool):
    """A pool that lends against permits, and looks at a connection before it hands it out.

    A permit is taken in `connect()`, before SQLAlchemy's own queue is touched, so that queue never
    waits. Two classes below add how a caller waits: in a thread, or on an event loop.
    """

    backend: ClassVar[Backend]
    engine: ClassVar[Engine]
    ping_after: ClassVar[float]  # seconds idle; 0: ask the server at every checkout
    spare: ClassVar[int]  # `max_overflow`; SQLAlchemy's own queue is told: no limit (-1)
    end_apart: ClassVar[Any]  # takes connections, and ends over another one what runs on them
    least: ClassVar[int]  # connections kept open from the first use on
    slow_after: ClassVar[float]  # seconds lent, before the log says so

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = -1,
        timeout: float = 30.0,
        **kw: Any,
    ) -> None:
        opener: Any = Opener(self, creator)
        super().__init__(opener, pool_size, max_overflow, timeout, **kw)
        self.slots: Slots = Slots(pool_size, self.spare)
        self.limit: float = timeout  # seconds to wait and connect
        self.next_look: float = 0.0  # when to look for connections that are held for too long
        self.ended: bool = False  # what comes back is closed, not kept
        self.is_filled: bool = self.least == 0
        self.refusal: str = ""  # why nothing is lent any more
        self._drivers: weakref.WeakSet[Any] = weakref.WeakSet()  # all that it has open

    def connect(self) -> PoolProxiedConnection:
        """Lend a connection that lives.

        Raises:
            PoolExhausted: none came free in time.
            PoolDeadlock: none ever would.
            ConnectTimeout: none was opened in time.
            ManagerClosed: it was closed meanwhile.
        """
        permit = self.slots.take() or self.wait_for(self.slots)
        permit.since = now = time.monotonic()
        permit.owner = current_owner()
        try:
            connection = super().connect()
            while not self._lives(connection, now):
                self._discard(connection)
                connection = super().connect()
            if self.refusal:
                self._discard(connection)
                raise ManagerClosed(self.refusal)
        except BaseException:
            self.slots.give(permit)
            raise
        permit.connection = lent = Lent(connection)
        lent.permit = permit
        connection.record_info["lent"] = lent  # type: ignore[index]
        if now >= self.next_look:
            self.look_for_slow(now)
        if not self.is_filled:
            self.is_filled = True
            self.fill_beside()
        return connection

    def fill_beside(self) -> None:
        """Open what is missing to the least number of connections, beside the caller."""
        raise NotImplementedError

    def fill(self) -> None:
        """Open connections until the least number is open; the first failure is the last."""
        opened: list[PoolProxiedConnection] = []
        try:
            while len(self.slots.held) + self.checkedin() < self.least:
                opened.append(self.connect())
        except Exception as error:  # noqa: BLE001  # who needs a connection will hear of it
            logger.info("The pool could not be filled to %d connections: %r", self.least, error)
        finally:
            for connection in opened:
                connection.close()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        """Take a connection back, and give its permit to the next in the queue.

        The one private name of SQLAlchemy's pool that we need: it is the only point that every
        return passes, `detach()` and the garbage collector's included; the `checkin` event is not.
        `tests/test_private_names.py` fails when it goes.
        """
        info: Any = record.record_info
        lent: Lent | None = info.pop("lent", None)
        now = time.monotonic()
        if watch := record.info.get("watch"):
            watch.returned = now
        if lent is not None and now - lent.permit.since > self.slow_after:
            self.report_slow(lent.permit, now)
        try:
            try:
                if self.ended or (self.overflow() > 0 and self.checkedin() >= self.size()):
                    self._close(record)  # SQLAlchemy would, but where it can be interrupted
            finally:
                super()._do_return_conn(record)
        finally:
            if lent is not None and lent.permit.connection is lent:
                self.slots.give(lent.permit)

    def _reclaim(self) -> None:
        """Take back the permits of connections that are gone and never came back.

        A listener that raises at `checkin` keeps SQLAlchemy from returning the connection.
        """
        for permit in self.slots.held:
            if permit.connection is not None and permit.connection() is None:
                self.slots.give(permit)

    def _lives(self, connection: PoolProxiedConnection, now: float) -> bool:
        """Look at a connection: its socket first, which costs nothing; the server when in doubt."""
        watch = connection.info.get("watch", self)
        if watch is self:  # it was opened just now
            connection.info["watch"] = self._watch(connection.driver_connection)
            return True
        if watch is None:  # it has no socket
            return True
        if self.backend.is_closed(watch.driver()):
            return False
        events = watch.poll(0)
        if events and events[0][1] & HUNG_UP:
            return False
        if not events and now - watch.returned < self.ping_after:
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
        self.is_filled = self.least == 0
        connection.invalidate()

    def _watch(self, driver: Any) -> Watch | None:
        descriptor = self.backend.descriptor(driver)
        if descriptor is not None or self._is_asyncio:
            self._drivers.add(driver)  # (sqlite3 has no weak references, and needs none of this)
        return None if descriptor is None else Watch(driver, descriptor)

    def wait_for(self, slots: Slots) -> Permit:
        """Wait in the queue for a permit.

        Raises:
            PoolExhausted: none came free in time.
            PoolDeadlock: none ever will, for every holder waits for another one.
        """
        self._reclaim()
        owner = current_owner()
        bell, ring = self.new_bell()
        ticket = slots.queue(owner, ring)
        keys = [owner, *self.stopped_loops()]
        try:
            if ticket.waits:
                WAITING.update(dict.fromkeys(keys, ticket))
                if stuck := slots.deadlocked():
                    raise self._deadlock(stuck)
                self.await_bell(bell, slots)
        except BaseException:
            slots.leave(ticket)
            raise
        finally:
            for key in keys:
                if WAITING.get(key) is ticket:
                    del WAITING[key]
        if self.refusal:
            raise ManagerClosed(self.refusal)
        if ticket.give_up():
            raise self._exhausted(slots)
        ticket.granted.waited = time.monotonic() - ticket.since
        return ticket.granted

    def new_bell(self) -> tuple[Any, Callable[[], object]]:
        """Return what a caller waits on, and what ends that from any thread."""
        raise NotImplementedError

    def await_bell(self, bell: Any, slots: Slots) -> None:
        """Wait until the bell rings, or the limit has passed."""
        raise NotImplementedError

    def stopped_loops(self) -> Iterable[object]:
        """Return the event loop that stands still while the caller waits, if there is one."""
        return ()

    def open_in_time(self, connect: Callable[[], Any], seconds: float) -> Any:
        """Open a connection; give up after so many seconds."""
        raise NotImplementedError

    def seconds_left(self) -> float:
        """Return how long the caller, who holds a permit, may take to connect."""
        owner, now = current_owner(), time.monotonic()
        spent = [
            now - permit.since + permit.waited
            for permit in self.slots.held
            if permit.owner == owner and permit.connection is None
        ]
        return max(self.limit - max(spent, default=0.0), LEAST_CONNECT)

    def _exhausted(self, slots: Slots) -> PoolExhausted:
        holders = self._holders([slots])
        return PoolExhausted(
            f"No connection came free within {self.limit:g} s: all {len(slots.permits)} are lent "
            f"(pool_size {slots.size} and overflow {slots.overflow}), and {slots.waiting} more "
            f"callers wait. Held by {'; '.join(map(str, holders))}. Hold connections for a shorter "
            "time, or raise pool_size.",
            slots.size,
            slots.overflow,
            slots.waiting,
            holders,
        )

    def _deadlock(self, stuck: list[Slots]) -> PoolDeadlock:
        holders = self._holders(stuck)
        size, overflow = sum(s.size for s in stuck), sum(s.overflow for s in stuck)
        return PoolDeadlock(
            f"No connection will ever come free: all {size + overflow} are lent (pool_size {size} "
            f"and overflow {overflow}), and each holder waits for another one. Held by "
            f"{'; '.join(map(str, holders))}. Do not open a session inside another one: use the "
            "first, or end it before.",
            size,
            overflow,
            sum(slots.waiting for slots in stuck),
            holders,
        )

    def _holders(self, of: list[Slots]) -> list[Holder]:
        now = time.monotonic()
        return [describe(permit, now) for slots in of for permit in slots.held]

    def look_for_slow(self, now: float) -> None:
        """Report what is held for too long, and plan the next look."""
        raise NotImplementedError

    def report_all_slow(self, now: float) -> float:
        """Report what is held for too long; return the seconds until the next may be."""
        ages = [0.0]
        for permit in self.slots.held:
            if now - permit.since > self.slow_after:
                self.report_slow(permit, now)
            else:
                ages.append(now - permit.since)
        return self.slow_after - max(ages) + SLACK

    def report_slow(self, permit: Permit, now: float) -> None:
        """Say once who holds a connection for too long."""
        if not permit.is_reported and permit.owner is not None:
            permit.is_reported = True
            logger.warning(
                "A connection is held for longer than %g s (DB_SLOW_CHECKOUT), by %s. Do slow work "
                "outside of the scope, or raise the limit.",
                self.slow_after,
                describe(permit, now),
            )

    def lent(self) -> list[PoolProxiedConnection]:
        """Return the connections that are lent."""
        references = [permit.connection for permit in self.slots.held]
        connections = [reference() for reference in references if reference is not None]
        return [connection for connection in connections if connection is not None]

    def refuse(self, why: str) -> None:
        """Lend nothing from now on, and send away who waits."""
        self.refusal = why
        self.slots.dismiss()

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
        """Cut every connection of a loop that does not run any more, and end what runs on them."""
        self.ended = True
        if overdue := self.lent():  # its tasks were never told
            try:
                self.end_apart(overdue)
            except Exception as error:  # noqa: BLE001  # the server ends them, if later
                logger.info("What an ended loop left running could not be ended: %r", error)
        for driver in list(self._drivers):
            self.backend.cut(driver, loop)


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

    def new_bell(self) -> tuple[threading.Lock, Callable[[], object]]:
        """Return a lock that is taken, and what opens it."""
        bell = threading.Lock()
        bell.acquire()
        return bell, bell.release

    def await_bell(self, bell: threading.Lock, slots: Slots) -> None:
        """Wait on the lock; now and then, see whether the pool should grow."""
        step = min(GROW_AFTER, self.limit / 4)
        end = time.monotonic() + self.limit
        growing = slots.may_grow
        while (left := end - time.monotonic()) > 0:
            if bell.acquire(timeout=min(left, step) if growing else left):
                return
            growing = slots.grow()

    def stopped_loops(self) -> Iterable[object]:
        """A thread that waits for a lock stops its event loop, if it runs one."""
        loop = asyncio._get_running_loop()
        return () if loop is None else (loop,)

    def open_in_time(self, connect: Callable[[], Any], seconds: float) -> Any:
        """Open a connection; the driver keeps the time (`Backend.limit_connect` told it)."""
        return connect()

    def fill_beside(self) -> None:
        """Fill in a thread, which ends with that."""
        threading.Thread(target=self.fill, name="engineroom-fill").start()

    def look_for_slow(self, now: float) -> None:
        """Look now, and at the first checkout when the next may be due: a pool has no thread."""
        self.next_look = now + self.report_all_slow(now)


class Shelf(AsyncAdaptedQueuePool, Lender):
    """The connections of one event loop: a task waits for its permit on an event."""

    keeper: AsyncGenerator[None]  # ends the shelf with its loop
    _growth: asyncio.TimerHandle | None = None
    _filling: asyncio.Task[None] | None = None

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

    def new_bell(self) -> tuple[asyncio.Event, Callable[[], object]]:
        """Return an event of the running loop, and what sets it from any thread."""
        bell, loop = asyncio.Event(), asyncio.get_running_loop()

        def ring() -> None:
            if asyncio._get_running_loop() is loop:
                bell.set()
            else:
                loop.call_soon_threadsafe(bell.set)

        return bell, ring

    def await_bell(self, bell: asyncio.Event, slots: Slots) -> None:
        """Wait on the event; one timer for all who wait sees whether the pool should grow."""
        if self._growth is None and slots.may_grow:
            self._plan_growth(min(GROW_AFTER, self.limit / 4))
        await_only(self._await_event(bell))

    async def _await_event(self, bell: asyncio.Event) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limit):
                await bell.wait()

    def _plan_growth(self, seconds: float) -> None:
        self._growth = asyncio.get_running_loop().call_later(seconds, self._grow)

    def _grow(self) -> None:
        """Grow, unless the loop lags: what came back has not been seen yet, and more to do will
        not make it faster.
        """
        due, self._growth = cast(asyncio.TimerHandle, self._growth).when(), None
        lags = asyncio.get_running_loop().time() - due > GROW_AFTER / 2
        if lags or self.slots.grow():
            self._plan_growth(GROW_AFTER)

    def open_in_time(self, connect: Callable[[], Any], seconds: float) -> Any:
        """Open a connection; cancel that when the time is over."""
        return await_only(self._open_in_time(connect, seconds))

    async def _open_in_time(self, connect: Callable[[], Any], seconds: float) -> Any:
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                return await greenlet_spawn(connect)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise ConnectTimeout(
                f"No connection was opened within {self.limit:g} s: the server did not answer for "
                f"the last {seconds:.1f} s of them. See whether it is up and can be reached, or "
                "raise pool_timeout."
            ) from None

    def fill_beside(self) -> None:
        """Fill in a task; the loop's end cancels it."""
        self._filling = asyncio.get_running_loop().create_task(greenlet_spawn(self.fill))

    def look_for_slow(self, now: float) -> None:
        """Look now, and again by a timer for as long as anything is lent."""
        self.next_look = inf
        seconds = self.report_all_slow(now)
        asyncio.get_running_loop().call_later(seconds, self._look_again)

    def _look_again(self) -> None:
        if self.slots.held:
            self.look_for_slow(time.monotonic())
        else:
            self.next_look = 0.0


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
        if len(self.shelves) > 1:
            self.reap()
        shelf = self.shelves.get(loop) or self._open(loop)
        return shelf.connect() if self._initialized else self._connect_first(shelf)

    def _connect_first(self, shelf: Shelf) -> PoolProxiedConnection:
        """Make the first connection, which initializes the dialect, in one loop at a time.

        SQLAlchemy guards that moment with a lock of one event loop, and there may be several.
        """
        try:
            turn = self._first.take() or shelf.wait_for(self._first)
        except PoolExhausted as error:
            raise ConnectTimeout(
                f"No connection was opened within {shelf.limit:g} s: the first one is still on its "
                f"way, for {error.holders[0]}. See whether the server is up and can be reached, or "
                "raise pool_timeout."
            ) from None
        turn.owner, turn.since = current_owner(), time.monotonic()
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
