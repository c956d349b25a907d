"""Sessions for any ASGI application: one for each request, committed before its response leaves."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from .arguments import mind_manager, mind_policy
from .errors import NotEntered
from .exchange import Exchange
from .ledger import REQUEST
from .lifespans import lifespan
from .manager import DatabaseSessionManager, session_manager
from .readiness import Readiness
from .requests import EXCHANGE_KEY, REQUEST_KEY, ASGIApp, ASGIScope, Receive, RoutedRequest, Send

__all__ = ["DatabaseMiddleware", "Readiness", "current_session", "lifespan"]


class DatabaseMiddleware:
    """One session for each request, `request.state.db`, whose COMMIT comes before the response.

        app.add_middleware(DatabaseMiddleware)

    The session is opened where it is first asked for, and ended when the response starts: what
    streams or runs in the background after that opens its own. An exception rolls back, one that
    the application answers too; what was returned commits, whatever its status, unless `commit_on`
    says otherwise. A WebSocket's session ends with its close.

    Where a request finds the pool empty (`PoolExhausted`), the answer is 503 with `Retry-After`,
    and the log has the holders.

    Args:
        app: The application.
        manager: Whose sessions.
        commit_on: Whether a response with this status commits; without it, each does.
        cancel_on_disconnect: Cancel the work on a request whose client has gone.
        state: The name in `request.state`.
    """

    def __init__(
        self,
        app: ASGIApp,
        manager: DatabaseSessionManager = session_manager,
        *,
        commit_on: Callable[[int], bool] | None = None,
        cancel_on_disconnect: bool = True,
        state: str = "db",
    ) -> None:
        mind_manager("DatabaseMiddleware", manager, DatabaseSessionManager)
        if commit_on is not None:
            mind_policy(commit_on)
        self.app: ASGIApp = app
        self.manager: DatabaseSessionManager = manager
        self.commit_on: Callable[[int], bool] | None = commit_on
        self.cancel_on_disconnect: bool = cancel_on_disconnect
        self.state: str = state

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        around: Exchange | None = scope.get(EXCHANGE_KEY)
        if around is not None:  # of another manager, or of what this application is mounted in
            await self._serve_inside(around, scope, receive, send)
            return
        exchange = scope[EXCHANGE_KEY] = self.exchange(scope, receive, send)
        state = scope.setdefault("state", {})
        scope["state"] = State(exchange, state)
        request = scope[REQUEST_KEY] = RoutedRequest(scope)
        token = REQUEST.set(request)
        try:
            await exchange.run(cancels=self.cancel_on_disconnect)
        finally:
            REQUEST.reset(token)
            request.freeze()
            scope["state"] = state  # or they would keep each other alive
            del scope[EXCHANGE_KEY]

    def exchange(self, scope: ASGIScope, receive: Receive, send: Send) -> Exchange:
        """Return what takes one request through: a framework's integration has one of its own."""
        return Exchange(self, scope, receive, send)

    async def _serve_inside(
        self, around: Exchange, scope: ASGIScope, receive: Receive, send: Send
    ) -> None:
        """Serve a request that comes through another such middleware, which looks out for both."""
        exchange = scope[EXCHANGE_KEY] = self.exchange(scope, receive, send)
        state = scope["state"]
        scope["state"] = State(exchange, state)
        try:
            await exchange.run(cancels=False)
        finally:
            scope["state"] = state
            scope[EXCHANGE_KEY] = around


class State(dict[str, Any]):
    """`request.state`: its session is opened when it is first asked for.

    What the application writes goes to the server's own as well, where outer middleware looks.
    """

    def __init__(self, exchange: Exchange, given: MutableMapping[str, Any]) -> None:
        super().__init__(given)
        self._exchange = exchange
        self._given = given

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._given[name] = value

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._given.pop(name, None)

    def update(self, *args: Any, **kw: Any) -> None:
        """Write several."""
        for name, value in dict(*args, **kw).items():
            self[name] = value

    def __missing__(self, name: str) -> Any:
        if name == self._exchange.middleware.state:
            return self._exchange.session()
        if isinstance(self._given, State):
            return self._given[name]
        raise KeyError(name)


def current_session() -> AsyncSession:
    """Return the session of the request that is served here: what `request.state.db` is.

    Raises:
        NotEntered: no request is, or not under `DatabaseMiddleware`.
        SessionClosed: its response has started.
    """
    scope = getattr(REQUEST.get(), "scope", None) or {}
    exchange: Exchange | None = scope.get(EXCHANGE_KEY)
    if exchange is None:
        raise NotEntered(
            "current_session() was called outside of a request, or DatabaseMiddleware is not "
            "installed. Add it to the application; elsewhere, open one: async with "
            "session_manager.session() as db: …"
        )
    return exchange.session()
