"""Tasks take turns between two steps, so that those who do the same do it one after another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from scenario import Item, Model
from sqlalchemy import text

from engineroom import DatabaseSessionManager

pytestmark = [pytest.mark.anyio, pytest.mark.both_loops]


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[DatabaseSessionManager]:
    manager = DatabaseSessionManager().init(url, metadata=Model.metadata, pool_size=3)
    async with manager:
        await manager.create_all()
        yield manager


class Others:
    """Notes whether the tasks that were ready have gone on."""

    def __init__(self) -> None:
        self.went_on = False
        asyncio.get_running_loop().call_soon(setattr, self, "went_on", True)


@pytest.mark.parametrize("others", [0, 1, 2])
async def test_one_that_begins_beside_others_lets_them_go_on(driver_url: str, others: int) -> None:
    async with opened(driver_url) as manager, AsyncExitStack() as stack:
        for _ in range(others):
            await stack.enter_async_context(manager.session())
        noted = Others()
        async with manager.session():
            assert noted.went_on == (others > 0)


@pytest.mark.parametrize("others", [0, 1])
async def test_so_does_a_reader_that_ends(driver_url: str, others: int) -> None:
    async with opened(driver_url) as manager, AsyncExitStack() as stack:
        for _ in range(others):
            await stack.enter_async_context(manager.session())
        async with manager.reader() as db:
            await db.execute(text("SELECT 1"))
            noted = Others()
        assert noted.went_on == (others > 0)


@pytest.mark.parametrize("verb", ["session", "reader"])
async def test_who_is_cancelled_then_has_begun_nothing(driver_url: str, verb: str) -> None:
    async with opened(driver_url) as manager, manager.session():
        entered = False

        async def begin() -> None:
            nonlocal entered
            async with getattr(manager, verb)():
                entered = True

        task = asyncio.create_task(begin())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (entered, len(manager.stats().scopes)) == (False, 1)


async def test_a_reader_that_is_cancelled_as_it_ends_gives_its_connection_back(
    driver_url: str,
) -> None:
    async with opened(driver_url) as manager, manager.session() as beside:
        await beside.execute(text("SELECT 1"))

        async def read() -> None:
            async with manager.reader() as db:
                await db.execute(text("SELECT 1"))
                task.get_loop().call_soon(task.cancel)

        for _ in range(10):
            task: asyncio.Task[Any] = asyncio.create_task(read())
            with pytest.raises(asyncio.CancelledError):
                await task
        readers = [pool for pool in manager.stats().pools if pool.role == "reader"]
        assert [(pool.lent, pool.waiting) for pool in readers] == [(0, 0)]
        async with manager.reader() as db:
            assert await db.get(Item, 1) is None


async def test_one_that_is_refused_a_write_says_so_though_others_go_on_first(
    driver_url: str,
) -> None:
    async with opened(driver_url) as manager, manager.session():
        with pytest.raises(Exception, match="read-only"):
            async with manager.reader() as db:
                await db.execute(text("SELECT 1"))
                db.add(Item(id=1, value=1))
