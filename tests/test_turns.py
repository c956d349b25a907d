"""Tasks take turns where a session begins, so that those who do the same do it in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from scenario import Model
from sqlalchemy import text

from engineroom import DatabaseSessionManager
from engineroom.errors import SessionClosed

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


async def test_a_reader_that_ends_does_not(driver_url: str) -> None:
    """A task that is ready could use its session, which goes back in the middle of that."""
    async with opened(driver_url) as manager, manager.session():
        async with manager.reader() as db:
            await db.execute(text("SELECT 1"))
            late = asyncio.create_task(db.run_sync(lambda db: db.execute(text("SELECT 2"))))
            noted = Others()
        assert not noted.went_on
        with pytest.raises(SessionClosed):
            await late


async def test_close_waits_for_those_that_let_others_go_on(driver_url: str) -> None:
    async with opened(driver_url) as manager:
        done: list[int] = []

        async def unit(number: int) -> None:
            async with manager.session() as db:
                await db.execute(text("SELECT 1"))
            done.append(number)

        async with manager.session():
            units = [asyncio.create_task(unit(number)) for number in range(3)]
            closing = asyncio.create_task(manager.close())
            await asyncio.sleep(0.01)
        await asyncio.gather(*units, closing)
        assert sorted(done) == [0, 1, 2]
