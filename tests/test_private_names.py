"""Each private name that the core relies on does what it is relied on for.

They are few, and a new release may take any of them away: then these tests fail, and say which.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import inspect
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiosqlite
import asyncmy.cursors
import asyncpg
import litestar
import psycopg
import pymysql
import pytest
import sqlalchemy.util
import uvloop
from fastapi import Depends, FastAPI
from fastapi.requests import HTTPConnection
from litestar.exceptions import LitestarException
from litestar.testing import TestClient
from litestar.utils.scope.state import ScopeState
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util import await_only, greenlet_spawn

from engineroom import Database, DatabaseSessionManager
from engineroom.backends.mysql.sparing import is_unread
from engineroom.backends.postgresql.beginning import has_sent, tell_what_is_sent
from engineroom.backends.sqlite import _thread_of
from engineroom.fastapi import awaited_by_fastapi, function_stack
from engineroom.forks import part_uvloop
from engineroom.lending import Rack
from engineroom.testing import PostgresServer, WireProxy


class Counting(QueuePool):
    """Counts what passes the one private method that `engineroom.lending.Lender` overrides."""

    returned = 0

    def _do_return_conn(self, record: Any) -> None:
        type(self).returned += 1
        assert record.record_info is not None
        super()._do_return_conn(record)  # type: ignore[misc]


@pytest.fixture
def engine() -> Iterator[Engine]:
    Counting.returned = 0
    made = create_engine("sqlite://", poolclass=Counting)
    yield made
    made.dispose()


def close(connection: Any) -> None:
    connection.close()


def invalidate(connection: Any) -> None:
    connection.invalidate()
    connection.close()


def detach(connection: Any) -> None:
    """The connection leaves the pool at once: its place there is free again."""
    driver = connection.detach()
    assert driver is None
    assert Counting.returned == 1


@pytest.mark.parametrize("end", [close, invalidate, detach])
def test_do_return_conn_passes_each_return_once(engine: Engine, end: Callable[[Any], None]) -> None:
    """Relied on by `Lender._do_return_conn`, which gives the permit back."""
    connection = engine.raw_connection()
    driver = connection.dbapi_connection
    assert Counting.returned == 0
    end(connection)
    assert Counting.returned == 1
    del connection
    gc.collect()
    assert Counting.returned == 1
    if end is detach:
        driver.close()  # type: ignore[union-attr]  # it is the caller's now


@pytest.mark.filterwarnings("ignore:.*garbage collector:sqlalchemy.exc.SAWarning")
def test_do_return_conn_passes_what_the_garbage_collector_returns(engine: Engine) -> None:
    connection = engine.raw_connection()
    del connection
    gc.collect()
    assert Counting.returned == 1


def test_do_return_conn_passes_a_session_that_failed(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError), Session(engine) as session:
        session.execute(text("SELECT 1"))
        raise ZeroDivisionError
    assert Counting.returned == 1


def test_do_return_conn_is_the_queue_pools_own() -> None:
    for pool in (QueuePool, AsyncAdaptedQueuePool):
        assert list(inspect.signature(pool._do_return_conn).parameters) == ["self", "record"]


def test_dec_overflow_counts_a_connection_that_was_taken_out() -> None:
    """Relied on by `Lender.part_with`, so that what SQLAlchemy says of the pool stays true."""
    for pool_class in (QueuePool, AsyncAdaptedQueuePool):
        pool = pool_class(lambda: None, pool_size=5, max_overflow=-1)
        pool._inc_overflow()
        assert pool.checkedout() == 1
        pool._dec_overflow()
        assert pool.checkedout() == 0


@pytest.mark.filterwarnings("ignore:.*garbage collector:sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize("end", ["close", "invalidate", "detach", "dispose"])
def test_the_dialect_closes_each_connection(engine: Engine, end: str) -> None:
    """Relied on by `cap.note_closings`; public, but documented nowhere as the only way."""
    closed: list[object] = []
    dialect: Any = engine.dialect
    dialect.do_close = lambda connection: closed.append(id(connection)) or connection.close()
    connection = engine.raw_connection()
    driver = id(connection.dbapi_connection)
    if end == "detach":
        connection.detach()
    if end == "invalidate":
        connection.invalidate()
    connection.close()
    engine.dispose()
    assert closed == [driver]


def test_record_info_outlives_invalidation(engine: Engine) -> None:
    """The berth is kept there, and asked for its permit when an invalidated connection returns."""
    connection = engine.raw_connection()
    assert connection.record_info is not None
    connection.record_info["berth"] = "mine"
    record = connection._connection_record  # type: ignore[attr-defined]
    connection.invalidate()
    assert record.record_info == {"berth": "mine"}
    connection = engine.raw_connection()
    assert connection.record_info == {"berth": "mine"}
    assert not hasattr(connection, "__dict__") or not vars(connection)  # it keeps nothing itself
    connection.detach()
    assert connection.record_info is None
    connection.close()


def test_info_outlives_invalidation_until_the_next_connection(engine: Engine) -> None:
    """The berth is kept there, too, for what is detached takes it along."""
    connection = engine.raw_connection()
    connection.info["berth"] = "mine"
    # What `lending` has in hand when it comes back; no type names it, for it is private.
    record = connection._connection_record  # type: ignore[attr-defined]
    connection.invalidate()
    assert record.info == {"berth": "mine"}
    connection = engine.raw_connection()
    assert "berth" not in connection.info
    connection.info["berth"] = "another"
    connection.detach()
    assert connection.info == {"berth": "another"}
    connection.close()


def test_the_creator_may_write_into_both(engine: Engine) -> None:
    """Relied on by `lending.Opener`: what it writes belongs to the connection that it opens."""
    opened: list[Any] = []

    def creator(record: Any) -> sqlite3.Connection:
        record.info["berth"] = record.record_info["berth"] = len(opened)
        opened.append(record)
        return sqlite3.connect(":memory:")

    pool = QueuePool(creator)
    connection = pool.connect()
    assert connection.info == connection.record_info == {"berth": 0}
    connection.invalidate()
    connection = pool.connect()
    assert connection.info == connection.record_info == {"berth": 1}
    connection.invalidate()


def test_what_the_hot_path_asks_python_finds_without_a_search(postgres_url: str) -> None:
    """CPython keeps 30 attributes of an object in line, and finds no method of it fast beyond.

    Nor one of SQLAlchemy's proxy once anything was stored on that.
    """
    database = Database(postgres_url, pool_size=1, max_overflow=1, pool_min=1)
    with database, database.session() as db:
        assert db.scalar(text("SELECT 1")) == 1
        assert len(vars(database.engine.pool)) <= 30
        assert not vars(db.connection().connection)

    async def main() -> None:
        manager = DatabaseSessionManager()
        manager.init(postgres_url, pool_size=1, max_overflow=1, pool_min=1)
        async with manager, manager.session() as session, manager.session() as other:
            assert await session.scalar(text("SELECT 1")) == 1
            assert await other.scalar(text("SELECT 1")) == 1  # it grows for that
            loops: Any = manager.engine.pool
            (shelf,) = loops.shelves.values()
            assert len(vars(shelf)) <= 30
            assert {"timers", "_filling"} <= vars(shelf).keys()  # that come and go
            connection = await session.connection()
            assert not vars(await connection.get_raw_connection())

    asyncio.run(main())


def test_queue_class_makes_the_queue_of_a_pool() -> None:
    """Relied on by `lending.Rack`: the pool asks for nothing but what it has."""
    asked: set[str] = set()

    class Racked(QueuePool):
        def _queue_class(self, maxsize: int, use_lifo: bool = False) -> Any:  # type: ignore[override]
            rack = Rack[Any](maxsize, use_lifo)

            class Spy:
                def __getattr__(self, name: str) -> Any:
                    asked.add(name)
                    return getattr(rack, name)

            return Spy()

    made = create_engine("sqlite://", poolclass=Racked, pool_size=1, max_overflow=-1)
    first, second = made.raw_connection(), made.raw_connection()
    first.close()
    second.close()
    assert (made.pool.checkedin(), made.pool.size(), made.pool.overflow()) == (1, 1, 0)  # type: ignore[attr-defined]
    made.dispose()
    made.dispose()
    assert asked == {"get", "put", "qsize", "maxsize", "use_lifo"}


def test_what_a_pool_class_is_given_is_what_recreate_passes_on() -> None:
    """`create_engine` hands a pool class its options; `dispose()` makes the pool anew with them."""
    made = create_engine(
        "sqlite://", poolclass=Counting, pool_size=3, max_overflow=4, pool_timeout=7
    )
    made.dispose()
    pool = made.pool
    assert type(pool) is Counting
    assert (pool.size(), pool._max_overflow, pool.timeout()) == (3, 4, 7)


def test_asyncpgs_transport_leads_to_the_socket(postgres_url: str) -> None:
    """Relied on by `backends.postgresql.sockets.asyncpg_transport`: liveness, forks, keepalives."""

    async def main() -> None:
        connection = await asyncpg.connect(postgres_url)
        try:
            transport = connection._transport
            assert transport.get_extra_info("socket").fileno() > 2
            assert callable(transport.abort)
            assert connection._loop is asyncio.get_running_loop()
        finally:
            await connection.close()

    asyncio.run(main())


def test_asyncpgs_cancel_requests_can_be_waited_for(postgres_url: str) -> None:
    """Relied on by `backends.pooled._asyncpg_cancelling`: PgBouncer 1.18 outlives its clients."""

    async def main() -> None:
        connection = await asyncpg.connect(postgres_url)
        sleeping = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
        await asyncio.sleep(0.2)
        await connection._cancel(asyncio.get_running_loop().create_future())
        with pytest.raises(asyncpg.QueryCanceledError):
            await sleeping
        assert connection._cancellations == set()
        await connection.close()

    asyncio.run(main())


def test_sqlalchemys_adapter_leads_to_asyncpgs_connection(postgres_url: str) -> None:
    """`driver_connection` and `run_async` are public, and so is what they are relied on for."""

    async def main() -> None:
        engine = create_async_engine(postgres_url.replace("://", "+asyncpg://"))
        async with engine.connect() as connection:
            raw = await connection.get_raw_connection()
            assert isinstance(raw.driver_connection, asyncpg.Connection)
            assert callable(raw.dbapi_connection.run_async)  # type: ignore[union-attr]
        await engine.dispose()

    asyncio.run(main())


def test_greenlet_spawn_and_await_only_are_a_pair() -> None:
    """Relied on by `pool` and `engines`: synchronous pool code that awaits."""
    assert {"greenlet_spawn", "await_only"} <= set(dir(sqlalchemy.util))

    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    def synchronous(extra: int) -> int:
        return int(await_only(answer())) + extra

    assert asyncio.run(greenlet_spawn(synchronous, 1)) == 43


def test_await_only_does_not_give_way_for_what_need_not_wait() -> None:
    """Relied on by `LoopPool._open`: a generator is started before another task can run."""
    order: list[str] = []

    async def ready() -> None:
        order.append("ready")

    async def other() -> None:
        order.append("other")

    async def main() -> None:
        task = asyncio.create_task(other())
        await greenlet_spawn(lambda: await_only(ready()))
        order.append("back")
        await task

    asyncio.run(main())
    assert order == ["ready", "back", "other"]


def test_get_running_loop_with_an_underscore_returns_none_outside() -> None:
    """Relied on by `ledger.current_task`: the public name would raise."""
    assert asyncio._get_running_loop() is None

    async def inside() -> bool:
        return asyncio._get_running_loop() is asyncio.get_running_loop()

    assert asyncio.run(inside())


def test_a_loop_that_ends_closes_its_suspended_generators() -> None:
    """Relied on by `LoopPool._end_with_loop`: with the loop still able to run what it awaits."""
    ended: list[asyncio.AbstractEventLoop] = []

    async def keeper() -> Any:
        try:
            yield
        finally:
            await asyncio.sleep(0)
            ended.append(asyncio.get_running_loop())

    kept = keeper()

    async def main() -> asyncio.AbstractEventLoop:
        await anext(kept)
        return asyncio.get_running_loop()

    loop = asyncio.run(main())
    assert ended == [loop]


class PrivateBase(DeclarativeBase):
    """Apart from the application's."""


class Row(PrivateBase):
    __tablename__ = "private_row"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture
def row(engine: Engine) -> Iterator[tuple[Session, Row]]:
    PrivateBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Row(id=1, name="a"))
        session.commit()
        yield session, session.get_one(Row, 1)


def test_after_rollback_comes_before_objects_are_expired(row: tuple[Session, Row]) -> None:
    """Relied on by `sessions._keep_what_was_loaded`: what has left the session keeps its values."""
    session, loaded = row
    seen: list[bool] = []

    def after_rollback(session: Session) -> None:
        seen.append("name" in loaded.__dict__)
        session.expunge_all()

    event.listen(session, "after_rollback", after_rollback)
    session.rollback()
    assert seen == [True]
    assert loaded.__dict__["name"] == "a"


def test_a_session_may_change_its_class(engine: Engine) -> None:
    """Relied on by `sessions.retire`: a subclass without slots of its own takes a session over."""
    session = Session(engine)
    session.__class__ = type("Session", (Session,), {})
    session.close()


def test_deleted_objects_are_announced_before_they_are_expired(row: tuple[Session, Row]) -> None:
    """What a fix of guarantee 12 for deleted objects can stand on: `deleted_to_persistent`."""
    session, loaded = row
    session.delete(loaded)
    session.flush()
    event.listen(session, "deleted_to_persistent", lambda session, gone: session.expunge(gone))
    session.rollback()
    assert loaded.__dict__["name"] == "a"


def test_aiosqlite_keeps_its_sqlite3_connection_where_a_forked_child_looks() -> None:
    async def main() -> None:
        async with aiosqlite.connect(":memory:") as connection:
            assert isinstance(connection._conn, sqlite3.Connection)

    asyncio.run(main())


def test_aiosqlites_thread_keeps_no_process_from_its_end(sqlite_url: str) -> None:
    """Relied on by `backends.sqlite._thread_of`: SQLAlchemy sets it only where it opens itself."""

    async def main() -> None:
        async with DatabaseSessionManager().init(sqlite_url) as manager:
            async with manager.connect() as connection:
                raw = await connection.get_raw_connection()
                assert _thread_of(raw.driver_connection).is_alive()
                assert _thread_of(raw.driver_connection).daemon

    asyncio.run(main())


# -- FastAPI ---------------------------------------------------------------------------------------


def test_fastapi_closes_a_stack_between_the_endpoint_and_its_response() -> None:
    """`engineroom.fastapi.function_stack`."""
    seen: list[str] = []

    async def watch(*error: object) -> None:
        seen.append("the stack was closed")

    async def dependency(connection: HTTPConnection) -> None:
        function_stack(connection.scope).push_async_exit(watch)

    async def endpoint(db: Any = Depends(dependency)) -> None:
        seen.append("the endpoint returned")

    async def send(message: Any) -> None:
        seen.append(message["type"])

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    app = FastAPI()
    app.add_api_route("/", endpoint)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert seen[:3] == ["the endpoint returned", "the stack was closed", "http.response.start"]


def test_fastapi_awaits_what_a_marked_function_returns() -> None:
    """`engineroom.fastapi.awaited_by_fastapi`: the mark of `asyncio` on 3.11 is a private one."""

    async def one() -> int:
        return 1

    def function() -> Any:
        return one()

    assert not asyncio_says_coroutine(function)
    awaited_by_fastapi(function)
    assert asyncio_says_coroutine(function)


def asyncio_says_coroutine(function: Any) -> bool:
    if sys.version_info >= (3, 12):
        return inspect.iscoroutinefunction(function)
    return asyncio.iscoroutinefunction(function)


def test_litestar_notes_in_the_scope_that_a_response_has_started() -> None:
    """Before it is sent: `engineroom.litestar` takes it back where a COMMIT failed instead."""

    @litestar.get("/")
    async def ask() -> str:
        return ""

    noted = []

    async def starting(message: Any, scope: Any) -> None:
        noted.append(ScopeState.from_scope(scope).response_started)
        raise KeyError

    app = litestar.Litestar([ask], before_send=[starting], openapi_config=None)
    with TestClient(app) as client, pytest.raises(LitestarException, match="response started"):
        client.get("/")
    assert noted == [True]


def test_alembics_context_knows_what_the_command_asked_for(tmp_path: Path) -> None:
    """Relied on by `engineroom.alembic`: `current` changes nothing, and waits for nobody."""
    from alembic import command, context
    from alembic.config import Config

    (tmp_path / "env.py").write_text("from alembic import context")
    (tmp_path / "versions").mkdir()
    seen: list[bool] = []

    class Environment:
        def __init__(self) -> None:
            seen.append(vars(context)["_proxy"].context_opts.get("dont_mutate", False))

    config = Config(attributes={"note": Environment})
    config.set_main_option("script_location", str(tmp_path))
    (tmp_path / "env.py").write_text(
        "from alembic import context\ncontext.config.attributes['note']()"
    )
    command.current(config)
    command.upgrade(config, "head")
    assert seen == [True, False]


def test_pymysqls_names_lead_to_its_socket_and_its_deadline(mysql_url: str) -> None:
    """Relied on by `backends.mysql`: liveness, forks, and a deadline for connecting alone."""
    place = make_url(mysql_url)
    connection = pymysql.connect(
        host=place.host,
        port=place.port or 0,
        user=place.username,
        password=place.password,
        read_timeout=0.5,
    )
    with connection, connection.cursor() as cursor:
        assert connection._sock.fileno() > 2
        assert connection._read_timeout == 0.5
        connection._read_timeout = None
        cursor.execute("SELECT sleep(1)")
        assert cursor.fetchone() == (0,)


def test_asyncmys_transport_leads_to_the_socket(mysql_url: str) -> None:
    """Relied on by `backends.mysql`: liveness, forks, closed loops."""
    place = make_url(mysql_url)

    async def main() -> None:
        connection = await asyncmy.connect(
            host=place.host, port=place.port, user=place.username, password=place.password
        )
        transport = connection._transport
        assert transport.get_extra_info("socket").fileno() > 2
        assert callable(transport.abort)
        transport.abort()
        assert transport.is_closing()
        assert connection.connected  # it knows nothing of it
        connection.close()

    asyncio.run(main())


def test_what_is_unread_of_a_stream_of_asyncmy_is_known(mysql_url: str) -> None:
    """Relied on by `backends.mysql.sparing.is_unread`."""
    place = make_url(mysql_url)

    async def main() -> None:
        connection = await asyncmy.connect(
            host=place.host,
            port=place.port,
            user=place.username,
            password=place.password,
            database=place.database,
        )
        assert not is_unread(connection)
        cursor = connection.cursor(asyncmy.cursors.SSCursor)
        await cursor.execute("SELECT seq FROM seq_1_to_9")
        assert is_unread(connection)
        await cursor.fetchall()
        assert not is_unread(connection)
        await connection.ensure_closed()

    asyncio.run(main())


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("side", ["sync", "async"])
def test_a_cursor_of_psycopg_knows_whether_it_has_sent_its_statement(
    pg18: PostgresServer, proxy: WireProxy, side: str, prepared: bool
) -> None:
    """`engineroom.backends.postgresql.beginning`: before that, nothing was done."""
    url = proxy.url(pg18.url(driver="psycopg"))
    seen: list[bool] = []

    def failing(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
        try:
            cursor.execute(statement)
        finally:
            seen.append(has_sent(cursor))

    def work(engine: Engine, connection: Any, nth: int) -> None:
        for _ in range(8 if prepared else 0):
            connection.execute(text("SELECT 3"))
        connection.rollback()
        fault = proxy.cut_before(nth=nth)  # the first message is BEGIN, the second the statement
        engine.dialect.do_execute = failing  # type: ignore[method-assign,assignment]
        with pytest.raises(DBAPIError):
            connection.execute(text("SELECT 3"))
        assert fault.happened

    def tell(connection: Any, record: object) -> None:
        tell_what_is_sent(getattr(connection, "driver_connection", connection))

    async def main(nth: int) -> None:
        engine = create_async_engine(url)
        event.listen(engine.sync_engine, "connect", tell)
        async with engine.connect() as connection:
            await connection.run_sync(lambda raw: work(engine.sync_engine, raw, nth))
        await engine.dispose()

    for nth in (1, 2):
        if side == "sync":
            engine = create_engine(url)
            event.listen(engine, "connect", tell)
            with engine.connect() as connection:
                work(engine, connection, nth)
            engine.dispose()
        else:
            asyncio.run(main(nth))
    assert seen == [False, True]


def test_psycopg_looks_for_a_pipeline_and_its_answers_where_we_put_them(
    pg18: PostgresServer,
) -> None:
    """Relied on by `engineroom.backends.postgresql.pipelining`."""
    url = pg18.url(driver="psycopg").replace("+psycopg", "")
    with psycopg.connect(url) as driver:
        assert driver._pipeline is None
        with driver.pipeline() as pipeline:
            assert driver._pipeline is pipeline
            driver.pgconn.send_query_params(b"BEGIN", None)
            cursor = driver.cursor()
            pipeline.result_queue.append((cursor, None))
            cursor.execute("SELECT 1 / 0")  # (it begins nothing)
            begun, (asked, _) = pipeline.result_queue
            assert (begun, asked) == ((cursor, None), cursor)
            assert not pipeline.command_queue  # it was sent
            assert cursor.pgresult is None
            driver.pgconn.pipeline_sync()
            pipeline.result_queue.append(None)
            with pytest.raises(psycopg.errors.DivisionByZero):
                driver.wait(pipeline._fetch_gen(flush=False))
            assert not pipeline.result_queue
            assert cursor.statusmessage == "BEGIN"
            driver.wait(pipeline._sync_gen())


def test_an_isolation_level_is_reset_by_what_the_record_keeps(engine: Engine) -> None:
    """Relied on by `Lender.replace`, whose new connection must be reset as well."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        berth: Any = connection.connection
        record = berth._connection_record
        assert len(record.finalize_callback) == 1
        driver = record.dbapi_connection
        record.invalidate()
        assert not record.finalize_callback
        assert record.get_connection() is not driver


def test_uvloop_lends_the_loop_that_libuv_makes_anew() -> None:
    assert ctypes.CDLL(uvloop.loop.__file__).uv_loop_fork
    loop = uvloop.new_event_loop()
    assert type(uvloop.loop.libuv_get_loop_t_ptr(loop)).__name__ == "PyCapsule"
    part_uvloop(loop, uvloop.loop)
    assert loop.run_until_complete(asyncio.to_thread(int)) == 0
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
