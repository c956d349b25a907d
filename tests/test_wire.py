"""Round trips, counted on the wire: what a scope sends, and that it sends nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from scenario import Item, Model
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from engineroom import Database, DatabaseSessionManager
from engineroom.testing import PostgresServer, WireProxy

SELECT = "SELECT item.id, item.value, item.mark FROM item WHERE item.id = 1"
FIRST_USES = 6  # psycopg prepares a statement at its sixth execution, which costs one trip once
UNITS = [200, pytest.param(2000, marks=pytest.mark.soak)]


@pytest.fixture(params=["asyncpg", "psycopg"])
def async_url(request: pytest.FixtureRequest, pg18: PostgresServer, database: str) -> str:
    return pg18.url(database, request.param)


@pytest.fixture(params=["psycopg", "psycopg2"])
def sync_url(request: pytest.FixtureRequest, pg18: PostgresServer, database: str) -> str:
    return pg18.url(database, request.param)


QUIET: dict[str, Any] = {"metadata": Model.metadata, "pool_ping_after": 60, "pipeline": "off"}


@pytest.fixture
def manager(proxy: WireProxy, async_url: str) -> DatabaseSessionManager:
    """A manager behind the proxy; no connection idles long enough to be asked.

    On a machine that is busy the server may look far, and BEGIN would travel along.
    """
    manager = DatabaseSessionManager()
    return manager.init(proxy.url(async_url), **QUIET)


@pytest.fixture
def database_(proxy: WireProxy, sync_url: str) -> Iterator[Database]:
    with Database(proxy.url(sync_url), **QUIET) as database:
        database.create_all()
        with database.session() as db:
            db.add(Item(id=1, value=7))
        yield database


async def prepare(manager: DatabaseSessionManager) -> None:
    await manager.create_all()
    async with manager.session() as db:
        db.add(Item(id=1, value=7))


def plain(statements: list[str]) -> list[str]:
    """Return the statements without what each driver adds to them."""
    return [
        " ".join(statement.rstrip(";").replace("%(pk_1)s", "$1").split())
        .replace("$1::INTEGER", "$1")
        .replace("$1", "1")
        .replace(" AS item_id", "")  # SQLAlchemy 2.0
        .replace(" AS item_value", "")
        .replace(" AS item_mark", "")
        for statement in statements
    ]


def counted(proxy: WireProxy) -> tuple[int, list[str]]:
    """Return round trips and statements since the last look; no connection was opened."""
    seen = proxy.round_trips, plain(proxy.statements)
    assert (proxy.connections, proxy.startup_round_trips) == (0, 0)
    proxy.reset()
    return seen


async def get(db: AsyncSession) -> None:
    item = await db.get(Item, 1)
    assert item is not None
    assert item.value == 7


def get_sync(db: Session) -> None:
    item = db.get(Item, 1)
    assert item is not None
    assert item.value == 7


@pytest.mark.parametrize("units", UNITS)
def test_a_session_with_one_get_is_three_round_trips(
    proxy: WireProxy, manager: DatabaseSessionManager, units: int
) -> None:
    async def main() -> None:
        async with manager:
            await prepare(manager)
            for _ in range(FIRST_USES):
                async with manager.session() as db:
                    await get(db)
            proxy.reset()
            for _ in range(units):
                async with manager.session() as db:
                    await get(db)
            assert counted(proxy) == (3 * units, ["BEGIN", SELECT, "COMMIT"] * units)

    asyncio.run(main())


@pytest.mark.parametrize("units", UNITS)
def test_a_synchronous_session_with_one_get_is_three_round_trips(
    proxy: WireProxy, database_: Database, units: int
) -> None:
    for _ in range(FIRST_USES):
        with database_.session() as db:
            get_sync(db)
    proxy.reset()
    for _ in range(units):
        with database_.session() as db:
            get_sync(db)
    assert counted(proxy) == (3 * units, ["BEGIN", SELECT, "COMMIT"] * units)


@pytest.mark.parametrize("units", UNITS)
def test_a_reader_with_one_get_is_one_round_trip(
    proxy: WireProxy, manager: DatabaseSessionManager, units: int
) -> None:
    async def main() -> None:
        async with manager:
            await prepare(manager)
            for _ in range(FIRST_USES):
                async with manager.reader() as db:
                    await get(db)
            proxy.reset()
            for _ in range(units):
                async with manager.reader() as db:
                    await get(db)
            assert counted(proxy) == (units, [SELECT] * units)

    asyncio.run(main())


@pytest.mark.parametrize("units", UNITS)
def test_a_synchronous_reader_with_one_get_is_one_round_trip(
    proxy: WireProxy, database_: Database, units: int
) -> None:
    for _ in range(FIRST_USES):
        with database_.reader() as db:
            get_sync(db)
    proxy.reset()
    for _ in range(units):
        with database_.reader() as db:
            get_sync(db)
    assert counted(proxy) == (units, [SELECT] * units)


def test_the_other_scopes(proxy: WireProxy, manager: DatabaseSessionManager) -> None:
    async def main() -> None:
        async with manager:
            await prepare(manager)
            async with manager.connect() as connection:
                await connection.execute(text("SELECT 1"))
            proxy.reset()

            async with manager.session() as db:
                pass
            async with manager.session() as db:
                db.add(Item(id=2))
                db.expunge_all()
            async with manager.reader() as db:
                pass
            assert counted(proxy) == (0, [])  # nothing is sent before the first statement

            async with manager.connect() as connection:
                await connection.execute(text("SELECT 1"))
            assert counted(proxy) == (3, ["BEGIN", "SELECT 1", "COMMIT"])

            async with manager.session() as db:
                await get(db)
            proxy.reset()
            with pytest.raises(KeyError):
                async with manager.session() as db:
                    await get(db)
                    raise KeyError
            assert counted(proxy) == (3, ["BEGIN", SELECT, "ROLLBACK"])

            async with manager.session(read_only=True) as db:
                await get(db)
            trips, (begin, *rest) = counted(proxy)
            assert (trips, rest) == (3, [SELECT, "COMMIT"])
            assert begin.startswith("BEGIN")
            assert "READ ONLY" in begin

            async with manager.session() as db:
                await get(db)
            assert counted(proxy)[0] == 3  # (psycopg's drivers say BEGIN READ WRITE from now on)

    asyncio.run(main())


def test_the_other_synchronous_scopes(proxy: WireProxy, database_: Database) -> None:
    with database_.connect() as connection:
        connection.execute(text("SELECT 1"))
    proxy.reset()

    with database_.session() as db:
        pass
    with database_.session() as db:
        db.add(Item(id=2))
        db.expunge_all()
    with database_.reader() as db:
        pass
    database_.get_session().close()
    assert counted(proxy) == (0, [])

    with database_.connect() as connection:
        connection.execute(text("SELECT 1"))
    assert counted(proxy) == (3, ["BEGIN", "SELECT 1", "COMMIT"])

    with pytest.raises(KeyError), database_.session() as db:
        get_sync(db)
        raise KeyError
    assert counted(proxy) == (3, ["BEGIN", SELECT, "ROLLBACK"])

    with database_.session(read_only=True) as db:
        get_sync(db)
    trips, (begin, *rest) = counted(proxy)
    assert (trips, rest) == (3, [SELECT, "COMMIT"])
    assert begin.startswith("BEGIN")
    assert "READ ONLY" in begin

    with database_.session() as db:
        get_sync(db)
    assert counted(proxy)[0] == 3
