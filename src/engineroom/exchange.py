"""One request on its way: its sessions end before its response starts, whatever becomes of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from traceback import walk_tb
from types import CodeType
from typing import Any, Protocol

from sqlalchemy.ext.asyncio import AsyncSession

from .errors import PoolExhausted, SessionClosed
from .ledger import REQUEST
from .manager import DatabaseSessionManager
from .patrol import Patrol
from .refusals import BUSY, RETRY_AFTER, TRY_AGAIN_LATER, log_refusal, pool_exhausted
from .requests import (
    EXCHANGE_KEY,
    REQUEST_KEY,
    SESSIONS_KEY,
    ASGIApp,
    ASGIScope,
    Exit,
    Message,
    Receive,
    Send,
    is_success,
    stand_at_endpoint,
)
from .scopes import Scope, triple

logger: logging.Logger = logging.getLogger("engineroom")


class Middleware(Protocol):
    """What a request must know of the middleware that it comes through."""

    app: ASGIApp
    manager: DatabaseSessionManager
    commit_on: Callable[[int], bool] | None
    state: str


class Exchange:
    """One request on its way through the middleware."""

    def __init__(
        self, middleware: Middleware, scope: ASGIScope, receive: Receive, send: Send
    ) -> None:
        self.middleware: Middleware = middleware
        self.stack: AsyncExitStack = AsyncExitStack()  # ends the sessions
        self.scopes: list[Scope] = []  # theirs
        self._scope = scope
        self._receive = receive
        self._send = send
        self._is_ended = False  # the sessions are
        self._is_started = False  # the response is; of a WebSocket, its close
        self._is_accepted = False
        self._close: Message | None = None  # of a WebSocket, sent once it is known how that ends
        self._failure: BaseException | None = None  # of the sessions' end
        self._patrol: Patrol | None = None
        self._around = sys.exception()  # what the caller may be handling already
        self._opened: list[Any] = []  # keys of sessions

    def session(self, *, reader: bool = False) -> AsyncSession:
        """Return the request's session, or its reader; it is opened at the first call.

        Raises:
            SessionClosed: the response has started.
        """
        manager = self.middleware.manager
        sessions = self._scope.setdefault(SESSIONS_KEY, {})
        key = (manager, "reader" if reader else "session")
        session: AsyncSession | None = sessions.get(key)
        if session is None:
            self.mind_the_end()
            opening = manager.reader() if reader else manager.session()
            stand_at_endpoint(opening, self._scope)
            session = sessions[key] = opening.open()
            self._opened.append(key)
            self.enlist(opening, opening.__aexit__)
        return session

    def mind_the_end(self) -> None:
        """Refuse to open what nothing would end any more.

        Raises:
            SessionClosed: the response has started.
        """
        if self._is_ended:
            raise SessionClosed(
                f"A session of {self._scope[REQUEST_KEY]} was asked for after its response had "
                "started: what it did would never be committed. Open one where it is done: async "
                "with session_manager.session() as db: …"
            )

    def enlist(self, opened: Scope, end: Exit) -> None:
        """End this scope with the request."""
        handled = sys.exception()
        reached = None if handled is None else handled.__traceback__

        async def end_it(_: Any, error: BaseException | None, traceback: Any) -> None:
            # What was handled already when it was opened, and has come no further: not its fault.
            was_there = error is handled and traceback is reached
            await end(*triple(None if was_there else error))

        self.scopes.append(opened)
        self.stack.push_async_exit(end_it)

    async def run(self, *, cancels: bool) -> None:
        """Run the application, and end what it opened.

        Args:
            cancels: Cancel it once its client has gone.
        """
        receive = self._receive
        if cancels and self._scope["type"] == "http":
            self._patrol = Patrol(self._receive, self._scope[REQUEST_KEY])
            receive = self._patrol.receive
        try:
            await self._run(receive)
        except BaseException as error:
            if self._patrol is None or not self._patrol.explains(error):
                raise
            logger.debug("The client of %s has gone: its work was cancelled", REQUEST.get())
        finally:
            if self._patrol is not None:
                await self._patrol.end()
            for key in self._opened:
                self._scope[SESSIONS_KEY].pop(key, None)
        if self._patrol is not None and self._patrol.has_cancelled and not self._is_started:
            with suppress(Exception):  # outer middleware wants an answer, though nobody reads it
                await self._answer(499)

    async def _run(self, receive: Receive) -> None:
        try:
            await self.middleware.app(self._scope, receive, self.send)
        except BaseException as error:
            await self._end(error)
            told = self._failure or error  # frameworks wrap what is raised in `send`
            if (exhausted := pool_exhausted(told)) is not None and not self._is_started:
                await self._refuse(exhausted)
                return
            if told is not error:
                raise told from None
            raise
        await self._end(None)
        if self._close is not None:
            await self._send(self._close)

    async def send(self, message: Message) -> None:
        """Pass a message on; before the first of a response, commit."""
        kind = message["type"]
        if kind.endswith((".response.start", "websocket.close")):
            answered = sys.exception()  # what is answered with this, or handled for other reasons
            if answered is self._around:
                answered = None
            elif answered is not None and is_success(message) and not has_left(answered):
                if kind == "websocket.close":  # in `except:`, or in `finally:` and about to raise
                    self._close = message
                    return
                answered = None
            await self._end(answered, message.get("status"))
            self._is_started = True
        elif kind == "websocket.accept":
            self._is_accepted = True
        elif kind == "http.response.body" and not message.get("more_body") and self._patrol:
            self._patrol.stand_down()
        await self._send(message)

    async def _end(self, error: BaseException | None, status: int | None = None) -> None:
        """Commit or roll back, once."""
        if self._is_ended:
            return
        self._is_ended = True
        commit_on = self.middleware.commit_on
        try:
            commits = status is None or commit_on is None or commit_on(status)
        except BaseException as broken:
            self._failure = broken
            await self._leave(broken)
            raise
        if not commits:
            for scope in self.scopes:
                scope.is_rollback_only = True
        await self._leave(error)

    async def _leave(self, error: BaseException | None) -> None:
        try:
            await self.stack.__aexit__(*triple(error))
        except BaseException as failure:
            if failure is not error:
                self._failure = failure
                if self._is_accepted:  # servers would just hang up
                    self._is_started = True
                    await self._send({"type": "websocket.close", "code": 1011})
            raise

    async def _refuse(self, error: PoolExhausted) -> None:
        """Answer 503: the names are for the log."""
        log_refusal(error)
        retry_after = str(RETRY_AFTER).encode()
        headers = [(b"content-type", b"text/plain"), (b"retry-after", retry_after)]
        await self._answer(503, headers, BUSY.encode())

    async def _answer(
        self, status: int, headers: Sequence[tuple[bytes, bytes]] = (), body: bytes = b""
    ) -> None:
        kind = "http.response"
        if self._scope["type"] == "websocket":
            kind = "websocket.http.response"
            if self._is_accepted or kind not in (self._scope.get("extensions") or {}):
                await self.send({"type": "websocket.close", "code": TRY_AGAIN_LATER})
                return
        await self.send({"type": f"{kind}.start", "status": status, "headers": [*headers]})
        await self.send({"type": f"{kind}.body", "body": body})


def deciding_by_status(scope: ASGIScope) -> Exchange | None:
    """Return the request's way through the middleware, if that decides by the status."""
    exchange: Exchange | None = scope.get(EXCHANGE_KEY)
    return None if exchange is None or exchange.middleware.commit_on is None else exchange


def has_left(error: BaseException) -> bool:
    """Whether an exception was raised out of an ASGI application by now, and not only inside one.

    Its traceback begins with the function that handles it, and goes on with what that had called.
    """
    reached = error.__traceback__
    return reached is not None and any(
        is_application(frame.f_code) for frame, _ in walk_tb(reached.tb_next)
    )


def is_application(code: CodeType) -> bool:
    """Whether it is that of an ASGI application, by the names that the specification gives."""
    return {"scope", "receive", "send"} <= set(code.co_varnames[: code.co_argcount])
