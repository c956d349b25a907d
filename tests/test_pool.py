"""An empty pool says who holds it, tells who would wait for ever, and grows when it pays."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from looking import look
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from engineroom import Database, DatabaseSessionManager
from engineroom.errors import (
    ConnectTimeout,
    InvalidOption,
    PoolDeadlock,
    PoolExhausted,
    PoolTimeout,
)
from engineroom.testing import PostgresServer

pytestmark = pytest.mark.filterwarnings("ignore::engineroom.SyncInAsyncWarning")

ONE: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}
FIVE: dict[str, Any] = {"pool_size": 5, "max_overflow": 0}


@contextmanager
def opened(url: str, **options: Any) -> Iterator[DatabaseSessionManager]:
    """A manager whose sync side is closed at the end; the async side belongs to a loop."""
    manager = DatabaseSessionManager().init(url, **options)
    try:
        yield manager
    finally:
        manager.sync.close(0)


# -- who holds it --------------------------------------------------------------------------------


def test_exhaustion_says_who_holds_since_when_from_which_line_and_what_it_does(
    driver_url: str,
) -> None:
    async def main() -> None:
        manager = DatabaseSessionManager().init(
            driver_url, pool_size=1, max_overflow=1, pool_timeout=2
        )
        ready = asyncio.Event()

        async def idle() -> None:
            async with manager.session() as db:
                await db.execute(text("SELECT 1"))
                await ready.wait()

        async def running() -> None:
            async with manager.session() as db:
                await db.execute(text("SELECT   pg_sleep(100),\n 'braces {}'"))

        lines = {
            function.__name__: function.__code__.co_firstlineno + 1 for function in (idle, running)
        }
        holders = [
            asyncio.create_task(idle(), name="idler"),
            asyncio.create_task(running(), name="runner"),
        ]

        def both_are_there() -> bool:
            doing = [holder.doing for pool in manager.stats().pools for holder in pool.holders]
            return (
                sum("pg_sleep" in words for words in doing) == 1
                and sum(words.startswith("idle in transaction") for words in doing) == 1
            )

        async with asyncio.timeout(20):
            while not both_are_there():
                await asyncio.sleep(0.01)
        with pytest.raises(PoolExhausted) as caught:
            await one(manager)
        error = caught.value
        assert (error.size, error.overflow, error.waiting) == (1, 1, 0)
        by_owner = {holder.owner: holder for holder in error.holders}
        assert set(by_owner) == {"task idler", "task runner"}
        for name, owner in (("idle", "task idler"), ("running", "task runner")):
            assert f"{__file__}:{lines[name]} in {name}" == by_owner[owner].where
            assert by_owner[owner].where in str(error)
            assert 0.1 < by_owner[owner].seconds < 60
        assert by_owner["task idler"].doing.startswith("idle in transaction for ")
        assert "running for " in by_owner["task runner"].doing
        assert by_owner["task runner"].doing.endswith("SELECT pg_sleep(100), 'braces {}'")
        ready.set()
        holders[1].cancel()
        await asyncio.wait(holders)
        await manager.close()

    asyncio.run(main())


async def one(manager: DatabaseSessionManager) -> Any:
    async with manager.session() as db:
        return await db.scalar(text("SELECT 1"))


def test_what_stands_alone_or_streams_is_not_called_idle_in_transaction(driver_url: str) -> None:
    def doing() -> str:
        (said,) = [holder.doing for pool in manager.stats().pools for holder in pool.holders]
        return said

    async def main() -> None:
        async with manager.connect(isolation_level="AUTOCOMMIT") as connection:
            await connection.execute(text("SELECT 1"))
            assert doing().startswith("idle for ")
        async with manager.session() as db:
            stream = await db.stream(text("SELECT *\n FROM generate_series(1, 10000)"))
            await anext(stream)
            assert doing().startswith("in a stream, or idle in transaction for ")
            assert doing().endswith(": SELECT * FROM generate_series(1, 10000)")
            await stream.close()
            await db.execute(text("SELECT 1"))
            assert doing().startswith("idle in transaction for ")
            await (await db.stream(text("SELECT 1"))).close()
            await db.rollback()
        async with manager.connect():  # over the same connection
            assert doing().startswith("idle in transaction for ")
        await manager.close()

    manager = DatabaseSessionManager().init(driver_url)
    with manager.sync_session() as db:
        rows = db.execute(text("SELECT 1"), execution_options={"yield_per": 10})
        assert doing().startswith("in a stream, or ")
        rows.close()
    asyncio.run(main())


def test_an_isolation_level_that_is_none_takes_no_connection(url: str) -> None:
    with opened(url, **ONE) as manager:
        for verb in ("session", "connect"):
            with (
                pytest.raises(InvalidOption, match="'FOO'.*SERIALIZABLE") as caught,
                getattr(manager.sync, verb)(isolation_level="FOO"),
            ):
                pass
            assert caught.value.__traceback__  # what it holds is held on to
            assert [pool.lent for pool in manager.stats().pools] == [0]
            with getattr(manager.sync, verb)(isolation_level="READ_UNCOMMITTED") as db:
                db.execute(text("SELECT 1"))  # as SQLAlchemy has it, too


def test_whoever_asked_the_engine_itself_is_named_too(url: str) -> None:
    with opened(url, **ONE, pool_timeout=0.2) as manager, manager.sync_engine.connect():
        with ThreadPoolExecutor() as threads, pytest.raises(PoolExhausted) as caught:
            threads.submit(manager.sync.create_all).result()
        (holder,) = caught.value.holders
        assert (holder.kind, holder.owner) == ("connection", "thread MainThread")
        assert __file__ in holder.where


# -- who would wait for ever ---------------------------------------------------------------------


def names_them_all(error: PoolDeadlock, count: int, function: str) -> bool:
    return (
        len(error.holders) == count
        and all(f"{__file__}:" in holder.where for holder in error.holders)
        and str(error).count(f" in {function},") == count
    )


def test_twenty_tasks_that_nest_two_sessions_are_served_or_told(driver_url: str) -> None:
    told: list[PoolDeadlock] = []

    async def main() -> None:
        manager = DatabaseSessionManager().init(driver_url, **FIVE, pool_timeout=30)

        async def nest() -> None:
            try:
                async with manager.session() as outer:
                    await outer.execute(text("SELECT 1"))
                    async with manager.session() as inner:
                        await inner.execute(text("SELECT 1"))
            except PoolDeadlock as error:
                told.append(error)

        started = time.monotonic()
        await asyncio.gather(*(nest() for _ in range(20)))
        assert time.monotonic() - started < 25  # no timeout has passed
        (pool,) = manager.stats().pools
        assert (pool.lent, pool.waiting) == (0, 0)
        await manager.close()

    asyncio.run(main())
    assert 0 < len(told) < 20
    assert all(names_them_all(error, 5, "nest") for error in told)


def test_twenty_threads_that_nest_two_sessions_are_served_or_told(postgres_url: str) -> None:
    told: list[PoolDeadlock] = []
    with opened(postgres_url, **FIVE, pool_timeout=30) as manager:

        def nest(_: int) -> None:
            try:
                with manager.sync_session() as outer:
                    outer.execute(text("SELECT 1"))
                    with manager.sync_session() as inner:
                        inner.execute(text("SELECT 1"))
            except PoolDeadlock as error:
                told.append(error)

        started = time.monotonic()
        with ThreadPoolExecutor(20) as threads:
            list(threads.map(nest, range(20)))
        assert time.monotonic() - started < 25
    assert len(told) < 20
    assert all(names_them_all(error, 5, "nest") for error in told)


def test_a_circle_over_both_sides_is_seen(postgres_url: str) -> None:
    """One task holds an asynchronous connection and stops the loop for a synchronous one."""

    async def main() -> None:
        with opened(postgres_url, **ONE, pool_timeout=30) as manager:
            async with manager.session() as first:
                await first.execute(text("SELECT 1"))
                inside = asyncio.Event()

                async def other() -> None:
                    with manager.sync_session() as db:
                        db.execute(text("SELECT 1"))
                        inside.set()
                        await one(manager)  # waits for what the first task holds

                waiting = asyncio.create_task(other())
                await inside.wait()
                while not any(pool.waiting for pool in manager.stats().pools):
                    await asyncio.sleep(0)
                with pytest.raises(PoolDeadlock) as caught, manager.sync_session() as db:
                    db.execute(text("SELECT 1"))
                assert len(caught.value.holders) == 2
            await waiting
            await manager.close()

    asyncio.run(main())


def test_a_loop_that_stands_still_is_part_of_the_circle(postgres_url: str) -> None:
    """The holder waits for no connection, but for the loop that waits for its connection."""

    async def main() -> None:
        with opened(postgres_url, **ONE, pool_timeout=30) as manager:
            inside, done = asyncio.Event(), asyncio.Event()

            async def holder() -> None:
                with manager.sync_session() as db:
                    db.execute(text("SELECT 1"))
                    inside.set()
                    await done.wait()

            holding = asyncio.create_task(holder(), name="sleeper")
            await inside.wait()
            with pytest.raises(PoolDeadlock, match="task sleeper"), manager.sync_session() as db:
                db.execute(text("SELECT 1"))
            done.set()
            await holding

    asyncio.run(main())


def test_a_circle_over_two_managers_is_seen(postgres_url: str) -> None:
    async def main() -> None:
        a = DatabaseSessionManager().init(postgres_url, **ONE, pool_timeout=30)
        b = DatabaseSessionManager().init(postgres_url, **ONE, pool_timeout=30)
        both_hold = asyncio.Barrier(2)

        async def nest(outer: DatabaseSessionManager, inner: DatabaseSessionManager) -> None:
            async with outer.session() as db:
                await db.execute(text("SELECT 1"))
                await both_hold.wait()
                await one(inner)

        results = await asyncio.gather(nest(a, b), nest(b, a), return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["NoneType", "PoolDeadlock"]
        await a.close()
        await b.close()

    asyncio.run(main())


def test_waiting_for_one_who_works_is_no_deadlock(postgres_url: str) -> None:
    async def main() -> None:
        manager = DatabaseSessionManager().init(postgres_url, pool_size=2, max_overflow=0)
        async with manager.session() as first:
            await first.execute(text("SELECT 1"))

            async def busy() -> None:
                async with manager.session() as db:
                    await db.execute(text("SELECT pg_sleep(0.3)"))

            working = asyncio.create_task(busy())
            await asyncio.sleep(0.1)
            assert await one(manager) == 1  # after `busy`, whose end it waited for
            await working
        await manager.close()

    asyncio.run(main())


async def a_child_runs_the_first_statement(
    manager: DatabaseSessionManager, other: DatabaseSessionManager
) -> None:
    """It is the parent's session all the same, and the parent is about to leave it."""
    async with manager.session() as db:

        async def child() -> int:
            await db.execute(text("SELECT 1"))
            return await one(manager)

        task = asyncio.create_task(child())
        while not manager.stats().pools or not manager.stats().pools[0].waiting:
            await asyncio.sleep(0.001)
    assert await task == 1


async def a_connection_is_handed_on(
    manager: DatabaseSessionManager, other: DatabaseSessionManager
) -> None:
    connection = await manager.engine.connect()

    async def use() -> None:
        while not manager.stats().pools[0].waiting:
            await asyncio.sleep(0.001)
        await connection.close()

    task = asyncio.create_task(use())
    assert await one(manager) == 1
    await task


async def the_holder_was_cancelled(
    manager: DatabaseSessionManager, other: DatabaseSessionManager
) -> None:
    """It does not know yet, and still stands in the queue."""

    async def nest() -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
            await one(other)

    async with other.session() as db:
        await db.execute(text("SELECT 1"))
        nested = asyncio.create_task(nest())
        while not other.stats().pools[0].waiting:
            await asyncio.sleep(0.001)
        nested.cancel()
        assert await one(manager) == 1


@pytest.mark.parametrize(
    "case",
    [a_child_runs_the_first_statement, a_connection_is_handed_on, the_holder_was_cancelled],
)
def test_no_false_alarm(postgres_url: str, case: Any) -> None:
    async def main() -> None:
        manager = DatabaseSessionManager().init(postgres_url, **ONE, pool_timeout=30)
        other = DatabaseSessionManager().init(postgres_url, **ONE, pool_timeout=30)
        async with asyncio.timeout(20):
            await case(manager, other)
        await other.close()
        await manager.close()

    asyncio.run(main())


def test_who_nests_is_told_though_a_helper_ran_the_first_statement(postgres_url: str) -> None:
    """On Python 3.11 `asyncio.wait_for` runs it in a task of its own."""

    async def main() -> None:
        manager = DatabaseSessionManager().init(postgres_url, **ONE, pool_timeout=30)
        async with manager.session() as db:
            await asyncio.create_task(db.execute(text("SELECT 1")))
            with pytest.raises(PoolDeadlock):
                await one(manager)
        await manager.close()

    asyncio.run(main())


def test_a_connection_of_a_scope_may_be_handed_on_between_threads(postgres_url: str) -> None:
    """A framework enters a generator in one thread of its pool, and uses it in another."""
    with opened(postgres_url, **ONE, pool_timeout=30) as manager, ThreadPoolExecutor(1) as others:

        @contextmanager
        def dependency() -> Iterator[Any]:
            with manager.sync.connect() as connection:
                yield connection

        entered = dependency()
        entered.__enter__()

        def use_and_leave() -> None:
            while not manager.stats().pools[0].waiting:
                time.sleep(0.01)
            time.sleep(0.5)  # long after an alarm would have come
            entered.__exit__(None, None, None)

        leaving = others.submit(use_and_leave)
        with manager.sync_session() as db:
            db.execute(text("SELECT 1"))
        leaving.result()


def test_a_thread_may_have_handed_on_what_it_took(postgres_url: str) -> None:
    """As frameworks do: a request's session is opened, used and closed in threads of a pool."""
    with opened(postgres_url, **ONE, pool_timeout=30) as manager, ThreadPoolExecutor(1) as others:
        session = manager.sync.get_session()
        session.execute(text("SELECT 1"))

        def close_it() -> None:
            while not manager.stats().pools[0].waiting:
                time.sleep(0.01)
            session.close()

        closing = others.submit(close_it)
        with manager.sync_session() as db:  # in the thread that "holds", and nobody is stuck
            assert db.scalar(text("SELECT 42")) == 42
        closing.result()


def test_a_session_without_a_scope_is_held_by_the_line_that_asked_for_it(postgres_url: str) -> None:
    with opened(postgres_url, **ONE, pool_timeout=0.2) as manager:

        def use() -> None:
            with manager.sync_session() as db:
                db.execute(text("SELECT 1"))

        session = manager.sync.get_session()
        session.execute(text("SELECT 1"))
        asked_at = sys._getframe().f_lineno - 2
        with ThreadPoolExecutor(1) as others, pytest.raises(PoolExhausted) as caught:
            others.submit(use).result()
        [holder] = caught.value.holders
        assert (holder.kind, holder.where.rpartition(" in ")[0]) == (
            "get_session",
            f"{__file__}:{asked_at}",
        )
        assert holder.doing.startswith("idle in transaction")
        session.close()
        with manager.sync_session() as db:  # the same connection is another's now
            db.execute(text("SELECT 1"))
            assert [one.kind for one in manager.stats().pools[0].holders] == ["session"]


# -- growth --------------------------------------------------------------------------------------


def connects_of_a_burst(url: str, seconds: float | None = None) -> int:
    """Count the connections that 50 callers at once open on a pool of 5 + 45.

    Each unit takes so many seconds; None: none ends before all of them have a connection.
    """
    opened_now = 0

    async def main() -> None:
        nonlocal opened_now
        manager = DatabaseSessionManager().init(url, pool_size=5, max_overflow=45, pool_timeout=60)
        all_have_one = asyncio.Barrier(50)

        @event.listens_for(manager.engine.sync_engine, "connect")
        def count(*_: object) -> None:
            nonlocal opened_now
            opened_now += 1

        async def unit() -> None:
            async with manager.session() as db:
                await db.execute(text(f"SELECT pg_sleep({seconds or 0})"))
                if seconds is None:
                    await all_have_one.wait()

        await asyncio.gather(*(unit() for _ in range(50)))
        await manager.close()

    asyncio.run(main())
    return opened_now


def test_a_burst_of_long_units_gets_a_connection_each(driver_url: str) -> None:
    assert connects_of_a_burst(driver_url) == 50


@pytest.mark.soak
def test_a_burst_of_short_units_opens_few_connections(driver_url: str) -> None:
    """It depends on what 10 ms are on this machine, so it is one for the long runs."""
    assert sorted(connects_of_a_burst(driver_url, 0.002) for _ in range(5))[2] <= 10


def test_the_least_number_of_connections_is_opened_beside_the_first_use(
    url: str, eventually: Callable[[Callable[[], object]], None]
) -> None:
    with Database(url, pool_min=3) as door:
        with door.session(read_only=True) as db:
            db.execute(text("SELECT 1"))
        eventually(lambda: door.stats().pools[0].idle == 3)


def test_the_least_number_of_connections_of_a_loop(driver_url: str) -> None:
    async def main() -> None:
        manager = DatabaseSessionManager().init(driver_url, pool_min=3)
        assert await one(manager) == 1
        async with asyncio.timeout(20):
            while manager.stats().pools[0].idle < 3:
                await asyncio.sleep(0.01)
        await manager.close()

    asyncio.run(main())


# -- the deadline --------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_the_deadline_covers_connecting(silent: int, driver: str) -> None:
    async def main() -> None:
        manager = DatabaseSessionManager().init(
            f"postgresql+{driver}://u:secret@127.0.0.1:{silent}/d", pool_timeout="500ms"
        )
        started = time.monotonic()
        results = await asyncio.gather(*(one(manager) for _ in range(3)), return_exceptions=True)
        assert time.monotonic() - started < 5
        assert [type(result) for result in results] == [ConnectTimeout] * 3
        assert all("within 0.5 s" in str(result) for result in results)
        assert isinstance(results[0], PoolTimeout)
        (pool,) = manager.stats().pools
        assert (pool.lent, pool.idle, pool.waiting) == (0, 0, 0)
        await manager.close()

    asyncio.run(main())


CONNECT = """
import sys, time
from engineroom import Database
with Database(sys.argv[1], pool_timeout=3) as door:
    door.engine  # imports its driver, which takes a while beside other tests
    started = time.monotonic()
    try:
        door.check()
    except Exception as error:
        print(time.monotonic() - started, type(error).__name__)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have other hosts in a namespace")
@pytest.mark.parametrize("scheme", ["postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql"])
def test_the_deadline_is_one_for_all_addresses_of_a_name(scheme: str, tmp_path: Path) -> None:
    addresses = [f"127.0.0.{number}" for number in (1, 2, 3)]
    (hosts := tmp_path / "hosts").write_text("\n".join(f"{one} several" for one in addresses))
    with ExitStack() as stack:
        first = stack.enter_context(socket.create_server((addresses[0], 0)))
        port = first.getsockname()[1]
        for address in addresses[1:]:
            stack.enter_context(socket.create_server((address, port)))
        shell = f'mount --bind {hosts} /etc/hosts && exec "$0" -c "$1" "$2"'
        done = subprocess.run(
            [
                *("unshare", "--mount", "sh", "-c", shell),
                *(sys.executable, CONNECT, f"{scheme}://u:secret@several:{port}/d"),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    seconds, error = done.stdout.split()
    assert error in {"ConnectTimeout", "DBAPIError", "OperationalError"}
    assert float(seconds) < 5


AT_EXIT = """
import atexit, sys
from sqlalchemy import text
from engineroom import Database
door = Database(sys.argv[1])
@atexit.register
def last():
    with door.session() as db:
        print(db.scalar(text("SELECT 42")))
    door.close()
"""


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_process_that_ends_may_still_connect_to_a_name(pg18: PostgresServer, driver: str) -> None:
    """Python 3.12.1 starts no thread there any more; 3.13 does."""
    url = pg18.url(driver=driver).replace("@127.0.0.1:", "@localhost:")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", AT_EXIT, url],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("42\n", "")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_the_deadline_covers_connecting_in_a_thread(silent: int, driver: str) -> None:
    """libpq counts whole seconds, and at least two of them."""
    url = f"postgresql+{driver}://u:secret@127.0.0.1:{silent}/d"
    with Database(url, pool_timeout=0.5) as door:
        started = time.monotonic()
        with pytest.raises(Exception, match="timeout"):
            door.check()
        assert time.monotonic() - started < 8


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg (async)"])
@pytest.mark.parametrize("target", ["any", "prefer-standby"])
def test_a_silent_host_leaves_time_for_the_next_one(
    silent: int, pg18: Any, driver: str, target: str
) -> None:
    hosts = pg18.url().replace("@", f"@127.0.0.1:{silent},")
    assert look(f"{hosts}?target_session_attrs={target}", driver, pool_timeout=6) == 1


@pytest.mark.parametrize(
    ("driver", "given"),
    [("asyncpg", "60"), ("psycopg (async)", "0"), ("psycopg", "0"), ("psycopg2", "60")],
)
def test_a_connect_timeout_that_is_longer_than_the_pools_does_not_count(
    silent: int, pg18: Any, driver: str, given: str
) -> None:
    """Nor does 0, which is no limit to libpq."""
    hosts = pg18.url().replace("@", f"@127.0.0.1:{silent},")
    started = time.monotonic()
    assert look(f"{hosts}?connect_timeout={given}", driver, pool_timeout=4) == 1
    assert time.monotonic() - started < 20


def test_addresses_without_a_name_are_tried_in_turn_as_well(silent: int, pg18: Any) -> None:
    place = f"hostaddr=127.0.0.1,127.0.0.1&port={silent},{pg18.port}"
    url = f"postgresql://postgres:{pg18.password}@/postgres?{place}"
    assert look(url, "psycopg (async)", pool_timeout=4) == 1


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_no_limit_on_connecting_is_the_pools(
    silent: int, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "0")
    with pytest.raises(OperationalError, match="timeout"):
        look(f"postgresql://u:secret@127.0.0.1:{silent}/d", driver, pool_timeout=2)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg (async)"])
def test_hosts_that_are_all_silent_are_a_timeout_of_the_pool(silent: int, driver: str) -> None:
    hosts = f"postgresql://u:secret@127.0.0.1:{silent},127.0.0.1:{silent}/d"
    with pytest.raises(ConnectTimeout):
        look(hosts, driver, pool_timeout=1)


# -- held for too long ---------------------------------------------------------------------------


def slow_lines(caplog: pytest.LogCaptureFixture, line: int) -> list[str]:
    """What was said of the scope in this line; any other may be slow too, where time is scarce."""
    said = [r.getMessage() for r in caplog.records if "DB_SLOW_CHECKOUT" in r.getMessage()]
    assert all(f"{__file__}:" in words for words in said)
    return [words for words in said if f"{__file__}:{line} in " in words]


def test_a_slow_checkout_is_reported_once_while_it_lasts(
    driver_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> int:
        manager = DatabaseSessionManager().init(driver_url, slow_checkout=0.1)
        async with manager.session() as db:
            line = sys._getframe().f_lineno - 1
            await db.execute(text("SELECT 1"))
            while not slow_lines(caplog, line):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.25)
        (said,) = slow_lines(caplog, line)
        assert f"{__file__}:{line} in main" in said
        assert "longer than 0.1 s" in said
        await one(manager)
        await manager.close()
        return line

    with caplog.at_level(logging.WARNING, "engineroom"):
        line = asyncio.run(main())
    assert len(slow_lines(caplog, line)) == 1


def test_a_slow_checkout_of_a_thread_is_reported(
    url: str, caplog: pytest.LogCaptureFixture, eventually: Callable[[Callable[[], object]], None]
) -> None:
    """Of SQLite when another one takes a connection, or at its own end: no thread looks before."""
    with opened(url, slow_checkout="50ms") as manager, caplog.at_level(logging.WARNING):
        with manager.sync.reader() as db:
            line = sys._getframe().f_lineno - 1
            db.execute(text("SELECT 1"))
            time.sleep(0.1)
            if url.startswith("postgresql"):  # the thread of the deadlines looks at this as well
                eventually(lambda: slow_lines(caplog, line))
            else:
                assert slow_lines(caplog, line) == []
            with manager.sync.reader() as other:
                other.execute(text("SELECT 1"))
            assert len(slow_lines(caplog, line)) == 1
        assert len(slow_lines(caplog, line)) == 1
        with manager.sync.reader() as db:
            line = sys._getframe().f_lineno - 1
            db.execute(text("SELECT 1"))
            time.sleep(0.1)
        assert len(slow_lines(caplog, line)) == 1


def test_who_fills_the_pool_is_not_slow(
    url: str, caplog: pytest.LogCaptureFixture, eventually: Callable[[Callable[[], object]], None]
) -> None:
    with opened(url, pool_min=3, slow_checkout="50ms") as manager:

        @event.listens_for(manager.sync_engine, "connect")
        def connect(*args: object) -> None:
            time.sleep(0.1)  # what was opened before is held meanwhile

        with caplog.at_level(logging.WARNING, "engineroom"):
            with manager.sync.session(read_only=True) as db:
                db.execute(text("SELECT 1"))
            eventually(lambda: manager.sync.stats().pools[0].idle == 3)
        assert [said for said in caplog.messages if "engineroom-fill" in said] == []


# -- the report ----------------------------------------------------------------------------------


def test_dump_prints_who_holds_and_who_waits(url: str) -> None:
    with opened(url, **ONE, pool_timeout=20) as manager, ThreadPoolExecutor() as threads:
        with manager.sync_session(read_only=True) as db:
            db.execute(text("SELECT 1"))

            def wait() -> None:
                with manager.sync_session(read_only=True) as other:
                    other.execute(text("SELECT 1"))

            waiting = threads.submit(wait)
            while not manager.stats().pools[0].waiting:
                time.sleep(0.01)
            file = io.StringIO()
            manager.dump(file)
            assert manager.stats().pools[0].holders[0].where in file.getvalue()
        waiting.result()
    said = file.getvalue()
    assert "1 of 1 + 0 lent, 0 idle, 1 waiting" in said
    assert "held by the session of thread MainThread, opened at" in said
    assert f" s, at {__file__}:" in said.partition("has waited for ")[2]


def test_a_signal_dumps_too(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with Database(url, dump_signal="SIGUSR1") as door, door.reader() as db:
            db.execute(text("SELECT 1"))
            signal.raise_signal(signal.SIGUSR1)
            assert "held by the reader of thread MainThread" in capfd.readouterr().err
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- ten thousand callers ------------------------------------------------------------------------


def test_who_gave_up_leaves_nothing_behind(postgres_url: str) -> None:
    async def main() -> None:
        manager = DatabaseSessionManager().init(postgres_url, **ONE, pool_timeout=2)
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
            tasks = weakref.WeakSet(asyncio.create_task(one(manager)) for _ in range(100))
            await asyncio.gather(*tasks, return_exceptions=True)
            assert manager.stats().pools[0].waiting == 0
            async with asyncio.timeout(10):
                while tasks:
                    await asyncio.sleep(0.01)
                    gc.collect()
        await manager.close()

    asyncio.run(main())


def test_a_loop_that_always_lags_grows_all_the_same(postgres_url: str) -> None:
    async def main() -> None:
        manager = DatabaseSessionManager().init(
            postgres_url, pool_size=1, max_overflow=2, pool_timeout=20
        )
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def lag() -> None:
            time.sleep(0.016)
            if not done.is_set():
                loop.call_soon(lag)

        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
            lag()
            holder = asyncio.create_task(hold(manager, done))
            assert await asyncio.wait_for(asyncio.create_task(one(manager)), 15) == 1
            done.set()
            await holder
        await manager.close()

    async def hold(manager: DatabaseSessionManager, done: asyncio.Event) -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
            await done.wait()

    asyncio.run(main())


def crowd(url: str, callers: int) -> None:
    """Half of them give up; the others are served in the order in which they came."""
    served: list[int] = []
    lent: list[int] = []
    connected: set[int] = set()

    async def main() -> None:
        manager = DatabaseSessionManager().init(url, **FIVE, pool_timeout=300)

        def number_of_task() -> int:
            task = asyncio.current_task()
            assert task is not None
            return int(task.get_name())

        def connects(*_: object) -> None:
            connected.add(number_of_task())

        def is_lent(*_: object) -> None:
            lent.append(number_of_task())

        async def call(number: int) -> None:
            async with manager.reader() as db:
                await db.execute(text("SELECT 1"))
                served.append(number)

        async with manager.reader() as db:
            core = db.get_bind().engine
        event.listen(core, "connect", connects)
        event.listen(core, "checkout", is_lent)
        tasks = [asyncio.create_task(call(n), name=str(n)) for n in range(callers)]
        await asyncio.sleep(0)
        for number, task in enumerate(tasks):
            if number % 2:
                asyncio.get_running_loop().call_later((number * 7919 % 1000) / 1000, task.cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        # (Who gives up at the end of his turn is served and cancelled.)
        stayed = {number for number, task in enumerate(tasks) if not task.cancelled()}
        assert stayed - set(served) == set()
        assert len(served) == len(set(served))
        (pool,) = manager.stats().pools
        assert (pool.lent, pool.waiting) == (0, 0)
        # Whoever came earlier got a connection earlier, but for those whose was opened anew after a
        # cancellation: meanwhile the others go on. And those who are woken together, up to five,
        # may change places; with those between them who give up, that is not twenty.
        # (`test_slots` has the exact order.)
        in_turn = [number for number in lent if number not in connected]
        overtaken = [
            number
            for place, number in enumerate(in_turn)
            if number < max(in_turn[:place], default=0) - 20
        ]
        assert overtaken == []
        event.remove(core, "connect", connects)
        event.remove(core, "checkout", is_lent)
        together = asyncio.Barrier(5)

        async def hold() -> None:
            async with manager.reader() as db:
                await db.execute(text("SELECT 1"))
                await asyncio.wait_for(together.wait(), 20)

        await asyncio.gather(*(hold() for _ in range(5)))  # the whole capacity is there
        await manager.close()

    asyncio.run(main())


def test_a_thousand_callers_of_whom_half_give_up(driver_url: str) -> None:
    crowd(driver_url, 1000)


@pytest.mark.soak
def test_ten_thousand_callers_of_whom_half_give_up(driver_url: str) -> None:
    crowd(driver_url, 10_000)


# A connection whose `checkin` failed cannot go back, and Python closes it: psycopg says so.
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_hook_that_raises_costs_no_connection(url: str) -> None:
    """At connect and at checkout: the permit comes back, and the pool is whole."""
    with opened(url, **ONE, pool_timeout=1) as manager:
        for name in ("connect", "checkout", "checkin"):
            broken = threading.Event()

            def hook(*_: object, broken: threading.Event = broken) -> None:
                if not broken.is_set():
                    broken.set()
                    raise ZeroDivisionError

            event.listen(manager.sync_engine, name, hook)
            manager.sync_engine.dispose()
            for _ in range(2):
                try:
                    manager.sync.create_all()
                except ZeroDivisionError:
                    continue
            event.remove(manager.sync_engine, name, hook)
            manager.sync.create_all()
            assert manager.stats().pools[0].lent == 0, name


@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_hook_that_raises_at_the_end_of_a_failed_scope_costs_no_connection(
    driver_url: str,
) -> None:
    """The error's traceback keeps alive what never went back: the garbage collector is too late."""

    def hook(*_: object) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        manager = DatabaseSessionManager().init(driver_url, **ONE, pool_timeout=5)
        event.listen(manager.engine.sync_engine, "checkin", hook)
        try:
            async with manager.session() as db:
                await db.execute(text("SELECT no_such_column"))
        except SQLAlchemyError as error:
            assert manager.stats().pools[0].lent == 0
            event.remove(manager.engine.sync_engine, "checkin", hook)
            assert await one(manager) == 1
            del error
        await manager.close()

    asyncio.run(main())


def test_whoever_comes_next_finds_what_another_has_lost(driver_url: str) -> None:
    """Though somebody has looked just before, and waits."""
    lose = threading.Event()

    def hook(*_: object) -> None:
        if lose.is_set():
            lose.clear()
            raise ZeroDivisionError

    async def main() -> None:
        manager = DatabaseSessionManager().init(driver_url, **ONE, pool_timeout=20)
        engine = manager.engine
        event.listen(engine.sync_engine, "checkin", hook)
        connection = await engine.connect()
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        first = asyncio.create_task(one(manager))
        while manager.stats().pools[0].waiting == 0:  # nothing announces it
            await asyncio.sleep(0)
        lose.set()
        with suppress(ZeroDivisionError):
            await connection.close()
        del connection
        async with asyncio.timeout(10):
            assert await asyncio.gather(first, *(one(manager) for _ in range(3))) == [1] * 4
        await manager.close()
        await driver.close()

    asyncio.run(main())
