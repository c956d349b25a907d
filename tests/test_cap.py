"""Guarantee 19: never more connections than `DB_MAX_CONNECTIONS`, over all pools of a process."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import os
import random
import re
import signal
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import pytest
import sqlalchemy.pool
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scenario import (
    backends,
    fork,
    in_threads,
    is_struck,
    loop_factory,
    run,
    server_driver_and_loop,
    settled,
    until,
)
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

import engineroom
from engineroom import Database, DatabaseSessionManager, departures
from engineroom.cap import CAPS, Cap, is_blocked, process_cap, stay_of
from engineroom.engines import EngineRoom
from engineroom.errors import InvalidOption, PoolDeadlock, PoolExhausted
from engineroom.forks import make_immortal
from engineroom.testing import PostgresServer

pytestmark = pytest.mark.filterwarnings("ignore::engineroom.SyncInAsyncWarning")

Managers = list[DatabaseSessionManager]


class Watch:
    """Counts the backends of a database from outside, again and again."""

    def __init__(self, server: PostgresServer, database: str) -> None:
        self.counts: list[int] = []
        self._server, self._database = server, database
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @property
    def most(self) -> int:
        return max(self.counts)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        import psycopg

        url = self._server.url("postgres")
        with psycopg.connect(url, autocommit=True) as outside:
            while not self._over.is_set():
                row = outside.execute(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = %s AND backend_type = 'client backend'",
                    [self._database],
                ).fetchone()
                self.counts += row or ()


@pytest.fixture
def watch(pg18: PostgresServer, database: str) -> Iterator[Watch]:
    with Watch(pg18, database) as one:
        yield one


@pytest.fixture
def url(request: pytest.FixtureRequest, pg18: PostgresServer, database: str) -> str:
    """The URL of a fresh database for a driver."""
    return pg18.url(database, request.param)


def cap_of_process() -> Cap:
    cap = process_cap()
    assert cap is not None
    return cap


async def one(manager: DatabaseSessionManager) -> Any:
    async with manager.session() as db:
        return await db.scalar(text("SELECT 1"))


def one_sync(manager: DatabaseSessionManager | Database) -> Any:
    database = manager.sync if isinstance(manager, DatabaseSessionManager) else manager
    with database.session() as db:
        return db.scalar(text("SELECT 1"))


def opened(url: str, count: int, limit: int, **options: Any) -> Managers:
    return [
        DatabaseSessionManager().init(url, max_connections=limit, **options) for _ in range(count)
    ]


async def close_all(managers: Managers) -> None:
    for manager in managers:
        await manager.close()


def physical_connects(managers: Managers, side: str) -> list[object]:
    """Return a list that grows by one with each connection that these managers open."""
    seen: list[object] = []
    for manager in managers:
        engine = manager.engine.sync_engine if side == "async" else manager.sync_engine
        event.listen(engine, "connect", lambda *_: seen.append(1))
    return seen


def all_can_be_used(url: str, limit: int) -> bool:
    """Whether so many connections can be open at once, and not one more: no place was lost."""
    database = Database(url, max_connections=limit, pool_size=limit + 1, pool_timeout=10)
    with database, ExitStack() as stack:
        for _ in range(limit):
            stack.enter_context(database.engine.connect())
        assert cap_of_process().info().open == limit
        assert cap_of_process().take() is None
    return True


def until_empty(cap: Cap, deadline: float = 15.0) -> None:
    def who_is_left() -> list[str]:
        return [f"{place.owner!r} of {stay_of(place)}" for place in cap.held] + [
            f"{ticket.owner!r}, who waits" for ticket in cap.waiters
        ]

    until(who_is_left, lambda left: not left, deadline)


# -- never more than the cap ---------------------------------------------------------------------


def test_eighty_managers_of_which_each_serves_a_request_async(
    driver_url: str, watch: Watch
) -> None:
    async def main() -> None:
        managers = opened(driver_url, 80, 20)
        assert await asyncio.gather(*map(one, managers)) == [1] * 80
        await close_all(managers)

    asyncio.run(main())
    assert watch.most <= 20


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_eighty_managers_of_which_each_serves_a_request_sync(
    driver: str, pg18: PostgresServer, database: str, watch: Watch
) -> None:
    managers = opened(pg18.url(database, driver), 80, 20)
    with ThreadPoolExecutor(80) as threads:
        assert list(threads.map(one_sync, managers)) == [1] * 80
    for manager in managers:
        manager.sync.close()
    assert watch.most <= 20


@pytest.mark.parametrize("side", ["async", "sync"])
def test_sixty_callers_of_ten_engines_share_twenty(
    driver_url: str, watch: Watch, side: str
) -> None:
    """And those who wait where a connection comes back do not connect anew."""
    managers = opened(driver_url, 10, 20)
    connects = physical_connects(managers, side)
    units = 10

    async def call(number: int) -> None:
        for _ in range(units):
            assert await one(managers[number % 10]) == 1

    async def main() -> None:
        await asyncio.gather(*map(call, range(60)))
        assert cap_of_process().waiting == 0

    def call_sync(number: int) -> None:
        for _ in range(units):
            assert one_sync(managers[number % 10]) == 1

    if side == "async":
        asyncio.run(main())
    else:
        in_threads(60, call_sync)
    assert len(connects) < 60 * units / 2
    for manager in managers:
        manager.sync.close()
    assert watch.most <= 20


def test_loops_in_threads_and_the_sync_side_share_one_cap(
    driver_url: str, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    """And a loop that ends while its connections give way closes them without a word."""
    managers = opened(driver_url, 3, 5)

    async def several() -> None:
        for _ in range(5):
            assert await asyncio.gather(*map(one, managers * 2)) == [1] * 6

    def work(number: int) -> None:
        if number % 2:
            asyncio.run(several())
        else:
            for _ in range(5):
                assert [one_sync(manager) for manager in managers] == [1] * 3

    in_threads(6, work)
    cap = cap_of_process()
    for manager in managers:
        manager.sync.close()
    until_empty(cap)
    assert watch.most <= 5
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.parametrize("side", ["async", "sync"])
def test_a_backend_that_is_slow_to_end_counts_until_it_has(
    driver_url: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes its temporary tables first; the driver's `close()` has long returned."""
    monkeypatch.setattr(departures, "GONE_LIMIT", 60.0)
    first, second = opened(driver_url, 2, 1, pool_timeout=60)
    litter = text(
        "DO $$ BEGIN FOR n IN 1..300 LOOP EXECUTE 'CREATE TEMP TABLE t' || n || ' (id serial)';"
        " END LOOP; END $$"
    )
    count = text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND backend_type = 'client backend'"
    )

    async def main() -> None:
        async with first.session() as db:
            await db.execute(litter)
        async with second.session() as db:
            assert await db.scalar(count) == 1
        await close_all([first, second])

    if side == "async":
        return asyncio.run(main())
    with first.sync_session() as sync_db:
        sync_db.execute(litter)
    with second.sync_session() as sync_db:
        assert sync_db.scalar(count) == 1
    for manager in (first, second):
        manager.sync.close()
    return None


def test_readers_count_as_well(postgres_url: str, watch: Watch) -> None:
    with Database(postgres_url, max_connections=1) as database:
        for _ in range(5):
            with database.session() as db:
                db.execute(text("SELECT 1"))
            with database.reader() as db:
                db.execute(text("SELECT 1"))
    assert watch.most == 1


@pytest.mark.parametrize("requests", [500, pytest.param(20_000, marks=pytest.mark.soak)])
def test_the_one_used_longest_ago_gives_way(
    pg18: PostgresServer, database: str, watch: Watch, requests: int
) -> None:
    """200 engines at random, and few more connects than by a replay of the order alone."""
    managers = opened(pg18.url(database, "psycopg"), 200, 50)
    connects = physical_connects(managers, "sync")
    dice = random.Random(19)
    order = [dice.randrange(200) for _ in range(requests)]
    turns = iter(order)
    turn = threading.Lock()

    def work(_: int) -> None:
        while True:
            with turn:
                number = next(turns, None)
            if number is None:
                return
            assert one_sync(managers[number]) == 1

    in_threads(8, work)
    for manager in managers:
        manager.sync.close()
    assert watch.most <= 50
    assert len(connects) <= 1.2 * replay_by_lru(order, 50)


def replay_by_lru(order: list[int], limit: int) -> int:
    """Return how often a cache of so many misses, if the one used longest ago gives way."""
    cached: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for key in order:
        if key in cached:
            cached.move_to_end(key)
            continue
        misses += 1
        cached[key] = None
        if len(cached) > limit:
            cached.popitem(last=False)
    return misses


# -- whose gives way -----------------------------------------------------------------------------


def test_an_idle_connection_of_another_side_and_role_gives_way(driver_url: str) -> None:
    async def main() -> None:
        manager = DatabaseSessionManager().init(driver_url, max_connections=1, pool_timeout=20)
        for _ in range(3):
            assert await one(manager) == 1
            assert await asyncio.to_thread(one_sync, manager) == 1
            async with manager.reader() as db:
                assert await db.scalar(text("SELECT 1")) == 1
        assert cap_of_process().info().open == 1
        await manager.close()

    asyncio.run(main())


def test_an_idle_connection_of_another_running_loop_gives_way(driver_url: str) -> None:
    manager = DatabaseSessionManager().init(driver_url, max_connections=1, pool_timeout=20)
    there, over = threading.Event(), threading.Event()

    async def elsewhere() -> None:
        await one(manager)
        there.set()
        await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
    thread.start()
    assert there.wait(20)
    assert asyncio.run(one(manager)) == 1
    over.set()
    thread.join()
    manager.sync.close()


@pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning")
@pytest.mark.parametrize("end", ["stopped", "disposed of", "closed"])
def test_an_idle_connection_of_a_loop_that_does_not_run_gives_way(
    driver_url: str, end: str
) -> None:
    manager = DatabaseSessionManager().init(driver_url, max_connections=2, pool_timeout=20)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(asyncio.wait_for(two_at_once(manager), 20))
    if end == "closed":
        loop.close()
    elif end == "disposed of":
        asyncio.run(manager.engine.dispose())
    assert asyncio.run(two_at_once(manager)) == [1, 1]
    if end != "closed":
        assert loop.run_until_complete(two_at_once(manager)) == [1, 1]
        loop.run_until_complete(manager.close())
        loop.close()
    else:
        manager.sync.close()


async def two_at_once(manager: DatabaseSessionManager) -> list[int]:
    return await asyncio.gather(one(manager), one(manager))


@contextmanager
def blocked_loop(manager: DatabaseSessionManager, count: int) -> Iterator[Callable[[], None]]:
    """A loop in a thread, with so many idle connections, that stands still; what has it go on."""
    ready, go_on, over = threading.Event(), threading.Event(), threading.Event()

    async def main() -> None:
        everyone = asyncio.Barrier(count)

        async def hold() -> None:
            async with manager.session() as db:
                await db.scalar(text("SELECT 1"))
                await everyone.wait()

        await asyncio.gather(*(hold() for _ in range(count)))
        ready.set()
        block(go_on)
        await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(main(),), name="blocked")
    thread.start()
    try:
        assert ready.wait(20)
        yield go_on.set
    finally:
        go_on.set()
        over.set()
        thread.join()


def block(until_set: threading.Event) -> None:
    until_set.wait()


@pytest.mark.parametrize("limit", [0.8, 20.0])
def test_a_blocked_loop_keeps_nobody_from_what_is_idle_elsewhere(
    driver_url: str, limit: float
) -> None:
    """What it has was used longest ago, and is asked for first."""
    first, second, third = managers = opened(driver_url, 3, 3, pool_timeout=limit)
    with blocked_loop(first, 2):
        assert one_sync(second) == 1
        assert one_sync(third) == 1  # both of the first were asked by now
        assert one_sync(second) == 1
    asyncio.run(close_all(managers))


def test_who_waits_beside_a_blocked_loop_has_what_comes_back(driver_url: str) -> None:
    first, second, third = managers = opened(driver_url, 3, 2, pool_timeout=20)
    with blocked_loop(first, 1), ThreadPoolExecutor(1) as thread:
        with second.sync.session() as db:
            db.execute(text("SELECT 1"))
            waiting = thread.submit(one_sync, third)
            until(lambda: cap_of_process().waiting, bool)
            time.sleep(1.5)  # what the loop has was asked for more than once
            assert not waiting.done()
        assert waiting.result() == 1
    asyncio.run(close_all(managers))


def test_a_blocked_loop_gives_way_when_it_goes_on_to_who_waits_only(driver_url: str) -> None:
    first, second, third = managers = opened(driver_url, 3, 2, pool_timeout=20)
    with blocked_loop(first, 1) as go_on, ThreadPoolExecutor(1) as thread:
        with second.sync.session() as db:
            db.execute(text("SELECT 1"))
            waiting = thread.submit(one_sync, third)
            until(lambda: cap_of_process().waiting, bool)
            go_on()
            assert waiting.result() == 1  # the loop's own, for the other is in use
        assert [pool.idle for pool in first.stats().pools] == [0]
    with blocked_loop(first, 1) as go_on:
        assert one_sync(second) == 1
        assert one_sync(third) == 1  # of the second: the loop was asked in vain
        go_on()
        until(lambda: any(map(is_blocked, cap_of_process().pools())), lambda seen: not seen)
        assert [pool.idle for pool in first.stats().pools if pool.loop] == [1]
    asyncio.run(close_all(managers))


def test_exhaustion_names_the_loop_that_is_blocked(driver_url: str) -> None:
    first, second = managers = opened(driver_url, 2, 2, pool_timeout=1.5)
    with blocked_loop(first, 2):
        with pytest.raises(PoolExhausted) as caught:
            one_sync(second)
    told = str(caught.value)
    assert "all 2 that DB_MAX_CONNECTIONS allows are open" in told
    assert "none of them idle" not in told
    assert "Held by ." not in told
    assert re.search(
        r"are open, 2 of them idle in the event loop of thread blocked "
        rf"\(at {re.escape(__file__)}:\d+ in block\), which has not answered for 1\.\d s ",
        told,
    )
    asyncio.run(close_all(managers))


def test_a_loop_that_is_blocked_by_who_waits_gives_way(driver_url: str) -> None:
    """A synchronous session in asynchronous code, which stands still for it."""

    async def main() -> None:
        manager = DatabaseSessionManager().init(driver_url, max_connections=1, pool_timeout=20)
        for _ in range(2):
            assert await one(manager) == 1
            assert one_sync(manager) == 1
        await manager.close()

    asyncio.run(main())


def test_what_a_closed_loop_had_lent_is_taken_back(driver_url: str) -> None:
    """Its tasks will never return it."""
    manager = DatabaseSessionManager().init(driver_url, max_connections=1, pool_timeout=20)
    hold_in_a_loop_that_is_closed(manager)
    assert asyncio.run(one(manager)) == 1
    manager.sync.close()


def hold_in_a_loop_that_is_closed(manager: DatabaseSessionManager) -> None:
    async def hold() -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
            await asyncio.sleep(1000)

    async def until_it_holds() -> None:
        while not lent(manager):
            await asyncio.sleep(0.01)

    loop = asyncio.new_event_loop()
    task = loop.create_task(hold())
    loop.run_until_complete(until_it_holds())
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is the test
    make_immortal(task)  # or the garbage collector speaks of it in another test


def lent(manager: DatabaseSessionManager) -> list[str]:
    holders = [holder for pool in manager.stats().pools for holder in pool.holders]
    return [holder.doing for holder in holders if holder.doing != "connecting"]


def test_filling_a_pool_takes_nothing_from_others(postgres_url: str) -> None:
    first, second = (Database(postgres_url, max_connections=3, pool_min=size) for size in (0, 3))
    with first, second, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(first.engine.connect())
        assert one_sync(second) == 1  # and now it fills itself
        until(lambda: [thread.name for thread in threading.enumerate()], no_filling)
        assert cap_of_process().info().open == 3
        stack.enter_context(first.engine.connect())  # what was idle gives way
        assert second.stats().pools[0].idle == 0


def no_filling(names: list[str]) -> bool:
    return "engineroom-fill" not in names


# -- waiting -------------------------------------------------------------------------------------


def test_exhaustion_names_the_holders_over_all_engines(pg18: PostgresServer) -> None:
    names = [pg18.create_database() for _ in range(3)]
    secret = re.search(r":([^:@/]+)@", pg18.url("postgres", "psycopg"))

    async def main() -> None:
        managers = [
            DatabaseSessionManager().init(pg18.url(name), max_connections=2, pool_timeout=0.5)
            for name in names
        ]
        async with managers[0].session() as db:
            await db.execute(text("SELECT 1"))
            with managers[1].sync.session() as sync_db:
                sync_db.execute(text("SELECT 2"))
                with pytest.raises(PoolExhausted) as caught:
                    await asyncio.create_task(one(managers[2]))
                report = io.StringIO()
                managers[2].dump(report)
        error = caught.value
        assert "all 2 that DB_MAX_CONNECTIONS allows are open" in str(error)
        assert (error.size, error.overflow, error.waiting) == (2, 0, 0)
        pools = {holder.pool.partition(" of ")[0]: holder for holder in error.holders}
        assert set(pools) == {"async primary", "sync primary"}
        for side, name in (("async primary", names[0]), ("sync primary", names[1])):
            assert pools[side].pool.endswith(f"/{name}")
            assert pools[side].doing.startswith("idle in transaction for ")
            assert __file__ in pools[side].where
            assert str(pools[side]) in str(error)
        assert "DB_MAX_CONNECTIONS: 2 of 2 open, 0 waiting" in report.getvalue()
        assert managers[0].stats().caps == managers[2].stats().caps != ()
        if secret:
            assert secret[1] not in str(error) + report.getvalue()
        await close_all(managers)

    asyncio.run(main())
    for name in names:
        pg18.drop_database(name)


def test_tasks_that_hold_one_engines_connection_and_wait_for_anothers_are_told(
    driver_url: str,
) -> None:
    async def main() -> None:
        managers = opened(driver_url, 6, 3, pool_timeout=60)
        everyone = asyncio.Barrier(3)
        told: list[PoolDeadlock] = []

        async def nest(number: int) -> None:
            try:
                async with managers[number].session() as outer:
                    await outer.execute(text("SELECT 1"))
                    await everyone.wait()
                    async with managers[number + 3].session() as inner:
                        await inner.execute(text("SELECT 1"))
            except PoolDeadlock as error:
                told.append(error)

        async with asyncio.timeout(20):
            await asyncio.gather(*map(nest, range(3)))
        assert len(told) == 1  # the others were served by what it gave back
        assert len(told[0].holders) == 3
        assert str(told[0]).count(" in nest,") == 3
        assert "all 3 that DB_MAX_CONNECTIONS allows are open" in str(told[0])
        await close_all(managers)

    asyncio.run(main())


def test_a_circle_over_a_pool_and_the_cap_is_told(driver_url: str) -> None:
    """Who holds a permit of the pool waits for the cap, and who fills the cap for that pool."""

    async def main() -> None:
        first, second = opened(driver_url, 2, 1, pool_timeout=60, pool_size=1, max_overflow=0)
        holds = asyncio.Event()

        async def nest() -> None:
            async with first.session() as outer:
                await outer.execute(text("SELECT 1"))
                holds.set()
                cap = cap_of_process()
                while not cap.waiting:
                    await asyncio.sleep(0.01)
                await one(second)

        async with asyncio.timeout(20):
            nesting = asyncio.create_task(nest())
            await holds.wait()
            waiting = asyncio.create_task(one(second))
            with pytest.raises(PoolDeadlock):
                await nesting
            assert await waiting == 1
        await close_all([first, second])

    asyncio.run(main())


def test_who_waits_is_served_in_turn(postgres_url: str) -> None:
    """Whoever waits in the pool that a connection comes back to passes others for a moment only."""

    async def main() -> None:
        busy, other = opened(postgres_url, 2, 1, pool_timeout=60)
        served: list[str] = []
        over = False

        async def again() -> None:
            while not over:
                await one(busy)
                served.append("busy")

        crowd = [asyncio.create_task(again()) for _ in range(3)]
        async with asyncio.timeout(20):
            while len(served) < 10:
                await asyncio.sleep(0.001)
            assert await one(other) == 1
        over = True
        await asyncio.gather(*crowd)
        await close_all([busy, other])

    asyncio.run(main())


# -- nothing is lost -----------------------------------------------------------------------------


def test_a_waiter_that_is_cancelled_costs_no_place(driver_url: str) -> None:
    async def main() -> None:
        managers = opened(driver_url, 8, 2, pool_timeout=60)
        dice = random.Random(6)
        for _ in range(40):
            tasks = [asyncio.create_task(one(manager)) for manager in managers]
            for task in tasks:
                await asyncio.sleep(dice.random() * 0.004)
                if dice.random() < 0.5:
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        cap = cap_of_process()
        assert cap.waiting == 0
        assert await asyncio.gather(*map(one, managers)) == [1] * 8
        await close_all(managers)
        await asyncio.to_thread(until_empty, cap)

    asyncio.run(main())
    assert all_can_be_used(driver_url, 2)


def test_a_loop_that_ends_while_a_connection_gives_way_costs_no_place(driver_url: str) -> None:
    """What closes it is cancelled, wherever it stands."""
    managers = opened(driver_url, 4, 2, pool_timeout=60)

    async def leave_early(pause: float) -> None:
        await asyncio.gather(one(managers[0]), one(managers[1]))
        waiters = [asyncio.create_task(one(manager)) for manager in managers[2:]]
        await asyncio.sleep(pause)
        assert waiters

    for step in range(20):
        with suppress(asyncio.CancelledError):
            asyncio.run(leave_early(step * 0.001))
    until_empty(cap_of_process())
    for manager in managers:
        manager.sync.close()
    assert all_can_be_used(driver_url, 2)


def ended_as_it_is_asked(url: str, kind: str) -> list[int]:
    """What is asked of a loop between two of its runs, it hears in the one that ends it."""
    first, second = managers = opened(url, 2, 2, pool_timeout=30, sync_in_async="allow")
    cap, met = cap_of_process(), 0
    with ThreadPoolExecutor(2) as threads:
        for _ in range(5):
            loop = loop_factory(kind)()
            loop.run_until_complete(two_at_once(first))
            waiting = [threads.submit(one_sync, second) for _ in range(2)]
            until(  # that both wait, or were served already: after a while what is idle is cut
                lambda ones=waiting: cap.waiting + sum(one.done() for one in ones),
                lambda count: count == 2,
            )
            met += cap.waiting == 2
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
            assert [one.result() for one in waiting] == [1, 1]
            gc.collect()
    assert met, "the loop never ended while both waited"
    asyncio.run(close_all(managers))
    return settled(url)


@server_driver_and_loop
def test_a_loop_that_ends_just_as_it_is_asked_to_give_way(url: str, loop: str) -> None:
    assert run(ended_as_it_is_asked, url, loop) == []


def interrupted_while_waiting(url: str) -> bool:
    managers = [Database(url, max_connections=1, pool_timeout=60) for _ in range(2)]
    main_thread = threading.get_ident()
    ready, over = threading.Event(), threading.Event()

    def hold() -> None:
        with managers[0].session() as db:
            db.execute(text("SELECT 1"))
            ready.set()
            over.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait()

    def press() -> None:
        until(lambda: cap_of_process().waiting, bool)
        signal.pthread_kill(main_thread, signal.SIGINT)

    for _ in range(5):
        presser = threading.Thread(target=press)
        presser.start()
        with suppress(KeyboardInterrupt):
            one_sync(managers[1])
            raise AssertionError("it was not interrupted")
        presser.join()
        assert cap_of_process().waiting == 0
    over.set()
    holder.join()
    gc.collect()
    for manager in managers:
        manager.close()
    return all_can_be_used(url, 1)


def test_ctrl_c_in_a_waiting_thread_costs_no_place(postgres_url: str) -> None:
    assert run(interrupted_while_waiting, postgres_url.replace("://", "+psycopg://"))


HERE = (str(Path(engineroom.__file__).parent), str(Path(sqlalchemy.pool.__file__).parent))


def struck_at_each_line(url: str, every: int, what: str) -> int:
    """Strike a unit that has another's connection give way, or waits for one, or returns one."""
    sys.unraisablehook = lambda _: None  # it may strike in a destructor
    logging.disable()  # of SQLAlchemy's pool, which logs what interrupts it
    step, goes_on = 1, True
    while goes_on:
        managers = [Database(url, max_connections=2, pool_timeout=20) for _ in range(3)]
        cap, over = cap_of_process(), threading.Event()
        unit: Callable[[], object] = partial(one_sync, managers[2])
        held = [manager.engine.connect() for manager in managers[:2]]
        with ThreadPoolExecutor(2) as threads:
            beside = []
            if what == "waits":
                beside = [threads.submit(return_to, cap, over, held.pop()) for _ in range(2)]
            elif what != "gives way":
                mine = partial(one_sync, managers[0])
                beside = [threads.submit(mine if what == "hands over" else unit)]
                until(cap.info, lambda seen: seen.waiting == 1)
                unit = held[0].close
            else:
                held.pop().close()
                held.pop().close()
            goes_on = is_struck(step, unit, HERE)
            over.set()
            del held, unit
            gc.collect()
            for one in beside:
                one.result()
        with ExitStack() as stack:
            for manager in managers[:2]:
                stack.enter_context(manager.engine.connect())
            assert (cap.info().open, cap.waiting) == (2, 0), f"at line {step}"
        for manager in managers:
            manager.close()
        until_empty(cap)
        step += every
    return step


def return_to(cap: Cap, over: threading.Event, held: Any) -> None:
    """Return a connection as soon as somebody waits for one."""
    while not (cap.waiting or over.is_set()):
        time.sleep(0.001)
    held.close()


@pytest.mark.parametrize("what", ["gives way", "waits", "returns", "hands over"])
@pytest.mark.parametrize(
    "every", [47, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])]
)
def test_ctrl_c_at_a_line_costs_no_place(sqlite_url: str, every: int, what: str) -> None:
    assert run(struck_at_each_line, sqlite_url, every, what, deadline=1000) > 50


def interrupted_anywhere(url: str) -> bool:
    """Ctrl-C at random moments of units that wait, have others give way, and connect."""
    managers = [Database(url, max_connections=2, pool_timeout=60) for _ in range(6)]
    main_thread, over = threading.get_ident(), threading.Event()
    struck = 0

    def press() -> None:
        while not over.wait(0.007):
            signal.pthread_kill(main_thread, signal.SIGINT)

    def others() -> None:
        while not over.is_set():
            for manager in managers[:3]:
                one_sync(manager)

    other = threading.Thread(target=others)
    presser = threading.Thread(target=press)
    other.start()
    presser.start()
    while struck < 100:
        try:
            one_sync(random.choice(managers))
        except KeyboardInterrupt:
            struck += 1
        except DBAPIError:  # psycopg's own way to tell it
            pass
    while not over.is_set():
        with suppress(KeyboardInterrupt):
            over.set()
    for thread in (other, presser):
        while thread.is_alive():
            with suppress(KeyboardInterrupt):
                thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    for manager in managers:
        manager.close()
    return all_can_be_used(url, 2)


@pytest.mark.soak
def test_ctrl_c_anywhere_costs_no_place(postgres_url: str) -> None:
    assert run(interrupted_anywhere, postgres_url.replace("://", "+psycopg://"))


def ways_to_end() -> dict[str, Callable[[Database], None]]:
    def overflow(database: Database) -> None:
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(database.engine.connect())

    def recycle(database: Database) -> None:
        one_sync(database)
        database.engine.pool._recycle = 0
        time.sleep(0.01)
        one_sync(database)

    def invalidate(database: Database) -> None:
        with database.engine.connect() as connection:
            connection.invalidate()

    def invalidate_softly(database: Database) -> None:
        with database.engine.connect() as connection:
            connection.connection.invalidate(soft=True)
        one_sync(database)

    def dispose(database: Database) -> None:
        one_sync(database)
        database.engine.dispose()

    def detach(database: Database) -> None:
        with database.engine.connect() as connection:
            connection.detach()
        assert one_sync(database) == 1

    def drop(database: Database) -> None:
        connection = database.engine.connect()
        connection.execute(text("SELECT 1"))
        del connection
        gc.collect()

    def break_it(database: Database) -> None:
        with suppress(DBAPIError), database.session() as db:
            db.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    def fail_to_connect(database: Database) -> None:
        def refuse(*_: object) -> None:
            raise RuntimeError

        event.listen(database.engine, "connect", refuse)
        with pytest.raises(RuntimeError):
            one_sync(database)
        event.remove(database.engine, "connect", refuse)

    def be_refused(database: Database) -> None:
        def forget(dialect: Any, record: Any, arguments: Any, options: Any) -> None:
            options["password"] = options["user"] = "nobody"

        event.listen(database.engine, "do_connect", forget)
        with pytest.raises(DBAPIError):
            one_sync(database)
        event.remove(database.engine, "do_connect", forget)

    return {function.__name__: function for function in list(locals().values())}


@pytest.mark.parametrize("way", list(ways_to_end()))
def test_however_a_connection_ends_its_place_is_free(
    way: str, pg18: PostgresServer, database: str
) -> None:
    url = pg18.url(database, "psycopg")
    manager = Database(url, max_connections=3, pool_size=1, max_overflow=2)
    with manager:
        ways_to_end()[way](manager)
        cap = cap_of_process()
        until(lambda: cap.info().open - len(backends(url)), lambda lost: lost == 0)
        assert cap.info().open <= 1
    until_empty(cap)
    assert all_can_be_used(url, 3)


@pytest.mark.parametrize("way", ["close", "terminate"])
def test_a_place_is_free_though_somebody_keeps_the_drivers_object(
    driver_url: str, way: str
) -> None:
    async def main() -> None:
        manager = DatabaseSessionManager().init(driver_url, max_connections=1, pool_timeout=10)
        async with manager.engine.connect() as connection:
            kept = (await connection.get_raw_connection()).driver_connection
            if way == "terminate":
                await connection.invalidate()
        if way == "close":
            await manager.engine.dispose()
        await asyncio.to_thread(until_empty, cap_of_process())
        assert kept is not None
        await manager.close()

    asyncio.run(main())


def test_a_manager_that_is_dropped_gives_its_places_back(postgres_url: str) -> None:
    keeper = Database(postgres_url, max_connections=2, pool_timeout=10)
    dropped = Database(postgres_url)
    one_sync(dropped)
    assert cap_of_process().info().open == 1
    del dropped
    with pytest.warns(ResourceWarning):
        gc.collect()
    until(lambda: cap_of_process().info().open, lambda count: count == 0)
    keeper.close()


def test_a_connect_that_is_cancelled_gives_its_place_back(driver_url: str) -> None:
    async def main() -> None:
        manager = DatabaseSessionManager().init(driver_url, max_connections=1, pool_timeout=20)
        for step in range(30):
            task = asyncio.create_task(one(manager))
            await asyncio.sleep(step * 0.001)
            task.cancel()
            await asyncio.wait([task])
            await manager.engine.dispose()
        assert await one(manager) == 1
        await manager.close()

    asyncio.run(main())


def test_close_ends_what_runs_though_the_cap_is_full(driver_url: str) -> None:
    """It needs another connection for that, and does without one."""

    async def main() -> None:
        manager = DatabaseSessionManager().init(driver_url, max_connections=1, pool_timeout=20)
        running = asyncio.create_task(sleep(manager))
        async with asyncio.timeout(20):
            while not any("pg_sleep" in doing for doing in lent(manager)):
                await asyncio.sleep(0.01)
            await manager.close(0)
            await asyncio.wait([running])
        assert running.exception() is not None

    asyncio.run(main())
    assert settled(driver_url) == []


async def sleep(manager: DatabaseSessionManager) -> None:
    async with manager.session() as db:
        await db.execute(text("SELECT pg_sleep(100)"))


def test_check_behind_a_full_pool_has_a_place_as_well(driver_url: str, watch: Watch) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.5}
        manager = DatabaseSessionManager().init(driver_url, max_connections=2, **options)
        async with manager.reader() as db:
            await db.execute(text("SELECT 1"))
            assert (await manager.check()).seconds > 0
            assert (await asyncio.to_thread(manager.sync.check)).seconds > 0
            async with manager.session() as another:
                await another.execute(text("SELECT 1"))
                with pytest.raises(PoolExhausted):
                    await asyncio.create_task(manager.check())
        await manager.close()

    asyncio.run(main())
    assert watch.most <= 2


# -- fork ----------------------------------------------------------------------------------------


def forked(url: str) -> list[int]:
    manager = Database(url, max_connections=2, pool_size=3, pool_timeout=10)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(manager.engine.connect())
        read, write = os.pipe()

        def child() -> None:
            assert cap_of_process().info().open == 0
            with ExitStack() as mine:
                for _ in range(2):
                    mine.enter_context(manager.engine.connect())
                assert cap_of_process().info().open == 2
                assert cap_of_process().take() is None
                os.write(write, str(len(backends(url))).encode())
            manager.close()

        wait = fork(child)
        wait()
        seen = int(os.read(read, 10))
        assert cap_of_process().info().open == 2
        for connection in stack.pop_all()._exit_callbacks:  # type: ignore[attr-defined]
            stack.push(connection[1])
    settled(url, 2)
    one_sync(manager)
    manager.close()
    return [seen, len(settled(url))]


def test_a_forked_child_has_a_cap_of_its_own(postgres_url: str) -> None:
    assert run(forked, postgres_url.replace("://", "+psycopg://")) == [4, 0]


# -- how it is set -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "-1", "ten", "1.5"])
def test_what_cannot_be_is_refused(
    value: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_MAX_CONNECTIONS", value)
    with pytest.raises(InvalidOption, match="DB_MAX_CONNECTIONS="):
        Database(sqlite_url)


def test_the_variable_counts_for_every_manager(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_MAX_CONNECTIONS", "3")
    with Database(sqlite_url) as first, Database(sqlite_url) as second:
        assert one_sync(first) == one_sync(second) == 1
        (cap,) = first.stats().caps
        assert (cap.name, cap.limit, cap.open, cap.waiting) == ("DB_MAX_CONNECTIONS", 3, 2, 0)


def test_a_second_limit_is_refused_while_the_first_holds(sqlite_url: str) -> None:
    with Database(sqlite_url, max_connections=3):
        with pytest.raises(InvalidOption, match=r"max_connections=4 .* 3 was set"):
            Database(sqlite_url, max_connections=4)
        with Database(sqlite_url) as second:
            assert second.stats().caps[0].limit == 3
    with Database(sqlite_url, max_connections=4) as third:
        assert third.stats().caps[0].limit == 4
    with Database(sqlite_url) as fourth:
        assert fourth.stats().caps == ()


def test_more_kept_open_than_allowed_is_refused(sqlite_url: str) -> None:
    with pytest.raises(InvalidOption, match=r"DB_POOL_MIN=3 is above DB_MAX_CONNECTIONS=2"):
        Database(sqlite_url, max_connections=2, pool_min=3)


def test_a_group_has_a_limit_of_its_own_within_that_of_the_process(sqlite_url: str) -> None:
    group = Cap(2, "max_connections of the group")
    rooms = [EngineRoom("member", group) for _ in range(3)]
    for room in rooms:
        room.open(sqlite_url, None, {"pool_timeout": 0.2})
    outsiders = [Database(sqlite_url, max_connections=3, pool_timeout=0.2) for _ in range(2)]
    from engineroom.backends import Side

    with ExitStack() as stack:
        for room in rooms[:2]:
            stack.enter_context(room.engine(Side.SYNC).connect())
        with pytest.raises(PoolExhausted, match="all 2 that max_connections of the group allows"):
            rooms[2].engine(Side.SYNC).connect()
        stack.enter_context(outsiders[0].engine.connect())
        with pytest.raises(PoolExhausted, match="all 3 that DB_MAX_CONNECTIONS allows"):
            outsiders[1].engine.connect()
        assert [cap.open for cap in rooms[0].stats().caps] == [2, 3]
    stack.close()
    rooms[2].engine(Side.SYNC).connect().close()
    for room in rooms:
        from engineroom import drain

        drain.close(room, 0)
    for outsider in outsiders:
        outsider.close()
    assert group.info().open == 0


# -- any order of steps --------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Connections of three managers come and go in any order: so many, and no more, can be lent."""

    limit = 2

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        path = Path(self.folder.name, "file.sqlite")
        self.managers = [
            Database(
                f"sqlite:///{path}",
                max_connections=self.limit,
                pool_size=1,
                max_overflow=2,
                pool_timeout=0.02,
            )
            for _ in range(3)
        ]
        self.cap = cap_of_process()
        self.lent: list[Any] = []
        self.detached: list[Any] = []

    @property
    def used(self) -> int:
        return len(self.lent) + len(self.detached)

    @rule(number=st.integers(0, 2))
    def connect(self, number: int) -> None:
        if self.used < self.limit:
            self.lent.append(self.managers[number].engine.connect())
            return
        with pytest.raises((PoolExhausted, PoolDeadlock)):
            self.managers[number].engine.connect()

    @precondition(lambda self: self.lent)
    @rule(data=st.data(), way=st.sampled_from(["close", "invalidate", "detach", "drop"]))
    def end(self, data: st.DataObject, way: str) -> None:
        connection = self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1)))
        if way == "invalidate":
            connection.invalidate()
        if way == "detach":
            connection.detach()
            self.detached.append(connection)
        elif way != "drop":
            connection.close()
        del connection
        if way == "drop":
            gc.collect()

    @precondition(lambda self: self.detached)
    @rule()
    def close_detached(self) -> None:
        self.detached.pop().close()

    @rule(number=st.integers(0, 2))
    def dispose(self, number: int) -> None:
        self.managers[number].engine.dispose()

    @rule(number=st.integers(0, 2))
    def fail_to_connect(self, number: int) -> None:
        def refuse(*_: object) -> None:
            raise RuntimeError

        engine = self.managers[number].engine
        event.listen(engine, "do_connect", refuse)
        with suppress(RuntimeError, PoolExhausted):
            self.lent.append(engine.connect())
        event.remove(engine, "do_connect", refuse)

    @invariant()
    def counts_what_is_open(self) -> None:
        assert self.used <= self.cap.info().open <= self.limit
        assert self.cap.waiting == 0
        until(self.neither_lent_nor_idle, lambda count: count == 0, 5)

    def neither_lent_nor_idle(self) -> int:
        """Idle is also what came back to a pool that its engine has disposed of."""
        idle = [stay for stay in map(stay_of, self.cap.permits) if stay and stay.is_idle]
        return self.cap.info().open - self.used - len(idle)

    def teardown(self) -> None:
        for connection in self.lent + self.detached:
            connection.close()
        for manager in self.managers:
            manager.close()
        self.lent = self.detached = []
        gc.collect()
        until_empty(self.cap, 5)
        self.folder.cleanup()


AnyOrder.TestCase.settings = hypothesis_settings(
    max_examples=8, stateful_step_count=15, deadline=None
)
TestAnyOrder = AnyOrder.TestCase


def test_no_cap_is_kept_that_nobody_asks() -> None:
    gc.collect()
    assert [cap for cap in CAPS if cap.size == 19_019] == []
    cap = Cap(19_019)
    known = weakref.ref(cap)
    del cap
    assert known() is None


def test_what_an_owner_was_about_to_connect_with_is_taken_back(sqlite_url: str) -> None:
    """His tickets and his places, but not those of the connections that are open."""
    with Database(sqlite_url, max_connections=2) as database:
        assert one_sync(database) == 1
        cap = cap_of_process()
        mine = cap.take("me")
        cap.queue("me", lambda: None)
        assert (mine is not None, cap.info().open, cap.waiting) == (True, 2, 1)
        cap.forsake("me")
        assert (cap.info().open, cap.waiting) == (1, 0)
        assert cap.take("you") is mine
        cap.forsake("you")


def test_a_connection_that_was_detached_has_its_place_until_it_is_closed(tmp_path: Path) -> None:
    """Of SQLite: its connections cannot be known weakly, so the place goes with what knows them."""
    with Database(f"sqlite:///{tmp_path}/x.db", max_connections=2, pool_timeout=0.3) as database:
        kept = database.engine.connect()
        kept.detach()
        with database.engine.connect():
            assert cap_of_process().info().open == 2
            with pytest.raises(PoolExhausted):
                database.engine.connect()
        lost = database.engine.connect()
        lost.detach()
        lost.connection.close()
        kept.close()
        del lost, kept
        gc.collect()
        with database.engine.connect(), database.engine.connect():
            assert cap_of_process().info().open == 2


def test_who_replaces_a_dead_connection_costs_no_place(pg18: PostgresServer, database: str) -> None:
    """It waits for a place as others do, and is offered a connection instead, which gives way."""
    url = pg18.url(database, "psycopg")
    with Database(url, max_connections=2, pool_size=5, pool_timeout=10) as door:
        first, second = door.engine.connect(), door.engine.connect()
        second.close()
        taken: list[object] = []

        def take_the_place() -> None:
            with door.session() as db:
                taken.append(db.scalar(text("SELECT 1")))
                until(lambda: taken, lambda so_far: len(so_far) > 1)

        rival = threading.Thread(target=take_the_place)
        with door.session() as db:
            pid = db.connection().connection.driver_connection.info.backend_pid
            rival.start()
            until(lambda: cap_of_process().waiting, lambda waiting: waiting == 1)
            pg18.execute(f"SELECT pg_terminate_backend({pid})")
            time.sleep(0.1)
            closing = threading.Timer(1.0, first.close)
            closing.start()
            assert db.scalar(text("SELECT 42")) == 42
        taken.append("all")
        rival.join()
        closing.join()
        with door.engine.connect(), door.engine.connect():  # no place is lost
            assert cap_of_process().info().open == 2
