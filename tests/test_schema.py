"""Guarantee 13: however many start at once, all succeed, and the schema is made once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from scenario import is_postgres
from sqlalchemy import (
    MetaData,
    event,
    inspect,
)
from sqlalchemy.engine import make_url
from starting import Starter, models, say, starters

from engineroom import Database, DatabaseSessionManager, schema
from engineroom.errors import SchemaLocked
from engineroom.testing import PostgresServer

TABLES = 2
GUARD = "idle_in_transaction_session_timeout"


@pytest.fixture(params=["pg16", "pg18", "sqlite"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a fresh database, on each that the guarantee names; with a schema by name."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_url")
        return
    server: PostgresServer = request.getfixturevalue(request.param)
    name = server.create_database()
    server.execute("CREATE SCHEMA sales", name)
    yield server.url(name)
    server.drop_database(name)


def wanted(url: str) -> MetaData:
    return models("sales" if is_postgres(url) else None)


def names(url: str) -> set[str]:
    with Database(url) as database, database.connect() as connection:
        inspector = inspect(connection)
        found = set(inspector.get_table_names())
        if is_postgres(url):
            found |= set(inspector.get_table_names("sales"))
    return found


# -- many at once ------------------------------------------------------------------------------


def create(number: int, url: str) -> None:
    """Create all, on one side or the other, and say what was created here."""
    metadata = wanted(url)
    for table in metadata.tables.values():
        event.listen(table, "after_create", lambda *_, **__: say("created"))
    if number % 2:
        with Database(url, metadata=metadata) as database:
            database.create_all()
    else:

        async def main() -> None:
            async with DatabaseSessionManager().init(url, metadata=metadata) as manager:
                await manager.create_all()

        asyncio.run(main())


def all_create(url: str, count: int = 16) -> None:
    with starters(count, create, url) as crowd:
        for starter in crowd:
            starter.begin()
        ends = [starter.ended() for starter in crowd]
    assert [(code, err) for code, _, err in ends if code] == []
    assert sum(out.count("created") for _, out, _ in ends) == TABLES
    assert {"customer", "orders"} <= names(url)


def test_sixteen_start_at_once_and_the_tables_are_created_once(place: str) -> None:
    all_create(place)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("again", range(10))
def test_sixteen_start_at_once_again_and_again(again: int, place: str) -> None:
    all_create(place)


# -- a holder that is killed, or hangs, or takes its time -----------------------------------------


def create_and_hang(number: int, url: str) -> None:
    """Hold the lock, and do nothing: in the middle of `create_all`."""
    metadata = wanted(url)

    def hang(*_: Any, **__: Any) -> None:
        say("hangs")
        time.sleep(1000)

    event.listen(metadata.tables["orders"], "before_create", hang)
    with Database(f"{url}?application_name=hanging" if is_postgres(url) else url) as database:
        database.create_all(metadata)


@contextmanager
def hanging(url: str) -> Iterator[Starter]:
    with starters(1, create_and_hang, url) as (holder,):
        holder.begin()
        holder.says("hangs")
        yield holder


def test_one_is_killed_while_it_holds_the_lock_and_the_others_go_on(place: str) -> None:
    with hanging(place) as holder, starters(4, create, place) as crowd:
        for starter in crowd:
            starter.begin()
        time.sleep(0.5)  # they may ask already; whether they do changes nothing that is asserted
        assert [starter.process.poll() for starter in crowd] == [None] * 4
        holder.kill()
        ends = [starter.ended() for starter in crowd]
    assert [(code, err) for code, _, err in ends if code] == []
    assert sum(out.count("created") for _, out, _ in ends) == TABLES  # nothing of the killed one's


@pytest.mark.parametrize("side", ["sync", "async"])
def test_a_holder_that_hangs_is_named(place: str, side: str, caplog: Any) -> None:
    """In the log after a moment, in the error at the deadline."""
    with hanging(place):
        with pytest.raises(SchemaLocked) as caught:
            create_on(side, place, schema_timeout=schema.TELL_AFTER + 0.5)
        pid = backend_of(place, "hanging") if is_postgres(place) else 0
    message = caught.value.message
    waits = [r.getMessage() for r in caplog.records if "waits for the lock" in r.getMessage()]
    assert len(waits) == 1
    for told in (message, waits[0]):
        if is_postgres(place):
            assert pid
            assert f"backend {pid} (application_name 'hanging', role " in told
            assert "in a transaction since 20" in told
            assert "is idle in transaction for" in told
            assert "CREATE TABLE sales.customer" in told
        else:
            assert make_url(place).database in told
    assert "DB_SCHEMA_TIMEOUT=2.5" in message


def create_on(side: str, url: str, **options: Any) -> None:
    if side == "sync":
        with Database(url, metadata=wanted(url), **options) as database:
            database.create_all()
        return

    async def main() -> None:
        async with DatabaseSessionManager().init(url, metadata=wanted(url), **options) as manager:
            await manager.create_all()

    asyncio.run(main())


def backend_of(url: str, application: str) -> int:
    with psycopg.connect(url) as raw:
        (pid,) = raw.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s", [application]
        ).fetchone() or (0,)
    return int(pid)
