"""One session for each request: committed before its response leaves, and then closed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sqlite3
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio
import httpx
import psycopg
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from flask import Flask
from scenario import until
from serving import served
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.endpoints import HTTPEndpoint
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as connect_websocket

from engineroom import (
    Database,
    DatabaseSessionManager,
    SyncInAsyncWarning,
    rollback_only,
    session_manager,
)
from engineroom.asgi import DatabaseMiddleware, current_session
from engineroom.errors import (
    AlreadyInitialized,
    ConfigurationError,
    OutsideRequest,
    SessionClosed,
)
from engineroom.fastapi import (
    AsyncSessionDep,
    ReaderDep,
    SessionDep,
    get_db,
    get_sync_db,
    lifespan,
    session_dependency,
)
from engineroom.flask import EngineRoom
from engineroom.litestar import EngineRoomPlugin
from engineroom.testing import PostgresServer, WireProxy

TABLES = (
    "CREATE TABLE parent (id int PRIMARY KEY)",
    "INSERT INTO parent VALUES (1)",
    "CREATE TABLE item (name text, parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)",
)
INSERT = text("INSERT INTO item VALUES (:name, :parent)")
WRONG, RIGHT = 999, 1  # whose parent is missing, which only COMMIT notices


def raw(url: str) -> Any:
    """Connect without engineroom."""
    if url.startswith("sqlite"):
        return sqlite3.connect(url.partition("///")[2], isolation_level=None)
    return psycopg.connect(url.replace("+asyncpg", "").replace("+psycopg", ""), autocommit=True)


def calling(base: str) -> httpx.Client:
    """Return a client that connects anew each time: uvicorn hangs up after an error it logs."""
    return httpx.Client(base_url=base, headers={"connection": "close"})


def names(url: str) -> list[str]:
    """Return what another connection sees."""
    with contextlib.closing(raw(url)) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM item").fetchall()]


@pytest.fixture
def tables(url: str) -> str:
    """A database with the tables."""
    with contextlib.closing(raw(url)) as connection:
        for statement in TABLES:
            connection.execute(statement)
    return url


@pytest.fixture
def postgres_tables(postgres_url: str) -> str:
    """One on PostgreSQL."""
    with contextlib.closing(raw(postgres_url)) as connection:
        for statement in TABLES:
            connection.execute(statement)
    return postgres_url


# -- one session a request, committed before the response -----------------------------------------


async def the_session(db: AsyncSessionDep) -> AsyncSession:
    return db


async def yielded(db: AsyncSessionDep) -> AsyncIterator[AsyncSession]:
    yield db


def yielded_in_threads(db: SessionDep) -> Iterator[Session]:
    db.execute(text("SELECT 1"))  # in a thread of its own
    yield db


class Repository:
    def __init__(self, db: AsyncSessionDep) -> None:
        self.db = db


# FastAPI 0.121 resolves no annotation that is a string (`from __future__`) of what is no function.
Repository.__init__.__annotations__["db"] = AsyncSessionDep


async def of_repository(repository: Annotated[Repository, Depends()]) -> AsyncSession:
    return repository.db


ASYNC_SPELLINGS: dict[str, Any] = {
    "plain": Depends(get_db),
    "function scope": Depends(get_db, scope="function"),
    "request scope": Depends(get_db, scope="request"),
    "not cached": Depends(get_db, use_cache=False),
    "sub-dependency": Depends(the_session),
    "own yield": Depends(yielded),
    "own yield, function scope": Depends(yielded, scope="function"),
    "class": Depends(of_repository),
}
SYNC_SPELLINGS: dict[str, Any] = {
    "plain, sync": Depends(get_sync_db),
    "function scope, sync": Depends(get_sync_db, scope="function"),
    "own yield, sync": Depends(yielded_in_threads),
}
SPELLINGS = [*ASYNC_SPELLINGS, *SYNC_SPELLINGS]


def all_spellings() -> FastAPI:
    """Make an application with an endpoint for each spelling × kind of response."""
    app = FastAPI(lifespan=lifespan(pool_size=5, max_overflow=0))
    router = APIRouter(prefix="/routed")
    for name, spelling in ASYNC_SPELLINGS.items():
        add_async(app, name, spelling)
        add_async(router, name, spelling)
    for name, spelling in SYNC_SPELLINGS.items():
        add_sync(app, name, spelling)
        add_sync(router, name, spelling)
    app.include_router(router)
    return app


def add_async(app: Any, name: str, spelling: Any) -> None:
    @app.post(f"/plain/{name}")
    async def plain(parent: int, db: AsyncSessionDep, same: Any = spelling) -> str:
        assert db is same
        await same.execute(INSERT, {"name": name, "parent": parent})
        return "stored"

    @app.post(f"/streaming/{name}")
    async def streaming(parent: int, db: Any = spelling) -> StreamingResponse:
        await db.execute(INSERT, {"name": name, "parent": parent})

        async def body() -> AsyncIterator[str]:
            try:
                await db.execute(text("SELECT 1"))
                yield "the session lives"
            except Exception as error:
                yield str(error)

        return StreamingResponse(body())

    @app.post(f"/background/{name}")
    async def background(parent: int, tasks: BackgroundTasks, db: Any = spelling) -> str:
        await db.execute(INSERT, {"name": name, "parent": parent})

        async def work() -> None:
            try:
                await db.execute(text("SELECT 1"))
            except Exception as error:
                TOLD.append(str(error))

        tasks.add_task(work)
        return "stored"

    @app.websocket(f"/websocket/{name}")
    async def websocket(socket: WebSocket, parent: int, close: bool, db: Any = spelling) -> None:
        await socket.accept()
        await db.execute(INSERT, {"name": name, "parent": parent})
        await socket.send_text("executed")
        if close:
            await socket.close()


def add_sync(app: Any, name: str, spelling: Any) -> None:
    @app.post(f"/plain/{name}")
    def plain(parent: int, db: SessionDep, same: Any = spelling) -> str:
        assert db is same
        same.execute(INSERT, {"name": name, "parent": parent})
        return "stored"

    @app.post(f"/streaming/{name}")
    def streaming(parent: int, db: Any = spelling) -> StreamingResponse:
        db.execute(INSERT, {"name": name, "parent": parent})

        def body() -> Iterator[str]:
            try:
                db.execute(text("SELECT 1"))
                yield "the session lives"
            except Exception as error:
                yield str(error)

        return StreamingResponse(body())

    @app.post(f"/background/{name}")
    def background(parent: int, tasks: BackgroundTasks, db: Any = spelling) -> str:
        db.execute(INSERT, {"name": name, "parent": parent})

        def work() -> None:
            try:
                db.execute(text("SELECT 1"))
            except Exception as error:
                TOLD.append(str(error))

        tasks.add_task(work)
        return "stored"

    @app.websocket(f"/websocket/{name}")
    async def websocket(socket: WebSocket, parent: int, close: bool, db: Any = spelling) -> None:
        await socket.accept()
        await asyncio.to_thread(db.execute, INSERT, {"name": name, "parent": parent})
        await socket.send_text("executed")
        if close:
            await socket.close()


TOLD: list[str] = []  # by background tasks


def test_one_session_under_every_spelling_and_no_success_before_commit(
    tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", tables)
    TOLD.clear()
    with served(all_spellings()) as base, calling(base) as client:
        for prefix in ("", "/routed"):
            for name in SPELLINGS:
                for kind in ("plain", "streaming", "background"):
                    path = f"{prefix}/{kind}/{name}"
                    before = sorted(names(tables))  # a vacuum may have freed a place for the next
                    assert client.post(path, params={"parent": WRONG}).status_code == 500, path
                    assert sorted(names(tables)) == before, path
                    answer = client.post(path, params={"parent": RIGHT})
                    assert answer.status_code == 200, path
                    assert sorted(names(tables)) == sorted([*before, name]), path  # by now
                    if kind == "streaming":
                        assert "inside it). [session-closed]" in answer.text, path
        until(lambda: len(TOLD), lambda told: told == 2 * len(SPELLINGS))
        assert all("inside it). [session-closed]" in told for told in TOLD)
        assert session_manager.stats().scopes == ()


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_websocket_whose_commit_fails_closes_with_1011(
    tables: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", tables)
    with served(all_spellings()) as base:
        where = f"{base.replace('http', 'ws')}/websocket/{name.replace(' ', '%20')}"
        for parent, close, code in ((WRONG, 0, 1011), (WRONG, 1, 1011), (RIGHT, 1, 1000)):
            with connect_websocket(f"{where}?parent={parent}&close={close}") as client:
                assert client.recv() == "executed"
                with pytest.raises(ConnectionClosed) as closed:
                    client.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == code
    assert names(tables) == [name]


# -- the policy: returned commits, raised rolls back ----------------------------------------------


def insert_into(app: FastAPI) -> None:
    """Add endpoints that insert, and then end in different ways."""

    @app.post("/returned")
    async def returned(db: AsyncSessionDep) -> JSONResponse:
        await db.execute(INSERT, {"name": "returned", "parent": RIGHT})
        return JSONResponse("no", 409)

    @app.post("/raised")
    async def raised(db: AsyncSessionDep) -> None:
        await db.execute(INSERT, {"name": "raised", "parent": RIGHT})
        raise HTTPException(409)

    @app.post("/invalid")
    async def invalid(db: AsyncSessionDep) -> int:
        await db.execute(INSERT, {"name": "invalid", "parent": RIGHT})
        return "no number"  # type: ignore[return-value]

    @app.post("/only")
    async def only(db: AsyncSessionDep) -> str:
        await db.execute(INSERT, {"name": "only", "parent": RIGHT})
        rollback_only(db)
        return "not stored"

    @app.post("/threads")
    def threads(db: SessionDep) -> JSONResponse:
        db.execute(INSERT, {"name": "threads", "parent": RIGHT})
        return JSONResponse("no", 409)

    @app.post("/dangling")
    async def dangling(db: AsyncSessionDep) -> str:
        await db.execute(INSERT, {"name": "dangling", "parent": WRONG})
        return "not stored"

    @app.exception_handler(IntegrityError)
    async def conflict(request: Request, error: IntegrityError) -> JSONResponse:
        return JSONResponse("a conflict", 418)


ANSWERS = {
    "returned": 409,
    "raised": 409,
    "invalid": 500,
    "only": 200,
    "threads": 409,
    "dangling": 418,
}


def test_returned_commits_and_raised_rolls_back(tables: str) -> None:
    app = FastAPI(lifespan=lifespan(url=tables))
    insert_into(app)
    with served(app) as base, calling(base) as client:
        answers = {name: client.post(f"/{name}").status_code for name in ANSWERS}
    assert answers == ANSWERS
    assert names(tables) == ["returned", "threads"]


async def from_state(request: Request) -> bool:
    """Ask the middleware before the dependency."""
    return request.state.db is await get_db(request)


@pytest.mark.parametrize("commit_on", [None, lambda status: status < 400])
def test_the_middleware_may_decide_by_the_status(tables: str, commit_on: Any) -> None:
    app = FastAPI(lifespan=lifespan(url=tables))
    app.add_middleware(DatabaseMiddleware, commit_on=commit_on)
    insert_into(app)

    @app.post("/state/raised")
    async def raised_with_state(request: Request) -> None:
        await request.state.db.execute(INSERT, {"name": "state raised", "parent": RIGHT})
        raise HTTPException(409)

    @app.post("/state/{status}")
    async def state(request: Request, status: int) -> JSONResponse:
        assert request.state.db is request.state.db
        await request.state.db.execute(INSERT, {"name": f"state {status}", "parent": RIGHT})
        return JSONResponse("", status)

    @app.post("/same")
    async def same(request: Request, db: AsyncSessionDep) -> bool:
        return request.state.db is db

    @app.post("/same-first")
    async def same_first(request: Request, first: Any = Depends(from_state)) -> bool:
        return first

    with served(app) as base, calling(base) as client:
        assert client.post("/same").json() is True
        assert client.post("/same-first").json() is True
        answers = {name: client.post(f"/{name}").status_code for name in ANSWERS}
        assert client.post("/state/raised").status_code == 409
        for status in (200, 404):
            assert client.post(f"/state/{status}").status_code == status
    if commit_on:  # the COMMIT comes after the app's handlers, so it is a 500
        assert answers == ANSWERS | {"dangling": 500}
        assert names(tables) == ["state 200"]
    else:
        assert answers == ANSWERS
        assert names(tables) == ["returned", "threads", "state 200", "state 404"]


# -- what is being handled when the response starts ------------------------------------------------


class CacheMiss:
    """Calls the application in an `except` block, as caches do."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            {}[scope["path"]]
        except KeyError:
            await self.app(scope, receive, send)


def handling(app: FastAPI) -> None:
    """Add endpoints that answer in various ways while an exception is being handled."""

    @app.post("/state/{status}")
    async def state(request: Request, status: int) -> JSONResponse:
        await request.state.db.execute(INSERT, {"name": f"state {status}", "parent": RIGHT})
        return JSONResponse("", status)

    @app.post("/dependency/{status}")
    async def dependency(status: int, db: AsyncSessionDep) -> JSONResponse:
        await db.execute(INSERT, {"name": f"dependency {status}", "parent": RIGHT})
        return JSONResponse("", status)

    @app.post("/redirected")
    async def redirected(request: Request) -> None:
        await request.state.db.execute(INSERT, {"name": "redirected", "parent": RIGHT})
        raise LookupError

    @app.post("/raised-again")
    async def raised_again(request: Request) -> None:
        try:
            {}["a"]
        except KeyError:
            await request.state.db.execute(INSERT, {"name": "raised again", "parent": RIGHT})
            raise

    @app.post("/by-the-handler")
    async def by_the_handler() -> None:
        raise ValueError

    @app.exception_handler(LookupError)
    async def redirect(request: Request, error: LookupError) -> RedirectResponse:
        return RedirectResponse("/elsewhere", 303)

    @app.exception_handler(ValueError)
    async def note(request: Request, error: ValueError) -> JSONResponse:
        await request.state.db.execute(INSERT, {"name": "by the handler", "parent": RIGHT})
        return JSONResponse("noted", 200)

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        await scope["state"]["db"].execute(INSERT, {"name": "bare", "parent": RIGHT})
        try:
            int("x")
        except ValueError:
            status = int(scope["path"][-3:])
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    app.mount("/bare", bare)


@pytest.mark.parametrize("commit_on", [None, lambda status: status != 404])
@pytest.mark.parametrize("inside", [True, False])
def test_only_what_the_application_raised_rolls_back(
    tables: str, commit_on: Any, inside: bool
) -> None:
    app = FastAPI(lifespan=lifespan(url=tables))
    handling(app)
    order = [(CacheMiss, {}), (DatabaseMiddleware, {"commit_on": commit_on})]
    for kind, options in order if inside else reversed(order):
        app.add_middleware(kind, **options)
    answers = {
        "/state/201": 201,
        "/state/409": 409,  # returned: a policy of its own would say no
        "/dependency/201": 201,
        "/dependency/409": 409,
        "/redirected": 303,
        "/raised-again": 303,
        "/by-the-handler": 200,
        "/bare/201": 201,
        "/bare/409": 409,  # answered while it handles an error of its own
    }
    with served(app) as base, calling(base) as client:
        assert {path: client.post(path).status_code for path in answers} == answers
    stored = ["state 201", "state 409", "dependency 201", "dependency 409"]
    assert names(tables) == [*stored, "by the handler", "bare"]


@pytest.mark.parametrize("middleware", [False, True])
@pytest.mark.parametrize("how", ["state", "dependency"])
@pytest.mark.parametrize(
    ("end", "code", "stored"),
    [
        ("except", 1000, ["idle"]),  # a usual end
        ("finally", None, []),  # it raises yet, and the server hangs up
        ("error", 1008, []),
        ("after", 1000, ["idle"]),
    ],
)
def test_a_websocket_that_is_closed_while_an_exception_is_handled(
    tables: str, middleware: bool, how: str, end: str, code: int | None, stored: list[str]
) -> None:
    if how == "state" and not middleware:
        return
    app = FastAPI(lifespan=lifespan(url=tables))
    if middleware:
        app.add_middleware(DatabaseMiddleware)

    async def serve(socket: WebSocket, db: AsyncSession) -> None:
        await socket.accept()
        await db.execute(INSERT, {"name": "idle", "parent": RIGHT})
        if end == "finally":
            try:
                raise ArithmeticError
            finally:
                await socket.close()
        try:
            await asyncio.wait_for(socket.receive_text(), 0.01)
        except TimeoutError:
            if end != "after":
                await socket.close(1000 if end == "except" else 1008)
        if end == "after":
            await socket.close()

    @app.websocket("/dependency")
    async def by_dependency(socket: WebSocket, db: AsyncSessionDep) -> None:
        await serve(socket, db)

    @app.websocket("/state")
    async def by_state(socket: WebSocket) -> None:
        await serve(socket, socket.state.db)

    with served(app) as base:
        with connect_websocket(f"{base.replace('http', 'ws')}/{how}") as client:
            with pytest.raises(ConnectionClosed) as closed:
                client.recv()
        assert (closed.value.rcvd and closed.value.rcvd.code) == code
        assert session_manager.stats().scopes == ()
    assert names(tables) == stored


@pytest.mark.parametrize("middleware", [False, True])
@pytest.mark.parametrize(("parent", "status"), [(WRONG, 500), (RIGHT, 201)])
def test_a_websocket_that_is_answered_with_a_response_commits_before(
    tables: str, middleware: bool, parent: int, status: int
) -> None:
    app = FastAPI(lifespan=lifespan(url=tables))
    if middleware:
        app.add_middleware(DatabaseMiddleware)

    async def deny(socket: WebSocket, db: AsyncSession) -> None:
        await db.execute(INSERT, {"name": "denied", "parent": parent})
        try:
            int("x")
        except ValueError:
            await socket.send_denial_response(JSONResponse("", status_code=201))

    @app.websocket("/dependency")
    async def by_dependency(socket: WebSocket, db: AsyncSessionDep) -> None:
        await deny(socket, db)

    @app.websocket("/state")
    async def by_state(socket: WebSocket) -> None:
        await deny(socket, socket.state.db)

    path = "state" if middleware else "dependency"
    with served(app) as base:
        with pytest.raises(InvalidStatus) as denied:
            connect_websocket(f"{base.replace('http', 'ws')}/{path}")
    assert denied.value.response.status_code == status
    assert names(tables) == (["denied"] if parent == RIGHT else [])


def test_a_policy_that_raises_rolls_back_and_is_a_500(tables: str) -> None:
    app = FastAPI(lifespan=lifespan(url=tables, pool_size=1, max_overflow=0, pool_timeout=2))
    app.add_middleware(DatabaseMiddleware, commit_on={200: True}.__getitem__)
    insert_into(app)
    handling(app)
    with served(app) as base, calling(base) as client:
        for path in ("/returned", "/threads", "/state/409"):
            assert client.post(path).status_code == 500, path
        assert client.post("/state/200").status_code == 200
        assert session_manager.stats().scopes == ()
    assert names(tables) == ["state 200"]


# -- whose end would never come --------------------------------------------------------------------


def test_a_session_that_is_first_asked_for_after_the_response_is_refused(tables: str) -> None:
    told: list[str] = []
    app = FastAPI(lifespan=lifespan(url=tables))
    app.add_middleware(DatabaseMiddleware)

    def ask(request: Any) -> None:
        for asking in (current_session, lambda: request.state.db):
            try:
                asking()
            except SessionClosed as error:
                told.append(str(error))

    @app.get("/background")
    async def background(request: Request, tasks: BackgroundTasks) -> None:
        tasks.add_task(asyncio.to_thread, ask, request)

    @app.get("/stream")
    async def stream(request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield "started"
            ask(request)

        return StreamingResponse(body())

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()
        ask(websocket)

    with served(app) as base, calling(base) as client:
        for path in ("/background", "/stream"):
            assert client.get(path).status_code == 200
        with connect_websocket(f"{base.replace('http', 'ws')}/socket") as ws:
            with pytest.raises(ConnectionClosed):
                ws.recv()
        until(lambda: len(told), lambda count: count == 6)
        assert session_manager.stats().scopes == ()
    assert all("async with session_manager.session()" in each for each in told)
    assert all("[session-closed]" in each for each in told)
    assert "GET /background" in told[0]


@pytest.mark.parametrize("options", [None, {}, {"commit_on": lambda status: True}])
def test_a_dependency_called_where_nothing_would_end_its_session(tables: str, options: Any) -> None:
    told: list[str] = []
    app = FastAPI(lifespan=lifespan(url=tables))

    async def by_hand(request: Request) -> str:
        try:
            db = await get_db(request)
            await db.execute(INSERT, {"name": request.url.path, "parent": RIGHT})
        except Exception as error:
            told.append(str(error))
        return "asked"

    @app.middleware("http")
    async def before(request: Request, call_next: Any) -> Any:
        if request.url.path == "/middleware":
            await by_hand(request)
        return await call_next(request)

    @app.exception_handler(KeyError)
    async def handler(request: Request, error: KeyError) -> JSONResponse:
        return JSONResponse(await by_hand(request))

    @app.get("/handler")
    async def fail() -> None:
        raise KeyError

    @app.get("/middleware")
    async def nothing() -> None: ...

    @app.get("/background")
    async def background(request: Request, tasks: BackgroundTasks) -> None:
        tasks.add_task(by_hand, request)

    class TracedResponse(JSONResponse):
        async def __call__(self, *args: Any, **kw: Any) -> None:
            await super().__call__(*args, **kw)

    @app.get("/traced")
    async def traced(request: Request, tasks: BackgroundTasks) -> TracedResponse:
        tasks.add_task(by_hand, request)
        return TracedResponse({}, background=tasks)

    @app.get("/stream")
    async def stream(request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield await by_hand(request)

        return StreamingResponse(body())

    @app.get("/task")
    async def task(request: Request) -> None:
        await asyncio.create_task(by_hand(request))

    @app.get("/endpoint")
    async def endpoint(request: Request) -> str:
        return await by_hand(request)

    @app.get("/dependency")
    async def dependency(db: Any = Depends(by_hand)) -> None: ...

    async def late(request: Request) -> AsyncIterator[None]:
        yield
        await by_hand(request)

    @app.get("/after", dependencies=[Depends(late)])  # the response
    async def after() -> None: ...

    @app.get("/between")  # endpoint and response
    async def between(_: Any = Depends(late, scope="function")) -> None: ...

    if options is not None:
        app.add_middleware(DatabaseMiddleware, **options)
    elsewhere = ("/handler", "/middleware", "/background", "/traced", "/stream", "/task", "/after")
    with served(app) as base, calling(base) as client:
        for count, path in enumerate(elsewhere, 1):
            assert client.get(path).status_code == 200, path
            until(lambda: len(told), lambda told, count=count: told == count)
            assert "[outside-request]" in told[-1], path
            assert "async with session_manager.session()" in told[-1]
        for path in ("/endpoint", "/dependency", "/between"):
            assert client.get(path).status_code == 200
        assert session_manager.stats().scopes == ()
    assert len(told) == len(elsewhere)
    assert names(tables) == ["/endpoint", "/dependency", "/between"]


class TimeLimit:
    """Cancels a request as anyio does: at each further `await`, too."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with anyio.move_on_after(0.2) as limit:
            await self.app(scope, receive, send)
        if limit.cancelled_caught:
            await JSONResponse("too slow", 504)(scope, receive, send)


@pytest.mark.parametrize("path", ["/threads", "/both", "/loop"])
def test_a_request_that_anyio_cancels_leaves_no_session(postgres_tables: str, path: str) -> None:
    app = FastAPI(lifespan=lifespan(url=postgres_tables, pool_size=1, max_overflow=0))
    app.add_middleware(TimeLimit)

    @app.get("/threads")
    def in_a_thread(db: SessionDep) -> None:
        db.execute(INSERT, {"name": "threads", "parent": RIGHT})
        time.sleep(0.5)

    @app.get("/both")
    async def in_a_thread_and_the_loop(db: SessionDep) -> None:
        await asyncio.to_thread(db.execute, INSERT, {"name": "both", "parent": RIGHT})
        await asyncio.sleep(0.5)

    @app.get("/loop")
    async def in_the_loop(db: AsyncSessionDep) -> None:
        await db.execute(INSERT, {"name": "loop", "parent": RIGHT})
        await asyncio.sleep(0.5)

    with served(app) as base, calling(base) as client:
        for _ in range(2):  # there is one connection
            assert client.get(path).status_code == 504
            until(lambda: session_manager.stats().scopes, lambda scopes: scopes == ())
        assert sum(pool.lent for pool in session_manager.stats().pools) == 0
    assert names(postgres_tables) == []


class Again:
    """Calls the application a second time for the same request."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.app(scope, receive, send)
        except ArithmeticError:
            await self.app(scope, receive, send)


@pytest.mark.parametrize("middleware", [False, True])
def test_a_second_attempt_at_a_request_has_a_session_of_its_own(
    tables: str, middleware: bool
) -> None:
    app = FastAPI(lifespan=lifespan(url=tables))
    if middleware:
        app.add_middleware(DatabaseMiddleware)
    app.add_middleware(Again)
    attempts: list[str] = []

    async def attempt(path: str, db: AsyncSession) -> None:
        attempts.append(path)
        name = f"{path} {attempts.count(path)}"
        await db.execute(INSERT, {"name": name, "parent": RIGHT})
        if attempts.count(path) == 1:
            raise ArithmeticError

    @app.post("/dependency")
    async def dependency(db: AsyncSessionDep) -> None:
        await attempt("dependency", db)

    @app.post("/state")
    async def state(request: Request) -> None:
        await attempt("state", request.state.db)

    paths = ["dependency", "state"] if middleware else ["dependency"]
    with served(app) as base, calling(base) as client:
        assert [client.post(f"/{path}").status_code for path in paths] == [200] * len(paths)
    assert names(tables) == [f"{path} 2" for path in paths]


def test_outer_middleware_sees_what_the_application_writes(sqlite_url: str) -> None:
    app = FastAPI(lifespan=lifespan(url=sqlite_url))

    @app.get("/")
    async def write(request: Request) -> None:
        request.state.user = "ann"
        request.scope["state"].update(role="admin")
        del request.state.draft

    app.add_middleware(DatabaseMiddleware)

    @app.middleware("http")
    async def read(request: Request, call_next: Any) -> Any:
        request.state.draft = "a"
        response = await call_next(request)
        said = request.state
        response.headers["x-said"] = f"{said.user} {said.role} {hasattr(said, 'draft')}"
        return response

    with served(app) as base:
        assert httpx.get(base).headers["x-said"] == "ann admin False"


def test_a_middleware_for_each_of_two_managers(tables: str, tmp_path: Any) -> None:
    """And one more in an application that is mounted: none takes another's session away."""
    other = DatabaseSessionManager()
    elsewhere = f"sqlite:///{tmp_path / 'other.sqlite'}"
    with contextlib.closing(raw(elsewhere)) as connection:
        for statement in TABLES:
            connection.execute(statement)
    app = FastAPI(lifespan=lifespan(url=tables, wraps=lifespan(other, url=elsewhere)))
    app.add_middleware(DatabaseMiddleware)
    app.add_middleware(DatabaseMiddleware, manager=other, state="other")
    mounted = FastAPI()
    mounted.add_middleware(DatabaseMiddleware)
    app.mount("/mounted", mounted)

    async def write(request: Request, where: str) -> str:
        assert current_session() is request.state.db
        assert not hasattr(request.state, "missing")
        for db in (request.state.db, request.state.other):
            await db.execute(INSERT, {"name": where, "parent": RIGHT})
        return "stored"

    app.post("/{where}")(write)
    mounted.post("/{where}")(write)
    with served(app) as base:
        for path in ("/a", "/mounted/b"):
            assert httpx.post(f"{base}{path}").json() == "stored"
    assert names(tables) == names(elsewhere) == ["a", "b"]


def test_the_sync_dependency_and_that_of_another_manager(
    tables: str, pg18: PostgresServer, database: str
) -> None:
    """One request, three sessions: the last that was opened commits first."""
    other = DatabaseSessionManager()
    get_other = session_dependency(other)
    app = FastAPI(lifespan=lifespan(url=tables, wraps=lifespan(other, url=pg18.url(database))))

    @app.get("/")
    def both(
        db: SessionDep,
        theirs: Any = Depends(get_other),
        again: Any = Depends(session_dependency(other)),
    ) -> list[Any]:
        assert theirs is again
        assert theirs.sync_session is not db
        return [db.scalar(text("SELECT 1")), len(other.stats().scopes)]

    with served(app) as base:
        assert httpx.get(base).json() == [1, 1]


def test_a_second_session_whose_commit_fails_takes_the_first_with_it(
    tables: str, tmp_path: Any
) -> None:
    """The session that was opened last commits first."""
    other = DatabaseSessionManager()
    elsewhere = f"sqlite:///{tmp_path / 'other.sqlite'}"
    app = FastAPI(lifespan=lifespan(url=tables, wraps=lifespan(other, url=elsewhere)))

    @app.post("/")
    async def both(db: AsyncSessionDep, theirs: Any = Depends(session_dependency(other))) -> None:
        await db.execute(INSERT, {"name": "first", "parent": RIGHT})
        for statement in TABLES:
            await theirs.execute(text(statement))
        await theirs.execute(INSERT, {"name": "second", "parent": WRONG})

    with served(app) as base:
        assert httpx.post(base).status_code == 500
    assert names(tables) == []


def test_an_override_replaces_the_session(tables: str) -> None:
    app = FastAPI(lifespan=lifespan(url=tables))

    @app.get("/")
    async def read(db: AsyncSessionDep) -> str:
        return str(db)

    app.dependency_overrides[get_db] = lambda: "another"
    with served(app) as base:
        assert httpx.get(base).json() == "another"


# -- what may go wrong in the wiring ---------------------------------------------------------------


def told_by(app: FastAPI, path: str = "/") -> str:
    """Serve one request, and return what its error says."""
    told: list[str] = []

    @app.exception_handler(Exception)
    async def tell(request: Request, error: Exception) -> JSONResponse:
        told.append(str(error))
        return JSONResponse("", 500)

    with served(app, lifespan="auto") as base:
        assert httpx.get(f"{base}{path}").status_code == 500
    return told[0]


def test_a_manager_that_was_never_opened_names_the_lifespan() -> None:
    get_new = session_dependency(DatabaseSessionManager())
    app = FastAPI()

    @app.get("/")
    async def read(db: Any = Depends(get_new)) -> None: ...

    told = told_by(app)
    assert "FastAPI(lifespan=lifespan())" in told
    assert "[not-initialized]" in told


@pytest.mark.parametrize("dependency", [get_db, get_sync_db])
def test_a_dependency_called_outside_of_a_request(dependency: Callable[..., Any]) -> None:
    async def loop() -> None:
        async for _ in dependency():
            raise AssertionError("it was entered")

    with pytest.raises(OutsideRequest, match=r"open a session.*\[outside-request\]"):
        asyncio.run(loop())
    with pytest.raises(OutsideRequest):
        next(dependency())


def test_two_lifespans_that_open_one_manager(url: str) -> None:
    async def main() -> None:
        async with lifespan(url=url)(None):
            with pytest.raises(AlreadyInitialized, match="Give the second application"):
                async with lifespan(url=url)(None):
                    pass
            assert session_manager.stats().state == "open"
        assert session_manager.stats().state == "closed"

    asyncio.run(main())


def test_the_lifespan_runs_around_ones_own(url: str) -> None:
    seen: list[str] = []

    async def bare(app: FastAPI) -> AsyncIterator[dict[str, int]]:
        seen.append(session_manager.stats().state)
        yield {"answer": 42}
        seen.append(session_manager.stats().state)

    for wraps in (bare, asynccontextmanager(bare)):
        app = FastAPI(lifespan=lifespan(url=url, wraps=wraps))

        @app.get("/")
        async def read(request: Request) -> int:
            return request.state.answer  # type: ignore[no-any-return]

        with served(app) as base:
            assert httpx.get(base).json() == 42
    assert seen == ["open"] * 4
    assert session_manager.stats().state == "closed"


@contextlib.contextmanager
def plain_manager(app: Any) -> Iterator[None]:
    yield


def plain_generator(app: Any) -> Iterator[None]:
    yield


async def coroutine(app: Any) -> None: ...


async def answers_late(status: int) -> bool:
    return False


@pytest.mark.parametrize(
    ("give", "told"),
    [
        (lambda: lifespan(wraps=plain_manager), "wraps="),
        (lambda: lifespan(wraps=plain_generator), "wraps="),
        (lambda: lifespan(wraps=coroutine), "wraps="),
        (lambda: lifespan(wraps=5), "wraps="),
        (lambda: lifespan(nonsense=1), "no option nonsense"),  # type: ignore[call-arg]
        (lambda: lifespan("sqlite://"), "url="),  # type: ignore[arg-type]
        (lambda: lifespan(Database("sqlite://")), "DatabaseSessionManager"),  # type: ignore[arg-type]
        (lambda: session_dependency("x"), "or a Database"),  # type: ignore[arg-type]
        (lambda: DatabaseMiddleware(FastAPI(), Database("sqlite://")), "got Database"),  # type: ignore[arg-type]
        (lambda: DatabaseMiddleware(FastAPI(), commit_on=400), "commit_on="),  # type: ignore[arg-type]
        (lambda: DatabaseMiddleware(FastAPI(), commit_on=answers_late), "commit_on="),  # type: ignore[arg-type]
        (lambda: EngineRoomPlugin(commit_on=answers_late), "commit_on="),  # type: ignore[arg-type]
        (lambda: EngineRoom(Flask("x"), "sqlite://"), "url="),  # type: ignore[arg-type]
        (lambda: EngineRoom(Flask("x"), url="sqlite://", commit_on=None), "commit_on="),  # type: ignore[arg-type]
        (lambda: EngineRoom(Flask("x"), url="sqlite://", commit_on=answers_late), "commit_on="),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_work_is_refused_where_it_is_given(give: Callable[[], Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        give()


@pytest.mark.filterwarnings("ignore:async generator function lifespans:DeprecationWarning")
def test_the_lifespan_that_users_write(url: str) -> None:
    """Contract 3, as it stands in the world: an undecorated generator included."""

    async def bare(app: FastAPI) -> AsyncIterator[None]:
        session_manager.init(url=url, pool_size=5)
        yield
        await session_manager.close()

    for written in (bare, asynccontextmanager(bare)):
        app = FastAPI(lifespan=written)

        @app.get("/items")
        async def list_items(db: AsyncSessionDep) -> Any:
            return await db.scalar(text("SELECT 42"))

        with served(app) as base:
            assert httpx.get(f"{base}/items").json() == 42


async def used_in_the_loop(db: SessionDep) -> Any:
    return db.scalar(text("SELECT 1"))


def used_in_a_thread(db: SessionDep) -> Any:
    return db.scalar(text("SELECT 1"))


def test_the_sync_dependency_in_a_coroutine_says_what_to_declare(sqlite_url: str) -> None:
    """It matters who uses it, and not who asks for it."""

    async def frozen(db: SessionDep) -> Any:
        return db.scalar(text("SELECT 1"))

    def through_a_dependency(one: Annotated[Any, Depends(used_in_the_loop)]) -> Any:
        return one

    async def harmless(one: Annotated[Any, Depends(used_in_a_thread)], db: SessionDep) -> Any:
        return await asyncio.to_thread(db.scalar, text("SELECT 1"))

    def app_with(**options: Any) -> FastAPI:
        app = FastAPI(lifespan=lifespan(url=sqlite_url, **options))
        for endpoint in (frozen, through_a_dependency, harmless):
            app.get(f"/{endpoint.__name__}")(endpoint)
        return app

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with served(app_with()) as base:
            for name in ("frozen", "through_a_dependency", "harmless"):
                assert httpx.get(f"{base}/{name}").json() == 1
    told = [str(w.message) for w in warned if w.category is SyncInAsyncWarning]
    assert len(told) == 2
    assert "in frozen" in told[0]
    assert "in used_in_the_loop" in told[1]
    assert all("test_fastapi.py" in each and "AsyncSessionDep" in each for each in told)
    with served(app_with(sync_in_async="error")) as base, calling(base) as client:
        answers = [client.get(f"/{n}").status_code for n in ("frozen", "through_a_dependency")]
        assert answers == [500, 500]
        assert client.get("/harmless").status_code == 200


def test_a_session_kept_for_a_later_request_refuses_use(tables: str) -> None:
    app = FastAPI(lifespan=lifespan(url=tables))
    kept: list[AsyncSession] = []

    @app.get("/")
    async def use(db: AsyncSessionDep) -> str:
        kept.append(db)
        try:
            await kept[0].execute(text("SELECT 1"))
        except Exception as error:
            return str(error)
        return "served"

    with served(app) as base:
        assert httpx.get(base).json() == "served"
        assert "[session-closed]" in httpx.get(base).json()


def test_a_generator_of_ones_own_lives_in_three_threads(tables: str) -> None:
    """FastAPI enters, uses and leaves a synchronous dependency in a thread each."""
    app = FastAPI(lifespan=lifespan(url=tables))
    threads: list[int] = []

    def mine() -> Iterator[Session]:
        with session_manager.sync_session() as db:
            threads.append(threading.get_ident())
            db.execute(INSERT, {"name": "entered", "parent": RIGHT})
            yield db
            threads.append(threading.get_ident())

    @app.post("/")
    def use(db: Any = Depends(mine)) -> int:
        threads.append(threading.get_ident())
        time.sleep(0.05)  # so that the requests use several threads
        db.execute(INSERT, {"name": "used", "parent": RIGHT})
        return 1

    async def many(base: str) -> None:
        async with httpx.AsyncClient(base_url=base) as client:
            answers = await asyncio.gather(*(client.post("/") for _ in range(10)))
            assert {answer.status_code for answer in answers} == {200}

    with served(app) as base:
        asyncio.run(many(base))
    assert names(tables).count("entered") == names(tables).count("used") == 10
    assert len(set(threads)) > 1


def test_reports_name_the_route_and_the_endpoint(tables: str) -> None:
    app = FastAPI(lifespan=lifespan(url=tables))

    @app.get("/items/{number}")
    async def one_item(number: int, db: AsyncSessionDep) -> list[Any]:
        async with session_manager.session():
            return [[scope.owner, scope.where] for scope in session_manager.stats().scopes]

    @app.get("/threads/{number}")
    def in_a_thread(number: int, db: SessionDep) -> list[Any]:
        db.execute(text("SELECT 1"))
        with session_manager.sync_session():
            return [[scope.owner, scope.where] for scope in session_manager.stats().scopes]

    with served(app) as base:
        for path, function in (("items", "one_item"), ("threads", "in_a_thread")):
            opened = httpx.get(f"{base}/{path}/7").json()
            assert len(opened) == 2
            for owner, where in opened:
                assert f"GET /{path}/{{number}}" in owner
                assert where.endswith(f"in {function}")
                assert "test_fastapi.py:" in where


def test_reports_name_an_endpoint_that_is_no_function(sqlite_url: str) -> None:
    class View:
        def __call__(self, db: SessionDep) -> str:
            return session_manager.stats().scopes[0].where

        async def method(self, db: AsyncSessionDep) -> str:
            return session_manager.stats().scopes[0].where

    View.__call__.__annotations__["db"] = SessionDep  # as above
    View.method.__annotations__["db"] = AsyncSessionDep

    class Endpoint(HTTPEndpoint):
        async def get(self, request: Request) -> JSONResponse:
            await request.state.db.execute(text("SELECT 1"))
            return JSONResponse(session_manager.stats().scopes[0].where)

    app = FastAPI(lifespan=lifespan(url=sqlite_url))
    app.add_middleware(DatabaseMiddleware)
    app.add_route("/class", Endpoint)  # type: ignore[arg-type]
    app.get("/object")(View())
    app.get("/method")(View().method)
    app.get("/partial")(functools.partial(View().method))
    with served(app) as base:
        named = {"object": "__call__", "method": "method", "partial": "method", "class": "get"}
        for path, name in named.items():
            where = httpx.get(f"{base}/{path}").json()
            assert "test_fastapi.py:" in where
            assert where.endswith(f"in {name}")


# -- the wire --------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_three_round_trips_write_and_one_reads(
    postgres_tables: str, proxy: WireProxy, driver: str
) -> None:
    url = proxy.url(postgres_tables.replace("postgresql:", f"postgresql+{driver}:"))
    app = FastAPI(lifespan=lifespan(url=url, pool_ping_after=60, pipeline="off"))

    @app.post("/write")
    async def write(db: AsyncSessionDep) -> None:
        await db.execute(INSERT, {"name": "a", "parent": RIGHT})

    @app.post("/sync")
    def write_in_threads(db: SessionDep) -> None:
        db.execute(INSERT, {"name": "a", "parent": RIGHT})

    @app.post("/read")
    async def read(db: ReaderDep) -> Any:
        return await db.scalar(text("SELECT 1"))

    @app.post("/nothing")
    async def nothing(db: AsyncSessionDep, reader: ReaderDep) -> None: ...

    with served(app) as base, calling(base) as client:
        for path, trips in (("/write", 3), ("/sync", 3), ("/read", 1), ("/nothing", 0)):
            for _ in range(8):  # psycopg prepares at the sixth
                assert client.post(path).status_code == 200
            proxy.reset()
            for _ in range(10):
                assert client.post(path).status_code == 200
            assert proxy.round_trips == 10 * trips, path


def test_readers_refuse_writes(tables: str) -> None:
    app = FastAPI(lifespan=lifespan(url=tables))

    @app.post("/")
    async def write(db: ReaderDep) -> str:
        with pytest.raises(DBAPIError, match="read.?only"):
            await db.execute(INSERT, {"name": "a", "parent": RIGHT})
        return "refused"

    with served(app) as base:
        assert httpx.post(base).json() == "refused"
    assert names(tables) == []
