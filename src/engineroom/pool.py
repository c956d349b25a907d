"""Where callers wait: one pool for all threads, and one shelf for each event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from math import inf
from socket import SHUT_RDWR, socket
from typing import Any, ClassVar, cast

from sqlalchemy.pool import (
    AsyncAdaptedQueuePool,
    ConnectionPoolEntry,
    NullPool,
    PoolProxiedConnection,
)
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.queue import Empty

from .backends import Diagnosis
from .cancellation import settle
from .cap import STUCK_AFTER, Stay, stay_of
from .deadlines import LOOK_EVERY, WATCH
from .departures import Farewell
from .errors import ConnectTimeout, PoolDeadlock, PoolExhausted
from .ledger import REQUEST, Entry, current_owner, describe, has_ended, line_of, name_of
from .lending import CLEAN_LIMIT, Berth, Lender, Replaceable
from .slots import GROW_AFTER, RECOVER_AFTER, WAITING, Reservation, Slots

logger: logging.Logger = logging.getLogger("engineroom.pool")

LEAST_OF_LIBPQ = 2.0  # seconds of its `connect_timeout`: it takes one for two
ROOM = 0.5  # seconds beyond the limit that a connect may take in threads
GROW_ANYWAY = 0.5  # seconds that the first in the queue waits, on a loop that always lags


Outcome = tuple[Any, BaseException | None]


def steps(limit: float, slots: Slots) -> Iterator[float]:
    """Yield how long to wait, again and again until the limit; see to growth after each."""
    step, look = min(GROW_AFTER, limit / 4), min(RECOVER_AFTER, limit / 4)
    end = time.monotonic() + limit
    growing = slots.may_grow
    while (left := end - time.monotonic()) > 0:
        yield min(left, step if growing else look)
        growing = slots.grow()
        if not growing:
            slots.recover()


class ThreadBell:
    """A thread waits on a lock."""

    def __init__(self, limit: float) -> None:
        self.limit: float = limit
        self.lock: threading.Lock = threading.Lock()
        self.lock.acquire()

    def ring(self) -> None:
        """Open the lock."""
        self.lock.release()

    def wait(self, slots: Slots) -> None:
        """Wait on the lock; now and then, see whether the pool should grow."""
        for seconds in steps(self.limit, slots):
            if self.lock.acquire(timeout=seconds):
                return

    def also_stopped(self) -> Iterable[object]:
        """Name the event loop that the thread runs, and the request that it serves."""
        return filter(None, (asyncio._get_running_loop(), REQUEST.get()))


class LoopBell:
    """A task waits on a future of its loop."""

    def __init__(self, limit: float, request: object = None) -> None:
        self.limit: float = limit
        self.request: object = request
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.rung: asyncio.Future[None] = self.loop.create_future()

    def ring(self) -> None:
        """End the wait."""
        if asyncio._get_running_loop() is self.loop:
            self._end_wait()
        else:
            self.loop.call_soon_threadsafe(self._end_wait)

    def _end_wait(self) -> None:
        if not self.rung.done():  # it is cancelled with its task
            self.rung.set_result(None)

    def wait(self, slots: Slots) -> None:
        """Wait on the future; now and then, see whether the pool should grow."""
        for seconds in steps(self.limit, slots):
            rung, _ = await_only(asyncio.wait([self.rung], timeout=seconds))
            if rung:
                return

    def also_stopped(self) -> Iterable[object]:
        """Name the request that waits for its session; the loop goes on."""
        return filter(None, (self.request,))


class ShelfBell(LoopBell):
    """The shelf has one timer for growth, and one for the limit, for all who wait there."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__(shelf.limit)
        self.shelf: Shelf = shelf

    def wait(self, slots: Slots) -> None:
        """Wait on the future."""
        self.shelf.mind_growth(slots)
        self.shelf.mind_limit()
        await_only(self.rung)


class Reservations(list[Reservation]):
    """What was waited for beforehand: a permit of the pool, and a place under each limit."""

    def hand_to(self, thread: object) -> None:
        """Have this thread take them next."""
        for reservation in self:
            reservation.hand_to(thread)

    def cancel(self) -> None:
        """Give back what was not used."""
        for reservation in self:
            reservation.cancel()


class ThreadPool(Lender):
    """The synchronous side's pool: a thread waits for its permit on a lock."""

    def new_bell(self, seconds: float | None = None) -> ThreadBell:
        """Return a lock to wait on."""
        return ThreadBell(self.limit if seconds is None else seconds)

    async def reserve(self, entry: Entry) -> Reservations:
        """Wait on the event loop for all that a thread will need to connect.

        Args:
            entry: The scope that is to use it.

        Raises:
            PoolExhausted: none came free in time.
            PoolDeadlock: none ever would.
        """
        reservations = Reservations()
        deadline = time.monotonic() + self.limit
        try:
            for slots in (self.slots, *self.caps()):
                if slots is not self.slots and self.idle:
                    break  # nothing has to be opened
                permit = slots.take(current_owner())
                if permit is None:
                    bell = LoopBell(max(deadline - time.monotonic(), 0.0), entry.request)
                    permit = await greenlet_spawn(self.wait_for, slots, bell)
                if (stay := stay_of(permit)) is not None:  # it came back: there it lies
                    stay.put_back()
                    break
                permit.since = time.monotonic()
                reservations.append(Reservation(slots, permit, weakref.ref(entry)))
        except BaseException:
            reservations.cancel()
            raise
        return reservations

    def open_in_time(self, connect: Callable[[], Any], seconds: float) -> Any:
        """Open a connection; the driver keeps the time (`Backend.limit_connect` told it).

        Where it does not, a thread waits for it: libpq gives a server two seconds at least, and
        each address of a name has the whole time.
        """
        is_enough = seconds >= LEAST_OF_LIBPQ - ROOM and self.backend.keeps_time
        if is_enough or not self.backend.has_server:
            return connect()
        return self._open_apart(connect, seconds)

    def _open_apart(self, connect: Callable[[], Any], seconds: float) -> Any:
        late: Outcome = (None, self.not_opened(seconds))
        first: dict[str, Outcome] = {}  # `setdefault` is atomic
        asked_in = copy_context()

        def open_it() -> None:
            outcome: Outcome
            try:
                outcome = (asked_in.run(connect), None)
            except BaseException as error:  # noqa: BLE001  # it is raised where it is waited for
                outcome = (None, error)
            if first.setdefault("outcome", outcome) is late and outcome[0] is not None:
                outcome[0].close()

        opening = threading.Thread(target=open_it, name="engineroom-connect", daemon=True)
        try:
            opening.start()
        except RuntimeError:  # the process ends, where Python 3.12.1 starts no thread any more
            return connect()
        try:
            opening.join(seconds + ROOM)
        finally:  # Ctrl-C may have come: what opens later is closed
            opened, error = first.setdefault("outcome", late)
        if error is not None:
            raise error
        return opened

    def ask_in_time(self, ping: Callable[[], Any], berth: Berth, seconds: float) -> None:
        """Ask; when the time is over, a timer shuts the socket: no driver gives up by itself.

        A frozen server keeps its connections, so neither keepalives nor libpq's timeouts notice.
        """
        descriptor = self.backend.descriptor(berth.driver())
        if descriptor is None:  # it was closed just now, and says so
            ping()
            return
        first: dict[str, bool] = {}  # whether the timer came first; `setdefault` is atomic
        with socket(fileno=os.dup(descriptor)) as duplicate:

            def shut() -> None:
                if first.setdefault("late", True):
                    duplicate.shutdown(SHUT_RDWR)

            timer = threading.Timer(seconds, shut)
            timer.daemon = True
            timer.start()
            try:
                ping()
            finally:
                timer.cancel()
                is_late = first.setdefault("late", False)
        if is_late:
            raise TimeoutError(f"the server did not answer within {seconds:.1f} s")

    def fill_beside(self) -> None:
        """Fill in a thread, which ends with that."""
        threading.Thread(target=self.fill, name="engineroom-fill").start()

    def plan_look(self, now: float, seconds: float) -> float:
        """Leave it to the watch; where there is no server, to the first checkout after that."""
        if not self.answer_within:
            return now + seconds
        WATCH.look_after(self)
        return inf

    def look(self, now: float) -> bool:
        """End what has waited for too long; whether anything is lent."""
        self.cut_silent(now)
        self.report_all_slow(now)
        return bool(self.slots.held)

    def part(self) -> bool:
        """Ask at the next checkout to be watched again; whether anything was lent meanwhile."""
        self.next_look: float = 0.0
        return bool(self.slots.held)


class PassingPool(ThreadPool, NullPool):
    """Lends like the others, and keeps nothing: what comes back is closed."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.ended: bool = True


class Home:
    """Where a shelf stands: its event loop, and the pool that it is a shelf of."""

    __slots__ = ("behind", "end", "ending", "ends", "keeper", "loop", "thread")

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.thread: int = threading.get_ident()  # that runs the loop
        self.behind: weakref.ref[LoopPool] | None = None
        self.keeper: AsyncGenerator[None]  # ends the shelf with its loop
        self.end: Callable[[], Coroutine[Any, Any, None]]  # does so before
        self.ending: asyncio.Lock = asyncio.Lock()
        self.ends: set[asyncio.Task[None]] = set()  # for others (a loop holds its tasks weakly)


class Partings:
    """What a shelf parts with for others."""

    __slots__ = ("asked", "tasks")

    def __init__(self) -> None:
        self.asked: dict[Stay, float] = {}  # that have not heard of it yet, and since when
        self.tasks: set[asyncio.Task[None]] = set()  # (a loop holds its tasks weakly)


class Timers:
    """One each, for all who wait at a shelf."""

    __slots__ = ("growth", "limit")

    def __init__(self) -> None:
        self.growth: asyncio.TimerHandle | None = None  # sees whether the pool should grow
        self.limit: asyncio.TimerHandle | None = None  # sends away who has waited for too long


class Shelf(AsyncAdaptedQueuePool, Lender):
    """The connections of one event loop: a task waits for its permit on an event."""

    _queue_class = Lender._queue_class  # type: ignore[assignment]

    _filling: asyncio.Task[None] | None = None

    def __init__(self, creator: Any, *args: Any, **kw: Any) -> None:
        super().__init__(creator, *args, **kw)
        self.home: Home = Home()
        self.partings: Partings = Partings()
        self.timers: Timers = Timers()

    async def end_here(self) -> None:
        """Close what is idle, all side by side, and from now on whatever comes back."""
        farewell = Farewell(self.duplicate_idle())
        try:
            for record in list(self.rack.items):
                self.backend.say_farewell(record.driver_connection)
            await greenlet_spawn(super().end)
            while self.partings.tasks:
                await asyncio.wait(self.partings.tasks)
        finally:
            await farewell.answered()

    def end_there(self, end: Callable[[], Coroutine[Any, Any, None]]) -> Future[None]:
        """Have another thread's loop run an end of the shelf; return what tells when it is over.

        In its last turn a loop would take a task and never run it: it has ended the shelf by then.
        """
        over: Future[None] = Future()

        def begin() -> None:
            if self.ended and not self.home.ending.locked() and not self.lent():
                over.set_result(None)
                return
            task = self.home.loop.create_task(end())
            self.home.ends.add(task)
            task.add_done_callback(tell)

        def tell(task: asyncio.Task[None]) -> None:
            self.home.ends.discard(task)
            if task.cancelled():
                over.cancel()
            elif error := task.exception():
                over.set_exception(error)
            else:
                over.set_result(None)

        with suppress(RuntimeError):  # it was closed just now
            self.home.loop.call_soon_threadsafe(begin)
        return over

    def let_go(self) -> None:
        """Have the loop end the shelf; of one that stands still, cut what is idle, for it may stay.

        What is lent is not touched there: the loop may go on, and whoever has it as well.
        """
        if self.home.loop.is_closed():
            self.reap(self.home.loop)
            return
        if not self.home.loop.is_running():
            self.cut_idle()
        self.end_there(self.home.end)

    def cut_idle(self) -> None:
        """Cut what lies here, each once it was taken: the loop may go on, and lend it."""
        with suppress(Empty):
            while True:
                record = self.rack.get()
                driver: Any = record.driver_connection
                if driver is None:  # it was lost
                    continue
                self.backend.cut(driver, self.home.loop)
                stay = cast(Any, record.record_info)["berth"].stay
                if stay is not None:
                    stay.end()

    def end(self) -> None:
        """End the shelf, and with it what would have ended it later."""
        await_only(self.home.end())

    # Both in a task of its own: interrupted, SQLAlchemy's pool would log it and miss the place.

    def _close(self, record: ConnectionPoolEntry) -> None:
        if record.dbapi_connection is None:  # (the garbage collector's is closed already)
            return
        if not self.ended:  # (or whoever closes the pool waits until the server has let go)
            self.backend.say_farewell(record.driver_connection)
        try:
            await_only(settle(greenlet_spawn(super()._close, record)))
        except asyncio.CancelledError as error:
            error.add_note(
                "The cancellation struck after the transaction had ended, as its connection was "
                "closed: what was committed stays committed."
            )
            raise

    def _drop(self, record: ConnectionPoolEntry) -> None:
        # Its server may be silent, and asyncpg's own limit does not count what it waits for first.
        with suppress(TimeoutError):
            await_only(settle(greenlet_spawn(super()._drop, record), CLEAN_LIMIT))

    def _discard(self, connection: PoolProxiedConnection) -> None:
        await_only(settle(greenlet_spawn(super()._discard, connection)))

    def clean_in_time(self, clean: Callable[[], None], berth: Berth) -> None:
        """Clean in a task of its own: interrupted, it would lose a connection that is whole."""
        try:
            await_only(settle(greenlet_spawn(clean), CLEAN_LIMIT))
        except asyncio.CancelledError as error:
            error.add_note(
                "The cancellation struck after the transaction had ended, as its connection was "
                "cleaned: what was committed stays committed."
            )
            raise

    def new_bell(self, seconds: float | None = None) -> LoopBell:
        """Return a future of the running loop to wait on."""
        return ShelfBell(self) if seconds is None else LoopBell(seconds)

    # -- giving way to others ---------------------------------------------------------------------

    def give_way(self, stay: Stay) -> bool:
        """Close an idle connection in its loop; cut it where that stands still, and will not go on.

        Between two of its runs, one of which ends it, a loop stands still for a moment.
        """
        if asyncio._get_running_loop() is not self.home.loop:
            if self._will_hear(stay):
                return True
        elif self.home.loop not in WAITING:  # or who asks has the loop stand still for that
            return super().give_way(stay)
        self.partings.asked.pop(stay, None)
        if not self.take_out(stay):
            return False
        self.backend.cut(stay.driver(), self.home.loop)
        stay.end()
        return True

    def _will_hear(self, stay: Stay) -> bool:
        """Ask from another thread; False where the loop is closed, or does not run."""
        now = time.monotonic()
        try:
            if (asked := self.partings.asked.setdefault(stay, now)) < now:
                return self.home.loop.is_running() or now - asked < STUCK_AFTER
            self.home.loop.call_soon_threadsafe(self._asked_to_give_way, stay)
        except RuntimeError:  # it is closed
            return False
        except BaseException:
            self.partings.asked.pop(stay, None)
            raise
        return True

    def _asked_to_give_way(self, stay: Stay) -> None:
        self.partings.asked.pop(stay, None)
        stay.asked = time.monotonic()
        if not (stay.is_wanted and super().give_way(stay)):
            stay.stay_on()

    @property
    def unanswered_since(self) -> float | None:
        """Since when the loop owes an answer; None if it owes none."""
        return min(list(self.partings.asked.values()), default=None)

    def whereabouts(self) -> str:
        """Name the loop by its thread, and the line at which that is."""
        return f"the event loop of {name_of(self.home.thread)} (at {line_of(self.home.thread)})"

    def part_with(self, stay: Stay) -> None:
        """Close what was taken out, in a task: nobody waits for that."""
        self._dec_overflow()
        parting = self.home.loop.create_task(self._close_apart(stay.kept))
        self.partings.tasks.add(parting)
        parting.add_done_callback(partial(self._parted, stay))
        stay.taken_by = None  # the task has it now

    async def _close_apart(self, record: ConnectionPoolEntry) -> None:
        # Its place is free once the server has let go; nobody else need wait for that.
        self.backend.say_farewell(record.driver_connection)
        await settle(greenlet_spawn(record.close))

    def _parted(self, stay: Stay, parting: asyncio.Task[None]) -> None:
        self.partings.tasks.discard(parting)
        if stay.kept is not None:  # the loop's end came first
            stay.put_back()
        if not parting.cancelled() and (error := parting.exception()) is not None:
            logger.info("A connection that gave way was not closed in time: %r", error)
            stay.end()

    def reap_ended(self) -> None:
        """Part with everything, if the loop was closed by hand."""
        behind = None if self.home.behind is None else self.home.behind()
        if behind is not None and self.home.loop.is_closed():
            behind.reap()

    def mind_growth(self, slots: Slots) -> None:
        """Have one timer, for all who wait, see whether the pool should grow."""
        if self.timers.growth is None and slots.may_grow:
            self._plan_growth(min(GROW_AFTER, self.limit / 4))

    def _plan_growth(self, seconds: float) -> None:
        self.timers.growth = asyncio.get_running_loop().call_later(seconds, self._grow)

    def _grow(self) -> None:
        """Grow, unless the loop lags: what came back has not been seen yet, and more to do will
        not make it faster.
        """
        due, self.timers.growth = cast(asyncio.TimerHandle, self.timers.growth).when(), None
        lags = asyncio.get_running_loop().time() - due > GROW_AFTER / 2
        first = next(iter(self.slots.waiters), None)
        waits_long = first is not None and time.monotonic() - first.since > GROW_ANYWAY
        if (lags and not waits_long) or self.slots.grow():
            self._plan_growth(GROW_AFTER)

    def mind_limit(self) -> None:
        """Have one timer, for all who wait, send away who has waited for too long."""
        if self.timers.limit is None:
            self._plan_end(self.limit)

    def _plan_end(self, seconds: float) -> None:
        self.timers.limit = asyncio.get_running_loop().call_later(seconds, self._end_limit)

    def _end_limit(self) -> None:
        self.timers.limit = None
        self._reclaim()
        for ticket in self.slots.waiters:  # who came first is first
            if (left := ticket.since + self.limit - time.monotonic()) > 0:
                self._plan_end(left)
                break
            ticket.dismiss()

    def open_in_time(self, connect: Callable[[], Any], seconds: float) -> Any:
        """Open a connection; cancel that when the time is over."""
        return await_only(self._open_in_time(connect, seconds))

    def ask_in_time(self, ping: Callable[[], Any], berth: Berth, seconds: float) -> None:
        """Ask; cancel that when the time is over."""
        self.open_in_time(ping, seconds)

    async def _open_in_time(self, connect: Callable[[], Any], seconds: float) -> Any:
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                return await greenlet_spawn(connect)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            late = self.not_opened(seconds)
            for note in getattr(error.__context__, "__notes__", ()):  # of the cancellation
                late.add_note(note)
            raise late from None

    def diagnose(self, error: Exception, seconds: float) -> Diagnosis | None:
        """Tell why a connect failed, as `Backend.diagnose` does, which may wait.

        In a thread of its own: those of the loop may all be waiting for this very server.
        """
        from concurrent.futures import ThreadPoolExecutor  # only on such a night

        apart = ThreadPoolExecutor(1, "engineroom-ask")
        try:
            asking = self.home.loop.run_in_executor(apart, self.backend.diagnose, error, seconds)
            return await_only(asking)
        finally:
            apart.shutdown(wait=False)

    def pause(self, seconds: float) -> None:
        """Let other tasks go on for so long."""
        await_only(asyncio.sleep(seconds))

    def fill_beside(self) -> None:
        """Fill in a task; the loop's end cancels it."""
        self._filling = asyncio.get_running_loop().create_task(greenlet_spawn(self.fill))

    def plan_look(self, now: float, seconds: float) -> float:
        """Look again by a timer, for as long as anything is lent."""
        if not self.slots.held:
            return 0.0
        if self.answer_within:
            seconds = min(seconds, LOOK_EVERY)
        asyncio.get_running_loop().call_later(seconds, self._look_again)
        return inf

    def _look_again(self) -> None:
        now = time.monotonic()
        self.next_look: float = 0.0  # if anything raises, the next checkout looks
        if self.answer_within:
            self.cut_silent(now)
        self.look_for_slow(now)


class LoopPool(Replaceable, AsyncAdaptedQueuePool):
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
        self._stuck: str = ""  # in whose hands the first connection is for ever

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
            turn = self._first.take(current_owner()) or shelf.wait_for(
                self._first, shelf.new_bell(shelf.limit)
            )
        except PoolDeadlock:
            raise
        except PoolExhausted as error:
            first = "".join(f", for {holder}" for holder in error.holders)
            raise ConnectTimeout(
                f"No connection was opened within {shelf.limit:g} s: the first one is still on its "
                f"way{first}. See whether the server is up and can be reached, or raise "
                "pool_timeout."
            ) from None
        turn.since, waited = time.monotonic(), turn.waited
        try:
            if self._stuck:
                raise ConnectTimeout(
                    "No connection can be opened any more: the event loop of the first one was "
                    f"closed in the middle of it{self._stuck}, and SQLAlchemy waits for that one. "
                    "Use asyncio.run() or asyncio.Runner, which end what runs before they close a "
                    "loop; here close() the manager and init() it again."
                )
            if not self._initialized:
                connection = shelf.connect(waited)
                self._initialized = True
                return connection
        finally:
            self._first.give(turn)
        return shelf.connect(waited)

    def _open(self, loop: asyncio.AbstractEventLoop) -> Shelf:
        self.reap()
        shelf = self._make_shelf()
        shelf.home.behind = weakref.ref(self)
        shelf.dispatch = self.dispatch  # the engine's listeners hear the connections of all loops
        shelf.home.keeper = self._end_with_loop(loop, shelf)
        shelf.home.end = partial(self._end_before, loop, shelf)
        if self.is_disposed:
            shelf.ended = True  # what is lent is closed when it comes back
            shelf.note_parted(shelf)
        self.shelves[loop] = shelf
        await_only(anext(shelf.home.keeper))  # runs to its yield, without giving way to other tasks
        return shelf

    async def _end_with_loop(
        self, loop: asyncio.AbstractEventLoop, shelf: Shelf
    ) -> AsyncGenerator[None]:
        """Stand at the `yield` until `loop.shutdown_asyncgens()`: the only hook at a loop's end."""
        try:
            yield
        finally:
            await self._end(loop, shelf)

    async def _end_before(self, loop: asyncio.AbstractEventLoop, shelf: Shelf) -> None:
        """End the shelf though its loop goes on; or is just ending, and does so as well."""
        await self._end(loop, shelf)
        with suppress(RuntimeError):  # it is being closed
            await shelf.home.keeper.aclose()  # has nothing left to wait for
        await asyncio.sleep(0)  # a cancellation that a driver's close has put off strikes here

    async def _end(self, loop: asyncio.AbstractEventLoop, shelf: Shelf) -> None:
        """End the shelf; of several who do, each returns when that is done."""
        if self.shelves.get(loop) is shelf:
            del self.shelves[loop]
            shelf.note_parted(shelf)
        async with shelf.home.ending:
            await shelf.end_here()

    def reap(self) -> None:
        """Part with the loops that were closed by hand, of which no hook told us."""
        for turn in self._first.held:
            if has_ended(turn.owner):  # in the middle of the first connect
                shelf = self.shelves.get(turn.owner.get_loop())
                if shelf is not None and shelf.has_opened():  # SQLAlchemy's lock is taken by then
                    self._stuck = f", for {describe(turn, time.monotonic())}"
                self._first.give(turn)
        for loop in list(self.shelves):  # (other threads add theirs meanwhile)
            shelf = self.shelves.pop(loop, None) if loop.is_closed() else None
            if shelf is not None:
                shelf.reap(loop)
        parted = self.shelf_class.parted
        for known in parted.keyrefs():  # in one step, as above
            lender = known()
            if not isinstance(lender, Shelf) or not lender.home.loop.is_closed():
                continue
            if parted.pop(lender, None):  # (another thread may be faster)
                lender.reap(lender.home.loop)

    def dispose(self) -> None:
        """Close what is idle in every loop; `AsyncEngine.dispose()` comes here."""
        self.is_disposed = True
        self.reap()
        here = asyncio._get_running_loop()
        ours = None if here is None else self.shelves.get(here)
        for shelf in list(self.shelves.values()):
            if shelf is not ours:
                shelf.note_parted(shelf)  # now: `close()` or a fork may come before its loop does
                shelf.let_go()
        if ours is not None:
            ours.end()
