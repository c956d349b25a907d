"""Guarantee 10: SQLite keeps its word: foreign keys, real BEGIN, WAL, one shared `:memory:`."""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scenario import LOOPS, Item, Model, fork, held, in_threads, run, run_on, until
from sqlalchemy import ForeignKey, delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from engineroom import Database, DatabaseSessionManager
from engineroom.errors import SessionInUse

EACH = [25, *(pytest.param(each, marks=pytest.mark.soak) for each in (100, 500))]


class Part(Model):
    """A row that belongs to another."""

    __tablename__ = "part"
    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey(Item.id))


class Deferring(DeclarativeBase):
    """Apart: MySQL, for whose tests the others serve too, defers nothing."""


class Late(Deferring):
    """A row that belongs to another, which SQLite looks at when it commits."""

    __tablename__ = "late"
    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey(Item.id, deferrable=True, initially="DEFERRED"))


def opened(url: str, **options: Any) -> DatabaseSessionManager:
    manager = DatabaseSessionManager().init(url, metadata=Model.metadata, **options)
    manager.sync.create_all()
    manager.sync.create_all(Deferring.metadata)
    return manager


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, sqlite_url: str) -> str:
    return sqlite_url if request.param == "file" else "sqlite://"


INCREMENT = update(Item).where(Item.id == 0).values(value=Item.value + 1)


def read_and_write(database: Database) -> None:
    """Count up as people do: read, then write what was read and one more."""
    with database.session() as db:
        item = db.get(Item, 0)
        assert item is not None
        item.value += 1


async def read_and_write_async(manager: DatabaseSessionManager) -> None:
    async with manager.session() as db:
        item = await db.get(Item, 0)
        assert item is not None
        item.value += 1


def count(manager: DatabaseSessionManager) -> int:
    with manager.sync.reader() as db:
        return db.scalars(select(Item.value).where(Item.id == 0)).one()


# -- foreign keys ------------------------------------------------------------------------------


def test_foreign_keys_are_enforced(url: str) -> None:
    async def main(manager: DatabaseSessionManager) -> None:
        for verb in (manager.session, manager.connect):
            with pytest.raises(IntegrityError, match="FOREIGN KEY"):
                async with verb() as db:
                    await db.execute(insert(Part).values(id=1, item_id=404))
        with pytest.raises(IntegrityError, match="FOREIGN KEY"):
            async with manager.session() as db:
                await db.execute(delete(Item))
        async with manager.reader() as db:
            assert (await db.scalars(select(Part.id))).all() == [7]
        await manager.close()

    manager = opened(url)
    with manager.sync_session() as db:
        db.add(Item(id=1))
        db.flush()
        db.add(Part(id=7, item_id=1))
    for verb in (manager.sync.session, manager.sync.connect):
        with pytest.raises(IntegrityError, match="FOREIGN KEY"), verb() as db:
            db.execute(insert(Part).values(id=1, item_id=404))
    asyncio.run(main(manager))


@pytest.mark.parametrize("verb", ["session", "connect"])
def test_a_commit_that_fails_leaves_no_transaction_open(url: str, verb: str) -> None:
    """SQLite stays in it, and the next writer would wait for a lock that nobody holds."""
    manager = opened(url, busy_timeout=0.5, pool_size=2)
    orphan = insert(Late).values(id=1, item_id=404)
    kept = []

    def write(number: int) -> None:
        with manager.sync_session() as db:
            db.add(Item(id=number))

    def fail() -> None:
        with pytest.raises(IntegrityError, match="FOREIGN KEY") as caught:
            with getattr(manager.sync, verb)() as db:
                db.execute(orphan)
        kept.append(caught.value)

    async def main() -> None:
        for number in (3, 4):
            with pytest.raises(IntegrityError, match="FOREIGN KEY") as caught:
                async with getattr(manager, verb)() as db:
                    await db.execute(orphan)
            kept.append(caught.value)
            async with manager.session() as db:
                db.add(Item(id=number))
            await asyncio.to_thread(write, number + 10)
        async with manager.reader() as db:
            seen = list(await db.scalars(select(Item.id).order_by(Item.id)))
            assert seen == [1, 2, 3, 4, 13, 14]
            assert (await db.scalars(select(Late.id))).all() == []
        await manager.close()

    for number in (1, 2):
        fail()
        write(number)
    fail()
    asyncio.run(main())
    assert len(kept) == 5


# -- no lost update, no "locked" ---------------------------------------------------------------


def starter(url: str, together: Any, each: int) -> None:
    """Create the tables with the others, then count up, on both sides in turn."""
    logging.getLogger("engineroom").setLevel(logging.ERROR)  # that one waits for the schema's lock
    together.wait()
    manager = opened(url)
    with manager.sync_session() as db:
        db.execute(text("INSERT INTO item (id, value) VALUES (0, 0) ON CONFLICT DO NOTHING"))

    async def half() -> None:
        await asyncio.gather(*(read_and_write_async(manager) for _ in range(each // 2)))
        await manager.close()

    for _ in range(each - each // 2):
        read_and_write(manager.sync)
    asyncio.run(half())


def eight_processes(url: str, each: int) -> int:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(8)
    processes = [context.Process(target=starter, args=(url, together, each)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    manager = opened(url)
    counted = count(manager)
    manager.sync.close()
    return counted


@pytest.mark.parametrize("each", EACH)
def test_eight_processes_start_at_once_on_a_new_file_and_lose_no_increment(
    sqlite_url: str, each: int
) -> None:
    assert run(eight_processes, sqlite_url, each, deadline=110) == 8 * each


def threads_and_tasks(url: str) -> None:
    manager = opened(url)
    with manager.sync_session() as db:
        db.add(Item(id=0))

    async def tasks() -> None:
        await asyncio.gather(*(read_and_write_async(manager) for _ in range(50)))

    def work(number: int) -> None:
        if number % 2:
            asyncio.run(tasks())
        else:
            for _ in range(50):
                read_and_write(manager.sync)

    in_threads(6, work)
    assert count(manager) == 6 * 50
    manager.sync.close()


def test_threads_and_tasks_of_both_sides_write_at_once(url: str) -> None:
    run(threads_and_tasks, url)


# -- transactions ------------------------------------------------------------------------------


def test_the_journal_is_wal(sqlite_url: str) -> None:
    manager = opened(sqlite_url)

    async def mode() -> Any:
        async with manager.reader() as db:
            found = await db.scalar(text("PRAGMA journal_mode"))
        await manager.close()
        return found

    with manager.sync.reader() as db:
        assert db.scalar(text("PRAGMA journal_mode")) == "wal"
    assert asyncio.run(mode()) == "wal"


def test_savepoints_roll_back(url: str) -> None:
    manager = opened(url)

    with manager.sync_session() as db:
        db.add(Item(id=1))
        db.flush()
        with pytest.raises(KeyError), db.begin_nested():
            db.add(Item(id=2))
            db.flush()
            raise KeyError
        with db.begin_nested():
            db.add(Item(id=3))
            db.flush()
            with pytest.raises(KeyError), db.begin_nested():
                db.add(Item(id=4))
                db.flush()
                raise KeyError
        with pytest.raises(KeyError), db.begin_nested():
            with db.begin_nested():
                db.add(Item(id=5))
            raise KeyError

    async def main() -> list[int]:
        async with manager.session() as db:
            with pytest.raises(KeyError):
                async with db.begin_nested():
                    db.add(Item(id=6))
                    await db.flush()
                    raise KeyError
            async with db.begin_nested():
                db.add(Item(id=7))
        with pytest.raises(KeyError):
            async with manager.session() as db:
                async with db.begin_nested():
                    db.add(Item(id=8))
                raise KeyError
        async with manager.reader() as db:
            ids = list(await db.scalars(select(Item.id).order_by(Item.id)))
        await manager.close()
        return ids

    assert asyncio.run(main()) == [1, 3, 7]


def test_ddl_in_a_transaction_rolls_back(url: str) -> None:
    manager = opened(url)

    def tables() -> list[str]:
        with manager.sync.reader() as db:
            return list(db.scalars(text("SELECT name FROM sqlite_master WHERE name LIKE 'extra%'")))

    with pytest.raises(KeyError), manager.sync.connect() as connection:
        connection.execute(text("CREATE TABLE extra1 (id INTEGER)"))
        raise KeyError

    async def main() -> None:
        with pytest.raises(KeyError):
            async with manager.connect() as connection:
                await connection.execute(text("CREATE TABLE extra2 (id INTEGER)"))
                raise KeyError

    asyncio.run(main())
    assert tables() == []
    manager.sync.close()


def test_readers_do_not_block_writers_nor_the_other_way_round(url: str) -> None:
    manager = opened(url, busy_timeout=1.0)
    with manager.sync_session() as db:
        db.add(Item(id=0))

    async def main() -> None:
        async with manager.session(read_only=True) as reader:
            seen = select(Item.value).where(Item.id == 0)
            assert await reader.scalar(seen) == 0
            for _ in range(3):
                async with manager.session() as db:
                    await db.execute(INCREMENT)
                    async with manager.reader() as other:
                        await other.scalar(seen)
            assert await reader.scalar(seen) == 0  # a transaction sees one state
        async with manager.reader() as db:
            assert await db.scalar(seen) == 3
        await manager.close()

    asyncio.run(main())


def test_what_only_reads_cannot_write(url: str) -> None:
    manager = opened(url)

    async def main() -> None:
        for scope in (manager.reader(), manager.session(read_only=True)):
            with pytest.raises(DBAPIError, match="readonly") as caught:
                async with scope as db:
                    await db.execute(insert(Item).values(id=1))
            assert "writes nothing. Take session()." in caught.value.__notes__[-1]
        async with manager.session() as db:  # on the same connection
            await db.execute(insert(Item).values(id=2))
        await manager.close()

    for scope in (manager.sync.reader(), manager.sync.session(read_only=True)):
        with pytest.raises(DBAPIError, match="readonly"), scope as db:
            db.execute(insert(Item).values(id=1))
    with manager.sync_session() as db:
        db.execute(insert(Item).values(id=1))
    asyncio.run(main())


# -- in memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_both_sides_see_one_database_in_memory_with_isolated_sessions(url: str) -> None:
    manager = opened(url)

    async def main() -> None:
        async with manager.session() as db:
            db.add(Item(id=1))
            await db.flush()
            await asyncio.to_thread(sees, [])  # not yet
        await asyncio.to_thread(sees, [1])
        with pytest.raises(KeyError):
            async with manager.session() as db:
                db.add(Item(id=2))
                await db.flush()
                raise KeyError
        await asyncio.to_thread(add, 3)
        async with manager.reader() as db:
            assert list(await db.scalars(select(Item.id).order_by(Item.id))) == [1, 3]
        await manager.close()

    def sees(expected: list[int]) -> None:
        with manager.sync_session(read_only=True) as db:
            assert list(db.scalars(select(Item.id))) == expected

    def add(number: int) -> None:
        with manager.sync_session() as db:
            db.add(Item(id=number))

    asyncio.run(main())
    manager.init(url, metadata=Model.metadata)
    manager.sync.create_all()
    sees([])  # it was gone with its close
    manager.sync.close()


def test_two_databases_in_memory_are_two() -> None:
    with Database("sqlite://") as one, Database("sqlite://") as other:
        one.create_all(Model.metadata)
        with one.session() as db:
            db.add(Item(id=1))
        other.create_all(Model.metadata)
        with other.reader() as db:
            assert db.scalar(select(func.count()).select_from(Item)) == 0


def first_use_at_once(threads: int, verbs: list[str]) -> None:
    manager = DatabaseSessionManager().init("sqlite://")
    together = threading.Barrier(threads)
    files: list[str] = []

    def work(number: int) -> None:
        together.wait()
        with getattr(manager.sync, verbs[number % len(verbs)])() as db:
            files.append(db.execute(text("PRAGMA database_list")).one()[2])

    in_threads(threads, work)
    assert len(files) == threads
    assert set(files) == {files[0]}
    manager.sync.close()
    assert not Path(files[0]).parent.exists()


@pytest.mark.parametrize("verbs", [["session"], ["reader"], ["session", "reader"]])
def test_threads_that_use_it_first_at_once_see_one_database_in_memory(verbs: list[str]) -> None:
    for number in range(30):
        first_use_at_once(2 + number % 7, verbs)


def leaves_no_file(folder: str, end: str) -> None:
    if end in ("exit", "fork"):  # nobody closes it, which Python says itself, from 3.13 on
        warnings.simplefilter("ignore", ResourceWarning)
    manager = opened("sqlite://")
    with manager.sync_session() as db:
        db.add(Item(id=1))
    assert len(list(Path(folder).iterdir())) == 1
    if end == "close":
        manager.sync.close()
    elif end == "collect":
        manager.sync.close()
        database = Database("sqlite://", metadata=Model.metadata)
        database.create_all()
        database.engine.dispose()
        del database
        gc.collect()
    elif end == "fork":

        def child() -> None:
            with manager.sync.reader() as db:
                assert db.scalars(select(Item.id)).all() == [1]

        fork(child, "return")()
        fork(child, "_exit")()
        with manager.sync.reader() as db:  # it is there still
            assert db.scalars(select(Item.id)).all() == [1]
        assert len(list(Path(folder).iterdir())) == 1
        return
    if end != "exit":
        assert list(Path(folder).iterdir()) == []


@pytest.mark.parametrize("end", ["close", "collect", "exit", "fork"])
def test_a_database_in_memory_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run(leaves_no_file, str(tmp_path), end)
    assert list(tmp_path.iterdir()) == []


# -- a connect that is cancelled ---------------------------------------------------------------


def cut_off_as_it_opens(url: str, loop: str, how: str) -> list[Any]:
    """Return what is open when the cancellation is told and at the end, but for the collector."""
    answer = text("SELECT 42")

    async def cancelled(manager: DatabaseSessionManager) -> None:
        task = asyncio.create_task(manager.check())
        await asyncio.sleep(0)  # it runs to where it waits for the file to be opened
        task.cancel()
        if how == "twice":
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def overlapped(manager: DatabaseSessionManager) -> None:
        with pytest.raises(SessionInUse):
            async with manager.session() as db:
                await asyncio.gather(db.scalar(answer), db.scalar(answer))

    async def main() -> list[Any]:
        manager = DatabaseSessionManager().init(url)
        await (overlapped if how == "gather" else cancelled)(manager)
        left = held(url)
        async with manager.session() as db:
            assert await db.scalar(answer) == 42
        await manager.close()
        return left + held(url)

    gc.disable()
    try:
        return run_on(loop, main())
    finally:
        gc.collect()  # and the scenario fails if that finds something to warn of


@pytest.mark.parametrize("how", ["once", "twice", "gather"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_cancelled_connect_leaves_no_file_open(sqlite_url: str, loop: str, how: str) -> None:
    """Python 3.13 would warn of it, in the midst of whatever else runs then."""
    assert run(cut_off_as_it_opens, sqlite_url, loop, how) == []


# -- a file that somebody else holds -----------------------------------------------------------


def test_a_writer_waits_for_another_process(sqlite_url: str) -> None:
    """Another process holds the lock for a while: the writer here waits, and then succeeds."""
    manager = opened(sqlite_url)
    file = sqlite_url.removeprefix("sqlite:///")
    program = (
        "import sqlite3, sys\n"
        f"connection = sqlite3.connect({file!r}, isolation_level=None)\n"
        "connection.execute('BEGIN IMMEDIATE')\n"
        "print('locked', flush=True)\n"
        "sys.stdin.readline()\n"
        "connection.execute('COMMIT')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        done = threading.Event()

        def write() -> None:
            with manager.sync_session() as db:
                db.add(Item(id=os.getpid()))
            done.set()

        thread = threading.Thread(target=write)
        thread.start()
        assert not done.wait(0.3)
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert done.wait(20)
        thread.join()
    manager.sync.close()


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Hold the lock of the file, as a stranger would."""
    file = url.removeprefix("sqlite:///")
    stranger = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    stranger.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        stranger.close()


def doing(manager: DatabaseSessionManager) -> list[str]:
    return [holder.doing for pool in manager.stats().pools for holder in pool.holders]


def waits_for_the_lock(manager: DatabaseSessionManager) -> bool:
    """Whether a writer has sent its first statement, and has had no answer for a while."""
    return any(
        words.startswith("running for ")
        and ("BEGIN IMMEDIATE" in words or "INSERT" in words)
        and not words.startswith("running for 0.0 s")
        for words in doing(manager)
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "alone": {"verb": "session", "isolation_level": "AUTOCOMMIT"},
    "connect alone": {"verb": "connect", "isolation_level": "AUTOCOMMIT"},
    "session": {"verb": "session"},
    "connect": {"verb": "connect"},
}


def cancelled_writer(url: str, loop: str, writer: str, how: str) -> None:
    options = dict(OPTIONS[writer])
    verb = options.pop("verb")
    manager = opened(url, pool_size=2, max_overflow=0)

    async def write() -> None:
        async with (
            asyncio.timeout(0.3 if how == "timeout" else None),
            getattr(manager, verb)(**options) as db,
        ):
            await db.execute(insert(Item).values(id=1))

    async def main() -> None:
        await manager.check()
        with locked(url):
            for _ in range(2):
                threads = threading.active_count()
                task = asyncio.create_task(write())
                while not task.done() and not waits_for_the_lock(manager):
                    await asyncio.sleep(0.01)
                started = time.monotonic()
                if how == "cancel":
                    task.cancel()
                with pytest.raises(TimeoutError if how == "timeout" else asyncio.CancelledError):
                    await task
                assert time.monotonic() - started < 3  # 1 s is promised; the lock is never free
                assert doing(manager) == []
                until(threading.active_count, lambda seen, most=threads: seen <= most)
        await write()
        async with manager.reader() as db:
            assert (await db.scalars(select(Item.id))).all() == [1]
        await manager.close()

    run_on(loop, main())


@pytest.mark.parametrize("how", ["cancel", "timeout"])
@pytest.mark.parametrize("writer", OPTIONS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_cancelled_writer_does_not_wait_for_the_lock(
    sqlite_url: str, loop: str, writer: str, how: str
) -> None:
    run(cancelled_writer, sqlite_url, loop, writer, how)


@pytest.mark.parametrize("many", [False, True])
def test_a_statement_that_stands_alone_waits_for_the_lock(sqlite_url: str, many: bool) -> None:
    manager = opened(sqlite_url, pool_size=1, max_overflow=0)
    rows = [{"id": 1}, {"id": 2}] if many else {"id": 1}

    async def main() -> None:
        async with manager.connect(isolation_level="AUTOCOMMIT") as db:
            with locked(sqlite_url):
                writing = asyncio.create_task(db.execute(insert(Item), rows))
                while not writing.done() and not waits_for_the_lock(manager):
                    await asyncio.sleep(0.01)
                assert not writing.done()
            await writing
        async with manager.session(read_only=True) as db:  # over the same connection
            assert await db.scalar(text("PRAGMA busy_timeout")) > 0
            assert len((await db.scalars(select(Item.id))).all()) == (2 if many else 1)
        await manager.close()

    asyncio.run(main())


def test_a_statement_that_stands_alone_gives_up_after_the_busy_timeout(sqlite_url: str) -> None:
    manager = opened(sqlite_url, busy_timeout=0.1)
    with (
        manager.sync.connect(isolation_level="AUTOCOMMIT") as db,
        locked(sqlite_url),
        pytest.raises(OperationalError, match="database is locked"),
    ):
        db.execute(insert(Item), {"id": 1})
    manager.sync.close()


def given_up(url: str, options: dict[str, Any]) -> None:
    """The driver's own error, and a connection that is as it was."""
    manager = opened(url, pool_size=1, max_overflow=0, **options)

    async def main() -> None:
        for verb in (manager.session, manager.connect):
            with locked(url), pytest.raises(OperationalError, match="database is locked") as caught:
                async with verb() as db:
                    await db.execute(insert(Item).values(id=1))
            assert caught.value.statement == "BEGIN IMMEDIATE"
            assert caught.value.orig.sqlite_errorname == "SQLITE_BUSY"  # type: ignore[union-attr]
            async with manager.session(read_only=True) as db:
                assert await db.scalar(text("PRAGMA busy_timeout")) == 200
            async with verb() as db:
                assert await db.scalar(text("PRAGMA busy_timeout")) == 200
        await manager.close()

    for sync_verb in (manager.sync.session, manager.sync.connect):
        with locked(url), pytest.raises(OperationalError, match="database is locked"):
            with sync_verb() as db:
                db.execute(insert(Item).values(id=1))
        with manager.sync.session(read_only=True) as db:
            assert db.scalar(text("PRAGMA busy_timeout")) == 200
    asyncio.run(main())


@pytest.mark.parametrize(
    "options", [{"busy_timeout": 0.2}, {"engine_options": {"connect_args": {"timeout": 0.2}}}]
)
def test_a_writer_gives_up_with_the_drivers_error_after_the_busy_timeout(
    sqlite_url: str, options: dict[str, Any]
) -> None:
    run(given_up, sqlite_url, options)


def other_error(url: str) -> None:
    """What is no lock is no reason to wait: the driver's error comes at once."""
    manager = opened(url, pool_size=1, max_overflow=0)
    nested = text("BEGIN IMMEDIATE")

    async def main() -> None:
        with pytest.raises(OperationalError, match="within a transaction"):
            async with manager.connect() as db:
                await db.execute(nested)
        await manager.check()
        await manager.close()

    started = time.monotonic()
    with (
        pytest.raises(OperationalError, match="within a transaction"),
        manager.sync.connect() as db,
    ):
        db.execute(nested)
    asyncio.run(main())
    assert time.monotonic() - started < 20  # the busy timeout is 30 s


def test_a_begin_that_fails_otherwise_is_not_tried_again(sqlite_url: str) -> None:
    run(other_error, sqlite_url)


def writer_of_another_request(url: str) -> None:
    """A thread of a framework's pool enters a writer for one request, and serves the next."""
    database = Database(url, busy_timeout=10)
    with database.session() as db:
        db.execute(text("CREATE TABLE item (name text)"))

    def mine() -> Iterator[Session]:
        with database.session() as db:
            db.execute(text("INSERT INTO item VALUES ('first')"))
            yield db

    def second() -> None:
        with database.session() as db:
            db.execute(text("INSERT INTO item VALUES ('second')"))

    def first_again() -> None:
        [*mine()]

    with ThreadPoolExecutor(1) as thread:
        for work in (second, first_again):
            entered = mine()
            thread.submit(next, entered).result()
            waits = thread.submit(work)
            time.sleep(0.2)  # it waits for the lock by then, and is not told that it never gets it
            with pytest.raises(StopIteration):
                next(entered)
            waits.result()
    with database.reader() as db:
        names = [*db.scalars(text("SELECT name FROM item"))]
        assert names == ["first", "second", "first", "first"]
    database.close()


def test_a_thread_that_serves_another_request_is_no_deadlock(sqlite_url: str) -> None:
    run(writer_of_another_request, sqlite_url)
