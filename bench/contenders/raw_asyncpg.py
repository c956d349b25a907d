"""asyncpg with the same statements and no ORM: the limit.

Its pool does not reset what comes back: that would be a round trip more.
"""

import contextlib
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from . import Contender, web

COLUMNS = "SELECT item.id, item.name, item.count FROM item"
INSERT = "INSERT INTO line (name) SELECT * FROM unnest($1::varchar[]) RETURNING line.id"


async def untouched(connection):
    """Leave a connection as it comes back."""


def pooled(url, pool):
    url = url.replace("+asyncpg", "")
    return asyncpg.create_pool(url, min_size=0, max_size=pool["pool_size"], reset=untouched)


@asynccontextmanager
async def opened(url, pool):
    async with pooled(url, pool) as connections:

        async def empty(key):
            pass

        async def get(key):
            async with connections.acquire() as connection:
                await connection.fetchrow(f"{COLUMNS} WHERE item.id = $1", key)

        async def change(key):
            async with connections.acquire() as connection, connection.transaction():
                await connection.execute(
                    "UPDATE item SET count=(item.count + 1) WHERE item.id = $1", key
                )

        async def insert(key):
            async with connections.acquire() as connection, connection.transaction():
                await connection.fetch(INSERT, [f"line {key}"] * 10)

        async def rows(key):
            async with connections.acquire() as connection:
                await connection.fetch(COLUMNS)

        async def hold(wait):
            async with connections.acquire() as connection:
                await connection.fetchrow(f"{COLUMNS} WHERE item.id = $1", 1)
                await wait()

        units = {"empty": empty, "get": get, "update": change, "insert": insert}
        yield {**units, "list": rows, "hold": hold}


@asynccontextmanager
async def application(url, pool):
    from fastapi import FastAPI

    async with contextlib.AsyncExitStack() as stack:
        connections = await stack.enter_async_context(pooled(url, pool))
        app = FastAPI()

        @app.get("/items/{key}")
        async def read(key: int) -> Any:
            async with connections.acquire() as connection:
                return dict(await connection.fetchrow(f"{COLUMNS} WHERE item.id = $1", key))

        yield await stack.enter_async_context(web.served(app))


asynchronous = Contender("async", opened, application)
