"""Guarantee 13, in processes: however many start at once, all succeed, and each step runs once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from scenario import is_postgres
from sqlalchemy import event
from sqlalchemy.engine import make_url
from starting import (
    FIRST,
    SECOND,
    Starter,
    alembic,
    config,
    connect_apart,
    create_on,
    names,
    project,
    say,
    starters,
    steps,
    together,
    upgrade,
    wanted,
)

from engineroom import Database, DatabaseSessionManager, schema
from engineroom.errors import SchemaLocked
from engineroom.testing import PostgresServer

TABLES = 2
MEANWHILE = 0.2  # seconds, in which the others come
GUARD = "idle_in_transaction_session_timeout"

on_each = pytest.mark.parametrize("place", ["pg16", "pg18", "sqlite"], indirect=True)


# -- many create ---------------------------------------------------------------------------------


def create(number: int, url: str) -> None:
    """Create all, on one side or the other, and say what was created here."""
    metadata = wanted(url)
    for table in metadata.tables.values():
        event.listen(table, "after_create", lambda *_, **__: say("created"))
    orders = metadata.tables["orders"]
    event.listen(orders, "before_create", lambda *_, **__: time.sleep(MEANWHILE))
    if number % 2:
        with Database(url, metadata=metadata) as database:
            database.create_all()
    else:

        async def main() -> None:
            async with DatabaseSessionManager().init(url, metadata=metadata) as manager:
                await manager.create_all()

        asyncio.run(main())


def all_create(url: str, count: int = 16) -> None:
    ends = together(count, create, url)
    assert [(code, err) for code, _, err in ends if code] == []
    assert sum(out.count("created") for _, out, _ in ends) == TABLES
    assert {"customer", "orders"} <= names(url)


@on_each
def test_sixteen_start_at_once_and_the_tables_are_created_once(place: str) -> None:
    all_create(place)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("again", range(10))
def test_sixteen_start_at_once_again_and_again(again: int, place: str) -> None:
    all_create(place)


# -- and one is killed, or hangs, or takes its time -----------------------------------------------


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
def creating_hangs(url: str) -> Iterator[Starter]:
    with starters(1, create_and_hang, url) as (holder,):
        holder.begin()
        holder.says("hangs")
        yield holder


def test_one_is_killed_while_it_holds_the_lock_and_the_others_go_on(place: str) -> None:
    with creating_hangs(place) as holder, starters(4, create, place) as crowd:
        for starter in crowd:
            starter.begin()
        time.sleep(0.5)  # they may ask already; whether they do changes nothing that is asserted
        assert [starter.process.exitcode for starter in crowd] == [None] * 4
        holder.kill()
        ends = [starter.ended() for starter in crowd]
    assert [(code, err) for code, _, err in ends if code] == []
    assert sum(out.count("created") for _, out, _ in ends) == TABLES  # nothing of the killed one's


@pytest.mark.parametrize("side", ["sync", "async"])
def test_a_holder_that_hangs_is_named(place: str, side: str, caplog: Any) -> None:
    """In the log after a moment, in the error at the deadline."""
    with creating_hangs(place):
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


def backend_of(url: str, application: str) -> int:
    with psycopg.connect(url) as raw:
        (pid,) = raw.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s", [application]
        ).fetchone() or (0,)
    return int(pid)


def test_creating_outlasts_the_servers_guards(place: str) -> None:
    """A server that ends who is idle in a transaction would let a second one begin."""
    if is_postgres(place):
        with psycopg.connect(place, autocommit=True) as raw:
            raw.execute(f"ALTER DATABASE {make_url(place).database} SET {GUARD} = '1s'")
    metadata = wanted(place)
    event.listen(metadata.tables["orders"], "before_create", lambda *_, **__: time.sleep(1.6))
    with Database(place, metadata=metadata) as database:
        database.create_all()
    assert {"customer", "orders"} <= names(place)


# -- many migrate --------------------------------------------------------------------------------

WHILE_OTHERS_COME = "time.sleep(0.5)"  # in which the others come, on a machine that is busy


def all_upgrade(url: str, ini: Path, count: int = 16) -> None:
    ends = together(count, alembic, str(ini), "-x", f"url={url}", "upgrade", "head")
    assert [(code, err) for code, _, err in ends if code] == []
    assert steps(url) == ["first", "second"]


@on_each
def test_sixteen_upgrade_at_once_and_each_migration_runs_once(place: str, tmp_path: Path) -> None:
    all_upgrade(place, project(tmp_path, f"{WHILE_OTHERS_COME}\n    {FIRST}", SECOND))


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("again", range(10))
def test_sixteen_upgrade_at_once_again_and_again(again: int, place: str, tmp_path: Path) -> None:
    all_upgrade(place, project(tmp_path, f"{WHILE_OTHERS_COME}\n    {FIRST}", SECOND))


# -- and one is killed, or hangs, or takes its time -----------------------------------------------

HANG = """op.execute("INSERT INTO ran VALUES ('hangs')")
    print("hangs", flush=True)
    time.sleep(1000)"""


@contextmanager
def migrating_hangs(url: str, ini: Path) -> Iterator[Starter]:
    """Have a process stand in the middle of its second migration."""
    where = f"url={url}?application_name=hanging" if is_postgres(url) else f"url={url}"
    with starters(1, alembic, str(ini), "-x", where, "upgrade", "head") as (holder,):
        holder.begin()
        holder.says("hangs")
        yield holder


def test_one_is_killed_in_a_migration_and_the_others_go_on(place: str, tmp_path: Path) -> None:
    with migrating_hangs(place, project(tmp_path / "old", FIRST, HANG)) as holder:
        ini = project(tmp_path / "new")
        with starters(4, alembic, str(ini), "-x", f"url={place}", "upgrade", "head") as crowd:
            for starter in crowd:
                starter.begin()
            time.sleep(0.5)
            assert [starter.process.exitcode for starter in crowd] == [None] * 4
            holder.kill()
            ends = [starter.ended() for starter in crowd]
    assert [(code, err) for code, _, err in ends if code] == []
    assert steps(place) == ["first", "second"]


def test_a_migration_that_hangs_is_named(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_SCHEMA_TIMEOUT", "500ms")
    ini = project(tmp_path, FIRST, HANG)
    with migrating_hangs(place, ini):
        with pytest.raises(SchemaLocked) as caught:
            upgrade(ini, place)
    message = caught.value.message
    assert message.startswith("alembic has waited for 0.")
    assert ("(application_name 'hanging', role " in message) is is_postgres(place)


def test_a_step_longer_than_the_servers_guards_runs_once(place: str, tmp_path: Path) -> None:
    """Idle in its transaction, and idle between two of them, while it works elsewhere."""
    slow = connect_apart(place)
    last = f"""with op.get_context().autocommit_block():
        pass
    {slow}
    {SECOND}"""
    if is_postgres(place):
        name = make_url(place).database
        with psycopg.connect(place, autocommit=True) as raw:
            for guard in ("idle_in_transaction_session_timeout", "idle_session_timeout"):
                raw.execute(f"ALTER DATABASE {name} SET {guard} = '1s'")
    all_upgrade(place, project(tmp_path, f"{slow}\n    {FIRST}", last), count=3)


def test_an_index_is_built_concurrently_while_others_wait(
    pg18: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    """One who waits with a snapshot would be waited for, and that is a deadlock."""
    build = """with op.get_context().autocommit_block():
        time.sleep(1)
        op.create_index("by_step", "ran", ["step"], postgresql_concurrently=True)
    op.execute("INSERT INTO ran VALUES ('second')")"""
    all_upgrade(postgres_url, project(tmp_path, FIRST, build), count=4)


def test_current_waits_for_nobody(place: str, tmp_path: Path) -> None:
    """Where a migration hangs, one wants to see how far it has come."""
    ini = project(tmp_path, FIRST, HANG)
    with migrating_hangs(place, ini):
        command.current(config(ini, f"url={place}"))
