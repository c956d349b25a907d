"""FastAPI: one session for each request, committed before its response leaves."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Annotated, Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .arguments import mind_manager
from .backends import Role
from .database import Database
from .errors import NotInitialized, OutsideRequest, PoolExhausted
from .exchange import deciding_by_status, is_application
from .extras import brought_by
from .handed import HandedScope
from .ledger import REQUEST, has
from .lifespans import lifespan
from .manager import DatabaseSessionManager, session_manager
from .refusals import BUSY, RETRY_AFTER, log_refusal, pool_exhausted
from .requests import (
    SESSIONS_KEY,
    ASGIScope,
    Exit,
    Message,
    end_before_close,
    serve_request,
    stand_at_endpoint,
)
from .scopes import AsyncSessionScope
from .sessions import is_open

with brought_by("fastapi", "engineroom.fastapi is imported"):
    from fastapi import Depends, HTTPException, WebSocket
    from fastapi.requests import HTTPConnection
    from fastapi.websockets import WebSocketState

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

CLOSING = AsyncExitStack.__aexit__.__code__


class PoolUnavailable(PoolExhausted, HTTPException):
    """`PoolExhausted` in a request: 503 with `Retry-After`, unless the app handles the former."""

    def __init__(self, error: PoolExhausted) -> None:
        Exception.__init__(self, *error.args)  # the next in line would take it for a status
        self.__dict__.update(error.__dict__)
        self.status_code = 503
        self.detail = BUSY
        self.headers: Mapping[str, str] | None = {"Retry-After": str(RETRY_AFTER)}

    def __str__(self) -> str:
        """Return what a client may read: handlers of `HTTPException` send it."""
        return f"{self.status_code}: {self.detail}"


def function_stack(scope: ASGIScope) -> AsyncExitStack | None:
    """Return the stack that FastAPI closes between the endpoint and its response; None after that.

    A private name: nothing public comes at that moment for a dependency that several spellings
    share. FastAPI leaves it there once it is closed, and then it would end nothing any more. It is
    open while the function that has it is among the callers, and has no response yet, which it
    sends next, nor closes the stack around it (of dependencies that end after the response).
    `tests/test_private_names.py` fails when this goes.
    """
    stack: AsyncExitStack | None = scope.get("fastapi_function_astack")
    called = sys._getframe()
    while (frame := called.f_back) is not None:
        is_fastapis = frame.f_globals.get("__name__", "").startswith("fastapi.")
        if is_fastapis and has(frame, stack):
            closing = called.f_locals["self"] if called.f_code is CLOSING else None
            has_response = is_application(frame.f_code) and "response" in frame.f_locals
            is_past = closing is not stack and (closing is not None or has_response)
            return None if is_past else stack
        called = frame
    return None


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

    Raises:
        InvalidOption: `manager` is none.
    """
    mind_manager("session_dependency", manager, DatabaseSessionManager, Database)
    kind = "reader" if reader else "session"
    role = Role.READER if reader else Role.PRIMARY
    room = manager._room
    scope_class = HandedScope if sync or isinstance(manager, Database) else AsyncSessionScope
    # The middleware's sessions are known by the same keys: `request.state.db` is this one, too.
    key = (manager, kind if scope_class is AsyncSessionScope else f"synchronous {kind}")

    async def give(connection: HTTPConnection, stack: AsyncExitStack | None) -> Any:
        sessions = connection.scope.setdefault(SESSIONS_KEY, {})
        if stack is not None and not is_open(sessions.get(key)):
            opening = scope_class(room, kind, role)
            sessions[key] = open_between(connection, stack, opening)
            if isinstance(opening, HandedScope):
                try:
                    await opening.reserve()
                except PoolExhausted as error:
                    refuse(error)
        return sessions[key]

    # FastAPI always gives it, and wants its plain type; who calls it otherwise is told below.
    def dependency(connection: HTTPConnection = None) -> Awaitable[Any]:  # type: ignore[assignment]
        if not isinstance(connection, HTTPConnection):
            raise OutsideRequest(
                "A dependency of engineroom was called outside of a request. In a route, declare "
                "it: db: AsyncSessionDep (or SessionDep). Elsewhere, open a session: async with "
                "session_manager.session() as db: …"
            )
        stack = None
        if not is_open(connection.scope.get(SESSIONS_KEY, {}).get(key)):
            stack = function_stack(connection.scope)
            if stack is None:
                raise OutsideRequest(
                    "A dependency of engineroom was called before or after its endpoint, or in "
                    "another task, where nothing would end its session: in middleware, an "
                    "exception handler, a background task. Open one there: async with "
                    "session_manager.session() as db: …"
                )
        return give(connection, stack)

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


def open_between(
    connection: HTTPConnection, stack: AsyncExitStack, opening: AsyncSessionScope | HandedScope
) -> AsyncSession | Session:
    """Open a request's session, which ends between its endpoint and its response."""
    exchange = deciding_by_status(connection.scope)
    if exchange is not None:
        exchange.mind_the_end()
    before = REQUEST.get()
    serve_request(connection.scope)
    stand_at_endpoint(opening, connection.scope)
    try:
        session = opening.open()
    except NotInitialized as error:
        raise NotInitialized(
            f"{error.message} With FastAPI: from engineroom.fastapi import lifespan, then "
            "FastAPI(lifespan=lifespan()). (A TestClient runs the lifespan when it is entered: "
            "with TestClient(app) as client: …)"
        ) from None
    leave = opening.leave if isinstance(opening, HandedScope) else opening.__aexit__
    if exchange is None:
        stack.callback(REQUEST.set, before)
        enlist(connection, stack, opening, leave)
    else:  # it sees the status before the response starts
        exchange.stack.callback(REQUEST.set, before)
        exchange.enlist(opening, leave)
    return session


def enlist(
    connection: HTTPConnection,
    stack: AsyncExitStack,
    opening: AsyncSessionScope | HandedScope,
    leave: Exit,
) -> None:
    """Have the session end when the endpoint has returned, before there is a response.

    Args:
        leave: What ends it.
    """
    socket = connection if isinstance(connection, WebSocket) else None
    closes: list[Message] = []  # of a WebSocket, that wait for the end

    async def end(kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            await leave(kind, error, traceback)
        except Exception as failure:
            if socket is not None and socket.application_state is WebSocketState.CONNECTED:
                await socket.close(1011)  # internal error; the server would just hang up
            refuse(failure)  # its first statement came with the COMMIT
            raise
        if error is not None:
            refuse(error)
        elif closes and socket is not None:
            await socket.send(closes[0])

    stack.push_async_exit(end)
    if socket is not None:
        ending = end_before_close(socket.send, opening, end, closes)
        socket.send = ending  # type: ignore[assignment,method-assign]  # `close()` sends by it


def refuse(error: BaseException | None) -> None:
    """Raise what FastAPI answers with 503, if the pool was empty; the names are for the log."""
    exhausted = pool_exhausted(error)
    if isinstance(exhausted, PoolUnavailable):
        raise exhausted
    if exhausted is not None:
        log_refusal(exhausted)
        raise PoolUnavailable(exhausted) from error
