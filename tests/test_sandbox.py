"""The sandbox: everything that the manager hands out is rolled back (guarantee 11)."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sandboxed
from fastapi import Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient
from httpx import ASGITransport, AsyncClient
from sandboxed import (
    COUNT,
    Item,
    Link,
    Model,
    add,
    assert_nothing_left,
    count,
    create_tables,
    opened,
    sync_add,
)
from scenario import fork
from sqlalchemy import Engine, ForeignKey, MetaData, func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from engineroom import Database, DatabaseSessionManager, on_commit
from engineroom.backends import Role
from engineroom.errors import (
    NotInitialized,
    NotInSandbox,
    SandboxConflict,
    SandboxEnded,
    SandboxError,
    SessionClosed,
    TemplateUnusable,
)
from engineroom.fastapi import lifespan, session_dependency
from engineroom.testing import PostgresServer, outer, sandbox
from engineroom.testing.sandbox import Sandbox

pytestmark = pytest.mark.anyio


@pytest.fixture
def manager(driver_url: str) -> DatabaseSessionManager:
    return opened(driver_url)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did in a sandbox, there is no row afterwards, and nothing checked out."""
    used = "driver_url" in request.fixturenames
    url = request.getfixturevalue("driver_url") if used else ""
    yield
    if used:
        assert_nothing_left(url)


# -- what the manager hands out --------------------------------------------------------------------


async def test_whoever_opened_it_is_rolled_back(manager: DatabaseSessionManager) -> None:
    """Sessions, readers and connections of both sides, threads and other loops: one world."""
    engine_before, sync_engine_before = manager.engine, manager.sync_engine
    async with manager:
        async with sandbox(manager):
            await add(manager, 1)
            async with manager.connect() as connection:
                await connection.execute(text("INSERT INTO sandboxed_item VALUES (2, '')"))
            with manager.sync_session() as session:
                session.add(Item(id=3))
            await asyncio.to_thread(sync_add, manager, 4)
            await asyncio.to_thread(asyncio.run, add(manager, 5))
            async with engine_before.begin() as connection:
                await connection.execute(text("INSERT INTO sandboxed_item VALUES (6, '')"))
            with sync_engine_before.begin() as one:
                one.execute(text("INSERT INTO sandboxed_item VALUES (7, '')"))
            loose = manager.sync.get_session()
            loose.add(Item(id=8))
            loose.commit()
            loose.close()
            async with manager.reader() as db:
                assert await db.scalar(COUNT) == 8
            with manager.sync.reader() as reader:
                assert reader.scalar(COUNT) == 8
            await manager.check()
        assert await count(manager) == 0


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_the_synchronous_side_alone(pg18: PostgresServer, driver_url: str, driver: str) -> None:
    url = driver_url.replace("asyncpg", driver).replace("psycopg:", f"{driver}:")
    with Database(url, metadata=Model.metadata) as database:
        database.create_all()
        with sandbox(database):
            with database.session() as db:
                db.add(Item(id=1))
            with database.session() as db:
                assert db.scalar(COUNT) == 1
                rows = db.execute(select(Item).execution_options(yield_per=1)).all()
                assert len(rows) == 1
            with pytest.raises(NotInSandbox), database.connect(isolation_level="AUTOCOMMIT") as c:
                c.execute(text("VACUUM sandboxed_item"))
        with database.session() as db:
            assert db.scalar(COUNT) == 0


async def test_each_scope_has_a_fate_of_its_own(manager: DatabaseSessionManager) -> None:
    """One that fails takes nothing of another along; a savepoint nothing of its session."""
    async with manager, sandbox(manager):
        await add(manager, 1)
        with pytest.raises(KeyError):
            async with manager.session() as db:
                db.add(Item(id=2))
                await db.flush()
                raise KeyError
        async with manager.session() as db:
            db.add(Item(id=3))
            with pytest.raises(IntegrityError):
                async with db.begin_nested():
                    db.add(Item(id=1))
            db.add(Item(id=4))
            await db.flush()
            await db.commit()
            db.add(Item(id=5))
            await db.flush()
            await db.rollback()
        assert await count(manager) == 3


async def test_a_session_inside_another_one(
    manager: DatabaseSessionManager, caplog: pytest.LogCaptureFixture
) -> None:
    """What the inner one commits stays, though the outer one, which only reads, rolls back."""
    async with manager, sandbox(manager):
        with pytest.raises(KeyError):
            async with manager.session() as outer_session:
                assert await outer_session.scalar(COUNT) == 0
                await add(manager, 1)
                assert await outer_session.scalar(COUNT) == 1
                await asyncio.gather(*(add(manager, key) for key in range(2, 5)))
                await asyncio.to_thread(sync_add, manager, 5)
                raise KeyError
        assert await count(manager) == 5
        async with manager.session() as outer_session:
            outer_session.add(Item(id=6))
            await outer_session.flush()
            await add(manager, 7)  # a writer inside a writer that waits for it
            assert await outer_session.scalar(COUNT) == 7
    assert not [record for record in caplog.records if record.name == "engineroom.sandbox"]


async def test_writers_that_alternate_are_told_at_once(manager: DatabaseSessionManager) -> None:
    async with manager, sandbox(manager):
        async with manager.session() as first:
            first.add(Item(id=1))
            await first.flush()
            async with manager.session() as second:
                second.add(Item(id=2))
                await second.flush()
                began = time.monotonic()
                with pytest.raises(SandboxConflict, match=r'isolation="database"') as caught:
                    await first.execute(text("UPDATE sandboxed_item SET name = 'x'"))
                assert time.monotonic() - began < 5
                assert str(caught.value).count(__file__) == 2, "both lines are named"
        assert await count(manager) == 2


async def test_parallel_scopes_take_turns(manager: DatabaseSessionManager) -> None:
    """Each writes, waits and writes: all are served, and only those that failed are rolled back."""

    async def buy(key: int) -> None:
        async with manager.session() as db:
            db.add(Item(id=key))
            await db.flush()
            await asyncio.sleep(0.01)
            db.add(Item(id=key + 100))
            await db.flush()
            if key % 3 == 0:
                await db.rollback()

    def buy_in_a_thread(key: int) -> None:
        with manager.sync_session() as db:
            db.add(Item(id=key))
            db.flush()
            db.add(Item(id=key + 100))

    async with manager, sandbox(manager):
        with ThreadPoolExecutor(5) as threads:
            loop = asyncio.get_running_loop()
            sync = [loop.run_in_executor(threads, buy_in_a_thread, key) for key in range(50, 60)]
            await asyncio.gather(*(buy(key) for key in range(1, 20)), *sync)
        assert await count(manager) == 2 * (13 + 10)


@pytest.mark.parametrize("isolation", ["transaction", "database"])
async def test_threads_that_meet_an_engine_as_it_is_made_work_inside(
    manager: DatabaseSessionManager, isolation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first use makes the synchronous engine: nobody finds one that is still outside."""
    take_in = Sandbox.take_in

    def slowly(self: Sandbox, engine: Engine, role: Role) -> None:
        time.sleep(0.2)
        take_in(self, engine, role)

    async with manager, sandbox(manager, isolation=isolation):
        monkeypatch.setattr(Sandbox, "take_in", slowly)

        def late(key: int) -> None:
            time.sleep(key / 50)
            sync_add(manager, key)

        await asyncio.gather(*(asyncio.to_thread(late, key) for key in range(1, 9)))
        assert await count(manager) == 8


async def test_who_waits_for_an_idle_stranger_goes_on_with_a_warning(
    manager: DatabaseSessionManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread that no context leads to: nobody knows that the first one waits for it."""
    done = threading.Event()

    def stranger() -> None:
        sync_add(manager, 2)
        done.set()

    async with manager, sandbox(manager):
        async with manager.session() as db:
            db.add(Item(id=1))
            await db.flush()
            thread = threading.Thread(target=stranger)
            thread.start()
            while not done.is_set():
                await asyncio.sleep(0.01)
            thread.join()
            assert await db.scalar(COUNT) == 2
        assert await count(manager) == 2
    assert __file__ in caplog.text
    assert sandboxed.__file__ in caplog.text, "the warning names both lines"


async def test_a_stranger_that_keeps_its_turn_is_named(
    manager: DatabaseSessionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outer, "LIMIT", 0.3)
    monkeypatch.setattr(outer, "GRACE", 60.0)

    async with manager, sandbox(manager):
        async with manager.session() as db:
            db.add(Item(id=1))
            await db.flush()
            with ThreadPoolExecutor(1) as threads:
                loop = asyncio.get_running_loop()
                adding = loop.run_in_executor(threads, sync_add, manager, 2)
                with pytest.raises(SandboxConflict, match="waited for") as caught:
                    await adding
            assert __file__ in str(caught.value)


# -- as a COMMIT would -----------------------------------------------------------------------------


async def test_a_deferred_constraint_fails_at_commit(manager: DatabaseSessionManager) -> None:
    """With the same class as outside; and the next scope may defer again."""

    async def dangling() -> None:
        async with manager.session() as db:
            db.add(Link(id=1, other=99))

    async def circle(key: int) -> None:
        async with manager.session() as db:
            await db.execute(text(f"INSERT INTO sandboxed_link VALUES ({key}, {key + 1})"))
            await db.execute(text(f"INSERT INTO sandboxed_link VALUES ({key + 1}, {key})"))

    async with manager:
        with pytest.raises(IntegrityError) as outside:
            await dangling()
        async with sandbox(manager):
            with pytest.raises(IntegrityError) as inside:
                await dangling()
            assert type(inside.value.orig) is type(outside.value.orig)
            await circle(1)
            await circle(3)
            with pytest.raises(IntegrityError):
                await dangling()
            async with manager.session() as db:
                assert await db.scalar(select(func.count()).select_from(Link)) == 4


async def test_what_was_set_for_a_transaction_ends_with_it(
    manager: DatabaseSessionManager,
) -> None:
    tenant = text("SELECT current_setting('app.tenant', true)")
    async with manager, sandbox(manager):
        for statement in (
            text("SET LOCAL app.tenant = 'A'"),
            text("SELECT set_config('app.tenant', 'A', true)"),
            text("SELECT set_config(:name, :value, true)").bindparams(name="app.tenant", value="A"),
        ):
            async with manager.session() as db:
                await db.execute(statement)
                assert await db.scalar(tenant) == "A"
            async with manager.session() as db:
                assert not await db.scalar(tenant), statement


async def test_a_setting_of_one_that_only_reads_does_not_leak(
    manager: DatabaseSessionManager,
) -> None:
    """It is taken off the stack for another one, and put back, with what it has set."""
    tenant = text("SELECT current_setting('app.tenant', true)")
    async with manager, sandbox(manager):
        async with manager.session() as db:
            await db.execute(text("""SET LOCAL "app"."tenant" = 'A'"""))
            async with manager.session() as inner:
                assert not await inner.scalar(tenant)
                inner.add(Item(id=1))
            assert await db.scalar(tenant) == "A"
        async with manager.session() as db:
            assert not await db.scalar(tenant)


async def test_readers_and_read_only_sessions_write_nothing(
    manager: DatabaseSessionManager,
) -> None:
    async with manager, sandbox(manager):
        for opening in (manager.reader, lambda: manager.session(read_only=True)):
            with pytest.raises(DBAPIError, match="read-only transaction"):
                async with opening() as db:
                    await db.execute(text("INSERT INTO sandboxed_item VALUES (1, '')"))
        await add(manager, 1)


async def test_each_statement_of_autocommit_stands_alone(manager: DatabaseSessionManager) -> None:
    async with manager, sandbox(manager):
        async with manager.connect(isolation_level="AUTOCOMMIT") as connection:
            await connection.execute(text("INSERT INTO sandboxed_item VALUES (1, '')"))
            with pytest.raises(IntegrityError):
                await connection.execute(text("INSERT INTO sandboxed_item VALUES (1, '')"))
            await connection.execute(text("INSERT INTO sandboxed_item VALUES (2, '')"))
        assert await count(manager) == 2


async def test_rows_can_be_streamed(manager: DatabaseSessionManager) -> None:
    async with manager, sandbox(manager):
        async with manager.session() as db:
            db.add_all(Item(id=key) for key in range(100))
            await db.flush()
            result = await db.stream(select(Item).execution_options(yield_per=7))
            assert [item.id async for item in result.scalars()] == [*range(100)]
        assert await count(manager) == 100


async def test_a_stream_goes_on_beside_sessions_inside_it(manager: DatabaseSessionManager) -> None:
    """And one that was left half-read is closed with its session."""
    async with manager, sandbox(manager):
        async with manager.session() as db:
            db.add_all(Item(id=key) for key in range(20))
        async with manager.session() as db:
            result = await db.stream(select(Item.id).execution_options(yield_per=5))
            async for key in result.scalars():
                await add(manager, 100 + key)
        assert await count(manager) == 40
        async with manager.session() as db:
            result = await db.stream(select(Item.id).execution_options(yield_per=5))
            assert await anext(aiter(result.scalars())) == 0
        if manager.engine.dialect.driver == "psycopg":  # (asyncpg's portals end with the sandbox)
            async with manager.session() as db:
                assert await db.scalar(text("SELECT count(*) FROM pg_cursors")) == 0


def test_two_synchronous_sandboxes_do_not_wait_for_each_other(
    pg18: PostgresServer, database: str
) -> None:
    """Each has its driver's statements in a thread of its own."""
    url = pg18.url(database, "psycopg")
    with Database(url, metadata=Model.metadata) as first, Database(url) as second:
        first.create_all()
        with sandbox(first), sandbox(second), ThreadPoolExecutor(1) as threads:
            with first.session() as db:
                slow = threads.submit(db.execute, text("SELECT pg_sleep(4)"))
                time.sleep(0.2)
                began = time.monotonic()
                with second.session() as other:
                    assert other.scalar(COUNT) == 0
                assert time.monotonic() - began < 3
                slow.result()


async def test_callbacks_run_after_each_commit(manager: DatabaseSessionManager) -> None:
    told: list[int] = []
    async with manager, sandbox(manager):
        async with manager.session() as db:
            on_commit(db, lambda: told.append(1))
            db.add(Item(id=1))
        assert told == [1]
        with pytest.raises(IntegrityError):
            async with manager.session() as db:
                on_commit(db, lambda: told.append(2))
                db.add(Link(id=1, other=99))
        assert told == [1]


@pytest.mark.parametrize(
    "statement",
    [
        "COMMIT",
        "ROLLBACK",
        "/* so */ commit and chain",
        "/* a /* b */ c */ COMMIT",
        "SELECT 1; COMMIT",
        "SELECT '--'; COMMIT",
        "BEGIN",
        "END",
    ],
)
async def test_what_would_end_the_sandbox_is_refused(
    manager: DatabaseSessionManager, statement: str
) -> None:
    async with manager, sandbox(manager):
        await add(manager, 1)
        with pytest.raises(NotInSandbox, match=r'isolation="database"'):
            async with manager.session() as db:
                await db.execute(text(statement))
        assert await count(manager) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "DO $$ BEGIN PERFORM 1; END $$",
        "SELECT 'step one; end of story'",
        "/* begin */ SELECT 1 -- ; commit",
        "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $x$ BEGIN RETURN 1; END $x$",
    ],
)
async def test_what_only_looks_like_an_end_is_not(
    manager: DatabaseSessionManager, statement: str
) -> None:
    async with manager, sandbox(manager):
        async with manager.session() as db:
            await db.execute(text(statement))


@pytest.mark.parametrize("what", ["VACUUM", "two phases", "the driver's own"])
async def test_what_one_transaction_cannot_serve_is_told(
    manager: DatabaseSessionManager, what: str
) -> None:
    async with manager, sandbox(manager):
        with pytest.raises(NotInSandbox, match=r'isolation="database"'):
            if what == "VACUUM":
                async with manager.connect(isolation_level="AUTOCOMMIT") as connection:
                    await connection.execute(text("VACUUM sandboxed_item"))
            elif what == "two phases":
                with manager.sync_engine.connect() as one, one.begin_twophase() as transaction:
                    one.execute(text("INSERT INTO sandboxed_item VALUES (1, '')"))
                    transaction.prepare()
            else:
                async with manager.connect() as connection:
                    raw = await connection.get_raw_connection()
                    await raw.driver_connection.execute("SELECT 1")  # type: ignore[union-attr]
        await add(manager, 1)


# -- an application --------------------------------------------------------------------------------


def application(manager: DatabaseSessionManager, url: str) -> FastAPI:
    """An application that does what applications do."""
    app = FastAPI(lifespan=lifespan(manager, url=url, metadata=Model.metadata))
    get_db: Any = session_dependency(manager)
    get_sync_db: Any = session_dependency(manager.sync)

    async def commits(key: int, db: Any = Depends(get_db)) -> int:
        db.add(Item(id=key))
        await db.commit()
        return key

    async def opens_its_own(key: int, db: Any = Depends(get_db)) -> int:
        assert await db.scalar(COUNT) is not None
        await add(manager, key)
        return key

    async def rolls_back_and_goes_on(key: int, db: Any = Depends(get_db)) -> int:
        db.add(Item(id=1000 + key))
        await db.flush()
        await db.rollback()
        db.add(Item(id=key))
        return key

    def in_the_threadpool(key: int, db: Any = Depends(get_sync_db)) -> int:
        db.add(Item(id=key))
        return key

    async def refuses(key: int, db: Any = Depends(get_db)) -> int:
        db.add(Item(id=key))
        await db.flush()
        raise HTTPException(409)

    async def fails_at_commit(key: int, db: Any = Depends(get_db)) -> int:
        db.add(Link(id=key, other=-1))
        return key

    async def how_many(db: Any = Depends(get_db)) -> int:
        return await db.scalar(COUNT) or 0

    for endpoint in (
        commits, opens_its_own, rolls_back_and_goes_on, in_the_threadpool, refuses, fails_at_commit
    ):  # fmt: skip
        app.post(f"/{endpoint.__name__}/{{key}}")(endpoint)
    app.get("/")(how_many)
    return app


GOOD = ["commits", "opens_its_own", "rolls_back_and_goes_on", "in_the_threadpool"]


def test_an_application_in_a_test_client(driver_url: str) -> None:
    """Its own thread and loop, and a lifespan that opens and closes the manager."""
    create_tables(driver_url)
    manager = DatabaseSessionManager().init(driver_url, metadata=Model.metadata)
    app = application(manager, driver_url)
    with sandbox(manager):
        for _ in range(2):
            with TestClient(app, raise_server_exceptions=False) as client:
                for key, name in enumerate(GOOD):
                    already = client.get("/").json()
                    answer = client.post(f"/{name}/{already * 10 + key}")
                    assert answer.json() == already * 10 + key
                    assert client.get("/").json() == already + 1
                assert client.post("/refuses/500").status_code == 409
                assert client.post("/fails_at_commit/500").status_code == 500
        with manager.sync_session() as db:
            assert db.scalar(COUNT) == 8
    manager.sync.close()


async def test_an_application_with_four_requests_at_once(
    manager: DatabaseSessionManager, driver_url: str
) -> None:
    app = application(manager, driver_url)
    async with manager, sandbox(manager):
        transport = ASGITransport(app, raise_app_exceptions=False)
        async with AsyncClient(transport=transport, base_url="http://test") as client:
            for turn in range(5):
                answers = await asyncio.gather(
                    *(client.post(f"/{name}/{turn * 10 + k}") for k, name in enumerate(GOOD)),
                    client.post(f"/refuses/{turn * 10 + 8}"),
                    client.post(f"/fails_at_commit/{turn}"),
                )
                assert [a.status_code for a in answers] == [200] * 4 + [409, 500]
            assert (await client.get("/")).json() == 20


# -- its own life ----------------------------------------------------------------------------------


async def test_init_and_close_change_nothing_inside(manager: DatabaseSessionManager) -> None:
    async with manager:
        async with sandbox(manager):
            await add(manager, 1)
            await manager.close()
            manager.init("postgresql://nowhere.example/nothing")
            await asyncio.to_thread(manager.sync.close)
            assert await count(manager) == 1
        assert await count(manager) == 0
    with pytest.raises(RuntimeError):
        manager.session().open()


async def test_where_there_can_be_no_sandbox(manager: DatabaseSessionManager) -> None:
    with pytest.raises(NotInitialized):
        async with sandbox(DatabaseSessionManager()):
            pass
    async with manager:
        async with manager.session():
            with pytest.raises(SandboxError, match="opened before") as caught:
                async with sandbox(manager):
                    pass
            assert __file__ in str(caught.value)
        async with sandbox(manager):
            with pytest.raises(SandboxError, match="already"):
                async with sandbox(manager):
                    pass
            await add(manager, 1)
        assert await count(manager) == 0


async def test_what_holds_a_connection_before_is_refused(manager: DatabaseSessionManager) -> None:
    """It would commit for good: a session of one's own, or a connection of the engine."""
    async with manager:
        async with manager.engine.connect() as connection:
            await connection.execute(COUNT)
            with pytest.raises(SandboxError, match="holds a connection"):
                async with sandbox(manager):
                    pass
        session = manager.sync.get_session()
        session.execute(COUNT)
        with pytest.raises(SandboxError, match="holds a connection"):
            async with sandbox(manager):
                pass
        session.close()


async def test_an_engine_may_be_disposed_inside(manager: DatabaseSessionManager) -> None:
    """As many a lifespan does."""
    async with manager, sandbox(manager):
        await add(manager, 1)
        await manager.engine.dispose()
        manager.sync_engine.dispose()
        assert await count(manager) == 1


async def test_one_that_waits_for_its_turn_can_be_cancelled(
    manager: DatabaseSessionManager,
) -> None:
    """At once, though somebody's statement is on its way."""
    async with manager, sandbox(manager):
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
            sleeping = asyncio.create_task(db.execute(text("SELECT pg_sleep(4)")))
            await asyncio.sleep(0.1)
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await add(manager, 1)
            assert time.monotonic() - began < 3
            await sleeping
        assert await count(manager) == 0, "nobody sends later what was given up"


def test_a_fork_inside_leaves_every_manager_alone(driver_url: str) -> None:
    create_tables(driver_url)
    url = driver_url.replace("asyncpg", "psycopg")
    others = [Database(url) for _ in range(3)]
    pid = text("SELECT pg_backend_pid()")

    def pids() -> set[int]:
        found = set()
        for other in others:
            with other.session() as db:
                found.add(db.scalar(pid) or 0)
        return found

    with Database(url, metadata=Model.metadata) as database, sandbox(database):
        with database.session() as db:
            db.add(Item(id=1))
        mine = pids()

        def child() -> None:
            assert not pids() & mine, "the child uses its parent's connections"
            for door in (database.session, database.reader):  # the latter's engine is made here
                with pytest.raises(NotInSandbox, match="forked inside"), door() as db:
                    db.scalar(COUNT)
            database.close()  # nothing, as inside
            with Database(url) as own, own.session() as db:
                assert db.scalar(COUNT) == 0

        fork(child)()
        assert pids() == mine
        with database.session() as db:
            assert db.scalar(COUNT) == 1
    for other in others:
        other.close()


async def test_what_is_left_open_is_named(manager: DatabaseSessionManager) -> None:
    async with manager:
        with pytest.raises(SandboxError, match="still open") as caught:
            async with sandbox(manager):
                scope = manager.session()
                db = await scope.__aenter__()
                db.add(Item(id=1))
                await db.flush()
        assert __file__ in str(caught.value)
        with pytest.raises((SessionClosed, SandboxEnded)):
            await db.execute(COUNT)
        with pytest.raises((SessionClosed, SandboxEnded)):
            await scope.__aexit__(None, None, None)
        assert await count(manager) == 0


@pytest.mark.parametrize("how", ["cancel", "timeout", "raise"])
async def test_the_next_one_starts_clean(manager: DatabaseSessionManager, how: str) -> None:
    """Inside a statement or a nested scope; in the same sandbox, and in the next one."""

    async def work(begun: asyncio.Event) -> None:
        async with manager.session() as db:
            db.add(Item(id=1))
            await db.flush()
            async with manager.session() as inner:
                inner.add(Item(id=2))
                await inner.flush()
                begun.set()
                if how == "raise":
                    raise KeyError
                await inner.execute(text("SELECT pg_sleep(60)"))

    async with manager:
        for _ in range(3):
            async with sandbox(manager):
                begun = asyncio.Event()
                if how == "timeout":
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.2):
                            await work(begun)
                else:
                    task = asyncio.create_task(work(begun))
                    await begun.wait()
                    task.cancel()
                    with pytest.raises((asyncio.CancelledError, KeyError)):
                        await task
                assert await count(manager) == 0
                await add(manager, 3)
                assert await count(manager) == 1


async def test_a_sandbox_that_is_cancelled_itself(manager: DatabaseSessionManager) -> None:
    async def work(begun: asyncio.Event) -> None:
        async with sandbox(manager):
            await add(manager, 1)
            async with manager.session() as db:
                begun.set()
                await db.execute(text("SELECT pg_sleep(60)"))

    async with manager:
        for _ in range(3):
            begun = asyncio.Event()
            task = asyncio.create_task(work(begun))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        async with sandbox(manager):
            assert await count(manager) == 0


async def test_a_server_that_drops_the_connection(
    manager: DatabaseSessionManager, pg18: PostgresServer, database: str
) -> None:
    """The sandbox is over; the next one has a connection of its own."""
    async with manager:
        async with sandbox(manager):
            await add(manager, 1)
            pg18.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE datname = '{database}' AND backend_type = 'client backend'"
            )
            with pytest.raises((DBAPIError, OSError, SandboxEnded)):
                await count(manager)
        async with sandbox(manager):
            assert await count(manager) == 0


async def test_tables_made_inside_are_gone(manager: DatabaseSessionManager) -> None:
    class Other(DeclarativeBase):
        metadata = MetaData()

    class Thing(Other):
        __tablename__ = "sandboxed_thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        other: Mapped[int] = mapped_column(
            ForeignKey("sandboxed_thing.id", deferrable=True, initially="DEFERRED")
        )

    async with manager:
        for _ in range(2):
            async with sandbox(manager):
                await add(manager, 1)  # what is deferred has been looked up by now
                await manager.create_all(Other.metadata)
                with pytest.raises(IntegrityError):
                    async with manager.session() as db:
                        db.add(Thing(id=1, other=99))


async def test_locks_of_the_session_end_with_the_sandbox(manager: DatabaseSessionManager) -> None:
    held = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
    async with manager:
        async with sandbox(manager):
            async with manager.session() as db:
                await db.execute(text("SELECT pg_advisory_lock(7)"))
                assert await db.scalar(held) == 1
        async with manager.session() as db:
            assert await db.scalar(held) == 0


async def test_the_guard_does_not_strike_the_sandbox(driver_url: str) -> None:
    """A server that ends idle transactions ends a long test's neither."""
    url = driver_url
    create_tables(url)
    async with DatabaseSessionManager().init(url) as manager:
        async with manager.connect(isolation_level="AUTOCOMMIT") as connection:
            name = await connection.scalar(text("SELECT current_database()"))
            await connection.execute(
                text(f"ALTER DATABASE {name} SET idle_in_transaction_session_timeout = 200")
            )
    async with DatabaseSessionManager().init(url) as manager, sandbox(manager):
        await add(manager, 1)
        await asyncio.sleep(0.6)
        assert await count(manager) == 1


# -- a database of its own -------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "asyncpg", "psycopg"])
def alone(request: pytest.FixtureRequest) -> DatabaseSessionManager:
    """A manager with its tables, of which a sandbox is made as a clone."""
    if request.param == "sqlite":
        url = request.getfixturevalue("sqlite_url")
    else:
        server, database = (request.getfixturevalue(name) for name in ("pg18", "database"))
        url = server.url(database, request.param)
    with Database(url, metadata=Model.metadata) as database:
        database.create_all()
    options: Any = {"metadata": Model.metadata, "sync_in_async": "allow"}
    return DatabaseSessionManager().init(url, **options)


async def test_a_database_of_its_own(alone: DatabaseSessionManager) -> None:
    """Writers alternate, transactions commit for good; nothing of it is in the real one."""
    async with alone as manager:
        await add(manager, 1)  # the pool is warm, and the clone has what there was
        for _ in range(2):
            async with sandbox(manager, isolation="database"):
                await add(manager, 2)
                await asyncio.to_thread(sync_add, manager, 3)
                await asyncio.to_thread(asyncio.run, add(manager, 4))
                await manager.close()
                async with manager.reader() as db:
                    assert await db.scalar(COUNT) == 4
                if manager.engine.dialect.name == "postgresql":
                    async with manager.session() as first, manager.session() as second:
                        first.add(Item(id=5))
                        await first.flush()
                        second.add(Item(id=6))
                        await second.flush()
                        await first.rollback()
                    assert await count(manager) == 5
                    async with manager.connect(isolation_level="AUTOCOMMIT") as connection:
                        await connection.execute(text("VACUUM sandboxed_item"))
            assert await count(manager) == 1
            await asyncio.to_thread(sync_add, manager, 10)
            async with manager.session() as db:
                await db.delete(await db.get_one(Item, 10))


@pytest.mark.parametrize("where", ["file", "memory"])
async def test_on_sqlite_a_sandbox_is_a_clone_of_the_file(sqlite_url: str, where: str) -> None:
    url = sqlite_url if where == "file" else "sqlite://"
    options: Any = {"metadata": Model.metadata, "sync_in_async": "allow"}
    async with DatabaseSessionManager().init(url, **options) as manager:
        await manager.create_all()
        await add(manager, 1)
        for _ in range(3):
            async with sandbox(manager):
                await asyncio.gather(*(add(manager, key) for key in range(2, 20)))
                with pytest.raises(IntegrityError):
                    async with manager.session() as db:
                        db.add(Link(id=1, other=99))
                with manager.sync_session() as session:
                    assert session.scalar(COUNT) == 19
            assert await count(manager) == 1


def test_the_copies_of_a_file_share_a_folder_that_goes_with_its_manager(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    database = Database(sqlite_url, metadata=Model.metadata)
    database.create_all()
    for url in (sqlite_url, "sqlite://"):  # the second has a folder of its own
        database.close()
        database.init(url, metadata=Model.metadata)
        database.create_all()
        seen = set()
        for _ in range(2):
            with sandbox(database), database.session() as db:
                db.add(Item(id=1))
                db.flush()
                seen |= {path.parent for path in copies.rglob("*.db") if path.name != "memory.db"}
        (kept,) = seen
        assert list(kept.iterdir()) == []
    database.close()
    del database, db
    gc.collect()
    assert list(copies.rglob("*")) == []


def test_a_file_that_was_removed_after_a_sandbox_is_missed(sqlite_url: str) -> None:
    with Database(sqlite_url, metadata=Model.metadata) as database:
        database.create_all()
        with sandbox(database):
            pass
        Path(sqlite_url.removeprefix("sqlite:///")).unlink()
        with pytest.raises(TemplateUnusable, match="There is no SQLite file"), sandbox(database):
            pass


@pytest.mark.parametrize("isolation", ["transaction", "database"])
def test_a_plain_with(driver_url: str, sqlite_url: str, isolation: Any) -> None:
    for url in (driver_url, sqlite_url):
        with Database(url, metadata=Model.metadata) as database:
            database.create_all()
            with sandbox(database, isolation=isolation):
                with database.session() as db:
                    db.add(Item(id=1))
                with database.session() as db:
                    assert db.scalar(COUNT) == 1
            with database.session() as db:
                assert db.scalar(COUNT) == 0


def test_an_unused_sandbox_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of it is imported with engineroom, and a manager without one asks one attribute."""
    import subprocess
    import sys

    code = "import engineroom, sys; sys.exit('engineroom.testing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert logging.getLogger("engineroom.sandbox") is outer.logger
