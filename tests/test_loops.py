"""Guarantee 3: one manager serves any number of event loops, and each leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import resource
import socket
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import pytest
from scenario import (
    ASYNC_DRIVERS,
    LOOPS,
    Item,
    Log,
    Model,
    end_at_once,
    every_database_and_loop,
    held,
    in_threads,
    is_server,
    loop_factory,
    run,
    run_on,
    server_driver_and_loop,
    settled,
    until,
)
from sqlalchemy import event, func, select, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import greenlet_spawn
from strikes import slow

from engineroom import DatabaseSessionManager, SessionClosed
from engineroom.errors import ConnectTimeout
from engineroom.pool import Shelf
from engineroom.registry import SessionManager
from engineroom.testing import PostgresServer

every_loop = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh database for a driver."""
    elsewhere = {"asyncmy": "mysql_url", "pymysql": "mysql_url"}
    elsewhere |= dict.fromkeys(["sqlite", "aiosqlite"], "sqlite_url")
    if request.param in elsewhere:
        value: str = request.getfixturevalue(elsewhere[request.param])
        return value
    server: PostgresServer = request.getfixturevalue("pg18")
    return server.url(request.getfixturevalue("database"), request.param)


def opened(url: str, **options: Any) -> DatabaseSessionManager:
    """Return a manager whose table has one row, made in a loop that is gone."""
    manager = DatabaseSessionManager().init(url, metadata=Model.metadata, **options)

    async def make() -> None:
        await manager.create_all()
        async with manager.session() as db:
            db.add(Item(id=0))

    asyncio.run(make())
    return manager


async def increment(manager: DatabaseSessionManager) -> int:
    """Count one up, and return what is then stored."""
    async with manager.session() as db:
        await db.execute(update(Item).values(value=Item.value + 1))
    async with manager.reader() as db:
        return (await db.scalars(select(Item.value))).one()


def nothing_left(manager: DatabaseSessionManager, url: str) -> None:
    """Find no connection, no pool, no thread and, at the garbage's collection, no warning."""
    assert settled(url) == []
    assert manager.stats().pools == ()
    gc.collect()
    until(threading.active_count, lambda count: count == 1)  # aiosqlite's end a moment later


# -- loops that end as they should -------------------------------------------------------------


def one_after_another(url: str, loop: str, count: int) -> None:
    manager = opened(url)
    for number in range(1, count + 1):
        assert run_on(loop, increment(manager)) == number
    nothing_left(manager, url)
    asyncio.run(manager.close())


@every_database_and_loop
def test_a_hundred_loops_in_a_row_get_right_answers_and_leave_nothing(url: str, loop: str) -> None:
    run(one_after_another, url, loop, 100)


def at_once(url: str, loop: str, threads: int, units: int) -> None:
    manager = opened(url)
    sys.setswitchinterval(1e-5)  # what can go wrong between threads should
    together = threading.Barrier(threads)

    async def work() -> None:
        await asyncio.gather(*(increment(manager) for _ in range(units)))

    def serve(number: int) -> None:
        together.wait()
        for _ in range(3):
            run_on(loop, work())

    in_threads(threads, serve)
    assert run_on(loop, increment(manager)) == threads * units * 3 + 1
    nothing_left(manager, url)
    asyncio.run(manager.close())


@every_database_and_loop
def test_eight_threads_with_a_loop_each_at_once(url: str, loop: str) -> None:
    run(at_once, url, loop, 8, 8)


def openings(url: str, loop: str) -> None:
    """Open and end loops in many threads: the list of loops changes under whoever reads it."""
    manager = opened(url)
    sys.setswitchinterval(1e-6)

    async def use() -> None:
        async with manager.reader() as db:
            assert (await db.scalars(select(Item.id))).all() == [0]
        manager.stats()

    in_threads(8, lambda number: [run_on(loop, use()) for _ in range(25)])
    nothing_left(manager, url)


@every_loop
def test_loops_may_begin_and_end_in_many_threads_at_once(sqlite_url: str, loop: str) -> None:
    run(openings, sqlite_url, loop)


def under_anyio(url: str, uvloop: bool) -> None:
    manager = opened(url)
    options = {"use_uvloop": uvloop}
    for number in range(1, 6):
        assert anyio.run(increment, manager, backend_options=options) == number
    for number in range(6, 9):
        with anyio.from_thread.start_blocking_portal(backend_options=options) as portal:
            assert portal.call(increment, manager) == number
    nothing_left(manager, url)


@every_database_and_loop
def test_anyio_and_its_blocking_portal(url: str, loop: str) -> None:
    run(under_anyio, url, loop == "uvloop")


def cancelled(url: str, loop: str) -> None:
    """End loops by an exception and with tasks that still run inside their scopes."""
    manager = opened(url)

    async def stay(inside: asyncio.Event) -> None:
        async with manager.session() as db:
            await db.execute(update(Item).values(value=-1))
            inside.set()
            await asyncio.sleep(60)

    async def leave_a_task_behind() -> None:
        inside = asyncio.Event()
        task = asyncio.create_task(stay(inside))
        await inside.wait()
        assert not task.done()
        raise KeyError("the main task fails, and the loop ends")

    for _ in range(5):
        with pytest.raises(KeyError):
            run_on(loop, leave_a_task_behind())
    assert run_on(loop, increment(manager)) == 1
    nothing_left(manager, url)


@every_database_and_loop
def test_a_loop_that_ends_with_open_scopes_rolls_them_back(url: str, loop: str) -> None:
    run(cancelled, url, loop)


# -- loops that were closed by hand, or only stand still ---------------------------------------


def closed_by_hand(url: str, loop: str) -> None:
    manager = opened(url)
    for number in range(1, 6):
        by_hand = loop_factory(loop)()
        by_hand.run_until_complete(together(manager, 3))
        assert len(held(url)) >= 3
        close_by_hand(by_hand)
        del by_hand
        assert run_on(loop, increment(manager)) == 3 * number + number
        nothing_left(manager, url)


def close_by_hand(loop: asyncio.AbstractEventLoop) -> None:
    """Close a loop without its `shutdown_asyncgens()`, so that nobody is told."""
    with warnings.catch_warnings():
        # uvloop says, inside this very call, that sockets are open; only the caller could help it.
        warnings.simplefilter("ignore", ResourceWarning)
        loop.close()


async def together(manager: DatabaseSessionManager, count: int) -> None:
    """Count up so many times, on as many connections."""
    inside = asyncio.Barrier(count)

    async def one() -> None:
        async with manager.reader() as db:
            await db.scalars(select(func.count()).select_from(Item))
            await inside.wait()
        await increment(manager)

    await asyncio.gather(*(one() for _ in range(count)))


@every_database_and_loop
def test_a_loop_closed_by_hand_is_reaped_at_the_next_use(url: str, loop: str) -> None:
    run(closed_by_hand, url, loop)


def closed_by_hand_beside_another(url: str, loop: str) -> None:
    manager = opened(url)
    warm = loop_factory(loop)()
    assert warm.run_until_complete(increment(manager)) == 1
    kept, threads = held(url), threading.active_count()
    for number in range(3):
        by_hand = loop_factory(loop)()
        by_hand.run_until_complete(together(manager, 3))
        assert len(manager.stats().pools) == 4  # two roles, two loops
        close_by_hand(by_hand)
        del by_hand
        assert warm.run_until_complete(increment(manager)) == 5 + 4 * number
        assert len(manager.stats().pools) == 2
        if is_server(url):
            assert settled(url, len(kept)) == kept
        else:  # (SQLite itself keeps descriptors for as long as the file has another one open)
            until(threading.active_count, lambda count: count == threads)
    warm.run_until_complete(manager.close())
    nothing_left(manager, url)
    warm.run_until_complete(warm.shutdown_asyncgens())
    warm.close()


def closed_while_it_waits_for_the_first_connect(url: str, loop: str) -> None:
    """The loop that does connect must not stumble over the one that it cannot wake."""
    manager = opened(url)
    other, stands_in_line = loop_factory(loop)(), threading.Event()

    def in_other() -> None:
        task = other.create_task(increment(manager))
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is the test
        other.run_until_complete(asyncio.sleep(0.1))
        close_by_hand(other)
        kept.append(task)
        stands_in_line.set()

    def connect_slowly(*_: object) -> None:
        if not kept and not stands_in_line.is_set():
            thread.start()
            assert stands_in_line.wait(20)

    kept: list[object] = []  # a destroyed task cannot be closed in peace
    thread = threading.Thread(target=in_other)
    event.listen(manager.engine.sync_engine, "do_connect", connect_slowly)
    assert run_on(loop, increment(manager)) == 1
    assert run_on(loop, increment(manager)) == 2
    assert all(pool.lent == 0 for pool in manager.stats().pools)
    end_at_once()


@every_database_and_loop
def test_a_loop_closed_in_the_queue_for_the_first_connect(url: str, loop: str) -> None:
    run(closed_while_it_waits_for_the_first_connect, url, loop)


@every_database_and_loop
def test_a_loop_closed_by_hand_is_reaped_by_a_loop_that_is_warm(url: str, loop: str) -> None:
    """Which has its connections already, and opens nothing."""
    run(closed_by_hand_beside_another, url, loop)


def closed_by_hand_then_close(url: str, loop: str, sync: bool) -> None:
    manager = opened(url)
    by_hand = loop_factory(loop)()
    by_hand.run_until_complete(together(manager, 3))
    close_by_hand(by_hand)
    if sync:
        manager.sync.close()
    else:
        run_on(loop, manager.close())
    nothing_left(manager, url)


@pytest.mark.parametrize("sync", [False, True], ids=["close", "sync.close"])
@every_database_and_loop
def test_a_loop_closed_by_hand_is_reaped_by_close(url: str, loop: str, sync: bool) -> None:
    run(closed_by_hand_then_close, url, loop, sync)


def idle_loop(url: str, loop: str) -> None:
    manager = opened(url)
    idle = loop_factory(loop)()
    assert idle.run_until_complete(increment(manager)) == 1
    kept = held(url)
    for number in range(2, 5):
        assert run_on(loop, increment(manager)) == number
    if is_server(url):  # its connections wait for it
        assert settled(url, len(kept)) == kept
    assert idle.run_until_complete(increment(manager)) == 5
    run_on(loop, manager.close())  # from another loop
    nothing_left(manager, url)

    manager.init(url)
    assert idle.run_until_complete(increment(manager)) == 6
    idle.run_until_complete(idle.shutdown_asyncgens())
    idle.close()
    nothing_left(manager, url)


@every_database_and_loop
def test_a_loop_that_stands_still_keeps_its_connections_until_close(url: str, loop: str) -> None:
    run(idle_loop, url, loop)


# -- what all loops share ----------------------------------------------------------------------


def listeners(url: str, loop: str) -> None:
    manager = opened(url)
    heard: list[tuple[str, int]] = []
    here = 0
    engine = manager.engine.sync_engine
    for name in ("connect", "checkout", "checkin", "close"):
        event.listen(engine, name, lambda *_, name=name: heard.append((name, here)))
    event.listen(engine, "before_cursor_execute", lambda *_: heard.append(("statement", here)))
    for here in range(1, 6):  # noqa: B007

        async def use() -> None:
            async with manager.session() as db:
                assert (await db.scalars(select(Item.id))).all() == [0]

        run_on(loop, use())
    for name in ("connect", "checkout", "checkin", "statement", "close"):
        assert {number for what, number in heard if what == name} == {1, 2, 3, 4, 5}, name
        assert manager.engine.sync_engine is engine


@every_database_and_loop
def test_a_listener_of_the_engine_hears_every_loop(url: str, loop: str) -> None:
    run(listeners, url, loop)


def close_beside(url: str, loop: str, sync: bool) -> None:
    """Close while the loops of other threads run and have pools."""
    manager = opened(url)
    ready, go_on = threading.Barrier(4), threading.Event()
    closers: list[Callable[[], None]] = [
        manager.sync.close if sync else lambda: run_on(loop, manager.close())
    ]

    async def serve() -> None:
        await together(manager, 2)
        await asyncio.to_thread(ready.wait)
        await asyncio.to_thread(go_on.wait)
        await increment(manager)

    def work(number: int) -> None:
        if number < 3:
            run_on(loop, serve())
            return
        ready.wait()
        assert len(manager.stats().pools) >= 3
        closers[0]()
        assert settled(url) == []
        manager.init(url)
        go_on.set()

    in_threads(4, work)
    assert run_on(loop, increment(manager)) == 3 * 2 + 3 + 1
    nothing_left(manager, url)


@pytest.mark.parametrize("sync", [False, True], ids=["close", "sync.close"])
@every_database_and_loop
def test_close_ends_the_pools_of_other_threads_loops(url: str, loop: str, sync: bool) -> None:
    run(close_beside, url, loop, sync)


def close_as_a_loop_ends(url: str, loop: str, sync: bool) -> None:
    """What `close()` asks of that loop is cancelled there: it ends its pool by itself."""
    manager, log = opened(url), Log()
    ready = threading.Barrier(2)

    async def serve() -> None:
        await together(manager, 2)
        ready.wait()
        time.sleep(0.3)  # it is asked meanwhile

    def work(number: int) -> None:
        if number == 0:
            run_on(loop, serve())
            return
        ready.wait()
        if sync:
            manager.sync.close()
        else:
            run_on(loop, manager.close())

    in_threads(2, work)
    assert log.messages == []
    nothing_left(manager, url)


@pytest.mark.parametrize("sync", [False, True], ids=["close", "sync.close"])
@every_database_and_loop
def test_close_as_another_loop_ends(url: str, loop: str, sync: bool) -> None:
    run(close_as_a_loop_ends, url, loop, sync)


def end_in_a_last_turn(url: str, loop: str) -> None:
    """A loop is asked that has run what ends its pools, and would not run another task."""
    manager, shelves, asked = opened(url), [], []
    ready = threading.Barrier(2)

    async def stand_still() -> None:
        ready.wait()
        time.sleep(0.2)  # it is asked meanwhile

    def work(number: int) -> None:
        if number == 1:
            ready.wait()
            asked.extend(shelf.end_there(shelf.home.end) for shelf in shelves)
            return
        ours = loop_factory(loop)()
        ours.run_until_complete(together(manager, 2))
        shelves.extend(pool for *_, pool in manager._room.lenders() if isinstance(pool, Shelf))
        ours.run_until_complete(ours.shutdown_asyncgens())
        ours.run_until_complete(stand_still())
        ours.close()

    in_threads(2, work)
    assert [over.done() for over in asked] == [True, True]  # of the session's and the reader's
    del shelves[:], asked[:]
    nothing_left(manager, url)
    asyncio.run(manager.close())


@server_driver_and_loop
def test_an_end_in_the_last_turn_of_a_loop(url: str, loop: str) -> None:
    run(end_in_a_last_turn, url, loop)


def close(manager: DatabaseSessionManager, sync: bool) -> None:
    """Close from a thread that runs no loop, or from a loop of its own."""
    if sync:
        manager.sync.close()
    else:
        asyncio.run(manager.close())


def stops_while_it_is_asked(url: str, sync: bool, then: str) -> None:
    """A loop is asked to end its pools, and does not come to it: it stops."""
    manager, log = opened(url), Log()
    ready, over = threading.Barrier(2), threading.Event()

    def work(number: int) -> None:
        if number == 1:
            ready.wait()
            close(manager, sync)
            over.set()
            return
        ours = asyncio.new_event_loop()  # (uvloop would begin, and say that a task was destroyed)

        def last() -> None:
            ours.stop()
            ready.wait()
            time.sleep(0.3)  # it is asked meanwhile

        ours.run_until_complete(together(manager, 2))
        ours.call_soon(last)
        ours.run_forever()
        if then != "is closed":
            over.wait()
        if then == "goes on":
            ours.run_until_complete(asyncio.sleep(0.1))
        ours.close()

    in_threads(2, work)
    assert log.messages == []
    nothing_left(manager, url)


@pytest.mark.parametrize("then", ["is closed", "stands still", "goes on"])
@pytest.mark.parametrize("sync", [False, True], ids=["close", "sync.close"])
@pytest.mark.parametrize("url", ASYNC_DRIVERS, indirect=True)
def test_close_as_another_loop_stops(url: str, sync: bool, then: str) -> None:
    run(stops_while_it_is_asked, url, sync, then)


def jobs_while_it_is_asked(url: str, sync: bool) -> None:
    """A loop stops in the middle of the end that it was asked for."""
    manager, log = opened(url), Log()

    async def job(inside: threading.Event, tail: float) -> None:
        async with manager.reader() as db:
            await db.scalars(select(func.count()).select_from(Item))
            inside.set()
            await asyncio.sleep(0.03)
        await asyncio.sleep(tail)  # what it does after its scope

    def work(inside: threading.Event, over: threading.Event, tail: float, number: int) -> None:
        if number == 0:
            ours = asyncio.new_event_loop()
            ours.run_until_complete(job(inside, tail))
            over.wait()
            ours.run_until_complete(asyncio.sleep(0.05))
            ours.close()
            return
        inside.wait()
        close(manager, sync)
        over.set()

    for tail in range(16):
        in_threads(2, partial(work, threading.Event(), threading.Event(), tail / 1000))
        assert log.messages == [], f"{tail} ms after its scope"
        nothing_left(manager, url)
        manager.init(url)
    asyncio.run(manager.close())


@pytest.mark.parametrize("sync", [False, True], ids=["close", "sync.close"])
@pytest.mark.parametrize("url", ASYNC_DRIVERS, indirect=True)
def test_close_as_another_loop_stops_in_the_middle_of_its_end(url: str, sync: bool) -> None:
    run(jobs_while_it_is_asked, url, sync)


def stopped_in_a_statement(url: str, loop: str, sync: bool) -> None:
    """A loop that only stopped goes on after the manager was closed: its task hears of that."""
    manager, log = opened(url, close_timeout=0.2), Log()
    ours = loop_factory(loop)()

    async def wait_long() -> None:
        async with manager.session() as db:
            await db.execute(update(Item).values(value=1))
            await db.execute(slow(url))

    async def begin() -> asyncio.Task[None]:
        task = asyncio.create_task(wait_long())
        await asyncio.sleep(0.1)
        return task

    task = ours.run_until_complete(begin())
    close(manager, sync)
    if is_server(url):
        assert settled(url) == []
    else:  # (the cursor of its statement has the file open until it goes on)
        with sqlite3.connect(str(make_url(url).database), timeout=1) as beside:
            beside.execute("UPDATE item SET value = 2")
        beside.close()

    async def go_on() -> bool:
        """Wait for the task, and then for a socket that was opened in the first turn."""
        ours_here, theirs = socket.socketpair()
        with ours_here, theirs:
            ours_here.setblocking(False)
            reading = asyncio.create_task(ours.sock_recv(ours_here, 1))
            done, _ = await asyncio.wait([task], timeout=5)
            theirs.send(b"!")
            assert await asyncio.wait_for(reading, 5) == b"!"
        return bool(done)

    assert ours.run_until_complete(go_on()), "its task waits for ever"
    assert isinstance(task.exception(), (DBAPIError, SessionClosed))
    ours.run_until_complete(ours.shutdown_asyncgens())
    ours.close()
    nothing_left(manager, url)
    said = log.messages[0]  # (on aiosqlite, SQLAlchemy says that its cursor was closed already)
    assert said.startswith(f"close() rolls back the session of task {task.get_name()}")


@pytest.mark.parametrize("sync", [False, True], ids=["close", "sync.close"])
@every_database_and_loop
def test_a_loop_that_stopped_in_a_statement_goes_on_after_close(
    url: str, loop: str, sync: bool
) -> None:
    run(stopped_in_a_statement, url, loop, sync)


class BetweenJobs(asyncio.SelectorEventLoop):
    """A loop that begins its next job just after another thread saw, so often, that it has none."""

    def __init__(self, looks: int) -> None:
        self.looks: int = looks
        self.thread: int = threading.get_ident()
        self.may_begin: threading.Event = threading.Event()
        self.is_busy: threading.Event = threading.Event()
        super().__init__()

    def is_running(self) -> bool:
        runs = super().is_running()
        if not runs and threading.get_ident() != self.thread:
            self.looks -= 1
            if self.looks == 0:
                self.may_begin.set()
                self.is_busy.wait()
        return runs


def begins_its_next_job(url: str, end: str, looks: int) -> None:
    """Who ends the pools of a loop that is between two jobs has no part in the next one."""
    manager, log = opened(url), Log()
    sys.setswitchinterval(1e-5)

    async def be_busy(ours: BetweenJobs, ending: Future[None]) -> None:
        ours.is_busy.set()
        while not ending.done():
            await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))
        await asyncio.sleep(0.05)

    def end_pools() -> None:
        if end == "dispose":
            asyncio.run(dispose(manager))
        else:
            close(manager, sync=end == "sync.close")

    with ThreadPoolExecutor(1) as elsewhere:
        for _ in range(4):
            ours = BetweenJobs(looks)
            ours.run_until_complete(together(manager, 8))
            ending = elsewhere.submit(end_pools)
            while not (ours.may_begin.wait(0.01) or ending.done()):
                pass
            ours.run_until_complete(be_busy(ours, ending))
            ending.result()
            ours.run_until_complete(ours.shutdown_asyncgens())
            ours.close()
            assert settled(url) == []
            assert manager.stats().pools == ()
            assert log.messages == []
            if end != "dispose":
                manager.init(url)
    asyncio.run(manager.close())
    nothing_left(manager, url)


async def dispose(manager: DatabaseSessionManager) -> None:
    await manager.engine.dispose()
    async with manager.reader() as db:  # its engine is another one
        await (await db.connection()).engine.dispose()


@pytest.mark.parametrize("looks", [1, 3])  # (`close()` first looks whether the pools connect)
@pytest.mark.parametrize("end", ["close", "sync.close", "dispose"])
@pytest.mark.parametrize("url", [*ASYNC_DRIVERS, "asyncmy"], indirect=True)
def test_a_loop_that_begins_its_next_job_as_its_pools_are_ended(
    url: str, end: str, looks: int
) -> None:
    run(begins_its_next_job, url, end, looks)


def closed_by_hand_after_its_pools(url: str, loop: str, end: str) -> None:
    """A loop that stands still never hears that its pools were ended, and leaves nothing either."""
    manager = opened(url)
    ours = loop_factory(loop)()
    ours.run_until_complete(together(manager, 3))
    if end == "dispose":
        run_on(loop, dispose(manager))
    else:
        close(manager, sync=end == "sync.close")
    if is_server(url):
        assert settled(url) == []
    close_by_hand(ours)
    del ours
    if end == "dispose":
        run_on(loop, increment(manager))
    nothing_left(manager, url)
    asyncio.run(manager.close())


@pytest.mark.parametrize("end", ["close", "sync.close", "dispose"])
@every_database_and_loop
def test_a_loop_that_is_closed_by_hand_after_its_pools_were_ended(
    url: str, loop: str, end: str
) -> None:
    run(closed_by_hand_after_its_pools, url, loop, end)


def disposed_between_jobs(url: str, loop: str, then: str) -> None:
    """`dispose()` elsewhere closes what is idle in a loop that stands still, not what is lent."""
    manager, log = opened(url), Log()
    ours = loop_factory(loop)()

    async def hold(may_go_on: asyncio.Event) -> None:
        async with manager.session() as db:
            await db.execute(update(Item).values(value=Item.value + 1))
            await may_go_on.wait()
            await db.execute(update(Item).values(value=Item.value + 1))

    async def begin() -> tuple[asyncio.Task[None], asyncio.Event]:
        may_go_on = asyncio.Event()
        task = asyncio.create_task(hold(may_go_on))
        await asyncio.sleep(0.1)
        return task, may_go_on

    ours.run_until_complete(together(manager, 3))
    task, may_go_on = ours.run_until_complete(begin())
    run_on(loop, dispose(manager))
    if is_server(url):
        assert len(settled(url, 1)) == 1  # at once, though it stands still
    assert sum(pool.lent for pool in manager.stats().pools) == 1
    if then == "closes":  # all of it, elsewhere
        asyncio.run(manager.close(timeout=0))
        if is_server(url):
            assert settled(url) == []
        task.cancel()
        ours.run_until_complete(asyncio.wait([task]))
    elif then == "goes on":
        may_go_on.set()
        ours.run_until_complete(task)
        assert ours.run_until_complete(increment(manager)) == 6
        ours.run_until_complete(ours.shutdown_asyncgens())
    else:
        task.cancel()
        ours.run_until_complete(asyncio.wait([task]))
    close_by_hand(ours)
    run_on(loop, manager.close())
    nothing_left(manager, url)
    assert len(log.messages) == (then == "closes")  # that it was rolled back


@pytest.mark.parametrize("then", ["goes on", "is closed by hand", "closes"])
@every_database_and_loop
def test_dispose_beside_a_loop_that_stands_still(url: str, loop: str, then: str) -> None:
    run(disposed_between_jobs, url, loop, then)


def never_leave(manager: DatabaseSessionManager, url: str, works: bool) -> asyncio.Task[None]:
    """Return the task of a scope whose loop was closed in the middle of it.

    Keep it: destroyed, it could not be closed in peace.
    """
    ours = asyncio.new_event_loop()

    async def work() -> None:
        async with manager.session() as db:
            await db.scalars(select(func.count()).select_from(Item))
            ours.call_later(0.1, ours.stop)
            await (db.execute(slow(url)) if works else asyncio.sleep(60))

    task = ours.create_task(work())
    ours.run_forever()
    ours.close()
    return task


def sockets() -> int:
    """Count those that the process has open."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the folder's own
            links.append(str(descriptor.readlink()))
    return sum(link.startswith("socket:") for link in links)


def abandoned_in_a_loop_closed_by_hand(url: str, works: bool) -> None:
    """Say once that a scope was rolled back, and wait for nobody who will never go on."""
    manager, log, before = opened(url), Log(), sockets()
    task = never_leave(manager, url, works)
    for _ in range(2):
        asyncio.run(manager.close())
        assert sockets() == before
        manager.init(url)
    (said,) = log.messages
    assert said.startswith(f"close() rolls back the session of task {task.get_name()}")
    asyncio.run(manager.close())
    end_at_once()


@pytest.mark.parametrize(
    ("url", "works"),
    # (aiosqlite's thread says that it cannot tell the closed loop of an error, and ends)
    [("aiosqlite", False), ("psycopg", False), ("psycopg", True), ("asyncpg", True)],
    indirect=["url"],
)
def test_a_scope_that_nobody_will_leave_is_told_of_once(url: str, works: bool) -> None:
    run(abandoned_in_a_loop_closed_by_hand, url, works)


def disposed_of_while_it_is_blocked(url: str, loop: str, sync: bool) -> None:
    """`close()` waits for the loop that `dispose()` has asked to close what is idle there."""
    manager = opened(url)
    blocked = threading.Event()

    async def serve() -> None:
        await together(manager, 3)
        blocked.set()
        time.sleep(0.5)

    def work(number: int) -> None:
        if number == 0:
            run_on(loop, serve())
            return
        blocked.wait()
        run_on(loop, dispose(manager))
        close(manager, sync)
        assert held(url) == []

    in_threads(2, work)
    nothing_left(manager, url)


@pytest.mark.parametrize("sync", [False, True], ids=["close", "sync.close"])
@server_driver_and_loop
def test_close_after_a_dispose_beside_a_loop_that_is_blocked(
    url: str, loop: str, sync: bool
) -> None:
    run(disposed_of_while_it_is_blocked, url, loop, sync)


def disposed_of_before_its_loop_was_closed(url: str) -> None:
    """The next use in another loop reaps what lay in a pool that `dispose()` had parted with."""
    manager = opened(url)
    ours = asyncio.new_event_loop()

    async def never_end() -> None:
        async with manager.session() as db:
            await db.scalars(select(func.count()).select_from(Item))
            ours.stop()
            await asyncio.sleep(60)

    task = ours.create_task(never_end())
    ours.run_forever()
    asyncio.run(manager.engine.dispose())
    assert len(held(url)) == 1
    ours.close()
    asyncio.run(increment(manager))
    assert settled(url) == []
    assert manager.stats().pools == ()
    assert not task.done()
    end_at_once()


@pytest.mark.parametrize("url", ["psycopg", "asyncpg"], indirect=True)
def test_a_loop_that_is_closed_by_hand_after_a_dispose(url: str) -> None:
    run(disposed_of_before_its_loop_was_closed, url)


def cancelled_while_it_reaps(url: str, disposes: bool, runs: str) -> None:
    """Who meets what a closed loop has left may be cancelled then: it is ended all the same."""
    manager = opened(f"{url}?sslmode=disable")  # (asyncpg, cancelled before TLS, drops a future)
    ours = asyncio.new_event_loop()

    async def work(statement: str = "", seconds: float = 0.0) -> None:
        async with manager.session() as db:
            await db.scalars(select(func.count()).select_from(Item))
            if statement:
                await db.execute(text(statement))
            await asyncio.sleep(seconds)

    async def begin() -> asyncio.Task[None]:
        await work()
        task = asyncio.create_task(work(runs, 60))
        await asyncio.sleep(0.1)
        if disposes:
            await manager.engine.dispose()
        return task

    async def meet() -> None:
        using = asyncio.create_task(work())
        await asyncio.sleep(0.003)  # it connects, to end over there what is left
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using

    task = ours.run_until_complete(begin())
    assert len(held(url)) == 1
    ours.close()
    asyncio.run(meet())
    assert settled(url) == []
    assert not task.done()
    end_at_once()


@pytest.mark.parametrize("runs", ["", "SELECT pg_sleep(60)"], ids=["idle", "a statement"])
@pytest.mark.parametrize("disposes", [False, True], ids=["", "after a dispose"])
@pytest.mark.parametrize("url", ["psycopg", "asyncpg"], indirect=True)
def test_what_a_closed_loop_has_left_ends_though_who_meets_it_is_cancelled(
    url: str, disposes: bool, runs: str
) -> None:
    run(cancelled_while_it_reaps, url, disposes, runs)


def closed_in_its_first_connect(url: str) -> None:
    """SQLAlchemy waits for its end for ever; who comes next is told so, and may begin anew."""
    opened(url)
    manager, log = DatabaseSessionManager().init(url), Log()
    ours = asyncio.new_event_loop()

    def wait(driver: Any, _: object) -> None:
        driver.run_async(lambda _: asyncio.sleep(60))

    async def begin() -> asyncio.Task[None]:
        event.listen(manager.engine.sync_engine, "connect", wait)
        task = asyncio.create_task(increment(manager))
        await asyncio.sleep(0.3)
        return task

    task = ours.run_until_complete(begin())
    assert len(held(url)) == 1
    ours.close()
    for _ in range(2):
        with pytest.raises(ConnectTimeout, match="was closed in the middle of it, for .* close()"):
            asyncio.run(increment(manager))
    asyncio.run(manager.close(timeout=0))
    assert "opened at" in log.messages[0]
    assert held(url) == []
    manager.init()
    assert asyncio.run(increment(manager)) == 1
    assert not task.done()
    end_at_once()


@pytest.mark.parametrize("url", ["psycopg", "asyncpg"], indirect=True)
def test_a_loop_that_is_closed_by_hand_in_the_first_connect(url: str) -> None:
    run(closed_in_its_first_connect, url)


def locked_by_a_closed_loop(url: str, count: int) -> None:
    """aiosqlite's thread cannot tell a closed loop of an error, and ends: the lock must go."""
    manager, raised = opened(url), []
    ours = asyncio.new_event_loop()

    async def work(number: int) -> None:
        async with manager.session(read_only=number > 0) as db:
            if number == 0:
                await db.execute(update(Item).values(value=7))
            if number == 1:
                raw: Any = await (await db.connection()).get_raw_connection()
                await raw.driver_connection.close()
                await asyncio.sleep(60)
            await db.execute(slow(url))

    async def begin() -> list[asyncio.Task[None]]:
        begun = [asyncio.create_task(work(number)) for number in range(count)]
        await asyncio.sleep(0.3)
        return begun

    tasks = ours.run_until_complete(begin())
    ours.close()
    threading.excepthook = lambda how: raised.append(how.exc_type)
    assert asyncio.run(increment(manager)) == 1
    assert raised == [RuntimeError] * (1 if count == 1 else count - 1)
    assert not any(task.done() for task in tasks)
    end_at_once()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("url", ["aiosqlite"], indirect=True)
def test_a_writers_statement_in_a_loop_that_is_closed_by_hand(url: str, count: int) -> None:
    run(locked_by_a_closed_loop, url, count)


def forgotten_over_a_closed_loop(url: str) -> None:
    """Of a URL that is invalidated, no connection stays that nobody will give back."""
    opened(url).sync.close()
    tenants = SessionManager()
    task = never_leave(tenants.database(url), url, works=False)
    tenants.invalidate(url)
    assert settled(url) == []
    assert not task.done()
    end_at_once()


@pytest.mark.parametrize("url", ["psycopg", "asyncpg"], indirect=True)
def test_a_url_that_is_invalidated_over_a_closed_loop(url: str) -> None:
    run(forgotten_over_a_closed_loop, url)


def dispose_and_close(url: str, loop: str) -> None:
    """Each asks the other threads' loops to end their pools: who comes second waits."""
    manager, log = opened(url), Log()

    async def serve(ready: threading.Barrier, over: threading.Event) -> None:
        await together(manager, 1)
        await asyncio.to_thread(ready.wait)
        await asyncio.to_thread(over.wait)

    async def end() -> None:
        await asyncio.gather(manager.engine.dispose(), manager.close(), manager.close())

    def work(ready: threading.Barrier, over: threading.Event, number: int) -> None:
        if number < 2:
            return run_on(loop, serve(ready, over))
        ready.wait()
        try:
            run_on(loop, end())
        finally:
            over.set()
        return None

    for _ in range(10):
        in_threads(3, partial(work, threading.Barrier(3), threading.Event()))
        manager.init(url)
    assert log.messages == []
    nothing_left(manager, url)


@server_driver_and_loop
def test_dispose_and_close_at_once(url: str, loop: str) -> None:
    run(dispose_and_close, url, loop)


def end_that_is_cancelled(url: str, loop: str) -> None:
    """Its loop ends in the middle of it, and cancels it at one step after the other."""
    manager, log = opened(url), Log()

    async def begin(steps: int) -> None:
        await together(manager, 5)
        ending = asyncio.ensure_future(manager.engine.dispose())
        for _ in range(steps):
            await asyncio.sleep(0)
        del ending

    for steps in range(20):
        run_on(loop, begin(steps))
        assert log.messages == [], f"after {steps} steps"
        nothing_left(manager, url)
    asyncio.run(manager.close())


@every_database_and_loop
def test_an_end_that_its_loop_cancels(url: str, loop: str) -> None:
    run(end_that_is_cancelled, url, loop)


def close_that_is_cancelled(url: str, loop: str) -> None:
    """A driver's close comes to its end, and the cancellation strikes after it."""
    manager, log = opened(url), Log()
    dialect = manager.engine.dialect

    async def close(ready: asyncio.Event) -> None:
        lent = await manager.engine.raw_connection()
        connection = lent.dbapi_connection
        lent.detach()
        ready.set()
        await greenlet_spawn(dialect.do_close, connection)
        await asyncio.sleep(0)

    async def strike(steps: int) -> bool:
        ready = asyncio.Event()
        closing = asyncio.create_task(close(ready))
        await ready.wait()
        for _ in range(steps):
            await asyncio.sleep(0)
        if closing.done():
            return False
        closing.cancel()
        await asyncio.wait((closing,))
        while threading.active_count() > 1:  # aiosqlite's tells its loop that it ends
            await asyncio.sleep(0.001)
        struck = closing.cancelled(), closing.cancelling()
        assert struck == (True, 1), f"after {steps} steps"
        return True

    for steps in itertools.count():
        struck = run_on(loop, strike(steps))
        assert log.messages == [], f"after {steps} steps"
        nothing_left(manager, url)
        if not struck:
            break
    asyncio.run(manager.close())


@every_database_and_loop
def test_a_drivers_close_that_is_cancelled(url: str, loop: str) -> None:
    run(close_that_is_cancelled, url, loop)


def dispose_under_a_deadline(url: str, loop: str) -> None:
    """What strikes in a driver's close is heard before `dispose()` returns, and not after."""
    manager = opened(url)

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        for _ in range(20):
            await together(manager, 3)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await manager.engine.dispose()
            await asyncio.sleep(0)
            assert task.cancelling() == 0
        await manager.close()

    run_on(loop, main())
    nothing_left(manager, url)


@every_database_and_loop
def test_a_deadline_over_dispose(url: str, loop: str) -> None:
    run(dispose_under_a_deadline, url, loop)


def ended_without_descriptors(url: str, loop: str, way: str) -> None:
    """All that a process may open is open: an end does without what it cannot have."""
    manager = opened(url)
    others = set(Path("/proc/self/fd").iterdir())
    hog: list[int] = []

    async def main() -> None:
        await together(manager, 3)
        with suppress(OSError):
            while True:
                hog.append(os.open(os.devnull, os.O_RDONLY))
        os.close(hog.pop())
        if way == "close":
            await manager.close()

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    try:
        run_on(loop, main())
    finally:
        while hog:
            os.close(hog.pop())
    nothing_left(manager, url)
    assert set(Path("/proc/self/fd").iterdir()) <= others
    asyncio.run(manager.close())


@pytest.mark.parametrize("way", ["loop", "close"])
@pytest.mark.parametrize("loop", ["asyncio"])
@pytest.mark.parametrize("url", ["asyncpg", "psycopg"], indirect=True)
def test_an_end_where_no_descriptor_is_left(url: str, loop: str, way: str) -> None:
    run(ended_without_descriptors, url, loop, way)
