"""A listener is attached once and hears the connections of every event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from sqlalchemy import event, text

from engineroom import DatabaseSessionManager


def test_a_listener_attached_before_any_loop_hears_them_all(url: str) -> None:
    manager = DatabaseSessionManager().init(url)
    connected: list[int] = []
    lent: list[int] = []
    given: list[int] = []

    @event.listens_for(manager.engine.sync_engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connected.append(threading.get_ident())
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()

    event.listen(manager.engine.sync_engine, "checkout", lambda *args: lent.append(1))
    event.listen(manager.engine.sync_engine, "checkin", lambda *args: given.append(1))

    async def ask() -> None:
        async with manager.session() as db:
            assert await db.scalar(text("SELECT 42")) == 42

    for _ in range(3):
        asyncio.run(ask())
    threads = [threading.Thread(target=asyncio.run, args=(ask(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(manager.close())
    assert len(connected) == len(lent) == len(given) == 5


def test_a_listener_attached_later_hears_the_loop_that_runs(url: str) -> None:
    """A loop whose pool stands already is heard from then on."""
    heard: list[Any] = []

    async def main() -> None:
        async with DatabaseSessionManager().init(url) as manager:
            async with manager.session() as db:
                await db.scalar(text("SELECT 1"))
            event.listen(manager.engine.sync_engine, "checkout", lambda *args: heard.append(args))
            async with manager.session() as db:
                await db.scalar(text("SELECT 1"))

    asyncio.run(main())
    assert len(heard) == 1
