"""What nobody leaves properly: generators dropped, loops closed over their tasks, Ctrl-C."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

import pytest
from scenario import backends, end_at_once, run, run_on, server, settled, until
from sqlalchemy import text
from sqlalchemy.engine import make_url

from engineroom import Database, DatabaseSessionManager
from engineroom.errors import PoolTimeout
from engineroom.scopes import finish
from engineroom.testing import WireProxy

every_loop = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


def at_work(url: str) -> list[Any]:
    """Ask which backends of the database run a statement, or sit in a transaction."""
    with server(url) as raw:
        return raw.execute(
            "SELECT pid, state, query FROM pg_stat_activity WHERE datname = %s"
            " AND backend_type = 'client backend' AND state <> 'idle'",
            [make_url(url).database],
        ).fetchall()


async def rows(manager: DatabaseSessionManager) -> AsyncGenerator[int]:
    async with manager.session() as db:
        await db.execute(text("SELECT 1"))
        yield 1
        yield 2


def dropped_generator(url: str, loop: str) -> None:
    manager = DatabaseSessionManager().init(url, pool_size=1, max_overflow=0)

    async def main() -> None:
        async for _ in rows(manager):
            break
        gc.collect()
        await asyncio.to_thread(until, lambda: at_work(url), lambda busy: not busy)
        # The server is done before its answer has been read here.
        await asyncio.to_thread(
            until, lambda: manager.stats().pools[0].lent, lambda lent: lent == 0
        )
        assert (await manager.check()).seconds > 0

    run_on(loop, main())


@every_loop
def test_a_generator_that_is_dropped_ends_its_scope(driver_url: str, loop: str) -> None:
    run(dropped_generator, driver_url, loop)


def kept_generator(url: str, loop: str) -> None:
    manager = DatabaseSessionManager().init(url, pool_size=1, max_overflow=0)
    kept = rows(manager)

    async def main() -> None:
        await anext(kept)

    run_on(loop, main())
    until(lambda: at_work(url), lambda busy: not busy)
    assert manager.stats().scopes == ()


@every_loop
def test_a_generator_that_is_kept_ends_with_its_loop(driver_url: str, loop: str) -> None:
    run(kept_generator, driver_url, loop)


def loop_closed_over_its_task(url: str) -> None:
    logging.getLogger("engineroom").addHandler(logging.NullHandler())  # `close()` names the scope
    manager = DatabaseSessionManager().init(url, pool_size=2, max_overflow=0)

    async def sleep() -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT pg_sleep(100)"))

    async def use() -> None:
        async with manager.session() as db:
            assert await db.scalar(text("SELECT 1")) == 1

    loop = asyncio.new_event_loop()
    loop.run_until_complete(use())  # the first connect of an engine is another matter
    task = loop.create_task(sleep())
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is the test

    async def wait_for_it() -> None:
        while not await asyncio.to_thread(at_work, url):
            await asyncio.sleep(0.01)

    loop.run_until_complete(wait_for_it())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()

    asyncio.run(use())
    until(lambda: at_work(url), lambda busy: not busy)
    started = time.monotonic()
    manager.sync.close(timeout=60)
    assert time.monotonic() - started < 30  # it did not wait for a task that will never run
    end_at_once()


def test_a_loop_closed_over_its_task_leaves_nothing_running(driver_url: str) -> None:
    run(loop_closed_over_its_task, driver_url)


def connect_cancelled(url: str, loop: str, how: str) -> None:
    """Struck where the server has the connection, and the client not yet."""
    gc.disable()
    kept = []  # as a log or a debugger keeps it, with all that its traceback leads to

    async def use(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))

    async def main(manager: DatabaseSessionManager) -> None:
        async with asyncio.timeout(None) as limit:
            task = asyncio.create_task(use(manager))
            while not await asyncio.to_thread(backends, url):
                assert not task.done()
                await asyncio.sleep(0.01)
            if how == "cancel":
                task.cancel()
            else:
                limit.reschedule(0)
            await task

    async def whole(proxy: WireProxy) -> None:
        manager = DatabaseSessionManager().init(proxy.url(url))
        try:
            await main(manager)
        except (asyncio.CancelledError, TimeoutError) as error:
            kept.append(error)
        proxy.delay = 0
        await asyncio.to_thread(settled, url)
        await manager.close()

    where = make_url(url)
    assert where.host is not None
    assert where.port is not None
    with WireProxy(where.host, where.port, delay=2) as proxy:
        run_on(loop, whole(proxy))
    assert len(kept) == 1


@pytest.mark.parametrize(
    ("driver_url", "loop", "how"),
    [
        ("asyncpg", "asyncio", "cancel"),
        ("psycopg", "uvloop", "timeout"),
        pytest.param("asyncpg", "uvloop", "timeout", marks=pytest.mark.soak),
        pytest.param("psycopg", "asyncio", "cancel", marks=pytest.mark.soak),
    ],
    indirect=["driver_url"],
)
def test_a_cancelled_connect_leaves_no_backend(driver_url: str, loop: str, how: str) -> None:
    run(connect_cancelled, driver_url, loop, how)


class SoftLimit(Exception):  # as Celery's, which a signal's handler raises
    pass


def raise_at_signal(kind: type[BaseException]) -> None:
    def handler(*_: object) -> None:
        raise kind

    signal.signal(signal.SIGINT, handler)


def press_at_work(url: str) -> None:
    """Send the signal once a statement runs on the server."""
    until(lambda: at_work(url), bool)
    os.kill(os.getpid(), signal.SIGINT)


def interrupted(url: str, what: str, how: str, pipeline: Literal["on", "off"]) -> None:
    kind: type[BaseException] = KeyboardInterrupt if what == "Ctrl-C" else SoftLimit

    def unit(door: Database) -> None:
        if how == "by hand":
            held = door.get_session()
            try:
                held.execute(text("SELECT pg_sleep(100)"))
            finally:
                held.close()
        else:
            with getattr(door, how)() as db:
                db.execute(text("SELECT pg_sleep(100)"))

    raise_at_signal(kind)
    with Database(url, pool_size=1, max_overflow=0, pipeline=pipeline) as door:
        threading.Thread(target=press_at_work, args=[url]).start()
        with pytest.raises(kind):
            unit(door)
        until(lambda: at_work(url), lambda busy: not busy)
        assert door.stats().pools[0].lent == 0
        assert door.check().seconds > 0


@pytest.mark.parametrize("pipeline", ["on", "off"])
@pytest.mark.parametrize("how", ["session", "reader", "by hand"])
@pytest.mark.parametrize("what", ["Ctrl-C", "limit"])
def test_a_signal_in_a_statement_leaves_nothing_running(
    what: str, how: str, pipeline: str, postgres_url: str
) -> None:
    run(interrupted, postgres_url.replace("://", "+psycopg://"), what, how, pipeline)


def caught(url: str, how: str, pipeline: Literal["on", "off"]) -> None:
    """What one does at a soft limit: note that the work has failed, in the same session."""

    raise_at_signal(SoftLimit)
    with Database(url, pool_size=1, max_overflow=0, pipeline=pipeline) as door:
        for _ in range(5):  # it may be lent again in the next moment, or after a while
            threading.Thread(target=press_at_work, args=[url]).start()
            with door.session() if how != "by hand" else door.get_session() as db:
                with pytest.raises(SoftLimit):
                    if how == "savepoint":
                        with db.begin_nested():
                            db.execute(text("SELECT pg_sleep(100)"))
                    db.execute(text("SELECT pg_sleep(100)"))
                db.rollback()
                assert db.scalar(text("SELECT 1")) == 1
        assert door.stats().pools[0].lent == 0


@pytest.mark.parametrize("pipeline", ["on", "off"])
@pytest.mark.parametrize("how", ["session", "savepoint", "by hand"])
def test_what_a_signal_raises_may_be_caught_and_the_session_used(
    how: str, pipeline: str, postgres_url: str
) -> None:
    run(caught, postgres_url.replace("://", "+psycopg://"), how, pipeline)


def interrupted_ping(url: str) -> None:
    raise_at_signal(SoftLimit)
    address: Any = make_url(url)
    with WireProxy(address.host, address.port) as proxy:
        door = Database(proxy.url(url), pool_size=1, max_overflow=0, pool_pre_ping=True)
        with door.session() as db:
            db.execute(text("SELECT 1"))
        time.sleep(0.01)  # at once, nobody would ask
        proxy.freeze()
        pressing = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        pressing.start()
        with pytest.raises(SoftLimit), door.session() as db:
            db.execute(text("SELECT 1"))
        proxy.thaw()
        with door.session() as db:
            db.execute(text("SELECT 1"))
        door.close()


def test_a_signal_while_a_connection_is_asked_whether_it_lives(postgres_url: str) -> None:
    """It is no answer of the server's: the work would go on as if nobody had struck."""
    run(interrupted_ping, postgres_url.replace("://", "+psycopg://"))


def interrupted_on_a_silent_server(url: str, what: str, pipeline: Literal["on", "off"]) -> float:
    kind: type[BaseException] = KeyboardInterrupt if what == "Ctrl-C" else SoftLimit

    raise_at_signal(kind)
    address: Any = make_url(url)
    with WireProxy(address.host, address.port) as proxy:
        door = Database(proxy.url(url), pool_size=1, max_overflow=0, pipeline=pipeline)
        with door.session() as db:
            db.execute(text("SELECT 1"))
        fault = proxy.freeze_before("BEGIN")
        pressed: list[float] = []

        def press() -> None:
            until(lambda: fault.happened, bool)
            time.sleep(0.1)
            pressed.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=press).start()
        with pytest.raises(kind), door.session() as db:
            db.execute(text("SELECT 1"))
        took = time.monotonic() - pressed[0]
        proxy.thaw()
        with door.session() as db:
            db.execute(text("SELECT 1"))
        door.close()
    return took


@pytest.mark.parametrize("pipeline", ["on", "off"])
@pytest.mark.parametrize("what", ["Ctrl-C", "limit"])
def test_a_signal_does_not_wait_for_a_silent_server(
    what: str, pipeline: str, postgres_url: str
) -> None:
    """Nor is BEGIN repeated for that: psycopg gives a cancel request 5 s, and the answer 5 more."""
    url = postgres_url.replace("://", "+psycopg://")
    assert run(interrupted_on_a_silent_server, url, what, pipeline) < 1 + 2


def interrupted_commit(url: str) -> None:
    def press() -> None:
        until(lambda: [row[1:] for row in at_work(url)], lambda busy: ("active", "COMMIT") in busy)
        os.kill(os.getpid(), signal.SIGINT)

    with Database(url, pool_size=1, max_overflow=0) as door:
        with door.session() as db:
            db.execute(
                text(
                    "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
                    " 'BEGIN PERFORM pg_sleep(100); RETURN NULL; END'"
                )
            )
            db.execute(text("CREATE TABLE t (id int)"))
            db.execute(
                text(
                    "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE"
                    " INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()"
                )
            )
        with pytest.raises(KeyboardInterrupt) as told, door.session() as db:
            db.execute(text("INSERT INTO t VALUES (1)"))
            threading.Thread(target=press).start()
        assert "whether the transaction was committed is unknown" in told.value.__notes__[0]


def test_ctrl_c_in_a_commit_says_that_its_outcome_is_unknown(postgres_url: str) -> None:
    run(interrupted_commit, postgres_url.replace("://", "+psycopg://"))


def interrupted_anywhere(url: str) -> None:
    """Ctrl-C at random moments, most of them outside of the database's own calls."""
    presses, pressed, at_work = 60, 0, False
    main_thread, over = threading.get_ident(), threading.Event()
    logging.disable()  # psycopg says that it lost a connection

    def press() -> None:
        while not over.wait(0.013):
            signal.pthread_kill(main_thread, signal.SIGINT)

    def struck(*_: object) -> None:
        if at_work:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, struck)
    with Database(url, pool_size=1, max_overflow=0, pool_timeout=20) as door:
        door.check()  # nothing is imported from here on
        sys.unraisablehook = lambda _: None  # those that strike in a callback of Python itself
        pressing = threading.Thread(target=press)
        pressing.start()
        while pressed < presses:
            at_work = True
            try:
                while True:
                    with door.session(read_only=True) as db:
                        db.execute(text("SELECT 1"))
            except PoolTimeout:
                raise
            except BaseException:  # Ctrl-C, or what SQLAlchemy makes of it midway
                at_work = False
                pressed += 1
        over.set()
        pressing.join()
        with door.session(read_only=True) as db:  # the whole capacity is there, if after a second
            assert db.scalar(text("SELECT 42")) == 42
        assert door.stats().pools[0].lent == 0


def test_ctrl_c_anywhere_costs_no_permit(url: str) -> None:
    run(interrupted_anywhere, url)


def interrupted_waiting(url: str) -> None:
    with Database(url, pool_size=1, max_overflow=0) as door:
        holds, done = threading.Event(), threading.Event()

        def hold() -> None:
            with door.session(read_only=True) as db:
                db.execute(text("SELECT 1"))
                holds.set()
                done.wait()

        def press() -> None:
            until(lambda: door.stats().pools[0].waiting, bool)
            os.kill(os.getpid(), signal.SIGINT)

        holder = threading.Thread(target=hold)
        holder.start()
        holds.wait()
        threading.Thread(target=press).start()
        try:
            with door.session(read_only=True) as db:
                db.execute(text("SELECT 1"))
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("Ctrl-C was lost")
        finally:
            done.set()
            holder.join()
        assert (door.stats().pools[0].lent, door.stats().pools[0].waiting) == (0, 0)
        with door.session(read_only=True) as db:
            assert db.scalar(text("SELECT 42")) == 42


def test_ctrl_c_in_the_queue_costs_no_permit(url: str) -> None:
    run(interrupted_waiting, url)


def interrupted_locked_out(url: str) -> None:
    with Database(url, pool_size=1, max_overflow=0) as door:
        door.check()
        stranger = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        stranger.execute("BEGIN IMMEDIATE")
        pressed = []

        def press() -> None:
            until(
                lambda: [holder for pool in door.stats().pools for holder in pool.holders],
                lambda held: any("BEGIN IMMEDIATE" in holder.doing for holder in held),
            )
            time.sleep(0.1)
            pressed.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=press).start()
        try:
            with door.session() as db:
                db.execute(text("SELECT 1"))
        except KeyboardInterrupt:
            assert time.monotonic() - pressed[0] < 5
        else:
            raise AssertionError("Ctrl-C was lost")
        stranger.close()
        assert not any(pool.lent for pool in door.stats().pools)
        with door.session() as db:
            assert db.scalar(text("PRAGMA busy_timeout")) == 30000


def test_ctrl_c_does_not_wait_for_the_lock_of_a_sqlite_file(sqlite_url: str) -> None:
    run(interrupted_locked_out, sqlite_url)


def struck_before_the_end(url: str) -> None:
    def strike(frame: Any, kind: str, argument: object) -> None:
        if frame.f_code is finish.__code__:
            sys.settrace(None)
            raise SoftLimit

    with Database(url, pool_size=1, max_overflow=0, pool_timeout=1) as database:
        kept = None
        try:
            with database.session() as db:
                db.execute(text("SELECT 1"))
                sys.settrace(strike)
        except SoftLimit as error:
            kept = error  # and with it the frames, and all that is in them
        assert kept is not None
        assert [pool.lent for pool in database.stats().pools] == [0]
        with database.session() as db:
            assert db.scalar(text("SELECT 1")) == 1


def test_a_signal_before_the_end_of_a_scope_lends_nothing_for_ever(postgres_url: str) -> None:
    run(struck_before_the_end, postgres_url)
