"""Who connects is asked at each physical connect; a password that was rotated fails no unit."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any

import psycopg
import pytest
from looking import look
from pgbouncer import PgBouncer
from scenario import run
from sqlalchemy import Engine, event, make_url, text
from sqlalchemy.exc import DBAPIError

from engineroom import Database, DatabaseSessionManager
from engineroom.errors import ConnectTimeout, CredentialsFailed, InvalidOption
from engineroom.registry import SessionManager
from engineroom.settings import read_settings
from engineroom.testing import PostgresServer, WireProxy

DRIVERS = ["asyncpg", "psycopg", "psycopg (async)", "psycopg2"]
each_driver = pytest.mark.parametrize("driver", DRIVERS)


@dataclass
class Vault:
    """A store of one secret that says what is valid now, and counts how often it was asked."""

    server: PostgresServer
    role: str
    secret: str = "first"
    under_way: float = 0.0  # seconds for which an answer is: it may be stale when it comes
    asked: int = 0
    loops: list[object] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def password(self) -> str:
        with self.lock:
            self.asked += 1
            secret = self.secret
        time.sleep(self.under_way)
        return secret

    async def apassword(self) -> str:
        self.loops.append(asyncio.get_running_loop())
        return await asyncio.to_thread(self.password)

    def rotate(self) -> None:
        """Change it, in the server and in the store: who asks meanwhile waits for the new one.

        At once, while answers from before are under way: those will be refused.
        """
        with psycopg.connect(self.server.url(), autocommit=True) as server, self.lock:
            secret = f"secret-{time.monotonic_ns()}"
            server.execute(f"ALTER ROLE {self.role} PASSWORD '{secret}'")
            self.secret = secret

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{self.role}@{self.server.host}:{self.server.port}/{database}"


@pytest.fixture
def vault(pg18: PostgresServer) -> Iterator[Vault]:
    role = f"role_{time.monotonic_ns()}"
    pg18.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'first'")
    yield Vault(pg18, role)
    pg18.execute(
        f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = '{role}'"
    )
    pg18.execute(f"DROP ROLE {role}")


# --- a string, a function, a coroutine function ---------------------------------------------------


@each_driver
def test_a_password_may_be_given_beside_the_url(driver: str, vault: Vault) -> None:
    assert look(vault.url(), driver, password="first") == 1
    assert look(vault.url().replace("@", ":wrong@"), driver, password="first") == 1
    url = vault.url().replace(f"{vault.role}@", "")
    assert look(url, driver, username=vault.role, password="first") == 1
    assert look(url, driver, username=lambda: vault.role, password=vault.password) == 1


@each_driver
def test_a_function_is_asked_at_each_physical_connect_and_at_no_checkout(
    driver: str, vault: Vault
) -> None:
    def use(connection: Any) -> None:
        assert vault.asked == 1
        connection.exec_driver_sql("SELECT 1")

    look(vault.url(), driver, use, password=vault.password)
    with Database(f"{vault.url()}", password=vault.password) as door:
        for _ in range(5):
            with door.session() as session:
                session.execute(text("SELECT 1"))
        assert vault.asked == 2
        with door.session() as one, door.session() as two:
            assert one.scalar(text("SELECT 1")) == two.scalar(text("SELECT 1"))
        assert vault.asked == 3


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg (async)"])
def test_a_coroutine_function_is_awaited_in_the_loop_that_connects(
    driver: str, vault: Vault
) -> None:
    url = vault.url().replace("postgresql:", f"postgresql+{driver.removesuffix(' (async)')}:")
    manager = DatabaseSessionManager().init(url, password=vault.apassword)
    loops = []

    async def use() -> None:
        loops.append(asyncio.get_running_loop())
        async with manager.session() as session:
            assert await session.scalar(text("SELECT 1")) == 1

    for _ in range(2):
        asyncio.run(use())
    assert vault.loops == loops
    asyncio.run(manager.close())


async def acoroutine() -> str:
    return "first"


def giving_a_coroutine() -> Any:
    return acoroutine()


class Asking:
    async def __call__(self) -> str:
        return "first"


@pytest.mark.parametrize("given", [acoroutine, Asking()])
def test_the_synchronous_side_refuses_a_coroutine_function_at_once(
    given: Any, vault: Vault
) -> None:
    with pytest.raises(InvalidOption, match="password= is a coroutine function"):
        Database(vault.url(), password=given)
    manager = DatabaseSessionManager().init(vault.url(), password=given)  # it has another side
    with pytest.raises(InvalidOption, match="Give it a plain function, which serves both sides"):
        manager.sync_session().__enter__()
    assert vault.asked == 0


class Text(str):
    """A text of a client's own, which does not print."""

    __slots__ = ()

    def __str__(self) -> str:
        return "***"


@each_driver
def test_a_function_may_return_a_text_of_its_own_class(driver: str, vault: Vault) -> None:
    assert look(vault.url(), driver, password=lambda: Text("first")) == 1


def test_a_function_that_gives_a_coroutine_is_noticed_when_it_does(vault: Vault) -> None:
    with Database(vault.url(), password=giving_a_coroutine) as door:
        with pytest.raises(InvalidOption, match="password= is a coroutine function"):
            with door.connect():
                pass
    assert look(vault.url(), "asyncpg", password=giving_a_coroutine) == 1


def test_an_argument_comes_before_the_url_and_the_url_before_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DB_USERNAME", "variable")
    monkeypatch.setenv("DB_PASSWORD", "variable")
    for url, account in {
        "postgresql://h/d": ("variable", "variable"),
        "postgresql://u@h/d": ("u", "variable"),
        "postgresql://u:p@h/d": ("u", "p"),
        "postgresql://u:@h/d": ("u", "variable"),  # blank is as good as none, to libpq as well
        "postgresql://h/d?user=u&password=p": (None, None),  # they are among the parameters
    }.items():
        settings = read_settings(url)
        assert (settings.url.username, settings.url.password) == account
        settings = read_settings(url, username="a", password="b")
        assert (settings.url.username, settings.url.password) == ("a", "b")
        assert not settings.url.query
        settings = read_settings(url, username=str, password=str)
        assert (settings.url.username, settings.url.password) == (None, None)
        assert "variable" not in repr(settings).replace("username='variable'", "")


def test_what_is_no_credential_is_refused_without_being_shown() -> None:
    for given in (b"known", 12345, None):
        options: Any = {"password": given}
        with pytest.raises(InvalidOption, match=r"password= takes a text or a function") as caught:
            Database("postgresql://h/d", **options)
        assert "known" not in str(caught.value)
    for options in ({"username": "u"}, {"password": "known"}):
        with pytest.raises(InvalidOption, match="says nothing for SQLite") as caught:
            Database("sqlite://", **options)
        assert "known" not in str(caught.value)


def test_the_variables_say_nothing_for_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "for another database")
    with Database("sqlite://") as door, door.session() as session:
        assert session.scalar(text("SELECT 1")) == 1


def test_a_manager_of_many_databases_asks_as_well(vault: Vault) -> None:
    with SessionManager() as registry:
        engine = registry.get_engine(vault.url(), password=vault.password)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
    assert vault.asked == 1


def test_what_a_listener_sets_for_a_connect_is_used(vault: Vault) -> None:
    """SQLAlchemy's own way, which people have in their code."""
    with Database(vault.url()) as door:

        @event.listens_for(door.engine, "do_connect")
        def give(dialect: Any, record: Any, args: Any, parameters: dict[str, Any]) -> None:
            parameters["password"] = vault.password()

        with door.session() as session:
            assert session.scalar(text("SELECT 1")) == 1
    assert vault.asked == 1


@each_driver
def test_a_pooler_that_refuses_a_password_gets_the_new_one(
    driver: str, pgbouncer: PgBouncer, pg18: PostgresServer
) -> None:
    passwords = iter(["old", pg18.password])
    url = pgbouncer.url().replace(f":{pg18.password}@", "@")
    given: dict[str, Any] = {"password": lambda: next(passwords), "pooler": "transaction"}
    assert look(url, driver, **given) == 1


# --- what goes wrong ------------------------------------------------------------------------------


def raising() -> str:
    raise PermissionError("the vault is sealed")


async def araising() -> str:
    raise PermissionError("the vault is sealed")


def hanging() -> str:
    time.sleep(5)
    return "first"


async def ahanging() -> str:
    await asyncio.sleep(60)
    return "first"


async def ahanging_on() -> str:
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(60)
    await asyncio.sleep(0.5)
    return "first"


async def aholding() -> str:
    time.sleep(0.7)  # the mistake
    return "first"


def leaving() -> str:
    sys.exit("the vault is sealed")


def returning_bytes() -> Any:
    return b"first"


def stopping() -> str:
    return next(iter(()))


def cancelled() -> str:
    raise asyncio.CancelledError


async def acancelled() -> str:
    raise asyncio.CancelledError


WRONG: dict[Callable[[], Any], str] = {
    raising: r"password= raised PermissionError, so nothing was connected",
    araising: r"password= raised PermissionError, so nothing was connected",
    hanging: r"password= did not answer within 0\.\d s, which is what was left of pool_timeout",
    ahanging: r"password= did not answer within 0\.\d s, which is what was left of pool_timeout",
    ahanging_on: r"password= did not answer within 0\.\d s, which is what was left of pool_timeout",
    leaving: r"password= raised RuntimeError, so nothing was connected",
    returning_bytes: r"password= returned bytes, where a text \(str\) is needed. Decode them",
    stopping: r"password= raised RuntimeError, so nothing was connected",
    cancelled: r"password= raised CancelledError, so nothing was connected",
    acancelled: r"password= raised CancelledError, so nothing was connected",
    lambda: "secret\udce4": r"password= returned a text that is not UTF-8",
    lambda: "secret\0": r"password= returned a text that has a zero byte",
    lambda: None: r"password= returned NoneType, where a text",
    lambda: "": r"password= returned an empty text, where a text",
}


@each_driver
@pytest.mark.parametrize("given", WRONG)
def test_what_goes_wrong_is_one_clear_error(
    given: Any, driver: str, vault: Vault, proxy: WireProxy
) -> None:
    if asyncio.iscoroutinefunction(given) and driver in ("psycopg", "psycopg2"):
        with pytest.raises(InvalidOption):
            look(vault.url(), driver, password=given)
        return
    late = "hanging" in getattr(given, "__name__", "")
    with pytest.raises(CredentialsFailed, match=WRONG[given]) as caught:
        look(
            proxy.url(vault.url()),
            driver,
            password=given,
            **({"pool_timeout": 0.4} if late else {}),
        )
    assert isinstance(caught.value.__cause__, PermissionError) == ("raising" in str(given))
    assert "secret" not in repr(caught.value) + repr(caught.value.__cause__)
    assert proxy.connections == 0


@each_driver
def test_two_functions_share_the_time(driver: str, vault: Vault, proxy: WireProxy) -> None:
    def slow() -> str:
        time.sleep(0.8)
        return "late"

    started = time.monotonic()
    with pytest.raises(CredentialsFailed, match="password= did not answer within 0"):
        look(proxy.url(vault.url()), driver, username=slow, password=slow, pool_timeout=1)
    assert time.monotonic() - started < 1.5
    assert proxy.connections == 0


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg (async)"])
def test_where_the_loop_stands_still_the_error_says_so(driver: str, vault: Vault) -> None:
    with pytest.raises(ConnectTimeout) as caught:
        look(vault.url(), driver, password=aholding, pool_timeout=0.4)
    (note,) = caught.value.__notes__
    assert re.match(r"password= was asked 0\.[789] s before, .*the event loop stood still", note)


def signalled(url: str) -> None:
    def handler(*_: object) -> None:
        sys.exit("told to stop")

    signal.signal(signal.SIGTERM, handler)
    with Database(url, password=hanging) as door:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(SystemExit, match="told to stop"), door.session() as db:
            db.execute(text("SELECT 1"))


def test_what_a_signal_raises_meanwhile_is_not_the_functions(vault: Vault) -> None:
    run(signalled, f"{vault.url()}".replace("postgresql:", "postgresql+psycopg:"))


async def connect(manager: DatabaseSessionManager) -> None:
    async with manager.session() as db:
        await db.execute(text("SELECT 1"))


def ended_meanwhile(url: str, how: str) -> None:
    asked, cleaned = asyncio.Event(), list[bool]()

    async def password() -> str:
        asked.set()
        try:
            return await ahanging()
        finally:
            await asyncio.sleep(0.05)
            cleaned.append(True)

    async def main() -> None:
        manager = DatabaseSessionManager().init(url, password=password)
        connecting = asyncio.create_task(connect(manager))
        await asked.wait()
        if how == "cancelled":
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
            assert cleaned == [True]
            await manager.close()

    logged = SimpleQueue[Any]()
    logging.getLogger("asyncio").addHandler(QueueHandler(logged))
    asyncio.run(main())
    assert cleaned == [True]
    assert logged.empty()


@pytest.mark.parametrize("how", ["cancelled", "the loop ends"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_function_whose_caller_is_cancelled_cleans_up(
    driver: str, how: str, vault: Vault
) -> None:
    run(ended_meanwhile, f"{vault.url()}".replace("postgresql:", f"postgresql+{driver}:"), how)


def cancelled_in_a_thread(url: str) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def password() -> Any:
        asked.set()
        go_on.wait(5)
        return ahanging()

    async def main() -> None:
        async with DatabaseSessionManager().init(url, password=password) as manager:
            connecting = asyncio.create_task(connect(manager))
            await asyncio.to_thread(asked.wait, 5)
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
            go_on.set()
            while any(each.name == "engineroom-credentials" for each in threading.enumerate()):
                await asyncio.sleep(0.01)
        gc.collect()

    warnings.simplefilter("error")
    with pytest.MonkeyPatch.context() as patch:
        unraisable: list[Any] = []
        patch.setattr(sys, "unraisablehook", unraisable.append)
        asyncio.run(main())
        assert unraisable == []


def test_a_coroutine_that_comes_after_the_caller_has_gone_is_closed(vault: Vault) -> None:
    run(cancelled_in_a_thread, vault.url())


@each_driver
def test_a_function_that_is_not_asked_in_time_for_connect_timeout(
    driver: str, vault: Vault
) -> None:
    """The connect timeout is a limit for it as well: two seconds are the least that libpq knows."""
    with pytest.raises(CredentialsFailed, match=r"did not answer within 1\.9\d? s"):
        look(f"{vault.url()}?connect_timeout=2", driver, password=hanging)


@each_driver
def test_a_function_is_given_time_where_connect_timeout_is_none(driver: str, vault: Vault) -> None:
    """As 0 is to libpq."""

    def slow() -> str:
        time.sleep(0.2)
        return "first"

    assert look(f"{vault.url()}?connect_timeout=0", driver, password=slow) == 1


# --- rotation -------------------------------------------------------------------------------------


@each_driver
def test_a_refused_password_is_asked_for_once_more(driver: str, vault: Vault) -> None:
    answers = iter(["stale", "first"])
    assert look(vault.url(), driver, password=lambda: next(answers)) == 1
    assert list(answers) == []


@each_driver
def test_the_same_answer_is_not_tried_twice(driver: str, vault: Vault, proxy: WireProxy) -> None:
    asked = []

    def stale() -> str:
        asked.append(1)
        return "stale"

    url = f"{proxy.url(vault.url())}?sslmode=disable"
    with pytest.raises(Exception, match="password authentication failed"):
        look(url, driver, password=stale)
    assert len(asked) == 2
    # libpq does not tell why: the server is asked once more, for psycopg2 without a password.
    assert proxy.connections == 1 + (driver != "asyncpg")


@pytest.mark.parametrize("driver", DRIVERS[:-1])  # psycopg2 does not tell why a connect failed
def test_other_failures_of_a_connect_ask_nobody_again(driver: str, vault: Vault) -> None:
    with pytest.raises((OSError, DBAPIError)):
        look(vault.url().replace(str(vault.server.port), "1"), driver, password=vault.password)
    assert vault.asked == 1


TASKS = 20
UNDER_WAY = 0.02  # seconds: most tasks are in the midst of asking when a password is rotated
rotations = pytest.mark.parametrize("rotations", [5, pytest.param(20, marks=pytest.mark.soak)])


def renew(engine: Engine) -> None:
    """Have each unit connect anew: what comes back is closed."""
    event.listen(engine, "checkin", lambda _, record: record.invalidate())


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@rotations
def test_rotations_under_twenty_tasks_fail_no_unit(
    rotations: int, driver: str, vault: Vault
) -> None:
    url = vault.url().replace("postgresql:", f"postgresql+{driver}:")
    manager = DatabaseSessionManager().init(url, password=vault.apassword, pool_size=TASKS)
    failed, over, units = list[BaseException](), asyncio.Event(), [0] * TASKS
    vault.under_way = UNDER_WAY
    renew(manager.engine.sync_engine)

    async def work(number: int) -> None:
        while not over.is_set():
            try:
                async with manager.session() as session:
                    await session.scalar(text("SELECT 1"))
            except Exception as error:
                failed.append(error)
            units[number] += 1

    async def main() -> None:
        tasks = [asyncio.create_task(work(number)) for number in range(TASKS)]
        for _ in range(rotations):
            await asyncio.to_thread(vault.rotate)
            before = list(units)
            # Each has met it, and none meets two of them in one connect.
            while not all(after > one + 1 for after, one in zip(units, before, strict=True)):
                await asyncio.sleep(0.001)
        over.set()
        await asyncio.gather(*tasks)
        await manager.close()

    asyncio.run(main())
    assert failed == []
    assert vault.asked > rotations * TASKS


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@rotations
def test_rotations_under_twenty_threads_fail_no_unit(
    rotations: int, driver: str, vault: Vault
) -> None:
    url = vault.url().replace("postgresql:", f"postgresql+{driver}:")
    failed, over, units = list[BaseException](), threading.Event(), [0] * TASKS
    vault.under_way = UNDER_WAY

    def work(number: int) -> None:
        while not over.is_set():
            try:
                with door.session() as session:
                    session.scalar(text("SELECT 1"))
            except Exception as error:
                failed.append(error)
            units[number] += 1

    with Database(url, password=vault.password, pool_size=TASKS) as door:
        renew(door.engine)
        with ThreadPoolExecutor(TASKS) as threads:
            for number in range(TASKS):
                threads.submit(work, number)
            try:
                for _ in range(rotations):
                    vault.rotate()
                    before = list(units)
                    while not all(
                        after > one + 1 for after, one in zip(units, before, strict=True)
                    ):
                        time.sleep(0.001)
            finally:
                over.set()
    assert failed == []
    assert vault.asked > rotations * TASKS


# --- cost -----------------------------------------------------------------------------------------


@each_driver
def test_a_connect_that_asks_costs_no_round_trip_more(
    driver: str, vault: Vault, proxy: WireProxy
) -> None:
    counts = []
    for password in ("first", vault.password):
        proxy.reset()
        look(proxy.url(vault.url()), driver, password=password)
        counts.append((proxy.connections, proxy.startup_round_trips, proxy.round_trips))
    assert counts[0] == counts[1]
    assert counts[0][0] == 1


def test_the_url_of_the_engine_has_no_password_where_a_function_gives_it(vault: Vault) -> None:
    url = vault.url().replace("@", ":stale@")
    with Database(url, password=vault.password) as door:
        assert make_url(str(door.engine.url)).password is None
        with door.connect():
            pass
