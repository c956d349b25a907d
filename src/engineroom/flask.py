"""Flask: one session for each request, committed before its response leaves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Unpack
from weakref import WeakKeyDictionary

from flask import Flask, Response, current_app, g, has_app_context, has_request_context, request
from flask.signals import request_started
from flask.typing import ResponseReturnValue
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session
from werkzeug.exceptions import ServiceUnavailable

from .asgi import BUSY, RETRY_AFTER, log_refusal, triple
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
from .ledger import REQUEST
from .retiring import ENDED
from .scopes import SessionScope
from .settings import Options

__all__ = ["EngineRoom"]

EXTENSION = "engineroom"  # our key in `app.extensions`, and in `g`


class RequestScope(SessionScope):
    """The session of a request, wherever Flask runs its functions.

    An asynchronous view runs in a thread of its own, on an event loop that serves nobody else and
    is closed when the view has returned.
    """

    __slots__ = ()

    def mind_the_loop(self) -> None:
        """Let it pass: whom it stops is its own request."""

    def can_end(self) -> bool:
        """Whether somebody may still leave it: the request, whatever loop used it last."""
        return True


@dataclass(slots=True)
class Visit:
    """What one request, or what runs in an app context without one, does with the database."""

    session: Session | None = None
    is_over: bool = False  # its end is final, and was a success
    named_before: Any = field(default_factory=REQUEST.get)

    def end(self, error: BaseException | None = None, *, commit: bool = False) -> None:
        """Commit or roll back, once."""
        scope: Any = None if self.session is None else getattr(self.session, "_scope", None)
        if scope is not None and scope.is_open:
            scope.is_rollback_only = scope.is_rollback_only or not commit
            scope.move_here()  # an asynchronous view's loop, where it was used last, is closed
            try:
                scope.__exit__(*triple(error))
            except BaseException:
                self.session = None  # the handlers of this failure get another one
                raise


class EngineRoom:
    """The database of a Flask application, and a session for each request.

        db = EngineRoom(app, url="postgresql://…")  # or db.init_app(app), in an application factory

        @app.get("/items/<int:id>")
        def read_item(id: int) -> dict[str, str]:
            return {"name": db.session.get_one(Item, id).name}

    The session is opened where it is first asked for, and nothing is connected before its first
    statement. In a request it is committed by `after_request`, so that the failure of a COMMIT
    reaches the application's error handlers; then it is closed for good. Elsewhere (in a command,
    in `app.app_context()`) one commits oneself, and what was not committed is rolled back.

    Functions of `after_request` run in Flask's order, the last registered first: those registered
    before `init_app()` see a session that has ended, those registered after it may still use it,
    and may change the status.

    Where a request finds the pool empty (`PoolExhausted`), the answer is 503 with `Retry-After`,
    and the log has the holders, unless the application handles that error itself.

    Args:
        app: The application; without it, `init_app()` says which.
        database: A database that is open already, instead of a URL and options.
        url: Where the database is; without it `app.config["DATABASE_URL"]`, without that the
            environment says so.
        commit_on: Whether a response with this status commits; without it, those below 400 do.
        options: What `Database()` takes. They come before those in `app.config["ENGINEROOM"]`.
    """

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
                "EngineRoom() got a database= that is open, and a URL or options for another one. "
                "Give the options to that Database(), or leave it out."
            )
        self.commit_on: Callable[[int], bool] = commit_on
        self._given = database
        self._url = url
        self._options = options
        self._databases: WeakKeyDictionary[Flask, Database] = WeakKeyDictionary()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Open this application's database; nothing is connected yet.

        Raises:
            AlreadyInitialized: the application has one.
            ConfigurationError: a setting, an option or the URL cannot work.
        """
        if (known := app.extensions.get(EXTENSION)) is not None:
            whose = "this" if known is self else "another"
            raise AlreadyInitialized(
                f"init_app(): the application {app.name!r} has {whose} EngineRoom already. Call it "
                "once, in its constructor or by hand; a second database of one application is a "
                "Database of its own: archive = Database(…)."
            )
        database = self._given or self._open(app.config)
        app.after_request(self._after_request)
        app.teardown_request(self._teardown_request)
        app.teardown_appcontext(self._teardown_appcontext)
        if PoolExhausted not in app.error_handler_spec[None][None]:
            app.register_error_handler(PoolExhausted, refuse)
        request_started.connect(self._begin_request, app)
        self._databases[app] = database
        app.extensions[EXTENSION] = self

    def _open(self, config: Any) -> Database:
        options = {**config.get("ENGINEROOM", {}), **self._options}
        if self._url is not None:
            options.pop("database_url", None)
            options["url"] = self._url
        elif not options.keys() & {"url", "database_url"}:
            options["url"] = config.get("DATABASE_URL")
        try:
            return Database(**options)
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
        return self._database("database")

    @property
    def session(self) -> Session:
        """The session of the current request, or of the current application context without one.

        Raises:
            OutsideRequest: there is no application context.
            NotInitialized: `init_app()` was not called for this application.
            SessionClosed: the request's was committed already, and none was opened before.
        """
        room = self._database("session")._room
        visit = current_visit()
        if visit.session is None:
            if visit.is_over:
                raise SessionClosed(ENDED.replace("{opened}", f" of {REQUEST.get()}"))
            kind = RequestScope if has_request_context() else SessionScope
            scope = kind(room, "session")  # (made here: the caller's line is one frame away)
            if (view := current_view()) is not None:
                scope.stand_at(view)
            visit.session = scope.__enter__()
        return visit.session

    def _database(self, asked: str) -> Database:
        if not has_app_context():
            raise OutsideRequest(
                f"db.{asked} was used outside of an application context, so no application says "
                f"which database it is. In a view there is one; elsewhere: with app.app_context(): "
                f"… db.{asked} … In a streaming body, which outlives its request, open a session "
                "of its own: database = db.database in the view, and with database.session() as "
                "session: … in the body."
            )
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # a LocalProxy
        if app not in self._databases:
            raise NotInitialized(
                f"db.{asked}: this EngineRoom knows nothing of the application {app.name!r}. Call "
                "db.init_app(app) where the application is made."
            )
        return self._databases[app]

    # -- what Flask calls ---------------------------------------------------------------------

    def _begin_request(self, app: Flask, **signal: Any) -> None:
        """Have what is opened from here on know the request that it serves."""
        current_visit()
        REQUEST.set(f"{request.method} {request.url_rule or request.path}")

    def _after_request(self, response: Response) -> Response:
        """Commit or roll back; a failure is handled as if the view had raised it."""
        try:
            self._end_request(response)
        except Exception as error:  # noqa: BLE001  # it is raised on where nobody handles it
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
        visit = visits().pop(current_request(), None)
        if visit is not None:
            REQUEST.set(visit.named_before)
            abandon(visit, error)

    def _teardown_appcontext(self, error: BaseException | None) -> None:
        """Roll back what was not committed."""
        for visit in visits().values():
            abandon(visit, error)


def current_request() -> object | None:
    """Return the request that is served here, itself."""
    return request._get_current_object() if has_request_context() else None  # type: ignore[attr-defined]


def visits() -> dict[object | None, Visit]:
    """Return what is known in the current application context, by request.

    A context that was pushed by hand serves several of them: those of a test client inside it.
    """
    known: dict[object | None, Visit] = g.setdefault(EXTENSION, {})
    return known


def current_visit() -> Visit:
    """Return the current request's, or that of the application context outside of one."""
    known, here = visits(), current_request()
    if here not in known:
        known[here] = Visit()
    return known[here]


def current_view() -> Callable[..., Any] | None:
    """Return the function that serves the current request; a class shows no line worth naming."""
    endpoint = request.endpoint if has_request_context() else None
    view = None if endpoint is None else current_app.view_functions.get(endpoint)
    return None if hasattr(view, "view_class") else view


def abandon(visit: Visit, error: BaseException | None) -> None:
    """Roll back and close what nobody has ended."""
    with suppress(SessionClosed):  # by `close()`: nothing is left of it
        visit.end(error)


def refuse(error: PoolExhausted) -> ResponseReturnValue:
    """Answer 503, in the application's own words if it has some: the names are for the log."""
    log_refusal(error)
    return current_app.handle_user_exception(ServiceUnavailable(BUSY, retry_after=RETRY_AFTER))
