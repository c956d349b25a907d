"""BEGIN travels with the first statement, by psycopg's pipeline: trips, errors, and when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from scenario import Item, Model
from sqlalchemy import event, insert, text
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.orm import Session

from engineroom import Database, DatabaseSessionManager
from engineroom.errors import InvalidOption
from engineroom.testing import PostgresServer, WireProxy

FIRST = text("SELECT 1")
STATE = text("SELECT current_setting('transaction_isolation'), now() = statement_timestamp()")


class Units:
    """One door of a manager behind a proxy, and what a unit of work there has sent."""

    def __init__(
        self, side: str, proxy: WireProxy, url: str, warm: int = 4, **options: Any
    ) -> None:
        self.side, self.proxy = side, proxy
        self.manager = DatabaseSessionManager().init(
            proxy.url(url), metadata=Model.metadata, pool_size=1, pool_ping_after=60, **options
        )
        self.manager.sync.create_all()
        self.loop = asyncio.new_event_loop()
        for _ in range(warm):
            self(lambda db: db.execute(FIRST))

    def __call__(self, work: Callable[[Session], object], **options: Any) -> tuple[int, list[str]]:
        """Run a unit; return its round trips and statements."""
        self.proxy.reset()
        if self.side == "sync":
            with self.manager.sync_session(**options) as db:
                work(db)
        else:

            async def main() -> None:
                async with self.manager.session(**options) as db:
                    await db.run_sync(work)

            self.loop.run_until_complete(main())
        return self.proxy.round_trips, self.proxy.statements

    def close(self) -> None:
        """Close the manager where its connections are."""
        self.loop.run_until_complete(self.manager.close())
        self.loop.close()


@pytest.fixture(params=["sync", "async"])
def opened(
    request: pytest.FixtureRequest, proxy: WireProxy, pg18: PostgresServer, database: str
) -> Iterator[Callable[..., Units]]:
    made: list[Units] = []

    def open_units(**options: Any) -> Units:
        url = pg18.url(database, "psycopg")
        made.append(Units(request.param, proxy, url, **{"pipeline": "on"} | options))
        return made[-1]

    yield open_units
    for units in made:
        units.close()


def test_a_write_is_two_trips_and_nothing_is_none(opened: Callable[..., Units]) -> None:
    units = opened()
    trips, sent = units(lambda db: db.execute(insert(Item).values(id=1, value=7)))
    assert (trips, sent[0], sent[-1], len(sent)) == (2, "BEGIN", "COMMIT", 3)
    assert units(lambda db: None) == (0, [])
    found: list[Any] = []
    assert units(lambda db: found.append(db.get_one(Item, 1).value))[0] == 2
    assert found == [7]


def test_off_is_three_trips(opened: Callable[..., Units]) -> None:
    assert opened(pipeline="off")(lambda db: db.execute(FIRST))[0] == 3


@pytest.mark.parametrize("at", [0, 1])
def test_an_error_rolls_back_and_the_next_finds_nothing_of_it(
    opened: Callable[..., Units], at: int
) -> None:
    units = opened()

    def fail(db: Session) -> None:
        for _ in range(at):
            db.execute(insert(Item).values(id=1))
        db.execute(text("SELECT 1 / (1 - :one)"), {"one": 1})

    with pytest.raises(DataError):
        units(fail)
    assert units.proxy.statements[-1] == "ROLLBACK"
    with pytest.raises(ProgrammingError):  # the client's own: nothing of the statement was sent
        units(lambda db: db.execute(text("SELECT :what"), {"what": object()}))
    found: list[Any] = []
    units(lambda db: found.append(db.scalar(text("SELECT count(*) FROM item"))))
    assert found == [0]


def test_options_of_a_transaction_travel_with_it(opened: Callable[..., Units]) -> None:
    units = opened()
    found: list[Any] = []

    def look(db: Session) -> None:
        found.append(tuple(db.execute(STATE).one()))

    trips, sent = units(look, read_only=True, isolation_level="SERIALIZABLE")
    assert (trips, sent[0]) == (2, "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY")
    units(look)
    assert [level for level, _ in found] == ["serializable", "read committed"]
    with pytest.raises(DBAPIError, match="read-only"):
        units(lambda db: db.execute(insert(Item).values(id=1)), read_only=True)
    alone = units(lambda db: db.execute(FIRST), isolation_level="AUTOCOMMIT")
    assert alone == (1, ["SELECT 1"])
    assert units(lambda db: db.execute(FIRST))[0] == 2
    trips, sent = units(lambda db: db.execute(FIRST), statement_timeout=2)
    assert (trips, sent[1]) == (3, "SET LOCAL statement_timeout = 2000")


def several(db: Session) -> None:
    db.connection().exec_driver_sql("SELECT 1; SELECT 2")


def many(db: Session) -> None:
    db.connection().exec_driver_sql("INSERT INTO item VALUES (%s, 7)", [(1,), (2,)])


def streamed(db: Session) -> None:
    rows = db.execute(text("SELECT generate_series(1, 3)"), execution_options={"yield_per": 1})
    assert list(rows.scalars()) == [1, 2, 3]


@pytest.mark.parametrize("work", [several, many, streamed])
def test_what_no_pipeline_takes_begins_as_ever(opened: Callable[..., Units], work: Any) -> None:
    units = opened()
    _, sent = units(work)
    assert (sent[0], sent.count("BEGIN"), sent[-1]) == ("BEGIN", 1, "COMMIT")
    assert units(lambda db: db.execute(FIRST))[0] == 2


@pytest.mark.parametrize("direction", ["TO STDOUT", "FROM STDIN"])
def test_the_text_of_a_copy_is_refused_as_ever(
    opened: Callable[..., Units], direction: str
) -> None:
    """There is no way out of a pipeline then; what is raised says what was wrong.

    psycopg says it in one way where the server answers at once, and in another where it does not.
    """
    units = opened()
    with pytest.raises(
        (ProgrammingError, NotSupportedError),
        match="COPY cannot be used (with this method|in pipeline mode)",
    ):
        units(lambda db: db.execute(text(f"COPY item {direction}")))
    units(lambda db: db.execute(FIRST))
    assert units(lambda db: db.execute(FIRST))[0] == 2


def test_a_connection_that_comes_back_in_a_pipeline_is_not_lent_again(
    pg18: PostgresServer, database: str
) -> None:
    """As one does where a signal strikes between two lines."""
    with Database(pg18.url(database, "psycopg"), pool_size=1, max_overflow=0) as door:
        left: Any = door.get_engine().raw_connection()
        left.driver_connection.pgconn.enter_pipeline_mode()
        left.close()
        with door.session() as db:
            assert db.scalar(FIRST) == 1


def test_a_savepoint_may_come_first(opened: Callable[..., Units]) -> None:
    def nest(db: Session) -> None:
        with db.begin_nested():
            db.execute(insert(Item).values(id=1))
        nested = db.begin_nested()
        db.execute(insert(Item).values(id=2))
        nested.rollback()

    units = opened()
    _, sent = units(nest)
    assert sent[0] == "BEGIN"
    assert sent.count("BEGIN") == 1
    assert sent[1].startswith("SAVEPOINT")
    found: list[Any] = []
    units(lambda db: found.extend(db.scalars(text("SELECT id FROM item"))))
    assert found == [1]


def test_who_uses_the_driver_is_in_the_transaction(pg18: PostgresServer, database: str) -> None:
    with Database(pg18.url(database, "psycopg"), pipeline="on") as door:
        for make in (lambda raw: raw.cursor(), psycopg.ClientCursor):
            with door.session() as db:
                raw: Any = db.connection().connection.driver_connection
                assert raw.autocommit is False
                with make(raw) as cursor:
                    cursor.execute("CREATE TABLE kept_for_nobody (id int)")
                db.rollback()
                assert db.scalar(text("SELECT to_regclass('kept_for_nobody')")) is None


def test_a_connection_that_ends_with_its_first_statement_is_replaced(
    opened: Callable[..., Units],
) -> None:
    units = opened()
    with pytest.raises(OperationalError):
        units(lambda db: db.execute(text("SELECT pg_terminate_backend(pg_backend_pid())")))
    units(lambda db: db.execute(FIRST))
    assert units(lambda db: db.execute(FIRST))[0] == 2


def plainly(db: Session, number: int) -> None:
    db.execute(insert(Item).values(id=number))


def nested(db: Session, number: int) -> None:
    with db.begin_nested():
        db.execute(insert(Item).values(id=number))


@pytest.mark.parametrize("side", ["sync", "async"])
def test_a_backend_that_was_gone_before_begin_came_costs_no_unit_an_error(
    pg18: PostgresServer, database: str, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What it said last is on its way for 300 ms: who looks at the socket sees nothing."""
    units = [(plainly, {}), (nested, {}), (plainly, {"statement_timeout": 9.0})]
    gone = f"SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = '{database}'"
    kill = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
    everyone = range(20)

    def unit(number: int) -> None:
        work, options = units[number % 3]
        with manager.sync_session(**options) as db:
            work(db, number)

    async def unit_on_loop(number: int) -> None:
        work, options = units[number % 3]
        async with manager.session(**options) as db:
            await db.run_sync(work, number)

    async def warm_on_loop(number: int) -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT pg_sleep(0.5)"))

    def warm(number: int) -> None:
        with manager.sync_session() as db:
            db.execute(text("SELECT pg_sleep(0.5)"))

    def end_all() -> None:
        proxy.delay = 0.6
        with psycopg.connect(pg18.url("postgres"), autocommit=True) as looking:
            looking.execute(kill)
            while looking.execute(gone).fetchone() != (True,):
                pass
        time.sleep(0.012)

    async def main() -> None:
        async with manager:
            await asyncio.gather(*map(warm_on_loop, everyone))
            end_all()
            await asyncio.gather(*map(unit_on_loop, everyone))

    caplog.set_level("INFO", "engineroom.pool")
    with WireProxy(pg18.host, pg18.port) as proxy:
        manager = DatabaseSessionManager().init(
            proxy.url(pg18.url(database, "psycopg")), metadata=Model.metadata, pool_size=20,
            pool_ping_after=60, pipeline="on",
        )  # fmt: skip
        with Database(pg18.url(database, "psycopg"), metadata=Model.metadata) as beside:
            beside.create_all()
        if side == "async":
            asyncio.run(main())
        else:
            with manager.sync, ThreadPoolExecutor(20) as threads:
                list(threads.map(warm, everyone))
                end_all()
                list(threads.map(unit, everyone))
    assert "A connection was dead before anything was done" in caplog.text
    assert pg18.execute("SELECT count(*) FROM item", database) == [["20"]]


def test_what_was_on_its_way_with_an_answered_begin_is_not_repeated(
    opened: Callable[..., Units], pg18: PostgresServer, database: str
) -> None:
    pg18.execute("CREATE SEQUENCE drawn", database)
    runs = f"SELECT pid FROM pg_stat_activity WHERE datname = '{database}' AND query ~ 'pg_sleep'"
    units = opened()

    def kill() -> None:
        while not (found := pg18.execute(runs)):
            pass
        pg18.execute(f"SELECT pg_terminate_backend({found[0][0]})")

    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill)
        with pytest.raises(OperationalError):
            units(lambda db: db.execute(text("SELECT nextval('drawn'), pg_sleep(9)")))
        killed.result()
    assert pg18.execute("SELECT last_value FROM drawn", database) == [["1"]]


def test_who_is_idle_after_the_first_statement_is_ended(opened: Callable[..., Units]) -> None:
    """psycopg's own way out of a pipeline would have the server forget that."""
    units = opened(idle_in_transaction_timeout=0.3)

    def hold(db: Session) -> None:
        db.execute(FIRST)
        time.sleep(0.8)
        db.execute(FIRST)

    with pytest.raises(DBAPIError):
        units(hold)


def test_a_cancelled_first_statement_ends_on_the_server(
    pg18: PostgresServer, database: str, eventually: Callable[..., None]
) -> None:
    running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(77)' || ''"

    async def main() -> None:
        manager = DatabaseSessionManager().init(pg18.url(database, "psycopg"), pipeline="on")
        async with manager:
            for steps in range(6):
                async with asyncio.timeout(20):
                    task = asyncio.create_task(sleep(manager))
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    if steps == 5:
                        await asyncio.sleep(0.3)  # it runs
                    task.cancel()
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
            async with manager.session() as db:
                assert await db.scalar(FIRST) == 1

    async def sleep(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT pg_sleep(77)"))

    asyncio.run(main())
    with psycopg.connect(pg18.url(database, "psycopg").replace("+psycopg", "")) as looking:
        eventually(lambda: looking.execute(running).fetchone() == (0,))


@pytest.mark.parametrize("side", ["sync", "async"])
@pytest.mark.parametrize(("delay", "trips"), [(0.01, 2), (0.0, 3)])
def test_auto_pipelines_where_the_server_is_far(
    pg18: PostgresServer, database: str, side: str, delay: float, trips: int
) -> None:
    seen = []
    with WireProxy(pg18.host, pg18.port, delay=delay) as proxy:
        for _ in range(5):  # on a busy machine, one that is near may look far
            units = Units(side, proxy, pg18.url(database, "psycopg"), warm=12)
            seen.append(units(lambda db: db.execute(FIRST))[0])
            units.close()
            if seen[-1] == trips:
                break
    assert seen[-1] == trips, seen


def test_a_connect_hook_may_have_cursors_of_its_own(pg18: PostgresServer, database: str) -> None:
    """Made of ours, as it finds them there: they stay, however near the server is."""
    counted: list[str] = []
    with Database(pg18.url(database, "psycopg"), pool_size=1) as db:

        @event.listens_for(db.engine, "connect")
        def count(connection: Any, record: object) -> None:
            class Counting(connection.cursor_factory):  # type: ignore[misc]
                def execute(self, query: str, *arguments: Any, **options: Any) -> Any:
                    counted.append(query)
                    return super().execute(query, *arguments, **options)

            connection.cursor_factory = Counting

        for _ in range(5):
            with db.session() as session:
                session.execute(FIRST)
    assert counted.count("SELECT 1") == 5


@pytest.mark.parametrize("size", [100_000, 8_000_000])
def test_what_does_not_fit_on_the_wire_at_once_is_sent(
    opened: Callable[..., Units], size: int
) -> None:
    units = opened()
    found: list[Any] = []
    two = text("SELECT length(:one), length(:other)")
    values = {"one": "x" * size, "other": "y" * size}
    for _ in range(7):  # prepared as well
        units(lambda db: found.append(tuple(db.execute(two, values).one())))
    assert found == [(size, size)] * 7


@pytest.mark.parametrize("side", ["sync", "async"])
@pytest.mark.parametrize("warm", [4, 8])  # psycopg prepares at the sixth
def test_a_frozen_server_is_known_by_its_begin(
    pg18: PostgresServer, database: str, proxy: WireProxy, side: str, warm: int
) -> None:
    """It travels with a statement, and is answered before that: what takes long is not cut."""
    url = pg18.url(database, "psycopg")
    units = Units(side, proxy, url, warm, pipeline="on", response_timeout=0.5)
    assert units(lambda db: db.execute(text("SELECT pg_sleep(1.2)")))[0] == 2
    fault = proxy.freeze_before("BEGIN")
    try:
        with pytest.raises(DBAPIError) as caught:
            units(lambda db: db.execute(FIRST))
    finally:
        proxy.thaw()
    assert fault.happened
    told = "The server did not answer BEGIN within 0.5 s (DB_RESPONSE_TIMEOUT)"
    assert any(
        note.startswith(told) and note.endswith("Nothing was committed.")
        for error in (caught.value, caught.value.orig)
        for note in getattr(error, "__notes__", [])
    )
    assert units(lambda db: db.execute(FIRST))[0] >= 2
    units.close()


def test_behind_a_pooler_it_cannot_be_had(postgres_url: str) -> None:
    with pytest.raises(InvalidOption, match="behind a pooler"):
        Database(postgres_url, pipeline="on", pooler="transaction").init()
