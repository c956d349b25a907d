"""Each option has an effect, an environment name and a default; an argument comes first."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from engineroom import Database, DatabaseSessionManager, DatabaseSettings, PoolExhausted
from engineroom.errors import InvalidOption
from engineroom.settings import OBJECTS, Options, read_settings

URL = "postgresql://u:secret@h/d"


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DB_") or name in {"DATABASE_URL", "DEBUG"}:
            monkeypatch.delenv(name)


# --- names and sources ----------------------------------------------------------------------------

SAMPLES: dict[
    str, tuple[Any, str]
] = {  # of each field: a value that is not the default, as text too
    "pool_size": (7, "7"),
    "max_overflow": (0, "0"),
    "max_connections": (50, "50"),
    "pool_timeout": (90.0, "1.5min"),
    "response_timeout": (0.5, "500ms"),
    "pool_recycle": (-1, "-1"),
    "pool_pre_ping": (True, "true"),
    "pooler": ("session", "session"),
    "pipeline": ("on", "on"),
    "pool_clean_always": (True, "true"),
    "username": ("shop", "shop"),
    "password": (SecretStr("known"), "known"),
    "echo": (True, "1"),
    "idle_in_transaction_timeout": (120.0, "2min"),
    "statement_timeout": (2.5, "2.5s"),
    "lock_timeout": (0.5, "500ms"),
    "expire_on_commit": (True, "yes"),
    "autoflush": (True, "on"),
    "pool_min": (2, "2"),
    "slow_checkout": (0.25, "250ms"),
    "pool_ping_after": (0.0, "0"),
    "close_timeout": (0.0, "0"),
    "sync_in_async": ("error", "error"),
    "busy_timeout": (2.5, "2.5 s"),
    "schema_timeout": (7.5, "7500ms"),
    "alembic_ini": ("db/alembic.ini", "db/alembic.ini"),
    "dump_signal": ("SIGUSR2", "SIGUSR2"),
}


def test_options_and_settings_name_the_same_fields() -> None:
    """But the URL, which is an argument of its own, and other programs' `DEBUG`."""
    fields = set(DatabaseSettings.model_fields) - {"database_url", "debug"}
    assert set(Options.__annotations__) - set(OBJECTS) == fields == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_setting_is_read_from_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, written = SAMPLES[name]
    assert getattr(read_settings(URL), name) != value
    monkeypatch.setenv(f"DB_{name.upper()}", written)
    assert getattr(read_settings(URL), name) == value


@pytest.mark.parametrize("name", SAMPLES)
def test_an_argument_comes_before_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, _ = SAMPLES[name]
    default = getattr(DatabaseSettings(), name)
    monkeypatch.setenv(f"DB_{name.upper()}", str(default))
    options: Any = {name: value}
    assert getattr(read_settings(URL, **options), name) == value


@pytest.mark.parametrize("name", SAMPLES)
def test_an_empty_variable_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    default = getattr(DatabaseSettings(), name)
    monkeypatch.setenv(f"DB_{name.upper()}", "")
    assert getattr(read_settings(URL), name) == default


@pytest.mark.parametrize("set_too", ["DATABASE_URL", "DB_URL"])
def test_a_url_that_is_passed_comes_before_the_environment(
    set_too: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a test would run on the production's database."""
    monkeypatch.setenv(set_too, "postgresql://production/app")
    assert read_settings("postgresql://mine/app").url.host == "mine"
    with Database(url="sqlite://") as door:
        assert door.engine.dialect.name == "sqlite"
    manager = DatabaseSessionManager().init(database_url="sqlite://")
    assert manager.engine.dialect.name == "sqlite"
    asyncio.run(manager.close())


def test_database_url_comes_before_db_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_URL", "postgresql://second/app")
    assert read_settings().url.host == "second"
    monkeypatch.setenv("DATABASE_URL", "postgresql://first/app")
    assert read_settings().url.host == "first"
    monkeypatch.setenv("DATABASE_URL", "")
    assert read_settings().url.host == "second"


def test_other_programs_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_HOST", "somewhere")
    monkeypatch.setenv("POOL_SIZE", "99")
    assert read_settings(URL).pool_size == 5


def test_a_variable_that_is_almost_one_is_told_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "DB_POOLSIZE", "DB_POLL_SIZE", "DB_PASSWD", "DB_USER", "DB_POOL_MIN", "DB_URL":
        monkeypatch.setenv(name, "2")
    read_settings(URL)
    assert sorted(caplog.messages) == [
        f"{name} is set, and nothing reads it. Did you mean DB_POOL_SIZE?"
        for name in ("DB_POLL_SIZE", "DB_POOLSIZE")
    ]


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = read_settings(URL)
    assert (settings.pool_size, settings.max_overflow, settings.pool_recycle) == (5, 10, 3600)
    assert not settings.expire_on_commit
    assert not settings.autoflush
    assert not settings.shows_statements


def test_secrets_are_masked() -> None:
    settings = read_settings(URL)
    for shown in (
        repr(settings),
        str(settings),
        str(settings.model_dump()),
        settings.model_dump_json(),
    ):
        assert "secret" not in shown
    assert settings.url.password == "secret"


def test_settings_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_settings(URL).pool_size = 9  # type: ignore[misc]


# --- times ----------------------------------------------------------------------------------------

TIMES: dict[Any, float] = {
    "30": 30,
    "2.5": 2.5,
    "500ms": 0.5,
    "30s": 30,
    " 30 sec ": 30,
    "5min": 300,
    "1h": 3600,
    "1H": 3600,
}


@pytest.mark.parametrize("written", TIMES)
@pytest.mark.parametrize("name", ["pool_timeout", "close_timeout", "busy_timeout"])
def test_a_time_may_have_a_unit(name: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: Any = {name: written}
    assert getattr(read_settings(URL, **options), name) == TIMES[written]
    monkeypatch.setenv(f"DB_{name.upper()}", written)
    assert getattr(read_settings(URL), name) == TIMES[written]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(timedelta(minutes=2), 120), (timedelta(milliseconds=5), 0.005), (7, 7), (0.25, 0.25)],
)
def test_a_time_may_be_a_number_or_a_timedelta(given: Any, seconds: float) -> None:
    assert read_settings(URL, pool_timeout=given).pool_timeout == seconds
    with Database("sqlite://", busy_timeout=given) as door:
        assert door._room.settings.busy_timeout == seconds


@pytest.mark.parametrize(
    "written", ["30x", "5m", "inf", "nan", "-inf", "0", "-1", "-5min", "0s", "1e3s", "min", "None"]
)
def test_what_is_no_time_is_refused_with_its_name_as_it_was_written(
    written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidOption) as caught:
        read_settings(URL, pool_timeout=written)
    assert f"pool_timeout={written!r} cannot be used: " in str(caught.value)
    assert "The default is 30" in str(caught.value)
    monkeypatch.setenv("DB_POOL_TIMEOUT", written)
    with pytest.raises(InvalidOption) as caught:
        read_settings(URL)
    assert f"DB_POOL_TIMEOUT={written!r} cannot be used: " in str(caught.value)


@pytest.mark.parametrize(
    "given", [None, True, 0, -1, -0.5, float("inf"), float("nan"), timedelta(0), timedelta(-1), []]
)
def test_an_argument_that_is_no_time_is_refused_with_its_name(given: Any) -> None:
    with pytest.raises(InvalidOption) as caught:
        read_settings(URL, pool_timeout=given)
    assert f"pool_timeout={given!r} cannot be used: " in str(caught.value)


LONGEST = 2_147_483  # seconds, which are as many milliseconds as a C int counts


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.endswith("_timeout")])
@pytest.mark.parametrize("given", [1e10, LONGEST + 1, timedelta(days=36500), timedelta.max, "600h"])
def test_a_time_that_nothing_can_wait_for_is_refused(
    name: str, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {name: given}
    with pytest.raises(InvalidOption) as caught:
        read_settings(URL, **options)
    assert f"{name}={given!r} cannot be used: " in str(caught.value)
    assert str(LONGEST) in str(caught.value)
    monkeypatch.setenv(f"DB_{name.upper()}", "1000000h")
    with pytest.raises(InvalidOption, match=f"DB_{name.upper()}='1000000h'.* {LONGEST}"):
        read_settings(URL)


def test_the_longest_time_can_be_waited_for(sqlite_url: str) -> None:
    """By a thread, whose locks know a limit, and in SQLite."""
    with (
        Database(
            sqlite_url, pool_size=1, max_overflow=0, pool_timeout=LONGEST, busy_timeout=LONGEST
        ) as door,
        ThreadPoolExecutor() as threads,
    ):
        with door.session() as db:
            assert db.scalar(text("PRAGMA busy_timeout")) == LONGEST * 1000
            waiting = threads.submit(door.create_all)
            while not any(pool.waiting for pool in door.stats().pools):
                time.sleep(0.01)
                assert not waiting.done()
        waiting.result(20)


def test_a_slow_checkout_above_the_timeout_is_refused_where_somebody_asked_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = read_settings(URL, pool_timeout=5)  # below the default of slow_checkout
    assert settings.slow_after == 5
    assert read_settings(URL, pool_timeout=5, slow_checkout=2).slow_after == 2
    assert read_settings(URL, pool_timeout=5, slow_checkout="5s").slow_after == 5
    with pytest.raises(InvalidOption, match=r"DB_SLOW_CHECKOUT=6 .*DB_POOL_TIMEOUT=5"):
        read_settings(URL, pool_timeout=5, slow_checkout=6)
    with pytest.raises(InvalidOption, match=r"DB_SLOW_CHECKOUT=31 .*DB_POOL_TIMEOUT=30"):
        read_settings(URL, slow_checkout=31)
    monkeypatch.setenv("DB_SLOW_CHECKOUT", "1min")
    with pytest.raises(InvalidOption, match="DB_SLOW_CHECKOUT=60 "):
        read_settings(URL)


# --- DEBUG and echo -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["app:*", "0", "false", "verbose", "*", "True-ish", "2", "None"])
def test_other_programs_debug_is_no_error_and_no_echo(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEBUG", value)
    assert not read_settings(URL).shows_statements


@pytest.mark.parametrize("value", ["true", "TRUE", "1", "yes", "on"])
def test_debug_that_is_plainly_true_echoes(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBUG", value)
    assert read_settings(URL).shows_statements


def test_db_echo_wins_over_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBUG", "true")
    monkeypatch.setenv("DB_ECHO", "false")
    assert not read_settings(URL).shows_statements
    monkeypatch.setenv("DEBUG", "false")
    monkeypatch.setenv("DB_ECHO", "true")
    assert read_settings(URL).shows_statements


def test_the_argument_echo_wins_over_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBUG", "true")
    assert not read_settings(URL, echo=False).shows_statements


@pytest.mark.parametrize("echo", [True, False])
def test_echo_logs_statements_with_their_parameters(
    sqlite_url: str, echo: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """And without it no bound value appears anywhere, in the text of an error neither."""
    logger = logging.getLogger("sqlalchemy.engine.Engine")
    before = logger.handlers[:]
    try:
        with Database(sqlite_url, echo=echo) as door, door.session() as db:
            db.execute(text("SELECT :value"), {"value": "a-bound-value"})
            with pytest.raises(OperationalError) as caught:
                db.execute(text("SELECT :value FROM nowhere"), {"value": "a-bound-value"})
    finally:
        logger.handlers[:] = before
    assert ("a-bound-value" in str(caught.value)) is echo
    assert any("a-bound-value" in record.getMessage() for record in caplog.records) is echo


# --- what the other options do --------------------------------------------------------------------


@pytest.mark.parametrize(("size", "kept"), [(1, 1), (2, 2), (5, 3)])
def test_pool_size_connections_are_kept(postgres_url: str, size: int, kept: int) -> None:
    with Database(postgres_url, pool_size=size, max_overflow=5) as door:
        with door.connect(), door.connect(), door.connect():
            pass
        assert door.stats().pools[0].idle == kept


@pytest.mark.parametrize("overflow", [0, 1, 2])
def test_max_overflow_connections_are_opened_beyond(postgres_url: str, overflow: int) -> None:
    with Database(postgres_url, pool_size=1, max_overflow=overflow, pool_timeout=1) as door:
        held = []
        try:
            while len(held) < 4:
                scope = door.connect()
                scope.__enter__()
                held.append(scope)
        except PoolExhausted:
            pass
        for scope in held:
            scope.__exit__(None, None, None)
        assert len(held) == 1 + overflow


def read(door: Database) -> None:
    with door.reader() as db:
        db.execute(text("SELECT 1"))


def test_pool_timeout_is_how_long_a_caller_waits(sqlite_url: str) -> None:
    with (
        Database(sqlite_url, pool_size=1, max_overflow=0, pool_timeout=0.05) as door,
        door.reader() as holder,
    ):
        holder.execute(text("SELECT 1"))
        with ThreadPoolExecutor() as threads, pytest.raises(PoolExhausted, match=r"within 0\.05 s"):
            threads.submit(read, door).result()


@pytest.mark.parametrize(("recycle", "replaces"), [(0, True), (3600, False), (-1, False)])
def test_pool_recycle_replaces_old_connections(
    sqlite_url: str, recycle: int, replaces: bool
) -> None:
    made: list[Any] = []
    with Database(sqlite_url, pool_recycle=recycle) as door:
        event.listen(door.engine, "connect", lambda *args: made.append(args))
        for _ in range(2):
            with door.session() as db:
                db.execute(text("SELECT 1"))
            time.sleep(0.01)  # an age of 0 s is passed once the clock has moved on
    assert (len(made) > 1) is replaces


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        ({"pool_pre_ping": False, "pool_ping_after": 60}, 0),
        ({"pool_pre_ping": True, "pool_ping_after": 60}, 1),
        ({"pool_pre_ping": False, "pool_ping_after": 0}, 1),
    ],
)
def test_pool_pre_ping_and_pool_ping_after_ask_the_server(
    postgres_url: str, proxy: Any, options: Any, asks: int
) -> None:
    with Database(proxy.url(postgres_url), **options) as door:
        for _ in range(3):
            door.check()
        proxy.reset()
        door.check()
        assert proxy.round_trips == 1 + asks


def test_close_timeout_is_how_long_scopes_may_take(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """0: they are ended at once, and named."""
    entered, leave = threading.Event(), threading.Event()
    door = Database(sqlite_url, close_timeout=0)

    def hold() -> None:
        try:
            with door.session() as db:
                db.execute(text("SELECT 1"))
                entered.set()
                leave.wait(20)
        except RuntimeError:
            pass

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(20)
    door.close()  # would wait 10 s by default, and for ever if the option were not read
    assert not leave.is_set()
    leave.set()
    thread.join()
    assert any("did not end in time" in record.getMessage() for record in caplog.records)


def test_busy_timeout_is_how_long_a_sqlite_writer_waits(sqlite_url: str) -> None:
    with Database(sqlite_url) as first, Database(sqlite_url, busy_timeout=0.05) as second:
        with first.session() as db:
            db.execute(text("CREATE TABLE t (n)"))
            with pytest.raises(OperationalError, match="locked"), second.session() as other:
                other.execute(text("CREATE TABLE u (n)"))
        with second.session() as db:
            assert db.scalar(text("PRAGMA busy_timeout")) == 50


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "SIGNAL", "10"])
def test_what_is_no_signal_to_handle_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidOption, match=f"dump_signal={name!r} cannot be used: .*SIGUSR1"):
        Database("sqlite://", dump_signal=name)
    monkeypatch.setenv("DB_DUMP_SIGNAL", name)
    with pytest.raises(InvalidOption, match=f"DB_DUMP_SIGNAL={name!r} cannot be used: .*SIGUSR1"):
        Database("sqlite://")


class Broken(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stderr", [None, closed(), Broken()], ids=["none", "closed", "broken"])
def test_dump_signal_without_a_standard_error_stream_does_no_harm(
    stderr: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with Database("sqlite://", dump_signal="SIGUSR1") as door:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stderr", stderr)
                signal.raise_signal(signal.SIGUSR1)  # would raise here, in the application
            assert door.check().seconds > 0
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_every_option_is_tried_by_a_test() -> None:
    """Somewhere in the suite stands each option, passed by its name."""
    suite = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    for name in Options.__annotations__:
        assert f"{name}=" in suite or f'"{name}":' in suite
