"""A load behind a pooler: what each process prepares, sets and reads is its own, or it says so."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from engineroom import DatabaseSessionManager
from engineroom.backends.postgresql import sqlstate
from engineroom.testing import PostgresServer

ROWS = 20  # in the table of each process
WORKERS = 4  # tasks of each process: with a connection each, more than the pooler has
PATIENCE = 30.0  # seconds for a pooler that restarts


def lay_out(server: PostgresServer, database: str, processes: int) -> None:
    """Give each process a schema, whose tables have the same names, other columns and values."""
    for number in range(processes):
        server.execute(
            f"CREATE SCHEMA s{number}; "
            f"CREATE TABLE s{number}.item ({'spare int, ' * (number > 0)} id int, value bigint, "
            f"name text); "
            f"INSERT INTO s{number}.item (id, value, name) "
            f"SELECT n, {number} * 1000000 + n, 'of {number}' FROM generate_series(1, {ROWS}) AS n;"
            f"CREATE TABLE s{number}.done (unit int, worker int)",
            database,
        )


class Load:
    """One process's share: it counts what it asked, and notes each value that is not its own."""

    def __init__(self, number: int, url: str, queries: int) -> None:
        self.number, self.url, self.queries = number, url, queries
        self.asked = 0
        self.units = 0
        self.wrong: list[str] = []
        self.errors: dict[str, int] = {}
        self.unexplained: list[str] = []
        self.manager = DatabaseSessionManager()

    def expect(self, seen: Any, wanted: Any) -> None:
        if seen != wanted:
            self.wrong.append(f"{seen!r} where {wanted!r} belongs")

    async def ask(self, session: Any, statement: str, **values: Any) -> Any:
        self.asked += 1
        return await session.execute(text(statement), values)

    async def work(self) -> None:
        """Run until the queries are used up."""
        async with self.manager.init(self.url, pooler="transaction", pool_size=WORKERS):
            await asyncio.gather(*(self.worker(one) for one in range(WORKERS)))

    async def worker(self, worker: int) -> None:
        dice = random.Random(self.number * 100 + worker)
        kinds = (self.in_schema, self.with_settings, self.read, self.write, self.in_bulk, self.flow)
        while self.asked < self.queries:
            kind = dice.choice(kinds)
            try:
                await kind(worker, dice)
                self.units += 1
            except Exception as error:
                await self.explain(error)

    async def explain(self, error: Exception) -> None:
        """Note an error: only a lost connection, or one that is refused, explains it."""
        kind = type(getattr(error, "orig", error)).__name__
        self.errors[kind] = self.errors.get(kind, 0) + 1
        lost = isinstance(error, DBAPIError) and error.connection_invalidated
        # A cursor that streams lets asyncpg's own error through, which SQLAlchemy does not see.
        lost = lost or (sqlstate(error) or "").startswith("08")
        if lost or isinstance(error, OSError):
            await asyncio.sleep(0.05)
            return
        began = time.monotonic()
        refused = isinstance(error, DBAPIError) and error.statement is None  # it did not connect
        while refused and time.monotonic() - began < PATIENCE:
            try:
                await self.manager.check()
            except (DBAPIError, OSError):
                await asyncio.sleep(0.05)
            else:
                return
        self.unexplained.append(repr(error))

    async def in_schema(self, worker: int, dice: random.Random) -> None:
        """Set the search path for a transaction; the same text means other columns elsewhere."""
        async with self.manager.session() as session:
            await self.ask(session, f"SET LOCAL search_path TO s{self.number}")
            wanted = dice.randrange(1, ROWS + 1)
            found = await self.ask(session, "SELECT * FROM item WHERE id = :id", id=wanted)
            row = found.mappings().one()
            self.expect(row["value"], self.number * 1_000_000 + wanted)
            self.expect(row["name"], f"of {self.number}")

    async def with_settings(self, worker: int, dice: random.Random) -> None:
        """Set what another process sets, too; and ask by a text that nobody else has."""
        own = f"{self.number} {worker} {dice.random()}"
        async with self.manager.session() as session:
            await self.ask(session, "SELECT set_config('app.owner', :own, true)", own=own)
            salt = dice.randrange(50)
            found = await self.ask(
                session, f"SELECT CAST(:n AS int) + {self.number * 100 + salt}", n=worker
            )
            self.expect(found.scalar_one(), worker + self.number * 100 + salt)
            found = await self.ask(session, "SELECT current_setting('app.owner')")
            self.expect(found.scalar_one(), own)

    async def read(self, worker: int, dice: random.Random) -> None:
        """Read without a transaction of one's own."""
        async with self.manager.reader() as session:
            for _ in range(dice.randrange(1, 4)):
                wanted = dice.randrange(1, ROWS + 1)
                statement = f"SELECT value, name FROM s{self.number}.item WHERE id = :id"
                row = (await self.ask(session, statement, id=wanted)).one()
                self.expect(tuple(row), (self.number * 1_000_000 + wanted, f"of {self.number}"))
            left = await self.ask(session, "SELECT current_setting('app.owner', true)")
            self.expect(left.scalar_one() or "", "")

    async def write(self, worker: int, dice: random.Random) -> None:
        """Commit a row, or roll one back that nobody may ever see."""
        keeps = dice.random() < 0.7
        async with self.manager.session() as session:
            statement = f"INSERT INTO s{self.number}.done VALUES (:unit, :worker)"
            await self.ask(session, statement, unit=1 if keeps else -1, worker=worker)
            if not keeps:
                await session.rollback()

    async def in_bulk(self, worker: int, dice: random.Random) -> None:
        """Send many values for one statement, which drivers prepare in ways of their own."""
        async with self.manager.session() as session:
            self.asked += 1
            statement = text(f"INSERT INTO s{self.number}.done VALUES (:unit, :worker)")
            await session.execute(statement, [{"unit": n, "worker": worker} for n in range(5)])

    async def flow(self, worker: int, dice: random.Random) -> None:
        """Stream rows from a cursor, which needs its transaction."""
        async with self.manager.session() as session:
            self.asked += 1
            statement = text(f"SELECT value FROM s{self.number}.item ORDER BY id")
            result = await session.stream_scalars(statement, execution_options={"yield_per": 7})
            seen = [value async for value in result]
            self.expect(seen, [self.number * 1_000_000 + n for n in range(1, ROWS + 1)])


def share(number: int, url: str, queries: int) -> None:
    """Be one of the processes."""
    load = Load(number, url, queries)
    asyncio.run(load.work())
    print(
        json.dumps(
            {
                "asked": load.asked,
                "units": load.units,
                "wrong": load.wrong,
                "errors": load.errors,
                "unexplained": load.unexplained,
            }
        )
    )
