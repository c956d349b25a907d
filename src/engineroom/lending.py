"""Who lends a connection: against a permit, seen to live, and taken back whoever returns it."""

from __future__ import annotations

import asyncio
import logging
import select
import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, cast

from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool

from .backends import Backend
from .errors import Holder, ManagerClosed, PoolDeadlock, PoolExhausted
from .forks import make_immortal
from .ledger import current_owner, describe
from .slots import WAITING, Permit, Slots

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
            while len(opened) < self.least and len(self.slots.held) < self.least:
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
        if record.dbapi_connection is None:  # it was lost
            self.is_filled = self.least == 0
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
            if ticket.waits and not self.refusal:  # (who comes later is not sent away by it)
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
            slots.leave(ticket)  # the next one in the queue is to be told as well
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
        self.next_look = self.plan_look(now, self.report_all_slow(now))

    def plan_look(self, now: float, seconds: float) -> float:
        """Plan to look again in so many seconds; return from when on a checkout is to do it."""
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
