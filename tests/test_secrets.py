"""No secret and no bound value is in any text that we cause: repr, error, traceback, log, warning.

A secret is known of each way that a password takes. A crash is printed as tools print it, with the
variables of each frame, and everything is searched for them.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
import signal
import socket
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from flask import Flask
from litestar import Litestar
from litestar.testing import TestClient as LitestarClient
from looking import look
from rich.console import Console
from rich.pretty import pretty_repr
from rich.traceback import Traceback
from scenario import is_struck
from sqlalchemy import (
    ARRAY,
    JSON,
    Boolean,
    Enum,
    String,
    TypeDecorator,
    bindparam,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError, StatementError
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tls import Certificates, TLSProxy

from engineroom import (
    ConfigurationError,
    Database,
    DatabaseSessionManager,
    DatabaseSettings,
)
from engineroom.asgi import lifespan
from engineroom.backends.postgresql import knocking
from engineroom.errors import CredentialsFailed
from engineroom.flask import EngineRoom as FlaskRoom
from engineroom.litestar import EngineRoomPlugin
from engineroom.registry import SessionManager
from engineroom.secrecy import Sealed, Unseen, chain
from engineroom.testing import PostgresServer, clones
from engineroom.testing.faults import kill_backends

IN_URL, OF_CALLABLE, OF_KEY, OF_FILE = "kn0wn-url", "kn0wn-callable", "kn0wn-key", "kn0wn-file"
KNOWN = (IN_URL, OF_CALLABLE, OF_KEY, OF_FILE)
BOUND = "kn0wn-bound"
DRIVERS = ["asyncpg", "psycopg", "psycopg (async)", "psycopg2"]


def printed(error: BaseException) -> str:
    """Print an error in the ways that show most."""
    console = Console(file=io.StringIO(), width=250, force_terminal=False)
    trace = Traceback.from_exception(
        type(error),
        error,
        error.__traceback__,
        show_locals=True,
        locals_max_length=None,
        locals_max_string=None,
        locals_hide_dunder=False,
        locals_hide_sunder=False,
    )
    for stack in trace.trace.stacks:
        for frame in stack.frames:  # rich would colour the whole file of each, for seconds
            frame.filename = f"<{frame.filename}>"
    console.print(trace)
    plain = "".join(
        traceback.TracebackException.from_exception(error, capture_locals=True).format()
    )
    file: Any = console.file
    return file.getvalue() + plain


def shown(text: str, secrets: tuple[str, ...] = KNOWN) -> list[str]:
    """Return the lines in which a secret is; the source of these tests says it by its name."""
    return [line for line in text.splitlines() if any(secret in line for secret in secrets)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """The whole log from DEBUG on, with every record's arguments."""
    caplog.set_level(logging.DEBUG)
    return lambda: "\n".join(f"{one.getMessage()} {one.args!r}" for one in caplog.records)


def crash(work: Callable[..., Any], *args: Any, **kw: Any) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # any crash
        work(*args, **kw)
    for each in chain(caught.value):  # the frames of the tests hold the secrets, and are theirs
        for frame, _ in traceback.walk_tb(each.__traceback__):
            if Path(frame.f_code.co_filename).parent == Path(__file__).parent:
                with suppress(RuntimeError):
                    frame.clear()
        while each.__traceback__ is not None and each.__traceback__.tb_frame.f_code is CRASH:
            each.__traceback__ = each.__traceback__.tb_next
    return caught.value


CRASH = crash.__code__


def wrong_url(url: str) -> str:
    """Return a URL with a password that is wrong."""
    account, _, place = url.partition("@")
    return f"{account.rpartition(':')[0]}:{IN_URL}@{place}"


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_refused_connect_shows_no_secret(
    driver: str, pg18: PostgresServer, home: Path, log: Callable[[], str]
) -> None:
    file = home / ".pgpass"
    file.write_text(f"*:*:*:*:{OF_FILE}\n")
    file.chmod(0o600)
    url = wrong_url(pg18.url())
    bare = url.replace(f":{IN_URL}", "")
    for given in (
        {"url": url},
        {"url": bare, "password": lambda: OF_CALLABLE},
        {"url": bare, "password": OF_CALLABLE},
        {"url": bare},  # from the file
    ):
        error = crash(look, driver=driver, echo=True, **given)
        one = printed(error)
        for each in chain(error):  # psycopg's has the connection that did not come about
            one += pretty_repr([vars(each), getattr(each, "pgconn", None)])
        assert "password authentication failed" in one
        assert "locals" in one
        assert shown(one) == []
    assert shown(log()) == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_key_that_is_refused_shows_no_secret(
    driver: str, pg18: PostgresServer, tmp_path: Path, log: Callable[[], str]
) -> None:
    certificates = Certificates(tmp_path)
    locked = tmp_path / "locked.key"
    certificates.encrypt_key(locked, OF_KEY)
    asks = Certificates(tmp_path / "..").authority  # another one, which did not sign ours
    files = f"sslcert={certificates.cert}&sslkey={locked}&sslpassword"
    with TLSProxy(pg18.host, pg18.port, certificates.server, asks=asks) as proxy:
        for mode in ("require", "prefer"):
            url = f"{proxy.url(wrong_url(pg18.url()))}?sslmode={mode}&{files}={OF_KEY}"
            assert shown(printed(crash(look, url, driver))) == []
            wrong = url.replace(f"={OF_KEY}", f"={OF_CALLABLE}")
            assert shown(printed(crash(look, wrong, driver))) == []
    assert shown(log()) == []


BROKEN = [
    f"postgresql://u:{IN_URL}@h:port/d",
    f"postgresql://u:{IN_URL}/x@h/d",
    f"postgresql://u:{IN_URL}#x@h/d",
    f"postgresql://u:{IN_URL}@h/d?ssl_mode=x&sslpassword={OF_KEY}",
    f"postgresql://u@h/d?password={IN_URL}&sslmode=x",
    f"postgresql://u:{IN_URL}@h/d?sslrootcert=/none&sslpassword={OF_KEY}",
    f"postgresql+pg8000://u:{IN_URL}@h/d?sslpassword={OF_KEY}",
    f"oracle://u:{IN_URL}@h/d?sslpassword={OF_KEY}",
    f"postgresql://u:{IN_URL}@h/d?service=none",
    f"u:{IN_URL}@h/d",
    f"postgresql://u@h/d?pasword={IN_URL}",
    f"postgresql://u@h/d?pwd={IN_URL}&sslmode=x",
    f"postgresql://u@h/d?scram_client_key={OF_KEY}&oauth_client_secret={OF_KEY}&sslmode=x",
    f"mysql+pymysql://u@h/d?pwd={IN_URL}",
    f"postgresql://u:{IN_URL}\udce4@h/d",
]


@pytest.mark.parametrize("url", BROKEN)
@pytest.mark.parametrize("door", [Database, DatabaseSessionManager])
def test_a_url_that_is_refused_shows_no_secret(
    url: str, door: type, log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_it(*args: Any, **options: Any) -> None:
        Database(*args, **options) if door is Database else door().init(*args, **options)

    text = printed(crash(lambda: open_it(url, password=OF_CALLABLE, pool_size=5)))
    text += printed(crash(lambda: open_it(url=url)))
    text += printed(crash(lambda: open_it(url, pool_sise=5)))
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("DB_PASSWORD", OF_CALLABLE)
    text += printed(crash(open_it))
    assert shown(text + log()) == []


LATE = [  # refused where the driver is known: at the engine
    ("asyncpg", f"postgresql://u:{IN_URL}@h/d?require_auth=none&sslpassword={OF_KEY}"),
    ("asyncpg", f"postgresql://u:{IN_URL}@h,i/d?port=1,2,3&sslpassword={OF_KEY}"),
    ("psycopg2", f"postgresql://u:{IN_URL}@h/d?max_protocol_version=3.2"),
    ("psycopg2", f"postgresql://u:{IN_URL}@h/d?oauth_client_secret={OF_KEY}"),
    ("asyncmy", f"mysql+asyncmy://u:{IN_URL}@h/d?write_timeout=3"),
    ("asyncmy", f"mysql+asyncmy://u:{IN_URL}@h/d?charset=foo"),
    ("asyncmy", f"mysql+asyncmy://u:{IN_URL}@h/d?ssl_mode=PREFERRED"),
    ("pymysql", f"mysql+pymysql://u:{IN_URL}@h/d?stmt_cache_size=3"),
]


@pytest.mark.parametrize(("driver", "url"), LATE)
def test_what_one_driver_refuses_shows_no_secret(driver: str, url: str) -> None:
    error = crash(look, url, f"{driver} (async)" if driver == "asyncmy" else driver)
    assert isinstance(error, ConfigurationError)
    assert shown(printed(error)) == []


def with_flask(**given: Any) -> None:
    FlaskRoom(Flask("shop"), **given)


def with_flasks_config(url: str, **options: Any) -> None:
    app = Flask("shop")
    app.config["DATABASE_URL"] = url
    FlaskRoom(app, **options)


def with_litestar(**given: Any) -> None:
    with LitestarClient(Litestar(plugins=[EngineRoomPlugin(**given)])):
        pass


def with_lifespan(**given: Any) -> None:
    with TestClient(Starlette(lifespan=lifespan(**given))):
        pass


def with_clones(url: str, **_: Any) -> None:
    with clones(url):
        pass


DOORS = [with_flask, with_flasks_config, with_litestar, with_lifespan, with_clones]


@pytest.mark.parametrize("door", DOORS)
def test_no_framework_shows_the_url_that_it_was_given(
    door: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", OF_FILE)  # whoever looks into the environment sees it
    for given in ({"url": f"postgresql://u:{IN_URL}@127.0.0.1:1/d?sslmod=x"},) + (
        ({"url": f"postgresql://u:{IN_URL}@127.0.0.1:1/d", "pool_sise": 3},)
        if door is not with_clones
        else ()
    ):
        assert shown(printed(crash(partial(door, **given)))) == []


def test_whoever_kills_backends_shows_no_secret() -> None:
    url = f"postgresql://u:{IN_URL}@127.0.0.1:1/d"
    assert shown(printed(crash(partial(kill_backends, url)))) == []


def test_a_registry_shows_no_secret(pg18: PostgresServer, log: Callable[[], str]) -> None:
    registry = SessionManager()
    url = wrong_url(pg18.url())
    for forked in (False, True):
        registry.forked = forked
        text = printed(crash(lambda: registry.session_factory(url, password=OF_CALLABLE)))
        text += printed(crash(lambda: registry.get_engine(BROKEN[0])))
        text += printed(crash(lambda: registry.create_session(f"{url}?", nonsense=1)))
        text += printed(crash(lambda: asyncio.run(registry.async_session_factory(url))))
        text += pretty_repr([registry, registry._engines, registry._sessions, vars(registry)])
        assert shown(text + log()) == []
    registry.close()


def test_what_is_open_shows_no_secret(pg18: PostgresServer, recwarn: Any) -> None:
    """In the text of anything that is at hand, as a console or an error tracker asks for it."""
    url = f"{pg18.url().replace('postgres:', 'postgres.x:')}?sslpassword={OF_KEY}"
    url = f"{wrong_url(url)}"
    manager = DatabaseSessionManager().init(url, password=OF_CALLABLE)
    things: list[Any] = [manager, manager.sync, manager._room, manager._room.settings]
    for engine in (manager.engine, manager.sync.engine):
        things += [engine, engine.url, engine.pool, engine.dialect, str(engine.url)]
    room = manager._room
    things += [room.backend, room.credentials, room.stats(), room.report(), vars(room)]
    things += [vars(room.backend), room.settings.model_dump(), DatabaseSettings()]
    texts = [pretty_repr(thing) + repr(thing) + str(thing) for thing in things]
    assert shown("\n".join(texts)) == []
    warnings.warn(repr(manager), stacklevel=1)
    assert shown(str([str(one.message) for one in recwarn])) == []


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("echo", [False, True])
def test_bound_values_are_shown_where_echo_is_on_and_nowhere_else(
    driver: str, echo: bool, pg18: PostgresServer, log: Callable[[], str]
) -> None:
    statement = text("SELECT 1 / (length(:value) - length(:value))")

    def crashes(connection: Any) -> None:
        connection.execute(statement, {"value": BOUND})

    error = crash(look, pg18.url(), driver, crashes, echo=echo)
    for each in chain(error):
        assert (BOUND in str(each)) == (echo and hasattr(each, "statement"))
    assert (BOUND in printed(error)) == echo
    assert (BOUND in log()) == echo


def test_the_log_of_aiosqlite_names_calls_and_not_their_values(
    sqlite_url: str, log: Callable[[], str]
) -> None:
    async def main() -> None:
        async with DatabaseSessionManager().init(sqlite_url) as manager:
            async with manager.session() as db:
                assert await db.scalar(text("SELECT :value"), {"value": BOUND}) == BOUND
            with pytest.raises(DBAPIError):
                async with manager.session() as db:
                    await db.execute(text("SELECT nothing(:value)"), {"value": BOUND})

    asyncio.run(main())
    assert "executing Cursor.execute" in log()
    assert BOUND not in log()


def test_frames_of_an_error_that_was_there_before_keep_their_variables() -> None:
    """It is the application's, and only the context of ours."""

    def application() -> None:
        kept = "application"
        raise KeyError(kept)

    def driver() -> None:
        secret = Sealed(IN_URL).reveal()
        raise ValueError(len(secret))

    def both() -> None:
        try:
            application()
        except KeyError:
            with Unseen():
                driver()

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        both()
    error = caught.value
    assert isinstance(error.__context__, KeyError)
    *_, (frame, _) = traceback.walk_tb(error.__context__.__traceback__)
    assert frame.f_locals == {"kept": "application"}
    assert shown(printed(error)) == []


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_task_that_keeps_the_error_it_met_goes_on(driver: str, pg18: PostgresServer) -> None:
    """Emptying its frame would end it: a token that is renewed in the background never came."""
    met: list[Exception] = []
    rounds = 0

    async def renew() -> None:
        nonlocal rounds
        while True:
            try:
                raise ConnectionError("no vault")
            except ConnectionError as error:
                met.append(error)
            rounds += 1
            await asyncio.sleep(0.01)

    async def password() -> str:
        raise met[-1]

    async def main() -> None:
        task = asyncio.create_task(renew())
        await asyncio.sleep(0)
        url = pg18.url(driver=driver)
        async with DatabaseSessionManager().init(url, password=password, pool_timeout=5) as manager:
            with pytest.raises(CredentialsFailed):
                async with manager.session() as db:
                    await db.connection()
            before = rounds
            while rounds < before + 2:
                assert not task.done()
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_what_the_application_handles_meanwhile_keeps_its_variables(driver: str) -> None:
    def application() -> None:
        kept = "application"
        raise KeyError(kept)

    async def main() -> None:
        url = f"postgresql+{driver}://u:{IN_URL}@127.0.0.1:1/d"
        async with DatabaseSessionManager().init(url, pool_timeout=2) as manager:
            try:
                application()
            except KeyError as error:
                handled = error
                with pytest.raises((OSError, DBAPIError)) as caught:
                    async with manager.session() as db:
                        await db.connection()
        if driver == "psycopg":  # asyncpg connects in a task of its own, before Python 3.12
            assert handled in chain(caught.value)
        *_, (frame, _) = traceback.walk_tb(handled.__traceback__)
        assert frame.f_locals == {"kept": "application"}

    asyncio.run(main())


CANNOT_BE_SENT = [
    ("CAST(:value AS integer)", BOUND),
    ("CAST(:value AS uuid)", BOUND),  # the reason names it, too
    ("CAST(:value AS integer[])", [BOUND]),
    ("CAST(:value AS text)", {"for": BOUND}),
    ("CAST(:value AS uuid[])", [BOUND]),
    ("CAST(:value AS inet)", BOUND),
    ("CAST(:value AS inet[])", [BOUND]),
    ("CAST(:value AS uuid)", f"Bob ({BOUND})"),
    ("CAST(:value AS uuid[])", deque([BOUND])),
    ("CAST(:value AS text)", f"{BOUND}\udcff"),
]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(("cast", "value"), CANNOT_BE_SENT)
def test_a_value_that_asyncpg_cannot_send_is_in_no_text(
    cast: str, value: Any, echo: bool, pg18: PostgresServer
) -> None:
    def one(connection: Any) -> None:
        connection.execute(text(f"SELECT {cast}"), {"value": value})

    def several(connection: Any) -> None:
        connection.execute(text(f"SELECT {cast}"), [{"value": None}, {"value": value}])

    for work in (one, several):
        error = crash(look, pg18.url(), "asyncpg", work, echo=echo)
        assert "invalid input for query argument $1" in str(error)
        assert (BOUND in str(error)) == echo
        assert (BOUND in printed(error)) == echo
        assert echo or not [each for each in chain(error) if BOUND in repr(each)]


class Marked(TypeDecorator[str]):
    """As an application writes one: it takes no text, and its error says which."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str:
        raise ValueError(f"{value} has no mark")


class Mark:
    def __repr__(self) -> str:
        return f"<Mark {BOUND}>"


NOT_TAKEN = [
    (Boolean(), BOUND, "Not a boolean value: {}"),
    (Boolean(), 4711, "Value {} is not None, True, or False"),
    (Enum("red", "blue", name="colour", validate_strings=True), BOUND, "{} is not among the"),
    (Enum("red", "blue", name="colour", validate_strings=True), "it's", "{} is not among the"),
    (Enum("red", "blue", name="colour", validate_strings=True), "zq", "{} is not among the"),
    (Boolean(), Mark(), "Not a boolean value: {}"),
    (Marked(), BOUND, "{} has no mark"),
    (Marked(), BOUND + 100 * " and more", "{} has no mark"),
    (ARRAY(Enum("red", name="colour", validate_strings=True)), ["red", BOUND], "{} is not among"),
]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(("kind", "value", "says"), NOT_TAKEN)
def test_a_value_that_a_type_cannot_take_is_in_no_text(
    kind: Any, value: Any, says: str, echo: bool, pg18: PostgresServer
) -> None:
    """Given beside the statement, or with it, where nothing names it but the frames."""

    def beside(connection: Any) -> None:
        connection.execute(select(bindparam("value", type_=kind)), {"value": value})

    def within(connection: Any) -> None:
        connection.execute(select(bindparam("value", value, type_=kind)))

    bound = value[-1] if isinstance(value, list) else BOUND if BOUND in repr(value) else value
    for work in (beside, within):
        error = crash(look, pg18.url(), "psycopg", work, echo=echo)
        assert isinstance(error, StatementError)
        assert (says.format("***") in str(error)) == (not echo)
        texts = [str(each) + repr(each.args) for each in chain(error)]
        assert any(re.search(rf"(?<!\w){bound}(?!\w)", one) for one in texts) == echo
        assert (str(bound) in printed(error)) == echo
        if isinstance(kind, Enum):
            assert "Enum name: colour. Possible values: red, blue" in str(error)


def test_what_is_no_value_stays_in_an_error(pg18: PostgresServer) -> None:
    def work(connection: Any) -> None:
        statement = text("SELECT CAST(:one AS text), CAST(:two AS text), CAST(:three AS integer)")
        connection.execute(statement, {"one": "argument", "two": "input", "three": "3"})

    said = "invalid input for query argument $3: *** ("
    assert said in str(crash(look, pg18.url(), "asyncpg", work))
    missing = select(bindparam("name", type_=String), bindparam("other"))
    with pytest.raises(StatementError, match="required for bind parameter 'other'"):
        look(pg18.url(), "psycopg", lambda db: db.execute(missing, {"name": "other"}))


def test_what_the_application_handles_meanwhile_is_left_as_it_is(pg18: PostgresServer) -> None:
    @dataclass(frozen=True)
    class Frozen(Exception):
        code: int

    given = {"value": "pending"}
    for handled in (KeyError("pending"), Frozen(3)):

        def work(connection: Any, handled: Exception = handled) -> None:
            try:
                raise handled
            except Exception:
                connection.execute(select(bindparam("value", type_=Boolean())), given)

        before = handled.args
        with pytest.raises(StatementError, match=r"Not a boolean value: \*\*\*"):
            look(pg18.url(), "psycopg", work)
        assert handled.args == before


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_document_that_is_none_is_in_no_frame(driver: str, pg18: PostgresServer) -> None:
    def work(connection: Any) -> None:
        statement = text("SELECT CAST(:value AS json)").bindparams(bindparam("value", type_=JSON))
        connection.execute(statement, {"value": {"for": BOUND, "what": object()}})

    assert shown(printed(crash(look, pg18.url(), driver, work)), (BOUND,)) == []


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("door", ["session", "connect"])
def test_a_statement_that_is_cut_off_shows_no_bound_value(
    driver: str, door: str, pg18: PostgresServer
) -> None:
    """By a timeout of asyncio, or by Ctrl-C: no `Exception`, and of errors the commonest."""
    statement, given = text("SELECT pg_sleep(60), CAST(:value AS text)"), {"value": BOUND}
    url = f"{pg18.url(driver=driver.partition(' ')[0])}?application_name=struck"
    struck = "FROM pg_stat_activity WHERE application_name = 'struck' AND state = 'active'"

    def wait_until_it_runs() -> None:
        while pg18.execute(f"SELECT count(*) {struck}") != [["1"]]:
            time.sleep(0.01)

    async def time_out() -> None:
        async with DatabaseSessionManager().init(url) as manager, asyncio.timeout(None) as limit:

            async def strike() -> None:
                await asyncio.to_thread(wait_until_it_runs)
                limit.reschedule(0)

            task = asyncio.create_task(strike())
            async with getattr(manager, door)() as db:
                await db.execute(statement, given)
            await task

    def interrupt() -> None:
        main = threading.get_ident()

        def strike() -> None:
            wait_until_it_runs()
            signal.pthread_kill(main, signal.SIGINT)
            pg18.execute(f"SELECT pg_cancel_backend(pid) {struck}")  # psycopg2 hears only that

        striking = threading.Thread(target=strike)
        striking.start()
        try:
            with Database(url) as database, getattr(database, door)() as db:
                db.execute(statement, given)
        except KeyboardInterrupt as error:
            raise RuntimeError("struck") from error
        finally:
            striking.join()

    if driver in ("psycopg", "psycopg2"):
        error = crash(interrupt)
    else:
        error = crash(lambda: asyncio.run(time_out()))
    assert any(not isinstance(each, Exception) for each in chain(error))
    assert shown(printed(error), (BOUND,)) == []


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_connect_that_is_struck_shows_no_secret(driver: str) -> None:
    """psycopg2 hears of Ctrl-C when its connect has failed: just where that is made unseen."""

    def connect() -> None:
        striking = threading.Timer(0.2, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
        striking.start()
        try:
            look(
                f"postgresql://u:{IN_URL}@127.0.0.1:{silent.getsockname()[1]}/d",
                driver,
                pool_timeout=2,
            )
        except KeyboardInterrupt as error:
            raise RuntimeError("struck") from error
        finally:
            striking.join()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = crash(connect)
    assert isinstance(error.__cause__, KeyboardInterrupt)
    assert shown(printed(error)) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of `with` itself
def test_a_signal_while_the_server_is_asked_why_shows_no_secret(pg18: PostgresServer) -> None:
    """psycopg keeps to itself why it was refused: it connects once more, to be told."""
    shows: list[str] = []

    def unit() -> None:
        try:
            look(wrong_url(pg18.url()), "psycopg")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                frames = [
                    frame
                    for frame, _ in traceback.walk_tb(error.__traceback__)
                    if "engineroom" in str(frame.f_globals.get("__name__"))
                ]
                shows.extend(repr(frame.f_locals) for frame in frames)
            raise

    step = 0
    while True:
        step += 1
        try:
            if not is_struck(step, unit, (knocking.__file__,)):
                break
        except DBAPIError:
            break
    assert step > 15
    assert shown("\n".join(shows)) == []


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("kind", ["coroutine", "function"])
def test_asyncios_debug_mode_shows_no_secret(
    driver: str, kind: str, pg18: PostgresServer, log: Callable[[], str]
) -> None:
    """It prints what a task or a future came to that took long."""

    async def coroutine() -> str:
        time.sleep(0.15)  # as somebody's client does that blocks
        return OF_CALLABLE

    def function() -> str:
        time.sleep(0.15)
        return OF_CALLABLE

    url = wrong_url(pg18.url(driver=driver)).replace(f":{IN_URL}", "")
    password: Any = coroutine if kind == "coroutine" else function

    async def main() -> None:
        async with DatabaseSessionManager().init(url, password=password) as manager:
            asyncio.get_running_loop().slow_callback_duration = 0.0
            async with manager.session() as db:
                await db.connection()

    with pytest.raises((DBAPIError, asyncpg.PostgresError)):
        asyncio.run(main(), debug=True)
    assert "Executing <" in log()
    assert shown(log()) == []


def test_the_pools_log_shows_no_secret(
    pg18: PostgresServer, log: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    """SQLAlchemy's, which has the text of psycopg2's connections."""
    caplog.set_level(logging.DEBUG, "engineroom.engines")
    url = f"{pg18.url()}?sslpassword={OF_KEY}&options=-c%20app.key%3D{OF_FILE}"
    assert look(url, "psycopg2") == 1
    assert "Created new connection" in log()
    assert shown(log()) == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_server_quotes_a_value_where_the_docs_say_so(driver: str, pg18: PostgresServer) -> None:
    def work(connection: Any) -> None:
        connection.execute(text("SELECT * FROM nothing WHERE it = :value"), {"value": BOUND})

    assert (BOUND in str(crash(look, pg18.url(), driver, work))) == (driver == "psycopg2")


@pytest.mark.parametrize("driver", ["asyncmy", "pymysql"])
def test_a_server_of_mysql_quotes_a_value_as_the_docs_say(driver: str, mysql_url: str) -> None:
    statement = text("SELECT SELECT :value")

    async def main() -> None:
        async with DatabaseSessionManager().init(mysql_url) as manager, manager.connect() as db:
            await db.execute(statement, {"value": BOUND})

    def work() -> None:
        with Database(mysql_url) as database, database.connect() as db:
            db.execute(statement, {"value": BOUND})

    error = crash(work if driver == "pymysql" else lambda: asyncio.run(main()))
    assert BOUND in str(error)
