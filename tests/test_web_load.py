"""A service under load: nobody holds a connection without need, and who has gone leaves none."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from scenario import settled, until
from serving import served
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as connect_websocket

from engineroom import PoolExhausted, on_commit, session_manager
from engineroom.asgi import DatabaseMiddleware, Readiness
from engineroom.fastapi import AsyncSessionDep, ReaderDep, SessionDep, lifespan
from engineroom.testing import PostgresServer


class Rows(DeclarativeBase):
    pass


class Row(Rows):
    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)


SMALL_POOL: dict[str, Any] = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 30}


def soaked(sample: int, all_of_them: int) -> list[Any]:
    """A sample for every run, and all of them for `make soak`."""
    return [sample, pytest.param(all_of_them, marks=pytest.mark.soak)]


def lent() -> int:
    return sum(pool.lent for pool in session_manager.stats().pools)


def idle_clients(base: str, path: str, count: int) -> list[socket.socket]:
    """Open so many requests, and read nothing."""
    host, port = base.removeprefix("http://").split(":")
    clients = []
    for _ in range(count):
        client = socket.create_connection((host, int(port)))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        clients.append(client)
    return clients


# -- who needs no connection holds none ------------------------------------------------------------


def test_streams_slow_clients_and_background_tasks_hold_no_connection(postgres_url: str) -> None:
    app = FastAPI(lifespan=lifespan(url=postgres_url, **SMALL_POOL | {"pool_timeout": 2}))
    working: list[str] = []
    go_on = threading.Event()

    @app.get("/tokens")
    async def tokens(db: AsyncSessionDep) -> StreamingResponse:
        first = await db.scalar(text("SELECT 'token'"))

        async def body() -> AsyncIterator[str]:
            working.append("tokens")
            while not go_on.is_set():
                yield f"{first}\n"
                await asyncio.sleep(0.05)

        return StreamingResponse(body())

    @app.get("/large")
    async def large(db: AsyncSessionDep) -> StreamingResponse:
        await db.execute(text("SELECT 1"))

        async def body() -> AsyncIterator[bytes]:
            working.append("large")
            for _ in range(200):
                yield b"x" * 1_000_000  # more than any buffer takes

        return StreamingResponse(body())

    @app.get("/background")
    async def background(db: AsyncSessionDep, tasks: BackgroundTasks) -> str:
        await db.execute(text("SELECT 1"))

        async def work() -> None:
            working.append("background")
            await asyncio.to_thread(go_on.wait)

        tasks.add_task(work)
        return "accepted"

    @app.get("/")
    async def read(db: AsyncSessionDep) -> Any:
        return await db.scalar(text("SELECT 1"))

    with served(app) as base:
        clients = [
            client
            for path in ("/tokens", "/large", "/background")
            for client in idle_clients(base, path, 5)
        ]
        try:
            until(lambda: len(working), lambda begun: begun == 15)
            assert (lent(), session_manager.stats().scopes) == (0, ())
            for _ in range(10):
                assert httpx.get(base).json() == 1
        finally:
            go_on.set()
            for client in clients:
                client.close()


@pytest.mark.parametrize("side", ["async", "sync"])
@pytest.mark.parametrize("dependency_first", [True, False])
def test_requests_that_need_two_connections_do_not_wait_for_the_timeout(
    postgres_url: str, side: str, dependency_first: bool
) -> None:
    """Each is served, or told at once which lines hold the pool."""
    app = FastAPI(lifespan=lifespan(url=postgres_url, **SMALL_POOL))
    statement = text("SELECT pg_sleep(0.01)")

    @app.get("/async")
    async def two(db: AsyncSessionDep) -> str:
        if dependency_first:
            await db.execute(statement)
        async with session_manager.session() as mine:
            await mine.execute(statement)
            await db.execute(statement)
        return "served"

    @app.get("/sync")
    def two_in_threads(db: SessionDep) -> str:
        if dependency_first:
            db.execute(statement)
        with session_manager.sync_session() as mine:
            mine.execute(statement)
            db.execute(statement)
        return "served"

    @app.exception_handler(PoolExhausted)
    async def tell(request: Request, error: PoolExhausted) -> JSONResponse:
        assert len(error.holders) == 5
        return JSONResponse([holder.where for holder in error.holders], 503)

    async def all_at_once(base: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=base, timeout=25) as client:  # < pool_timeout
            return await asyncio.gather(*(client.get(f"/{side}") for _ in range(20)))

    with served(app) as base:
        answers = asyncio.run(all_at_once(base))
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert any(answer.status_code == 200 for answer in answers)
        for answer in answers:
            if answer.status_code == 503:
                assert all(" in two" in line for line in answer.json())
        until(lent, lambda now: now == 0)


def test_endpoints_that_wait_for_the_pool_take_no_thread_from_others(postgres_url: str) -> None:
    """Of 60 slow endpoints, 5 run in the 40 threads: the rest wait on the event loop."""
    app = FastAPI(lifespan=lifespan(url=postgres_url, **SMALL_POOL))

    @app.get("/slow")
    def slow(db: SessionDep) -> None:
        db.execute(text("SELECT pg_sleep(0.2)"))

    @app.get("/quick")
    def quick() -> int:
        return sum(pool.waiting for pool in session_manager.stats().pools)

    async def main(base: str) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=base, limits=limits, timeout=60) as client:
            slow = [asyncio.ensure_future(client.get("/slow")) for _ in range(60)]
            waiting = 0
            while waiting < 50:
                assert not any(request.done() for request in slow[50:]), "it did not answer before"
                waiting = (await client.get("/quick")).json()
            assert {answer.status_code for answer in await asyncio.gather(*slow)} == {200}

    with served(app) as base:
        asyncio.run(main(base))
        assert lent() == 0


def test_an_unused_reservation_goes_back(postgres_url: str) -> None:
    app = FastAPI(lifespan=lifespan(url=postgres_url, **SMALL_POOL | {"pool_size": 1}))

    @app.get("/unused")
    def unused(db: SessionDep) -> int:
        return lent()

    @app.get("/used")
    def used(db: SessionDep) -> Any:
        return db.scalar(text("SELECT 1"))

    with served(app) as base:
        for _ in range(3):
            assert httpx.get(f"{base}/unused").json() == 1
            assert lent() == 0
            assert httpx.get(f"{base}/used").json() == 1
            assert lent() == 0


# -- an empty pool ---------------------------------------------------------------------------------


@pytest.mark.parametrize("own_handler", [False, True])
@pytest.mark.parametrize(
    ("way", "middleware"),
    [
        *((way, None) for way in ("async", "sync", "commit")),
        *((way, {}) for way in ("async", "sync", "commit", "state")),
        *((way, {"commit_on": lambda status: status < 400}) for way in ("async", "sync", "commit")),
    ],
)
def test_an_empty_pool_is_503_and_its_names_are_for_the_log(
    postgres_url: str,
    way: str,
    middleware: dict[str, Any] | None,
    own_handler: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = SMALL_POOL | {"pool_size": 1, "pool_timeout": 0.2}
    app = FastAPI(lifespan=lifespan(url=postgres_url, **options))
    if middleware is not None:
        app.add_middleware(DatabaseMiddleware, **middleware)
    handled = own_handler and not (middleware and way == "commit")  # where handlers are over
    if own_handler:

        @app.exception_handler(PoolExhausted)
        async def busy(request: Request, error: PoolExhausted) -> JSONResponse:
            return JSONResponse("busy", 429)

    @app.get("/async")
    async def read(db: AsyncSessionDep) -> None:
        await db.execute(text("SELECT 1"))

    @app.get("/sync")
    def read_in_threads(db: SessionDep) -> None:
        db.execute(text("SELECT 1"))

    @app.get("/commit")
    async def write(db: AsyncSessionDep) -> None:
        db.add(Row())

    @app.get("/state")
    async def read_state(request: Request) -> None:
        await request.state.db.execute(text("SELECT 1"))

    @app.get("/hold")
    async def hold(threads: bool, db: ReaderDep) -> int:
        """Take the only connection, and ask for another one."""
        if threads:
            return await asyncio.to_thread(hold_in_thread)
        async with session_manager.session() as mine:
            await mine.execute(text("SELECT 1"))
            return await ask()

    def hold_in_thread() -> int:
        with session_manager.sync_session() as mine:
            mine.execute(text("SELECT 1"))
            return asyncio.run(ask())

    async def ask() -> int:
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"{base}/{way}")
        assert answer.headers.get("retry-after") == (None if handled else "1")
        assert "test_web_load" not in answer.text
        return answer.status_code

    with served(app) as base, caplog.at_level(logging.WARNING, "engineroom"):
        threads = way == "sync"
        status = httpx.get(f"{base}/hold", params={"threads": threads}).json()
        assert status == (429 if handled else 503)
        if handled and (middleware or way == "state"):
            return  # it is the handler's to log
        [told] = [
            record.message for record in caplog.records if " got no connection: " in record.message
        ]
        assert told.startswith(f"GET /{way} got no connection: No connection ")
        assert "test_web_load.py" in told


@pytest.mark.parametrize("options", [{}, {"commit_on": lambda status: status < 400}])
def test_an_empty_pool_in_a_task_group_and_in_a_websocket(
    postgres_url: str, options: dict[str, Any]
) -> None:
    limits = SMALL_POOL | {"pool_size": 1, "pool_timeout": 0.2}
    app = FastAPI(lifespan=lifespan(url=postgres_url, **limits))
    app.add_middleware(DatabaseMiddleware, **options)

    async def own() -> None:
        async with session_manager.session() as db:
            await db.execute(text("SELECT 1"))

    @app.get("/group")
    async def group() -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(2):
                tasks.create_task(own())

    @app.websocket("/dependency")
    async def dependency(socket: WebSocket, db: AsyncSessionDep) -> None:
        await db.execute(text("SELECT 1"))

    @app.websocket("/state")
    async def state(socket: WebSocket) -> None:
        await socket.state.db.execute(text("SELECT 1"))

    @app.websocket("/accepted")
    async def accepted(socket: WebSocket) -> None:
        await socket.accept()
        await own()

    @app.get("/hold")
    async def hold(db: AsyncSessionDep) -> list[Any]:
        await db.execute(text("SELECT 1"))
        return await asyncio.to_thread(ask)

    def ask() -> list[Any]:
        answer = httpx.get(f"{base}/group")
        told: list[Any] = [(answer.status_code, answer.headers.get("retry-after"))]
        for path in ("dependency", "state"):
            with pytest.raises(InvalidStatus) as denied:
                connect_websocket(f"{base.replace('http', 'ws')}/{path}")
            response = denied.value.response
            told.append((response.status_code, response.headers.get("retry-after")))
        with connect_websocket(f"{base.replace('http', 'ws')}/accepted") as client:
            with pytest.raises(ConnectionClosed) as closed:
                client.recv()
        told.append(closed.value.rcvd and closed.value.rcvd.code)
        return told

    with served(app) as base:
        told = httpx.get(f"{base}/hold", timeout=20).json()
    assert told == [[503, "1"], [503, "1"], [503, "1"], 1013]


def test_an_applications_handler_of_http_errors_gets_no_names(postgres_url: str) -> None:
    limits = SMALL_POOL | {"pool_size": 1, "pool_timeout": 0.2}
    app = FastAPI(lifespan=lifespan(url=postgres_url, **limits))

    @app.exception_handler(HTTPException)
    async def tell(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(str(error), error.status_code, error.headers)

    @app.get("/one")
    async def one(db: AsyncSessionDep) -> None:
        await db.execute(text("SELECT 1"))

    @app.get("/hold")
    async def hold(db: AsyncSessionDep) -> str:
        await db.execute(text("SELECT 1"))
        async with httpx.AsyncClient() as client:
            return (await client.get(f"{base}/one")).text

    with served(app) as base:
        assert httpx.get(f"{base}/hold").json() == '"503: The service is busy. Please try again."'


# -- readiness -------------------------------------------------------------------------------------


def test_readiness_does_not_wait_behind_the_pool(postgres_url: str) -> None:
    app = FastAPI(lifespan=lifespan(url=postgres_url, **SMALL_POOL | {"pool_size": 1}))
    app.add_route("/ready", Readiness())  # type: ignore[arg-type]

    @app.get("/hold")
    async def hold(db: ReaderDep) -> int:
        await db.execute(text("SELECT 1"))
        async with httpx.AsyncClient() as client:
            return (await client.get(f"{base}/ready")).status_code

    with served(app) as base:
        answer = httpx.get(f"{base}/ready")
        assert (answer.status_code, answer.json()["database"]) == (200, "ok")
        assert httpx.get(f"{base}/hold").json() == 200


def test_readiness_of_a_silent_server_has_a_deadline(pg16: PostgresServer) -> None:
    name = pg16.create_database()
    app = FastAPI(lifespan=lifespan(url=pg16.url(name)))
    app.add_route("/ready", Readiness(timeout=0.5))  # type: ignore[arg-type]
    try:
        with served(app) as base:
            assert httpx.get(f"{base}/ready").status_code == 200
            pg16.freeze()
            try:
                started = time.monotonic()
                answer = httpx.get(f"{base}/ready", timeout=20)
                assert time.monotonic() - started < 5
                assert (answer.status_code, answer.json()) == (503, {"database": "unavailable"})
            finally:
                pg16.thaw()
            until(lambda: httpx.get(f"{base}/ready").status_code, lambda now: now == 200)
    finally:
        pg16.drop_database(name)


def test_probes_that_overlap_at_a_silent_server_are_all_answered(pg16: PostgresServer) -> None:
    name = pg16.create_database()
    app = FastAPI(lifespan=lifespan(url=pg16.url(name)))
    app.add_route("/ready", Readiness(timeout=1))  # type: ignore[arg-type]

    async def probes(base: str) -> list[int]:
        async with httpx.AsyncClient(base_url=base, timeout=20) as client:

            async def probe(number: int) -> int:
                await asyncio.sleep(number * 0.4)
                return (await client.get("/ready")).status_code

            return await asyncio.gather(*map(probe, range(8)))

    try:
        with served(app) as base:
            until(lambda: httpx.get(f"{base}/ready").status_code, lambda now: now == 200)
            pg16.freeze()
            try:
                assert asyncio.run(probes(base)) == [503] * 8
            finally:
                pg16.thaw()
    finally:
        pg16.drop_database(name)


# -- what was answered is there --------------------------------------------------------------------


@pytest.mark.parametrize("count", soaked(200, 1000))
def test_what_was_answered_is_there_for_the_next_reader(postgres_url: str, count: int) -> None:
    app = FastAPI(lifespan=lifespan(url=postgres_url, pool_size=10))

    @app.post("/items/{number}")
    async def write(number: int, db: AsyncSessionDep) -> None:
        await db.execute(text("INSERT INTO item VALUES (:number)"), {"number": number})

    @app.get("/items/{number}")
    async def read(number: int, db: ReaderDep) -> int:
        found = await db.scalar(
            text("SELECT count(*) FROM item WHERE number = :number"), {"number": number}
        )
        return int(found or 0)

    async def one(client: httpx.AsyncClient, numbers: list[int]) -> int:
        found = 0
        while numbers:
            path = f"/items/{numbers.pop()}"
            assert (await client.post(path)).status_code == 200
            found += (await client.get(path)).json()
        return found

    async def main(base: str) -> int:
        async with session_manager.session() as db:
            await db.execute(text("CREATE TABLE item (number int)"))
        async with httpx.AsyncClient(base_url=base, timeout=60) as client:
            numbers = list(range(count))
            return sum(await asyncio.gather(*(one(client, numbers) for _ in range(20))))

    with served(app) as base:
        assert asyncio.run(main(base)) == count


QUEUE_READER = """
import sys, psycopg
with psycopg.connect(sys.argv[1], autocommit=True) as connection:
    for line in sys.stdin:
        found = connection.execute("SELECT count(*) FROM item WHERE number = %s", [int(line)])
        print(line.strip(), found.fetchone()[0], flush=True)
"""


@pytest.mark.parametrize("count", soaked(200, 1000))
def test_a_job_finds_its_row_and_none_runs_for_what_failed(postgres_url: str, count: int) -> None:
    """Another process reads the row as soon as its number comes through a pipe."""
    app = FastAPI(lifespan=lifespan(url=postgres_url, pool_size=10))
    worker = subprocess.Popen(
        [sys.executable, "-c", QUEUE_READER, postgres_url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    pipe = worker.stdin

    @app.post("/items/{number}")
    async def write(number: int, parent: int, db: AsyncSessionDep) -> None:
        await db.execute(
            text("INSERT INTO item VALUES (:number, :parent)"),
            {"number": number, "parent": parent},
        )
        on_commit(db, lambda: print(number, file=pipe, flush=True))

    @app.exception_handler(DBAPIError)
    async def failed(request: Request, error: DBAPIError) -> JSONResponse:
        return JSONResponse("not stored", 500)

    async def main(base: str) -> list[int]:
        async with session_manager.session() as db:
            await db.execute(text("CREATE TABLE parent (id int PRIMARY KEY)"))
            await db.execute(text("INSERT INTO parent VALUES (1)"))
            await db.execute(
                text(
                    "CREATE TABLE item (number int, parent int REFERENCES parent"
                    " DEFERRABLE INITIALLY DEFERRED)"
                )
            )
        limit = asyncio.Semaphore(20)

        async def one(client: httpx.AsyncClient, number: int) -> int:
            parent = 999 if number % 10 == 0 else 1
            async with limit:
                answer = await client.post(f"/items/{number}", params={"parent": parent})
            return answer.status_code

        async with httpx.AsyncClient(base_url=base, timeout=60) as client:
            return await asyncio.gather(*(one(client, number) for number in range(count)))

    with served(app) as base:
        statuses = asyncio.run(main(base))
    told, _ = worker.communicate()
    assert statuses == [500 if number % 10 == 0 else 200 for number in range(count)]
    found = dict(map(int, line.split()) for line in told.splitlines())
    assert found == {number: 1 for number in range(count) if number % 10}


# -- clients that go away --------------------------------------------------------------------------


async def leave_at_random(base: str, paths: list[str], count: int) -> None:
    """Send so many requests, and hang up on each within half a second."""
    host, port = base.removeprefix("http://").split(":")
    dice = random.Random(7)
    limit = asyncio.Semaphore(50)

    async def one(number: int) -> None:
        async with limit:
            _, writer = await asyncio.open_connection(host, int(port))
            path = paths[number % len(paths)]
            writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            await asyncio.sleep(dice.random() * 0.5)
            writer.transport.abort() if number % 2 else writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    await asyncio.gather(*(one(number) for number in range(count)))


@pytest.mark.parametrize("count", soaked(100, 500))
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_clients_that_go_away_leave_nothing_behind(
    pg18: PostgresServer,
    database: str,
    driver: str,
    count: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = pg18.url(database, driver)
    app = FastAPI(lifespan=lifespan(url=url, **SMALL_POOL))
    app.add_middleware(DatabaseMiddleware)

    @app.get("/async")
    async def read(db: AsyncSessionDep) -> None:
        await db.execute(text("SELECT pg_sleep(0.1)"))
        await db.execute(text("SELECT pg_sleep(60) /* async */"))

    @app.get("/state")
    async def read_state(request: Request) -> None:
        await request.state.db.execute(text("SELECT pg_sleep(60) /* state */"))

    @app.get("/own")
    async def own() -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            async with session_manager.session() as db:
                yield "begun"
                await db.execute(text("SELECT pg_sleep(60) /* own */"))

        return StreamingResponse(body())

    @app.get("/sync")
    def in_threads(db: SessionDep) -> None:
        db.execute(text("SELECT pg_sleep(0.1)"))
        db.execute(text("SELECT pg_sleep(60) /* sync */"))

    @app.get("/own-sync")
    def own_in_threads() -> None:
        with session_manager.sync_session() as db:
            db.execute(text("SELECT pg_sleep(60) /* own-sync */"))

    @app.get("/short")
    async def short(db: AsyncSessionDep) -> None:
        await db.execute(text("SELECT 1"))

    @app.get("/quick")
    async def quick(db: AsyncSessionDep) -> Any:
        return await db.scalar(text("SELECT 1"))

    def at_work() -> list[Any]:
        rows = pg18.execute(
            "SELECT pid, state, query FROM pg_stat_activity WHERE datname = "
            f"'{database}' AND backend_type = 'client backend' AND state <> 'idle'"
        )
        return [*rows]

    paths = ["/async", "/sync", "/state", "/own", "/own-sync", "/short"]
    with served(app) as base, caplog.at_level(logging.WARNING):
        asyncio.run(leave_at_random(base, paths, count))
        until(at_work, lambda now: now == [], deadline=5)  # 1 s is promised; 2 busy cores
        until(lent, lambda now: now == 0, deadline=5)
        until(lambda: session_manager.stats().scopes, lambda now: now == (), deadline=5)
        for _ in range(10):
            assert httpx.get(f"{base}/quick", timeout=5).json() == 1
        assert [record for record in caplog.records if record.name.startswith("engineroom")] == []
    settled(url)


def leave(base: str, path: str, until_begun: threading.Event, body: bytes = b"") -> None:
    """Send a request, and hang up once it is being served."""
    host, port = base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert until_begun.wait(10)
    until_begun.clear()


def test_what_is_left_unended_by_a_client_that_leaves_is_ended(
    pg18: PostgresServer, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain generator in mid-body, and an endpoint that does not read the request's body."""
    app = FastAPI(lifespan=lifespan(url=pg18.url(database), **SMALL_POOL))
    app.add_middleware(DatabaseMiddleware)

    @app.middleware("http")
    async def passing(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    begun = threading.Event()
    told: list[str] = []

    @app.exception_handler(Exception)
    async def tell(request: Request, error: Exception) -> JSONResponse:
        told.append(repr(error))
        return JSONResponse("", 500)

    @app.post("/generator")
    def export() -> StreamingResponse:
        def body() -> Iterator[str]:
            with session_manager.sync_session() as db:
                db.execute(text("SELECT 1"))
                while True:
                    begun.set()
                    time.sleep(0.01)
                    yield "row"

        return StreamingResponse(body())

    @app.post("/unread")
    async def unread(db: AsyncSessionDep) -> None:
        await db.execute(text("SELECT 1"))
        begun.set()
        await db.execute(text("SELECT pg_sleep(60)"))

    gc.disable()  # or it might end the generator
    try:
        with caplog.at_level(logging.WARNING), served(app, log_level="error") as base:
            for path, body in (("/generator", b""), ("/unread", b"x" * 200_000)):
                leave(base, path, begun, body)
                until(lent, lambda now: now == 0, deadline=5)
                until(lambda: session_manager.stats().scopes, lambda now: now == (), deadline=5)
    finally:
        gc.enable()
    assert told == []  # "No response returned."
    assert [record.message for record in caplog.records] == []


def test_a_bug_in_what_a_client_has_left_is_not_kept_quiet(sqlite_url: str) -> None:
    app = FastAPI(lifespan=lifespan(url=sqlite_url))
    app.add_middleware(DatabaseMiddleware)
    begun = threading.Event()
    told: list[str] = []

    @app.exception_handler(Exception)
    async def tell(request: Request, error: Exception) -> JSONResponse:
        told.append(repr(error))
        return JSONResponse("", 500)

    @app.post("/{way}")
    async def work(way: str, db: AsyncSessionDep) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if way == "expected":
                raise
            if way == "wrapped":
                raise RuntimeError from None  # as libraries do
        raise ArithmeticError("a bug")

    with served(app) as base:
        for way in ("expected", "wrapped", "bug"):
            leave(base, f"/{way}", begun)
        until(lambda: told, bool)
    assert told == ["ArithmeticError('a bug')"]
