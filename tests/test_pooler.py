"""Guarantee 5: behind a pooler in transaction mode no error, and never a value of somebody else."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import psycopg
import pytest
from looking import CANNOT_CONNECT
from pgbouncer import PgBouncer
from pooled import lay_out, share
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from starting import FIRST, SECOND, alembic, models, project, say, starters, together

from engineroom import ConfigurationError, Database, DatabaseSessionManager
from engineroom.backends.postgresql import AdvisoryLock, undeclared
from engineroom.errors import NotBehindPooler
from engineroom.registry import SessionManager
from engineroom.testing import PostgresServer, WireProxy, clones, sandbox

PROCESSES = 4


class Pooled(NamedTuple):
    """A fresh database behind a PgBouncer of its own."""

    server: PostgresServer
    pooler: PgBouncer
    name: str

    def url(self, driver: str | None = None) -> str:
        return self.pooler.url(self.name, driver)


@pytest.fixture(params=[pytest.param("pg16", marks=pytest.mark.soak), "pg18"])
def pooled(request: pytest.FixtureRequest) -> Iterator[Pooled]:
    """One on PostgreSQL 18; in the long runs, one on 16."""
    server: PostgresServer = request.getfixturevalue(request.param)
    name = server.create_database()
    with PgBouncer(server) as pooler:
        yield Pooled(server, pooler, name)
    server.drop_database(name)


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def reports(ends: list[list[Any]]) -> list[dict[str, Any]]:
    assert all(code == 0 for code, _, _ in ends), "\n".join(err for _, _, err in ends)
    return [json.loads(out) for _, out, _ in ends]


def stand_apart(pooled: Pooled, driver: str, queries: int) -> list[dict[str, Any]]:
    server, name = pooled.server, pooled.name
    lay_out(server, name, PROCESSES)
    told = reports(together(PROCESSES, share, pooled.url(driver), queries, deadline=550))
    assert [each["wrong"] for each in told] == [[]] * PROCESSES
    assert all(each["asked"] >= queries for each in told)
    rows = [
        server.execute(f"SELECT count(*) FILTER (WHERE unit < 0) FROM s{number}.done", name)
        for number in range(PROCESSES)
    ]
    assert rows == [[["0"]]] * PROCESSES, "what was rolled back is there"
    return told


def test_four_processes_share_three_connections_and_each_sees_its_own(
    pooled: Pooled, driver: str
) -> None:
    told = stand_apart(pooled, driver, 250)
    assert [each["errors"] for each in told] == [{}] * PROCESSES


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_forty_thousand_queries_on_three_connections(pooled: Pooled, driver: str) -> None:
    told = stand_apart(pooled, driver, 10_000)
    assert [each["errors"] for each in told] == [{}] * PROCESSES


class Unrest(threading.Thread):
    """Pauses, reloads and restarts a pooler, again and again."""

    def __init__(self, pooler: PgBouncer) -> None:
        super().__init__()
        self.pooler = pooler
        self.over = threading.Event()
        self.rounds = 0

    def run(self) -> None:
        while not self.over.wait(0.3):
            self.pooler.console("RELOAD")
            self.pooler.console("PAUSE")
            self.over.wait(0.1)
            self.pooler.console("RESUME")
            self.over.wait(0.3)
            self.pooler.restart()
            self.rounds += 1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def stand_unrest(pooled: Pooled, driver: str, queries: int) -> list[dict[str, Any]]:
    with Unrest(pooled.pooler) as unrest:
        told = stand_apart(pooled, driver, queries)
    assert unrest.rounds > 0
    assert [each["unexplained"] for each in told] == [[]] * PROCESSES
    assert any(each["errors"] for each in told), "nobody noticed a restart"
    return told


def test_a_pooler_that_pauses_reloads_and_restarts(pooled: Pooled, driver: str) -> None:
    stand_unrest(pooled, driver, 500)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_forty_thousand_queries_while_a_pooler_restarts_all_the_time(
    pooled: Pooled, driver: str
) -> None:
    stand_unrest(pooled, driver, 10_000)


# -- what is sent, and what is not ----------------------------------------------------------------


@pytest.fixture
def url(pgbouncer: PgBouncer, database: str, driver: str) -> str:
    """The URL of a fresh database behind the pooler, with a table."""
    with psycopg.connect(pgbouncer.url(database)) as connection:
        connection.execute("CREATE TABLE item (n int)")
    return pgbouncer.url(database, driver)


@pytest.fixture
def wire(pgbouncer: PgBouncer) -> Iterator[WireProxy]:
    """A counting proxy between us and the pooler."""
    with WireProxy(pgbouncer.host, pgbouncer.port) as proxy:
        yield proxy


ONE = text("SELECT CAST(:n AS int)")
# A unit with one statement, and with three: trips of each, by scope and driver.
TRIPS = {
    ("session", "psycopg"): (4, 6),  # one tells the guards, which asyncpg sends with BEGIN
    ("session", "asyncpg"): (4, 8),
    ("reader", "psycopg"): (3, 9),
    ("reader", "asyncpg"): (4, 12),
}


@pytest.mark.anyio
@pytest.mark.parametrize("verb", ["session", "reader"])
async def test_trips(url: str, wire: WireProxy, driver: str, verb: str) -> None:
    """As many as without a pooler, but for asyncpg's second, guards and a reader's transaction."""
    options: Any = {"pooler": "transaction", "pool_ping_after": 60}
    async with DatabaseSessionManager().init(wire.url(url), **options) as manager:
        seen = []
        for count in (1, 1, 3):  # the first connects
            before = wire.round_trips
            async with getattr(manager, verb)() as session:
                for n in range(count):
                    assert await session.scalar(ONE, {"n": n}) == n
            seen.append(wire.round_trips - before)
    assert tuple(seen[1:]) == TRIPS[verb, driver]


@pytest.mark.parametrize("kind", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("guards", ["with", "without"])
def test_trips_of_the_synchronous_side(
    pgbouncer: PgBouncer, database: str, wire: WireProxy, kind: str, guards: str
) -> None:
    where = wire.url(pgbouncer.url(database, kind))
    options: Any = {"idle_in_transaction_timeout": 0} if guards == "without" else {}
    with Database(where, pooler="transaction", pool_ping_after=60, **options) as door:
        for verb in (door.session, door.reader):
            for _ in range(10):  # at the sixth time, psycopg would prepare it
                before = wire.round_trips
                with verb() as session:
                    assert session.scalar(ONE, {"n": 7}) == 7
            guarded = verb == door.session and guards == "with"
            assert wire.round_trips - before == 3 + guarded


@pytest.mark.anyio
async def test_nothing_is_left_prepared_in_a_session_of_the_server(url: str) -> None:
    prepared = text("SELECT name FROM pg_prepared_statements WHERE name <> ''")
    async with DatabaseSessionManager().init(url, pooler="transaction") as manager:
        for n in range(10):
            async with manager.session() as session:
                assert await session.scalar(ONE, {"n": n}) == n
                await session.execute(text("INSERT INTO item VALUES (:n)"), [{"n": n}] * 3)
            async with manager.reader() as session:
                assert await session.scalar(ONE, {"n": n}) == n
                assert (await session.scalars(prepared)).all() == []


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_the_server_refuses_a_readers_writes(url: str, mode: Any) -> None:
    """Each statement alone: what one has failed at, the next does not suffer from."""
    async with DatabaseSessionManager().init(url, pooler=mode) as manager:
        async with manager.reader() as session:
            for _ in range(3):
                with pytest.raises(DBAPIError, match="read-only transaction"):
                    await session.execute(text("INSERT INTO item VALUES (1)"))
                with pytest.raises(DBAPIError, match="read-only transaction"):
                    await session.execute(text("INSERT INTO item VALUES (:n)"), [{"n": 1}] * 2)
                assert await session.scalar(text("SELECT count(*) FROM item")) == 0
        async with manager.session() as session:  # and nothing is left of that
            await session.execute(text("INSERT INTO item VALUES (1)"))


@pytest.mark.anyio
async def test_a_reader_holds_no_session_of_the_server_between_two_statements(
    url: str, pgbouncer: PgBouncer, database: str
) -> None:
    async with DatabaseSessionManager().init(url, pooler="transaction") as manager:
        async with manager.reader() as session:
            assert await session.scalar(text("SELECT 1")) == 1
            states = [row["state"] for row in pgbouncer.servers(database)]
            assert "active" not in states
            assert states


@pytest.mark.anyio
async def test_a_reader_streams_nothing(url: str) -> None:
    async with DatabaseSessionManager().init(url, pooler="transaction") as manager:
        async with manager.reader() as session:
            with pytest.raises(Exception, match="(?i)cursor|portal"):
                result = await session.stream(text("SELECT generate_series(1, 1000)"))
                await result.all()
        async with manager.reader() as session:
            assert await session.scalar(text("SELECT 1")) == 1


@pytest.mark.anyio
async def test_isolation_levels(url: str) -> None:
    async with DatabaseSessionManager().init(url, pooler="transaction") as manager:
        for _ in range(3):
            async with manager.connect(isolation_level="AUTOCOMMIT") as connection:
                await connection.execute(text("VACUUM item"))
            async with manager.connect(isolation_level="SERIALIZABLE") as connection:
                level = await connection.scalar(text("SHOW transaction_isolation"))
                assert level == "serializable"
            async with manager.session(read_only=True) as session:
                assert await session.scalar(text("SHOW transaction_read_only")) == "on"
            async with manager.session() as session:
                level = await session.scalar(text("SHOW transaction_isolation"))
                assert level == "read committed"
                assert await session.scalar(text("SHOW transaction_read_only")) == "off"


# -- many starters --------------------------------------------------------------------------------


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch, pooled: Pooled) -> Pooled:
    """The same, with the setting in the environment, as starters have it."""
    monkeypatch.setenv("DB_POOLER", "transaction")
    return pooled


def create(number: int, url: str) -> None:
    """Create all, on one side or the other, and say what was created here."""
    metadata = models()
    for table in metadata.tables.values():
        event.listen(table, "after_create", lambda *_, **__: say("created"))
    orders = metadata.tables["orders"]
    event.listen(orders, "before_create", lambda *_, **__: time.sleep(0.2))
    if number % 2:
        with Database(url, metadata=metadata) as door:
            door.create_all()
    else:

        async def main() -> None:
            async with DatabaseSessionManager().init(url, metadata=metadata) as manager:
                await manager.create_all()

        asyncio.run(main())


def test_sixteen_create_tables_at_once(starting: Pooled) -> None:
    ends = together(16, create, starting.url())
    assert [err for code, _, err in ends if code] == []
    assert sum(out.count("created") for _, out, _ in ends) == 2


def test_sixteen_migrate_at_once(starting: Pooled, tmp_path: Path) -> None:
    ini = project(tmp_path, f"time.sleep(0.5)\n    {FIRST}", SECOND)
    ends = together(16, alembic, str(ini), "-x", f"url={starting.url()}", "upgrade", "head")
    assert [err for code, _, err in ends if code] == []
    steps = starting.server.execute("SELECT step FROM ran ORDER BY step", starting.name)
    assert steps == [["first"], ["second"]]


def test_who_waits_for_the_lock_holds_no_session_of_the_server(
    starting: Pooled, eventually: Callable[[Callable[[], object]], None]
) -> None:
    """Of three sessions of the server, four who wait in a transaction would hold all."""
    key = AdvisoryLock.KEY
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    tried = f"SELECT 1 FROM pg_stat_activity WHERE {others} AND query LIKE '%try_advisory%{key}%'"
    with psycopg.connect(starting.server.url(starting.name)) as holder:
        holder.execute(f"SELECT pg_advisory_xact_lock({key})")
        with starters(4, create, starting.url()) as crowd:
            for starter in crowd:
                starter.begin()
            eventually(lambda: starting.server.execute(tried, starting.name))
            stuck = (
                f"SELECT count(*) FROM pg_stat_activity WHERE {others} "
                f"AND pid <> {holder.info.backend_pid} AND state = 'idle in transaction' "
                "AND clock_timestamp() - state_change > interval '60 ms'"
            )
            looks = []
            for _ in range(20):  # who waited so would sit there most of the time
                looks.append(starting.server.execute(stuck, starting.name) == [["0"]])
                time.sleep(0.05)
            assert sum(looks) > 10, looks
            holder.rollback()
            assert [starter.ended()[0] for starter in crowd] == [0] * 4


def test_a_migration_that_leaves_the_transaction_is_told_where_to_run(
    starting: Pooled, tmp_path: Path
) -> None:
    block = "with op.get_context().autocommit_block():\n        pass"
    ini = project(tmp_path, FIRST, block)
    ends = together(1, alembic, str(ini), "-x", f"url={starting.url()}", "upgrade", "head")
    assert ends[0][0] == 1
    assert "[not-behind-pooler]" in ends[0][2]
    there = "SELECT count(*) FROM pg_tables WHERE tablename = 'ran'"
    assert starting.server.execute(there, starting.name) == [["0"]], "half of it was committed"


# -- a pooler that nobody has declared ------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("verb", ["session", "reader"])
async def test_an_undeclared_pooler_that_refuses_names_the_setting(url: str, verb: str) -> None:
    async with DatabaseSessionManager().init(url) as manager:
        with pytest.raises(CANNOT_CONNECT) as caught:
            async with getattr(manager, verb)() as session:
                await session.execute(text("SELECT 1"))
    original = getattr(caught.value, "orig", None)
    links = (caught.value, original, getattr(original, "__cause__", None))
    notes = "".join(note for link in links for note in getattr(link, "__notes__", []))
    assert "DB_POOLER=transaction" in notes


@pytest.fixture
def tolerant(pg18: PostgresServer, database: str, driver: str) -> Iterator[str]:
    """A pooler that takes what we say at connect, and does nothing with it."""
    with PgBouncer(pg18, ignore_startup_parameters="options, extra_float_digits") as pooler:
        yield pooler.url(database, driver)


@pytest.mark.anyio
async def test_an_undeclared_pooler_is_noticed_once(
    tolerant: str, caplog: pytest.LogCaptureFixture, database: str
) -> None:
    url = tolerant
    async with DatabaseSessionManager().init(url) as manager:
        for _ in range(3):
            async with manager.session() as one, manager.session() as other:
                await one.execute(text("SELECT 1"))
                await other.execute(text("SELECT 1"))
        async with manager.session():
            pass
    told = [record.getMessage() for record in caplog.records if "pooler" in record.getMessage()]
    assert len(told) == 1
    assert "DB_POOLER=transaction" in told[0]
    assert f"/{database}" in told[0]
    assert url.rpartition("@")[0].rpartition(":")[2] not in told[0]


@pytest.mark.anyio
async def test_a_declared_pooler_or_none_is_no_news(
    url: str, pg18: PostgresServer, database: str, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    for where, pooler in (
        (url, "transaction"),
        (url, "session"),
        (pg18.url(database, driver), None),
    ):
        options: Any = {"pooler": pooler}
        async with DatabaseSessionManager().init(where, **options) as manager:
            async with manager.session() as session, manager.reader() as reader:
                await session.execute(text("SELECT 1"))
                await reader.execute(text("SELECT 1"))
    assert [record for record in caplog.records if "pooler" in record.getMessage()] == []


@pytest.mark.anyio
async def test_a_statement_that_is_not_there_says_that_it_may_be_a_pooler(tolerant: str) -> None:
    async with DatabaseSessionManager().init(tolerant) as manager:
        async with manager.session() as session:
            with pytest.raises(DBAPIError) as caught:
                await session.execute(text("EXECUTE nothing"))
    notes = getattr(caught.value.orig, "__notes__", [])
    assert "DB_POOLER=transaction" in "".join(notes)


# -- the setting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("statement", "a transaction has one statement"),
        ("transacton", "did you mean transaction?"),
        ("pgbouncer", "it is transaction or session"),
    ],
)
def test_a_mode_that_cannot_be(mode: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=f"pooler='{mode}'.*{re.escape(says)}"):
        Database("postgresql://localhost/nothing", pooler=mode)
    monkeypatch.setenv("DB_POOLER", mode)
    with pytest.raises(ConfigurationError, match=f"DB_POOLER='{mode}'"):
        Database("postgresql://localhost/nothing")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("asyncpg", "statement_cache_size"),
        ("asyncpg", "prepared_statement_cache_size"),
        ("psycopg", "prepare_threshold"),
    ],
)
def test_what_would_prepare_is_refused(url: str, kind: str, name: str) -> None:
    where = str(make_url(url).set(drivername=f"postgresql+{kind}").render_as_string(False))
    options: Any = {"engine_options": {"connect_args": {name: 5}}}
    manager = DatabaseSessionManager().init(where, pooler="transaction", **options)
    with pytest.raises(ConfigurationError, match=f"{name}=5 cannot be used"):
        _ = manager.engine


def test_other_databases_know_no_pooler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One environment serves several managers, and tests on a file."""
    monkeypatch.setenv("DB_POOLER", "transaction")
    with Database(f"sqlite:///{tmp_path}/file.sqlite") as door, door.reader() as session:
        assert session.scalar(text("SELECT 1")) == 1


# -- tests ----------------------------------------------------------------------------------------


def locks_and_databases(server: PostgresServer) -> Any:
    return server.execute(
        "SELECT (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'), "
        "(SELECT count(*) FROM pg_database)"
    )


@pytest.mark.parametrize("mode", ["transaction", "session"])
@pytest.mark.anyio
async def test_a_sandbox_wants_the_servers_own_address_to_clone(
    pg18: PostgresServer, pgbouncer: PgBouncer, url: str, mode: Any
) -> None:
    """It says so before anything is sent; in one transaction a sandbox works there."""
    before = locks_and_databases(pg18)
    async with DatabaseSessionManager().init(url, pooler=mode) as manager:
        with pytest.raises(NotBehindPooler, match=f"pooler='{mode}'.*server's own address"):
            async with sandbox(manager, isolation="database"):
                pass
        with pytest.raises(NotBehindPooler), sandbox(manager, isolation="database"):
            pass
        assert pgbouncer.clients(url) == []
        assert locks_and_databases(pg18) == before
        async with sandbox(manager), manager.session() as session:
            assert await session.scalar(text("SELECT 1")) == 1


@pytest.mark.anyio
async def test_a_sandbox_behind_a_pooler_takes_a_template_of_the_server(
    pg18: PostgresServer, database: str, url: str
) -> None:
    with clones(pg18.url(database), lambda url: None) as template:
        async with DatabaseSessionManager().init(url, pooler="transaction") as manager:
            async with sandbox(manager, isolation="database", template=template):
                async with manager.session() as session:
                    inside = await session.scalar(text("SELECT current_database()"))
    assert str(inside).startswith("engineroom")


@pytest.mark.parametrize("largest", [undeclared.LARGEST_PID, 2**32])
def test_no_pooler_holds_clones_though_nobody_has_declared_it(
    pg18: PostgresServer, url: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one that makes up a number which a process might have."""
    monkeypatch.setattr(undeclared, "LARGEST_PID", largest)
    before = locks_and_databases(pg18)
    for prepare in (None, print):
        with pytest.raises(NotBehindPooler, match="no process id") as caught:
            with clones(url, prepare):
                pass
        assert "DATABASE_URL" in str(caught.value)
    assert locks_and_databases(pg18) == before


def test_celerys_manager_takes_it_forked_or_not(pgbouncer: PgBouncer, database: str) -> None:
    for forked in (False, True):
        manager = SessionManager()
        manager.forked = forked
        engine = manager.get_engine(pgbouncer.url(database, "psycopg"), pooler="transaction")
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
            driver: Any = connection.connection.driver_connection
            assert driver.prepare_threshold is None
        manager.close()


# -- cancelled, ended, forked ---------------------------------------------------------------------


@pytest.fixture
def at_work(pg18: PostgresServer, database: str) -> Callable[[], list[str]]:
    """What runs, or sits in a transaction, on the server itself."""

    def ask() -> list[str]:
        rows = pg18.execute(
            "SELECT state, query FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND datname = current_database() AND state <> 'idle'",
            database,
        )
        return [" ".join(row) for row in rows]

    return ask


@pytest.mark.anyio
@pytest.mark.parametrize("strikes", [1, 3])
async def test_a_cancelled_statement_ends_on_the_server(
    url: str, at_work: Callable[[], list[str]], eventually_async: Any, strikes: int
) -> None:
    async with DatabaseSessionManager().init(url, pooler="transaction") as manager:

        async def work() -> None:
            async with manager.session() as session:
                await session.execute(text("INSERT INTO item VALUES (1)"))
                await session.execute(text("SELECT pg_sleep(60)"))

        for _ in range(3):
            task = asyncio.create_task(work())
            await eventually_async(lambda: any("pg_sleep" in each for each in at_work()))
            for _ in range(strikes):
                task.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await task
            struck = time.monotonic()
            await eventually_async(lambda: at_work() == [])
            assert time.monotonic() - struck < 5.0  # promised is one, on a machine that is idle
            async with manager.session() as session:
                assert await session.scalar(text("SELECT count(*) FROM item")) == 0


@pytest.mark.parametrize("kind", ["psycopg", "psycopg2"])
def test_close_ends_what_a_thread_runs(
    pgbouncer: PgBouncer,
    database: str,
    kind: str,
    at_work: Callable[[], list[str]],
    eventually: Callable[[Callable[[], object]], None],
) -> None:
    door = Database(pgbouncer.url(database, kind), pooler="transaction")
    ended: list[BaseException] = []

    def work() -> None:
        try:
            with door.session() as session:
                session.execute(text("SELECT pg_sleep(60)"))
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: any("pg_sleep" in each for each in at_work()))
    door.close(timeout=0.1)
    thread.join(20)
    assert not thread.is_alive()
    assert len(ended) == 1
    eventually(lambda: at_work() == [])
    eventually(lambda: pgbouncer.clients(database) == [])


SHOWN = text("SELECT current_setting(:name)")


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_guards_go_by_transaction(url: str, mode: Any) -> None:
    guards: Any = {"idle_in_transaction_timeout": 41, "lock_timeout": 2}
    names = {"name": "idle_in_transaction_session_timeout"}
    async with DatabaseSessionManager().init(url, pooler=mode, **guards) as manager:
        for _ in range(3):
            async with manager.session() as session:
                assert await session.scalar(SHOWN, names) == "41s"
                assert await session.scalar(SHOWN, {"name": "lock_timeout"}) == "2s"
            async with manager.session(statement_timeout=3) as session:
                assert await session.scalar(SHOWN, {"name": "statement_timeout"}) == "3s"
                assert await session.scalar(SHOWN, names) == "41s"
            async with manager.connect() as connection:
                assert await connection.scalar(SHOWN, names) == "41s"
                await connection.rollback()
                assert await connection.scalar(SHOWN, names) == "41s"
    async with DatabaseSessionManager().init(url, pooler=mode, idle_in_transaction_timeout=0) as it:
        async with it.session() as session:
            assert await session.scalar(SHOWN, names) == "0"


@pytest.mark.anyio
async def test_nothing_is_cleaned(url: str, wire: WireProxy) -> None:
    """It would be a stranger's session of the server by then."""
    options: Any = {"pooler": "transaction", "pool_clean_always": True}
    async with DatabaseSessionManager().init(wire.url(url), **options) as manager:
        async with manager.session() as session:
            await session.execute(text("SET LOCAL search_path = public"))
            await session.execute(text("DO $$ BEGIN END $$"))
    assert [each for each in wire.statements if "RESET" in each or "DISCARD" in each] == []


@pytest.mark.anyio
async def test_ending_strangers_backends_is_not_even_tried(
    url: str, wire: WireProxy, at_work: Callable[[], list[str]], eventually_async: Any
) -> None:
    """What the pooler says is our backend's number may be somebody's."""
    manager = DatabaseSessionManager().init(wire.url(url), pooler="transaction")

    async def work() -> None:
        async with manager.session() as session:
            await session.execute(text("SELECT pg_sleep(60)"))

    task = asyncio.create_task(work())
    await eventually_async(lambda: any("pg_sleep" in each for each in at_work()))
    await manager.close(timeout=0.1)
    with pytest.raises(Exception, match=r"(?i)clos|cancel|end"):
        await task
    await eventually_async(lambda: at_work() == [])
    assert [each for each in wire.statements if "pg_terminate_backend" in each] == []


@pytest.mark.anyio
@pytest.mark.parametrize("rounds", [8, pytest.param(100, marks=pytest.mark.soak)])
async def test_the_pooler_outlives_what_is_cancelled(
    pooled: Pooled, driver: str, rounds: int
) -> None:
    """PgBouncer 1.18 ends where a client does not wait for its own cancel request."""
    loop = asyncio.get_running_loop()
    told = loop.get_exception_handler() or asyncio.AbstractEventLoop.default_exception_handler

    def tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # asyncpg drops the future of a connect that was broken off, with its exception.
        if "connection_lost() call" not in str(context.get("exception")):
            told(loop, context)

    loop.set_exception_handler(tell)
    for n in range(rounds):
        manager = DatabaseSessionManager().init(pooled.url(driver), pooler="transaction")

        async def work(manager: DatabaseSessionManager = manager) -> None:
            async with manager.session() as session:
                await session.execute(text("SELECT pg_sleep(60)"))

        task = asyncio.create_task(work())
        await asyncio.sleep(0.05 * (1 + n % 3))
        if n % 2:
            task.cancel()
        else:
            await manager.close(timeout=0.01)
        await asyncio.wait({task})
        assert task.cancelled() or task.exception() is not None
        await manager.close(timeout=0)
        assert pooled.pooler.is_up, pooled.pooler.said
