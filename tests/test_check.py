"""What `check()` says of a database that answers, and of one that does not: and what to do."""

from __future__ import annotations

import asyncio
import logging
import os
import pty
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from doorman import Doorman
from looking import CANNOT_CONNECT, look
from pgbouncer import PgBouncer
from sqlalchemy import URL, make_url
from tls import TLSProxy

from engineroom import CheckResult, Database, DatabaseSessionManager, checking
from engineroom.backends.postgresql import knocking
from engineroom.backends.postgresql.knocking import NoPostgreSQL, Silent, knock
from engineroom.errors import (
    ConnectTimeout,
    CredentialsFailed,
    InvalidOption,
    InvalidURL,
    NotInitialized,
)
from engineroom.testing import PostgresServer, postgres

LONG = 60.0  # seconds; for what takes one or two
DRIVERS = ["asyncpg", "psycopg", "psycopg (async)", "psycopg2"]
Ask = Callable[..., CheckResult]


@pytest.fixture(params=DRIVERS)
def ask(request: pytest.FixtureRequest) -> Ask:
    """Check by one driver, on its side."""
    name, asynchronous = request.param.removesuffix(" (async)"), request.param.endswith("(async)")

    def asked(url: str | URL, wait: float | None = None, **options: Any) -> CheckResult:
        text = url if isinstance(url, str) else url.render_as_string(hide_password=False)
        where = text.replace("postgresql:", f"postgresql+{name}:", 1)
        if name != "asyncpg" and not asynchronous:
            with Database(where, **options) as door:
                return door.check(wait=wait)

        async def main() -> CheckResult:
            async with DatabaseSessionManager().init(where, **options) as manager:
                return await manager.check(wait=wait)

        return asyncio.run(main())

    return asked


@pytest.fixture(scope="module")
def own() -> Iterator[PostgresServer]:
    """A server of these tests alone, which they stop and start."""
    with postgres(18) as server:
        yield server


def told(error: BaseException) -> str:
    return "".join(getattr(error, "__notes__", []))


# -- it answers -----------------------------------------------------------------------------------


def test_what_is_reached_and_how(ask: Ask, pg18: PostgresServer) -> None:
    found = ask(pg18.url())
    assert found.server == f"PostgreSQL {pg18.execute('SHOW server_version')[0][0]}"
    assert (found.role, found.tls, found.pooler) == ("primary", None, None)
    assert found.address == pg18.host
    assert found.seconds >= found.latency > 0
    assert found.skew is not None
    assert abs(found.skew) < 1
    assert found.problems == ()
    assert pg18.password not in str(found)
    assert pg18.password not in repr(found)


def test_tls(ask: Ask, tls: TLSProxy, pg18: PostgresServer) -> None:
    found = ask(f"{tls.url(pg18.url())}?sslmode=require")
    assert found.tls is not None
    assert found.tls.startswith("TLS")
    assert f"to 127.0.0.1, {found.tls}" in str(found)


def test_a_pooler_that_nobody_has_declared_is_a_problem(
    ask: Ask, pgbouncer: PgBouncer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the pooler takes it: readers would set a parameter that it refuses."""
    with pytest.raises(CANNOT_CONNECT) as caught:
        ask(pgbouncer.url(database), LONG)
    assert "DB_POOLER=transaction" in told(caught.value)
    assert "1 try" in told(caught.value)
    found = ask(pgbouncer.url(database), pooler="transaction")
    assert (found.pooler, found.problems) == ("transaction", ())


def test_an_undeclared_pooler_that_takes_all_parameters(
    ask: Ask, pg18: PostgresServer, database: str
) -> None:
    ignored = "default_transaction_read_only, options, extra_float_digits"
    with PgBouncer(pg18, mode="session", ignore_startup_parameters=ignored) as pooler:
        found = ask(pooler.url(database))
    assert found.pooler == "undeclared"
    assert "DB_POOLER=transaction" in found.problems[0]
    assert "problem  A pooler" in str(found)


def test_more_connections_than_the_server_has(ask: Ask, pg18: PostgresServer) -> None:
    (problem,) = ask(pg18.url(), pool_size=150, max_overflow=51).problems
    assert "may open 201 connections, and the server has 200" in problem


def test_a_standby(ask: Ask, own: PostgresServer) -> None:
    """A server that takes its changes from elsewhere: here from nowhere."""
    signal = own._keeper.folder / "data" / "standby.signal"
    signal.touch()
    try:
        own.restart()
        found = ask(own.url(), wait=LONG)
        assert found.role == "standby"
        assert "target_session_attrs=read-write" in found.problems[0]
    finally:
        signal.unlink()
        own.restart()


def test_a_clock_that_is_elsewhere(own: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 90)
    with Database(own.url()) as door:
        found = door.check()
    assert found.skew == pytest.approx(90, abs=5)
    assert "s apart" in found.problems[-1]


def test_a_database_of_one_file(sqlite_url: str) -> None:
    with Database(sqlite_url) as door:
        found = door.check(wait=1)
        assert (found.role, found.address, found.skew, found.problems) == (
            "primary",
            None,
            None,
            (),
        )
        assert str(found).startswith(f"{sqlite_url} answers in ")


# -- it does not ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [None, LONG])
def test_a_password_that_is_refused_is_not_tried_again(
    ask: Ask, pg18: PostgresServer, wait: float | None
) -> None:
    mark = len(_log(pg18))
    with pytest.raises(CANNOT_CONNECT) as caught:
        ask(make_url(pg18.url()).set(password="wrong-4711"), wait)
    driver = type(getattr(caught.value, "orig", caught.value)).__module__
    tries = _log(pg18)[mark:].count("password authentication failed")
    if "psycopg2" in driver:  # it does not tell this from TLS or pg_hba.conf: tried once more
        assert "lets nobody in so" in told(caught.value)
        assert tries == (1 if not wait else 2)
    else:
        assert "refuses the user or the password" in told(caught.value)
        assert tries == 1 + driver.startswith("psycopg")  # libpq has to be asked once more
    assert "wrong-4711" not in told(caught.value)


def _log(server: PostgresServer) -> str:
    return (server._keeper.folder / "log").read_text()


def test_a_database_that_does_not_exist(ask: Ask, pg18: PostgresServer) -> None:
    with pytest.raises(CANNOT_CONNECT) as caught:
        ask(make_url(pg18.url()).set(database="nowhere"), LONG)
    assert told(caught.value)


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("options=-cnonsense%3D1", "42704"),
        ("target_session_attrs=standby", "lets nobody in so"),
        ("dbname=nowhere", "does not exist"),
    ],
)
def test_what_is_refused_after_the_password_is_not_said_of_it(
    ask: Ask, pg18: PostgresServer, query: str, why: str
) -> None:
    with pytest.raises(CANNOT_CONNECT) as caught:
        ask(f"{pg18.url()}?{query}")
    note = told(caught.value)
    assert "the user or the password" not in note
    if "psycopg2" not in type(getattr(caught.value, "orig", caught.value)).__module__:
        assert why in note


@pytest.mark.parametrize("ask", ["psycopg", "psycopg (async)"], indirect=True)
def test_libpq_is_traced_so_often_and_no_more(
    ask: Ask, pg18: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psycopg leaves a little memory behind each time; without, nobody knows what was refused."""
    monkeypatch.setattr(knocking, "traces", iter(()))
    with pytest.raises(CANNOT_CONNECT) as caught:
        ask(make_url(pg18.url()).set(password="wrong"))
    assert "lets nobody in so" in told(caught.value)


def test_a_role_that_has_no_connection_left_is_waited_for(
    ask: Ask, request: pytest.FixtureRequest, pg18: PostgresServer
) -> None:
    """53300, which the server says only to who has the right password."""
    pg18.execute("CREATE ROLE limited LOGIN PASSWORD 'known' CONNECTION LIMIT 1")
    url = make_url(pg18.url()).set(username="limited", password="known")
    holder = psycopg.connect(url.render_as_string(hide_password=False))
    try:
        with pytest.raises(CANNOT_CONNECT) as caught:
            ask(url, 0.5)
        if request.node.callspec.params["ask"] == "psycopg2":  # it does not tell
            assert "lets nobody in so" in told(caught.value)
            return
        assert "has no connection left" in told(caught.value)
        late = threading.Timer(0.5, holder.close)
        late.start()
        try:
            assert ask(url, LONG).role == "primary"
        finally:
            late.join()
    finally:
        holder.close()
        pg18.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'limited'"
        )
        pg18.execute("DROP ROLE limited")


def test_a_server_without_tls(ask: Ask, pg18: PostgresServer) -> None:
    with pytest.raises(CANNOT_CONNECT) as caught:
        ask(f"{pg18.url()}?sslmode=require", LONG)
    assert "does not speak TLS" in told(caught.value)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
@pytest.mark.parametrize("mode", ["", "?sslmode=disable"])
def test_a_proxy_whose_server_is_not_there_yet_is_waited_for(
    ask: Ask, pg18: PostgresServer, says: bytes, mode: str
) -> None:
    with Doorman(pg18, says, 8) as proxy:
        assert ask(f"{proxy.url()}{mode}", LONG).role == "primary"
        assert proxy.turned_away == 8


def test_what_is_no_server_of_postgresql_is_said(ask: Ask, pg18: PostgresServer) -> None:
    with Doorman(pg18, b"HTTP/1.1 400 Bad Request\r\n\r\n", 1000) as proxy:
        with pytest.raises((*CANNOT_CONNECT, ConnectTimeout)) as caught:
            ask(proxy.url(), 0.3)
    assert f"what answers at 127.0.0.1:{proxy.port} is no PostgreSQL server" in told(caught.value)


def test_a_server_that_is_silent_is_not_asked_for_longer_than_said(
    ask: Ask, request: pytest.FixtureRequest, pg18: PostgresServer
) -> None:
    with Doorman(pg18, None, 100) as proxy:
        with pytest.raises((*CANNOT_CONNECT, ConnectTimeout)) as caught:
            ask(proxy.url(), pool_timeout=2.0)
    assert "answer" in told(caught.value) + str(caught.value)
    if request.node.callspec.params["ask"] == "psycopg":
        assert proxy.turned_away == 1  # the driver has said all: nobody has to ask


def test_a_first_connection_that_stays_silent_does_not_take_the_whole_wait(
    ask: Ask,
    pg18: PostgresServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "engineroom")
    monkeypatch.setattr(checking, "FIRST_TRY", 2.0)
    with Doorman(pg18, None, 1) as proxy:
        started = time.monotonic()
        assert ask(proxy.url(), LONG).role == "primary"
        assert time.monotonic() - started < LONG / 2
    assert any("Waiting" in record.getMessage() for record in caplog.records)


def test_who_connects_in_vain_is_told_what_to_do_whichever_verb_it_was(
    pg18: PostgresServer,
) -> None:
    """In a note on the error that is caught: `check()` is what a new user has not called."""
    for url, says in {
        pg18.url().replace(pg18.password, "wrong"): "refuses the user or the password. Correct",
        f"{pg18.url()}?sslmode=require": "does not speak TLS. Have it do so",
        f"{pg18.url()}-not": "the database does not exist. Create it",
        "postgresql://u@127.0.0.1:1/d": "nothing answers at 127.0.0.1:1 ",
        "postgresql://u@no-such-host.invalid/d": "the name no-such-host.invalid does not resolve",
    }.items():
        for driver in ("asyncpg", "psycopg", "psycopg (async)"):
            with pytest.raises(CANNOT_CONNECT) as caught:
                look(url, driver, pool_timeout=5)
            assert says in "".join(caught.value.__notes__)
            assert len(caught.value.__notes__) == 1


def test_a_first_host_that_stays_silent_keeps_nobody_from_the_second(
    ask: Ask, pg18: PostgresServer
) -> None:
    with Doorman(pg18, None, 100) as silent:
        place = f"127.0.0.1:{pg18.port}"
        url = pg18.url().replace(place, f"127.0.0.1:{silent.port},{place}")
        assert ask(url, LONG).role == "primary"


def test_a_password_that_one_host_refuses_is_not_tried_for_as_long_as_another_is_down(
    ask: Ask, pg18: PostgresServer
) -> None:
    asked: list[int] = []

    def wrong() -> str:
        asked.append(1)
        return "wrong"

    place = f"127.0.0.1:{pg18.port}"
    url = pg18.url().replace(f":{pg18.password}@{place}", f"@127.0.0.1:1,{place}")
    started = time.monotonic()
    with pytest.raises(CANNOT_CONNECT) as caught:
        ask(url, LONG, password=wrong)
    assert time.monotonic() - started < LONG / 2
    assert len(asked) <= 4  # twice a connect, which psycopg2's are tried twice: it tells nothing
    assert "password" in told(caught.value)


def test_the_text_of_a_limit_is_rounded(pg18: PostgresServer) -> None:
    async def main(url: str) -> None:
        async with DatabaseSessionManager().init(url) as manager:
            await manager.check(wait=1)

    with Doorman(pg18, None, 100) as proxy:
        with pytest.raises(ConnectTimeout, match=r"within 1 s: "):
            asyncio.run(main(proxy.url().replace("postgresql:", "postgresql+asyncpg:")))


@pytest.mark.parametrize(
    ("says", "error"),
    [
        (b"E\0\0\0\x50", Silent),
        (b"E\x7f\xff\xff\xff", NoPostgreSQL),
        (b"\x4a\0\0\0\x0a8.0", NoPostgreSQL),  # as MySQL greets
    ],
)
def test_a_port_that_never_ends_its_answer_is_left_in_time(
    says: bytes, error: type[Exception]
) -> None:
    over = threading.Event()

    def drip() -> None:
        line, _ = listener.accept()
        with line, suppress(OSError):
            line.sendall(says)
            while not over.wait(0.05):
                line.sendall(b"E")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(error):
                knock("127.0.0.1", listener.getsockname()[1], 0.5, needs_tls=False)
        finally:
            over.set()
            thread.join()


def test_a_name_that_does_not_resolve_is_waited_for(
    ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engineroom")
    with pytest.raises((*CANNOT_CONNECT, ConnectTimeout)) as caught:  # the last try may be cut off
        ask("postgresql://u:secret-4711@no-such-host.invalid/d", 0.6)
    note = told(caught.value)
    assert "no-such-host.invalid" in note
    assert "does not resolve" in note
    assert "See that it is spelled right" in note
    assert "(check(wait=0.6): " in note
    lines = [record.getMessage() for record in caplog.records if "Waiting" in record.getMessage()]
    assert len(lines) == 1, "said once, for nothing changed"
    assert "does not resolve" in lines[0]
    assert "secret-4711" not in note + lines[0]


def test_a_server_at_the_default_socket_is_waited_for(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGHOST", raising=False)
    with pytest.raises((*CANNOT_CONNECT, ConnectTimeout)) as caught:
        ask("postgresql://u@/d?port=1", 0.6)
    assert "nothing answers at " in told(caught.value)
    assert "(check(wait=0.6): " in told(caught.value)


def test_nothing_listens(ask: Ask) -> None:
    with socket.socket() as taken:  # bound, and it does not listen
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(CANNOT_CONNECT) as caught:
            ask(f"postgresql://u@127.0.0.1:{taken.getsockname()[1]}/d")
    assert "nothing answers at 127.0.0.1" in told(caught.value)


def test_a_server_that_is_started_late(ask: Ask, own: PostgresServer) -> None:
    own.kill()
    late = threading.Timer(1.0, own.restart)
    late.start()
    try:
        assert ask(own.url(), LONG).server.startswith("PostgreSQL 18")
    finally:
        late.join()


def test_a_server_that_is_starting_up(
    ask: Ask, own: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """One in recovery that takes nobody before its end, which does not come: 57P03."""
    caplog.set_level(logging.INFO, "engineroom")
    data = own._keeper.folder / "data"
    settings = data / "postgresql.conf"
    before = settings.read_text()
    settings.write_text(f"{before}hot_standby = off\n")
    (data / "standby.signal").touch()
    own.restart()
    try:
        with pytest.raises(CANNOT_CONNECT) as caught:
            ask(own.url(), 0.5)
        assert "is starting up or shutting down" in told(caught.value)

        def end() -> None:
            settings.write_text(before)
            (data / "standby.signal").unlink()
            own.restart()

        late = threading.Timer(0.5, end)
        late.start()
        try:
            assert ask(own.url(), LONG).role == "primary"
        finally:
            late.join()
    finally:
        settings.write_text(before)
        if (data / "standby.signal").exists():
            (data / "standby.signal").unlink()
            own.restart()
    assert any("is starting up" in record.getMessage() for record in caplog.records)


def test_what_engineroom_refuses_is_not_waited_for(ask: Ask, pg18: PostgresServer) -> None:
    calls: list[int] = []

    def password() -> str:
        calls.append(1)
        raise LookupError("no vault")

    with pytest.raises(CredentialsFailed):
        ask(pg18.url(), LONG, password=password)
    assert len(calls) == 1


def test_credentials_that_are_late_are_asked_for_again(
    ask: Ask, pg18: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "FIRST_TRY", 0.5)
    url, calls, over = make_url(pg18.url()), [], threading.Event()

    def password() -> str:
        calls.append(1)
        if len(calls) == 1:
            over.wait(LONG)
        return str(url.password)

    try:
        assert ask(url.set(password=None), LONG, password=password).role == "primary"
    finally:
        over.set()
    assert len(calls) > 1


@pytest.mark.anyio
async def test_a_wait_that_is_cancelled_ends() -> None:
    async with DatabaseSessionManager().init("postgresql://u@no-such-host.invalid/d") as manager:
        waiting = asyncio.create_task(manager.check(wait=LONG))
        await asyncio.sleep(0.3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


# -- what cannot be asked -------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [-1, float("inf"), float("nan"), True, "30"])
def test_a_wait_that_is_none(wait: Any, sqlite_url: str) -> None:
    with Database(sqlite_url) as door:
        with pytest.raises(InvalidOption, match="number of seconds"):
            door.check(wait=wait)
    with pytest.raises(InvalidOption, match="number of seconds"):
        asyncio.run(DatabaseSessionManager().check(wait=wait))


def test_before_init() -> None:
    with pytest.raises(NotInitialized):
        asyncio.run(DatabaseSessionManager().check(wait=1))


def test_prismas_parameter_leads_to_the_setting() -> None:
    with pytest.raises(InvalidURL, match="DB_POOLER=transaction"):
        Database("postgresql://u@h/d?pgbouncer=true")


# -- what a person sees ---------------------------------------------------------------------------

SCRIPT = """
from engineroom import Database
try:
    Database("postgresql+psycopg://u@no-such-host.invalid/d").check(wait=3)
except Exception:
    pass
"""


def test_a_terminal_shows_that_one_waits_and_a_pipe_does_not(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        run = [sys.executable, "-c", SCRIPT]
        subprocess.run(run, stderr=theirs, check=True)
        said, _, _ = select.select([terminal], [], [], 0)
        assert said, "nothing was written"
        assert b"does not resolve" in terminal.read(4096)
    os.close(theirs)
    silent = subprocess.run(run, capture_output=True, check=True)
    assert (silent.stdout, silent.stderr) == (b"", b"")
