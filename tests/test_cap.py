"""One cap: never more connections than `DB_MAX_CONNECTIONS`, over all engines of the process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import pytest
from sqlalchemy import text

from engineroom import Database, DatabaseSessionManager
from engineroom.testing import PostgresServer

pytestmark = pytest.mark.filterwarnings("ignore::engineroom.SyncInAsyncWarning")


class Watch:
    """Samples the number of backends of a database, all the time, from outside."""

    def __init__(self, server: PostgresServer, database: str) -> None:
        self.most = 0
        self.samples = 0
        self._over = threading.Event()
        self._server, self._database = server, database

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        outside = Database(self._server.url("postgres", "psycopg"))
        with outside, outside.connect(isolation_level="AUTOCOMMIT") as connection:
            count = text(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = :name"
                " AND backend_type = 'client backend'"
            )
            while not self._over.is_set():
                seen = connection.scalar(count, {"name": self._database})
                self.most = max(self.most, seen)
                self.samples += 1


@pytest.fixture
def watch(pg18: PostgresServer, database: str) -> Iterator[Watch]:
    with Watch(pg18, database) as one:
        yield one


def test_eighty_managers_sync(postgres_url: str, watch: Watch) -> None:
    managers = [Database(postgres_url, max_connections=20) for _ in range(80)]

    def request(manager: Database) -> Any:
        with manager.session() as db:
            return db.scalar(text("SELECT 1"))

    with ThreadPoolExecutor(80) as threads:
        assert list(threads.map(request, managers)) == [1] * 80
    for manager in managers:
        manager.close()
    assert watch.most <= 20


def test_eighty_managers_async(driver_url: str, watch: Watch) -> None:
    async def main() -> None:
        managers = [
            DatabaseSessionManager().init(driver_url, max_connections=20) for _ in range(80)
        ]

        async def request(manager: DatabaseSessionManager) -> Any:
            async with manager.session() as db:
                return await db.scalar(text("SELECT 1"))

        assert await asyncio.gather(*map(request, managers)) == [1] * 80
        for manager in managers:
            await manager.close()

    asyncio.run(main())
    assert watch.most <= 20
