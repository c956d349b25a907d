"""A request of an ASGI application: its name, its messages, and what its scope keeps of ours."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .ledger import REQUEST, Request
from .scopes import Scope, triple

Message = MutableMapping[str, Any]
ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]
Exit = Callable[..., Awaitable[None]]  # ends a session; it takes what an exit takes

WEBSOCKETS_ENDS = ("websocket.close", "websocket.http.response.start")

# What we keep in an ASGI scope: the request's name, its sessions, its way through the middleware.
REQUEST_KEY = "engineroom.request"
SESSIONS_KEY = "engineroom.sessions"
EXCHANGE_KEY = "engineroom.exchange"


class RoutedRequest(Request):
    """A request by its method and its route, which is found only later."""

    def __init__(self, scope: ASGIScope) -> None:
        super().__init__()
        self.scope: ASGIScope | None = scope

    def __str__(self) -> str:
        """Name it: `GET /items/{id}`; by its path before it has found its route."""
        return self.name if self.scope is None else name_of_request(self.scope)

    def freeze(self) -> None:
        """Keep the name and let the rest go: the two would keep each other alive."""
        self.name: str = str(self)
        self.scope = None


def name_of_request(scope: ASGIScope) -> str:
    """Name a request: `GET /items/{id}`; by its path before it has found its route."""
    template = getattr(scope.get("route"), "path", None) or scope.get("path_template")
    return f"{scope.get('method', 'WEBSOCKET')} {template or scope.get('path', '')}"


def serve_request(scope: ASGIScope) -> None:
    """Have what is opened from here on know the request that it serves."""
    request: Request | None = scope.get(REQUEST_KEY)
    if request is None:
        request = scope[REQUEST_KEY] = Request(name_of_request(scope))
    REQUEST.set(request)


def stand_at_endpoint(opening: Scope, scope: ASGIScope) -> None:
    """Have reports name the endpoint that a session was opened for, where it is known."""
    if (endpoint := scope.get("endpoint")) is not None:
        opening.stand_at(endpoint)


def is_success(message: Message) -> bool:
    """Whether a client takes this start of a response, or close, for a success."""
    if message["type"] == "websocket.close":
        return message.get("code", 1000) in (1000, 1001)
    return bool(message["status"] < 400)


def end_before_close(send: Send, opened: Scope, end: Exit, closes: list[Message]) -> Send:
    """Have a session of a WebSocket end before its close is sent.

    A close that the endpoint sends while it handles an exception waits until it has returned: in
    `except:` that is a usual end, in `finally:` it may raise yet.

    Args:
        send: Sends a message.
        closes: Where those are put that wait.

    Returns:
        What sends from now on.
    """
    around = sys.exception()

    async def send_after_commit(message: Message) -> None:
        if message["type"] in WEBSOCKETS_ENDS and opened.is_open:
            handled = sys.exception()
            if handled is around:
                handled = None
            elif handled is not None and is_success(message):
                if message["type"] == "websocket.close":
                    closes.append(message)
                    return
                handled = None
            await end(*triple(handled))
        await send(message)

    return send_after_commit
