"""Litestar: one session for each request, committed before its response leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncSession

from .arguments import mind_policy
from .asgi import DatabaseMiddleware
from .errors import PoolExhausted
from .exchange import Exchange
from .extras import brought_by
from .lifespans import Lifespan, lifespan
from .manager import DatabaseSessionManager, session_manager
from .refusals import BUSY, RETRY_AFTER, log_refusal
from .requests import EXCHANGE_KEY, ASGIScope, Receive, Send, serve_request
from .secrecy import unseen
from .settings import Options

with brought_by("litestar", "engineroom.litestar is imported"):
    from litestar import Request, Response
    from litestar.config.app import AppConfig
    from litestar.di import NamedDependency, Provide
    from litestar.exceptions import ServiceUnavailableException
    from litestar.exceptions.responses import create_exception_response
    from litestar.middleware import DefineMiddleware
    from litestar.plugins import InitPlugin
    from litestar.types import Scope
    from litestar.utils.scope.state import ScopeState

__all__ = ["AsyncSessionDep", "EngineRoomPlugin"]

AsyncSessionDep = NamedDependency[AsyncSession]


class EngineRoomPlugin(InitPlugin):
    """One session for each request, injected as `db`, whose COMMIT comes before the response.

    >>> @get("/")
    ... async def answer(db: AsyncSessionDep) -> int | None:
    ...     return await db.scalar(text("SELECT 42"))
    >>> with TestClient(Litestar([answer], plugins=[EngineRoomPlugin(url="sqlite://")])) as client:
    ...     client.get("/").json()
    42

    It opens the manager with the application, and drains and closes it at the end. An exception
    rolls back, one that the application answers too; what was returned commits, whatever its
    status, unless `commit_on` says otherwise. A request that finds the pool empty is answered with
    503. What the application has under one of these names itself stays: its dependencies, its
    handler for `PoolExhausted`.

    Args:
        manager: Whose sessions; a second database is a second plugin, with names of its own.
        url: Where the database is; without it, `DATABASE_URL` or `DB_URL` says so.
        commit_on: Whether a response with this status commits; without it, each does.
        cancel_on_disconnect: Cancel the work on a request whose client has gone.
        dependency: The name under which handlers ask for the session.
        reader_dependency: The name under which they ask for a session without a transaction, in
            which the server refuses writes.
        migrate: Run the migrations first, as `lifespan(migrate=True)` of `engineroom.asgi` does.
        options: What else `init()` takes.
    """

    @unseen
    def __init__(
        self,
        manager: DatabaseSessionManager = session_manager,
        *,
        url: str | URL | None = None,
        commit_on: Callable[[int], bool] | None = None,
        cancel_on_disconnect: bool = True,
        dependency: str = "db",
        reader_dependency: str = "reader",
        migrate: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if commit_on is not None:
            mind_policy(commit_on)
        self.lifespan: Lifespan = lifespan(manager, url=url, migrate=migrate, **options)
        self.middleware: DefineMiddleware = DefineMiddleware(
            Middleware,  # type: ignore[arg-type]  # Litestar's types of ASGI are narrower
            manager=manager,
            commit_on=commit_on,
            cancel_on_disconnect=cancel_on_disconnect,
            state=dependency,
        )
        self.dependencies: dict[str, Provide] = {
            dependency: provide(dependency),
            reader_dependency: provide(dependency, reader=True),
        }

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Add all this to the application; what it has itself comes first."""
        app_config.lifespan.insert(0, self.lifespan)
        app_config.middleware.insert(0, self.middleware)
        app_config.dependencies = self.dependencies | app_config.dependencies
        app_config.exception_handlers = {PoolExhausted: refuse, **app_config.exception_handlers}
        # What handlers declare may be imported for type checkers only.
        names = {"AsyncSession": AsyncSession, "AsyncSessionDep": AsyncSessionDep}
        app_config.signature_namespace = names | app_config.signature_namespace
        return app_config


def provide(name: str, *, reader: bool = False) -> Provide:
    """Return what gives a request its session: the one of the plugin with this name."""

    def session(scope: Scope) -> AsyncSession:
        exchange: Exchange = scope[passage_key(name)]  # type: ignore[literal-required]  # ours
        return exchange.session(reader=reader)

    return Provide(session, sync_to_thread=False)


def passage_key(name: str) -> str:
    """Return where in an ASGI scope the plugin with this name has its way through."""
    return f"{EXCHANGE_KEY}.{name}"


def refuse(request: Request[Any, Any, Any], error: PoolExhausted) -> Response[Any]:
    """Answer 503: the names are for the log."""
    serve_request(request.scope)  # type: ignore[arg-type]  # Litestar has a type of its own
    log_refusal(error)
    headers = {"Retry-After": str(RETRY_AFTER)}
    return create_exception_response(
        request, ServiceUnavailableException(detail=BUSY, headers=headers)
    )


class Middleware(DatabaseMiddleware):
    """The middleware, as Litestar has it: inside its handling of exceptions, around each route."""

    def exchange(self, scope: ASGIScope, receive: Receive, send: Send) -> Exchange:
        """Take a request through, and say where its handler is."""
        handler = scope["route_handler"].fn
        scope["endpoint"] = getattr(handler, "func", handler)  # a method, or what runs in a thread
        return Passage(self, scope, receive, send)


class Passage(Exchange):
    """One request on its way through the middleware and Litestar."""

    async def run(self, *, cancels: bool) -> None:
        """Run the application; a COMMIT that failed is answered as any other exception is.

        Litestar notes that a response has started before it is sent, and would answer no more.
        A private name: `tests/test_private_names.py` fails when it goes.
        """
        key = passage_key(self.middleware.state)
        self._scope[key] = self
        try:
            await super().run(cancels=cancels)
        except BaseException:
            state: Any = ScopeState.from_scope(self._scope)  # type: ignore[arg-type]
            state.response_started = self._is_started
            raise
        finally:
            del self._scope[key]

    async def _refuse(self, error: PoolExhausted) -> None:
        """Leave it to Litestar's handlers of exceptions, of which the plugin adds one."""
        raise error
