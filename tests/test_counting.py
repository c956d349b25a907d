"""Recordings count what the wire counts, name whose line it was, and show no value."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scenario import Item, Model
from sqlalchemy import bindparam, event, insert, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from engineroom import Database, DatabaseSessionManager, errors, session_manager
from engineroom.testing import (
    PostgresServer,
    WireProxy,
    assert_round_trips,
    counting,
    record_statements,
)

pytestmark = pytest.mark.anyio

UNTIL_PREPARED = 7  # asyncpg prepares at the first execution on a connection, psycopg at the sixth
SECRET = 271828182


@pytest.fixture(autouse=True)
def no_pipeline_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other workers a server looks far away, and `auto` would save a trip now and then."""
    monkeypatch.setenv("DB_PIPELINE", "off")


# -- what the wire counts ----------------------------------------------------------------------


def get(db: Session) -> None:
    db.scalar(select(Item.value).where(Item.id == 1))


def change(db: Session) -> None:
    item = db.get_one(Item, 1)
    item.value += 1
    db.flush()


def commit_twice(db: Session) -> None:
    change(db)
    db.commit()
    change(db)


def roll_back(db: Session) -> None:
    change(db)
    db.rollback()


def roll_back_to_savepoint(db: Session) -> None:
    with db.begin_nested():
        get(db)
    savepoint = db.begin_nested()
    get(db)
    savepoint.rollback()


def nothing(db: Session) -> None:
    """Open a session, and use it for nothing."""


def fail(db: Session) -> None:
    get(db)
    raise ZeroDivisionError


def many_rows(db: Session) -> None:
    db.connection().execute(insert(Item), [{"id": n, "value": n} for n in range(100, 120)])
    wanted = update(Item).where(Item.id == bindparam("which")).values(value=bindparam("to"))
    db.connection().execute(wanted, [{"which": n, "to": n} for n in range(100, 105)])
    db.execute(text("DELETE FROM item WHERE id >= 100"))


LOADS: dict[str, tuple[dict[str, Any], Callable[[Session], None]]] = {
    "session": ({}, get),
    "change": ({}, change),
    "commit twice": ({}, commit_twice),
    "roll back": ({}, roll_back),
    "savepoints": ({}, roll_back_to_savepoint),
    "nothing": ({}, nothing),
    "exception": ({}, fail),
    "many rows": ({}, many_rows),
    "read only": ({"read_only": True}, get),
    "serializable": ({"isolation_level": "SERIALIZABLE"}, change),
}
TRIPS = {
    "session": 3,
    "change": 4,
    "commit twice": 8,
    "roll back": 4,
    "savepoints": 8,
    "nothing": 0,
    "exception": 3,
    "many rows": 5,
    "read only": 3,
    "serializable": 4,
}


def plain(statements: list[str]) -> list[str]:
    """Return the first word of each, without repetitions: a row's and a batch's look the same."""
    words = [re.split(r"[\s;]", statement.strip())[0] for statement in statements]
    return [word for word, before in zip(words, ["", *words], strict=False) if word != before]


def compare(recording: counting.Recording, proxy: WireProxy) -> int:
    sent = [statement.sql for statement in recording.statements]
    assert (recording.round_trips, plain(sent)) == (proxy.round_trips, plain(proxy.statements))
    proxy.reset()
    return recording.round_trips


@pytest.mark.parametrize("load", LOADS)
async def test_the_asynchronous_side_counts_what_the_wire_counts(
    load: str, proxy: WireProxy, driver_url: str
) -> None:
    options, work = LOADS[load]
    manager = DatabaseSessionManager()

    async def once() -> None:
        try:
            async with manager.session(**options) as db:
                await db.run_sync(work)
        except ZeroDivisionError:
            pass

    async with manager.init(
        proxy.url(driver_url), metadata=Model.metadata, pool_ping_after=60, max_overflow=0
    ):
        await manager.create_all()
        async with manager.session() as db:
            db.add(Item(id=1))
        for _ in range(UNTIL_PREPARED):
            await once()
        proxy.reset()
        with record_statements(manager) as recording:
            await once()
        assert compare(recording, proxy) == TRIPS[load]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_the_synchronous_side_counts_what_the_wire_counts(
    load: str, driver: str, proxy: WireProxy, pg18: PostgresServer, database: str
) -> None:
    options, work = LOADS[load]
    url = proxy.url(pg18.url(database, driver))
    with Database(url, metadata=Model.metadata, pool_ping_after=60) as db:
        db.create_all()
        with db.session() as session:
            session.add(Item(id=1))

        def once() -> None:
            try:
                with db.session(**options) as session:
                    work(session)
            except ZeroDivisionError:
                pass

        for _ in range(UNTIL_PREPARED):
            once()
        proxy.reset()
        with record_statements(db) as recording:
            once()
        # psycopg2 sends each row of an executemany for itself.
        more = 4 if (load, driver) == ("many rows", "psycopg2") else 0
        assert compare(recording, proxy) == TRIPS[load] + more


async def test_readers_and_connections_count_what_the_wire_counts(
    proxy: WireProxy, driver_url: str
) -> None:
    async with DatabaseSessionManager().init(proxy.url(driver_url), pool_ping_after=60) as manager:

        async def read() -> None:
            async with manager.reader() as db:
                await db.scalar(text("SELECT 1"))

        async def use(**options: Any) -> None:
            async with manager.connect(**options) as connection:
                await connection.execute(text("SELECT 1"))

        async def begin_only() -> None:
            async with manager.connect():
                pass

        for work, trips in (
            (read, 1),
            (use, 3),
            (lambda: use(isolation_level="AUTOCOMMIT"), 1),
            (begin_only, 0),
        ):
            for _ in range(UNTIL_PREPARED):
                await work()
            proxy.reset()
            with record_statements(manager) as recording:
                await work()
            assert compare(recording, proxy) == trips


async def test_preparing_connecting_and_pings_are_left_out(
    proxy: WireProxy, pg18: PostgresServer, database: str
) -> None:
    url = proxy.url(pg18.url(database, "asyncpg"))
    async with DatabaseSessionManager().init(url, pool_ping_after=0) as manager:

        async def read(what: str) -> tuple[int, int]:
            proxy.reset()
            with record_statements(manager) as recording:
                async with manager.reader() as db:
                    await db.scalar(text(what))
            return recording.round_trips, proxy.round_trips

        recorded, on_the_wire = await read("SELECT 1")
        assert (recorded, proxy.connections) == (1, 1)
        assert on_the_wire > 1
        assert await read("SELECT 2") == (1, 3)  # a ping, and it is prepared
        assert await read("SELECT 2") == (1, 2)  # a ping


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_transactions_that_fail_count_what_the_wire_counts(
    driver: str, proxy: WireProxy, pg18: PostgresServer, database: str
) -> None:
    pg18.execute("CREATE TABLE one (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)", database)
    with Database(proxy.url(pg18.url(database, driver)), pool_ping_after=60) as db:
        for _ in range(2):  # the second without connecting
            proxy.reset()
            with record_statements(db) as recording, pytest.raises(IntegrityError):
                with db.session() as session:
                    session.execute(text("INSERT INTO one VALUES (1), (1)"))
        assert compare(recording, proxy) == 3
        assert [each.sql for each in recording.statements][-1] == "COMMIT"

        with record_statements(db) as recording, pytest.raises(OperationalError):
            with db.session() as session:
                session.execute(text("SELECT 1"))
                proxy.cut()
                session.execute(text("SELECT 2"))
        sent = [each.sql for each in recording.statements]
        assert sent == ["BEGIN", "SELECT 1", "SELECT 2"]  # and no ROLLBACK: there is no connection


def test_engines_in_autocommit_count_what_the_wire_counts(
    proxy: WireProxy, postgres_url: str
) -> None:
    options = {"isolation_level": "AUTOCOMMIT"}
    with Database(proxy.url(postgres_url), engine_options=options, pool_ping_after=60) as db:
        for _ in range(2):  # the second without connecting
            proxy.reset()
            with record_statements(db) as recording, db.session() as session:
                session.execute(text("SELECT 1"))
        assert compare(recording, proxy) == 1


@pytest.fixture
def sqlite_database(sqlite_url: str) -> Iterator[tuple[Database, list[str]]]:
    """A database, and what SQLite itself says that it has run."""
    ran: list[str] = []
    with Database(sqlite_url, metadata=Model.metadata) as db:
        db.create_all()
        with db.session() as session:
            session.add(Item(id=1))

        @event.listens_for(db.engine, "checkout")
        def trace(connection: Any, record: object, proxy: object) -> None:
            connection.set_trace_callback(ran.append)

        yield db, ran


@pytest.mark.parametrize("load", [load for load in LOADS if load != "many rows"])
def test_a_trip_of_sqlite_is_a_statement(
    load: str, sqlite_database: tuple[Database, list[str]]
) -> None:
    db, ran = sqlite_database
    options, work = LOADS[load]
    for _ in range(2):
        ran.clear()
        with record_statements(db) as recording:
            try:
                with db.session(**options) as session:
                    work(session)
            except ZeroDivisionError:
                pass
        sent = [statement.sql for statement in recording.statements]
        ran_for_us = [each for each in ran if "PRAGMA" not in each]  # those are engineroom's own
        assert plain(sent) == plain(ran_for_us)
        assert recording.round_trips == len(sent) == TRIPS[load]


# -- whose it is, and how it is told -----------------------------------------------------------


def line_of(mark: str, function: str) -> str:
    """Return the line of this file that ends with a mark, as a recording writes it."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))
    return f"{__file__}:{number} in {function}"


async def ask_three_times(db: AsyncSession) -> None:
    for number in range(3):
        await db.scalar(select(Item.value).where(Item.value == SECRET + number))  # asks


async def test_the_message_lists_statements_with_their_lines_and_no_values(
    driver_url: str,
) -> None:
    async with DatabaseSessionManager().init(driver_url, metadata=Model.metadata) as manager:
        await manager.create_all()
        with pytest.raises(AssertionError) as failure:
            with assert_round_trips(3, manager):
                async with manager.session() as db:  # opens
                    await ask_three_times(db)
    message = str(failure.value)
    lines = message.splitlines()
    assert lines[0] == "5 round trips were made where 3 were expected:"
    assert lines[1::2][0] == "    1 × BEGIN"
    assert lines[1::2][1].startswith("    3 × SELECT item.value FROM item WHERE item.value = ")
    assert lines[1::2][2] == "    1 × COMMIT"
    asks, opens = (
        line_of("asks", "ask_three_times"),
        line_of("opens", "test_the_message_lists_statements_with_their_lines_and_no_values"),
    )
    assert [line.split(" at ")[1] for line in lines[2::2]] == [asks, asks, opens]
    assert str(SECRET)[:-1] not in message


def test_lines_of_the_synchronous_side(sqlite_database: tuple[Database, list[str]]) -> None:
    db, _ = sqlite_database
    with record_statements(db) as recording:
        with db.session() as session:  # opens here
            session.scalar(text("SELECT 1"))  # asks here
    name = "test_lines_of_the_synchronous_side"
    asks, opens = line_of("asks here", name), line_of("opens here", name)
    assert [each.where for each in recording.statements] == [asks, asks, opens]


async def test_nothing_sent_is_told_too(driver_url: str) -> None:
    async with DatabaseSessionManager().init(driver_url) as manager:
        with pytest.raises(AssertionError, match="0 round trips .* 1 .*:\nnothing was sent"):
            with assert_round_trips(1, manager):
                pass
        with assert_round_trips(0, manager):
            pass


# -- what is heard, and when -------------------------------------------------------------------


async def test_other_threads_loops_and_engines_made_inside_are_heard(driver_url: str) -> None:
    async def read(number: int) -> None:
        async with manager.reader() as db:
            await db.scalar(text(f"SELECT {number}"))

    def read_on_the_other_side() -> None:
        with manager.sync.reader() as db:
            db.scalar(text("SELECT 3"))

    async with DatabaseSessionManager().init(driver_url) as manager:
        with record_statements(manager) as recording:
            await read(1)
            await asyncio.to_thread(lambda: asyncio.run(read(2)))
            await asyncio.to_thread(read_on_the_other_side)
            with record_statements(manager.sync) as inner:
                await asyncio.gather(read(4), read(4))
        await read(5)
    asked = [statement.sql for statement in recording.statements]
    assert asked == ["SELECT 1", "SELECT 2", "SELECT 3", "SELECT 4", "SELECT 4"]
    assert [statement.sql for statement in inner.statements] == ["SELECT 4", "SELECT 4"]


def test_other_managers_are_not_heard(sqlite_url: str, tmp_path: Path) -> None:
    with Database(sqlite_url) as heard, Database(f"sqlite:///{tmp_path}/other") as other:
        with assert_round_trips(1, heard):
            for db in (heard, other):
                with db.reader() as session:
                    session.scalar(text("SELECT 1"))


def test_a_transaction_from_before_the_block_has_begun(
    sqlite_database: tuple[Database, list[str]],
) -> None:
    db, _ = sqlite_database
    with db.session() as session:
        get(session)
        with record_statements(db) as recording:
            get(session)
            session.commit()
    assert [each.sql.split()[0] for each in recording.statements] == ["SELECT", "COMMIT"]


def test_what_a_block_raises_passes_and_nothing_listens_on(sqlite_url: str) -> None:
    with Database(sqlite_url) as db:
        with pytest.raises(ZeroDivisionError):
            with assert_round_trips(7, db):
                raise ZeroDivisionError
        assert counting._ears._recorders == ()


def test_without_an_open_manager_it_says_so(sqlite_url: str) -> None:
    manager = DatabaseSessionManager()
    with pytest.raises(errors.NotInitialized, match=r"record_statements\(\): .* init\(url\)"):
        with record_statements(manager):
            pass
    closed = Database(sqlite_url)
    closed.close()
    with pytest.raises(errors.ManagerClosed):
        with assert_round_trips(1, closed):
            pass


async def test_without_a_manager_it_is_the_applications_own(sqlite_url: str) -> None:
    async with session_manager.init(sqlite_url):
        with assert_round_trips(1) as recording:
            async with session_manager.reader() as db:
                await db.scalar(text("SELECT 1"))
    assert str(recording).splitlines()[0] == "    1 × SELECT 1"


def test_recordings_begin_and_end_while_others_work(
    sqlite_database: tuple[Database, list[str]],
) -> None:
    db, _ = sqlite_database
    done = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not done.is_set():
                with db.reader() as session:
                    get(session)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for _ in range(300):
        with record_statements(db), db.reader() as session:
            get(session)
    done.set()
    for worker in workers:
        worker.join()
    assert failures == []
