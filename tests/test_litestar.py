"""Litestar: one session for each request, whose COMMIT comes before the response leaves."""

from __future__ import annotations

import asyncio
import doctest
import logging
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import websockets.exceptions
import websockets.sync.client
from litestar import (
    Controller,
    Litestar,
    Request,
    Response,
    WebSocket,
    get,
    post,
    websocket,
    websocket_listener,
)
from litestar.background_tasks import BackgroundTask
from litestar.config.compression import CompressionConfig
from litestar.config.response_cache import ResponseCacheConfig
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException, NotAuthorizedException
from litestar.handlers import BaseRouteHandler
from litestar.middleware import ASGIMiddleware
from litestar.params import FromPath, FromQuery
from litestar.response import Stream
from litestar.testing import AsyncTestClient, TestClient
from litestar.types import ASGIApp
from scenario import Item
from serving import served
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

import engineroom.litestar
from engineroom import DatabaseSessionManager, PoolExhausted, SessionClosed, on_commit
from engineroom.asgi import current_session
from engineroom.errors import AlreadyInitialized, SessionInUse
from engineroom.litestar import EngineRoomPlugin
from engineroom.testing import PostgresServer

if TYPE_CHECKING:  # Litestar resolves them all the same: the plugin tells it their names
    from sqlalchemy.ext.asyncio import AsyncSession

    from engineroom.litestar import AsyncSessionDep

TABLES = """
    CREATE TABLE item (name text);
    CREATE TABLE parent (id int PRIMARY KEY);
    CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
"""
STORE = text("INSERT INTO item VALUES (:name)")
ORPHAN = text("INSERT INTO child VALUES (1)")  # which only the COMMIT notices


class House:
    """One application on a socket, its client, its manager, and what happened in it."""

    def __init__(self, server: PostgresServer, database: str) -> None:
        self.manager = DatabaseSessionManager()
        self.seen: list[Any] = []
        self.stack = ExitStack()
        self._ask = lambda sql: server.execute(sql, database)
        self._url = server.url(database)
        self._ask(TABLES)

    def open(self, *handlers: Any, plugin: dict[str, Any] | None = None, **options: Any) -> None:
        """Serve these handlers."""
        options = {"openapi_config": None, "logging_config": None, **options}
        engineroom = EngineRoomPlugin(self.manager, url=self._url, **plugin or {})
        app = Litestar(handlers, plugins=[engineroom], **options)
        self.base = self.stack.enter_context(served(app))
        self.client = self.stack.enter_context(httpx.Client(base_url=self.base, timeout=20))

    def items(self) -> list[str]:
        """What is stored, as the server has it."""
        return [name for (name,) in self._ask("SELECT name FROM item ORDER BY name")]

    def websocket(
        self, path: str
    ) -> AbstractContextManager[websockets.sync.client.ClientConnection]:
        """Connect a WebSocket."""
        return websockets.sync.client.connect(self.base.replace("http", "ws") + path)


@pytest.fixture
def house(pg18: PostgresServer, database: str) -> Iterator[House]:
    made = House(pg18, database)
    with made.stack:
        yield made
    assert made.manager.stats().state == "closed"


# --- the COMMIT comes first ---------------------------------------------------------------------


def test_a_commit_that_fails_is_a_500_and_nothing_of_the_response_leaves(house: House) -> None:
    def body() -> Iterator[str]:
        house.seen.append("body")
        yield "stored"

    async def later() -> None:
        house.seen.append("background")

    async def orphan(db: AsyncSession) -> None:
        await db.execute(ORPHAN)
        on_commit(db, lambda: house.seen.append("committed"))

    @post("/plain")
    async def plain(db: AsyncSessionDep) -> str:
        await orphan(db)
        return "stored"

    @post("/stream")
    async def stream(db: AsyncSessionDep) -> Stream:
        await orphan(db)
        return Stream(body())

    @post("/background")
    async def background(db: AsyncSessionDep) -> Response[str]:
        await orphan(db)
        return Response("stored", background=BackgroundTask(later))

    house.open(plain, stream, background)
    for path in ("/plain", "/stream", "/background"):
        answer = house.client.post(path)
        assert answer.status_code == 500, path
        assert answer.json() == {"status_code": 500, "detail": "Internal Server Error"}
    assert house.seen == []


def test_a_commit_that_fails_is_answered_by_the_applications_handler(house: House) -> None:
    def conflict(request: Request[Any, Any, Any], error: IntegrityError) -> Response[str]:
        return Response("no such parent", status_code=409)

    @post("/")
    async def store(db: AsyncSessionDep) -> str:
        await db.execute(ORPHAN)
        return "stored"

    house.open(store, exception_handlers={IntegrityError: conflict})
    answer = house.client.post("/")
    assert (answer.status_code, answer.text) == (409, "no such parent")


def test_a_commit_that_fails_is_neither_compressed_nor_cached_as_a_success(house: House) -> None:
    @get("/", cache=60)
    async def store(db: AsyncSessionDep) -> str:
        house.seen.append("called")
        await db.execute(ORPHAN)
        return "stored" * 1000

    house.open(
        store,
        compression_config=CompressionConfig(backend="gzip"),
        response_cache_config=ResponseCacheConfig(),
    )
    for _ in range(2):
        answer = house.client.get("/")
        assert answer.status_code == 500
        assert answer.json()["detail"] == "Internal Server Error"
    assert house.seen == ["called", "called"]


def test_what_on_commit_was_given_runs_after_the_commit_and_before_the_response(
    house: House,
) -> None:
    @post("/{name:str}")
    async def store(db: AsyncSessionDep, name: FromPath[str]) -> str:
        await db.execute(STORE, {"name": name})
        on_commit(db, lambda: house.seen.append(house.items()))
        if name == "bad":
            raise HTTPException(status_code=400)
        return "stored"

    async def starting(message: Any, scope: Any) -> None:
        if message["type"] == "http.response.start":
            house.seen.append(message["status"])

    house.open(store, before_send=[starting])
    house.client.post("/good")
    house.client.post("/bad")
    assert house.seen == [["good"], 201, 400]


def test_while_a_response_streams_nothing_is_held_and_its_session_is_closed(house: House) -> None:
    go_on = threading.Event()

    async def body(db: AsyncSession) -> AsyncIterator[str]:
        yield "first"
        await asyncio.to_thread(go_on.wait)
        with pytest.raises(SessionClosed, match="open a new session where it is done"):
            await db.execute(text("SELECT 1"))
        yield "last"

    async def later(db: AsyncSession) -> None:
        try:
            await db.execute(text("SELECT 1"))
        except SessionClosed:
            house.seen.append("closed")

    @get("/")
    async def stream(db: AsyncSessionDep) -> Stream:
        await db.execute(STORE, {"name": "before"})
        return Stream(body(db), background=BackgroundTask(later, db))

    house.open(stream)
    with house.client.stream("GET", "/") as answer:
        chunks = answer.iter_text()
        assert next(chunks) == "first"
        stats, stored = house.manager.stats(), house.items()
        go_on.set()
        assert "".join(chunks) == "last"
    assert stats.scopes == ()
    assert [pool.lent for pool in stats.pools] == [0]
    assert stored == ["before"]
    house.stack.close()
    assert house.seen == ["closed"]


# --- what commits, and what rolls back ----------------------------------------------------------


def test_what_was_raised_rolls_back_and_what_was_returned_commits(house: House) -> None:
    class Mine(Exception):
        pass

    def answered(request: Request[Any, Any, Any], error: Mine) -> Response[str]:
        return Response("mine", status_code=200)

    async def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        await connection.state.db.execute(STORE, {"name": "guard"})
        raise NotAuthorizedException

    async def refuse(request: Request[Any, Any, Any], error: Any = None) -> None:
        await request.state.db.execute(STORE, {"name": "before_request"})
        raise HTTPException(status_code=403)

    async def after(response: Response[Any]) -> Response[Any]:
        raise Mine

    def handler(path: str, outcome: Callable[[], Any], **options: Any) -> Any:
        async def store(db: AsyncSessionDep) -> Any:
            await db.execute(STORE, {"name": path})
            return outcome()

        return get(f"/{path}", status_code=200, **options)(store)

    def raising(error: Exception) -> Callable[[], Any]:
        def outcome() -> Any:
            raise error

        return outcome

    @get("/validated")
    async def validated(db: AsyncSessionDep, number: FromQuery[int]) -> str:
        return str(number)

    house.open(
        handler("http", raising(HTTPException(status_code=418))),
        handler("mine", raising(Mine())),
        handler("unknown", raising(KeyError())),
        handler("unserializable", object),
        handler("after_request", str, after_request=after),
        handler("guard", str, guards=[guard]),
        handler("before_request", str, before_request=refuse),
        validated,
        handler("returned", str),
        handler("returned_409", lambda: Response("taken", status_code=409)),
        exception_handlers={Mine: answered},
    )
    expected = {
        "/http": 418,
        "/mine": 200,
        "/unknown": 500,
        "/unserializable": 500,
        "/after_request": 200,
        "/guard": 401,
        "/before_request": 403,
        "/validated?number=x": 400,
        "/nowhere": 404,
    }
    assert {path: house.client.get(path).status_code for path in expected} == expected
    assert house.items() == []
    assert house.client.get("/returned").status_code == 200
    assert house.client.get("/returned_409").status_code == 409
    assert house.items() == ["returned", "returned_409"]


def test_commit_on_decides_by_the_status(house: House) -> None:
    @post("/{status:int}")
    async def store(db: AsyncSessionDep, status: FromPath[int]) -> Response[str]:
        await db.execute(STORE, {"name": str(status)})
        return Response("", status_code=status)

    house.open(store, plugin={"commit_on": lambda status: status < 400})
    assert house.client.post("/202").status_code == 202
    assert house.client.post("/409").status_code == 409
    assert house.items() == ["202"]


# --- one session a request ----------------------------------------------------------------------


def test_whoever_asks_in_one_request_gets_the_same_session(house: House) -> None:
    async def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        house.seen.append(connection.state.db)

    async def own(db: AsyncSessionDep) -> AsyncSession:
        return db

    async def generated(
        db: AsyncSessionDep, own: NamedDependency[AsyncSession]
    ) -> AsyncGenerator[AsyncSession]:
        yield db
        await db.execute(STORE, {"name": "from the generator's end"})

    def middleware(app: ASGIApp) -> ASGIApp:
        async def asking(scope: Any, receive: Any, send: Any) -> None:
            house.seen.append(current_session())
            await app(scope, receive, send)

        return asking

    @get("/", guards=[guard], dependencies={"own": own, "generated": generated})
    async def ask(
        request: Request[Any, Any, Any],
        db: AsyncSessionDep,
        own: NamedDependency[AsyncSession],
        generated: NamedDependency[AsyncSession],
    ) -> str:
        house.seen += [db, own, generated, request.state.db, current_session()]
        return ""

    house.open(ask, middleware=[middleware])
    for _ in range(2):
        assert house.client.get("/").status_code == 200
    assert len(house.seen) == 14
    assert len({id(session) for session in house.seen[:7]}) == 1
    assert len({id(session) for session in house.seen}) == 2
    assert house.items() == ["from the generator's end"] * 2


def test_dependencies_that_litestar_runs_at_the_same_time_are_told_apart(house: House) -> None:
    def told(request: Request[Any, Any, Any], error: SessionInUse) -> Response[str]:
        return Response(str(error), status_code=599)

    async def one(db: AsyncSessionDep) -> str:
        await db.execute(text("SELECT pg_sleep(0.1)"))
        return "one"

    async def other(db: AsyncSessionDep) -> str:
        return await one(db)

    async def after_one(db: AsyncSessionDep, one: NamedDependency[str]) -> str:
        await db.execute(text("SELECT 1"))
        return f"{one}, then the other"

    @get("/at-once", dependencies={"one": one, "other": other})
    async def at_once(one: NamedDependency[str], other: NamedDependency[str]) -> str:
        return one + other

    @get("/in-turn", dependencies={"one": one, "other": after_one})
    async def in_turn(one: NamedDependency[str], other: NamedDependency[str]) -> str:
        return other

    house.open(at_once, in_turn, exception_handlers={SessionInUse: told})
    assert house.client.get("/at-once").status_code == 599
    assert house.client.get("/in-turn").text == "one, then the other"


def test_a_request_that_asks_for_none_opens_none(house: House) -> None:
    @get("/")
    async def ask() -> str:
        house.seen.append(house.manager.stats())
        return ""

    house.open(ask)
    house.client.get("/")
    assert house.seen[0].scopes == ()


def test_the_reader_has_no_transaction_and_refuses_writes(house: House) -> None:
    @get("/{write:int}")
    async def read(db: AsyncSessionDep, reader: AsyncSessionDep, write: FromPath[int]) -> list[str]:
        assert db is not reader
        if write:
            await reader.execute(STORE, {"name": "never"})
        house.seen += [scope.kind for scope in house.manager.stats().scopes]
        return list(await reader.scalars(text("SELECT name FROM item")))

    house.open(read)
    assert house.client.get("/0").json() == []
    assert house.client.get("/1").status_code == 500
    assert sorted(house.seen) == ["reader", "session"]
    assert house.items() == []


def test_the_names_are_the_users_to_choose_and_the_applications_own_come_first(
    house: House,
) -> None:
    @get("/")
    async def ask(
        session: AsyncSessionDep, readonly: AsyncSessionDep, db: NamedDependency[str]
    ) -> str:
        house.seen += [scope.kind for scope in house.manager.stats().scopes]
        return db

    async def mine() -> str:
        return "mine"

    names = {"dependency": "session", "reader_dependency": "readonly"}
    house.open(ask, plugin=names, dependencies={"db": Provide(mine)})
    assert house.client.get("/").text == "mine"
    assert sorted(house.seen) == ["reader", "session"]


def test_the_applications_own_dependency_of_that_name_stays(house: House) -> None:
    @get("/")
    async def ask(db: NamedDependency[str]) -> str:
        return db

    async def mine() -> str:
        return "mine"

    house.open(ask, dependencies={"db": Provide(mine)})
    assert house.client.get("/").text == "mine"


def test_two_databases_are_two_plugins(house: House, sqlite_url: str) -> None:
    orders = DatabaseSessionManager()
    with DatabaseSessionManager().init(sqlite_url).sync as made, made.connect() as connection:
        connection.execute(text("CREATE TABLE item (name text)"))

    @post("/{name:str}")
    async def store(db: AsyncSessionDep, orders: AsyncSessionDep, name: FromPath[str]) -> str:
        for session in (db, orders):
            await session.execute(STORE, {"name": name})
        if name == "bad":
            raise HTTPException(status_code=400)
        return f"{db.get_bind().dialect.name} {orders.get_bind().dialect.name}"

    second = EngineRoomPlugin(
        orders, url=sqlite_url, dependency="orders", reader_dependency="orders_reader"
    )
    app = Litestar([store], plugins=[EngineRoomPlugin(house.manager, url=house._url), second])
    with TestClient(app) as client:
        assert client.post("/good").text == "postgresql sqlite"
        assert client.post("/bad").status_code == 400
        with orders.sync_session() as db:
            assert db.scalars(text("SELECT name FROM item")).all() == ["good"]
    assert orders.stats().state == "closed"
    assert house.items() == ["good"]


# --- WebSockets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "returned"])
def test_a_websocket_commits_at_its_end_and_a_commit_that_fails_closes_with_1011(
    house: House, closes: bool
) -> None:
    @websocket("/{statement:str}")
    async def store(
        socket: WebSocket[Any, Any, Any], db: AsyncSessionDep, statement: FromPath[str]
    ) -> None:
        await socket.accept()
        await db.execute(ORPHAN if statement == "orphan" else STORE, {"name": statement})
        if statement == "bad":
            raise KeyError
        await socket.send_text("ready")
        await socket.receive_text()
        house.seen.append(house.items())
        if closes:
            await socket.close()

    house.open(store)

    def closed(statement: str) -> int:
        with house.websocket(f"/{statement}") as client:
            if statement != "bad":
                assert client.recv() == "ready"
                client.send("go on")
            with pytest.raises(websockets.exceptions.ConnectionClosed):
                client.recv()
            assert client.close_code is not None
            return client.close_code

    assert closed("orphan") == 1011
    assert closed("bad") == 4500
    assert house.items() == []
    assert closed("good") in (1000, 1006)  # where nobody closes, the server cuts the line
    assert house.items() == ["good"]
    assert house.seen == [[], []]


def test_a_listener_commits_when_its_client_has_left(
    house: House, eventually: Callable[[Callable[[], object]], None]
) -> None:
    # (A listener resolves its annotations when it is declared, before there is a plugin.)
    names = {"AsyncSessionDep": engineroom.litestar.AsyncSessionDep}

    @websocket_listener("/", signature_namespace=names)
    async def store(data: str, db: AsyncSessionDep) -> str:
        await db.execute(STORE, {"name": data})
        return data

    house.open(store)
    with house.websocket("/") as client:
        for name in ("one", "two"):
            client.send(name)
            assert client.recv() == name
        assert house.items() == []
    eventually(lambda: house.items() == ["one", "two"])


class CacheMiss(ASGIMiddleware):
    """Calls the handler in an `except` block, as caches do."""

    async def handle(self, scope: Any, receive: Any, send: Any, next_app: ASGIApp) -> None:
        try:
            {}[scope["path"]]
        except KeyError:
            await next_app(scope, receive, send)


def test_what_else_is_handled_when_the_response_starts_rolls_nothing_back(house: House) -> None:
    @post("/{name:str}", middleware=[CacheMiss()])
    async def store(db: AsyncSessionDep, name: FromPath[str]) -> None:
        await db.execute(STORE, {"name": name})
        if name == "raised":
            raise HTTPException(status_code=409)

    @websocket("/idle")
    async def idle(socket: WebSocket[Any, Any, Any], db: AsyncSessionDep) -> None:
        await socket.accept()
        await db.execute(STORE, {"name": "idle"})
        try:
            await asyncio.wait_for(socket.receive_text(), 0.01)
        except TimeoutError:
            await socket.close()

    house.open(store, idle)
    assert house.client.post("/stored").status_code == 201
    assert house.client.post("/raised").status_code == 409
    with house.websocket("/idle") as client:
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            client.recv()
        assert client.close_code == 1000
    assert house.items() == ["idle", "stored"]


def test_a_session_that_is_first_asked_for_after_the_response_is_refused(
    house: House, eventually: Callable[[Callable[[], object]], None]
) -> None:
    @get("/background")
    async def background(request: Request[Any, Any, Any]) -> Response[str]:
        return Response("", background=BackgroundTask(ask, request))

    async def ask(request: Request[Any, Any, Any]) -> None:
        for asking in (current_session, lambda: request.state.db):
            try:
                asking()
            except SessionClosed as error:
                house.seen.append(str(error))

    house.open(background)
    assert house.client.get("/background").status_code == 200
    eventually(lambda: len(house.seen) == 2)
    assert all("async with session_manager.session()" in told for told in house.seen)
    assert house.manager.stats().scopes == ()


# --- busy, gone, and named ----------------------------------------------------------------------


@pytest.fixture
def occupied(house: House) -> Iterator[Callable[..., None]]:
    """Serve with one connection for all, and hold it in a request."""
    held, release = asyncio.Event(), threading.Event()
    asked: list[threading.Thread] = []

    @get("/hold")
    async def hold(db: AsyncSessionDep) -> str:
        await db.execute(text("SELECT 1"))
        held.set()
        await asyncio.to_thread(release.wait)
        return ""

    @get("/held")
    async def wait() -> str:
        await held.wait()
        return ""

    def open_(*handlers: Any, **options: Any) -> None:
        pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
        house.open(hold, wait, *handlers, plugin=pool, **options)
        asked.append(threading.Thread(target=httpx.get, args=[f"{house.base}/hold"]))
        asked[0].start()
        house.client.get("/held")

    yield open_
    release.set()
    asked[0].join()


def test_an_empty_pool_is_a_503_with_retry_after_and_the_log_has_the_holders(
    house: House, occupied: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    @get("/asking")
    async def ask(db: AsyncSessionDep) -> str:
        await db.execute(text("SELECT 1"))
        return ""

    @get("/at-commit")
    async def add(db: AsyncSessionDep) -> str:
        db.add(Item(id=1))  # which the COMMIT stores
        return ""

    occupied(ask, add)
    caplog.set_level(logging.WARNING, "engineroom")
    for path in ("/asking", "/at-commit"):
        caplog.clear()
        answer = house.client.get(path)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        busy = "The service is busy. Please try again."
        assert answer.json() == {"status_code": 503, "detail": busy}
        (record,) = [record for record in caplog.records if record.name == "engineroom"]
        assert record.getMessage().startswith(f"GET {path} got no connection: ")
        assert "GET /hold" in record.getMessage()
        assert f"{__file__}:" in record.getMessage()


def test_the_applications_own_handler_of_an_empty_pool_stays(
    house: House, occupied: Callable[..., None]
) -> None:
    def own(request: Request[Any, Any, Any], error: PoolExhausted) -> Response[str]:
        return Response(f"all {error.size} taken", status_code=529)

    @get("/asking")
    async def ask(db: AsyncSessionDep) -> str:
        await db.execute(text("SELECT 1"))
        return ""

    occupied(ask, exception_handlers={PoolExhausted: own})
    answer = house.client.get("/asking")
    assert (answer.status_code, answer.text) == (529, "all 1 taken")


def sleepers(server: PostgresServer) -> list[str]:
    rows = server.execute("SELECT query FROM pg_stat_activity WHERE state = 'active'")
    return [query for (query,) in rows if query.startswith("SELECT pg_sleep")]


def test_when_the_client_has_gone_its_statement_is_stopped(
    house: House, pg18: PostgresServer, eventually: Callable[[Callable[[], object]], None]
) -> None:
    @post("/")
    async def store(db: AsyncSessionDep) -> str:
        await db.execute(STORE, {"name": "never"})
        await db.execute(text("SELECT pg_sleep(60)"))
        return ""

    house.open(store)
    host, _, port = house.base.rpartition("/")[2].partition(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        eventually(lambda: sleepers(pg18))
    eventually(lambda: not sleepers(pg18))
    eventually(lambda: house.manager.stats().scopes == ())
    assert house.items() == []


def test_it_goes_on_where_that_is_wished(
    house: House, eventually: Callable[[Callable[[], object]], None]
) -> None:
    @post("/")
    async def store(db: AsyncSessionDep) -> str:
        await db.execute(STORE, {"name": "all the same"})
        await db.execute(text("SELECT pg_sleep(1)"))
        return ""

    house.open(store, plugin={"cancel_on_disconnect": False})
    with pytest.raises(httpx.ReadTimeout):
        house.client.post("/", timeout=0.2)
    eventually(lambda: house.items() == ["all the same"])


def test_a_client_that_leaves_while_it_streams_ends_the_stream(
    house: House, eventually: Callable[[Callable[[], object]], None]
) -> None:
    async def body() -> AsyncIterator[str]:
        try:
            async with house.manager.session() as db:
                await db.execute(STORE, {"name": "never"})
                while True:
                    yield "more"
                    await asyncio.sleep(0.01)
        finally:
            house.seen.append("ended")

    @get("/")
    async def stream() -> Stream:
        return Stream(body())

    house.open(stream)
    with house.client.stream("GET", "/") as answer:
        next(answer.iter_raw())
    eventually(lambda: house.seen)
    eventually(lambda: house.manager.stats().scopes == ())
    assert house.items() == []


def test_reports_name_the_request_and_the_handlers_line(house: House) -> None:
    def note() -> str:
        house.seen.extend(house.manager.stats().scopes)
        return ""

    @get("/items/{number:int}")
    async def one(db: AsyncSessionDep, number: FromPath[int]) -> str:
        return note()

    @get("/sync", sync_to_thread=True)
    def sync(db: AsyncSessionDep) -> str:
        return note()

    class Shop(Controller):
        path = "/shop"

        @get("/orders")
        async def orders(self, db: AsyncSessionDep) -> str:
            return note()

    house.open(one, sync, Shop)
    for path in ("/items/7", "/sync", "/shop/orders"):
        assert house.client.get(path).status_code == 200
    owners = [scope.owner.partition("(")[2] for scope in house.seen]
    assert owners == ["GET /items/{number})", "GET /sync)", "GET /shop/orders)"]
    functions = [one.fn.__code__, sync.fn.__code__, Shop.orders.fn.__code__]
    places = [f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}" for code in functions]
    assert [scope.where for scope in house.seen] == places


def test_a_sync_handler_opens_a_session_of_its_own_in_its_thread(house: House) -> None:
    @post("/", sync_to_thread=True)
    def store() -> str:
        with house.manager.sync_session() as db:
            db.execute(STORE, {"name": "from a thread"})
        return ""

    house.open(store)
    assert house.client.post("/").status_code == 201
    assert house.items() == ["from a thread"]


# --- the application's life ---------------------------------------------------------------------


def test_the_manager_is_open_in_the_applications_own_lifespan(sqlite_url: str) -> None:
    manager = DatabaseSessionManager()
    seen = []

    @asynccontextmanager
    async def own(app: Litestar) -> AsyncGenerator[None]:
        async with manager.session() as db:
            await db.execute(text("CREATE TABLE item (name text)"))
        yield
        seen.append(manager.stats().state)

    @post("/")
    async def store(db: AsyncSessionDep) -> str:
        await db.execute(STORE, {"name": "stored"})
        return ""

    @get("/")
    async def count(db: AsyncSessionDep) -> int:
        return await db.scalar(text("SELECT count(*) FROM item")) or 0

    plugin = EngineRoomPlugin(manager, url=sqlite_url)
    app = Litestar([store, count], plugins=[plugin], lifespan=[own])
    assert manager.stats().state == "new"
    with TestClient(app) as client:
        assert manager.stats().state == "open"
        client.post("/")
        assert client.get("/").json() == 1
    assert manager.stats().state == "closed"
    assert seen == ["open"]


@pytest.mark.anyio
async def test_a_manager_that_is_open_already_is_refused(sqlite_url: str) -> None:
    async with DatabaseSessionManager().init(sqlite_url) as manager:
        app = Litestar([], plugins=[EngineRoomPlugin(manager)])
        with pytest.raises(ExceptionGroup) as caught:  # Litestar's own wrapping
            async with app.lifespan():
                pass
        assert caught.group_contains(AlreadyInitialized, match="one application opens and closes")


@pytest.mark.anyio
async def test_an_asynchronous_test_client_serves_again_and_again(sqlite_url: str) -> None:
    manager = DatabaseSessionManager()

    @get("/")
    async def ask(db: AsyncSessionDep) -> int:
        return await db.scalar(text("SELECT 42")) or 0

    app = Litestar([ask], plugins=[EngineRoomPlugin(manager, url=sqlite_url)])
    for _ in range(2):
        async with AsyncTestClient(app) as client:
            assert (await client.get("/")).json() == 42
    assert manager.stats().state == "closed"


def test_a_session_is_no_parameter_of_the_api(sqlite_url: str) -> None:
    @get("/")
    async def ask(db: AsyncSessionDep, reader: AsyncSessionDep, number: FromQuery[int]) -> int:
        return number

    app = Litestar([ask], plugins=[EngineRoomPlugin(DatabaseSessionManager(), url=sqlite_url)])
    operation = app.openapi_schema.to_schema()["paths"]["/"]["get"]
    assert [parameter["name"] for parameter in operation["parameters"]] == ["number"]


def test_a_name_that_is_misspelt_is_refused_at_the_start(sqlite_url: str) -> None:
    @get("/")
    async def ask(database: AsyncSessionDep) -> str:
        return ""

    with pytest.raises(Exception, match="Explicit dependency 'database'"):
        Litestar([ask], plugins=[EngineRoomPlugin(DatabaseSessionManager(), url=sqlite_url)])


def test_a_plugins_options_are_what_init_takes(sqlite_url: str) -> None:
    manager = DatabaseSessionManager()
    app = Litestar([], plugins=[EngineRoomPlugin(manager, url=sqlite_url, pool_size=3)])
    with TestClient(app):
        assert manager._room.settings.pool_size == 3


def test_the_example_works(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", sqlite_url)
    from examples.litestar_items import app

    with TestClient(app) as client:
        assert client.post("/valve").status_code == 201
        assert client.get("/").json() == ["valve"]


def test_the_plugins_own_example_works() -> None:
    (example,) = doctest.DocTestFinder().find(EngineRoomPlugin, globs=dict(globals()))[:1]
    assert example.examples != []
    assert doctest.DocTestRunner().run(example).failed == 0
