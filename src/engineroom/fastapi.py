"""FastAPI: one session for each request, committed before its response leaves."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Annotated, Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, HTTPException
from fastapi.requests import HTTPConnection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .asgi import (
    BUSY,
    EXCHANGE_KEY,
    RETRY_AFTER,
    SESSIONS_KEY,
    ASGIScope,
    Exchange,
    lifespan,
    log_refusal,
    request_of,
    stand_at_endpoint,
)
from .backends import Role
from .cancellation import settle
from .database import Database
from .errors import NotInitialized, OutsideRequest, PoolExhausted
from .ledger import REQUEST
from .manager import DatabaseSessionManager, session_manager
from .scopes import AsyncSessionScope, HandedScope

__all__ = [
    "AsyncSessionDep",
    "PoolUnavailable",
    "ReaderDep",
    "SessionDep",
    "get_db",
    "get_reader",
    "get_sync_db",
    "lifespan",
    "session_dependency",
]

F = TypeVar("F", bound=Callable[..., Any])
Exit = Callable[
    [type[BaseException] | None, BaseException | None, TracebackType | None], Awaitable[Any]
]


class PoolUnavailable(PoolExhausted, HTTPException):
    """`PoolExhausted` in a request: 503 with `Retry-After`, unless the app handles the former."""

    def __init__(self, error: PoolExhausted) -> None:
        PoolExhausted.__init__(
            self, error.message, error.size, error.overflow, error.waiting, error.holders
        )
        self.status_code = 503
        self.detail = BUSY
        self.headers: dict[str, str] = {"Retry-After": str(RETRY_AFTER)}


def function_stack(scope: ASGIScope) -> AsyncExitStack:
    """Return the stack that FastAPI closes between the endpoint and its response.

    A private name: nothing public comes at that moment for a dependency that several spellings
    share. `tests/test_private_names.py` fails when it goes.
    """
    stack: AsyncExitStack = scope["fastapi_function_astack"]
    return stack


def awaited_by_fastapi(function: F) -> F:
    """Have FastAPI await what the function returns, though it is no coroutine function.

    So that calling it outside of a request raises at once, and not when somebody awaits.
    """
    if hasattr(inspect, "markcoroutinefunction"):
        inspect.markcoroutinefunction(function)
    else:
        function._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]  # 3.11
    return function


def session_dependency(
    manager: DatabaseSessionManager | Database = session_manager,
    *,
    sync: bool = False,
    reader: bool = False,
) -> Callable[..., Any]:
    """Return a dependency that gives the request's session of this manager.

        orders = DatabaseSessionManager()
        get_orders = session_dependency(orders)
        OrdersDep = Annotated[AsyncSession, Depends(get_orders)]

    Whoever asks for it in one request, in whatever spelling, gets the same session. It commits when
    the endpoint has returned, before the first byte of the response, and rolls back if anything was
    raised. Then it is closed for good: a streaming body or a background task opens its own.

    Args:
        manager: Whose sessions.
        sync: Give a `Session`, for `def` endpoints. A request waits for its turn on the event loop,
            so that those that wait take no thread from those that need no database.
        reader: Give a session without a transaction, in which the server refuses writes.
    """
    kind = "reader" if reader else "session"
    role = Role.READER if reader else Role.PRIMARY
    room = manager._room
    is_sync = sync or isinstance(manager, Database)
    key = (manager, kind, is_sync)

    async def give(connection: HTTPConnection) -> AsyncSession:
        scope = connection.scope
        sessions = scope.setdefault(SESSIONS_KEY, {})
        session: AsyncSession | None = sessions.get(key)
        if session is None:
            before = REQUEST.get()
            request_of(scope)
            opening = AsyncSessionScope(room, kind, role)
            stand_at_endpoint(opening, scope)
            session = sessions[key] = opened(opening.open)
            enlist(scope, opening, opening.__aexit__, before)
        return session

    async def give_sync(connection: HTTPConnection) -> Session:
        scope = connection.scope
        sessions = scope.setdefault(SESSIONS_KEY, {})
        session: Session | None = sessions.get(key)
        if session is None:
            before = REQUEST.get()
            request_of(scope)
            opening = HandedScope(room, kind, role)
            stand_at_endpoint(opening, scope)
            session = sessions[key] = opened(opening.__enter__)
            enlist(scope, opening, functools.partial(leave, opening), before)
            try:
                await opening.reserve()
            except PoolExhausted as error:
                raise unavailable(error) from error
        return session

    def dependency(connection: HTTPConnection = None) -> Awaitable[Any]:  # type: ignore[assignment]
        if not isinstance(connection, HTTPConnection):
            raise OutsideRequest(
                "A dependency of engineroom was called outside of a request. In a route, declare "
                "it: db: AsyncSessionDep (or SessionDep). Elsewhere, open a session: async with "
                "session_manager.session() as db: …"
            )
        return give_sync(connection) if is_sync else give(connection)

    return awaited_by_fastapi(dependency)


get_db: Callable[..., Any] = session_dependency()
"""Gives the request's session of `session_manager`; the key for `app.dependency_overrides`."""
get_reader: Callable[..., Any] = session_dependency(reader=True)
"""Gives the request's `reader()` of `session_manager`."""
get_sync_db: Callable[..., Any] = session_dependency(sync=True)
"""Gives the request's synchronous session of `session_manager`, for `def` endpoints."""

AsyncSessionDep = Annotated[AsyncSession, Depends(get_db)]
ReaderDep = Annotated[AsyncSession, Depends(get_reader)]
SessionDep = Annotated[Session, Depends(get_sync_db)]


def opened(enter: Callable[[], Any]) -> Any:
    """Enter a scope; an application whose manager is not open is told where to open it."""
    try:
        return enter()
    except NotInitialized as error:
        raise NotInitialized(
            f"{error.message} With FastAPI: from engineroom.fastapi import lifespan, then "
            "FastAPI(lifespan=lifespan()). (A TestClient runs the lifespan when it is entered: "
            "with TestClient(app) as client: …)"
        ) from None


def enlist(
    scope: ASGIScope, opening: AsyncSessionScope | HandedScope, end: Exit, before: object
) -> None:
    """Have the session end when the endpoint has returned, before there is a response.

    Where the middleware decides by the status, that is when the response is about to start.
    """

    async def ended(
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await end(kind, error, traceback)
        finally:
            REQUEST.set(before)
        if isinstance(error, PoolExhausted):
            raise unavailable(error) from error

    exchange: Exchange | None = scope.get(EXCHANGE_KEY)
    if exchange is not None and exchange.middleware.commit_on is not None:
        exchange.scopes.append(opening)
        exchange.stack.push_async_exit(ended)
    else:
        function_stack(scope).push_async_exit(ended)


async def leave(
    opening: HandedScope,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    """End a session of threads in a thread, once none of them is in the middle of it."""
    if isinstance(error, asyncio.CancelledError):
        await settle(opening.leave_threads())
    if opening.has_work:
        # A limiter of its own: those that are usual may be taken by threads that wait for this one.
        await anyio.to_thread.run_sync(
            opening.__exit__, kind, error, traceback, limiter=anyio.CapacityLimiter(1)
        )
    else:
        opening.__exit__(kind, error, traceback)


def unavailable(error: PoolExhausted) -> PoolUnavailable:
    """Return the error that FastAPI answers with 503, and log what the client is not told."""
    if isinstance(error, PoolUnavailable):
        return error
    log_refusal(error)
    return PoolUnavailable(error)
