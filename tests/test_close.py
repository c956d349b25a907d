"""Guarantee 14: `close()` drains, names whom it did not wait for, and leaves no backend behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from doorman import Doorman
from scenario import (
    LOOPS,
    Item,
    Log,
    Model,
    backends,
    every_driver_and_loop,
    every_sync_driver,
    held,
    in_threads,
    is_postgres,
    run,
    run_on,
    sample,
    server,
    server_driver_and_loop,
    settled,
    until,
)
from sqlalchemy import insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.event import listen
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only

from engineroom import (
    Database,
    DatabaseSessionManager,
    SessionClosed,
    UsageError,
    on_commit,
    on_rollback,
)
from engineroom.departures import GONE_LIMIT
from engineroom.errors import CloseInsideScope, ManagerClosed
from engineroom.testing import PostgresServer, WireProxy

every_loop = pytest.mark.parametrize("loop", LOOPS)

LONG = 50  # seconds: longer than any scenario may take
GRACE = 4  # seconds for scopes that end as soon as they see close(), on the slowest machine


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh database for a driver."""
    if request.param in {"sqlite", "aiosqlite"}:
        value: str = request.getfixturevalue("sqlite_url")
        return value
    server: PostgresServer = request.getfixturevalue("pg18")
    return server.url(request.getfixturevalue("database"), request.param)


def opened(url: str, **options: Any) -> DatabaseSessionManager:
    manager = DatabaseSessionManager().init(
        url, metadata=Model.metadata, sync_in_async="allow", **{"pool_size": 25} | options
    )
    manager.sync.create_all()
    return manager


def stored(url: str) -> list[int]:
    with Database(url) as database, database.reader() as db:
        return list(db.scalars(select(Item.id).order_by(Item.id)))


def is_named(log: Log, function: str) -> int:
    """Count the warnings that name a scope by file, line and function."""
    return sum("test_close.py:" in line and f" in {function}" in line for line in log.messages)


def lock_is_free(url: str) -> bool:
    """Whether a stranger may write to the SQLite file at once."""
    file = make_url(url).database
    assert file is not None
    connection = sqlite3.connect(file, timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()
    return True


def is_left(url: str) -> bool:
    """Whether the manager has let go: no backend on the server, no lock on the file.

    (The descriptor of a file whose scope still stands in its `with` is closed when that is left.)
    """
    return settled(url) == [] if is_postgres(url) else lock_is_free(url)


def slow_statement(url: str) -> Any:
    if is_postgres(url):
        return text(f"SELECT pg_sleep({LONG})")
    return text(
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 4000000000)"
        " SELECT count(*) FROM t"
    )


# -- twenty scopes: on PostgreSQL all may write at once ----------------------------------------


class Twenty:
    """Twenty scopes of four kinds, each of which has inserted its number."""

    def __init__(self, manager: DatabaseSessionManager, url: str) -> None:
        self.manager = manager
        self.url = url
        self.inside = 0
        self.started = threading.Semaphore(0)
        self.closed = threading.Event()

    def is_closing(self) -> bool:
        return self.manager.stats().state != "open"

    async def quick(self, number: int) -> None:
        """End as soon as close() waits for it."""
        async with self.manager.session() as db:
            await db.execute(insert(Item).values(id=number))
            self.started.release()
            while not self.is_closing():
                await asyncio.sleep(0.01)

    async def sleeper(self, number: int, use: bool) -> None:
        scope: Any = self.manager.session() if number % 3 else self.manager.connect()
        db = await scope.__aenter__()
        await db.execute(insert(Item).values(id=number))
        self.started.release()
        while not self.closed.is_set():  # (not in a thread: they would fill the loop's executor)
            await asyncio.sleep(0.02)
        if use:
            with pytest.raises(SessionClosed, match="test_close.py"):
                await db.execute(select(Item))
        with pytest.raises(SessionClosed, match="test_close.py"):
            await scope.__aexit__(None, None, None)

    async def on_server(self, number: int) -> None:
        with pytest.raises((DBAPIError, SessionClosed)):
            async with self.manager.session() as db:
                await db.execute(insert(Item).values(id=number))
                self.started.release()
                await db.execute(slow_statement(self.url))

    def sync_quick(self, number: int) -> None:
        with self.manager.sync_session() as db:
            db.execute(insert(Item).values(id=number))
            self.started.release()
            while not self.is_closing():
                time.sleep(0.01)

    def sync_sleeper(self, number: int, use: bool) -> None:
        scope: Any = self.manager.sync_session() if number % 3 else self.manager.sync.connect()
        db = scope.__enter__()
        db.execute(insert(Item).values(id=number))
        self.started.release()
        self.closed.wait()
        if use:
            with pytest.raises(SessionClosed, match="test_close.py"):
                db.execute(select(Item))
        with pytest.raises(SessionClosed, match="test_close.py"):
            scope.__exit__(None, None, None)

    def sync_on_server(self, number: int) -> None:
        with pytest.raises((DBAPIError, SessionClosed)), self.manager.sync_session() as db:
            db.execute(insert(Item).values(id=number))
            self.started.release()
            db.execute(slow_statement(self.url))

    async def run(self, first: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(first, first + 8):
                tasks.create_task(self.quick(number))
            for number in range(first + 8, first + 14):
                tasks.create_task(self.sleeper(number, number % 2 == 0))
            for number in range(first + 14, first + 20):
                tasks.create_task(self.on_server(number))

    def run_sync(self, first: int) -> None:
        def work(number: int) -> None:
            if number < 8:
                self.sync_quick(first + number)
            elif number < 14:
                self.sync_sleeper(first + number, number % 2 == 0)
            else:
                self.sync_on_server(first + number)

        in_threads(20, work)


def check_after(twenty: Twenty, log: Log, quick: set[int], overdue: int) -> None:
    url = twenty.url
    assert settled(url) == []
    assert len(log.messages) == overdue, log.messages
    assert all("test_close.py:" in line for line in log.messages), log.messages
    assert twenty.manager.stats().state == "closed"
    assert twenty.manager.stats().pools == ()
    assert set(stored(url)) == quick


def twenty_async(url: str, loop: str) -> None:
    log, manager = Log(), opened(url)
    twenty = Twenty(manager, url)

    async def main() -> None:
        running = asyncio.create_task(twenty.run(0))
        for _ in range(20):
            while not twenty.started.acquire(blocking=False):
                await asyncio.sleep(0.01)
        closing = asyncio.create_task(manager.close(timeout=GRACE))
        await asyncio.sleep(0)
        with pytest.raises(ManagerClosed):
            await manager.session().__aenter__()
        with pytest.raises(ManagerClosed):
            manager.sync_session().__enter__()
        await closing
        await asyncio.to_thread(check_after, twenty, log, set(range(8)), 12)
        assert is_named(log, "sleeper") == 6
        assert is_named(log, "on_server") == 6
        await manager.close()  # a second one does nothing
        manager.sync.close()
        with pytest.raises(UsageError, match="closed"):
            await manager.session().__aenter__()
        twenty.closed.set()
        await running

        manager.init(url)  # and it opens again
        async with manager.session() as db:
            assert len((await db.scalars(select(Item.id))).all()) == 8
        await manager.close()

    run_on(loop, main())
    assert settled(url) == []
    assert manager.stats().scopes == ()


@server_driver_and_loop
def test_close_under_twenty_running_scopes(url: str, loop: str) -> None:
    run(twenty_async, url, loop)


def twenty_sync(url: str) -> None:
    log, manager = Log(), opened(url)
    twenty = Twenty(manager, url)
    running = threading.Thread(target=in_threads, args=(1, lambda _: twenty.run_sync(0)))
    running.start()
    for _ in range(20):
        assert twenty.started.acquire(timeout=20)
    closing = threading.Thread(target=manager.sync.close, args=(GRACE,))
    closing.start()
    until(lambda: manager.stats().state, lambda state: state == "closing")
    with pytest.raises(ManagerClosed):
        manager.sync_session().__enter__()
    with pytest.raises(ManagerClosed):
        manager.sync.get_session().execute(select(Item))
    closing.join()
    check_after(twenty, log, set(range(8)), 12)
    assert is_named(log, "sync_sleeper") == 6
    assert is_named(log, "sync_on_server") == 6
    manager.sync.close()
    twenty.closed.set()
    running.join()
    manager.sync.init(url)
    with manager.sync_session() as db:
        assert len(db.scalars(select(Item.id)).all()) == 8
    manager.sync.close()
    assert settled(url) == []


@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_close_under_twenty_running_synchronous_scopes(url: str) -> None:
    run(twenty_sync, url)


def both_sides(url: str, loop: str, sync: bool) -> None:
    """Close under the scopes of two other threads' loops, of threads, and of one's own loop."""
    log, manager = Log(), opened(url)
    twenty = Twenty(manager, url)

    def close_once_all_run() -> None:
        try:
            for _ in range(60):
                assert twenty.started.acquire(timeout=20)
            if sync:
                manager.sync.close(GRACE)
            else:
                run_on(loop, manager.close(timeout=GRACE))
            quick = {*range(8), *range(20, 28), *range(40, 48)}
            check_after(twenty, log, quick, 36)
        finally:
            twenty.closed.set()

    def work(number: int) -> None:
        if number == 0:
            close_once_all_run()
        elif number == 1:
            twenty.run_sync(0)
        else:
            run_on(loop, twenty.run(20 * (number - 1)))

    in_threads(4, work)
    assert settled(url) == []


@sample(
    "url, loop, sync",
    [("asyncpg", "asyncio", False), ("psycopg", "uvloop", True)],
    ["asyncpg", "psycopg"],
    LOOPS,
    [False, True],
)
def test_close_under_scopes_of_both_sides_in_many_threads_and_loops(
    url: str, loop: str, sync: bool
) -> None:
    run(both_sides, url, loop, sync)


# -- SQLite: one writer, and readers -----------------------------------------------------------


def sqlite_async(url: str, loop: str, slow: bool) -> None:
    log, manager = Log(), opened(url)

    async def writer(inside: asyncio.Event, closed: asyncio.Event) -> None:
        with pytest.raises((SessionClosed, DBAPIError)):
            async with manager.session() as db:
                await db.execute(insert(Item).values(id=1))
                inside.set()
                if slow:
                    await db.execute(slow_statement(url))
                else:
                    await closed.wait()

    async def reader(inside: asyncio.Event) -> None:
        async with manager.session(read_only=True) as db:
            assert (await db.scalars(select(Item.id))).all() == []
            inside.set()
            while manager.stats().state == "open":
                await asyncio.sleep(0.01)

    async def main() -> None:
        events = [asyncio.Event() for _ in range(6)]
        tasks = [asyncio.create_task(reader(event)) for event in events[2:]]
        tasks.append(asyncio.create_task(writer(events[0], events[1])))
        for event in (events[0], *events[2:]):
            await event.wait()
        await manager.close(timeout=GRACE)
        assert is_left(url)
        events[1].set()
        await asyncio.gather(*tasks)
        assert is_named(log, "writer") == len(log.messages) == 1, log.messages

    run_on(loop, main())
    assert settled(url) == []
    assert stored(url) == []


@sample("loop, slow", [("asyncio", False), ("uvloop", True)], LOOPS, [False, True])
def test_close_frees_the_lock_of_a_sqlite_file(sqlite_url: str, loop: str, slow: bool) -> None:
    run(sqlite_async, sqlite_url, loop, slow)


def sqlite_sync(url: str, how: str) -> None:
    log, manager = Log(), opened(url)
    inside, closed = threading.Event(), threading.Event()

    def writer() -> None:
        with pytest.raises((SessionClosed, DBAPIError)), manager.sync_session() as db:
            db.execute(insert(Item).values(id=1))
            inside.set()
            if how == "busy":
                db.execute(slow_statement(url))
            if how == "closed":  # as it is when its own thread was quicker than `close()`
                db.connection().connection.dbapi_connection.close()
            closed.wait()

    def work(number: int) -> None:
        if number:
            return writer()
        inside.wait()
        manager.sync.close(0.5)
        try:
            assert is_left(url)
        finally:
            closed.set()

    in_threads(2, work)
    assert is_named(log, "writer") == len(log.messages) == 1, log.messages
    assert settled(url) == []
    assert stored(url) == []


@pytest.mark.parametrize("how", ["idle", "busy", "closed"])
def test_synchronous_close_frees_the_lock_of_a_sqlite_file(sqlite_url: str, how: str) -> None:
    run(sqlite_sync, sqlite_url, how)


def locked_out(url: str, loop: str) -> None:
    """A stranger holds the lock all the time."""
    log, manager = Log(), opened(url)
    file = make_url(url).database
    assert file is not None
    stranger = sqlite3.connect(file, isolation_level=None)

    async def writer() -> None:
        with pytest.raises((SessionClosed, DBAPIError)):
            async with manager.session() as db:
                await db.execute(insert(Item).values(id=1))

    async def main() -> None:
        stranger.execute("BEGIN IMMEDIATE")
        task = asyncio.create_task(writer())
        while not any("BEGIN" in h.doing for pool in manager.stats().pools for h in pool.holders):
            await asyncio.sleep(0.01)
        started = time.monotonic()
        await manager.close(timeout=0.1)
        assert time.monotonic() - started < 3
        await task
        assert time.monotonic() - started < 4
        assert is_named(log, "writer") == len(log.messages) == 1, log.messages

    run_on(loop, main())
    stranger.close()
    assert settled(url) == []
    assert stored(url) == []


@every_loop
def test_close_does_not_wait_for_the_lock_of_a_sqlite_file(sqlite_url: str, loop: str) -> None:
    run(locked_out, sqlite_url, loop)


# -- the smaller promises ----------------------------------------------------------------------


def inside(url: str, loop: str) -> None:
    manager = opened(url)

    async def main() -> None:
        for verb in (manager.session, manager.reader, manager.connect):
            async with verb() as db:
                await db.execute(select(Item))
                with pytest.raises(CloseInsideScope, match="test_close.py"):
                    await manager.close()
                await db.execute(select(Item))  # nothing was changed
        async with manager.session() as db:
            db.add(Item(id=1))
            with pytest.raises(CloseInsideScope):
                await manager.close()
        await manager.close()

    run_on(loop, main())
    assert stored(url) == [1]


@every_driver_and_loop
def test_close_inside_a_scope_raises_at_once_and_changes_nothing(url: str, loop: str) -> None:
    run(inside, url, loop)


def sync_inside(url: str) -> None:
    manager = opened(url)
    for verb in (manager.sync.session, manager.sync.reader, manager.sync.connect):
        with verb() as db:
            db.execute(select(Item))
            with pytest.raises(CloseInsideScope, match="test_close.py"):
                manager.sync.close()
            db.execute(select(Item))
    with manager.sync_session() as db:
        db.add(Item(id=1))
        with pytest.raises(CloseInsideScope):
            manager.sync.close()
    manager.sync.close()
    assert stored(url) == [1]


@every_sync_driver
def test_synchronous_close_inside_a_scope_raises_at_once(url: str) -> None:
    run(sync_inside, url)


def under_a_connect(url: str, loop: str) -> None:
    """The driver has connected; what the application asks of each connection takes a while."""
    manager, sync = opened(url), loop == "none"
    Log()  # takes what is said of the scope that does not end in time
    manager.sync.engine.dispose()
    engine = manager.sync.engine if sync else manager.engine.sync_engine
    asks, over = threading.Event(), threading.Event()

    def ask(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        asks.set()
        cursor.execute("SELECT pg_sleep(0.3)")
        cursor.close()

    async def use() -> None:
        async with manager.session() as db:
            await db.execute(select(Item))

    async def main() -> None:
        using = asyncio.create_task(use())
        while not asks.is_set():
            await asyncio.sleep(0.001)
        await manager.close(timeout=0)
        assert held(url) == []
        await asyncio.gather(using, return_exceptions=True)

    def use_here() -> None:
        with suppress(UsageError, DBAPIError), manager.sync_session() as db:
            db.execute(select(Item))
        over.set()

    listen(engine, "connect", ask)
    if not sync:
        return run_on(loop, main())
    threading.Thread(target=use_here).start()
    asks.wait()
    manager.sync.close(timeout=0)
    assert held(url) == []
    over.wait()
    return None


@pytest.mark.parametrize(
    ("url", "loop"),
    [("asyncpg", "asyncio"), ("psycopg", "uvloop"), ("psycopg", "none"), ("psycopg2", "none")],
    indirect=["url"],
)
def test_close_waits_for_what_a_connect_listener_asks(url: str, loop: str) -> None:
    run(under_a_connect, url, loop)


def after_one_that_is_nobodys(url: str) -> None:
    """Ctrl-C came between the entering and the body: only the garbage collector knows."""
    manager = opened(url)

    def enter() -> None:
        session = manager.sync.session().__enter__()
        session.scalars(select(Item)).all()
        session.info["itself"] = session

    gc.disable()
    enter()
    assert len(manager.stats().scopes) == 1
    manager.sync.close()
    assert settled(url) == []


@every_sync_driver
def test_close_is_not_refused_for_a_session_that_is_nobodys(url: str) -> None:
    run(after_one_that_is_nobodys, url)


def without_waiting(url: str, loop: str) -> None:
    log, manager = Log(), opened(url)

    async def hold(entered: asyncio.Event, closed: asyncio.Event) -> None:
        with pytest.raises(SessionClosed):
            async with manager.session() as db:
                await db.execute(insert(Item).values(id=1))
                entered.set()
                await closed.wait()

    async def main() -> None:
        entered, closed = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(hold(entered, closed))
        await entered.wait()
        await manager.close(timeout=0)
        assert is_left(url)
        closed.set()
        await task
        assert settled(url) == []

    run_on(loop, main())
    assert is_named(log, "hold") == 1
    assert stored(url) == []


@every_driver_and_loop
def test_close_with_timeout_0_waits_for_nobody(url: str, loop: str) -> None:
    run(without_waiting, url, loop)


def cancelled(url: str, loop: str, times: int) -> None:
    log, manager = Log(), opened(url)

    async def hold(entered: asyncio.Event, closed: asyncio.Event) -> None:
        with pytest.raises(SessionClosed):
            async with manager.session() as db:
                await db.execute(insert(Item).values(id=1))
                entered.set()
                await closed.wait()

    async def main() -> None:
        entered, closed = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(hold(entered, closed))
        await entered.wait()
        closing = asyncio.create_task(manager.close(timeout=LONG))
        await asyncio.sleep(0.1)
        for _ in range(times):
            closing.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert manager.stats().state == "closed"
        assert is_left(url)
        closed.set()
        await task
        assert settled(url) == []
        manager.init(url)
        await manager.close()

    run_on(loop, main())
    assert is_named(log, "hold") == 1
    assert stored(url) == []


@pytest.mark.parametrize("times", [1, 5])
@every_driver_and_loop
def test_a_cancelled_close_still_closes(url: str, loop: str, times: int) -> None:
    run(cancelled, url, loop, times)


def busy_executor(url: str, loop: str) -> None:
    """Close while synchronous scopes fill the executor: it must not wait for a thread there."""
    log, manager = Log(), opened(url)
    threads = 3
    inside, closed = threading.Semaphore(0), threading.Event()

    def hold() -> None:
        with pytest.raises(SessionClosed), manager.sync_session(read_only=True) as db:
            db.execute(select(Item))
            inside.release()
            closed.wait()

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))
        holders = [asyncio.create_task(asyncio.to_thread(hold)) for _ in range(threads)]
        for _ in range(threads):
            while not inside.acquire(blocking=False):
                await asyncio.sleep(0.01)
        await manager.close(timeout=0.2)
        try:
            assert is_left(url)
        finally:
            closed.set()
        await asyncio.gather(*holders)

    run_on(loop, main())
    assert is_named(log, "hold") == len(log.messages) == threads, log.messages


@every_loop
@every_sync_driver
def test_close_needs_no_thread_of_a_busy_executor(url: str, loop: str) -> None:
    run(busy_executor, url, loop)


def abandoned_sync(url: str) -> None:
    manager = opened(url)
    scope = manager.sync_session()
    scope.__enter__().execute(insert(Item).values(id=1))
    manager.sync_session().__enter__()
    del scope
    gc.collect()
    manager.sync.connect().__enter__()
    gc.collect()
    manager.sync.close(timeout=LONG)
    assert settled(url) == []
    assert stored(url) == []


@every_sync_driver
def test_abandoned_synchronous_scopes_do_not_hold_close_up(url: str) -> None:
    run(abandoned_sync, url, deadline=LONG // 2)


def abandoned(url: str, loop: str) -> None:
    manager = opened(url)

    async def main() -> None:
        scope = manager.session()
        db = await scope.__aenter__()
        await db.execute(insert(Item).values(id=1))
        await manager.session().__aenter__()
        # SQLAlchemy's word about such a connection: a warning, and in the log
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            del scope, db
            gc.collect()
            await asyncio.sleep(0.05)
            gc.collect()
        await manager.close(timeout=LONG)
        assert settled(url) == []

    run_on(loop, main())
    assert stored(url) == []


@every_driver_and_loop
def test_abandoned_scopes_do_not_hold_close_up(url: str, loop: str) -> None:
    run(abandoned, url, loop, deadline=LONG // 2)


def never_opened(url: str) -> None:
    manager = DatabaseSessionManager()
    asyncio.run(manager.close())  # before init: nothing
    manager.init(url)
    asyncio.run(manager.close())  # nothing was used
    asyncio.run(manager.close())
    for _ in range(3):
        manager.init(url, metadata=Model.metadata)
        manager.sync.create_all()
        asyncio.run(manager.close())
        manager.sync.close()
    assert settled(url) == []


@every_sync_driver
def test_close_before_init_without_use_and_twice_does_nothing(url: str) -> None:
    run(never_opened, url)


def closed_again(url: str, way: str) -> None:
    """Who did not leave in time is waited for once, and stands in no report after that."""
    manager, log = opened(url), Log()
    inside, may_leave = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def hold() -> None:
        try:
            with manager.sync_session() as db:
                db.execute(insert(Item).values(id=1))
                inside.set()
                may_leave.wait()
        except BaseException as error:  # it is looked at below
            errors.append(error)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    for timeout in (0.1, LONG, LONG):
        if way == "close":
            asyncio.run(manager.close(timeout=timeout))
        else:
            manager.sync.close(timeout=timeout)
        manager.init(url)
        assert manager.stats().scopes == ()
        with manager.sync_session() as db:
            db.execute(text("SELECT 1"))
    may_leave.set()
    thread.join()
    assert [type(error) for error in errors] == [SessionClosed]
    manager.sync.close(timeout=LONG)
    assert is_left(url)
    assert stored(url) == []
    assert len(log.messages) == is_named(log, "hold") == 1


@pytest.mark.parametrize("way", ["close", "sync.close"])
@pytest.mark.parametrize("url", ["psycopg", "sqlite"], indirect=True)
def test_a_scope_that_does_not_end_is_waited_for_once(url: str, way: str) -> None:
    run(closed_again, url, way, deadline=LONG // 2)


def entered_again(url: str) -> None:
    """A scope that was ended begins afresh where it is entered again, and is waited for."""
    manager, log = opened(url), Log()
    scope = manager.session()

    async def work(number: int, inside: asyncio.Event) -> None:
        async with scope as db:
            await db.execute(insert(Item).values(id=number))
            inside.set()
            await asyncio.sleep(0.3)

    async def main() -> None:
        for number, timeout in ((1, 0), (2, LONG)):
            inside = asyncio.Event()
            task = asyncio.create_task(work(number, inside))
            await inside.wait()
            assert [info.kind for info in manager.stats().scopes] == ["session"]
            await manager.close(timeout=timeout)
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            assert (outcome is None) is (timeout == LONG)
            manager.init(url)
        await manager.close()

    asyncio.run(main())
    assert stored(url) == [2]
    assert len(log.messages) == is_named(log, "entered_again") == 1


@pytest.mark.parametrize("url", ["asyncpg", "aiosqlite"], indirect=True)
def test_a_scope_that_close_has_ended_may_be_entered_again(url: str) -> None:
    run(entered_again, url)


def entered_again_by_its_hook(url: str) -> None:
    """What was lost does not pass for a success because the scope has begun afresh."""
    manager, log = opened(url), Log()
    scope, sync_scope = manager.session(), manager.sync.session()

    async def again() -> None:
        manager.init(url)
        async with scope as db:
            await db.execute(insert(Item).values(id=1))

    def sync_again() -> None:
        manager.init(url)
        with sync_scope as db:
            db.execute(insert(Item).values(id=2))

    async def main() -> None:
        async with scope as db:
            on_rollback(db, again)
            await db.execute(insert(Item).values(id=3))
            await asyncio.create_task(manager.close(timeout=0))

    def sync_main() -> None:
        with sync_scope as db:
            on_rollback(db, sync_again)
            db.execute(insert(Item).values(id=4))
            closing = threading.Thread(target=manager.sync.close, args=[0])
            closing.start()
            closing.join()

    with pytest.raises(SessionClosed):
        asyncio.run(main())
    with pytest.raises(SessionClosed):
        sync_main()
    manager.sync.close()
    assert stored(url) == [1, 2]
    assert len(log.messages) == 2, log.messages


@pytest.mark.parametrize("url", ["asyncpg", "psycopg"], indirect=True)
def test_what_close_has_ended_fails_though_its_hook_enters_it_again(url: str) -> None:
    run(entered_again_by_its_hook, url)


def loose(url: str) -> None:
    """A session of `get_session()` is its caller's: close() only takes its connection."""
    log, database = Log(), Database(url, metadata=Model.metadata)
    database.create_all()
    session = database.get_session()
    session.execute(insert(Item).values(id=1))
    database.close(timeout=LONG)
    assert is_left(url)
    with suppress(DBAPIError, UsageError):
        session.commit()
    with suppress(DBAPIError):  # SQLAlchemy's rollback, on a connection that was ended
        session.close()
    assert settled(url) == []
    assert stored(url) == []
    assert log.messages == []


@every_sync_driver
def test_close_ends_the_sessions_of_get_session_too(url: str) -> None:
    run(loose, url, deadline=LONG // 2)


def disposed_of(url: str, loop: str, sync: bool) -> None:
    """What is lent while its engine is disposed of comes back, before `close()` or after it."""
    gc.disable()
    manager = opened(url)

    async def main() -> None:
        lent = [await manager.engine.connect() for _ in range(3)]
        for connection in lent:
            await connection.execute(text("SELECT 1"))
        await manager.engine.dispose()
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
        await lent[0].close()
        assert len(settled(url, 4)) == 4  # two that are lent, and one in each side's pool
        assert sum(pool.lent for pool in manager.stats().pools) == 2
        await asyncio.to_thread(manager.sync.close) if sync else await manager.close()
        assert is_left(url)
        for connection in lent[1:]:
            with suppress(DBAPIError):
                await connection.close()

    run_on(loop, main())
    assert is_left(url)


@pytest.mark.parametrize("sync", [False, True], ids=["close", "sync.close"])
@server_driver_and_loop
def test_close_ends_what_was_lent_before_a_dispose(url: str, loop: str, sync: bool) -> None:
    run(disposed_of, url, loop, sync)


def disposed_of_under_load(url: str, loop: str) -> None:
    """Who connects while a loop disposes of its engine has a connection that is known as well."""
    gc.disable()
    manager, log = opened(url, pool_size=5), Log()
    over = asyncio.Event()

    async def work() -> None:
        while not over.is_set():
            async with manager.session() as db:
                await db.execute(text("SELECT 1"))

    def slowly(*_: object) -> None:
        await_only(asyncio.sleep(0.2))

    async def hold(leave: asyncio.Event) -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
            await leave.wait()

    async def dispose(leave: asyncio.Event) -> list[asyncio.Task[None]]:
        """Dispose of a warm engine; return those who have connected meanwhile, and stay."""
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
        disposing = asyncio.create_task(manager.engine.dispose())
        await asyncio.sleep(0.02)  # it takes ten times that to close one
        holding = [asyncio.create_task(hold(leave)) for _ in range(3)]
        while not disposing.done():
            pools = [pool for *_, pool in manager._room.lenders()]
            assert len(pools) == len({*pools})
            await asyncio.sleep(0)
        await disposing
        return holding

    async def main() -> None:
        working = [asyncio.create_task(work()) for _ in range(5)]
        for _ in range(10):
            await asyncio.sleep(0.02)
            await manager.engine.dispose()
        over.set()
        await asyncio.gather(*working)
        listen(manager.engine.sync_engine, "close", slowly)
        assert len(held(url)) == sum(pool.idle for pool in manager.stats().pools) <= 6
        for _ in range(3):
            leave = asyncio.Event()
            holding = await dispose(leave)
            leave.set()
            await asyncio.gather(*holding)
        assert len(settled(url, 1)) == 1  # the synchronous side's
        holding = await dispose(asyncio.Event())
        await manager.close(timeout=0)
        assert settled(url) == []
        for task in holding:
            task.cancel()
        await asyncio.gather(*holding, return_exceptions=True)
        assert is_named(log, "hold") == len(log.messages) == len(holding)

    run_on(loop, main())


@server_driver_and_loop
def test_close_ends_what_was_opened_in_the_middle_of_a_dispose(url: str, loop: str) -> None:
    run(disposed_of_under_load, url, loop, deadline=LONG // 2)


@pytest.mark.parametrize("url", ["psycopg"], indirect=True)
def test_a_connection_that_is_kept_keeps_few_of_the_pools_that_came_after(url: str) -> None:
    with Database(url) as database, database.session() as db:
        db.execute(text("SELECT 1"))
        made = [weakref.ref(database.engine.pool)]
        for _ in range(20):
            database.engine.dispose()
            made.append(weakref.ref(database.engine.pool))
        gc.collect()
        alive = [number for number, pool in enumerate(made) if pool() is not None]
    assert alive == [0, 20]


def disposed_of_twice(url: str, loop: str) -> None:
    """Who connects while two tasks dispose of an engine has a connection that is known."""
    gc.disable()
    manager, log = opened(url), Log()
    manager.sync.close()
    manager.init()

    async def hold(seconds: float = LONG) -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
            await asyncio.sleep(seconds)

    async def main() -> None:
        await asyncio.gather(*(hold(0) for _ in range(3)))
        disposing = asyncio.gather(manager.engine.dispose(), manager.engine.dispose())
        holding: list[asyncio.Task[None]] = []
        while not disposing.done() or not holding:
            if len(holding) < 15:
                holding.append(asyncio.create_task(hold()))
            await asyncio.sleep(0)
        await disposing
        await asyncio.sleep(0.5)  # all have connected by then, or there are more than are told of
        assert len(held(url)) >= len(holding)
        assert sum(pool.lent for pool in manager.stats().pools) == len(holding)
        await manager.close(timeout=0)
        assert settled(url) == []
        for task in holding:
            task.cancel()
        await asyncio.gather(*holding, return_exceptions=True)
        assert is_named(log, "hold") == len(holding)

    run_on(loop, main())


@server_driver_and_loop
def test_two_tasks_may_dispose_of_an_engine_at_once(url: str, loop: str) -> None:
    run(disposed_of_twice, url, loop, deadline=LONG // 2)


def sync_disposed_of(url: str) -> None:
    gc.disable()
    database = Database(url, metadata=Model.metadata)
    lent = [database.engine.connect() for _ in range(3)]
    for connection in lent:
        connection.execute(text("SELECT 1"))
    database.engine.dispose()
    with database.session() as db:
        db.execute(text("SELECT 1"))
    lent[0].close()
    assert len(settled(url, 3)) == 3
    assert sum(pool.lent for pool in database.stats().pools) == 2
    database.close()
    assert is_left(url)
    for connection in lent[1:]:
        with suppress(DBAPIError):
            connection.close()


def sync_disposed_of_twice(url: str) -> None:
    """Who connects while two threads dispose of an engine has a connection that is known."""
    gc.disable()
    database = Database(url, metadata=Model.metadata)
    first = database.engine.pool
    database.engine.dispose()
    database.engine.dispose()
    assert first.recreate() is database.engine.pool  # as one does who has waited since then
    with database.session() as db:
        db.execute(text("SELECT 1"))
    listen(database.engine, "close", lambda *_: time.sleep(0.3))
    slower = threading.Thread(target=database.engine.dispose)
    slower.start()
    time.sleep(0.1)
    database.engine.dispose()
    lent = database.engine.connect()
    lent.execute(text("SELECT 1"))
    slower.join()
    assert [pool.lent for pool in database.stats().pools] == [1]
    database.close()
    assert is_left(url)
    with suppress(DBAPIError):
        lent.close()


@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_two_threads_may_dispose_of_an_engine_at_once(url: str) -> None:
    run(sync_disposed_of_twice, url)


@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_synchronous_close_ends_what_was_lent_before_a_dispose(url: str) -> None:
    run(sync_disposed_of, url)


def sync_given_back(url: str) -> None:
    """A pool that `dispose()` has parted with is told of for as long as it has a connection."""
    with Database(url, metadata=Model.metadata) as database:
        lent = database.engine.connect()
        database.engine.dispose()
        with database.session() as db:
            db.execute(text("SELECT 1"))
        assert sorted((pool.lent, pool.idle) for pool in database.stats().pools) == [(0, 1), (1, 0)]
        lent.close()
        assert [(pool.lent, pool.idle) for pool in database.stats().pools] == [(0, 1)]


@every_sync_driver
def test_a_pool_that_was_disposed_of_is_told_of_while_it_lends(url: str) -> None:
    run(sync_given_back, url)


# -- who waits for a connection, or for one to be opened ---------------------------------------


def refused(results: list[Any]) -> bool:
    return all(isinstance(result, (ManagerClosed, SessionClosed)) for result in results)


def waiting(url: str, loop: str) -> None:
    """Close under one scope that holds the only connection, and six that wait for it."""
    log = Log()
    manager = opened(url, pool_size=1, max_overflow=0, pool_timeout=LONG)

    async def write(verb: str, number: int, wait: asyncio.Event | None = None) -> None:
        async with getattr(manager, verb)() as db:
            await db.execute(insert(Item).values(id=number))
            if wait is not None:
                await wait.wait()

    async def main() -> None:
        for verb in ("session", "connect"):
            closed = asyncio.Event()
            tasks = [asyncio.create_task(write(verb, 0, closed))]
            while not await asyncio.to_thread(is_written, url):
                await asyncio.sleep(0.01)
            kinds = ("session", "connect") * 3
            tasks += [asyncio.create_task(write(kind, i)) for i, kind in enumerate(kinds, 1)]
            while sum(pool.waiting for pool in manager.stats().pools) < 6:
                await asyncio.sleep(0.01)
            await manager.close(timeout=0.1)
            assert await asyncio.to_thread(settled, url) == []
            async with asyncio.timeout(20):  # the holder still stands in its body
                assert refused(await asyncio.gather(*tasks[1:], return_exceptions=True))
            closed.set()
            assert refused(await asyncio.gather(*tasks, return_exceptions=True))
            assert await asyncio.to_thread(settled, url) == []
            manager.init()
        await manager.close()

    run_on(loop, main())
    assert len(log.messages) == 14, log.messages
    assert manager.stats().scopes == ()
    assert stored(url) == []


def is_written(url: str) -> bool:
    """Whether a backend is idle in a transaction: the holder has inserted its row."""
    with server(url) as raw:
        row = raw.execute(
            "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND state = 'idle in transaction'",
            [make_url(url).database],
        ).fetchone()
    return row is not None


@server_driver_and_loop
def test_close_sends_away_who_waits_for_a_connection(url: str, loop: str) -> None:
    run(waiting, url, loop)


def sync_waiting(url: str) -> None:
    log = Log()
    manager = opened(url, pool_size=1, max_overflow=0, pool_timeout=LONG)
    closed, results = threading.Event(), [[], []]  # type: list[list[BaseException | None]]

    def write(verb: str, number: int, kept: list[BaseException | None]) -> None:
        try:
            with getattr(manager.sync, verb)() as db:
                db.execute(insert(Item).values(id=number))
                if number == 0:
                    closed.wait()
        except BaseException as error:
            kept.append(error)
        else:
            kept.append(None)

    def start(verb: str, number: int, kept: list[BaseException | None]) -> threading.Thread:
        thread = threading.Thread(target=write, args=(verb, number, kept))
        thread.start()
        return thread

    for verb, kept in zip(("session", "connect"), results, strict=True):
        closed.clear()
        holder = start(verb, 0, kept)
        until(lambda: is_written(url), bool)
        threads = [start(("session", "connect")[i % 2], i, kept) for i in range(1, 7)]
        until(lambda: manager.stats().pools[0].waiting, lambda count: count == 6)
        manager.sync.close(timeout=0.1)
        assert settled(url) == []
        for thread in threads:
            thread.join(20)  # the holder still stands in its body
        assert len(kept) == 6
        closed.set()
        holder.join()
        assert len(kept) == 7
        assert refused(kept), kept
        assert settled(url) == []
        manager.sync.init()
    manager.sync.close()
    assert len(log.messages) == 14, log.messages
    assert stored(url) == []


@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_synchronous_close_sends_away_who_waits_for_a_connection(url: str) -> None:
    run(sync_waiting, url)


def striking(url: str, loop: str) -> None:
    """Close at one moment after another of what a first use does: connecting above all."""
    log = Log()
    manager = opened(url, pool_size=1, max_overflow=0, pool_timeout=LONG)
    manager.sync.close()

    async def use(verb: str, number: int, closed: asyncio.Event, entered: set[int]) -> None:
        async with getattr(manager, verb)() as db:
            entered.add(number)
            await db.execute(insert(Item).values(id=number))
            await closed.wait()

    async def main() -> None:
        for milliseconds in range(0, 30, 6):
            for verb in ("session", "connect"):
                manager.init()
                closed, entered = asyncio.Event(), set[int]()
                tasks = [asyncio.create_task(use(verb, n, closed, entered)) for n in range(3)]
                await asyncio.sleep(milliseconds / 1000)
                await manager.close(timeout=0)
                assert manager.stats().pools == ()
                closed.set()
                async with asyncio.timeout(20):
                    results = await asyncio.gather(*tasks, return_exceptions=True)
                for number, result in enumerate(results):
                    allowed: Any = (ManagerClosed, SessionClosed)
                    if number in entered:  # it may have been in the middle of its statement
                        allowed = (*allowed, DBAPIError)
                    assert isinstance(result, allowed), repr(result)
                assert await asyncio.to_thread(settled, url) == []
                assert manager.stats().scopes == ()

    run_on(loop, main())
    assert stored(url) == []
    assert not [line for line in log.messages if "part of close() failed" in line], log.messages


@server_driver_and_loop
def test_close_at_any_moment_of_a_first_use(url: str, loop: str) -> None:
    run(striking, url, loop)


def sync_striking(url: str) -> None:
    log = Log()
    manager = opened(url, pool_size=1, max_overflow=0, pool_timeout=LONG)
    manager.sync.close()
    for milliseconds in range(0, 30, 6):
        for verb in ("session", "connect"):
            manager.sync.init()
            closed = threading.Event()
            results: dict[int, tuple[bool, BaseException | None]] = {}

            def use(
                number: int, verb: str = verb, closed: Any = closed, results: Any = results
            ) -> None:
                entered = False
                try:
                    with getattr(manager.sync, verb)() as db:
                        entered = True
                        db.execute(insert(Item).values(id=number))
                        closed.wait()
                except BaseException as error:
                    results[number] = entered, error
                else:
                    results[number] = entered, None

            threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(milliseconds / 1000)
            manager.sync.close(timeout=0)
            assert manager.stats().pools == ()
            closed.set()
            for thread in threads:
                thread.join(20)
            assert len(results) == 3
            for inside, raised in results.values():
                allowed: Any = (ManagerClosed, SessionClosed)
                assert isinstance(raised, (*allowed, DBAPIError) if inside else allowed), raised
            assert settled(url) == []
            assert manager.stats().scopes == ()
    assert stored(url) == []
    assert not [line for line in log.messages if "part of close() failed" in line], log.messages


@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_synchronous_close_at_any_moment_of_a_first_use(url: str) -> None:
    run(sync_striking, url)


def slowly_connecting(url: str, slow: str, loop: str) -> None:
    """Close before a connection is opened that takes longer than close() waits for it."""
    log = Log()
    manager = DatabaseSessionManager().init(slow, metadata=Model.metadata, sync_in_async="allow")

    async def use(verb: str) -> None:
        async with getattr(manager, verb)() as db:
            await db.execute(insert(Item).values(id=1))

    def sync_use(verb: str) -> None:
        with getattr(manager.sync, verb)() as db:
            db.execute(insert(Item).values(id=1))

    async def main() -> None:
        verbs = ("session", "connect")
        tasks = [asyncio.create_task(use(verb)) for verb in verbs]
        tasks += [asyncio.create_task(asyncio.to_thread(sync_use, verb)) for verb in verbs]
        while sum(pool.lent for pool in manager.stats().pools) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await manager.close(timeout=0)
        async with asyncio.timeout(20):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert refused(results), results
        assert await asyncio.to_thread(settled, url) == []

    run_on(loop, main())
    assert len(log.messages) == 4, log.messages


@server_driver_and_loop
def test_close_before_a_slow_connection_is_opened(
    pg18: PostgresServer, url: str, loop: str
) -> None:
    with WireProxy(pg18.host, pg18.port, delay=0.4) as wire:
        opened(url).sync.close()
        run(slowly_connecting, url, wire.url(url), loop)
    assert stored(url) == []


# -- what comes out of a scope that close() has ended ------------------------------------------

RAISED = [None, ValueError("mine"), asyncio.CancelledError("mine"), KeyError("mine")]


def raising(url: str, loop: str) -> None:
    log, manager = Log(), opened(url)

    async def body(verb: str, number: int, mine: BaseException | None, at: Any) -> None:
        async with getattr(manager, verb)() as db:
            await db.execute(insert(Item).values(id=number))
            await at.wait()  # inside
            await at.wait()  # closed
            if mine is not None:
                raise mine

    async def main() -> None:
        cases = [(verb, mine) for verb in ("session", "connect") for mine in RAISED]
        at = asyncio.Barrier(len(cases) + 2)
        tasks = [
            asyncio.create_task(body(verb, number, mine, at))
            for number, (verb, mine) in enumerate(cases)
        ]
        cancelled = asyncio.create_task(body("session", 100, None, at))
        await at.wait()
        await manager.close(timeout=0)
        cancelled.cancel("from outside")
        with pytest.raises(asyncio.CancelledError, match="from outside"):
            await cancelled
        await asyncio.wait_for(asyncio.gather(at.wait(), at.wait()), 20)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for (_, mine), result in zip(cases, results, strict=True):
            if mine is None:
                assert isinstance(result, SessionClosed)
            elif isinstance(mine, asyncio.CancelledError):  # (its task makes another one of it)
                assert isinstance(result, asyncio.CancelledError)
                assert result.__context__ is None or not isinstance(
                    result.__context__, SessionClosed
                )
            else:
                assert result is mine, repr(result)

    run_on(loop, main())
    assert len(log.messages) == 9, log.messages
    assert settled(url) == []
    assert stored(url) == []


@server_driver_and_loop
def test_the_bodys_exception_comes_out_of_a_scope_that_close_ended(url: str, loop: str) -> None:
    run(raising, url, loop)


def sync_raising(url: str) -> None:
    log, manager = Log(), opened(url)
    cases = [(verb, mine) for verb in ("session", "connect") for mine in RAISED]
    at = threading.Barrier(len(cases) + 1)
    results: dict[int, BaseException | None] = {}

    def work(number: int) -> None:
        if number == len(cases):
            at.wait(20)
            manager.sync.close(timeout=0)
            at.wait(20)
            return
        verb, mine = cases[number]
        try:
            with getattr(manager.sync, verb)() as db:
                db.execute(insert(Item).values(id=number))
                at.wait(20)
                at.wait(20)
                if mine is not None:
                    raise mine
        except BaseException as error:
            results[number] = error

    in_threads(len(cases) + 1, work)
    for number, (_, mine) in enumerate(cases):
        if mine is None:
            assert isinstance(results[number], SessionClosed)
        else:
            assert results[number] is mine, repr(results[number])
    assert len(log.messages) == 8, log.messages
    assert settled(url) == []
    assert stored(url) == []


@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_the_bodys_exception_comes_out_of_a_synchronous_scope_that_close_ended(url: str) -> None:
    run(sync_raising, url)


# -- a server that takes no more connections ---------------------------------------------------


@pytest.fixture
def role(pg18: PostgresServer, database: str) -> Iterator[str]:
    """A role that may have two connections, and is no superuser."""
    name = f"limited_{database}"
    login = f"LOGIN PASSWORD '{pg18.password}' CONNECTION LIMIT 2"
    pg18.execute(f'CREATE ROLE "{name}" {login}')
    yield name
    pg18.execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"', database)


def at_its_limit(url: str, limited: str, loop: str) -> None:
    log = Log()
    manager = DatabaseSessionManager().init(limited, pool_size=2, max_overflow=0)

    async def idle(inside: asyncio.Event, closed: asyncio.Event) -> None:
        with pytest.raises(SessionClosed):
            async with manager.session() as db:
                await db.execute(insert(Item).values(id=1))
                inside.set()
                await closed.wait()

    async def busy(inside: asyncio.Event) -> None:
        with pytest.raises((DBAPIError, SessionClosed)):
            async with manager.connect() as db:
                await db.execute(insert(Item).values(id=2))
                inside.set()
                await db.execute(slow_statement(url))

    async def main() -> None:
        one, two, closed = (asyncio.Event() for _ in range(3))
        tasks = [asyncio.create_task(idle(one, closed)), asyncio.create_task(busy(two))]
        await asyncio.gather(one.wait(), two.wait())
        assert len(await asyncio.to_thread(backends, url)) == 2
        await manager.close(timeout=0.1)
        assert await asyncio.to_thread(settled, url) == []
        closed.set()
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks)

    run_on(loop, main())
    assert len(log.messages) == 2, log.messages
    assert settled(url) == []
    assert stored(url) == []


def sync_at_its_limit(url: str, limited: str) -> None:
    log, database = Log(), Database(limited, pool_size=2, max_overflow=0)
    closed, at = threading.Event(), threading.Barrier(3)

    def work(number: int) -> None:
        if number == 0:
            at.wait(20)
            assert len(backends(url)) == 2
            database.close(timeout=0.1)
            try:
                assert settled(url) == []
            finally:
                closed.set()
        elif number == 1:
            with pytest.raises(SessionClosed), database.session() as db:
                db.execute(insert(Item).values(id=1))
                at.wait(20)
                closed.wait(20)
        else:
            with pytest.raises((DBAPIError, SessionClosed)), database.connect() as connection:
                connection.execute(insert(Item).values(id=2))
                at.wait(20)
                connection.execute(slow_statement(url))

    in_threads(3, work)
    assert len(log.messages) == 2, log.messages
    assert settled(url) == []
    assert stored(url) == []


def limit(url: str, role: str) -> str:
    """Let the role in, and return its URL."""
    opened(url).sync.close()
    with Database(url) as door, door.connect() as connection:
        connection.execute(text(f'GRANT ALL ON ALL TABLES IN SCHEMA public TO "{role}"'))
    return make_url(url).set(username=role).render_as_string(hide_password=False)


@server_driver_and_loop
def test_close_of_a_server_at_its_limit_ends_every_backend(url: str, role: str, loop: str) -> None:
    run(at_its_limit, url, limit(url, role), loop, deadline=LONG - 10)


@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_synchronous_close_of_a_server_at_its_limit(url: str, role: str) -> None:
    run(sync_at_its_limit, url, limit(url, role), deadline=LONG - 10)


# -- a COMMIT that is under way --------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_what_was_committed_as_close_came_is_no_failure(
    driver: str, pg18: PostgresServer, database: str
) -> None:
    """Nor does the scope say that it was rolled back."""
    called: list[str] = []
    insert_one = text("INSERT INTO kept VALUES (1)")
    pg18.execute("CREATE TABLE kept (id int)", database=database)

    async def main(manager: DatabaseSessionManager) -> None:
        async def one() -> None:
            async with manager.session() as db:
                await db.execute(insert_one)
                on_commit(db, lambda: called.append("async"))

        under_way = asyncio.create_task(one())
        while "COMMIT" not in manager._room.report():
            await asyncio.sleep(0.001)
        await manager.close(0)
        await under_way

    def one() -> None:
        with manager.sync_session() as db:
            db.execute(insert_one)
            on_commit(db, lambda: called.append("sync"))

    with WireProxy(pg18.host, pg18.port, delay=0.03) as proxy:
        url = proxy.url(pg18.url(database, driver))
        asyncio.run(main(DatabaseSessionManager().init(url)))
        manager = DatabaseSessionManager().init(url)
        with ThreadPoolExecutor() as apart:
            under_way = apart.submit(one)
            until(manager._room.report, lambda report: "COMMIT" in report)
            manager.sync.close(0)
            under_way.result()
    assert called == ["async", "sync"]
    assert pg18.execute("SELECT id FROM kept", database=database) == [["1"], ["1"]]


# -- the server's side ---------------------------------------------------------------------------


def closed_at_once(url: str, loop: str) -> None:
    """Look at once: a driver's `close()` may return before its server has ended the backend."""

    async def use() -> None:
        manager = DatabaseSessionManager().init(url)
        async with manager.session() as db, manager.reader() as other:
            await db.execute(text("SELECT 1"))
            await other.execute(text("SELECT 1"))
        await manager.close()

    with server(url) as raw:
        for _ in range(20):
            run_on(loop, use())
            assert (left := others_of(raw, url)) == [], left


def others_of(raw: Any, url: str) -> list[Any]:
    """Look by a connection that is there already: to open one would take too long."""
    look = (
        "SELECT pid, state, query FROM pg_stat_activity"
        " WHERE datname = %s AND backend_type = 'client backend'"
    )
    return list(raw.execute(look, [make_url(url).database]))


@server_driver_and_loop
def test_no_backend_is_left_when_close_returns(url: str, loop: str) -> None:
    run(closed_at_once, url, loop)


@pytest.mark.parametrize("url", ["psycopg", "psycopg2"], indirect=True)
def test_no_backend_is_left_when_synchronous_close_returns(url: str) -> None:
    with server(url) as raw:
        for _ in range(20):
            with Database(url) as door, door.session() as db:
                db.execute(text("SELECT 1"))
            assert (left := others_of(raw, url)) == [], left


def test_pools_of_a_silent_server_end_side_by_side(pg16: PostgresServer) -> None:
    """asyncpg would wait for the answer to its farewell."""

    async def main() -> float:
        manager = DatabaseSessionManager().init(pg16.url(driver="asyncpg"))
        async with manager.session() as db, manager.reader() as other:
            await db.execute(text("SELECT 1"))
            await other.execute(text("SELECT 1"))
        pg16.freeze()
        began = time.monotonic()
        try:
            await manager.close()
        finally:
            pg16.thaw()
        return time.monotonic() - began

    assert asyncio.run(main()) < GONE_LIMIT + 1


# -- several servers -------------------------------------------------------------------------------


@pytest.fixture
def mover(pg18: PostgresServer, pg16: PostgresServer) -> Iterator[str]:
    """A role of the same name and password on two servers."""
    for each in (pg18, pg16):
        each.execute("CREATE ROLE mover LOGIN PASSWORD 'known-here'")
    yield "mover:known-here"
    for each in (pg18, pg16):
        each.execute("DROP ROLE mover")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_statement_is_ended_though_new_connections_lead_elsewhere(
    driver: str,
    mover: str,
    pg18: PostgresServer,
    pg16: PostgresServer,
    eventually: Callable[[Callable[[], object]], None],
) -> None:
    """After a failover, or where hosts are taken in turn: its number means nothing there."""
    asked = text("SELECT pg_sleep(60)")
    of_ours = "FROM pg_stat_activity WHERE usename = 'mover'"

    def runs() -> bool:
        """Whether it has come so far: what sets a connection up is active before."""
        sleeping = "AND state = 'active' AND query LIKE 'SELECT pg_sleep%'"
        return pg18.execute(f"SELECT count(*) {of_ours} {sleeping}") == [["1"]]

    with Doorman(pg16, b"", 1000) as door:
        url = f"postgresql+{driver}://{mover}@127.0.0.1:{door.port},127.0.0.1:{pg18.port}/postgres"

        def move() -> None:
            eventually(runs)
            door.left = 0  # the first host is there from now on

        async def main() -> None:
            manager = DatabaseSessionManager().init(url)

            async def work() -> None:
                with pytest.raises((DBAPIError, SessionClosed)):
                    async with manager.session() as db:
                        await db.execute(asked)

            task = asyncio.create_task(work())
            await asyncio.to_thread(move)
            await manager.close(timeout=0.1)
            await task

        def work_here(database: Database) -> None:
            with pytest.raises((DBAPIError, SessionClosed)), database.session() as db:
                db.execute(asked)

        if driver == "asyncpg":
            asyncio.run(main())
        else:
            database = Database(url)
            with ThreadPoolExecutor(1) as threads:
                working = threads.submit(work_here, database)
                move()
                database.close(timeout=0.1)
                working.result()
        eventually(lambda: pg18.execute(f"SELECT count(*) {of_ours}") == [["0"]], 3.0)
        assert door.let_in > 0
    log = (pg16._keeper.folder / "log").read_text(errors="replace")
    assert "is not a PostgreSQL" not in log, "its number was used where it means nothing"
