"""Guarantee 14: `close()` drains, names whom it did not wait for, and leaves no backend behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import sqlite3
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from scenario import (
    LOOPS,
    Item,
    Log,
    Model,
    every_driver_and_loop,
    every_sync_driver,
    in_threads,
    is_postgres,
    run,
    run_on,
    server_driver_and_loop,
    settled,
    until,
)
from sqlalchemy import insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from engineroom import Database, DatabaseSessionManager, SessionClosed, UsageError
from engineroom.errors import CloseInsideScope, ManagerClosed
from engineroom.testing import PostgresServer

every_loop = pytest.mark.parametrize("loop", LOOPS)

LONG = 50  # seconds: longer than any scenario may take


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
        url, metadata=Model.metadata, sync_in_async="allow", pool_size=25, **options
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

    async def quick(self, number: int) -> None:
        async with self.manager.session() as db:
            await db.execute(insert(Item).values(id=number))
            self.started.release()
            await asyncio.sleep(0.3)

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
            time.sleep(0.3)

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
        closing = asyncio.create_task(manager.close(timeout=1))
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
    closing = threading.Thread(target=manager.sync.close, args=(1,))
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
                manager.sync.close(1)
            else:
                run_on(loop, manager.close(timeout=1))
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


@pytest.mark.parametrize("sync", [False, True], ids=["close", "sync.close"])
@server_driver_and_loop
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
            await asyncio.sleep(0.2)

    async def main() -> None:
        events = [asyncio.Event() for _ in range(6)]
        tasks = [asyncio.create_task(reader(event)) for event in events[2:]]
        tasks.append(asyncio.create_task(writer(events[0], events[1])))
        for event in (events[0], *events[2:]):
            await event.wait()
        await manager.close(timeout=1)
        assert is_left(url)
        events[1].set()
        await asyncio.gather(*tasks)
        assert is_named(log, "writer") == len(log.messages) == 1, log.messages

    run_on(loop, main())
    assert settled(url) == []
    assert stored(url) == []


@pytest.mark.parametrize("slow", [False, True], ids=["idle", "busy"])
@every_loop
def test_close_frees_the_lock_of_a_sqlite_file(sqlite_url: str, loop: str, slow: bool) -> None:
    run(sqlite_async, sqlite_url, loop, slow)


def sqlite_sync(url: str, slow: bool) -> None:
    log, manager = Log(), opened(url)
    inside, closed = threading.Event(), threading.Event()

    def writer() -> None:
        with pytest.raises((SessionClosed, DBAPIError)), manager.sync_session() as db:
            db.execute(insert(Item).values(id=1))
            inside.set()
            if slow:
                db.execute(slow_statement(url))
            else:
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


@pytest.mark.parametrize("slow", [False, True], ids=["idle", "busy"])
def test_synchronous_close_frees_the_lock_of_a_sqlite_file(sqlite_url: str, slow: bool) -> None:
    run(sqlite_sync, sqlite_url, slow)


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
