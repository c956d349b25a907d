"""Flask: one session for each request, committed before its response; a failed COMMIT is told."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

import httpx
import pytest
from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    copy_current_request_context,
    request,
    session,
    stream_with_context,
)
from flask.views import MethodView
from scenario import until
from sqlalchemy import ForeignKey, create_engine, func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server

from engineroom import (
    Database,
    PoolExhausted,
    SessionClosed,
    SyncInAsyncWarning,
    on_commit,
    on_rollback,
    rollback_only,
)
from engineroom.errors import (
    AlreadyInitialized,
    InvalidOption,
    NoDatabaseURL,
    NotInitialized,
    OutsideRequest,
    SelfDeadlock,
    UnknownOption,
)
from engineroom.flask import EngineRoom
from engineroom.ledger import REQUEST


class Table(DeclarativeBase):
    """Apart from the other tests'."""


class Item(Table):
    __tablename__ = "flask_item"

    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(
        ForeignKey("flask_item.id", deferrable=True, initially="DEFERRED")
    )


ORPHAN = 404  # a parent that does not exist: the COMMIT is refused, and nothing before it


@contextmanager
def served(app: Flask) -> Iterator[str]:
    """Serve an application on a real socket, one thread for each request."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    server.daemon_threads = False  # so that closing it waits for them
    thread = threading.Thread(target=server.serve_forever, name="werkzeug")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Leave werkzeug's access log out."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)


@pytest.fixture
def app() -> Flask:
    app = Flask("shop")
    app.secret_key = "known"
    return app


@pytest.fixture
def shop(url: str) -> Iterator[Database]:
    with Database(url, pool_size=1, max_overflow=1, pool_timeout=10) as database:
        database.create_all(Table.metadata)
        yield database


@pytest.fixture
def db(app: Flask, shop: Database) -> EngineRoom:
    return EngineRoom(app, shop)


@pytest.fixture
def stored(url: str, shop: Database) -> Iterator[Callable[[], list[int]]]:
    """Look from outside at what is stored: on a connection of another engine."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))

    def look() -> list[int]:
        with engine.connect() as connection:
            return list(connection.scalars(select(Item.id).order_by(Item.id)))

    yield look
    engine.dispose()


def lent(shop: Database) -> int:
    return sum(pool.lent for pool in shop.stats().pools)


def add(db: EngineRoom, number: int = 1, parent: int | None = None) -> None:
    """Add an item, and send it."""
    db.session.add(Item(id=number, parent_id=parent))
    db.session.flush()


# --- the transaction of a request ---------------------------------------------------------------


def test_what_is_answered_is_stored(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]]
) -> None:
    """From the first byte on, on every other connection; and the request holds none any more."""
    seen, go_on = threading.Event(), threading.Event()

    @app.post("/items/<int:number>")
    def create(number: int) -> Iterator[str]:
        add(db, number)

        def body() -> Iterator[str]:
            yield "first"
            seen.set()
            assert go_on.wait(20)
            yield "last"

        return body()

    with served(app) as base, httpx.Client(base_url=base) as client:
        with client.stream("POST", "/items/7") as response:
            assert response.status_code == 200
            assert seen.wait(20)
            assert stored() == [7]
            assert lent(shop) == 0
            assert shop.stats().scopes == ()
            go_on.set()
            assert response.read() == b"firstlast"


def test_a_failed_commit_is_a_500(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]]
) -> None:
    @app.post("/items")
    def create() -> str:
        add(db, parent=ORPHAN)
        return "created"

    app.logger.disabled = True
    with served(app) as base:
        response = httpx.post(f"{base}/items")
    assert response.status_code == 500
    assert "created" not in response.text
    assert stored() == []
    assert lent(shop) == 0


def test_a_failed_commit_reaches_the_handler_of_500(app: Flask, db: EngineRoom) -> None:
    @app.post("/items")
    def create() -> str:
        add(db, parent=ORPHAN)
        return "created"

    @app.errorhandler(500)
    def broken(error: Any) -> tuple[str, int]:
        assert isinstance(error.original_exception, IntegrityError)
        return f"sorry, still {db.session.scalar(select(func.count(Item.id)))}", 500

    app.logger.disabled = True
    response = app.test_client().post("/items")
    assert (response.status_code, response.text) == (500, "sorry, still 0")


def test_a_failed_commit_reaches_the_handler_of_its_class(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]]
) -> None:
    """Its answer passes what the lost one had passed; its session is another, with its own end."""

    @app.post("/items")
    def create() -> str:
        add(db, parent=ORPHAN)
        session["name"] = "x"
        return "created"

    @app.after_request
    def count(response: Response) -> Response:
        response.headers.add("passed", "later")
        return response

    @app.errorhandler(IntegrityError)
    def conflict(error: IntegrityError) -> tuple[str, int]:
        add(db, 2)
        return "conflict", int(request.args["status"])

    with served(app) as base:
        response = httpx.post(f"{base}/items?status=409")
        assert (response.status_code, response.text) == (409, "conflict")
        assert response.headers.get_list("passed") == ["later"]
        assert len(response.headers.get_list("set-cookie")) == 1
        assert stored() == []
        httpx.post(f"{base}/items?status=200")
        assert stored() == [2]
    assert lent(shop) == 0


def test_the_answer_to_a_failed_commit_passes_each_function_once(
    app: Flask, shop: Database
) -> None:
    def note(name: str) -> Callable[[Response], Response]:
        def noting(response: Response) -> Response:
            response.headers.add("passed", name)
            return response

        return noting

    pages = Blueprint("pages", __name__)
    app.after_request(note("earlier"))
    db = EngineRoom(app, shop)
    app.after_request(note("later"))
    pages.after_request(note("blueprint"))

    @pages.post("/items")
    def create() -> str:
        add(db, parent=ORPHAN)
        return "created"

    app.register_error_handler(IntegrityError, lambda error: ("conflict", 409))
    app.register_blueprint(pages)
    response = app.test_client().post("/items")
    assert response.status_code == 409
    assert response.headers.getlist("passed") == ["blueprint", "later", "earlier"]


@pytest.mark.parametrize("raises", [False, True])
def test_no_success_is_told_where_the_commit_of_a_handler_fails_too(
    app: Flask, db: EngineRoom, shop: Database, raises: bool
) -> None:
    """What is raised then Flask only writes down: it would send the handler's answer."""
    told: list[str] = []

    @app.post("/items")
    def create() -> str:
        add(db, parent=None if raises else ORPHAN)
        if raises:
            raise ZeroDivisionError
        return "created"

    def queue(error: Exception) -> tuple[str, int]:
        told.append(type(error).__name__)
        add(db, 2, ORPHAN)
        return "queued", 202

    app.register_error_handler(500 if raises else Exception, queue)
    app.logger.disabled = True
    response = app.test_client().post("/items")
    assert (response.status_code, "queued" in response.text) == (500, False)
    assert "InternalServerError" in told
    assert (lent(shop), shop.stats().scopes) == (0, ())


def test_a_failed_commit_is_told_where_the_caller_handles_an_exception(
    app: Flask, db: EngineRoom
) -> None:
    """Of its own: the request is not in an error handler for that."""

    @app.post("/items")
    def create() -> str:
        add(db, parent=ORPHAN)
        return "created"

    app.register_error_handler(500, lambda error: ("sorry", 500))
    app.logger.disabled = True
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        response = app.test_client().post("/items")
    assert (response.status_code, response.text) == (500, "sorry")


@pytest.mark.parametrize(
    ("status", "kept"), [(200, True), (201, True), (302, True), (400, False), (422, False)]
)
def test_the_status_decides(
    app: Flask, db: EngineRoom, stored: Callable[[], list[int]], status: int, kept: bool
) -> None:
    @app.post("/items")
    def create() -> tuple[str, int]:
        add(db)
        return "answer", status

    with served(app) as base:
        assert httpx.post(f"{base}/items").status_code == status
    assert stored() == ([1] if kept else [])


def test_an_application_has_its_own_policy(
    app: Flask, shop: Database, stored: Callable[[], list[int]]
) -> None:
    db = EngineRoom(app, shop, commit_on=lambda status: status == 418)

    @app.post("/items/<int:number>")
    def create(number: int) -> tuple[str, int]:
        add(db, number)
        return "answer", number

    client = app.test_client()
    for status in (200, 418, 500):
        client.post(f"/items/{status}")
    assert stored() == [418]


@pytest.mark.parametrize("handled", [False, True])
def test_what_raises_is_rolled_back(
    app: Flask,
    db: EngineRoom,
    shop: Database,
    stored: Callable[[], list[int]],
    handled: bool,
) -> None:
    @app.post("/items")
    def create() -> str:
        add(db)
        raise ZeroDivisionError

    if handled:
        app.register_error_handler(ZeroDivisionError, lambda error: ("handled", 500))
    app.logger.disabled = True
    with served(app) as base:
        assert httpx.post(f"{base}/items").status_code == 500
    assert stored() == []
    assert lent(shop) == 0


def test_abort_is_rolled_back(app: Flask, db: EngineRoom, stored: Callable[[], list[int]]) -> None:
    """Flask's teardown functions hear of no error then."""

    @app.post("/items")
    def create() -> str:
        add(db)
        abort(409)

    assert app.test_client().post("/items").status_code == 409
    assert stored() == []


def test_an_exception_that_nobody_answers_leaves_nothing(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]]
) -> None:
    """`after_request` is never called: the teardown is what is left."""
    app.testing = True
    rolled_back: list[str] = []

    @app.post("/items")
    def create() -> str:
        add(db)
        on_rollback(db.session, lambda: rolled_back.append("yes"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        app.test_client().post("/items")
    assert (stored(), lent(shop), rolled_back) == ([], 0, ["yes"])
    assert shop.stats().scopes == ()


def test_an_after_request_function_that_raises_rolls_back(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]]
) -> None:
    @app.post("/items")
    def create() -> str:
        add(db)
        return "created"

    @app.after_request
    def fail(response: Response) -> Response:
        raise ZeroDivisionError

    app.logger.disabled = True
    assert app.test_client().post("/items").status_code == 500
    assert (stored(), lent(shop)) == ([], 0)


def test_flask_calls_the_last_registered_first(
    app: Flask, shop: Database, stored: Callable[[], list[int]]
) -> None:
    """Registered after ours: it may use the session and the status. Before: all is over."""
    ended: list[type] = []

    @app.after_request
    def earlier(response: Response) -> Response:
        assert stored() == [1, 2]
        with pytest.raises(SessionClosed) as caught:
            db.session.execute(text("SELECT 1"))
        ended.append(caught.type)
        return response

    db = EngineRoom(app, shop)

    @app.after_request
    def later(response: Response) -> Response:
        add(db, 2)
        response.status_code = 201
        return response

    @app.post("/items")
    def create() -> tuple[str, int]:
        add(db)
        return "answer", 400

    assert app.test_client().post("/items").status_code == 201
    assert ended == [SessionClosed]


def test_a_request_answered_before_its_view_is_committed_too(
    app: Flask, shop: Database, stored: Callable[[], list[int]]
) -> None:
    @app.before_request
    def answer() -> str:
        add(db)
        return "early"

    db = EngineRoom(app, shop)
    assert app.test_client().get("/").text == "early"
    assert stored() == [1]


def test_nothing_is_connected_before_the_first_statement(
    app: Flask, postgres_url: str, backends: Callable[[str], list[Any]]
) -> None:
    db = EngineRoom(app, url=postgres_url)

    @app.get("/")
    def ask() -> str:
        assert db.session.is_active
        return "nothing was asked"

    @app.get("/asked")
    def asked() -> str:
        return str(db.session.scalar(text("SELECT 1")))

    client = app.test_client()
    assert client.get("/").status_code == 200
    assert backends(postgres_url) == []
    assert client.get("/asked").text == "1"
    assert len(backends(postgres_url)) == 1
    with app.app_context():
        database = db.database
    database.close()


def test_every_session_of_a_request_is_the_same(app: Flask, db: EngineRoom) -> None:
    seen: list[Any] = []

    @app.before_request
    def before() -> None:
        seen.append(db.session)

    @app.get("/")
    def read() -> str:
        seen.append(db.session)
        return ""

    app.test_client().get("/")
    app.test_client().get("/")
    first, again, second, _ = seen
    assert first is again is not second


# --- copies of its context ----------------------------------------------------------------------

Run = Callable[[Callable[[], None]], None]  # runs a function somewhere, and waits for it


def in_the_same_thread(function: Callable[[], None]) -> None:
    function()


def in_a_thread(function: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as threads:
        threads.submit(function).result()


def in_a_thread_that_inherits(function: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as threads:
        threads.submit(copy_context().run, function).result()


def in_a_task(function: Callable[[], None]) -> None:
    async def run() -> None:
        function()

    async def main() -> None:
        await asyncio.create_task(run())
        await asyncio.to_thread(function)

    asyncio.run(main())


PLACES = [in_the_same_thread, in_a_thread, in_a_thread_that_inherits, in_a_task]


@pytest.mark.parametrize("run", PLACES)
def test_a_copied_context_leaves_the_session_of_the_request_alone(
    app: Flask, db: EngineRoom, stored: Callable[[], list[int]], run: Run
) -> None:
    """Though it may share the request, and in Flask 3.1 the app context."""

    @app.post("/items")
    def create() -> str:
        mine = db.session
        add(db, 1)
        run(copy_current_request_context(lambda: None))
        assert db.session is mine
        add(db, 2)
        return "created"

    app.testing = True
    assert app.test_client().post("/items").status_code == 200
    assert stored() == [1, 2]


@pytest.mark.parametrize("run", PLACES)
def test_a_copied_context_has_a_session_of_its_own(
    app: Flask,
    db: EngineRoom,
    shop: Database,
    stored: Callable[[], list[int]],
    run: Run,
) -> None:
    """Each time that it runs, and nobody commits for it."""
    seen: list[Any] = []

    @app.post("/items")
    def create() -> str:
        @copy_current_request_context
        def work() -> None:
            assert db.session is db.session is not mine
            seen.append(db.session)
            add(db, 10 * len(seen))
            db.session.commit()
            add(db, 10 * len(seen) + 1)

        mine = db.session
        run(work)
        run(work)
        assert len(shop.stats().scopes) == 1
        add(db, 1)
        return "created"

    app.testing = True
    assert app.test_client().post("/items").status_code == 200
    assert stored() == [1, *(10 * (number + 1) for number in range(len(seen)))]
    assert len(set(map(id, seen))) == len(seen) >= 2
    for own in seen:
        with pytest.raises(SessionClosed):
            own.scalar(text("SELECT 1"))
    assert (lent(shop), shop.stats().scopes, REQUEST.get()) == (0, (), None)


def test_a_copied_context_outlives_its_request(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]]
) -> None:
    """Whether it has begun its work by then or not."""
    working, go_on = threading.Event(), threading.Event()

    with ThreadPoolExecutor(1) as threads:
        works: list[Any] = []

        @app.post("/items")
        def create() -> str:
            def begun() -> None:
                add(db, 1)
                working.set()
                assert go_on.wait(20)
                db.session.commit()

            def late() -> None:
                add(db, 2)
                db.session.commit()

            for work in (begun, late):
                run = copy_current_request_context(work)
                works.append(threads.submit(copy_context().run, run))
            assert working.wait(20)
            return "created"

        assert app.test_client().post("/items").status_code == 200
        go_on.set()
        for work in works:
            work.result()
    assert stored() == [1, 2]
    assert (lent(shop), shop.stats().scopes) == (0, ())


# --- after the end ------------------------------------------------------------------------------


def test_a_streaming_body_is_told_that_the_session_has_ended(
    app: Flask, db: EngineRoom, shop: Database
) -> None:
    told: list[str] = []

    @app.get("/kept")
    def kept() -> Iterator[str]:
        mine = db.session
        mine.scalar(text("SELECT 1"))

        def body() -> Iterator[str]:
            yield "first"
            with pytest.raises(SessionClosed, match="inside it") as caught:
                mine.scalar(text("SELECT 1"))
            told.append(str(caught.value))

        return body()

    @app.get("/asked")
    def asked() -> Iterator[str]:
        def body() -> Iterator[str]:
            yield "first"
            with pytest.raises(SessionClosed, match="inside it") as caught:
                db.session.scalar(text("SELECT 1"))
            told.append(str(caught.value))

        return stream_with_context(body())

    @app.get("/outlived")
    def outlived() -> Iterator[str]:
        def body() -> Iterator[str]:
            yield "first"
            assert lent(shop) == 0
            with pytest.raises(OutsideRequest, match="streaming body") as caught:
                db.session.scalar(text("SELECT 1"))
            told.append(str(caught.value))

        return body()

    @app.get("/right")
    def right() -> Iterator[str]:
        mine = db.database

        def body() -> Iterator[str]:
            with mine.session(read_only=True) as session:
                yield str(session.scalar(text("SELECT 42")))

        return body()

    with served(app) as base:
        for path in ("kept", "asked", "outlived"):
            assert httpx.get(f"{base}/{path}").text == "first"
        assert httpx.get(f"{base}/right").text == "42"
    assert len(told) == 3
    assert f"{__file__}:" in told[0]
    assert "of this request" in told[1]
    assert lent(shop) == 0


def test_callbacks_come_after_the_commit_and_only_then(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]]
) -> None:
    seen: list[tuple[list[int], int]] = []

    @app.post("/items/<int:number>/<int:status>")
    def create(number: int, status: int) -> tuple[str, int]:
        add(db, number, ORPHAN if status == 204 else None)
        on_commit(db.session, lambda: seen.append((stored(), lent(shop))))
        if status == 202:
            rollback_only(db.session)
        assert seen == []
        return "", status

    app.register_error_handler(IntegrityError, lambda error: ("", 409))
    client = app.test_client()
    assert client.post("/items/1/400").status_code == 400
    assert client.post("/items/2/202").status_code == 202
    assert client.post("/items/3/204").status_code == 409
    assert (seen, stored()) == ([], [])
    assert client.post("/items/4/200").status_code == 200
    assert seen == [([4], 0)]


def test_a_callback_opens_a_session_of_its_own(
    app: Flask, db: EngineRoom, stored: Callable[[], list[int]]
) -> None:
    """The request's would never be committed."""
    told: list[str] = []

    def callback() -> None:
        with pytest.raises(SessionClosed) as caught:
            add(db, 2)
        told.append(str(caught.value))
        with db.database.session() as mine:
            mine.add(Item(id=3))

    @app.post("/items")
    def create() -> str:
        add(db)
        on_commit(db.session, callback)
        return "created"

    assert app.test_client().post("/items").status_code == 200
    assert stored() == [1, 3]
    assert f"{__file__}:" in told[0]


# --- asynchronous views -------------------------------------------------------------------------


def test_asynchronous_views_work(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]]
) -> None:
    """In a thread and on a loop of their own: the session follows, and nobody is warned."""

    @app.before_request
    def before() -> None:
        if request.args.get("before"):
            add(db, 10)

    @app.post("/items")
    async def create() -> str:
        add(db)
        assert len(db.database.stats().scopes) == 1
        return threading.current_thread().name

    @app.after_request
    async def after(response: Response) -> Response:
        add(db, 20)
        return response

    app.testing = True
    client = app.test_client()
    assert client.post("/items").text != threading.current_thread().name
    assert stored() == [1, 20]
    with shop.session() as outside:
        outside.execute(text("DELETE FROM flask_item"))
    client.post("/items?before=1")
    assert stored() == [1, 10, 20]
    assert lent(shop) == 0


def test_closing_waits_for_what_an_asynchronous_view_left(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]]
) -> None:
    """Its loop has ended, its request has not."""
    closing = threading.Thread(target=shop.close)

    @app.post("/items")
    async def create() -> str:
        add(db)
        return "created"

    @app.after_request
    def after(response: Response) -> Response:
        closing.start()
        until(lambda: shop.stats().state, lambda state: state == "closing")
        closing.join(0.2)
        return response

    assert app.test_client().post("/items").status_code == 200
    closing.join()
    assert stored() == [1]


def test_a_session_of_another_kind_is_warned_of(app: Flask, sqlite_url: str) -> None:
    db = EngineRoom(app, url=sqlite_url)

    @app.get("/")
    async def read() -> str:
        with pytest.warns(SyncInAsyncWarning):
            with db.database.session():
                return ""

    app.testing = True
    assert app.test_client().get("/").status_code == 200


def test_a_loop_outside_of_requests_is_minded(app: Flask, sqlite_url: str) -> None:
    db = EngineRoom(app, url=sqlite_url)

    async def main() -> None:
        with app.app_context(), pytest.warns(SyncInAsyncWarning):
            assert db.session.is_active

    asyncio.run(main())


# --- outside of requests ------------------------------------------------------------------------


def test_commands_commit_themselves(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]]
) -> None:
    called: list[list[int]] = []

    @app.cli.command("keep")
    def keep() -> None:
        add(db, 1)
        on_commit(db.session, lambda: called.append(stored()))
        db.session.commit()
        add(db, 2)

    @app.cli.command("forget")
    def forget() -> None:
        add(db, 3)

    @app.cli.command("fail")
    def fail() -> None:
        add(db, 4)
        raise ZeroDivisionError

    runner = app.test_cli_runner()
    for name in ("keep", "forget"):
        assert runner.invoke(args=[name]).exit_code == 0
    assert isinstance(runner.invoke(args=["fail"]).exception, ZeroDivisionError)
    assert (stored(), called, lent(shop)) == ([1], [[1]], 0)
    assert shop.stats().scopes == ()


def test_requests_inside_an_app_context_have_sessions_of_their_own(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]]
) -> None:
    """Flask 3.1 serves them in that context; as tests do that."""

    @app.post("/items/<int:number>")
    def create(number: int) -> str:
        assert db.session.scalar(select(func.count(Item.id))) == number - 1
        add(db, number)
        return "created"

    client = app.test_client()
    with app.app_context():
        mine = db.session
        for number in (1, 2):
            assert client.post(f"/items/{number}").status_code == 200
            assert stored() == list(range(1, number + 1))
        assert db.session is mine
        assert mine.scalar(select(func.count(Item.id))) == 2
        assert len(shop.stats().scopes) == 1
        assert REQUEST.get() is None
    with pytest.raises(SessionClosed):
        mine.scalar(text("SELECT 1"))
    assert (shop.stats().scopes, lent(shop)) == ((), 0)


def test_a_request_that_raises_inside_an_app_context_ends_at_once(
    app: Flask, db: EngineRoom, shop: Database
) -> None:
    app.testing = True

    @app.post("/items")
    def create() -> str:
        add(db)
        raise ZeroDivisionError

    with app.app_context():
        with pytest.raises(ZeroDivisionError):
            app.test_client().post("/items")
        assert (shop.stats().scopes, lent(shop)) == ((), 0)


def test_a_teardown_function_that_fails_leaves_no_request_behind(
    app: Flask, db: EngineRoom, shop: Database
) -> None:
    """Flask calls ours last, and then not at all; only the end of the context is left."""
    app.logger.disabled = True

    @app.post("/items")
    def create() -> str:
        add(db)
        return "created"

    @app.teardown_request
    def fail(error: BaseException | None) -> None:
        raise ZeroDivisionError

    with app.app_context():
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                app.test_client().post("/items")
    assert REQUEST.get() is None
    assert (shop.stats().scopes, lent(shop)) == ((), 0)


@pytest.mark.parametrize(
    ("kind", "whose"), [("teardown_request", "request"), ("teardown_appcontext", "app context")]
)
@pytest.mark.parametrize("raises", [False, True])
def test_teardown_functions_after_ours_get_no_session_that_nobody_ends(
    app: Flask, shop: Database, kind: str, whose: str, raises: bool
) -> None:
    """Flask calls those last that were registered first."""
    told: list[str] = []

    @getattr(app, kind)
    def audit(error: BaseException | None) -> None:
        with pytest.raises(SessionClosed) as caught:
            add(db)
        told.append(str(caught.value))

    db = EngineRoom(app, shop)
    app.testing = True

    @app.get("/")
    def read() -> str:
        return str(1 / (not raises))

    with suppress(ZeroDivisionError):
        app.test_client().get("/")
    with suppress(ZeroDivisionError), app.app_context():
        app.test_client().get("/")
    assert len(told) == 2
    assert all(f"of this {whose} has ended" in line for line in told)
    assert (lent(shop), shop.stats().scopes) == (0, ())


def test_an_app_context_that_was_left_has_no_session(app: Flask, db: EngineRoom) -> None:
    context = app.app_context()
    with context:
        add(db)
    with context, pytest.raises(SessionClosed, match="of this app context"):
        add(db)


def test_callbacks_at_the_end_of_a_context_get_no_session_that_nobody_ends(
    app: Flask, db: EngineRoom, shop: Database
) -> None:
    told: list[str] = []

    def callback() -> None:
        with pytest.raises(SessionClosed) as caught:
            add(db)
        told.append(str(caught.value))

    with app.app_context():
        add(db)
        on_rollback(db.session, callback)
    assert len(told) == 1
    assert shop.stats().scopes == ()


def test_an_app_context_inside_a_request_has_a_session_of_its_own(
    app: Flask, shop: Database, stored: Callable[[], list[int]], db: EngineRoom
) -> None:
    @app.post("/items")
    def create() -> str:
        mine = db.session
        with app.app_context():
            assert db.session is not mine
            add(db, 1)
        add(db, 2)
        return "created"

    assert app.test_client().post("/items").status_code == 200
    assert stored() == [2]


@pytest.mark.parametrize("context", ["app_context", "test_request_context"])
def test_a_context_whose_database_was_closed_ends_in_peace(
    app: Flask, db: EngineRoom, shop: Database, stored: Callable[[], list[int]], context: str
) -> None:
    with getattr(app, context)():
        add(db)
        db.session.commit()
        closing = threading.Thread(target=shop.close, args=(0,))
        closing.start()
        closing.join()
    assert stored() == [1]


def test_a_second_writer_in_the_same_thread_is_told_at_once(app: Flask, sqlite_url: str) -> None:
    """In a request and in a command, whichever function opened the session."""
    with Database(sqlite_url) as shop:
        shop.create_all(Table.metadata)
        db = EngineRoom(app, shop)
        app.testing = True

        @app.post("/items")
        def create() -> str:
            add(db)
            return "created"

        @app.after_request
        def after(response: Response) -> Response:
            write_beside(db)
            return response

        with pytest.raises(SelfDeadlock):
            app.test_client().post("/items")
        with app.app_context():
            add(db)
            with pytest.raises(SelfDeadlock):
                write_beside(db)


def write_beside(db: EngineRoom) -> None:
    with db.database.session() as other:
        other.add(Item(id=2))


# --- an empty pool ------------------------------------------------------------------------------


@pytest.fixture
def narrow(app: Flask, url: str) -> Iterator[EngineRoom]:
    """One connection, and no patience."""
    with Database(url, pool_size=1, max_overflow=0, pool_timeout=0.05) as database:
        db = EngineRoom(app, database)
        app.add_url_rule("/", "ask", lambda: str(db.session.scalar(text("SELECT 1"))))
        yield db


@contextmanager
def exhausted(app: Flask, db: EngineRoom) -> Iterator[None]:
    """Have another thread hold the only connection."""
    with app.app_context():
        database = db.database
    holding, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with database.connect():
            holding.set()
            go_on.wait(20)

    thread = threading.Thread(target=hold, name="holder")
    thread.start()
    assert holding.wait(20)
    try:
        yield
    finally:
        go_on.set()
        thread.join()


def test_an_empty_pool_is_a_503(
    app: Flask, narrow: EngineRoom, caplog: pytest.LogCaptureFixture
) -> None:
    with served(app) as base, exhausted(app, narrow):
        response = httpx.get(base)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert "holder" not in response.text
        assert "try again" in response.text
    assert "GET / got no connection" in caplog.text
    assert "thread holder" in caplog.text
    assert app.test_client().get("/").text == "1"


@pytest.mark.parametrize("before", [True, False])
def test_an_applications_own_answer_to_an_empty_pool_wins(url: str, before: bool) -> None:
    app = Flask("shop")
    db = EngineRoom()

    def busy(error: PoolExhausted) -> tuple[str, int]:
        return f"{error.size} and no more", 429

    with Database(url, pool_size=1, max_overflow=0, pool_timeout=0.05) as database:
        db = EngineRoom(database=database)
        if before:
            app.register_error_handler(PoolExhausted, busy)
        db.init_app(app)
        if not before:
            app.register_error_handler(PoolExhausted, busy)
        app.add_url_rule("/", "ask", lambda: str(db.session.scalar(text("SELECT 1"))))
        with exhausted(app, db):
            response = app.test_client().get("/")
    assert (response.status_code, response.text) == (429, "1 and no more")


def test_an_empty_pool_is_told_in_the_applications_words(app: Flask, narrow: EngineRoom) -> None:
    @app.errorhandler(HTTPException)
    def as_json(error: HTTPException) -> Any:
        response: Any = error.get_response()
        response.data = f"<{error.code}>"
        return response

    with exhausted(app, narrow):
        response = app.test_client().get("/")
    assert (response.status_code, response.text) == (503, "<503>")
    assert int(response.headers["retry-after"]) > 0


# --- reports ------------------------------------------------------------------------------------


def test_reports_name_the_request_and_its_view(app: Flask, db: EngineRoom, shop: Database) -> None:
    def helper() -> Any:
        return db.session.scalar(text("SELECT 1"))

    @app.get("/items/<int:number>")
    def read(number: int) -> str:
        helper()
        (scope,) = shop.stats().scopes
        (holder,) = shop.stats().pools[0].holders
        assert "(GET /items/<int:number>)" in scope.owner
        assert "(GET /items/<int:number>)" in holder.owner
        with shop.session():
            assert "GET /items/<int:number>" in shop.stats().scopes[-1].owner
        return scope.where

    class Items(MethodView):
        def delete(self) -> str:
            db.session.scalar(text("SELECT 1"))
            return shop.stats().scopes[0].where

    app.add_url_rule("/items", view_func=Items.as_view("items"))
    app.testing = True
    client = app.test_client()
    line = read.__code__.co_firstlineno
    assert client.get("/items/7").text == f"{__file__}:{line} in read"
    assert client.delete("/items").text.startswith(f"{__file__}:")
    assert client.delete("/items").text.endswith(" in delete")
    assert REQUEST.get() is None


# --- setting up ---------------------------------------------------------------------------------


def test_the_settings_come_from_the_arguments_the_config_or_the_environment(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "sqlite:///environment.db")
    monkeypatch.setenv("DB_POOL_SIZE", "2")

    def found(config: dict[str, Any], **options: Any) -> tuple[str, int]:
        app = Flask("shop")
        app.config |= config
        db = EngineRoom(app, **options)
        with app.app_context(), db.database as database:
            settings = database._room.settings
            return settings.url.database or "", settings.pool_size

    assert found({}) == ("environment.db", 2)
    assert found({"DATABASE_URL": "sqlite:///config.db"}) == ("config.db", 2)
    config = {"DATABASE_URL": "sqlite:///config.db", "ENGINEROOM": {"pool_size": 3}}
    assert found(config) == ("config.db", 3)
    assert found(config, url="sqlite:///argument.db", pool_size=4) == ("argument.db", 4)
    config["ENGINEROOM"] = {"url": "sqlite:///options.db"}
    assert found(config) == ("options.db", 2)
    assert found(config, url="sqlite:///argument.db") == ("argument.db", 2)
    with pytest.raises(UnknownOption, match="pool_size"):
        found({"ENGINEROOM": {"pool_sise": 3}})


def test_no_url_names_the_place_in_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("DB_URL", raising=False)
    with pytest.raises(NoDatabaseURL, match=r'app\.config\["DATABASE_URL"\]'):
        EngineRoom(Flask("shop"))


def test_one_of_it_serves_several_applications(tmp_path: Path) -> None:
    db = EngineRoom()
    apps = {name: Flask(name) for name in ("one", "two")}
    databases = []
    for name, app in apps.items():
        app.config["DATABASE_URL"] = f"sqlite:///{tmp_path / name}.db"
        db.init_app(app)
        app.add_url_rule("/", "who", lambda: str(db.database.engine.url.database))
        assert app.test_client().get("/").text == f"{tmp_path / name}.db"
        with app.app_context():
            databases.append(db.database)
    assert databases[0] is not databases[1]
    for database in databases:
        database.close()


def test_outside_of_an_application_context(db: EngineRoom) -> None:
    for name in ("session", "database"):
        with pytest.raises(OutsideRequest, match=f"db.{name}.*with app.app_context") as caught:
            getattr(db, name)
        assert isinstance(caught.value, RuntimeError)


def test_an_application_that_was_forgotten(db: EngineRoom) -> None:
    with Flask("other").app_context():
        with pytest.raises(NotInitialized, match=r"'other'.*init_app"):
            _ = db.session


def test_an_application_has_one(app: Flask, db: EngineRoom, shop: Database) -> None:
    with pytest.raises(AlreadyInitialized, match="'shop' has this"):
        db.init_app(app)
    with pytest.raises(AlreadyInitialized, match="'shop' has another"):
        EngineRoom(app, shop)


def test_a_database_and_options_for_another(shop: Database) -> None:
    with pytest.raises(InvalidOption, match="database="):
        EngineRoom(None, shop, pool_size=3)


def test_the_example_runs(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    code = (
        "from examples.flask_items import app; client = app.test_client()\n"
        "assert client.post('/items/anvil').status_code == 201\n"
        "assert client.get('/items').json == ['anvil']"
    )
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


# --- what Flask promises us ---------------------------------------------------------------------


def test_the_structures_that_are_read_look_as_they_are_read() -> None:
    """Flask calls them internal: `_catch_up` and `init_app` read one each."""
    app = Flask("shop")

    def after(response: Response) -> Response:
        return response

    app.after_request(after)
    app.register_error_handler(PoolExhausted, lambda error: "")
    assert app.after_request_funcs[None] == [after]
    assert list(app.error_handler_spec[None][None]) == [PoolExhausted]
