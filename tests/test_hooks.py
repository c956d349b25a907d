"""Callbacks where the end of a scope is no clean one: cancelled, lost, forked, misused.

What is the same on both sides stands in `behaviour/test_after_commit`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
from scenario import Item, Model, fork, is_postgres, is_struck, run, server
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from engineroom import Database, DatabaseSessionManager, cancellation, hooks, on_commit, on_rollback
from engineroom.errors import AsyncCallback, SessionClosed, SessionInUse
from engineroom.testing import PostgresServer, WireProxy

LIMIT = 30  # seconds for what takes milliseconds

# A row in `lazy` has COMMIT sleep.
LAZY = """
    CREATE TABLE lazy (id int);
    CREATE FUNCTION nap() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN PERFORM pg_sleep(%s); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER nap AFTER INSERT ON lazy DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION nap()
"""
SLEEPY = text("INSERT INTO lazy VALUES (1)")

WAYS = ["end", "commit, and out", "commit, then rollback", "by hand", "begin", "begin, and on"]

on_each_side = pytest.mark.parametrize(
    ("side", "driver"),
    [("async", "asyncpg"), ("async", "psycopg"), ("sync", "psycopg"), ("sync", "psycopg2")],
)


@pytest.fixture
def lazy_url(request: pytest.FixtureRequest, pg18: PostgresServer, database: str) -> str:
    """The URL of a fresh database in which a COMMIT can take long."""
    pg18.execute(LAZY % 30, database)
    return pg18.url(database)


@pytest.fixture
def in_commit(
    pg18: PostgresServer, database: str, eventually: Callable[..., None]
) -> Callable[[], None]:
    """Wait until a backend of the database is in the middle of a COMMIT."""
    question = (
        f"SELECT pid FROM pg_stat_activity WHERE datname = '{database}' AND query ILIKE 'COMMIT%'"
        " AND state = 'active' AND wait_event = 'PgSleep'"
    )
    return lambda: eventually(lambda: pg18.execute(question))


def both(db: Any, calls: list[str], name: str) -> None:
    on_commit(db, partial(calls.append, f"+{name}"))
    on_rollback(db, partial(calls.append, f"-{name}"))


def sleep_in_commit(door: Any, way: str, calls: list[str], error: type[BaseException]) -> None:
    """Come to a COMMIT that does not answer; then go on as this way does."""
    with door.session() as db:
        both(db, calls, "a")
        with db.begin_nested():
            both(db, calls, "b")
        if way.startswith("begin"):
            db.rollback()
            calls.clear()
            both(db, calls, "c")
            try:
                with db.begin():
                    both(db, calls, "d")
                    db.execute(SLEEPY)
            except error:
                if way == "begin":
                    raise
        else:
            db.execute(SLEEPY)
        if way == "by hand":
            db.get_transaction().commit()
        if way == "commit, and out":
            db.commit()
        if way == "commit, then rollback":
            try:
                db.commit()
            except error:
                pass
            db.rollback()
        if way in {"commit, then rollback", "begin, and on"}:
            assert calls == []
            both(db, calls, "next")


async def sleep_in_commit_async(
    door: Any, way: str, calls: list[str], error: type[BaseException]
) -> None:
    async with door.session() as db:
        both(db, calls, "a")
        async with db.begin_nested():
            both(db, calls, "b")
        if way.startswith("begin"):
            await db.rollback()
            calls.clear()
            both(db, calls, "c")
            try:
                async with db.begin():
                    both(db, calls, "d")
                    await db.execute(SLEEPY)
            except error:
                if way == "begin":
                    raise
        else:
            await db.execute(SLEEPY)
        if way == "by hand":
            await db.get_transaction().commit()
        if way == "commit, and out":
            await db.commit()
        if way == "commit, then rollback":
            try:
                await db.commit()
            except error:
                pass
            await db.rollback()
        if way in {"commit, then rollback", "begin, and on"}:
            assert calls == []
            both(db, calls, "next")


# --- the outcome of a COMMIT is unknown -----------------------------------------------------------


@on_each_side
@pytest.mark.parametrize("way", WAYS)
def test_a_connection_that_is_lost_in_commit_calls_nothing(
    side: str, driver: str, way: str, proxy: WireProxy, lazy_url: str, in_commit: Any
) -> None:
    calls: list[str] = []
    url = proxy.url(lazy_url).replace("postgresql:", f"postgresql+{driver}:")

    def cut() -> None:
        in_commit()
        proxy.cut()

    def work() -> None:
        if side == "sync":
            with Database(url) as door:
                sleep_in_commit(door, way, calls, DBAPIError)
        else:
            asyncio.run(work_async())

    async def work_async() -> None:
        async with DatabaseSessionManager().init(url) as door, asyncio.timeout(LIMIT):
            await sleep_in_commit_async(door, way, calls, DBAPIError)

    cutter = threading.Thread(target=cut)
    cutter.start()
    if way in {"commit, then rollback", "begin, and on"}:
        work()
        assert calls == ["+next"]
    else:
        with pytest.raises(DBAPIError):
            work()
        assert calls == []
    cutter.join()


@pytest.mark.anyio
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_cancelled_commit_calls_nothing(
    driver: str, way: str, lazy_url: str, in_commit: Any
) -> None:
    calls: list[str] = []
    url = lazy_url.replace("postgresql:", f"postgresql+{driver}:")
    async with DatabaseSessionManager().init(url) as door, asyncio.timeout(LIMIT):
        unit = sleep_in_commit_async(door, way, calls, asyncio.CancelledError)
        task = asyncio.create_task(unit)
        await asyncio.to_thread(in_commit)
        task.cancel()
        await asyncio.wait([task])
        if way in {"commit, then rollback", "begin, and on"}:
            assert calls == ["+next"]
        else:
            assert task.cancelled()
            assert calls == []


class SoftLimit(Exception):  # as Celery's, which a signal's handler raises
    pass


KINDS: dict[str, type[BaseException]] = {"Ctrl-C": KeyboardInterrupt, "limit": SoftLimit}


def interrupted_in_commit(url: str, way: str, what: str) -> list[str]:
    calls: list[str] = []
    kind = KINDS[what]

    def handler(*_: object) -> None:
        raise kind

    def interrupt() -> None:
        question = (
            "SELECT 1 FROM pg_stat_activity WHERE query ILIKE 'COMMIT%' AND wait_event = 'PgSleep'"
        )
        with server(url) as raw:
            while not raw.execute(question).fetchall():
                pass
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    signal.signal(signal.SIGINT, handler)
    thread = threading.Thread(target=interrupt)
    with Database(url) as door:
        thread.start()
        try:
            sleep_in_commit(door, way, calls, kind)
        except kind as error:
            calls.append("interrupted: " + error.__notes__[0])
    thread.join()
    return calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_commit_that_a_signal_interrupts_calls_nothing(
    way: str, kind: str, lazy_url: str
) -> None:
    url = lazy_url.replace("postgresql:", "postgresql+psycopg:")
    calls = run(interrupted_in_commit, url, way, kind)
    if way in {"commit, then rollback", "begin, and on"}:
        assert calls == ["+next"]
    else:
        [told] = calls
        assert told.startswith("interrupted: ")
        assert "whether the transaction was committed is unknown" in told


def struck_at_each_line_of_the_hooks(url: str, ends: str) -> int:
    calls: list[str] = []

    def unit() -> None:
        with suppress(SoftLimit), door.session() as db:
            both(db, calls, "a")
            db.execute(text("SELECT 1"))
            if ends == "raises":
                raise SoftLimit

    step = 1
    with Database(url) as door:
        while is_struck(step, unit, (hooks.__file__,)):
            assert len(calls) == len(set(calls)), f"{calls} at line {step}"
            calls.clear()
            step += 1
    return step


@pytest.mark.parametrize("ends", ["commits", "raises"])
def test_a_signal_at_any_line_calls_none_twice(sqlite_url: str, ends: str) -> None:
    assert run(struck_at_each_line_of_the_hooks, sqlite_url, ends) > 20


def test_an_error_of_another_sessions_commit_is_no_doubt_here(
    proxy: WireProxy, lazy_url: str, in_commit: Any, pg18: PostgresServer
) -> None:
    """The outer session is surely rolled back, and so is one that its handler opens."""
    calls: list[str] = []
    with Database(proxy.url(lazy_url)) as door, Database(lazy_url) as steady:
        cutter = threading.Thread(target=lambda: (in_commit(), proxy.cut()))
        cutter.start()
        with pytest.raises(DBAPIError), steady.session() as outer:
            both(outer, calls, "outer")
            outer.execute(text("SELECT 1"))
            try:
                sleep_in_commit(door, "end", [], DBAPIError)
            except DBAPIError:
                handler = steady.get_session()
                both(handler, calls, "handler")
                handler.execute(text("SELECT 1"))
                handler.rollback()
                handler.close()
                raise
        cutter.join()
    assert calls == ["-handler", "-outer"]


def test_a_connection_that_is_lost_before_commit_is_a_rollback(
    proxy: WireProxy, postgres_url: str
) -> None:
    calls: list[str] = []
    with Database(proxy.url(postgres_url), metadata=Model.metadata) as door:
        door.create_all()
        for way in ("statement", "flush", "begin"):
            with pytest.raises(DBAPIError), door.session() as db:
                both(db, calls, way)
                if way == "begin":
                    with db.begin():
                        db.execute(text("SELECT 1"))
                        proxy.cut()
                        db.execute(text("SELECT 1"))
                db.execute(text("SELECT 1"))
                proxy.cut()
                db.add(Item(id=1))
                if way == "statement":
                    db.execute(text("SELECT 1"))
    assert calls == ["-statement", "-flush", "-begin"]


# --- cancelled while callbacks run ----------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.both_loops
@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancellation_waits_for_all_callbacks(url: str, middle: bool, times: int) -> None:
    calls: list[str] = []
    started, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        calls.append("slow begins")
        started.set()
        await go_on.wait()
        calls.append("slow ends")

    async def quick() -> None:
        await asyncio.sleep(0)
        calls.append("quick")

    async def work(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
            on_commit(db, slow)
            on_commit(db, quick)
            on_commit(db, partial(calls.append, "plain"))
            if middle:
                await db.commit()
        calls.append("never")

    async with DatabaseSessionManager().init(url) as manager, asyncio.timeout(LIMIT):
        task = asyncio.create_task(work(manager))
        await started.wait()
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait([task])
        assert task.cancelled()
        assert calls == ["slow begins", "slow ends", "quick", "plain"]
        assert manager.stats().scopes == ()
        assert [pool.lent for pool in manager.stats().pools] == [0]


@pytest.mark.anyio
async def test_after_a_cancellation_each_has_a_limited_time(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or one that hangs would hold up the end of the process."""
    monkeypatch.setattr(cancellation, "SETTLE_LIMIT", 0.1)
    monkeypatch.setattr(hooks, "SETTLE_LIMIT", 0.1)
    calls: list[str] = []
    started = asyncio.Event()

    async def hangs() -> None:
        started.set()
        await asyncio.Event().wait()

    async def work(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            on_commit(db, hangs)
            on_commit(db, hangs)
            on_commit(db, partial(calls.append, "last"))

    async with DatabaseSessionManager().init(sqlite_url) as manager, asyncio.timeout(LIMIT):
        task = asyncio.create_task(work(manager))
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    assert calls == ["last"]
    assert caplog.text.count("on_commit callback registered at") == 2


@pytest.mark.anyio
async def test_a_cancellation_after_the_commit_changes_nothing(
    postgres_url: str, proxy: WireProxy
) -> None:
    """Struck while its connection is closed: what was committed stays, and is told."""
    calls: list[str] = []
    closing = asyncio.Event()
    async with DatabaseSessionManager().init(postgres_url) as manager, asyncio.timeout(LIMIT):
        async with manager.session() as db:
            await db.execute(text("SELECT 1"))
        (shelf,) = manager.engine.pool.shelves.values()
        shelf.ended = True  # what comes back is closed
        shelf_close = type(shelf)._close

        def close(self: Any, record: Any) -> None:
            closing.set()
            shelf_close(self, record)

        type(shelf)._close = close
        try:

            async def work() -> None:
                async with manager.session() as db:
                    await db.execute(text("SELECT 1"))
                    both(db, calls, "a")

            task = asyncio.create_task(work())
            await closing.wait()
            task.cancel()
            await asyncio.wait([task])
        finally:
            type(shelf)._close = shelf_close
        assert task.cancelled()
        assert calls == ["+a"]


# --- coroutine functions in a synchronous scope ---------------------------------------------------


async def job() -> None:
    """Never run."""


class Job:
    async def method(self) -> None: ...

    async def __call__(self) -> None: ...

    @staticmethod
    async def static() -> None: ...


ASYNC = {
    "function": job,
    "method": Job().method,
    "static method": Job.static,
    "callable object": Job(),
    "partial": partial(job),
    "partial of a partial": partial(partial(Job().method)),
    "partial of an object": partial(Job()),
    "lambda": None,
}


@pytest.mark.parametrize("name", ASYNC)
def test_a_coroutine_function_in_a_synchronous_scope(
    sqlite_url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    with Database(sqlite_url) as door, door.session() as db:
        if name == "lambda":
            on_commit(db, lambda run=job: run())
            on_commit(db, partial(calls.append, "next"))
        else:
            for register in (on_commit, on_rollback):
                with pytest.raises(AsyncCallback, match=r"test_hooks.py:\d+ in test_a_coroutine"):
                    register(db, ASYNC[name])
    gc.collect()  # (and no warning that it was never awaited)
    if name == "lambda":
        assert "on_commit callback registered at" in caplog.text
        assert "test_hooks.py" in caplog.text
        assert "returned a coroutine, which nobody awaits" in caplog.text
        assert calls == ["next"]


@pytest.mark.parametrize("plain", [print, int, partial(int, "7"), [].clear, Item, lambda: None])
def test_what_is_no_coroutine_function(plain: Any) -> None:
    assert not hooks.is_coroutine_function(plain)


@pytest.mark.anyio
@pytest.mark.parametrize("name", [name for name in ASYNC if name != "lambda"])
async def test_in_an_asynchronous_scope_each_of_them_is_awaited(sqlite_url: str, name: str) -> None:
    assert hooks.is_coroutine_function(ASYNC[name])
    async with DatabaseSessionManager().init(sqlite_url) as manager:
        async with manager.session() as db:
            on_commit(db, ASYNC[name])
            on_commit(db, asyncio.get_running_loop().create_future().cancel)
            await db.run_sync(lambda session: on_commit(session, ASYNC[name]))


# --- a forked child -------------------------------------------------------------------------------


def forked(url: str) -> list[str]:
    calls: list[str] = []
    door = Database(url)
    loose = door.get_session()
    both(loose, calls, "loose")
    loose.execute(text("SELECT 1"))
    loose.rollback() if not is_postgres(url) else None  # SQLite carries no transaction across
    calls.clear()
    with door.session() as db:
        both(db, calls, "scope")
        if is_postgres(url):
            db.execute(text("SELECT 1"))

        def child() -> None:
            for inherited in (db, loose):
                with suppress(DBAPIError):  # the parent's connection is not there any more
                    inherited.close()
            assert calls == []
            with door.session() as own:
                both(own, calls, "own")
            assert calls == ["+own"]

        fork(child)()
        fork(lambda: None, "return")()  # the child's SystemExit passes through this `with`
        assert calls == []
    loose.close()
    door.close()
    return calls


def test_what_a_parent_registered_is_not_called_in_its_child(url: str) -> None:
    calls = run(forked, url)
    assert calls == (["+scope", "-loose"] if is_postgres(url) else ["+scope"])


def quiet_child(url: str) -> list[str]:
    """Leave the scope in the child by SystemExit, and say what was called there."""
    door = Database(url)
    read, write = os.pipe()
    with door.session() as db:
        for register in (on_commit, on_rollback):
            register(db, lambda: os.write(write, f"{os.getpid()};".encode()))
        if os.fork() == 0:
            sys.exit(0)
        os.wait()
    door.close()
    os.close(write)
    return [pid for pid in os.read(read, 1000).decode().split(";") if pid != str(os.getpid())][:-1]


def test_a_scope_that_ends_in_a_child_calls_nothing_there(url: str) -> None:
    assert run(quiet_child, url) == []


# --- threads --------------------------------------------------------------------------------------


def test_a_dependency_that_is_entered_used_and_left_in_three_threads(url: str) -> None:
    """As a framework's thread pool does it; each with the transaction of the others."""
    calls: list[str] = []

    def here(name: str) -> None:
        calls.append(f"{name} in {threading.current_thread().name}")

    with Database(url, metadata=Model.metadata, pool_size=1, max_overflow=0) as door:
        door.create_all()

        @contextmanager
        def dependency() -> Any:
            with door.session() as db:
                yield db

        def enter() -> Any:
            db = given.__enter__()
            on_commit(db, partial(here, "commit"))
            on_rollback(db, partial(here, "rollback"))
            return db

        def use() -> None:
            db.add(Item(id=1))
            db.flush()

        def leave(*error: Any) -> Any:
            return given.__exit__(*error)

        executors = [ThreadPoolExecutor(1, f"{name}") for name in ("enters", "uses", "leaves")]
        for error in ((None, None, None), (KeyError, KeyError("mine"), None)):
            given = dependency()
            db = executors[0].submit(enter).result()
            if error[0] is None:
                executors[1].submit(use).result()
                executors[2].submit(leave, *error).result()
            else:
                executors[1].submit(db.delete, db.get(Item, 1)).result()
                executors[1].submit(db.flush).result()
                assert not executors[2].submit(leave, *error).result()  # the error goes on
            assert door.stats().scopes == ()
            assert [pool.lent for pool in door.stats().pools] == [0]
        with door.session() as db:
            assert db.get(Item, 1) is not None
        for executor in executors:
            executor.shutdown()
    assert calls == ["commit in leaves_0", "rollback in leaves_0"]


THREAD_USES: dict[str, Callable[[Any], Any]] = {
    "execute": lambda db: db.execute(text("SELECT 1")),
    "flush": lambda db: (db.add(Item(id=7)), db.flush()),
    "commit": lambda db: db.commit(),
    "rollback": lambda db: db.rollback(),
    "close": lambda db: db.close(),
}


@pytest.mark.parametrize("use", THREAD_USES)
@pytest.mark.parametrize("end", ["commit", "scope"])
def test_an_overlap_in_the_middle_of_commit(
    pg18: PostgresServer, database: str, in_commit: Any, use: str, end: str
) -> None:
    """The thread that commits goes on; the other one is told, or finds the session ended."""
    pg18.execute(LAZY % 2, database)
    caught: list[BaseException] = []
    with Database(pg18.url(database)) as door:

        def intrude() -> None:
            in_commit()
            try:
                THREAD_USES[use](session)
            except BaseException as error:
                caught.append(error)

        with door.session() as session:
            session.execute(SLEEPY)
            thread = threading.Thread(target=intrude, name="intruder")
            thread.start()
            if end == "commit":
                session.commit()
                thread.join()
        thread.join()
        with door.reader() as db:
            assert db.scalar(text("SELECT count(*) FROM lazy")) == 1
        assert [type(error) for error in caught] in ([SessionInUse], [SessionClosed])


# -- a callback that ends the process --------------------------------------------------------------


@pytest.mark.parametrize("side", ["sync", "async"])
def test_a_callback_that_exits_lets_the_others_run(side: str, sqlite_url: str) -> None:
    called: list[str] = []

    def register(session: Any) -> None:
        on_commit(session, partial(sys.exit, 3))
        on_commit(session, lambda: called.append("the next"))

    async def main() -> None:
        manager = DatabaseSessionManager()
        manager.init(sqlite_url)
        try:
            async with manager.session() as session:
                register(session)
        finally:
            await manager.close()

    with pytest.raises(SystemExit, match="3"):
        if side == "async":
            asyncio.run(main())
        with Database(sqlite_url) as db, db.session() as session:
            register(session)
    assert called == ["the next"]


AFTER_COMMIT = "after COMMIT: what was committed stays committed"


@pytest.mark.parametrize("way", ["end", "commit"])
@pytest.mark.parametrize("kind", ["commit", "rollback"])
def test_a_timeout_that_strikes_the_callbacks_says_that_all_is_committed(
    way: str, kind: str, postgres_url: str
) -> None:
    async def main() -> BaseException | None:
        limit = asyncio.timeout(None)

        async def publish() -> None:
            limit.reschedule(asyncio.get_running_loop().time())
            await asyncio.sleep(30)

        register = on_commit if kind == "commit" else on_rollback
        async with DatabaseSessionManager().init(postgres_url) as manager:
            with pytest.raises(TimeoutError) as caught:
                async with limit, manager.session() as db:
                    await db.execute(text("SELECT 1"))
                    register(db, publish)
                    if way == "commit":
                        await (db.commit() if kind == "commit" else db.rollback())
                    elif kind == "rollback":
                        raise TimeoutError
        return caught.value.__cause__ or caught.value.__context__

    notes = getattr(asyncio.run(main()), "__notes__", [])
    assert any(AFTER_COMMIT in note for note in notes) == (kind == "commit")


def struck_in_a_callback(url: str) -> None:
    def callback() -> None:
        signal.raise_signal(signal.SIGINT)

    with Database(url) as door, pytest.raises(KeyboardInterrupt) as caught, door.session() as db:
        db.execute(text("SELECT 1"))
        on_commit(db, callback)
    assert AFTER_COMMIT in caught.value.__notes__[0]


def test_ctrl_c_in_a_callback_says_that_all_is_committed(postgres_url: str) -> None:
    run(struck_in_a_callback, postgres_url.replace("://", "+psycopg://"))
