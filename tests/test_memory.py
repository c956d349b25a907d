"""Scopes by the thousand: memory stays flat, and nothing is left to the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scenario import ASYNC_DRIVERS, SYNC_DRIVERS, Item, Model, run
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from engineroom import DatabaseSessionManager
from engineroom.ledger import Entry
from engineroom.slots import Permit, Ticket
from engineroom.testing import PostgresServer

BOUND = 100_000  # bytes: one a scope would already show
PEAK = 4_000_000  # bytes: what the memory of a whole process goes up and down by
MANY = [5_000, pytest.param(1_000_000, marks=[pytest.mark.soak, pytest.mark.timeout(5400)])]

every_driver = pytest.mark.parametrize("url", ASYNC_DRIVERS, indirect=True)
every_sync_driver = pytest.mark.parametrize("url", SYNC_DRIVERS, indirect=True)
SCOPES = [2_000, pytest.param(100_000, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])]


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh database for a driver."""
    if request.param in {"sqlite", "aiosqlite"}:
        value: str = request.getfixturevalue("sqlite_url")
        return value
    server: PostgresServer = request.getfixturevalue("pg18")
    return server.url(request.getfixturevalue("database"), request.param)


def opened(url: str) -> DatabaseSessionManager:
    manager = DatabaseSessionManager().init(url, metadata=Model.metadata)
    manager.sync.create_all()
    with manager.sync_session() as db:
        db.add(Item(id=1))
    return manager


def ours() -> Counter[str]:
    """Count the objects that a scope is made of."""
    kinds = (Session, Entry, Permit, Ticket, asyncio.Task, threading.Thread)
    return Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds))


async def scopes(manager: DatabaseSessionManager, number: int) -> None:
    """Open one scope of each kind and way to end."""
    async with manager.session() as db:
        await db.get(Item, 1)
    try:
        async with manager.session() as db:
            await db.scalars(select(Item))
            raise KeyError(number)
    except KeyError:
        pass
    async with manager.session():
        pass
    async with manager.reader() as db:
        await db.scalar(text("SELECT 1"))
    async with manager.connect() as connection:
        await connection.execute(text("SELECT 1"))


def sync_scopes(manager: DatabaseSessionManager, number: int) -> None:
    with manager.sync_session() as db:
        db.get(Item, 1)
    try:
        with manager.sync_session() as db:
            db.scalars(select(Item))
            raise KeyError(number)
    except KeyError:
        pass
    with manager.sync_session():
        pass
    with manager.sync.reader() as db:
        db.scalar(text("SELECT 1"))
    with manager.sync.connect() as connection:
        connection.execute(text("SELECT 1"))
    session = manager.sync.get_session()
    session.scalar(text("SELECT 1"))
    session.close()


class Watch:
    """What there was before, and that there is no more of it now."""

    def __init__(self, manager: DatabaseSessionManager) -> None:
        self.manager = manager
        gc.collect()
        self.objects = ours()
        tracemalloc.start()
        self.bytes = tracemalloc.get_traced_memory()[0]

    def check(self) -> None:
        # First without a collection: what is over is freed by its last reference.
        assert ours() - self.objects - Counter({"Task": 2}) == Counter()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - self.bytes
        assert grown < BOUND, "\n".join(
            str(line) for line in tracemalloc.take_snapshot().statistics("lineno")[:20]
        )
        tracemalloc.stop()
        assert len(self.manager._room.ledger._entries) == 0  # before anything looks and tidies up
        assert self.manager.stats().scopes == ()
        assert len(self.manager._room.loose) == 0


def flat(url: str, count: int) -> None:
    manager = opened(url)

    async def main() -> None:
        for number in range(100):
            await scopes(manager, number)
        gc.disable()
        watch = Watch(manager)
        for number in range(count // 5):
            await scopes(manager, number)
            if number % 1000 == 999:
                gc.collect()
        watch.check()
        await manager.close()

    asyncio.run(main())


@pytest.mark.parametrize("count", SCOPES)
@every_driver
def test_memory_stays_flat(url: str, count: int) -> None:
    run(flat, url, count, deadline=90 if count < 10_000 else 1100)


def sync_flat(url: str, count: int) -> None:
    manager = opened(url)
    for number in range(100):
        sync_scopes(manager, number)
    gc.disable()
    watch = Watch(manager)
    for number in range(count // 5):
        sync_scopes(manager, number)
        if number % 1000 == 999:
            gc.collect()
    watch.check()
    manager.sync.close()


@pytest.mark.parametrize("count", SCOPES)
@every_sync_driver
def test_memory_of_the_synchronous_side_stays_flat(url: str, count: int) -> None:
    run(sync_flat, url, count, deadline=90 if count < 10_000 else 1100)


def loops(url: str, count: int) -> None:
    """Event loops that come and go leave nothing either."""
    manager = opened(url)

    async def use() -> None:
        async with manager.session() as db:
            await db.get(Item, 1)

    for _ in range(10):
        asyncio.run(use())
    gc.collect()
    watch = Watch(manager)
    for _ in range(count):
        asyncio.run(use())
    gc.collect()
    watch.check()
    manager.sync.close()


@every_driver
def test_memory_stays_flat_over_many_loops(url: str) -> None:
    run(loops, url, 100)


def cycles(url: str) -> None:
    """End one scope with the collector off: no cycle may hold its session back."""
    manager = opened(url)
    found: list[Any] = []

    async def main() -> None:
        for number in range(20):
            await scopes(manager, number)
        gc.collect()
        gc.disable()
        gc.freeze()
        for number in range(20):
            await scopes(manager, number)
            found.append([name for name in ours() if "Session" in name or "Scope" in name])
        gc.unfreeze()
        gc.enable()
        await manager.close()

    asyncio.run(main())
    assert found == [[]] * 20, found


@every_driver
def test_no_cycle_holds_a_session(url: str) -> None:
    run(cycles, url)


def peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def open_files(manager: DatabaseSessionManager) -> int:
    """Count the descriptors beside the pools' connections: of those, there may be more later."""
    pools = manager.stats().pools
    return len(list(Path("/dev/fd").iterdir())) - sum(pool.lent + pool.idle for pool in pools)


def service(url: str, count: int) -> list[int]:
    """Work as a service does: ten tasks, the collector on, and nobody looks but at each tenth."""
    manager = opened(url)
    seen: list[int] = []

    async def task(number_of_scopes: int) -> None:
        for number in range(number_of_scopes // 5):
            await scopes(manager, number)

    async def main() -> None:
        await asyncio.gather(*(task(200) for _ in range(10)))
        descriptors = open_files(manager)
        seen.append(peak())
        for _ in range(10):
            await asyncio.gather(*(task(count // 100) for _ in range(10)))
            seen.append(peak())
        assert open_files(manager) <= descriptors
        await manager.close()

    asyncio.run(main())
    return seen


@pytest.mark.parametrize("count", MANY)
@pytest.mark.parametrize("url", ["asyncpg"], indirect=True)
def test_a_process_stays_as_it_is(url: str, count: int) -> None:
    """Its memory and its descriptors, over a million scopes.

    Of a million over the second half: in the first, the allocator grows to what it needs beside
    what waits for the collector (some ten bytes a scope, and fewer and fewer).
    """
    seen = run(service, url, count, deadline=90 if count < 10_000 else 5300)
    print("Most memory before, and after each tenth, bytes:", seen)
    assert seen[-1] - seen[0 if count < 10_000 else 5] < PEAK, seen
