"""A server that is silent is not waited for longer than was said, in whatever is asked of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any

import pytest
from scenario import Item, Log, Model, backends, fork, loop_factory, run, until
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from engineroom import Database, DatabaseSessionManager
from engineroom.deadlines import WATCH
from engineroom.departures import GONE_LIMIT
from engineroom.errors import ConnectTimeout
from engineroom.testing import PostgresServer, WireProxy

WITHIN = 0.5  # seconds: every limit of these tests
ROOM = 1.0  # seconds that are promised beyond it
LIMITS: dict[str, Any] = {
    "response_timeout": WITHIN,
    "pool_ping_after": 60,
    "pool_size": 1,
    "max_overflow": 0,
}
SIDES = [("async", "asyncpg"), ("async", "psycopg"), ("sync", "psycopg"), ("sync", "psycopg2")]
every_side = pytest.mark.parametrize(("side", "driver"), SIDES)


class Door:
    """One manager, used from either side by the same functions."""

    def __init__(self, side: str, url: str, **options: Any) -> None:
        self.side = side
        self.manager = DatabaseSessionManager().init(url, metadata=Model.metadata, **options)
        self.runner = asyncio.Runner()
        self.unit(lambda db: db.execute(text("SELECT 1")))

    def unit(self, work: Callable[[Session], object]) -> None:
        if self.side == "sync":
            with self.manager.sync_session() as db:
                work(db)
        else:
            self.runner.run(self._unit(work))

    async def _unit(self, work: Callable[[Session], object]) -> None:
        async with self.manager.session() as db:
            await db.run_sync(work)

    def show(self, options: dict[str, Any]) -> list[str]:
        """Return the isolation level and whether it is read-only, of a transaction with these."""
        if self.side == "sync":
            with self.manager.sync_session(**options) as db:
                return shown(db)

        async def main() -> list[str]:
            async with self.manager.session(**options) as db:
                return await db.run_sync(shown)

        return self.runner.run(main())

    def leave(self, statement: str, then: Callable[[], object]) -> float:
        """Leave something, do that, and return when the connection was given back."""
        options = {"isolation_level": "AUTOCOMMIT"}
        if self.side == "sync":
            with self.manager.sync.connect(**options) as connection:
                connection.execute(text(statement))
                then()
                return time.monotonic()

        async def leave() -> float:
            async with self.manager.connect(**options) as connection:
                await connection.execute(text(statement))
                then()
                return time.monotonic()

        return self.runner.run(leave())

    def lent(self) -> int:
        return sum(pool.lent for pool in self.manager.stats().pools)

    def close(self) -> None:
        self.runner.run(self.manager.close())
        self.runner.close()


def shown(db: Session) -> list[str]:
    names = "transaction_isolation", "transaction_read_only"
    return [str(db.scalar(text(f"SHOW {name}"))) for name in names]


@pytest.fixture
def door(
    request: pytest.FixtureRequest, pg18: PostgresServer, database: str, proxy: WireProxy
) -> Iterator[Callable[..., Door]]:
    opened: list[Door] = []

    def open_door(side: str, driver: str, **options: Any) -> Door:
        opened.append(Door(side, proxy.url(pg18.url(database, driver)), **(LIMITS | options)))
        return opened[-1]

    yield open_door
    proxy.thaw()
    for one in opened:
        one.close()


def notes(error: BaseException | None) -> str:
    """What is written on an error and on those that it came of."""
    found: list[str] = []
    while error is not None:
        found += getattr(error, "__notes__", [])
        error = error.__cause__
    return " ".join(found)


def insert(db: Session) -> None:
    db.add(Item(id=1))


def ask(db: Session) -> None:
    db.execute(text("SELECT 3"))


def roll_back(db: Session) -> None:
    ask(db)
    db.rollback()


@pytest.mark.parametrize(
    ("what", "work", "options", "told", "within"),
    [
        ("BEGIN", ask, {}, "Nothing was done", WITHIN),
        ("SELECT 3", ask, {"statement_timeout": 0.1}, "DB_STATEMENT_TIMEOUT", 0.6),
        ("COMMIT", ask, {}, "Whether the transaction was committed is unknown", WITHIN),
        ("ROLLBACK", roll_back, {}, "", WITHIN),
    ],
    ids=["BEGIN", "statement", "COMMIT", "ROLLBACK"],
)
@every_side
def test_a_wire_that_is_silent_is_cut(
    door: Callable[..., Door],
    proxy: WireProxy,
    caplog: pytest.LogCaptureFixture,
    side: str,
    driver: str,
    what: str,
    work: Callable[[Session], None],
    options: dict[str, Any],
    told: str,
    within: float,
) -> None:
    one = door(side, driver, **options)
    fault = proxy.freeze_before(what)
    with caplog.at_level(logging.WARNING, "engineroom"):
        began = time.monotonic()
        with pytest.raises(DBAPIError) as caught:
            one.unit(work)
        took = time.monotonic() - began
    assert fault.happened
    assert took < within + ROOM
    assert told in notes(caught.value)
    spoken = "a statement" if what == "SELECT 3" else what
    (line,) = [each for each in caplog.messages if "did not answer" in each]
    assert f"did not answer {spoken} within {within:g} s" in line
    assert one.lent() == 0
    proxy.thaw()
    one.unit(ask)


@every_side
def test_a_statement_may_take_its_time_where_nothing_else_was_said(
    door: Callable[..., Door], side: str, driver: str
) -> None:
    one = door(side, driver)
    one.unit(lambda db: db.execute(text(f"SELECT pg_sleep({WITHIN + 0.5})")))
    one.unit(ask)


@every_side
def test_a_session_may_have_a_longer_one(
    door: Callable[..., Door], pg18: PostgresServer, side: str, driver: str
) -> None:
    one = door(side, driver, statement_timeout=0.1)
    slow = text("SELECT pg_sleep(1.5)")
    if side == "sync":
        with one.manager.sync_session(statement_timeout=5) as db:
            db.execute(slow)
    else:

        async def main() -> None:
            async with one.manager.session(statement_timeout=0) as db:
                await db.execute(slow)

        one.runner.run(main())
    with pytest.raises(DBAPIError):
        one.unit(lambda db: db.execute(slow))
    one.unit(ask)


@every_side
def test_a_session_may_have_one_of_its_own(
    door: Callable[..., Door], proxy: WireProxy, side: str, driver: str
) -> None:
    one = door(side, driver)
    fault = proxy.freeze_before("SELECT 3")
    began = time.monotonic()
    with pytest.raises(DBAPIError) as caught:
        if side == "sync":
            with one.manager.sync_session(statement_timeout=0.1) as db:
                ask(db)
        else:

            async def main() -> None:
                async with one.manager.session(statement_timeout=0.1) as db:
                    await db.run_sync(ask)

            one.runner.run(main())
    assert time.monotonic() - began < 0.6 + ROOM
    assert fault.happened
    assert "statement_timeout=0.1 of this session" in notes(caught.value)


@every_side
def test_a_long_statement_is_not_taken_for_a_begin(
    door: Callable[..., Door], side: str, driver: str
) -> None:
    """Nor is one that its driver has prepared, as psycopg does at the sixth."""
    one = door(side, driver)
    seconds = text("SELECT pg_sleep(CAST(:seconds AS float))")
    for _ in range(8):
        one.unit(lambda db: db.execute(seconds, {"seconds": 0.0}))
    one.unit(lambda db: db.execute(seconds, {"seconds": 2 * WITHIN + ROOM}))


@every_side
def test_a_commit_that_was_cut_off_is_told_as_unknown_once(
    door: Callable[..., Door], pg18: PostgresServer, proxy: WireProxy, side: str, driver: str
) -> None:
    one = door(side, driver)
    one.manager.sync.create_all()
    proxy.freeze_after("COMMIT")  # it was committed
    with pytest.raises(DBAPIError) as caught:
        one.unit(insert)
    assert "is unknown" in notes(caught.value)
    proxy.thaw()
    found: list[int] = []
    one.unit(lambda db: found.extend(db.scalars(text("SELECT id FROM item"))))
    assert found == [1]


@pytest.mark.parametrize("ends", ["beyond pool_size", "recycled", "left a relation"])
@pytest.mark.anyio
async def test_nobody_waits_for_the_end_of_a_connection(
    postgres_url: str, proxy: WireProxy, ends: str
) -> None:
    """asyncpg's own `close()` waits for the server to hang up as well."""
    one: Any = {"pool_size": 1, "max_overflow": 0, "pool_recycle": 1}
    options = {"beyond pool_size": one | {"max_overflow": 1, "pool_recycle": -1}}.get(ends, one)
    async with DatabaseSessionManager().init(proxy.url(postgres_url), **options) as manager:
        async with manager.connect(isolation_level="AUTOCOMMIT") as db:
            await db.execute(text("SELECT 1"))
            if ends == "beyond pool_size":
                async with manager.connect(isolation_level="AUTOCOMMIT") as other:
                    await other.execute(text("SELECT 1"))
            elif ends == "left a relation":
                await db.execute(text("CREATE TEMPORARY TABLE here (id int)"))
            else:
                await asyncio.sleep(1.0)
            proxy.freeze()
            ended = asyncio.get_running_loop().time()
        took = asyncio.get_running_loop().time() - ended
        (pool,) = manager.stats().pools
        proxy.thaw()
        assert took < ROOM
        assert (pool.lent, pool.holders) == (0, ())
        async with manager.session() as db:
            assert await db.scalar(text("SELECT 1")) == 1


# -- a server that is stopped ------------------------------------------------------------------


@every_side
def test_a_stopped_server_holds_nobody(pg16: PostgresServer, side: str, driver: str) -> None:
    name = pg16.create_database()
    options = LIMITS | {"pool_timeout": 2, "statement_timeout": 0.1}
    one = Door(side, pg16.url(name, driver), **options)

    def freezing(before: Callable[[Session], object], after: Callable[[Session], object]) -> Any:
        def work(db: Session) -> None:
            before(db)
            pg16.freeze()
            after(db)

        return work

    nothing: Callable[[Session], object] = lambda db: None  # noqa: E731
    cases = {
        "BEGIN": (freezing(nothing, ask), WITHIN),
        "statement": (freezing(ask, ask), 0.6),
        "COMMIT": (freezing(ask, nothing), WITHIN),
        "ROLLBACK": (freezing(ask, Session.rollback), WITHIN),
    }
    try:
        for work, within in cases.values():
            began = time.monotonic()
            try:
                with pytest.raises(DBAPIError):
                    one.unit(work)
                took = time.monotonic() - began
            finally:
                pg16.thaw()
            assert took < within + ROOM
            one.unit(ask)
            assert one.lent() == 0
        pg16.freeze()
        began = time.monotonic()
        one.close()
        assert time.monotonic() - began < 5 + ROOM
    finally:
        pg16.thaw()
        pg16.drop_database(name)


@every_side
def test_a_stopped_server_holds_no_stream(pg16: PostgresServer, side: str, driver: str) -> None:
    """Each time that rows are asked for is a statement; closing the cursor is one too."""
    name = pg16.create_database()
    one = Door(side, pg16.url(name, driver), **LIMITS | {"statement_timeout": 0.1})

    def stream(db: Session) -> None:
        rows = db.execute(text("SELECT generate_series(1, 1000)").execution_options(yield_per=10))
        for (number,) in rows:
            if number == 10:
                pg16.freeze()

    began = time.monotonic()
    try:
        with pytest.raises(Exception) as caught:  # noqa: PT011  # SQLAlchemy wraps none of asyncpg's
            one.unit(stream)
        took = time.monotonic() - began
    finally:
        pg16.thaw()
    assert took < 0.6 + ROOM
    assert "DB_STATEMENT_TIMEOUT" in notes(caught.value)
    one.unit(ask)
    one.close()
    pg16.drop_database(name)


@pytest.mark.parametrize("limit", [0.3, 1, 2])
@every_side
def test_a_stopped_server_holds_no_checkout(
    pg16: PostgresServer, side: str, driver: str, limit: float
) -> None:
    """An idle connection is asked in vain, and another one cannot be opened."""
    name = pg16.create_database()
    options = LIMITS | {"pool_timeout": limit, "pool_ping_after": 0}
    one = Door(side, pg16.url(name, driver), **options)
    pg16.freeze()
    began = time.monotonic()
    try:
        with pytest.raises((DBAPIError, ConnectTimeout)):
            one.unit(ask)
        took = time.monotonic() - began
    finally:
        pg16.thaw()
    assert took < limit + ROOM
    one.unit(ask)
    one.close()
    pg16.drop_database(name)


@every_side
def test_a_stopped_server_holds_no_cleaning(pg16: PostgresServer, side: str, driver: str) -> None:
    name = pg16.create_database()
    one = Door(side, pg16.url(name, driver), **LIMITS)
    began = one.leave("SET app.tenant = 'a'", pg16.freeze)
    try:
        took = time.monotonic() - began
    finally:
        pg16.thaw()
    assert took < 2 + ROOM
    one.unit(ask)
    one.close()
    pg16.drop_database(name)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_stopped_server_holds_no_end_of_a_loop(
    pg16: PostgresServer, driver: str, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncpg waits for the answer to its farewell, of one connection after the other."""
    url = pg16.url(pg16.create_database(), driver)
    manager = DatabaseSessionManager().init(url)

    async def one() -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT pg_sleep(0.05)"))

    async def main() -> None:
        await asyncio.gather(one(), one(), one())
        pg16.freeze()

    began = time.monotonic()
    try:
        with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
            runner.run(main())
            began = time.monotonic()
        took = time.monotonic() - began
    finally:
        pg16.thaw()
    assert took < GONE_LIMIT + ROOM
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []
    manager.sync.close()
    until(lambda: backends(url), lambda left: left == [])


def longest_gap(stop: threading.Event, found: list[float]) -> None:
    """Find for how long no other thread ran."""
    last = time.monotonic()
    while not stop.wait(0.02):
        found.append(time.monotonic() - last)
        last = time.monotonic()


@every_side
def test_a_stopped_server_holds_no_close(pg16: PostgresServer, side: str, driver: str) -> None:
    """What open scopes hold is to be ended on the server, which takes no cancel request either."""
    name = pg16.create_database()
    options = LIMITS | {"pool_size": 3}
    manager = DatabaseSessionManager().init(pg16.url(name, driver), **options)
    stop, gaps, took = threading.Event(), [0.0], [0.0]
    beat = threading.Thread(target=longest_gap, args=(stop, gaps))
    thaw = threading.Timer(15, pg16.thaw)

    def close_in_thread() -> None:
        everyone = threading.Barrier(4)

        def hold() -> None:
            with contextlib.suppress(Exception), manager.sync_session() as db:
                ask(db)
                everyone.wait()
                stop.wait()

        holders = [threading.Thread(target=hold) for _ in range(3)]
        for holder in holders:
            holder.start()
        everyone.wait()
        pg16.freeze()
        began = time.monotonic()
        manager.sync.close(timeout=0.1)
        took[0] = time.monotonic() - began
        stop.set()
        for holder in holders:
            holder.join()

    async def hold_on_loop(everyone: asyncio.Barrier) -> None:
        async with manager.session() as db:
            await db.run_sync(ask)
            await everyone.wait()
            await asyncio.sleep(30)

    async def close_on_loop() -> None:
        everyone = asyncio.Barrier(4)
        holders = [asyncio.create_task(hold_on_loop(everyone)) for _ in range(3)]
        await everyone.wait()
        pg16.freeze()
        began = time.monotonic()
        await manager.close(timeout=0.1)
        took[0] = time.monotonic() - began
        for holder in holders:
            holder.cancel()
        await asyncio.wait(holders)

    beat.start()
    thaw.start()
    try:
        close_in_thread() if side == "sync" else asyncio.run(close_on_loop())
    finally:
        thaw.cancel()
        pg16.thaw()
        stop.set()
        beat.join()
    assert took[0] < 0.1 + 5 + ROOM
    assert max(gaps) < ROOM
    pg16.drop_database(name)


@every_side
def test_a_deadline_of_a_session_that_sent_nothing_goes_with_it(
    door: Callable[..., Door], proxy: WireProxy, side: str, driver: str
) -> None:
    one = door(side, driver)

    async def on_loop() -> None:
        async with one.manager.session(statement_timeout=7) as db:
            await db.connection()

    if side == "sync":
        with one.manager.sync_session(statement_timeout=7) as db:
            db.connection()
    else:
        one.runner.run(on_loop())
    proxy.reset()
    shown: list[str] = []
    one.unit(lambda db: shown.append(db.scalar(text("SHOW statement_timeout"))))
    assert (shown, proxy.connections) == (["0"], 0)  # and its connection was kept


# -- the thread that looks after threads -------------------------------------------------------


def watchers() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name == "engineroom-deadlines"]


def watched(url: str) -> None:
    database = Database(url, **LIMITS)
    with database.session() as db:
        ask(db)
        assert len(watchers()) == 1
    until(watchers, lambda seen: not seen)  # it ends when nothing is lent
    with database.session() as db:
        ask(db)
        assert len(watchers()) == 1

        def child() -> None:
            assert watchers() == []
            own = Database(url, **LIMITS)
            with own.session() as db:
                ask(db)
                assert len(watchers()) == 1
            own.close()

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python's own of a thread beside a fork, from 3.12 on
            wait = fork(child)
        assert len(watchers()) == 1  # it goes on
        wait()
        assert WATCH._on_duty["thread"].is_alive()
    database.close()


def test_one_thread_watches_while_anything_is_lent(pg18: PostgresServer, database: str) -> None:
    run(watched, pg18.url(database, "psycopg"))


def only_asynchronous(url: str) -> None:
    async def main() -> None:
        async with DatabaseSessionManager().init(url, **LIMITS) as manager:
            async with manager.session() as db:
                await db.execute(text("SELECT 1"))
                assert watchers() == []

    asyncio.run(main())


def test_an_event_loop_needs_no_thread(pg18: PostgresServer, database: str) -> None:
    run(only_asynchronous, pg18.url(database))


def test_a_database_without_a_server_needs_no_thread(sqlite_url: str) -> None:
    until(lambda: len(WATCH._pools), lambda count: count == 0)  # of the tests before
    with Database(sqlite_url) as database, database.session() as db:
        db.execute(text("SELECT 1"))
        assert len(WATCH._pools) == 0


def forked_in_silence(url: str, frozen: str) -> None:
    """The thread that a fork has ended for a moment cuts what the parent waits for."""
    log = Log()
    host, port = frozen.split(":")
    with WireProxy(host, int(port)) as proxy:
        through = Database(proxy.url(url), **LIMITS)
        with through.session() as db:
            ask(db)
        fault = proxy.freeze_before("COMMIT")

        def fork_meanwhile() -> None:
            fault.wait()
            fork(lambda: None)()

        beside = threading.Thread(target=fork_meanwhile)
        beside.start()
        with contextlib.suppress(DBAPIError), through.session() as db:
            ask(db)
        beside.join()
        through.close()
    assert ["did not answer COMMIT" in message for message in log.messages] == [True]


def test_a_fork_keeps_no_deadline_from_its_parent(pg18: PostgresServer, database: str) -> None:
    run(forked_in_silence, pg18.url(database, "psycopg"), f"{pg18.host}:{pg18.port}", deadline=20)


def test_the_limits_are_numbers_of_seconds() -> None:
    for name in ("response_timeout", "statement_timeout"):
        with pytest.raises(ValueError, match=name):
            Database("sqlite://", **{name: -1})  # type: ignore[arg-type]


def over_a_dropped_scope(url: str) -> None:
    """The scope is garbage while its connection lives: nothing hashes what is left of it."""
    logged = SimpleQueue[Any]()
    logging.getLogger("engineroom.pool").addHandler(QueueHandler(logged))
    with Database(url, **LIMITS | {"pool_size": 2}, slow_checkout=0.3) as database:
        connection = database.connect().__enter__()
        connection.execute(text("SELECT 1"))
        gc.collect()
        until(logged.qsize, lambda count: count == 1)
        with database.session() as db:
            ask(db)
            until(logged.qsize, lambda count: count == 2)  # it is looked after all the same
        connection.close()
    assert "by the connection of a scope that was dropped" in logged.get().getMessage()


def test_a_scope_that_was_dropped_ends_no_watch(pg18: PostgresServer, database: str) -> None:
    run(over_a_dropped_scope, pg18.url(database, "psycopg"))


def test_a_connection_that_was_detached_is_cut_as_well(
    door: Callable[..., Door], proxy: WireProxy
) -> None:
    one = door("sync", "psycopg", pool_size=2)
    with one.manager.sync_session() as other:
        ask(other)  # while anything is lent, there is a watch
        with pytest.raises(DBAPIError), one.manager.sync.connect() as connection:
            connection.execute(text("SELECT 3"))
            connection.detach()
            proxy.freeze_before("ROLLBACK")
            began = time.monotonic()
            connection.rollback()
        assert time.monotonic() - began < WITHIN + ROOM
        proxy.thaw()


def over_a_filter_that_raises(url: str) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise ValueError(record.getMessage())

    logging.getLogger("engineroom.pool").addFilter(refuse)
    with Database(url, **LIMITS | {"pool_size": 2}, slow_checkout=0.3) as database:
        with database.session() as db:
            ask(db)
            (thread,) = [
                each for each in threading.enumerate() if each.name == "engineroom-deadlines"
            ]
            time.sleep(1.0)
            assert thread.is_alive()
            logging.getLogger("engineroom.pool").removeFilter(refuse)


def test_what_the_application_raises_in_a_log_ends_no_watch(
    pg18: PostgresServer, database: str
) -> None:
    run(over_a_filter_that_raises, pg18.url(database, "psycopg"))
