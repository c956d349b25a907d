"""Who lends a connection: against a permit, seen to live, and taken back whoever returns it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import select
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from socket import SHUT_RDWR, socket
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection, QueuePool
from sqlalchemy.util.queue import Empty, Full

from .backends import ASK_FOR, Backend, Diagnosis, Leaving, Sent
from .cancellation import SETTLE_LIMIT
from .cap import CAPS, CameBack, Cap, Stay, stay_of
from .deadlines import GRACE
from .errors import ConnectTimeout, Holder, ManagerClosed, PoolDeadlock, PoolExhausted
from .forks import make_immortal
from .ledger import (
    LENT,
    berth_of,
    current_owner,
    describe,
    describe_held,
    has_ended,
)
from .slots import WAITING, Permit, Slots, Ticket

logger: logging.Logger = logging.getLogger("engineroom.pool")

SPOKE = select.POLLIN
# POLLRDHUP, where the platform has it: the other side has closed its half of the connection.
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR | select.POLLNVAL
GONE = [(0, HUNG_UP)]  # what a socket says that the driver has closed

T = TypeVar("T")

# Seconds after the last answer of its server in which a connection is not looked at: each look is a
# system call, 2 % of a small unit's CPU. Under load most rest for less.
JUST_NOW = 0.002
SHORT_PAUSE, LONG_PAUSE = 0.02, 0.5  # seconds before a server that refuses is asked again
TRIES = 3  # to replace a connection, where others come back to the pool instead
CLEAN_LIMIT = 1.5  # seconds; a server that answers takes a millisecond
LEAST_CONNECT = 0.1  # seconds that connecting has, though waiting took all but that of the time
RECOVER_EVERY = 0.05  # seconds, where always somebody waits
SLACK = 0.01  # seconds by which a timer may be early

# Connections that are being rolled back, and since when: noted around the dialect's own verb.
ROLLING_BACK: dict[PoolProxiedConnection, float] = {}


class Berth:
    """What a pool knows of one connection: against which permit it is lent, and how it is seen.

    It lies in the connection's `info`, which goes with it where it is detached; and for whoever
    asks often in the `record_info` of its place in the pool. (What is asked for `info` keeps it,
    and Python then finds no method of that proxy without a search.)
    """

    __slots__ = (
        "__weakref__",
        "answered",
        "driver",
        "expires",
        "hooks",
        "left",
        "lender",
        "lent",
        "permit",
        "poll",
        "record",
        "returned",
        "slots",
        "stay",
    )

    driver: Callable[[], Any]  # a weak reference; of a driver without them, what returns None
    lender: weakref.ref[Lender]
    poll: Callable[[int], list[tuple[int, int]]] | None  # None: it has no socket to look at
    record: Callable[[], ConnectionPoolEntry | None]  # a weak reference to its place in the pool

    def __init__(self, slots: Slots, driver: Callable[[], Any], descriptor: int | None) -> None:
        self.slots: Slots = slots
        self.driver = driver
        self.returned: float = 0.0  # 0: it was never lent
        self.answered: float = 0.0  # when the server did, for its last holder; 0: not known
        self.expires: float = inf  # when it is too old to be lent again
        self.permit: Permit | None = None
        self.lent: weakref.ref[PoolProxiedConnection] | None = None
        self.stay: Stay | None = None  # under a limit over several pools
        self.left: Leaving = Leaving.NOTHING  # by the one to whom it is lent
        self.hooks: list[Sent] = []  # what was sent at connect, and left something as well
        self.poll = None
        if descriptor is not None:
            watcher = select.poll()
            watcher.register(descriptor, SPOKE | HUNG_UP)
            self.poll = watcher.poll

    def lend(self, connection: PoolProxiedConnection, permit: Permit) -> None:
        """Note against which permit it is lent."""
        self.lent = permit.connection = weakref.ref(connection)
        self.permit, permit.key = permit, id(connection)
        LENT[permit.key] = permit

    def release(self) -> Permit | None:
        """Return that permit: it is lent no more."""
        permit, self.permit = self.permit, None
        # (`_reclaim` may have come first, and it be another's.)
        if permit is not None and permit.connection is self.lent:
            LENT.pop(permit.key, None)
        return permit

    def note(self, leaving: Leaving, sent: Sent) -> None:
        """Note what its user leaves on it, or the application's connect hooks before."""
        record = self.record()
        if not self.returned and record is not None and not record.in_use:
            self.hooks.append(sent)
        elif leaving > Leaving.CALLED:
            self.left = max(self.left, leaving)


def forfeit(connection: PoolProxiedConnection) -> None:
    """Close a connection that a hook at `checkin` kept from going back; its permit goes back."""
    berth = berth_of(connection)
    permit = None if berth is None else berth.release()
    if berth is not None and permit is not None:
        try:
            connection.invalidate()
        finally:
            berth.slots.give(permit)


class Rack(Generic[T]):
    """Where idle connections lie, the one used last on top: it is the surest to live.

    It stands in for the queue of SQLAlchemy's pool, whose callers wait, on locks that a fork may
    find taken. The permits see to all that: here each step is a single one, of a deque.
    """

    def __init__(self, maxsize: int = 0, use_lifo: bool = True) -> None:
        self.maxsize: int = maxsize
        self.use_lifo: bool = use_lifo  # (`recreate()` passes it on)
        self.items: deque[T] = deque()

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """Take the one used last."""
        try:
            return self.items.pop()
        except IndexError:
            raise Empty from None

    def put(self, item: T, block: bool = True, timeout: float | None = None) -> None:
        """Put one back."""
        if not self.take_in(item):
            raise Full

    def take_in(self, item: T) -> bool:
        """Put one back; False if there is no room."""
        if len(self.items) >= self.maxsize:
            return False
        self.items.append(item)
        return True

    def qsize(self) -> int:
        """How many lie here."""
        return len(self.items)


class LiesIdle(CameBack):
    """A connection came back to the pool while another could not be opened."""

    def __init__(self, pool: Lender) -> None:
        Exception.__init__(self)
        self._pool = pool

    def put_back(self) -> None:
        """Have the pool lend it next, and no empty place for one."""
        items = self._pool.rack.items
        for record in list(items):
            if record.dbapi_connection is None:
                with suppress(ValueError):  # another thread was faster
                    items.remove(record)
                    items.appendleft(record)


class Sightings:
    """What a pool has seen of its server, and whether it waits for one that refuses."""

    __slots__ = ("is_patient", "recovered", "refused_since", "silence", "suspicion", "was_reached")

    def __init__(self) -> None:
        self.is_patient: bool = True
        self.was_reached: bool = False  # it has opened a connection before
        self.refused_since: float = 0.0  # when the server began to let nobody in; 0: it does
        self.suspicion: float = 0.0  # when a connection was last found dead
        self.silence: float = 0.0  # when one was last asked in vain
        self.recovered: float = 0.0  # when it was last looked for what interruptions have lost


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
        caps = lender.caps()
        stay = lender.find_place(caps, record) if caps else None
        connecting = lender.slots.connecting
        connecting.add(record)
        try:
            opened = lender.open_patiently(partial(self.creator, record))
            kept: Any = record.record_info
            record.info["berth"] = kept["berth"] = berth = lender.berth_of(opened)
            if record.in_use:  # what its connect hooks send looks like its holder's from here
                berth.left = Leaving.RELATIONS
            berth.record, berth.lender = weakref.ref(record), self.lender
            berth.expires = time.monotonic() + lender.lifetime()
            if stay is not None:
                berth.stay = stay
                lender.begin(stay, opened, berth)
        except BaseException:
            if stay is not None:
                stay.end()
            raise
        finally:
            connecting.discard(record)
        lender.slots.connected()
        return opened


class Bell(Protocol):
    """What a caller in the queue waits for."""

    def ring(self) -> object:
        """End the wait, from any thread; RuntimeError where nobody can be woken any more."""

    def wait(self, slots: Slots) -> None:
        """Wait until it rings, or the limit has passed; now and then see to growth."""

    def also_stopped(self) -> Iterable[object]:
        """Return what stands still together with the caller."""


class Replaceable(Pool):
    """A pool of an engine: `dispose()` puts the next one in its place."""

    is_disposed: bool = False  # its engine has another one, or will in a moment

    def recreate(self) -> Any:
        """Return the next one: the same for all who dispose of the engine at once.

        Where the first of them has put it there already, the others come here with that one, of
        which nobody has disposed. Who is late finds the last of several.
        """
        if not self.is_disposed:
            return self
        following = vars(self).setdefault("_next", self.renew())
        earlier = [self, *filter(None, (one() for one in vars(self).get("_earlier", ())))]
        for one in earlier:  # who keeps a connection of it keeps the next one, and none in between
            one._next = following
        vars(following).setdefault("_earlier", []).extend(map(weakref.ref, earlier))
        return following.recreate()

    def renew(self) -> Any:
        """Make one like this."""
        return super().recreate()


class Lender(Replaceable, QueuePool):
    """A pool that lends against permits, and looks at a connection before it hands it out.

    A permit is taken in `connect()`, before SQLAlchemy's own queue is touched, so that queue never
    waits. Two classes below add how a caller waits: in a thread, or on an event loop.
    """

    backend: ClassVar[Backend]
    cleans_always: ClassVar[bool]  # whatever is seen to be left
    caps: ClassVar[Any]  # returns the limits over several pools that hold now
    engine: ClassVar[Engine]
    is_at_rest: ClassVar[Any]  # takes a driver's connection: whether it does nothing
    ping_after: ClassVar[float]  # seconds idle; 0: ask the server at every checkout
    spare: ClassVar[int]  # `max_overflow`; SQLAlchemy's own queue is told: no limit (-1)
    end_apart: ClassVar[Any]  # takes connections, and ends over another one what runs on them
    answer_within: ClassVar[float]  # seconds for BEGIN and COMMIT; 0: there is no server
    statement_within: ClassVar[float]  # seconds that the server gives a statement; 0: any time
    name: ClassVar[str]  # for reports
    note_parted: ClassVar[Any]  # takes the pool, once it is no engine's any more
    parted: ClassVar[weakref.WeakKeyDictionary[Lender, Any]]  # the pools that are none any more
    recycle: ClassVar[float]  # seconds that a connection is kept for; -1: for ever
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
        self.rack: Rack[ConnectionPoolEntry]
        opener: Any = Opener(self, creator)
        super().__init__(opener, pool_size, max_overflow, timeout, **kw)
        self.slots: Slots = Slots(pool_size, self.spare)
        self.next_look: float = 0.0  # when to look for connections that are held for too long
        self.ended: bool = False  # what comes back is closed, not kept
        self.is_filled: bool = self.least == 0
        self.filler: Any = None  # who opens the least number just now
        self.seen: Sightings = Sightings()
        self.refusal: str = ""  # why nothing is lent any more
        self._drivers: weakref.WeakSet[Any] = weakref.WeakSet()  # all that it has open

    @property
    def limit(self) -> float:
        """Seconds to wait and connect."""
        return self.timeout()

    def connect(self, waited: float = 0.0) -> PoolProxiedConnection:
        """Lend a connection that lives.

        Args:
            waited: Seconds that the caller has waited already.

        Raises:
            PoolExhausted: none came free in time.
            PoolDeadlock: none ever would.
            ConnectTimeout: none was opened in time.
            ManagerClosed: it was closed meanwhile.
        """
        owner = current_owner()
        try:
            permit = self.slots.take(owner) or self.wait_for(self.slots)
            permit.since = now = time.monotonic()
            permit.waited += waited
            while True:
                try:
                    connection = super().connect()
                except CameBack as came:  # it is what the pool lends next
                    came.put_back()
                else:
                    known: Any = connection.record_info
                    berth: Berth = known["berth"]
                    was_just_here = now - berth.answered < JUST_NOW and self.ping_after
                    if was_just_here or self._lives(connection, berth, now):
                        break
                    self._discard(connection)
                now = time.monotonic()
            if self.refusal:
                self._discard(connection)
                raise ManagerClosed(self.refusal)
            berth.lend(connection, permit)
        except BaseException:
            self._forsake(owner)
            raise
        if now >= self.next_look:
            self.look_for_slow(now)
        if not self.is_filled:
            self.is_filled = True
            self.fill_beside()
        return connection

    def _forsake(self, owner: object) -> None:
        """Take back what a caller was about to connect with."""
        for slots in (self.slots, *self.caps()):
            slots.forsake(owner)

    def find_place(self, caps: Sequence[Cap], record: ConnectionPoolEntry) -> Stay:
        """Wait until one more connection may be opened.

        Raises:
            CameBack: one came back to this pool meanwhile.
            PoolExhausted: none came free in time, in any pool.
            PoolDeadlock: none ever would.
        """
        owner = current_owner()
        stay = Stay(self, record)
        try:
            for cap in caps:
                place = cap.take(owner)
                if place is None:
                    for pool in cap.pools():
                        pool.reap_ended()
                    cap.recover()
                    place = self.wait_for(cap, self.new_bell(self.seconds_left()))
                if (other := stay_of(place)) is not None:
                    raise CameBack(other)
                stay.take(cap, place)
        except BaseException:
            stay.end()
            raise
        stay.began = time.monotonic()
        return stay

    def begin(self, stay: Stay, opened: Any, berth: Berth) -> None:
        """Note that a connection is open which has its place."""
        driver = self.engine.dialect.get_driver_connection(opened)
        stay.begin(opened, driver, self.backend.descriptor(driver), berth)

    @property
    def idle(self) -> int:
        """How many connections lie here: the place of one that was closed or lost has none."""
        return sum(record.dbapi_connection is not None for record in list(self.rack.items))

    def take_out(self, stay: Stay) -> bool:
        """Take an idle connection out; False if it is lent or gone."""
        record, before, stay.taken_by = stay.record(), stay.taken_by, current_owner()
        try:
            self.rack.items.remove(record)
        except ValueError:
            stay.taken_by = before
            return False
        if record.record_info.get("berth") is not stay.berth or record.dbapi_connection is None:
            self.rack.items.append(record)  # there is another one in its place by now
            stay.taken_by = before
            return False
        stay.kept = record
        return True

    def put_back(self, stay: Stay) -> None:
        """Put back what was taken out: it is lent next."""
        record, stay.kept = stay.kept, None
        self.rack.items.append(record)
        if self.ended and self.take_out(stay):
            self.part_with(stay)

    def give_way(self, stay: Stay) -> bool:
        """Close an idle connection, where it belongs; False if it is lent or gone."""
        if not self.take_out(stay):
            return False
        self.part_with(stay)
        return True

    def part_with(self, stay: Stay) -> None:
        """Close what was taken out."""
        record = stay.kept
        self._dec_overflow()  # so that SQLAlchemy counts right: the other private method
        record.close()

    def reap_ended(self) -> None:
        """Part with what belongs to an event loop that was closed; threads end nothing."""

    def has(self, stay: Stay) -> bool:
        """Whether it lies here, idle."""
        return stay.record() in self.rack.items

    @property
    def unanswered_since(self) -> float | None:
        """Since when an event loop owes an answer; threads do at once what they are asked."""
        return None

    def whereabouts(self) -> str:
        """Name the pool: its connections belong to every thread."""
        return self.name

    def fill_beside(self) -> None:
        """Open what is missing to the least number of connections, beside the caller."""
        raise NotImplementedError

    def fill(self) -> None:
        """Open connections until the least number is open; the first failure is the last."""
        opened: list[PoolProxiedConnection] = []
        self.filler = current_owner()
        try:
            while (
                len(opened) < self.least
                and len(self.slots.held) < self.least
                and all(cap.may_lend for cap in self.caps())  # it takes nothing from anybody
            ):
                opened.append(self.connect())
        except Exception as error:  # noqa: BLE001  # who needs a connection will hear of it
            logger.info("The pool could not be filled to %d connections: %r", self.least, error)
        finally:
            for connection in opened:
                connection.close()
            self.filler = None

    def _queue_class(  # type: ignore[override]
        self, maxsize: int, use_lifo: bool = True
    ) -> Rack[ConnectionPoolEntry]:
        """Make the queue of SQLAlchemy's pool: the other private name that we need."""
        self.rack = Rack[ConnectionPoolEntry](maxsize)
        return self.rack

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        """Take a connection back, and give its permit to the next in the queue.

        The one private method of SQLAlchemy's pool that we need: it is the only point that every
        return passes, `detach()` and the garbage collector's included; the `checkin` event is not.
        `tests/test_private_names.py` fails when it goes.
        """
        kept: Any = record.record_info
        berth: Berth | None = kept.get("berth")
        is_lost = record.dbapi_connection is None  # or detached
        if is_lost:
            kept.pop("berth", None)
        now = time.monotonic()
        if berth is None or (permit := berth.release()) is None:  # it was never lent
            super()._do_return_conn(record)
            if berth is not None:
                berth.returned = now
            return
        berth.returned = now
        berth.answered = permit.answered if permit.marks.failed_after is None else 0.0
        try:
            try:
                if now - permit.since > self.slow_after:
                    self.report_slow(permit, now)
                if (
                    is_lost
                    or self.ended
                    or self.cleans_always
                    or berth.left
                    or permit.is_marked
                    or now >= berth.expires
                    or not self.is_at_rest(berth.driver())
                ):
                    self._look_over(record, berth, permit, now)
            finally:
                if not self.rack.take_in(record):
                    self._part_with(record)
        finally:
            if permit.connection is berth.lent:
                self.slots.give(permit)
            if berth.stay is not None:
                berth.stay.come_back()

    def _look_over(
        self, record: ConnectionPoolEntry, berth: Berth, permit: Permit, now: float
    ) -> None:
        """See what becomes of a connection that may not go back as it is."""
        if record.dbapi_connection is None:
            self.is_filled = self.least == 0
        elif not self.is_at_rest(berth.driver()):
            self._end(record)
        elif (
            self.ended
            or permit.marks.is_interrupted
            or now >= berth.expires
            or len(self.rack.items) >= self.rack.maxsize
        ):
            self._close(record)
        elif berth.left or self.cleans_always:
            self._clean(record, berth)

    def _part_with(self, record: ConnectionPoolEntry) -> None:
        """Close what has no room; SQLAlchemy would, but where that can be interrupted."""
        try:
            self._close(record)
        finally:
            super()._do_return_conn(record)

    def _clean(self, record: ConnectionPoolEntry, berth: Berth) -> None:
        """Have the next one find nothing of what was left; who left it waits for that, not they.

        What cannot be cleaned is closed.
        """
        if berth.left is Leaving.RELATIONS:
            self._close(record)
            return
        try:
            self.clean_in_time(partial(self.backend.clean, record, berth.hooks), berth)
            berth.left = Leaving.NOTHING
        except BaseException as error:
            if isinstance(error, TimeoutError):
                self._hang_up(berth)
            self._drop(record)
            if not isinstance(error, Exception):
                raise
            logger.info("A connection could not be cleaned and is closed: %r", error)

    def _hang_up(self, berth: Berth) -> None:
        """Part with a silent server: asyncpg would wait for its answer to the farewell."""
        driver = berth.driver()
        if hasattr(driver, "terminate"):  # (a public verb of that driver)
            driver.terminate()

    def clean_in_time(self, clean: Callable[[], None], berth: Berth) -> None:
        """Clean a connection; raise if that takes too long."""
        self.ask_in_time(clean, berth, CLEAN_LIMIT)

    def _end(self, record: ConnectionPoolEntry) -> None:
        """End a connection that came back at work or in a transaction; a closed one is gone."""
        if self.backend.is_closed(record.driver_connection):
            self._drop(record)
            return
        logger.info("A connection was returned in the middle of its work, and is ended")
        try:
            self.end_apart([record])
        except Exception as error:  # noqa: BLE001  # the server ends it, if later
            logger.info("What a returned connection does could not be ended: %r", error)
        finally:
            self._drop(record)

    def _reclaim(self) -> None:
        """Take back the permits of connections that are gone and never came back.

        A listener that raises at `checkin` keeps SQLAlchemy from returning the connection; and a
        loop may be closed over a task that just connects.
        """
        for permit in self.slots.held:
            connection, owner = permit.connection, permit.owner
            if has_ended(owner) if connection is None else connection() is None:
                if LENT.get(permit.key) is permit:  # (and not of a proxy made where that one was)
                    del LENT[permit.key]
                self.slots.give(permit)
        if (now := time.monotonic()) - self.seen.recovered > RECOVER_EVERY:
            self.seen.recovered = now
            self.slots.recover()

    def _lives(self, connection: PoolProxiedConnection, berth: Berth, now: float) -> bool:
        """Look at a connection: its socket first, which costs nothing; the server when in doubt."""
        poll, rested = berth.poll, now - berth.returned
        if not berth.returned:  # it was opened just now
            self.backend.watch(berth.driver(), berth.note)  # whatever a connect hook has changed
            return True
        if poll is None:  # it has no socket
            return True
        events = GONE if self.backend.is_closed(berth.driver()) else poll(0)
        if events and events[0][1] & HUNG_UP:
            self.seen.suspicion = now
            return False
        # Where one was dead, those that have lain here since before are asked; and where one was
        # silent, they would be silent too.
        if not events and rested < self.ping_after and berth.returned > self.seen.suspicion:
            return True
        return berth.returned > self.seen.silence and self._answers(connection, berth)

    def _answers(self, connection: PoolProxiedConnection, berth: Berth) -> bool:
        """Ask the server, in one round trip."""
        try:
            ping = partial(self.backend.ping, connection, self.engine)
            # The other half of the time is for opening another one.
            limit = min(self.seconds_left() / 2, self.answer_within, SETTLE_LIMIT)
            self.ask_in_time(ping, berth, limit)
        except Exception as error:
            known = (self.engine.dialect.loaded_dbapi.Error, OSError, ConnectTimeout)
            if not (self._is_asyncio or isinstance(error, known)):  # of a signal's handler
                self._discard(connection)
                raise
            self.seen.suspicion = time.monotonic()  # whatever it says, it is dead
            if isinstance(error, (TimeoutError, ConnectTimeout)):
                self.seen.silence = self.seen.suspicion
                self._hang_up(berth)
            logger.info("A pooled connection was found dead and is replaced: %r", error)
            return False
        except BaseException:
            self._discard(connection)
            raise
        return True

    def is_dead(self, connection: PoolProxiedConnection, error: Exception) -> bool:
        """Whether a call failed for its connection is gone; asyncpg may not know that yet."""
        berth: Berth = berth_of(connection)
        events = () if berth.poll is None else berth.poll(0)
        return (
            self.backend.is_closed(berth.driver())
            or any(event & HUNG_UP for _, event in events)
            or self.engine.dialect.is_disconnect(error, connection, None)  # type: ignore[arg-type]
        )

    def replace(self, connection: PoolProxiedConnection, error: Exception) -> None:
        """Open another connection in the place of one that was found dead, for the same holder."""
        logger.info("A connection was dead before anything was done, and is replaced: %r", error)
        before: Berth = berth_of(connection)
        record = cast(Any, before.record())
        self.seen.suspicion = time.monotonic()
        resets = list(record.finalize_callback)  # of an isolation level, which the holder has set
        try:
            record.invalidate(error)
            cast(Any, connection).dbapi_connection = self._open_in(record)
            record.finalize_callback.extend(resets)
            berth: Berth = record.record_info["berth"]
            berth.permit, berth.lent, before.permit = before.permit, before.lent, None
        finally:
            if before.permit is not None:  # which comes back with it
                record.record_info["berth"] = before
        self.dispatch.checkout(connection.dbapi_connection, record, connection)

    def _open_in(self, record: Any) -> Any:
        """Open a connection in an empty place; one that comes back meanwhile gives way to it."""
        for _ in range(TRIES):
            try:
                return record.get_connection()
            except LiesIdle:
                raise
            except CameBack as came:
                came.put_back()
        return record.get_connection()

    def _close(self, record: ConnectionPoolEntry) -> None:
        """Close a connection that came back."""
        record.close()

    def _drop(self, record: ConnectionPoolEntry) -> None:
        """Close a connection that came back and is good for nothing any more."""
        record.invalidate()

    def _discard(self, connection: PoolProxiedConnection) -> None:
        """Close a connection that was lent, and free its place in the pool."""
        connection.invalidate()

    def berth_of(self, opened: Any) -> Berth:
        """Make the berth of a connection that was opened just now."""
        driver = self.engine.dialect.get_driver_connection(opened)
        descriptor = self.backend.descriptor(driver)
        if descriptor is None and not self._is_asyncio:  # sqlite3 has no weak references
            berth = Berth(self.slots, lambda: None, None)
        else:
            self._drivers.add(driver)
            berth = Berth(self.slots, weakref.ref(driver), descriptor)
        self.backend.watch(driver, berth.note)
        return berth

    def wait_for(self, slots: Slots, bell: Bell | None = None) -> Permit:
        """Wait in the queue for a permit.

        Args:
            bell: What to wait with; one of the pool's own kind without it.

        Raises:
            PoolExhausted: none came free in time.
            PoolDeadlock: none ever will, for every holder waits for another one.
        """
        self._reclaim()
        owner = current_owner()
        bell = bell or self.new_bell()
        ticket = slots.queue(owner, bell.ring, self)
        keys = [owner, *bell.also_stopped()]
        try:
            if ticket.waits and not self.refusal:  # (who comes later is not sent away by it)
                WAITING.update(dict.fromkeys(keys, ticket))
                slots.make_room()
                self._refuse_deadlock(slots, ticket)
                bell.wait(slots)
                if ticket.waits:
                    self._reclaim()
            if self.refusal:
                raise ManagerClosed(self.refusal)
        except BaseException:
            if not slots.leave(ticket):  # the next one in the queue is to be told as well
                slots.give(ticket.granted)
            raise
        finally:
            for key in keys:
                if WAITING.get(key) is ticket:
                    del WAITING[key]
        if slots.leave(ticket):
            raise self._exhausted(slots)
        ticket.granted.waited = time.monotonic() - ticket.since
        return ticket.granted

    def _refuse_deadlock(self, slots: Slots, ticket: Ticket) -> None:
        if slots.deadlocked():
            gc.collect()  # a scope that Ctrl-C ended in its last lines may hold one still
            if ticket.waits and (stuck := slots.deadlocked()):
                raise self._deadlock(stuck)

    def new_bell(self, seconds: float | None = None) -> Bell:
        """Return what a caller waits with: for so long, or for the pool's own limit."""
        raise NotImplementedError

    def open_patiently(self, connect: Callable[[], Any]) -> Any:
        """Open a connection; ask again where the server lets nobody in just now.

        One that has never been there is not waited for: its address may be wrong.
        """
        end, longest, doubts, tries = time.monotonic() + self.seconds_left(), SHORT_PAUSE, 0, 0
        while True:
            try:
                opened = self.open_in_time(connect, max(end - time.monotonic(), LEAST_CONNECT))
            except Exception as error:
                is_open = self.backend.has_server and self.seen.is_patient and not self.refusal
                left = end - time.monotonic()
                why = self.diagnose(error, min(left, ASK_FOR)) if is_open and left > 0 else None
                if why is None or why.is_silent:
                    raise
                doubts = 0 if why.passes else doubts + 1
                passes = why.passes or (not why.is_certain and doubts < 2)
                pause = random.uniform(longest / 2, longest)  # noqa: S311  # who came together parts
                known = self.seen.was_reached or tries or (why.passes and why.is_reached)
                if not passes or not known or time.monotonic() + pause > end:
                    error.add_note(f"{self.name}: {why.what}. {why.cure}")
                    raise
                if why.passes and not self.seen.refused_since:
                    self.seen.refused_since = time.monotonic()
                    logger.warning(
                        "No connection can be had: %s. It is asked again for up to %.0f s.",
                        why.what,
                        self.limit,
                    )
                tries += 1
                self.pause(pause)
                if self.idle:
                    raise LiesIdle(self) from None
                longest = min(longest * 2, LONG_PAUSE)
            else:
                self.seen.was_reached = True
                if since := self.seen.refused_since:
                    self.seen.refused_since = 0.0
                    logger.warning(
                        "The server lets us in again, after %.1f s.", time.monotonic() - since
                    )
                return opened

    def lifetime(self) -> float:
        """Return how long a connection is kept: what was opened together does not go together."""
        return self.recycle * random.uniform(0.8, 1.0) if self.recycle > 0 else inf  # noqa: S311

    def diagnose(self, error: Exception, seconds: float) -> Diagnosis | None:
        """Tell why a connect failed, as `Backend.diagnose` does."""
        return self.backend.diagnose(error, seconds)

    def pause(self, seconds: float) -> None:
        """Let others go on for so long."""
        time.sleep(seconds)

    def open_in_time(self, connect: Callable[[], Any], seconds: float) -> Any:
        """Open a connection; give up after so many seconds."""
        raise NotImplementedError

    def ask_in_time(self, ping: Callable[[], Any], berth: Berth, seconds: float) -> None:
        """Ask the server whether a connection lives; raise if it says nothing for so long."""
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

    def not_opened(self, seconds: float) -> ConnectTimeout:
        """Build the error for a server that did not answer in what was left of the time."""
        return ConnectTimeout(
            f"No connection was opened within {self.limit:g} s: the server did not answer for the "
            f"last {seconds:.1f} s of them. See whether it is up and can be reached, or raise "
            "pool_timeout."
        )

    def _exhausted(self, slots: Slots) -> PoolExhausted:
        holders = self._holders([slots])
        held = f"Held by {'; '.join(map(str, holders))}. " if holders else ""
        if isinstance(slots, Cap):
            return PoolExhausted(
                f"No connection could be opened within {self.limit:g} s: all {slots.size} that "
                f"{slots.name} allows are open, {slots.idle(time.monotonic())}, and "
                f"{slots.waiting} more callers wait. {held}Hold connections for a shorter time, or "
                f"raise {slots.name}.",
                slots.size,
                0,
                slots.waiting,
                holders,
            )
        lent, unopened = len(holders), len(slots.permits) - len(holders)
        counted = (
            f"{lent} of {len(slots.permits)} are lent and {unopened} were not opened, since some "
            f"came back all the time or opening takes long (pool_size {slots.size} and overflow "
            f"{slots.overflow})"
            if unopened
            else f"all {lent} are lent (pool_size {slots.size} and overflow {slots.overflow})"
        )
        return PoolExhausted(
            f"No connection came free within {self.limit:g} s: {counted}, and {slots.waiting} more "
            f"callers wait. {held}Hold connections for a shorter time, or raise pool_size.",
            slots.size,
            slots.overflow,
            slots.waiting,
            holders,
        )

    def _deadlock(self, stuck: list[Slots]) -> PoolDeadlock:
        holders = self._holders(stuck)
        pools = [slots for slots in stuck if not isinstance(slots, Cap)]
        size, overflow = sum(s.size for s in pools), sum(s.overflow for s in pools)
        lent = [f"all {size + overflow} are lent (pool_size {size} and overflow {overflow})"]
        full = [
            f"all {slots.size} that {slots.name} allows are open"
            for slots in stuck
            if isinstance(slots, Cap)
        ]
        if full and not pools:
            size, lent = sum(slots.size for slots in stuck), []
        return PoolDeadlock(
            f"No connection will ever come free: {', '.join(full + lent)}, and each holder waits "
            f"for another one. Held by {'; '.join(map(str, holders))}. Do not open a session "
            "inside another one: use the first, or end it before.",
            size,
            overflow,
            sum(slots.waiting for slots in stuck),
            holders,
        )

    def _holders(self, of: list[Slots]) -> list[Holder]:
        now = time.monotonic()
        holders: list[Holder] = []
        for slots in of:
            if isinstance(slots, Cap):
                holders += slots.holders(now)
            else:
                holders += describe_held(slots.permits, now)
        return holders

    # -- servers that are silent ------------------------------------------------------------------

    def cut_silent(self, now: float) -> None:
        """Cut the connections on which somebody has waited for the server for too long.

        It keeps a frozen server's connections, so neither keepalives nor any driver notices: but
        whoever waits at a socket that is shut wakes up at once, in a thread and on a loop.
        """
        for permit in self.slots.held:
            if permit.running and not permit.marks.epitaph:
                self._cut_if_silent(permit, now)
        for connection, since in list(ROLLING_BACK.items()):
            limit = min(self.answer_within, SETTLE_LIMIT)
            if now - since <= limit:
                continue
            berth = berth_of(connection)
            if berth is not None and berth.lender() is self:
                self._cut(berth.driver(), partial(self._still_rolls_back, connection, limit))

    def _still_rolls_back(self, connection: PoolProxiedConnection, limit: float) -> bool:
        if ROLLING_BACK.pop(connection, None) is None:
            return False
        logger.warning(
            "The server did not answer ROLLBACK within %g s: the connection is cut. The server "
            "rolls back by itself.",
            limit,
        )
        return True

    def _cut_if_silent(self, permit: Permit, now: float) -> None:
        since, cursor, own = permit.statement_since, permit.cursor, permit.marks.statement_within
        within = self.statement_within if own is None else own
        connection = None if permit.connection is None else permit.connection()
        if connection is None or now - since <= min(
            self.answer_within, (within or self.answer_within) + GRACE
        ):
            return
        setting, limit, outcome = "DB_RESPONSE_TIMEOUT", self.answer_within, ""
        if cursor is None:
            what = "COMMIT"
            outcome = (
                " Whether the transaction was committed is unknown: look for what it wrote, or "
                "make the work such that it may be done again."
            )
        elif self.backend.awaits_begin(connection, cursor):
            what, outcome = "BEGIN", " Nothing was done."
        elif self.backend.begins_with(connection.driver_connection):
            what, outcome = "BEGIN", " Nothing was committed."
        else:
            what, setting = "a statement", "DB_STATEMENT_TIMEOUT"
            setting = setting if own is None else f"statement_timeout={own:g} of this session"
            limit = within + GRACE if within else inf
        if now - since <= limit:
            return
        holder = describe(permit, now)

        def is_still_waiting() -> bool:
            if waits := permit.running and permit.statement_since == since:
                # All is said before it wakes up.
                permit.mark().epitaph = (
                    f"The server did not answer {what} within {limit:g} s ({setting}), and the "
                    f"connection was cut.{outcome}"
                )
                logger.warning(
                    "The server did not answer %s within %g s (%s): the connection is cut of %s",
                    what,
                    limit,
                    setting,
                    holder,
                )
            return waits

        if (berth := berth_of(connection)) is not None:  # (it may just be going back)
            self._cut(berth.driver(), is_still_waiting)

    def _cut(self, driver: Any, is_still_waiting: Callable[[], bool]) -> None:
        """Shut the socket, if it is the right one: its number may be another's by now."""
        descriptor = None if driver is None else self.backend.descriptor(driver)
        if descriptor is None:
            return
        with suppress(OSError), socket(fileno=os.dup(descriptor)) as same:
            if not self.backend.is_closed(driver) and is_still_waiting():
                same.shutdown(SHUT_RDWR)

    # -- holders that are slow --------------------------------------------------------------------

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
        if permit.owner == self.filler:  # who only fills holds nothing up
            return
        if not permit.marks.is_reported and (holder := describe(permit, now)) is not None:
            permit.mark().is_reported = True
            logger.warning(
                "A connection is held for longer than %g s (DB_SLOW_CHECKOUT, or the lesser "
                "DB_POOL_TIMEOUT), by %s. Do slow work outside of the scope, or raise the limit.",
                self.slow_after,
                holder,
            )

    def lent(self) -> list[PoolProxiedConnection]:
        """Return the connections that are lent."""
        references = [permit.connection for permit in self.slots.held]
        connections = [reference() for reference in references if reference is not None]
        return [connection for connection in connections if connection is not None]

    def has_opened(self) -> bool:
        """Whether a driver has opened a connection here that is open still."""
        return bool(self._drivers)

    def refuse(self, why: str) -> None:
        """Lend nothing from now on, and send away who waits."""
        self.refusal = why
        self.slots.dismiss()

    def duplicate_idle(self) -> list[int]:
        """Duplicate the sockets of the connections that lie here, for the caller to close."""
        found: list[int] = []
        for record in list(self.rack.items):
            driver = record.driver_connection
            descriptor = None if driver is None else self.backend.descriptor(driver)
            if descriptor is not None:
                with suppress(OSError):
                    found.append(os.dup(descriptor))
                    if self.backend.is_closed(driver):  # the number may be another's by now
                        os.close(found.pop())
        return found

    def end(self) -> None:
        """Close what is idle, and from now on whatever comes back."""
        if not self.ended:
            self.ended = True
            super().dispose()

    def let_go(self) -> None:
        """Do the same, whichever thread asks for it, and wherever the connections belong."""
        self.end()

    def dispose(self) -> None:
        """Close what is idle, and from now on whatever comes back: the engine has another pool."""
        self.is_disposed = True
        self.note_parted(self)
        self.end()

    def disown(self) -> None:
        """Forget every connection after a fork: they are the parent's.

        No destructor of theirs may run, since it would write to the parent's sockets: the objects
        are kept for ever. Who has one lent finds it lost, and closes it without a word.
        """
        self.ended = True
        self.backend.disown(list(self._drivers))
        make_immortal(self)
        inherited: Any
        for inherited in self.lent():
            make_immortal(inherited)
            make_immortal(inherited.dbapi_connection)
            inherited.dbapi_connection = None
            if (berth := berth_of(inherited)) is not None:  # (it may just have been going back)
                record: Any = berth.record()
                make_immortal(record)
                record.dbapi_connection = None
                berth.release()

    def reap(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cut every connection of a loop that does not run any more, and end what runs on them."""
        self.ended = True
        try:
            if overdue := self.lent():  # its tasks were never told
                self.end_apart(overdue, is_abandoned=True)
        except Exception as error:  # noqa: BLE001  # the server ends them, if later
            logger.info("What an ended loop left running could not be ended: %r", error)
        finally:  # whoever does so may be cancelled, and nobody else will
            for driver in list(self._drivers):
                self.backend.cut(driver, loop)
            self.rack.items.clear()
            for stay in self.stays():
                stay.end()

    def stays(self) -> list[Stay]:
        """Return its connections that have a place under a limit."""
        everyone = [stay_of(place) for cap in list(CAPS) for place in cap.permits]
        return [stay for stay in everyone if stay is not None and stay.pool is self]
