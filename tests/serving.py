"""Serves an ASGI application on a real socket, with uvicorn in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from scenario import until


def no_websocket(protocols: list[type]) -> bool:
    """Whether none of them speaks to a WebSocket."""
    return not any("WebSocket" in protocol.__name__ for protocol in protocols)


@contextmanager
def served(app: Any, **options: Any) -> Iterator[str]:
    """Start uvicorn on a free port, and give the base URL; stop it as SIGINT would.

    Args:
        options: What `uvicorn.Config` takes.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    settings = {
        "log_level": "critical",
        "lifespan": "on",
        "ws": "websockets-sansio",
        "timeout_graceful_shutdown": 10,
    }
    server = uvicorn.Server(uvicorn.Config(app, **(settings | options)))
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listener])), name="uvicorn"
    )
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), bool)
        assert server.started, "uvicorn did not start: see its log"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        # uvicorn refuses the WebSockets that are open; one that it is just refusing takes no other.
        with suppress(AssertionError):
            until(lambda: list(map(type, server.server_state.connections)), no_websocket, 2)
        server.should_exit = True
        thread.join()
        listener.close()
