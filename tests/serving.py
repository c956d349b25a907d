"""Serves an ASGI application on a real socket, with uvicorn in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from scenario import until


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
        server.should_exit = True
        thread.join()
        listener.close()
