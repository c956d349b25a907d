"""Measure what a sandbox costs a test: beside a committed unit of work, and drop and create.

    python bench/sandbox.py [--rounds 30]

The test does one unit of work: a session that inserts a row. What it costs in a sandbox, and what a
clone costs, is compared with the unit alone on the same warm connection and with `drop_all()` and
`create_all()` of 20 tables, in turns; wall time, for a test waits for all of it.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sqlalchemy import Column, Integer, MetaData, insert
from sqlalchemy import Table as SQLTable

from engineroom import Database, DatabaseSessionManager
from engineroom.testing import clones, postgres, sandbox

TABLES = 20
TEST = 0.05  # seconds that a test with a clone takes, while the next clone is made
metadata = MetaData()
tables = [
    SQLTable(f"thing_{number}", metadata, Column("id", Integer, primary_key=True))
    for number in range(TABLES)
]


async def unit(manager: DatabaseSessionManager) -> None:
    """Insert a row."""
    async with manager.session() as db:
        await db.execute(insert(tables[0]))


async def timed(work: Callable[[], Awaitable[None]]) -> float:
    """Return the milliseconds that it takes."""
    began = time.perf_counter()
    await work()
    return (time.perf_counter() - began) * 1000


async def measure(url: str, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each."""
    taken: dict[str, list[float]] = {"unit": [], "sandboxed": [], "clone": [], "recreate": []}

    def prepare(where: str) -> None:
        with Database(where, metadata=metadata) as database:
            database.create_all()

    with ExitStack() as stack:
        template = await asyncio.to_thread(stack.enter_context, clones(url, prepare))
        async with DatabaseSessionManager().init(url, metadata=metadata) as manager:
            await manager.create_all()

            async def in_sandbox() -> None:
                async with sandbox(manager):
                    await unit(manager)

            async def recreate() -> None:
                async with manager.connect() as connection:
                    await connection.run_sync(metadata.drop_all)
                    await connection.run_sync(metadata.create_all)

            async def take_clone() -> None:
                template.discard(await asyncio.to_thread(template.clone))

            for number in range(rounds + 3):
                await asyncio.sleep(TEST)
                row = {
                    "clone": await timed(take_clone),
                    "unit": await timed(lambda: unit(manager)),
                    "sandboxed": await timed(in_sandbox),
                    "recreate": await timed(recreate),
                }
                if number >= 3:
                    for name, milliseconds in row.items():
                        taken[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    """Measure on SQLite, asyncpg and psycopg."""
    parser = argparse.ArgumentParser(description="Measure what a sandbox costs a test.")
    parser.add_argument("--rounds", type=int, default=30)
    rounds: int = parser.parse_args().rounds
    table = Table("", "unit, ms", "sandbox adds", "recreate / sandbox", "recreate / clone")
    with postgres() as server, tempfile.TemporaryDirectory() as folder:
        urls = {driver: server.url(driver=driver) for driver in ("asyncpg", "psycopg")}
        urls["aiosqlite"] = f"sqlite:///{Path(folder, 'bench.db')}"
        for name, url in urls.items():
            cost = asyncio.run(measure(url, rounds))
            added = cost["sandboxed"] - cost["unit"]
            table.add_row(
                name,
                f"{cost['unit']:.2f}",
                f"{added:.2f} ms, {added / cost['unit']:.1f} units",
                f"{cost['recreate'] / added:.0f} ×",
                f"{cost['recreate'] / cost['clone']:.0f} ×",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
