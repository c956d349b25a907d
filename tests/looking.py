"""Connects through one URL with one driver, and looks at what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from engineroom import Database, DatabaseSessionManager

T = TypeVar("T")

# What a connect in vain raises: SQLAlchemy 2.0 lets asyncpg's own errors through.
CANNOT_CONNECT = (
    OSError,
    DBAPIError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
DRIVERS = ["asyncpg", "psycopg", "psycopg2"]  # psycopg on both sides, taken in turn


def look(
    url: str, driver: str, see: Callable[[Connection], T] | str = "SELECT 1", **options: Any
) -> T | Any:
    """Connect by a driver, and return what is seen: by a function, or a query's first value."""

    def seen(connection: Connection) -> Any:
        return connection.exec_driver_sql(see).scalar() if isinstance(see, str) else see(connection)

    name, asynchronous = driver.removesuffix(" (async)"), driver.endswith(" (async)")
    url = url.replace("postgresql://", f"postgresql+{name}://", 1)
    if name != "asyncpg" and not asynchronous:
        with Database(url, **options) as door, door.connect() as connection:
            return seen(connection)

    async def main() -> Any:
        async with DatabaseSessionManager().init(url, **options) as manager:
            async with manager.connect() as connection:
                return await connection.run_sync(seen)

    return asyncio.run(main())
