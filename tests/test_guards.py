"""The server's own deadlines: told to it for nothing, and named when one has struck."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Connection, Integer, MetaData, Table, event, text
from sqlalchemy.exc import DBAPIError
from test_like_new import Door, every_driver, say

from engineroom import Database, DatabaseSessionManager
from engineroom.errors import InvalidOption
from engineroom.testing import PostgresServer, WireProxy, sandbox

IDLE = "SHOW idle_in_transaction_session_timeout"


@pytest.fixture
def opened(pg18: PostgresServer, database: str, driver: str) -> Iterator[Callable[..., Door]]:
    doors: list[Door] = []

    def open_door(**options: Any) -> Door:
        doors.append(Door(pg18, database, driver, **options))
        return doors[-1]

    yield open_door
    for door in doors:
        door.close()


@every_driver
def test_they_are_on_from_the_start(opened: Callable[..., Door]) -> None:
    door = opened()
    assert door.see(IDLE) == ("1min",)
    assert door.see(IDLE, scope="reader") == ("1min",)
    assert door.see("SHOW statement_timeout") == door.see("SHOW lock_timeout") == ("0",)
    door = opened(idle_in_transaction_timeout=0, statement_timeout="1.5s", lock_timeout=0.0001)
    assert door.see(IDLE) == ("0",)
    assert door.see("SHOW statement_timeout") == ("1500ms",)
    assert door.see("SHOW lock_timeout") == ("1ms",)  # what is not 0 does not become "off"


@every_driver
def test_what_the_user_tells_the_server_comes_first(
    pg18: PostgresServer, database: str, driver: str
) -> None:
    url = f"{database}?options=-cidle_in_transaction_session_timeout%3D5s"
    door = Door(pg18, url, driver, statement_timeout=3)
    try:
        assert door.see(IDLE) == ("5s",)
        assert door.see("SHOW statement_timeout") == ("3s",)
    finally:
        door.close()


@every_driver
def test_a_connect_has_no_more_trips_for_them(
    pg18: PostgresServer, database: str, driver: str, proxy: WireProxy
) -> None:
    trips = []
    for options in ({}, {"statement_timeout": 5, "lock_timeout": 5}):
        door = Door(pg18, database, driver, through=proxy, **options)
        try:
            door.run(say("SELECT 1"))
            trips.append((proxy.startup_round_trips, proxy.round_trips))
            proxy.reset()
        finally:
            door.close()
            proxy.reset()
    assert trips[0] == trips[1]


@every_driver
def test_a_session_has_its_own_until_its_end(
    pg18: PostgresServer, database: str, driver: str, proxy: WireProxy
) -> None:
    door = Door(pg18, database, driver, through=proxy)
    try:
        for own in ({"statement_timeout": 2}, {"statement_timeout": "2s", "lock_timeout": 0}):
            seen = door.run(lambda c: c.exec_driver_sql("SHOW statement_timeout").scalar(), **own)
            assert seen == "2s"
        assert door.see("SHOW statement_timeout") == ("0",)
        door.run(say("SELECT 1"))
        proxy.reset()
        door.run(say("SELECT 1"))
        without = proxy.round_trips
        proxy.reset()
        door.run(say("SELECT 1"), idle_in_transaction_timeout=9)
        # asyncpg's BEGIN takes them along; psycopg begins by itself.
        assert proxy.round_trips == without + (driver != "asyncpg")
    finally:
        door.close()


@every_driver
def test_the_isolation_level_may_be_set_behind_them(opened: Callable[..., Door]) -> None:
    guards = {"statement_timeout": 2, "lock_timeout": 1}
    opened().run(say("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"), **guards)


@every_driver
def test_what_a_session_asks_for_comes_before_the_engines_own(opened: Callable[..., Door]) -> None:
    chosen = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": False}
    door = opened(engine_options={"execution_options": chosen})

    def seen(sql: str, **options: Any) -> Any:
        return door.run(lambda connection: connection.exec_driver_sql(sql).scalar(), **options)

    level, read_only = "SHOW transaction_isolation", "SHOW transaction_read_only"
    assert seen(level) == seen(level, read_only=True) == "repeatable read"
    assert seen(level, isolation_level="SERIALIZABLE") == "serializable"
    assert (seen(read_only), seen(read_only, read_only=True)) == ("off", "on")
    door.run(say("VACUUM"), isolation_level="AUTOCOMMIT")
    assert seen(level) == "repeatable read"

    def see_twice(connection: Connection) -> bool:
        look = "SELECT transaction_timestamp()::text"
        return len({connection.exec_driver_sql(look).scalar() for _ in range(2)}) == 2

    assert door.run(see_twice, scope="reader")
    door = opened(engine_options={"execution_options": None})
    assert seen(level) == seen(level, read_only=True) == "read committed"
    door.engine.update_execution_options(isolation_level="SERIALIZABLE")
    assert seen(level) == seen(level, read_only=True) == "serializable"


@every_driver
def test_one_that_was_never_sent_is_not_the_next_sessions(opened: Callable[..., Door]) -> None:
    door = opened()
    door.run(lambda connection: None, statement_timeout=2)
    assert door.see("SHOW statement_timeout") == ("0",)


def notes_of(error: BaseException) -> str:
    return " ".join(getattr(error, "__notes__", []))


@every_driver
def test_the_error_says_which_guard_struck(opened: Callable[..., Door]) -> None:
    door = opened(pool_size=2)
    with pytest.raises(DBAPIError) as caught:
        door.run(say("SELECT pg_sleep(5)"), statement_timeout=0.05)
    assert "statement_timeout=0.05 of this session" in notes_of(caught.value)
    door.run(say("CREATE TABLE item (id int)"))

    def lock(connection: Connection) -> None:
        connection.exec_driver_sql("LOCK TABLE item")
        with pytest.raises(DBAPIError) as caught:
            other.run(say("SELECT 1 FROM item"))
        assert "DB_LOCK_TIMEOUT=0.05" in notes_of(caught.value)
        with pytest.raises(DBAPIError) as caught:  # the same SQLSTATE, of no guard
            other.run(say("LOCK TABLE item NOWAIT"))
        assert not notes_of(caught.value)

    other = opened(lock_timeout=0.05) if door.door else None
    if other is not None:
        door.run(lock)


@every_driver
def test_a_cancel_is_no_guard(
    opened: Callable[..., Door], pg18: PostgresServer, database: str
) -> None:
    door = opened(statement_timeout=60)
    with pytest.raises(DBAPIError) as caught:
        door.run(say("SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(5)"))
    assert getattr(caught.value.orig, "sqlstate", None) or getattr(caught.value.orig, "pgcode", "")
    assert not notes_of(caught.value)


@every_driver
def test_who_was_idle_for_too_long_is_told_and_logged(
    opened: Callable[..., Door], caplog: pytest.LogCaptureFixture
) -> None:
    door = opened(idle_in_transaction_timeout=0.05)

    def hold(connection: Connection) -> None:
        connection.exec_driver_sql("SELECT 1")
        time.sleep(0.5)  # as an application that waits for another service
        connection.exec_driver_sql("SELECT 2")

    with caplog.at_level(logging.WARNING), pytest.raises(DBAPIError) as caught:
        door.run(hold)
    assert "DB_IDLE_IN_TRANSACTION_TIMEOUT=0.05" in notes_of(caught.value)
    (record,) = [r for r in caplog.records if "idle in a transaction" in r.getMessage()]
    assert "test_like_new.py" in record.getMessage()  # the line that opened the session
    assert door.see("SELECT 1") == (1,)


@every_driver
def test_a_session_that_changes_its_own_is_cleaned(opened: Callable[..., Door]) -> None:
    door = opened()
    door.run(say("SET idle_in_transaction_session_timeout = 0"))
    assert door.see(IDLE) == ("1min",)


@pytest.mark.parametrize("value", [-1, "soon", float("nan"), True, "99999999s"])
@pytest.mark.parametrize(
    "name", ["statement_timeout", "lock_timeout", "idle_in_transaction_timeout"]
)
def test_what_is_no_time_is_refused(
    name: str, value: Any, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Database(sqlite_url) as door, pytest.raises(InvalidOption, match=f"^{name}="):
        door.session(**{name: value})
    with pytest.raises(InvalidOption, match=f"^{name}="):
        Database("postgresql://localhost/app", **{name: value})
    monkeypatch.setenv(f"DB_{name.upper()}", str(value))
    with pytest.raises(InvalidOption, match=f"^DB_{name.upper()}="):
        Database("postgresql://localhost/app")


def test_where_none_is_kept_none_is_taken(sqlite_url: str, postgres_url: str) -> None:
    with pytest.raises(InvalidOption, match="statement_timeout= says nothing for SQLite"):
        Database(sqlite_url, statement_timeout=2)
    with Database(sqlite_url) as door, pytest.raises(InvalidOption, match="statement_timeout"):
        with door.session(statement_timeout=2) as db:
            db.connection()
    with Database(postgres_url) as door, pytest.raises(InvalidOption, match="stands alone"):
        with door.session(isolation_level="AUTOCOMMIT", lock_timeout=2) as db:
            db.connection()
    with Database(postgres_url) as door, pytest.raises(TypeError, match="query_timeout"):
        door.session(query_timeout=2)  # type: ignore[call-arg]


@pytest.mark.anyio
async def test_a_sandbox_holds_and_its_sessions_have_their_own(driver_url: str) -> None:
    manager = DatabaseSessionManager().init(driver_url, idle_in_transaction_timeout=0.2)
    show = text("SELECT current_setting('statement_timeout')")
    async with manager, sandbox(manager):
        async with manager.session(statement_timeout=2, lock_timeout=1) as db:
            assert await db.scalar(show) == "2s"
            assert await db.scalar(text("SHOW lock_timeout")) == "1s"
        async with manager.session() as db:
            assert await db.scalar(show) == "0"
            await asyncio.sleep(0.5)  # between two statements, or two tests
        async with manager.session() as db:
            assert await db.scalar(text(IDLE)) == "0"

        def in_a_thread() -> None:
            with manager.sync_session(statement_timeout=3) as db:
                assert db.scalar(show) == "3s"

        await asyncio.to_thread(in_a_thread)


def test_migrations_and_create_all_hold(postgres_url: str) -> None:
    metadata = MetaData()
    Table("slow", metadata, Column("id", Integer, primary_key=True))

    @event.listens_for(metadata, "before_create")
    def hold(*_: Any, **__: Any) -> None:
        time.sleep(0.5)

    @event.listens_for(metadata, "after_create")
    def work(_: object, connection: Connection, **__: Any) -> None:
        connection.execute(text("SELECT pg_sleep(1.2)"))

    with Database(postgres_url, idle_in_transaction_timeout=0.1, statement_timeout=0.2) as door:
        door.create_all(metadata)
        with door.session() as db:
            assert db.scalar(text("SELECT count(*) FROM slow")) == 0
            assert db.scalar(text(IDLE)) == "100ms"


@every_driver
def test_it_is_logged_though_its_owner_only_rolls_back(
    opened: Callable[..., Door], caplog: pytest.LogCaptureFixture
) -> None:
    door = opened(idle_in_transaction_timeout=0.05)

    def hold(connection: Connection) -> None:
        connection.exec_driver_sql("SELECT 1")
        time.sleep(0.5)

    with caplog.at_level(logging.WARNING):
        door.run(hold, fail=True)
    logged = [record.getMessage() for record in caplog.records]
    assert [line for line in logged if "idle in a transaction" in line] == logged[:1] != []
