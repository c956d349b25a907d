"""FastAPI: one session for each request, committed before its response leaves."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from traceback import walk_stack
from types import TracebackType
from typing import Annotated, Any, TypeGuard, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import checkpoint_if_cancelled
from fastapi import Depends, HTTPException, WebSocket
from fastapi.requests import HTTPConnection
from fastapi.websockets import WebSocketState
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .asgi import (
    BUSY,
    EXCHANGE_KEY,
    RETRY_AFTER,
    SESSIONS_KEY,
    ASGIScope,
    Exchange,
    is_application,
    is_success,
    lifespan,
    log_refusal,
    mind_manager,
    pool_exhausted,
    request_of,
    stand_at_endpoint,
    triple,
)
from .backends import Role
from .cancellation import settle
from .database import Database
from .errors import NotInitialized, OutsideRequest, PoolExhausted
from .ledger import REQUEST, Request
from .manager import DatabaseSessionManager, session_manager
from .patrol import Message
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

WEBSOCKETS_ENDS = ("websocket.close", "websocket.http.response.start")

F = TypeVar("F", bound=Callable[..., Any])


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
    open while the function that has it is among the callers, and is not sending the response.
    `tests/test_private_names.py` fails when this goes.
    """
    stack: AsyncExitStack | None = scope.get("fastapi_function_astack")
    called = sys._getframe()
    for frame, _ in walk_stack(called):
        is_fastapis = frame.f_globals.get("__name__", "").startswith("fastapi.")
        if is_fastapis and any(value is stack for value in frame.f_locals.values()):
            return None if is_application(called.f_code) else stack
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
            exchange = deciding_by_status(connection)
            if exchange is not None:
                exchange.mind_the_end()
            before = REQUEST.get()
            request_of(connection.scope)
            opening = scope_class(room, kind, role)
            stand_at_endpoint(opening, connection.scope)
            sessions[key] = open_session(opening)
            if exchange is None:
                enlist(connection, stack, opening, before)
            else:
                enlist_in(exchange, opening, before)
            if isinstance(opening, HandedScope):
                await reserve(opening)
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


def open_session(opening: AsyncSessionScope | HandedScope) -> AsyncSession | Session:
    """Open a scope; an application whose manager is not open is told where to open it."""
    try:
        return opening.open()
    except NotInitialized as error:
        raise NotInitialized(
            f"{error.message} With FastAPI: from engineroom.fastapi import lifespan, then "
            "FastAPI(lifespan=lifespan()). (A TestClient runs the lifespan when it is entered: "
            "with TestClient(app) as client: …)"
        ) from None


def is_open(session: AsyncSession | Session | None) -> bool:
    """Whether a session's scope has not ended yet."""
    scope: Any = getattr(getattr(session, "sync_session", session), "_scope", None)
    return scope is not None and bool(scope.is_open)


def enlist(
    connection: HTTPConnection,
    stack: AsyncExitStack,
    opening: AsyncSessionScope | HandedScope,
    before: Request | None,
) -> None:
    """Have the session end when the endpoint has returned, before there is a response.

    Args:
        before: What the context named as the request before this one.
    """
    closes: list[Message] = []  # of a WebSocket, that wait for the end

    async def end(
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await leave(opening, kind, error, traceback)
        except Exception as failure:
            if is_connected(connection):
                await connection.close(1011)  # internal error; the server would just hang up
            refuse(failure)  # its first statement came with the COMMIT
            raise
        else:
            refuse(error)
            if error is None and closes and isinstance(connection, WebSocket):
                await connection.send(closes[0])
        finally:
            REQUEST.set(before)

    stack.push_async_exit(end)
    if isinstance(connection, WebSocket):
        end_before_close(connection, opening, end, closes)


def end_before_close(
    connection: WebSocket,
    opening: AsyncSessionScope | HandedScope,
    end: Callable[..., Awaitable[None]],
    closes: list[Message],
) -> None:
    """Have a session of a WebSocket end before its close is sent.

    A close that the endpoint sends while it handles an exception waits until it has returned: in
    `except:` that is a usual end, in `finally:` it may raise yet.
    """
    send, around = connection.send, sys.exception()

    async def send_after_commit(message: Message) -> None:
        if message["type"] in WEBSOCKETS_ENDS and opening.is_open:
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

    connection.send = send_after_commit  # type: ignore[method-assign]  # `close()` sends by it


def enlist_in(
    exchange: Exchange, opening: AsyncSessionScope | HandedScope, before: Request | None
) -> None:
    """Have the session end when the response is about to start: the middleware sees its status."""

    async def end(
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await leave(opening, kind, error, traceback)
        finally:
            REQUEST.set(before)

    exchange.enlist(opening, end)


def deciding_by_status(connection: HTTPConnection) -> Exchange | None:
    """Return the request's way through the middleware, if that decides by the status."""
    exchange: Exchange | None = connection.scope.get(EXCHANGE_KEY)
    return None if exchange is None or exchange.middleware.commit_on is None else exchange


def is_connected(connection: HTTPConnection) -> TypeGuard[WebSocket]:
    """Whether it is a WebSocket that was accepted and not closed."""
    return (
        isinstance(connection, WebSocket)
        and connection.application_state is WebSocketState.CONNECTED
    )


async def reserve(opening: HandedScope) -> None:
    """Wait for the permit of a session that threads will use."""
    try:
        await opening.reserve()
    except PoolExhausted as error:
        refuse(error)
        raise


async def leave(
    opening: AsyncSessionScope | HandedScope,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    """End a session on the side that it belongs to."""
    if not isinstance(opening, HandedScope):
        await opening.__aexit__(kind, error, traceback)
    elif isinstance(error, asyncio.CancelledError):
        # In a task of its own: where anyio cancels a scope, nothing can be awaited.
        await settle(leave_cancelled(opening, error))
    elif opening.is_open and opening.has_work:
        try:
            await checkpoint_if_cancelled()  # while its thread worked, nobody noticed
        except asyncio.CancelledError as cancelled:
            await settle(leave_cancelled(opening, cancelled))
            raise
        await settle(leave_threads(opening, error), None)
    else:
        opening.__exit__(kind, error, traceback)


async def leave_cancelled(opening: HandedScope, error: asyncio.CancelledError) -> None:
    """End a session of threads once the one that is in the middle of it was made to leave."""
    await opening.leave_threads()
    await leave_threads(opening, error)


async def leave_threads(opening: HandedScope, error: BaseException | None) -> None:
    """End a session of threads in a thread."""
    # A limiter of its own: those that are usual may be taken by threads that wait for this one.
    await anyio.to_thread.run_sync(
        opening.__exit__, *triple(error), limiter=anyio.CapacityLimiter(1)
    )


def refuse(error: BaseException | None) -> None:
    """Raise what FastAPI answers with 503, if the pool was empty; the names are for the log."""
    exhausted = pool_exhausted(error)
    if isinstance(exhausted, PoolUnavailable):
        raise exhausted
    if exhausted is not None:
        log_refusal(exhausted)
        raise PoolUnavailable(exhausted) from error
