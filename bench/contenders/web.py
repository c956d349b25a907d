"""Applications with one endpoint, called as a server would call them, and without a server."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from . import Units
from .orm import Item, shown


def add_endpoint(app: Any, session: Any) -> Any:
    """Give a FastAPI application its endpoint; `session` annotates the argument."""

    @app.get("/items/{key}")
    async def read(key: int, db: session) -> Any:
        return shown(await db.get_one(Item, key))

    return app


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[Units]:
    """Start an ASGI application as a server does, with the messages of the lifespan, and end it."""
    messages: asyncio.Queue[Any] = asyncio.Queue()
    answers: asyncio.Queue[Any] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    life = asyncio.ensure_future(app(scope, messages.get, answers.put))
    for event in "startup", "shutdown":
        if event == "shutdown":
            yield {"request": request(app, scope["state"])}
        messages.put_nowait({"type": f"lifespan.{event}"})
        answer = await answers.get()
        if answer["type"] != f"lifespan.{event}.complete":
            raise RuntimeError(answer)
    await life


def request(app: Any, state: Any) -> Callable[[int], Coroutine[Any, Any, None]]:
    """Return a unit of work that sends one request, in a task of its own."""

    async def unit(key: int) -> None:
        asked = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if asked.is_set():
                await asyncio.Event().wait()  # the client stays
            asked.set()
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] != 200:
                raise RuntimeError(f"the application answered {message['status']}")

        path = f"/items/{key}"
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"bench")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": dict(state),
        }
        await asyncio.create_task(app(scope, receive, send))

    return unit


def flask_request(app: Any) -> Callable[[int], None]:
    """Return a unit of work that sends one request to a WSGI application."""

    def unit(key: int) -> None:
        def start_response(status: str, headers: Any, error: Any = None) -> Any:
            if not status.startswith("200"):
                raise RuntimeError(f"the application answered {status}")

        environ = {
            "REQUEST_METHOD": "GET",
            "SCRIPT_NAME": "",
            "PATH_INFO": f"/items/{key}",
            "QUERY_STRING": "",
            "SERVER_NAME": "bench",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        answer = app(environ, start_response)
        b"".join(answer)
        if hasattr(answer, "close"):
            answer.close()  # the server does, and it ends the request

    return unit
