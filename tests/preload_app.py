"""The application of `test_preload`: its managers are open, and used, before the server forks."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import text

from engineroom import Database, session_manager
from engineroom.registry import SessionManager

URL = os.environ["DATABASE_URL"]
BACKEND = text("SELECT pg_backend_pid()")

session_manager.init()
database = Database()
registry = SessionManager()
registry.forked = True


def ask() -> list[int]:
    """Ask every synchronous engine which backend serves it."""
    session = registry.create_session(URL)[1]()
    seen = [session.scalar(BACKEND)]
    session.close()
    for each in (database, session_manager.sync):
        with each.session() as db:
            seen.append(db.scalar(BACKEND))
    return seen


async def ask_async() -> list[int]:
    """Ask the asynchronous ones."""
    seen = []
    for manager in (session_manager, registry.database(URL)):
        async with manager.session() as db:
            seen.append(await db.scalar(BACKEND))
    return seen


def use() -> None:
    PARENTS.extend(ask())
    PARENTS.extend(asyncio.run(ask_async()))


PARENTS: list[int] = []  # the backends that were in use before the fork
user = threading.Thread(target=use)  # uvicorn imports this inside its event loop
user.start()
user.join()
IMPORTED_BY = os.getpid()


def report(backends: list[int]) -> bytes:
    return json.dumps([os.getpid(), IMPORTED_BY, backends, PARENTS]).encode()


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await session_manager.close()
        await registry.aclose()
        await asyncio.to_thread(database.close)
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "http":
        body = report(await ask_async() + await asyncio.to_thread(ask))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    body = report(ask())
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def job(number: int) -> tuple[int, int, list[int], list[int]]:
    return os.getpid(), IMPORTED_BY, ask() + asyncio.run(ask_async()), PARENTS


def main(method: str, count: int) -> None:
    """Do jobs in children of `multiprocessing`, started by one of its methods."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["preload_app"])
    with context.Pool(3) as pool:
        print(json.dumps(pool.map(job, range(count), chunksize=1)))
        pool.close()
        pool.join()
