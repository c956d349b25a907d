"""Sessions for any ASGI application: one for each request, committed before its response leaves."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import sys
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from inspect import isasyncgenfunction, isgeneratorfunction
from traceback import walk_tb
from types import CodeType, TracebackType
from typing import Any, Unpack

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncSession

from .errors import (
    AlreadyInitialized,
    InvalidOption,
    NotEntered,
    PoolExhausted,
    SchemaMismatch,
    SessionClosed,
)
from .hooks import is_coroutine_function
from .ledger import REQUEST, Request
from .manager import DatabaseSessionManager, session_manager
from .patrol import Message, Patrol, Receive
from .scopes import Scope
from .settings import Options, check_names

logger: logging.Logger = logging.getLogger("engineroom")

ASGIScope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]
Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]  # frameworks differ in what it gives

# What we keep in an ASGI scope: the request's name, its sessions, its way through the middleware.
REQUEST_KEY = "engineroom.request"
SESSIONS_KEY = "engineroom.sessions"
EXCHANGE_KEY = "engineroom.exchange"
RETRY_AFTER = 1  # seconds that a client is asked to wait where the pool was empty
TRY_AGAIN_LATER = 1013  # the code with which a WebSocket is closed then


def lifespan(
    manager: DatabaseSessionManager = session_manager,
    *,
    url: str | URL | None = None,
    wraps: Any = None,
    migrate: bool = False,
    **options: Unpack[Options],
) -> Lifespan:
    """Return a lifespan that opens the manager at the start, and drains and closes it at the end.

    Args:
        manager: Which one.
        url: Where the database is; without it, `DATABASE_URL` or `DB_URL` says so.
        wraps: A lifespan of one's own, which runs inside: a function of the application that gives
            an asynchronous context manager, or the bare generator function. What it yields is
            passed on.
        migrate: Run the migrations first, as `alembic upgrade head` does: once, however many
            processes start at the same time.
        options: What else `init()` takes.

    Raises:
        InvalidOption: `manager` or `wraps` is something else.
        UnknownOption: an option does not exist.
    """
    mind_manager("lifespan", manager, DatabaseSessionManager)
    check_names(options)
    if wraps is not None and not is_lifespan(wraps):
        raise InvalidOption(
            f"lifespan() got wraps={wraps!r}. It takes a function of the application that gives an "
            "asynchronous context manager, or an asynchronous generator: async def …: yield"
        )
    inner = asynccontextmanager(wraps) if isasyncgenfunction(wraps) else wraps

    @asynccontextmanager
    async def opened(app: Any) -> AsyncGenerator[Mapping[str, Any] | None]:
        if manager.stats().state == "open" and manager._room.sandbox is None:
            raise AlreadyInitialized(
                f"lifespan(): {type(manager).__name__} is open already, and one application opens "
                "and closes it. Give the second application a manager of its own, leave out the "
                "other lifespan or init(), or end the first test client before the next."
            )
        manager.init(url=url, **options)
        try:
            if migrate and manager._room.sandbox is None:  # a test's database has its tables
                from .alembic import upgrade

                await asyncio.to_thread(upgrade, manager)
            if inner is None:
                yield None
            else:
                async with inner(app) as state:
                    yield state
        finally:
            await manager.close()

    return opened


def is_lifespan(wraps: Any) -> bool:
    """Whether it may be one: what it gives is known only once it is called."""
    made = inspect.unwrap(wraps) if callable(wraps) else wraps  # what a decorator was put on
    return callable(made) and not (isgeneratorfunction(made) or is_coroutine_function(made))


def mind_manager(what: str, given: Any, *kinds: type) -> None:
    """Refuse what gives no sessions.

    Args:
        what: What it was given to.
        kinds: What it may be.

    Raises:
        InvalidOption: it is none of them.
    """
    if not isinstance(given, kinds):
        wanted = " or a ".join(kind.__name__ for kind in kinds)
        raise InvalidOption(
            f"{what}() got {type(given).__name__}, where it takes a {wanted}. A URL is given by "
            "its name: url=…"
        )


def mind_policy(commit_on: Any) -> None:
    """Refuse what cannot say whether a status commits.

    Raises:
        InvalidOption: it cannot be called, or gives a coroutine, which is always true.
    """
    if not callable(commit_on) or is_coroutine_function(commit_on):
        raise InvalidOption(
            f"commit_on= got {commit_on!r}. It takes a plain function of the status that says "
            "whether it commits: commit_on=lambda status: status < 400."
        )


class RoutedRequest(Request):
    """A request by its method and its route, which is found only later."""

    def __init__(self, scope: ASGIScope) -> None:
        super().__init__()
        self.scope: ASGIScope | None = scope

    def __str__(self) -> str:
        """Name it: `GET /items/{id}`; by its path before it has found its route."""
        scope = self.scope
        if scope is None:
            return self.name
        template = getattr(scope.get("route"), "path", None) or scope.get("path_template")
        path = template or scope.get("path", "")
        return f"{scope.get('method', 'WEBSOCKET')} {path}"

    def freeze(self) -> None:
        """Keep the name and let the rest go: the two would keep each other alive."""
        self.name: str = str(self)
        self.scope = None


def request_of(scope: ASGIScope) -> RoutedRequest:
    """Have what is opened from here on know the request that it serves."""
    request: RoutedRequest | None = scope.get(REQUEST_KEY)
    if request is None:
        request = scope[REQUEST_KEY] = RoutedRequest(scope)
        request.freeze()
    REQUEST.set(request)
    return request


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


class Readiness:
    """An application for one path: 200 if the database answers in time, else 503.

        app.routes.append(Route("/ready", Readiness()))

    It does not wait behind the pool: where that has no connection to lend, it opens one. Probes
    that come while one is under way share its answer.

    Args:
        manager: Whose database.
        timeout: Seconds for the answer.
        schema: Also ask whether it stands where this code needs it; one that newer code has
            migrated does, for this worker serves on until it is replaced.
    """

    def __init__(
        self,
        manager: DatabaseSessionManager = session_manager,
        timeout: float = 2.0,
        *,
        schema: bool = False,
    ) -> None:
        self.manager: DatabaseSessionManager = manager
        self.timeout: float = timeout
        self.schema: bool = schema
        self._probe: asyncio.Task[float] | None = None

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Answer one probe."""
        said = await self._ask()
        status = 503 if {"unavailable", "behind"} & {*said.values()} else 200
        body = json.dumps(said).encode()
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _ask(self) -> dict[str, Any]:
        probe = self._probe
        here = asyncio.get_running_loop()
        if probe is None or probe.done() or probe.get_loop() is not here:
            probe = self._probe = asyncio.ensure_future(self.manager.check(schema=self.schema))
        # Not `wait_for`: a server that is silent would have its connection's end awaited, too.
        await asyncio.wait((probe,), timeout=self.timeout)
        if not probe.done():
            probe.cancel()
            logger.warning("The database did not answer a probe within %g s", self.timeout)
        elif probe.cancelled():  # by one that had shared it, and said so
            pass
        elif isinstance(error := probe.exception(), SchemaMismatch):
            logger.warning("The schema is not what a probe asked for: %s", error)
            return {"database": "ok", "schema": "newer" if error.unknown else "behind"}
        elif error is not None:
            logger.warning("The database did not answer a probe: %r", error)
        else:
            return {"database": "ok", "seconds": round(probe.result(), 4)}
        return {"database": "unavailable"}


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


class Exchange:
    """One request on its way through the middleware."""

    def __init__(
        self, middleware: DatabaseMiddleware, scope: ASGIScope, receive: Receive, send: Send
    ) -> None:
        self.middleware: DatabaseMiddleware = middleware
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

    def enlist(self, opened: Scope, end: Callable[..., Awaitable[Any]]) -> None:
        """End this scope with the request.

        Args:
            end: What ends it; it takes what an exit takes.
        """
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


def is_success(message: Message) -> bool:
    """Whether a client takes this start of a response, or close, for a success."""
    if message["type"] == "websocket.close":
        return message.get("code", 1000) in (1000, 1001)
    return bool(message["status"] < 400)


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


def pool_exhausted(error: BaseException | None) -> PoolExhausted | None:
    """Return the error of an empty pool, if it is one, or several that a task group has wrapped."""
    if isinstance(error, BaseExceptionGroup):
        found, other = error.split(PoolExhausted)
        error = None if other else found
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
    return error if isinstance(error, PoolExhausted) else None


BUSY = "The service is busy. Please try again."


def log_refusal(error: PoolExhausted) -> None:
    """Log what the client is not told, if it is still there."""
    request = REQUEST.get()
    if request is None or not request.is_abandoned:
        logger.warning("%s got no connection: %s", request, error)


def triple(
    error: BaseException | None,
) -> tuple[type[BaseException] | None, BaseException | None, TracebackType | None]:
    """Return what an exit is called with."""
    return (None, None, None) if error is None else (type(error), error, error.__traceback__)


def stand_at_endpoint(opening: Scope, scope: ASGIScope) -> None:
    """Have reports name the endpoint that a session was opened for, where it is known."""
    if (endpoint := scope.get("endpoint")) is not None:
        opening.stand_at(endpoint)
