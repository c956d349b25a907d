"""A cancellation that meets an answer of the server is not lost (guarantee 2)."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ArgumentError

from engineroom import DatabaseSessionManager

TURNS = 8  # of the event loop, from the socket's word to the driver's return


@pytest.mark.anyio
@pytest.mark.both_loops
async def test_a_cancellation_that_meets_an_answer_is_not_lost(driver_url: str) -> None:
    """Whichever turn of the event loop it strikes, the next statement does not run."""
    async with DatabaseSessionManager().init(driver_url) as manager:
        for turns in range(TURNS):
            begun = asyncio.Event()

            async def work(begun: asyncio.Event = begun) -> None:
                async with manager.session() as db:
                    await db.execute(text("SELECT 1"))
                    begun.set()
                    await db.execute(text("SELECT pg_sleep(0.05)"))
                    await db.execute(text("SELECT pg_sleep(60)"))

            worker = asyncio.create_task(work())
            await begun.wait()
            await asyncio.sleep(0.01)
            time.sleep(0.1)  # the answer comes while the loop looks elsewhere
            for _ in range(turns):
                await asyncio.sleep(0)
            worker.cancel()
            done, _ = await asyncio.wait([worker], timeout=5)
            assert done, f"struck {turns} turns after the answer, it was lost"
            assert worker.cancelled()


@pytest.mark.anyio
@pytest.mark.both_loops
@pytest.mark.parametrize("options", [{"read_only": True}, {"isolation_level": "SERIALIZABLE"}])
async def test_what_strikes_as_options_are_set_leaves_no_connection_to_the_collector(
    driver_url: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """They are set in the middle of `connect()`, and on a busy loop psycopg gives way there."""
    async with DatabaseSessionManager().init(driver_url) as manager:
        await strike(manager, options)
    assert [record for record in caplog.messages if "garbage" in record] == []


@pytest.mark.anyio
@pytest.mark.both_loops
async def test_what_strikes_as_the_engines_own_options_are_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of `create_engine`, which aiosqlite's thread sets."""
    options = {"execution_options": {"isolation_level": "SERIALIZABLE"}}
    url = f"sqlite+aiosqlite:///{tmp_path / 'test.sqlite'}"
    async with DatabaseSessionManager().init(url, engine_options=options) as manager:
        await strike(manager, {})
    assert [record for record in caplog.messages if "garbage" in record] == []


async def strike(manager: DatabaseSessionManager, options: dict[str, Any]) -> None:
    """Cancel a session that does one statement, in each of its first turns."""

    async def work() -> None:
        async with manager.session(**options) as db:
            await db.execute(text("SELECT 1"))

    for turns in range(TURNS):
        await work()
        worker = asyncio.create_task(work())
        for _ in range(turns):
            time.sleep(0.02)
            await asyncio.sleep(0)
        worker.cancel()
        await asyncio.wait([worker])
        assert [pool.lent for pool in manager.stats().pools] == [0]
        del worker
        gc.collect()


@pytest.mark.anyio
async def test_an_option_that_cannot_be_set_costs_no_connection(
    driver_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with DatabaseSessionManager().init(driver_url) as manager:
        engine = manager.engine.execution_options(isolation_level="SOMEHOW")
        for _ in range(3):
            with pytest.raises(ArgumentError, match="SOMEHOW"):
                await engine.connect()
            assert [pool.lent for pool in manager.stats().pools] == [0]
        gc.collect()
    assert [record for record in caplog.messages if "garbage" in record] == []
