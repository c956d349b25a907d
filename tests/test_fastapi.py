"""One session for each request: committed before its response leaves, and then closed."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import httpx
import psycopg
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from scenario import until
from serving import served
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as connect_websocket

from engineroom import (
    session_manager,
)
from engineroom.fastapi import (
    AsyncSessionDep,
    SessionDep,
    get_db,
    get_sync_db,
    lifespan,
)

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

pytestmark = pytest.mark.filterwarnings(
    # The session of threads is used in a WebSocket's coroutine here, by `to_thread`.
    "ignore:The synchronous session:engineroom.errors.SyncInAsyncWarning"
)


def test_one_session_under_every_spelling_and_no_success_before_commit(
    tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", tables)
    TOLD.clear()
    with served(all_spellings()) as base, httpx.Client(base_url=base) as client:
        for prefix in ("", "/routed"):
            for name in SPELLINGS:
                for kind in ("plain", "streaming", "background"):
                    path = f"{prefix}/{kind}/{name}"
                    before = names(tables)
                    assert client.post(path, params={"parent": WRONG}).status_code == 500, path
                    assert names(tables) == before, path
                    answer = client.post(path, params={"parent": RIGHT})
                    assert answer.status_code == 200, path
                    assert names(tables) == [*before, name], path  # it is there by now
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
