"""Guarantee 4: a forked child never touches what its parent has, and neither has to do anything."""

from __future__ import annotations

import _thread
import asyncio
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from scenario import (
    Item,
    Model,
    backends,
    every_database_and_loop,
    every_server_and_loop,
    every_sync_database,
    fork,
    in_threads,
    is_server,
    loop_factory,
    run,
    run_on,
    sample,
    settled,
    until,
)
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.orm import Session

from engineroom import Database, DatabaseSessionManager, SessionClosed, UsageError
from engineroom.registry import SessionManager
from engineroom.testing import PostgresServer, clones, sandbox

GHOST = 13  # the row that the parent rolls back
CHILD = 100  # the rows that a child writes begin here

every_way = sample(
    "held, end",
    [("nothing", "_exit"), ("session", "return"), ("connect", "_exit"), ("get_session", "return")],
    ["nothing", "session", "connect", "get_session"],
    ["_exit", "return"],
)
every_way_beside = sample(
    "held, end",
    [("nothing", "_exit"), ("session", "return")],
    ["nothing", "session"],
    ["_exit", "return"],
)


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
    """Return a manager whose sync side has a warm pool, and whose table has one row."""
    manager = DatabaseSessionManager().init(
        url,
        metadata=Model.metadata,
        sync_in_async="allow",
        **{"pool_size": 20, "max_overflow": 0} | options,
    )
    manager.sync.create_all()
    with manager.sync_session() as db:
        db.add(Item(id=0))
    return manager


# -- units of work -----------------------------------------------------------------------------


def unit(manager: DatabaseSessionManager, number: int) -> None:
    """Write a number and read it back."""
    with manager.sync_session() as db:
        db.execute(update(Item).where(Item.id == 0).values(value=number))
    with manager.sync.reader() as db:
        assert db.scalars(select(Item.value).where(Item.id == 0)).one() == number


async def async_unit(manager: DatabaseSessionManager, number: int) -> None:
    async with manager.session() as db:
        await db.execute(update(Item).where(Item.id == 0).values(value=number))
    async with manager.reader() as db:
        assert (await db.scalars(select(Item.value).where(Item.id == 0))).one() == number


async def async_warm(manager: DatabaseSessionManager, count: int = 4) -> None:
    together = asyncio.Barrier(count)

    async def one() -> None:
        async with manager.session(read_only=True) as db:
            await db.execute(select(Item))
            await together.wait()

    await asyncio.gather(*(one() for _ in range(count)))


def warm(manager: DatabaseSessionManager, count: int = 4) -> None:
    together = threading.Barrier(count)

    def one(_: int) -> None:
        with manager.sync_session(read_only=True) as db:
            db.execute(select(Item))
            together.wait()

    in_threads(count, one)


def rows(manager: DatabaseSessionManager) -> list[int]:
    with manager.sync.reader() as db:
        return list(db.scalars(select(Item.id).order_by(Item.id)))


def work_in_child(manager: DatabaseSessionManager, loop: str, first: int, reads: bool) -> None:
    """Use both sides of the inherited manager, in several threads and a loop of the child's own."""
    assert manager.stats().scopes == ()
    assert manager.stats().pools == () or all(pool.idle == 0 for pool in manager.stats().pools)

    async def ask() -> None:
        async def one(number: int) -> None:
            async with manager.reader() as db:
                answer = await db.scalar(select(text(str(number))))
                assert answer == number

        await asyncio.gather(*(one(number) for number in range(20)))
        if not reads:
            async with manager.session() as db:
                await db.execute(insert(Item).values(id=first))

    run_on(loop, ask())

    def one(number: int) -> None:
        with manager.sync.reader() as db:
            assert db.scalar(select(text(str(number)))) == number

    in_threads(4, one)
    if not reads:
        with manager.sync_session() as db:
            db.add(Item(id=first + 1))
        assert rows(manager)[-2:] == [first, first + 1]


def close_what_is_ours(manager: DatabaseSessionManager, end: str) -> None:
    """Close as any process does before it ends (psycopg warns at its exit if it did not)."""
    if end != "_exit":
        manager.sync.close()


# -- synchronous -------------------------------------------------------------------------------


def sync_fork(url: str, held: str, end: str) -> None:
    manager = opened(url)
    warm(manager)
    before = backends(url) if is_server(url) else []
    # Where the parent holds the lock of the SQLite file, the child can only read.
    reads = not is_server(url) and held != "nothing"

    scope: Any = None
    session: Any = None
    if held == "session":
        scope = manager.sync_session()
    elif held == "connect":
        scope = manager.sync.connect()
    elif held == "get_session":
        session = manager.sync.get_session()
    if scope is not None:
        session = scope.__enter__()
    if session is not None:
        session.execute(insert(Item).values(id=GHOST))

    def child() -> None:
        if session is not None:
            with pytest.raises(SessionClosed, match="fork"):
                session.execute(select(Item))
        if scope is not None:
            leave(scope)
        elif session is not None:
            session.close()
        work_in_child(manager, "asyncio", CHILD, reads)
        close_what_is_ours(manager, end)

    wait = fork(child, end)
    wait()
    for number in range(50):
        unit(manager, number) if not reads else None
    if scope is not None:
        scope.__exit__(KeyError, KeyError(), None)
    elif session is not None:
        session.rollback()
        session.close()
    for number in range(100):
        unit(manager, number)
    assert rows(manager) == [0] if reads else [0, CHILD, CHILD + 1]
    if before:
        assert set(backends(url)) >= set(before)  # the parent noticed nothing
    manager.sync.close()


def leave(scope: Any) -> None:
    """Leave a `with` in the child as a success; that it says so is welcome, but not required."""
    try:
        scope.__exit__(None, None, None)
    except SessionClosed:
        pass


@every_way
@every_sync_database
def test_a_synchronous_parent_never_notices(url: str, held: str, end: str) -> None:
    run(sync_fork, url, held, end)


def leaves_by_system_exit(url: str) -> None:
    manager = opened(url)
    warm(manager)
    wait: Callable[[], None] | None = None
    with pytest.raises(KeyError), manager.sync_session() as db:
        db.add(Item(id=GHOST))
        db.flush()
        wait = fork(lambda: None, "return")  # the child's SystemExit passes through this `with`
        wait()
        raise KeyError
    for number in range(100):
        unit(manager, number)
    assert rows(manager) == [0]
    manager.sync.close()


@every_sync_database
def test_a_child_that_exits_through_the_with_of_its_parent(url: str) -> None:
    run(leaves_by_system_exit, url)


def enters_again(url: str, verb: str) -> None:
    """What a child has left of its parent's it may enter for itself."""
    manager = opened(url)
    with manager.sync:
        for scope in (getattr(manager.sync, verb)(), getattr(manager.sync, verb)()):
            with suppress(KeyError), scope as db:
                db.execute(text("SELECT 1"))
                if not (child := os.fork()):
                    raise KeyError
            if not child:
                with scope as db:
                    os._exit(db.execute(text("SELECT 2")).scalar())
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
            with scope as db:
                assert db.execute(text("SELECT 3")).scalar() == 3


@pytest.mark.parametrize("verb", ["session", "reader", "connect"])
@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_a_child_enters_again_what_it_has_left(url: str, verb: str) -> None:
    run(enters_again, url, verb)


def closes_what_it_inherited(url: str, end: str) -> None:
    """Let go of what no scope ends: sessions and connections, of a disposed engine, too."""
    manager, registry = opened(url), SessionManager(metadata=Model.metadata)
    before = manager.sync_engine.connect()
    ask = select(text("42"))
    assert before.scalar(ask) == 42
    manager.sync_engine.dispose()
    passing = registry.session_factory(url)
    registry.forked = True
    inherited: list[Any] = [
        before,
        manager.sync_engine.connect(),
        manager.sync.get_session(),
        passing,
        registry.session_factory(url),
    ]
    for one in inherited:
        assert one.scalar(ask) == 42
    seen = backends(url)

    def child() -> None:
        for one in inherited:
            if isinstance(one, Session):
                with pytest.raises(SessionClosed, match="fork"):
                    one.execute(ask)
            one.close()
        inherited.clear()
        gc.collect()
        work_in_child(manager, "asyncio", CHILD, reads=False)
        registry.close()
        close_what_is_ours(manager, end)

    wait = fork(child, end)
    wait()
    for one in inherited:
        assert one.scalar(ask) == 42
    assert backends(url) == seen
    for one in inherited:
        one.close()
    registry.close()
    manager.sync.close()
    assert settled(url) == []


@pytest.mark.parametrize("end", ["_exit", "return"])
@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_a_child_closes_what_it_inherited_without_a_word(url: str, end: str) -> None:
    run(closes_what_it_inherited, url, end)


# -- asynchronous ------------------------------------------------------------------------------


def closes_in_a_loop_of_its_own(url: str, loop: str) -> None:
    async def main() -> None:
        manager, registry = opened(url), SessionManager(metadata=Model.metadata)
        ask = select(text("42"))
        before = await manager.engine.connect()
        assert await before.scalar(ask) == 42
        await manager.engine.dispose()
        inherited: list[Any] = [
            before,
            await manager.engine.connect(),
            await registry.async_session_factory(url),
        ]
        for one in inherited:
            assert await one.scalar(ask) == 42

        async def close() -> None:
            with pytest.raises(SessionClosed, match="fork"):
                await inherited[2].execute(ask)
            for one in inherited:
                await one.close()
            inherited.clear()
            gc.collect()

        def child() -> None:
            run_on(loop, close())
            work_in_child(manager, loop, CHILD, reads=True)

        wait = fork(child)
        await asyncio.to_thread(wait)
        for one in inherited:
            assert await one.scalar(ask) == 42
            await one.close()
        await registry.aclose()
        await manager.close()

    run_on(loop, main())
    assert settled(url) == []


@every_server_and_loop
def test_a_child_closes_what_it_inherited_in_a_loop_of_its_own(url: str, loop: str) -> None:
    run(closes_in_a_loop_of_its_own, url, loop)


def fork_in_task(url: str, loop: str, held: str) -> None:
    """Fork inside a running task; such a child can only end by `_exit`, as multiprocessing's do."""
    manager = opened(url)

    async def main() -> None:
        await async_warm(manager)
        before = backends(url) if is_server(url) else []
        reads = not is_server(url) and held != "nothing"
        scope: Any = None
        opened: Any = None
        if held != "nothing":
            scope = manager.session() if held == "session" else manager.connect()
            opened = await scope.__aenter__()
            await opened.execute(insert(Item).values(id=GHOST))

        def child() -> None:
            work_in_child(manager, loop, CHILD, reads)
            if scope is not None:
                run_on(loop, use_and_leave())

        async def use_and_leave() -> None:
            with pytest.raises(SessionClosed, match="fork"):
                await opened.execute(select(Item))
            try:
                await scope.__aexit__(None, None, None)
            except SessionClosed:
                pass

        wait = fork(child)
        await asyncio.to_thread(wait)
        if not reads:
            await asyncio.gather(*(reading(manager, number) for number in range(50)))
        if scope is not None:
            await scope.__aexit__(KeyError, KeyError(), None)
        await asyncio.gather(*(reading(manager, number) for number in range(50)))
        for number in range(50):
            await async_unit(manager, number)
        assert rows(manager) == [0] if reads else [0, CHILD, CHILD + 1]
        if before:
            assert set(backends(url)) >= set(before)
        await manager.close()

    run_on(loop, main())


async def reading(manager: DatabaseSessionManager, number: int) -> None:
    async with manager.session(read_only=True) as db:
        assert await db.scalar(select(text(str(number)))) == number


@pytest.mark.parametrize("held", ["nothing", "session", "connect"])
@every_database_and_loop
def test_a_fork_inside_a_running_task(url: str, loop: str, held: str) -> None:
    run(fork_in_task, url, loop, held)


def leaves_the_loop(url: str, loop: str) -> None:
    """Fork inside a running task, with a child that leaves the loop by an exception of its own."""
    manager = opened(url)

    async def main() -> None:
        await async_warm(manager)
        before = backends(url) if is_server(url) else []
        wait = fork(lambda: None, "return")  # its SystemExit goes through this task and the Runner
        await asyncio.to_thread(wait)
        for number in range(100):
            await async_unit(manager, number)
        assert await asyncio.to_thread(rows, manager) == [0]
        if before:
            assert set(backends(url)) >= set(before)
        await manager.close()

    run_on(loop, main())


@every_database_and_loop
def test_a_child_that_leaves_its_inherited_loop(url: str, loop: str) -> None:
    run(leaves_the_loop, url, loop)


def loops_with_watchers(url: str, loop: str) -> None:
    """Fork in a task while the loop has watchers to add still, and have both sides add them."""
    manager = opened(url)

    async def main() -> None:
        await async_warm(manager)
        pairs = [os.pipe() for _ in range(50)]
        running = asyncio.get_running_loop()
        for ours, _ in pairs:
            running.add_reader(ours, int)
        wait = fork(lambda: None, "return")
        waited = asyncio.create_task(asyncio.to_thread(wait))
        while not waited.done():
            for ours, _ in pairs:
                running.remove_reader(ours)
            await asyncio.sleep(0)
            for ours, _ in pairs:
                running.add_reader(ours, int)
            await asyncio.sleep(0)
        await waited
        for pair in pairs:
            running.remove_reader(pair[0])
            for end in pair:
                os.close(end)
        await async_unit(manager, 1)
        await manager.close()

    run_on(loop, main())


@every_database_and_loop
def test_both_sides_of_a_fork_use_a_loop_with_watchers(url: str, loop: str) -> None:
    run(loops_with_watchers, url, loop)


def fork_beside_loop(url: str, loop: str, held: str, end: str) -> None:
    """Fork between two runs of a loop that lives on."""
    manager = opened(url)
    ours = loop_factory(loop)()
    ours.run_until_complete(async_warm(manager))
    before = backends(url) if is_server(url) else []
    reads = not is_server(url) and held != "nothing"
    scope: Any = None
    if held != "nothing":
        scope = manager.session()

        async def enter() -> None:
            session = await scope.__aenter__()
            await session.execute(insert(Item).values(id=GHOST))

        ours.run_until_complete(enter())

    def child() -> None:
        work_in_child(manager, loop, CHILD, reads)
        close_what_is_ours(manager, end)

    wait = fork(child, end)
    wait()
    if scope is not None:
        ours.run_until_complete(scope.__aexit__(KeyError, KeyError(), None))
    for number in range(100):
        ours.run_until_complete(async_unit(manager, number))
    assert rows(manager) == [0] if reads else [0, CHILD, CHILD + 1]
    if before:
        assert set(backends(url)) >= set(before)
    ours.run_until_complete(manager.close())
    ours.run_until_complete(ours.shutdown_asyncgens())
    ours.close()


@every_way_beside
@every_database_and_loop
def test_a_fork_beside_a_loop_that_lives_on(url: str, loop: str, held: str, end: str) -> None:
    run(fork_beside_loop, url, loop, held, end)


# -- what the inherited drivers cannot be told any more -----------------------------------------


def fork_without_its_loop(url: str, loop: str, why: str) -> None:
    """Whichever connection cannot be parted with as usual: those behind it are parted with."""
    manager = opened(url)
    manager.sync.engine.dispose()  # so that the asynchronous pool is the first
    ours = loop_factory(loop)()
    ours.set_debug(why == "another thread's, in debug mode")
    ours.slow_callback_duration = 60.0  # seconds: of that, debug mode need not tell
    ours.run_until_complete(async_warm(manager))
    unit(manager, 1)
    second = Database(url)
    with second.reader() as db:
        db.execute(select(Item))
    if why == "closed":
        ours.close()
    before, hog = backends(url), []

    def child() -> None:
        while hog:
            os.close(hog.pop())
        with second.reader() as db:
            db.execute(select(Item))
        work_in_child(manager, "asyncio", CHILD, reads=False)

    def begin() -> None:
        if why == "no descriptor":
            with suppress(OSError):
                while True:
                    hog.append(os.open(os.devnull, os.O_RDONLY))
        wait = fork(child)
        while hog:
            os.close(hog.pop())
        wait()

    if ours.is_closed():
        begin()
    else:
        ours.run_until_complete(asyncio.to_thread(begin))
    assert set(backends(url)) >= set(before)
    unit(manager, 2)
    with second.reader() as db:
        db.execute(select(Item))
    second.close()
    manager.sync.close()
    if not ours.is_closed():
        ours.run_until_complete(ours.shutdown_default_executor())
        ours.close()


@pytest.mark.parametrize("why", ["closed", "another thread's, in debug mode", "no descriptor"])
@every_server_and_loop
def test_a_fork_whose_inherited_loop_hears_nothing(url: str, loop: str, why: str) -> None:
    run(fork_without_its_loop, url, loop, why)


def fork_while_closing(url: str) -> None:
    manager = opened(url)
    inside, over = threading.Event(), threading.Event()

    def hold() -> None:
        with manager.sync_session() as db:
            db.execute(select(Item))
            inside.set()
            over.wait()

    holding = threading.Thread(target=hold)
    holding.start()
    inside.wait()
    closing = threading.Thread(target=manager.sync.close)
    closing.start()
    until(lambda: refuses(manager), bool)

    def child() -> None:
        work_in_child(manager, "asyncio", CHILD, reads=False)
        manager.sync.close()

    wait = fork(child)
    wait()
    over.set()
    closing.join()
    holding.join()
    with pytest.raises(UsageError):
        rows(manager)


def refuses(manager: DatabaseSessionManager) -> bool:
    try:
        rows(manager)
    except UsageError:
        return True
    return False


@pytest.mark.parametrize("url", ["psycopg"], indirect=True)
def test_a_child_forked_while_its_parent_closes_starts_afresh(url: str) -> None:
    run(fork_while_closing, url)


# -- how else processes are forked -------------------------------------------------------------

shared: DatabaseSessionManager


def in_a_process(number: int) -> int:
    work_in_child(shared, "asyncio", CHILD + 10 * number, reads=False)
    return os.getpid()


def increments(count: int) -> None:
    for _ in range(count):
        with shared.sync_session() as db:
            db.execute(update(Item).values(value=Item.value + 1))


def processes(url: str, loop: str) -> None:
    global shared
    shared = opened(url)
    warm(shared)
    run_on(loop, async_warm(shared))
    context = multiprocessing.get_context("fork")

    children = [context.Process(target=in_a_process, args=(number,)) for number in range(2)]
    for child in children:
        child.start()
        child.join(20)
        assert child.exitcode == 0

    async def from_a_task() -> None:
        await async_warm(shared)
        child = context.Process(target=in_a_process, args=(7,))
        child.start()
        await asyncio.to_thread(child.join, 20)
        assert child.exitcode == 0
        for number in range(100):
            await async_unit(shared, number)
        async with shared.session() as db:
            await db.execute(update(Item).values(value=0))

    run_on(loop, from_a_task())
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        list(executor.map(increments, [25] * 4))
    with shared.sync.reader() as db:
        assert set(db.scalars(select(Item.value))) == {100}
    shared.sync.close()


@every_database_and_loop
def test_processes_of_multiprocessing(url: str, loop: str) -> None:
    run(processes, url, loop)


# -- what else may be going on at that moment --------------------------------------------------


def fork_under_wait(url: str) -> None:
    """Fork while other threads hold every connection, and others wait for one."""
    manager = opened(url, pool_size=1, max_overflow=1)
    inside, leave = threading.Barrier(3), threading.Event()

    def hold() -> None:
        with manager.sync_session(read_only=True) as db:
            db.execute(select(Item))
            inside.wait()
            leave.wait()

    def queue() -> None:
        with manager.sync_session(read_only=True) as db:
            assert db.scalar(select(func.count()).select_from(Item)) == 1

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    queued = [threading.Thread(target=queue) for _ in range(5)]
    for thread in queued:
        thread.start()
    while sum(pool.waiting for pool in manager.stats().pools) < 5:
        time.sleep(0.01)

    def child() -> None:
        work_in_child(manager, "asyncio", CHILD, reads=True)
        close_what_is_ours(manager, "return")

    wait = fork(child, "return")
    wait()
    leave.set()
    for thread in threads + queued:
        thread.join()
    for number in range(100):
        unit(manager, number)
    manager.sync.close()


@every_sync_database
def test_a_fork_while_other_threads_wait_for_a_connection(url: str) -> None:
    run(fork_under_wait, url)


def refused(url: str) -> AbstractContextManager[None]:
    """Let a child refuse a SQLite file that was in a transaction at the fork, clearly and at once.

    SQLite cannot carry one across a fork: the child would wait for ever for a lock of its own past.
    """
    return nullcontext() if is_server(url) else suppress(UsageError)


def fork_under_load(url: str, forks: int) -> None:
    """Fork again and again while other threads work: the child may find anything half done."""
    # Nobody connects meanwhile, and SQLite is left out: a lock inside a C library that another
    # thread holds at the fork stays held in the child for ever.
    manager = opened(url, pool_size=4, max_overflow=0)
    warm(manager)
    stop = threading.Event()

    def work(number: int) -> None:
        if number:
            while not stop.is_set():
                with manager.sync_session() as db:
                    assert db.scalar(select(text(str(number)))) == number
            return
        try:
            for _ in range(forks):
                fork(answer, "_exit")()
        finally:
            stop.set()

    def answer() -> None:
        with manager.sync_session(read_only=True) as db:
            assert db.scalar(select(text("42"))) == 42

    in_threads(5, work)
    manager.sync.close()


@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_forks_while_other_threads_work(url: str) -> None:
    run(fork_under_load, url, 20)


def thread_about_to_end(url: str) -> list[int]:
    """Fork while a thread is there that Python has done with, and again beside one that stays."""
    manager = opened(url)
    warm(manager)
    seen = []
    for seconds in (0.1, 60):
        _thread.start_new_thread(time.sleep, (seconds,))  # `threading` does not know it
        for _ in range(3):
            fork(lambda: unit(manager, 1))()
            seen.append(len(list(Path("/proc/self/task").iterdir())))
    manager.sync.close()
    return seen


@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_a_fork_waits_for_a_thread_that_is_about_to_end(url: str) -> None:
    """What C libraries do at its end would be left half done in the child."""
    assert run(thread_about_to_end, url) == [1, 1, 1, 2, 2, 2]


def grandchild(url: str) -> None:
    manager = opened(url)

    def child() -> None:
        unit(manager, 1)
        fork(lambda: (unit(manager, 2), manager.sync.close()), "return")()
        unit(manager, 3)
        manager.sync.close()

    fork(child, "return")()
    unit(manager, 4)
    manager.sync.close()


@every_sync_database
def test_a_child_may_fork_again_and_close(url: str) -> None:
    run(grandchild, url)


def parent_closes_first(url: str) -> None:
    """A child goes on working when its parent has closed: on SQLite, that removes files."""
    manager = opened(url)
    warm(manager)
    reading, writing = os.pipe()

    def child() -> None:
        os.close(writing)
        for number in range(5):
            unit(manager, number)
        os.read(reading, 1)  # until the parent has closed
        for number in range(5, 10):
            unit(manager, number)
        manager.sync.close()

    wait = fork(child, "return")
    os.close(reading)
    time.sleep(0.3)
    manager.sync.close()
    os.close(writing)
    wait()
    with Database(url) as database, database.reader() as db:
        assert db.scalars(select(Item.value).where(Item.id == 0)).one() == 9


@every_sync_database
def test_a_child_works_on_after_its_parent_has_closed(url: str) -> None:
    run(parent_closes_first, url)


def parent_in_transaction(url: str) -> None:
    """Fork under an open write; once the parent has ended it, the child may write."""
    manager = opened(url)
    reading, writing = os.pipe()

    def child() -> None:
        os.close(writing)
        os.read(reading, 1)
        with refused(url):
            work_in_child(manager, "asyncio", CHILD, reads=False)
        manager.sync.close()

    with manager.sync_session() as db:
        db.execute(insert(Item).values(id=1))
        wait = fork(child, "return")
        os.close(reading)
    os.close(writing)
    wait()
    if is_server(url):
        assert rows(manager) == [0, 1, CHILD, CHILD + 1]
    else:
        assert rows(manager) in ([0, 1, CHILD, CHILD + 1], [0, 1])
    manager.sync.close()


@every_sync_database
def test_a_child_forked_under_an_open_write_writes_after_it(url: str) -> None:
    run(parent_in_transaction, url)


def outlived(url: str, loop: str) -> None:
    """A parent that ends without a word, while its child lives on with copies of its sockets."""
    reading, writing = os.pipe()
    told, telling = os.pipe()

    def parent() -> None:
        manager = opened(url)
        warm(manager)
        ours = loop_factory(loop)()
        ours.run_until_complete(async_warm(manager))
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            os.write(telling, b".")
            os.read(reading, 1)
            os._exit(0)
        os._exit(0)

    fork(parent)()
    os.read(told, 1)  # the grandchild lives
    assert settled(url) == []
    os.close(writing)


@every_server_and_loop
def test_a_child_that_outlives_its_parent_keeps_no_backend_alive(url: str, loop: str) -> None:
    run(outlived, url, loop)


# -- inside of a test's sandbox ----------------------------------------------------------------

COUNT = select(func.count()).select_from(Item)


def make_tables(url: str) -> None:
    with Database(url, metadata=Model.metadata) as door:
        door.create_all()


def forked_in_a_clone(url: str) -> None:
    make_tables(url)
    with Database(url) as door, clones(url, make_tables) as template:
        with door.session() as db:  # the database's own pool is warm at the fork
            assert db.scalar(COUNT) == 0
        with sandbox(door, isolation="database", template=template):
            with door.session() as db:
                db.add(Item(id=1))

            def child() -> None:
                with door.session() as db:
                    assert db.scalar(COUNT) == 1
                    db.add(Item(id=2))

            fork(child)()
            with door.session() as db:
                assert db.scalar(COUNT) == 2
                db.add(Item(id=3))
        with door.session() as db:
            assert db.scalar(COUNT) == 0


@pytest.mark.parametrize("url", ["psycopg", "sqlite"], indirect=True)
def test_a_fork_shares_a_clone(url: str) -> None:
    run(forked_in_a_clone, url)
