"""Flask: one session for each request, committed before its response leaves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Unpack
from weakref import WeakKeyDictionary

from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from .arguments import mind_manager, mind_policy
from .database import Database
from .errors import (
    AlreadyInitialized,
    InvalidOption,
    NoDatabaseURL,
    NotInitialized,
    OutsideRequest,
    PoolExhausted,
    SessionClosed,
)
from .extras import brought_by
from .handed import FrameworkScope
from .ledger import REQUEST, Request
from .refusals import BUSY, RETRY_AFTER, log_refusal
from .retiring import ENDED
from .scopes import triple
from .secrecy import unseen
from .settings import Options

with brought_by("flask", "engineroom.flask is imported"):
    from flask import Flask, Response, current_app, g, has_app_context, has_request_context, request
    from flask.globals import request_ctx
    from flask.signals import request_started
    from flask.typing import ResponseReturnValue
    from werkzeug.exceptions import InternalServerError, ServiceUnavailable

__all__ = ["EngineRoom"]

EXTENSION = "engineroom"  # our key in `app.extensions`, and in `g`


class ContextScope(FrameworkScope):
    """The session of a request or an app context; an asynchronous view's loop ends with it."""

    def mind_the_loop(self) -> None:
        """Let an asynchronous view pass: its loop serves nobody else."""
        if not has_request_context():
            super().mind_the_loop()


@dataclass(slots=True, eq=False)
class Visit:
    """What one request, or an app context without one, does with the database."""

    session: Session | None = None
    is_over: bool = False  # it gets no session any more: its response leaves
    is_served: bool = False  # by the application, and once; a copy of it may be run again
    named_before: Any = field(default_factory=REQUEST.get)
    around: BaseException | None = field(default_factory=sys.exception)  # handled by who calls us

    def end(self, error: BaseException | None = None, *, commit: bool = False) -> None:
        """Commit or roll back, and part with the session."""
        scope: Any = getattr(self.session, "_scope", None)
        if scope is not None:
            scope.is_rollback_only = scope.is_rollback_only or not commit
            try:
                scope.__exit__(*triple(error))
            finally:
                self.session = None  # only now, for callbacks would get another one


class Visits:
    """Those of one app context."""

    def __init__(self) -> None:
        # By the request context, or by `g`; one that is served, by its request, too.
        self.known: WeakKeyDictionary[Any, Visit] = WeakKeyDictionary()
        self.open: dict[Visit, None] = {}  # they end with the app context at the latest


class EngineRoom:
    """The database of a Flask application, and a session for each request.

    ::

        db = EngineRoom(app, url="postgresql://…")  # or db.init_app(app), in an application factory


        @app.get("/items/<int:id>")
        def read_item(id: int) -> dict[str, str]:
            return {"name": db.session.get_one(Item, id).name}

    Args:
        app: The application; without it, `init_app()` says which.
        database: A database that is open already, instead of a URL and options.
        url: Where the database is; without it `app.config["DATABASE_URL"]`, without that the
            environment says so.
        commit_on: Whether a response with this status commits; without it, those below 400 do.
        options: What `Database()` takes. They come before those in `app.config["ENGINEROOM"]`.
    """

    @unseen
    def __init__(
        self,
        app: Flask | None = None,
        database: Database | None = None,
        *,
        url: str | URL | None = None,
        commit_on: Callable[[int], bool] = lambda status: status < 400,
        **options: Unpack[Options],
    ) -> None:
        if database is not None and (url is not None or options):
            raise InvalidOption(
                "EngineRoom() got a database= and a URL or options for another one. Leave one out."
            )
        if database is not None:
            mind_manager("EngineRoom", database, Database)
        mind_policy(commit_on)
        self.commit_on: Callable[[int], bool] = commit_on
        self._given = (database, url, options)
        self._databases: WeakKeyDictionary[Flask, Database] = WeakKeyDictionary()
        if app is not None:
            self.init_app(app)

    @unseen
    def init_app(self, app: Flask) -> None:
        """Open this application's database; nothing is connected yet.

        Raises:
            AlreadyInitialized: the application has one.
            ConfigurationError: a setting, an option or the URL cannot work.
        """
        if (known := app.extensions.get(EXTENSION)) is not None:
            raise AlreadyInitialized(
                f"init_app(): {app.name!r} has {'this' if known is self else 'another'} EngineRoom "
                "already. Call it once: EngineRoom(app) does so itself. A second is a Database(…)."
            )
        database = self._given[0] or self._open(app.config)
        app.after_request(self._after_request)
        app.teardown_request(self._teardown_request)
        app.teardown_appcontext(self._teardown_appcontext)
        if PoolExhausted not in app.error_handler_spec[None][None]:
            app.register_error_handler(PoolExhausted, refuse)
        request_started.connect(self._begin_request, app)
        self._databases[app] = database
        app.extensions[EXTENSION] = self

    def _open(self, config: Any) -> Database:
        _, url, options = self._given
        known = {"url": config.get("DATABASE_URL"), **config.get("ENGINEROOM", {}), **options}
        try:
            return Database(**(known if url is None else known | {"url": url}))
        except NoDatabaseURL as error:
            raise NoDatabaseURL(
                f'{error.message} With Flask, app.config["DATABASE_URL"] says it too, if it is set '
                "before init_app()."
            ) from None

    @property
    def database(self) -> Database:
        """The database of the current application.

        Raises:
            OutsideRequest: there is no application context.
            NotInitialized: `init_app()` was not called for this application.
        """
        if not has_app_context():
            raise OutsideRequest(
                "db.session or db.database was used outside of an application context, so nothing "
                "says which database that is. Enter one: with app.app_context(): … A streaming "
                "body outlives its request's: take database = db.database in the view, and open a "
                "session in the body: with database.session() as session: …"
            )
        app = behind(current_app)
        if app not in self._databases:
            raise NotInitialized(
                f"This EngineRoom does not know the application {app.name!r}. Call "
                "db.init_app(app) where that is made."
            )
        return self._databases[app]

    @property
    def session(self) -> Session:
        """The session of the current request, or of the application context without one.

        Raises:
            SessionClosed: the request's has ended, or the app context's.
            OutsideRequest, NotInitialized: as `database` does.
        """
        room, visit = self.database._room, current_visit()
        if visit.session is None:
            if visit.is_over:
                whose = "request" if has_request_context() else "app context"
                raise SessionClosed(ENDED.replace("{opened}", f" of this {whose}"))
            scope = ContextScope(room, "session")  # here, so that it knows the caller's line
            scope.stand_at(current_view())
            visit.session = scope.__enter__()
        return visit.session

    def _begin_request(self, app: Flask, **signal: Any) -> None:
        """Have what is opened from here on know the request that it serves."""
        visit, now = current_visit(), behind(request)
        visit.is_served = True
        g.get(EXTENSION).known[now] = visit
        REQUEST.set(Request(f"{now.method} {now.url_rule or now.path}"))

    def _after_request(self, response: Response) -> Response:
        """Commit or roll back; a failure is never a success."""
        handled = sys.exception()
        try:
            return self._end_or_answer(response)
        except Exception:
            if handled is current_visit().around:
                raise
            # An error handler's response: Flask would only log this, and send it all the same.
            current_app.log_exception(sys.exc_info())
            return current_app.make_response(InternalServerError())

    def _end_or_answer(self, response: Response) -> Response:
        """End the session; a failure is handled as if the view had raised it."""
        try:
            self._end_request(response)
        except Exception as error:  # noqa: BLE001  # raised again, where nobody handles it
            answer = current_app.handle_user_exception(error)
            response = self._catch_up(current_app.make_response(answer))
            self._end_request(response)
        return response

    def _end_request(self, response: Response) -> None:
        visit = current_visit()
        visit.end(commit=self.commit_on(response.status_code))
        visit.is_over = True

    def _catch_up(self, response: Response) -> Response:
        """Run on this response what ran before us on the one that it replaces."""
        for name in (*request.blueprints, None):
            for function in reversed(current_app.after_request_funcs.get(name, ())):
                if function == self._after_request:
                    break
                response = current_app.ensure_sync(function)(response)
        return response

    def _teardown_request(self, error: BaseException | None) -> None:
        """Roll back what an exception left."""
        visit = current_visit()
        self._end_visit(visit, error)
        visit.is_over = visit.is_over or visit.is_served

    def _teardown_appcontext(self, error: BaseException | None) -> None:
        """Roll back what was not committed."""
        current_visit().is_over = True  # nobody would end what a teardown after us opened
        for visit in [*g.get(EXTENSION).open][::-1]:  # of requests, where another one has failed
            self._end_visit(visit, error)

    def _end_visit(self, visit: Visit, error: BaseException | None) -> None:
        REQUEST.set(visit.named_before)
        with suppress(SessionClosed):  # by `close()`: nothing is left to do
            visit.end(error)
        g.get(EXTENSION).open.pop(visit, None)


def behind(proxy: Any) -> Any:
    """Return what a proxy of Flask's stands for: each name that is looked up by one is a search."""
    return proxy._get_current_object()


def current_visit() -> Visit:
    """Return the current request context's, or the app context's own outside of one.

    In Flask 3.1 an app context that was pushed by hand serves the requests of a test client in it,
    and that of a request the copies of its request context, which share the request itself.
    """
    context = behind(g)
    whose: Any = behind(request_ctx) if has_request_context() else context
    visits: Visits | None = context.get(EXTENSION)
    if visits is None:
        visits = Visits()
        setattr(context, EXTENSION, visits)
    visit = visits.known.get(whose)
    if visit is None:
        visit = visits.known[whose] = Visit()
        if whose is context or whose.request not in visits.known:
            visits.open[visit] = None  # but not a copy's: it may outlive the request in a thread
    return visit


def current_view() -> Callable[..., Any] | None:
    """Return the function that serves the request; a class shows no line worth naming."""
    view = current_app.view_functions.get((has_request_context() and request.endpoint) or "")
    return None if hasattr(view, "view_class") else view


def refuse(error: PoolExhausted) -> ResponseReturnValue:
    """Answer 503, in the application's own words if it has some: the names are for the log."""
    log_refusal(error)
    return current_app.handle_user_exception(ServiceUnavailable(BUSY, retry_after=RETRY_AFTER))
