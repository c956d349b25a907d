"""What stands on the backends, sampled on MariaDB: the cap, FastAPI, the plugin, secrets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from mariadb_server import MariaServer
from scenario import Model, backends, fork, in_threads, mysql_server, run, until
from serving import served
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from test_memory import SCOPES, flat, sync_flat
from test_plugin import APP, CASES, INI, LEAN, WARNINGS
from test_plugin import ASYNC_TEST as PLUGINS_ASYNC_TEST
from test_plugin import SYNC_TEST as PLUGINS_TEST

from engineroom import Database, DatabaseSessionManager
from engineroom.errors import PoolExhausted
from engineroom.fastapi import AsyncSessionDep, ReaderDep, SessionDep, lifespan
from engineroom.registry import SessionManager
from engineroom.secrecy import chain

pytest_plugins = "pytester"


# -- the cap -------------------------------------------------------------------------------------


@contextmanager
def counting(url: str) -> Iterator[list[int]]:
    """Count the connections to a database all the time, from outside."""
    counts, over = [0], threading.Event()

    def count() -> None:
        with mysql_server(url) as cursor:
            while not over.wait(0.001):
                asked = "SELECT count(*) FROM information_schema.processlist WHERE db = %s"
                cursor.execute(asked, [make_url(url).database])
                counts.append(cursor.fetchone()[0])

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()


def test_engines_loops_and_threads_share_one_cap(mysql_url: str) -> None:
    """As the server counts: a connection that is closed counts until it has gone there."""
    managers = [DatabaseSessionManager().init(mysql_url, max_connections=4) for _ in range(8)]

    async def one(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            assert await db.scalar(text("SELECT 1")) == 1

    def work(number: int) -> None:
        if number % 2:
            with managers[number].sync_session() as db:
                assert db.scalar(text("SELECT 1")) == 1
        else:

            async def main() -> None:
                await asyncio.gather(*(one(manager) for manager in managers for _ in range(3)))

            asyncio.run(main())

    with counting(mysql_url) as counts:
        in_threads(8, work)
        for manager in managers:
            manager.sync.close()
    assert 0 < max(counts) <= 4


def capped_child(url: str) -> list[int]:
    """Return what a forked child could open, and what its parent has left."""
    database = Database(url, max_connections=2, pool_timeout=20)
    with database.session() as db:
        first = db.scalar(text("SELECT connection_id()"))

    def child() -> None:
        with database.session() as one, database.session() as two:
            for session in (one, two):
                assert session.scalar(text("SELECT connection_id()")) != first
            with pytest.raises(PoolExhausted), database.session() as three:
                three.execute(text("SELECT 1"))

    fork(child)()
    with database.session() as db:
        second = db.scalar(text("SELECT connection_id()"))
    database.close()
    return [first, second]


def test_a_forked_child_has_a_cap_of_its_own(mysql_url: str) -> None:
    first, second = run(capped_child, mysql_url)
    assert first == second


def test_one_manager_of_many_databases(mariadb: MariaServer, mysql_url: str) -> None:
    """Each has tables and engines of its own, on both sides; one cap over all of them."""
    names = [mariadb.create_database() for _ in range(3)]
    manager = SessionManager(metadata=Model.metadata, max_connections=2)
    manager.forked = True
    try:
        for _ in range(2):
            for number, name in enumerate(names):
                session = manager.session_factory(mariadb.url(name))
                session.execute(text(f"REPLACE INTO item (id, value) VALUES ({number}, {number})"))
                session.commit()
                session.close()
        for number, name in enumerate(names):
            with manager.database(mariadb.url(name)).sync_session() as db:
                assert db.scalars(text("SELECT id FROM item")).all() == [number]
        assert sum(len(backends(mariadb.url(name))) for name in names) <= 2
    finally:
        manager.close()
        for name in names:
            mariadb.drop_database(name)


# -- FastAPI -------------------------------------------------------------------------------------


def shop() -> FastAPI:
    app = FastAPI(lifespan=lifespan(pool_size=3, max_overflow=0))

    @app.post("/items/{number}")
    async def add(number: int, db: AsyncSessionDep) -> str:
        await db.execute(text(f"INSERT INTO item (id, value) VALUES ({number}, 0)"))
        return "stored"

    @app.post("/lost/{number}")
    async def lose(number: int, db: AsyncSessionDep) -> str:
        """Lose the connection between the last statement and COMMIT."""
        await db.execute(text(f"INSERT INTO item (id, value) VALUES ({number}, 0)"))
        own = await db.scalar(text("SELECT connection_id()"))
        with mysql_server(URL[-1]) as cursor:
            cursor.execute(f"KILL {own}")
        return "stored"

    @app.post("/threads/{number}")
    def add_in_a_thread(number: int, db: SessionDep) -> str:
        db.execute(text(f"INSERT INTO item (id, value) VALUES ({number}, 0)"))
        return "stored"

    @app.get("/items")
    async def read(db: ReaderDep) -> list[int]:
        return list(await db.scalars(text("SELECT id FROM item ORDER BY id")))

    @app.post("/reads/{number}")
    async def write_with_a_reader(number: int, db: ReaderDep) -> None:
        await db.execute(text(f"INSERT INTO item (id, value) VALUES ({number}, 0)"))

    @app.get("/slow")
    async def slow(db: AsyncSessionDep) -> None:
        await db.execute(text("SELECT sleep(60)"))

    return app


URL: list[str] = []


def test_an_application_of_fastapi(mysql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored when it says so, and at no other time; a reader writes nothing."""
    monkeypatch.setenv("DATABASE_URL", mysql_url)
    URL.append(mysql_url)
    with Database(mysql_url, metadata=Model.metadata) as database:
        database.create_all()
    headers = {"connection": "close"}  # uvicorn hangs up after an error
    with served(shop()) as base, httpx.Client(base_url=base, headers=headers) as client:
        seen = [client.post(f"/items/{number}").status_code for number in (1, 2, 1)]
        assert seen == [200, 200, 500]
        assert client.post("/threads/3").status_code == 200
        assert client.post("/lost/4").status_code == 500
        assert client.post("/reads/5").status_code == 500
        assert [client.post(f"/items/{number}").status_code for number in (6, 7)] == [200, 200]
        assert client.get("/items").json() == [1, 2, 3, 6, 7]
    assert backends(mysql_url) == []


# -- the plugin ----------------------------------------------------------------------------------

DDL = """
    from sqlalchemy import inspect, text
    from app import session_manager

    def test_tables_are_undone_as_well(db_session):
        db_session.execute(text("CREATE TABLE more (n int)"))

    def test_they_were(db_sandbox):
        assert inspect(session_manager.sync_engine).get_table_names() == ["item"]
"""


def test_the_plugins_sandbox_is_a_database_for_each_test(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, mariadb: MariaServer
) -> None:
    for name in ("DB_URL", "PYTEST_ADDOPTS", "CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABASE_URL", mariadb.url())
    pytester.makeini(INI)
    asynchronous = PLUGINS_ASYNC_TEST.replace("MARKS", "pytestmark = pytest.mark.asyncio()")
    files = {"test_sync": PLUGINS_TEST, "test_async": asynchronous, "test_cases": CASES}
    pytester.makepyfile(app=APP, test_ddl=DDL, **files)
    done = pytester.runpytest_subprocess(*LEAN, *WARNINGS, "--asyncio-mode=strict")
    done.assert_outcomes(passed=6 + 4 + 2 + 2)
    assert mariadb.execute("SHOW DATABASES LIKE 'engineroom%'") == ()


# -- cancellation --------------------------------------------------------------------------------


def sleepers(url: str) -> int:
    with mysql_server(url) as cursor:
        cursor.execute(
            "SELECT count(*) FROM information_schema.processlist"
            " WHERE db = %s AND info LIKE '%%sleep(60)'",
            [make_url(url).database],
        )
        return int(cursor.fetchone()[0])


def test_what_cancelled_scopes_ran_is_ended_on_the_server(mysql_url: str) -> None:
    """Twenty at once, each by KILL over a connection of its own."""

    async def sleep(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT sleep(60)"))

    async def main() -> None:
        async with DatabaseSessionManager().init(mysql_url, pool_size=20) as manager:
            tasks = [asyncio.create_task(sleep(manager)) for _ in range(20)]
            while await asyncio.to_thread(sleepers, mysql_url) < 20:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(end) for end in ends] == [asyncio.CancelledError] * 20
            await asyncio.to_thread(until, lambda: sleepers(mysql_url), lambda left: not left)
            assert [pool.lent for pool in manager.stats().pools] == [0]
            async with manager.session() as db:
                assert await db.scalar(text("SELECT 1")) == 1

    asyncio.run(main())


# -- memory and secrets --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1_000, *SCOPES[1:]])
@pytest.mark.parametrize("side", ["asyncmy", "pymysql"])
def test_memory_stays_flat(mysql_url: str, side: str, count: int) -> None:
    scenario = flat if side == "asyncmy" else sync_flat
    run(scenario, mysql_url, count, deadline=90 if count < 10_000 else 1100)


BOUND = "b0und-and-unheard-of"


@pytest.mark.parametrize("side", ["sync", "async"])
def test_no_frame_has_a_bound_value_once_its_scope_has_ended(mysql_url: str, side: str) -> None:
    statement = text("SELECT :value FROM nowhere")
    manager = DatabaseSessionManager().init(mysql_url)

    async def crash() -> None:
        async with manager.session() as db:
            await db.execute(statement, {"value": BOUND})

    with pytest.raises(DBAPIError, match="1146") as caught:
        if side == "sync":
            with manager.sync_session() as db:
                db.execute(statement, {"value": BOUND})
        else:
            asyncio.run(crash())
    for each in chain(caught.value):
        assert BOUND not in str(each)
        traceback = each.__traceback__
        while traceback is not None:
            assert BOUND not in repr(traceback.tb_frame.f_locals) or is_own(traceback.tb_frame)
            traceback = traceback.tb_next
    manager.sync.close()


def is_own(frame: Any) -> bool:
    return bool(frame.f_globals["__name__"] == __name__)
