"""The schema, made once: who waits, who need not, on any engine (in processes: `test_starters`)."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from scenario import Item, in_threads, is_postgres, run, server, until
from sqlalchemy import (
    DDL,
    Column,
    Engine,
    Integer,
    MetaData,
    Sequence,
    Table,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.dialects.postgresql import ENUM
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn
from starting import create_on, models, names

from engineroom import Database, DatabaseSessionManager, schema
from engineroom.backends.postgresql import without_literals
from engineroom.errors import InvalidOption, SchemaLocked, SchemaMismatch, SelfDeadlock
from engineroom.testing import sandbox

# -- who waits, and who need not ------------------------------------------------------------------


@contextmanager
def another_tool(url: str) -> Iterator[Callable[[str], Any]]:
    """Hold the lock as the docs say that another tool does; what it gives runs statements."""
    if is_postgres(url):
        with psycopg.connect(url, autocommit=True) as raw:
            raw.execute(f"SELECT pg_advisory_lock({KEY_IN_DOCS})")
            yield raw.execute
    else:
        file = sqlite3.connect(str(make_url(url).database), isolation_level=None)
        file.execute("PRAGMA journal_mode=WAL")
        file.execute("BEGIN IMMEDIATE")
        yield file.execute
        file.close()


KEY_IN_DOCS = int(
    re.findall(
        r"pg_advisory_lock\((\d+)\)",
        (Path(__file__).parent.parent / "docs" / "migrations.md").read_text(),
    )[0]
)


def test_another_tool_can_take_the_lock(url: str) -> None:
    with another_tool(url):
        with Database(url, metadata=Item.metadata, schema_timeout="200ms") as database:
            with pytest.raises(SchemaLocked):
                database.create_all()


@pytest.mark.parametrize("side", ["sync", "async", "foreign"])
def test_where_nothing_is_missing_nobody_is_waited_for(url: str, side: str) -> None:
    def create_items() -> None:
        if side == "foreign":
            with_foreign(url, lambda engine: schema.create_all(engine, Item.metadata, 0.2))
        elif side == "sync":
            with Database(url, metadata=Item.metadata, schema_timeout=0.2) as database:
                database.create_all()
        else:

            async def main() -> None:
                manager = DatabaseSessionManager()
                async with manager.init(url, metadata=Item.metadata, schema_timeout=0.2):
                    await manager.create_all()

            asyncio.run(main())

    create_items()
    with another_tool(url):
        create_items()


def with_foreign(url: str, work: Callable[[Engine], object], **options: Any) -> None:
    """Work on an engine that engineroom did not make."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg2:"), **options)
    try:
        work(engine)
    finally:
        engine.dispose()


LEVELS = ["AUTOCOMMIT", "REPEATABLE READ", "SERIALIZABLE"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("side", ["sync", "async", "foreign"])
def test_at_any_isolation_level_of_an_engine_nothing_is_created_without_the_lock(
    side: str, level: str, postgres_url: str
) -> None:
    """The look whether there is anything to create must not create it, nor wait for the lock."""
    metadata = models()
    at_level: Any = {"engine_options": {"isolation_level": level}}

    def create_tables() -> None:
        if side == "foreign":
            work = partial(schema.create_all, metadata=metadata, timeout=0.2)
            with_foreign(postgres_url, work, isolation_level=level)
        else:
            create_on(side, postgres_url, metadata=metadata, schema_timeout=0.2, **at_level)

    with another_tool(postgres_url):
        with pytest.raises(SchemaLocked):
            create_tables()
    assert names(postgres_url) == set()
    create_tables()
    assert names(postgres_url) == {"customer", "orders"}
    with another_tool(postgres_url):
        create_tables()
        ENUM("one", "two", name="loose", metadata=metadata)  # which only SQLAlchemy can miss
        with pytest.raises(SchemaLocked):
            create_tables()


def test_on_an_engine_that_only_reads_the_look_serves_where_nothing_is_missing(
    postgres_url: str,
) -> None:
    def create_items(engine: Engine) -> None:
        schema.create_all(engine.execution_options(postgresql_readonly=True), Item.metadata, 0.2)

    with pytest.raises(DBAPIError) as caught:
        with_foreign(postgres_url, create_items)
    assert getattr(caught.value.orig, "pgcode", None) == "25006"
    create_on("sync", postgres_url, metadata=Item.metadata)
    with another_tool(postgres_url):
        with_foreign(postgres_url, create_items)


def test_a_connection_in_autocommit_is_refused_for_no_lock_would_last(postgres_url: str) -> None:
    def create_items(engine: Engine) -> None:
        with engine.begin() as connection:
            schema.create_missing(connection, Item.metadata)

    with pytest.raises(InvalidOption, match="is in AUTOCOMMIT"):
        with_foreign(postgres_url, create_items, isolation_level="AUTOCOMMIT")
    assert names(postgres_url) == set()


def test_a_type_a_sequence_and_what_events_add_are_created_though_no_table_is_missing(
    postgres_url: str,
) -> None:
    metadata = MetaData()
    Table("thing", metadata, Column("id", Integer, primary_key=True))
    with Database(postgres_url, metadata=metadata) as database:
        database.create_all()
        ENUM("one", "two", name="loose", metadata=metadata)
        Sequence("counter", metadata=metadata)
        event.listen(metadata, "after_create", DDL("CREATE VIEW seen AS SELECT 1 AS one"))
        database.create_all()
        with database.connect() as connection:
            assert connection.scalar(text("SELECT nextval('counter')")) == 1
            assert connection.scalar(text("SELECT one FROM seen")) == 1
            assert connection.scalar(text("SELECT 'two'::loose::text")) == "two"


def test_one_who_waited_sees_what_the_other_made_at_any_default_isolation(
    postgres_url: str,
) -> None:
    """In a snapshot from before, the tables would not be there, and be created again."""
    name = make_url(postgres_url).database
    with psycopg.connect(postgres_url, autocommit=True) as raw:
        raw.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")
    with another_tool(postgres_url) as execute, ThreadPoolExecutor(1) as thread:
        with Database(postgres_url, metadata=Item.metadata) as database:
            waiting = thread.submit(database.create_all)
            asks = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%try_advisory_xact%'"
            until(lambda: execute(asks).fetchone()[0], lambda seen: seen > 1)
            execute("CREATE TABLE item (id int PRIMARY KEY, value int NOT NULL)")
            execute("SELECT pg_advisory_unlock_all()")
            waiting.result(timeout=20)


def test_one_who_waits_is_cancelled_and_leaves_nothing(url: str) -> None:
    async def main() -> None:
        async with DatabaseSessionManager().init(url, metadata=Item.metadata) as manager:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await manager.create_all()
            assert [pool.lent for pool in manager.stats().pools] == [0]

    with another_tool(url):
        asyncio.run(main())


@pytest.mark.parametrize("cancels", [1, 2])
def test_one_who_holds_the_lock_is_cancelled_and_the_next_goes_on(
    cancels: int, driver_url: str
) -> None:
    """In the middle of a statement, which the server stops; and cancelled again meanwhile."""
    metadata = models()
    orders = metadata.tables["orders"]
    event.listen(
        orders, "before_create", lambda _, on, **__: on.execute(text("SELECT pg_sleep(60)"))
    )

    def locks() -> int:
        with server(driver_url) as raw:
            (count,) = raw.execute(
                "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) "
                "WHERE locktype = 'advisory' AND query LIKE '%pg_sleep%'"
            ).fetchone() or (0,)
        return int(count)

    async def main() -> None:
        async with DatabaseSessionManager().init(driver_url, metadata=metadata) as manager:
            creating = asyncio.create_task(manager.create_all())
            await asyncio.to_thread(until, locks, bool)
            for _ in range(cancels):
                creating.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await creating
            await asyncio.to_thread(until, locks, lambda count: count == 0)
            assert [pool.lent for pool in manager.stats().pools] == [0]
            await manager.create_all(models())

    asyncio.run(main())


def test_inside_of_a_writer_of_the_same_file_it_says_so_at_once(sqlite_url: str) -> None:
    with Database(sqlite_url, metadata=Item.metadata) as database:
        with database.connect():
            with pytest.raises(SelfDeadlock):
                database.create_all()


# -- any metadata, any engine ---------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+psycopg2", "sqlite"])
def test_engines_of_others_create_once_too(driver: str, request: pytest.FixtureRequest) -> None:
    name = "sqlite_url" if driver == "sqlite" else "postgres_url"
    where = request.getfixturevalue(name).replace("postgresql", driver)
    made: list[str] = []
    metadata = models()
    for table in metadata.tables.values():
        event.listen(table, "after_create", lambda target, *_, **__: made.append(target.name))

    def work(number: int) -> None:
        engine = create_engine(where)
        schema.create_all(engine, metadata)
        engine.dispose()

    in_threads(8, work)
    assert sorted(made) == ["customer", "orders"]


def test_transactions_of_others_that_begin_without_the_lock_of_the_file_wait_for_it(
    sqlite_url: str,
) -> None:
    """SQLAlchemy's docs have SQLite's begin so; the first write of all but one would fail."""
    made: list[str] = []
    metadata = models()
    for table in metadata.tables.values():
        event.listen(table, "after_create", lambda target, *_, **__: made.append(target.name))
    event.listen(metadata, "before_create", lambda *_, **__: time.sleep(0.05))

    def work(number: int) -> None:
        with as_in_the_docs(sqlite_url).begin() as connection:
            schema.create_missing(connection, metadata)

    in_threads(8, work)
    assert sorted(made) == ["customer", "orders"]


def test_a_transaction_that_has_read_what_is_old_by_now_waits_for_nothing(sqlite_url: str) -> None:
    with Database(sqlite_url) as database:
        database.create_all(Item.metadata)
        with as_in_the_docs(sqlite_url).connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM item")) == 0
            with database.session() as db:
                db.add(Item(id=1))
            with pytest.raises(sqlite3.OperationalError, match="database is locked"):
                schema.create_missing(connection, models(), 1)


def as_in_the_docs(url: str) -> Engine:
    """Return an engine whose transactions begin as SQLAlchemy's docs have SQLite's begin."""
    engine = create_engine(url, poolclass=NullPool)
    event.listen(engine, "connect", lambda raw, _: setattr(raw, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "aiosqlite"])
def test_asynchronous_engines_of_others_create_by_their_synchronous_core(
    driver: str, request: pytest.FixtureRequest
) -> None:
    async def main() -> None:
        dialect = "sqlite" if driver == "aiosqlite" else "postgresql"
        name = "sqlite_url" if driver == "aiosqlite" else "postgres_url"
        where = request.getfixturevalue(name).replace(dialect, f"{dialect}+{driver}")
        alone = MetaData()  # to the one of `Item` other modules add their tables
        Item.metadata.tables["item"].to_metadata(alone)
        engine = create_async_engine(where)
        try:
            await greenlet_spawn(schema.create_all, engine.sync_engine, models())
            async with engine.begin() as connection:
                await connection.run_sync(schema.create_missing, alone)
            async with engine.connect() as connection:
                found = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
        finally:
            await engine.dispose()
        assert sorted(found) == ["customer", "item", "orders"]

    asyncio.run(main())


def create_sqlmodel(url: str) -> list[str]:
    from sqlmodel import Field, SQLModel

    class Hero(SQLModel, table=True):
        id: int | None = Field(default=None, primary_key=True)
        name: str

    with Database(url, metadata=SQLModel.metadata) as database:
        database.create_all()
        database.create_all()
        database.check(schema=True)
        with database.session() as db:
            db.add(Hero(name="anvil"))
        with database.connect() as connection:
            return list(inspect(connection).get_table_names())


def test_the_tables_of_sqlmodel_are_created(url: str) -> None:
    assert run(create_sqlmodel, url) == ["hero"]


@pytest.mark.anyio
async def test_in_a_sandbox_the_tables_are_created_and_rolled_back(url: str) -> None:
    async with DatabaseSessionManager().init(url, metadata=Item.metadata) as manager:
        await manager.check()  # SQLite makes its file
        async with sandbox(manager):
            await manager.create_all()
            await asyncio.to_thread(manager.sync.create_all)
            async with manager.session() as db:
                db.add(Item(id=1))
            found = await manager.check(schema=True)
            assert (found.role, found.address) == ("primary", None)
        with pytest.raises(SchemaMismatch):
            await manager.check(schema=True)


@pytest.mark.anyio
async def test_without_a_table_to_create_the_log_says_what_is_missing(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with DatabaseSessionManager().init(url, metadata=MetaData()) as manager:
        for create in (manager.create_all, partial(asyncio.to_thread, manager.sync.create_all)):
            caplog.clear()
            await create()
            (said,) = caplog.messages
            assert said.startswith("create_all() has no table to create. Import the modules")
        caplog.clear()
        await manager.create_all(models())
        assert caplog.messages == []


# -- where it stands, without migrations ----------------------------------------------------------


@pytest.mark.anyio
async def test_check_says_which_tables_are_missing(url: str) -> None:
    metadata = models()
    async with DatabaseSessionManager().init(url, metadata=metadata) as manager:
        for check in (manager.check, partial(asyncio.to_thread, manager.sync.check)):
            with pytest.raises(SchemaMismatch, match="customer, orders are not there") as caught:
                await check(schema=True)
            assert caught.value.missing == ("customer", "orders")
            assert (await check()).seconds > 0
        await manager.create_all()
        assert (await manager.check(schema=True)).seconds > 0
        assert (await asyncio.to_thread(manager.sync.check, schema=True)).seconds > 0


FULL: Any = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5, "metadata": Item.metadata}


@pytest.mark.anyio
async def test_check_of_the_schema_does_not_wait_behind_an_empty_pool(url: str) -> None:
    async with DatabaseSessionManager().init(url, **FULL) as manager, manager.reader() as db:
        await db.execute(text("SELECT 1"))
        with pytest.raises(SchemaMismatch):
            await manager.check(schema=True)


def test_check_of_the_schema_does_not_wait_behind_an_empty_pool_of_threads(url: str) -> None:
    with Database(url, **FULL) as database, database.reader() as db:
        db.execute(text("SELECT 1"))
        with pytest.raises(SchemaMismatch):
            database.check(schema=True)


# -- what is shown of a statement ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "shown"),
    [
        ("ALTER ROLE a PASSWORD 'se''cret' LOGIN", "ALTER ROLE a PASSWORD '…' LOGIN"),
        ("DO $x$ BEGIN 'secret' $x$ LANGUAGE sql", "DO '…' LANGUAGE sql"),
        ("SELECT 'cut off in the mid", "SELECT '…'"),
        ("SELECT\n  1", "SELECT 1"),
        ("S" * 300, "S" * 200 + "…"),
    ],
)
def test_no_value_of_the_holders_statement_is_shown(statement: str, shown: str) -> None:
    assert without_literals(statement) == shown
