"""Measure what a request costs: the dependency of engineroom beside the `get_db` that people write.

    python bench/web.py [--pairs 30]

Each application is called as a server would call it, without a server. A pair is a slice of
requests to one and to the other, in alternating order; the figure is the client process's own CPU,
as a ratio, the Python functions that are called, which no other process disturbs, and the round
trips that a proxy counted.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from engineroom import DatabaseSessionManager
from engineroom.asgi import DatabaseMiddleware
from engineroom.fastapi import lifespan, session_dependency
from engineroom.testing import WireProxy, postgres

SLICE = 100  # requests
STATEMENT = text("SELECT 1")


def by_hand(url: str) -> FastAPI:
    """The usual generator, on an engine that was tuned: no pre-ping, no overflow."""
    app = FastAPI()
    engine = create_async_engine(make_url(url), pool_size=10, max_overflow=0)
    sessions = async_sessionmaker(engine, expire_on_commit=False, autoflush=False)

    async def get_db() -> AsyncIterator[AsyncSession]:
        async with sessions() as session:
            try:
                yield session
                await session.commit()
            except BaseException:
                await session.rollback()
                raise

    @app.get("/")
    async def read(db: Annotated[AsyncSession, Depends(get_db)]) -> Any:
        return await db.scalar(STATEMENT)

    return app


def by_engineroom(url: str, *, reader: bool = False, middleware: bool = False) -> FastAPI:
    """The dependency, with a manager of its own."""
    manager = DatabaseSessionManager()
    get_db = session_dependency(manager, reader=reader)
    app = FastAPI(
        lifespan=lifespan(manager, url=url, pool_size=10, max_overflow=0, pool_ping_after=60)
    )
    if middleware:
        app.add_middleware(DatabaseMiddleware, manager=manager)

    @app.get("/")
    async def read(db: Annotated[AsyncSession, Depends(get_db)]) -> Any:
        return await db.scalar(STATEMENT)

    return app


APPLICATIONS: dict[str, Callable[[str], FastAPI]] = {
    "get_db by hand": by_hand,
    "AsyncSessionDep": by_engineroom,
    "ReaderDep": lambda url: by_engineroom(url, reader=True),
    "AsyncSessionDep, DatabaseMiddleware": lambda url: by_engineroom(url, middleware=True),
}
BASELINE = "get_db by hand"


async def serve(app: FastAPI) -> None:
    """Send one request, as an ASGI server does."""
    asked = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if asked.is_set():
            await asyncio.Event().wait()  # the client stays
        asked.set()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    await asyncio.get_running_loop().create_task(app(scope, receive, send))


async def cost(app: FastAPI) -> float:
    """Return the CPU of a slice of requests."""
    begun = time.process_time()
    for _ in range(SLICE):
        await serve(app)
    return time.process_time() - begun


async def calls(app: FastAPI) -> float:
    """Return how many Python functions a request calls."""
    seen = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal seen
        seen += event == "call"

    sys.setprofile(count)
    for _ in range(SLICE):
        await serve(app)
    sys.setprofile(None)
    return seen / SLICE


async def measure(url: str, proxied: str, proxy: WireProxy, pairs: int) -> Table:
    """Run all of them in one loop, and return the table."""
    table = Table("", "round trips", "calls", "CPU, × by hand", "quartiles")
    async with AsyncExitStack() as stack:
        apps, counted = {}, {}
        for name, make in APPLICATIONS.items():
            apps[name], counted[name] = make(url), make(proxied)
            for app in (apps[name], counted[name]):
                await stack.enter_async_context(app.router.lifespan_context(app))
                for _ in range(20):
                    await serve(app)
        trips = {}
        for name, app in counted.items():
            proxy.reset()
            for _ in range(SLICE):
                await serve(app)
            trips[name] = f"{proxy.round_trips / SLICE:g}"
        called = {name: f"{await calls(app):.0f}" for name, app in apps.items()}
        ratios: dict[str, list[float]] = {name: [] for name in apps}
        for number in range(pairs):
            for name, app in apps.items():
                pair = {BASELINE: apps[BASELINE], name: app}
                order = reversed(pair) if number % 2 else pair
                costs = {one: await cost(pair[one]) for one in order}
                ratios[name].append(costs[name] / costs[BASELINE])
        for name, found in ratios.items():
            low, median, high = statistics.quantiles(found, n=4, method="inclusive")
            quartiles = f"{low:.2f} to {high:.2f}"
            table.add_row(name, trips[name], called[name], f"{median:.3f}", quartiles)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    pairs = parser.parse_args().pairs
    with postgres(18) as server, WireProxy(server.host, server.port) as proxy:
        url = server.url(driver="asyncpg")
        Console().print(asyncio.run(measure(url, proxy.url(url), proxy, pairs)))


if __name__ == "__main__":
    main()
