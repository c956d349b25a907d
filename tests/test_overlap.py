"""One session, two calls at once: the second is told, the first goes on, and nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from asyncpg import PostgresConnectionError
from scenario import Item, Model, every_driver_and_loop, is_postgres, run_on
from sqlalchemy import insert, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from engineroom import DatabaseSessionManager
from engineroom.errors import SessionInUse
from engineroom.testing import PostgresServer

LIMIT = 20  # seconds for what takes milliseconds
ANSWER = text("SELECT 42")


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh database for a driver."""
    if request.param == "aiosqlite":
        value: str = request.getfixturevalue("sqlite_url")
        return value
    server: PostgresServer = request.getfixturevalue("pg18")
    return server.url(request.getfixturevalue("database"), request.param)


@pytest.fixture
def on(url: str, loop: str, pg18: PostgresServer) -> Callable[[Any], None]:
    """Run a coroutine function with a manager, in a loop; then find nothing left of it."""

    def states() -> list[list[str]]:
        if not is_postgres(url):
            return []
        name = url.rpartition("/")[2]
        return pg18.execute(
            f"SELECT state, query FROM pg_stat_activity WHERE datname = '{name}'"
            " AND backend_type = 'client backend' AND state <> 'idle'"
        )

    async def main(work: Callable[[DatabaseSessionManager], Awaitable[None]]) -> None:
        manager = DatabaseSessionManager().init(
            url, metadata=Model.metadata, busy_timeout=5.0, pool_size=2, max_overflow=0
        )
        await manager.create_all()
        async with asyncio.timeout(LIMIT):
            await work(manager)
            await nothing_left(manager, states)
            await manager.close(timeout=0)

    return lambda work: run_on(loop, main(work))


async def nothing_left(
    manager: DatabaseSessionManager, states: Callable[[], list[list[str]]]
) -> None:
    """Find nothing lent, no scope, no other task, no backend at work, and a pool that works."""
    assert manager.stats().scopes == ()
    assert [pool.lent for pool in manager.stats().pools if pool.lent] == []
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait(others) if others else None  # they have ended but for their last step
    while await asyncio.to_thread(states):
        await asyncio.sleep(0.02)  # a backend takes a moment to end
    for number in (1001, 1002):
        async with manager.session() as db:  # on SQLite, the lock is free
            await db.execute(insert(Item).values(id=number))
    async with manager.session() as one, manager.session(read_only=True) as two:
        assert await one.scalar(ANSWER) == await two.scalar(ANSWER) == 42


async def stored(manager: DatabaseSessionManager) -> list[int]:
    async with manager.reader() as db:
        return list(await db.scalars(select(Item.id).order_by(Item.id)))


def endless(manager: DatabaseSessionManager) -> Any:
    if manager.engine.dialect.name == "postgresql":
        return text("SELECT pg_sleep(1000)")
    return text(
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 4000000000)"
        " SELECT count(*) FROM t"
    )


def many(manager: DatabaseSessionManager) -> Any:
    if manager.engine.dialect.name == "postgresql":
        return text("SELECT n, pg_sleep(0.002) FROM generate_series(1, 10000) n")
    return text("WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT n FROM t")


@asynccontextmanager
async def in_the_middle_of(call: Any) -> AsyncGenerator[asyncio.Task[Any]]:
    """Run the body while another task is in the middle of a call."""
    task = asyncio.create_task(call, name="owner")
    await asyncio.sleep(0)  # it runs to where it waits for the database
    assert not task.done()
    yield task


# -- the second call is told, the first goes on ------------------------------------------------


@every_driver_and_loop
def test_of_two_calls_at_once_the_second_is_told_and_the_first_is_right(on: Any) -> None:
    async def work(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            first, second = await asyncio.gather(
                db.scalar(ANSWER), db.scalar(text("SELECT 43")), return_exceptions=True
            )
            assert first == 42
            assert isinstance(second, SessionInUse)
            assert await db.scalar(text("SELECT 44")) == 44
            db.add(Item(id=1))
        assert await stored(manager) == [1]

    on(work)


INTRUDERS: dict[str, Callable[[AsyncSession, Item], Awaitable[Any]]] = {
    "execute": lambda db, item: db.execute(ANSWER),
    "flush": lambda db, item: db.flush(),
    "commit": lambda db, item: db.commit(),
    "rollback": lambda db, item: db.rollback(),
    "get": lambda db, item: db.get(Item, 404),
    "refresh": lambda db, item: db.refresh(item),
    "stream": lambda db, item: db.stream(ANSWER),
    "connection": lambda db, item: db.connection(),
    "run_sync": lambda db, item: db.run_sync(lambda session: session.scalar(ANSWER)),
    "close": lambda db, item: db.close(),
    "invalidate": lambda db, item: db.invalidate(),
}


@every_driver_and_loop
def test_whatever_the_second_call_is_it_is_told(on: Any) -> None:
    """And neither what the first one returns nor what is pending is lost by it."""

    async def work(manager: DatabaseSessionManager) -> None:
        for number, (name, intrude) in enumerate(INTRUDERS.items()):
            async with manager.session() as db:
                item = Item(id=number)
                db.add(item)
                await db.flush()
                db.add(Item(id=100 + number))
                async with in_the_middle_of(db.scalar(ANSWER)) as owner:
                    with pytest.raises(SessionInUse, match="test_overlap.py.*task owner"):
                        await intrude(db, item)
                    assert await owner == 42, name
                await db.flush()
        count = len(INTRUDERS)
        assert await stored(manager) == [*range(count), *range(100, 100 + count)]

    on(work)


@every_driver_and_loop
def test_the_first_call_may_be_a_flush_or_a_commit(on: Any) -> None:
    async def work(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            for number, first in enumerate((db.flush, db.commit)):
                db.add(Item(id=number))
                async with in_the_middle_of(first()) as owner:
                    with pytest.raises(SessionInUse):
                        await db.execute(ANSWER)
                    await owner
        assert await stored(manager) == [0, 1]

    on(work)


@every_driver_and_loop
def test_the_second_call_does_not_wait_for_the_first(on: Any) -> None:
    async def work(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            async with in_the_middle_of(db.execute(endless(manager))) as owner:
                with pytest.raises(SessionInUse):
                    await db.execute(ANSWER)
                assert not owner.done()
                owner.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await owner
            await db.rollback()

    on(work)


# -- the end of a scope in the middle of a call ------------------------------------------------


@every_driver_and_loop
def test_a_gather_that_fails_leaves_nothing_running(on: Any) -> None:
    async def work(manager: DatabaseSessionManager) -> None:
        for call in (ANSWER, endless(manager)):
            with pytest.raises(SessionInUse):
                async with manager.session() as db:
                    await db.execute(insert(Item).values(id=1))
                    await asyncio.gather(db.execute(call), db.execute(call))
            assert manager.stats().scopes == ()
        assert await stored(manager) == []

    on(work)


@every_driver_and_loop
def test_a_task_group_that_fails_leaves_nothing_running(on: Any) -> None:
    async def work(manager: DatabaseSessionManager) -> None:
        for call in (ANSWER, endless(manager)):
            with pytest.raises(ExceptionGroup) as caught:
                async with manager.session() as db:
                    await db.execute(insert(Item).values(id=1))
                    async with asyncio.TaskGroup() as tasks:
                        for _ in range(3):
                            tasks.create_task(db.execute(call))
            assert {type(error) for error in caught.value.exceptions} == {SessionInUse}
        assert await stored(manager) == []

    on(work)


@every_driver_and_loop
def test_a_task_that_was_forgotten_fails_its_scope(on: Any) -> None:
    """Nobody knows whether its work was meant to be part of the transaction."""

    async def work(manager: DatabaseSessionManager) -> None:
        tasks = []
        for call in (ANSWER, endless(manager)):
            with pytest.raises(SessionInUse, match="test_overlap.py"):
                async with manager.session() as db:
                    await db.execute(insert(Item).values(id=1))
                    tasks.append(asyncio.create_task(db.execute(call)))
                    await asyncio.sleep(0)
        await asyncio.wait(tasks)
        answered, cut_off = tasks
        assert cut_off.cancelled()
        # Where the answer is there as the cancellation comes, Python 3.11's `wait_for` returns it.
        assert answered.cancelled() or answered.exception() is None
        assert await stored(manager) == []

    on(work)


@every_driver_and_loop
@pytest.mark.parametrize("wrap", [asyncio.create_task, asyncio.shield, asyncio.gather])
def test_a_scope_that_is_left_in_another_task_looks_when_that_runs(on: Any, wrap: Any) -> None:
    """And not already when the end is asked for: a task that is ready goes on before."""

    async def work(manager: DatabaseSessionManager) -> None:
        scope = manager.session()
        db = await scope.__aenter__()
        await db.execute(insert(Item).values(id=1))
        other = asyncio.create_task(db.execute(endless(manager)))
        with pytest.raises(SessionInUse, match="in the middle of a call"):
            await wrap(scope.__aexit__(None, None, None))
        await asyncio.wait([other])
        assert other.cancelled()
        assert await stored(manager) == []

    on(work)


@every_driver_and_loop
def test_the_bodys_own_exception_says_more_than_a_forgotten_task(on: Any) -> None:
    async def work(manager: DatabaseSessionManager) -> None:
        mine = ValueError("mine")
        with pytest.raises(ValueError, match="mine") as caught:
            async with manager.session() as db:
                await db.execute(insert(Item).values(id=1))
                task = asyncio.create_task(db.execute(endless(manager)))
                await asyncio.sleep(0)
                raise mine
        assert caught.value is mine
        await asyncio.wait([task])
        assert await stored(manager) == []

    on(work)


# -- what is no overlap ------------------------------------------------------------------------


@every_driver_and_loop
def test_tasks_may_use_a_session_one_after_another(on: Any) -> None:
    async def work(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            for number in range(3):
                db.add(Item(id=number))
                await asyncio.create_task(db.flush())
                assert await asyncio.create_task(db.get(Item, number)) is not None
            await asyncio.create_task(db.commit())
            lock = asyncio.Lock()

            async def one() -> Any:
                async with lock:
                    return await db.scalar(ANSWER)

            assert await asyncio.gather(*(one() for _ in range(5))) == [42] * 5
        assert await stored(manager) == [0, 1, 2]

    on(work)


@every_driver_and_loop
def test_run_sync_may_call_as_often_as_it_likes(on: Any) -> None:
    async def work(manager: DatabaseSessionManager) -> None:
        def many(session: Any) -> list[int]:
            session.add(Item(id=1))
            session.flush()
            with session.begin_nested():
                session.execute(insert(Item).values(id=2))
            session.commit()
            return list(session.scalars(select(Item.id).order_by(Item.id)))

        async with manager.session() as db:
            assert await db.run_sync(many) == [1, 2]
            assert await db.scalar(ANSWER) == 42

    on(work)


@every_driver_and_loop
def test_after_a_cancelled_call_the_session_can_roll_back_and_go_on(on: Any) -> None:
    async def work(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            await db.execute(insert(Item).values(id=1))
            async with in_the_middle_of(db.execute(endless(manager))) as owner:
                owner.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await owner
            await db.rollback()
            await db.execute(insert(Item).values(id=2))
        assert await stored(manager) == [2]

    on(work)


@pytest.mark.parametrize("body", ["returns", "raises", "is_cancelled"])
@every_driver_and_loop
def test_a_stream_that_another_task_reads_ends_with_the_scope(on: Any, body: str) -> None:
    """psycopg has one call wait for the other: COMMIT for the stream's end, and a cancelled one
    leaves the server at work.
    """

    async def read(manager: DatabaseSessionManager, readers: list[asyncio.Task[Any]]) -> None:
        async with manager.session() as db:
            await db.execute(insert(Item).values(id=1))
            rows = await db.stream(many(manager))
            async with in_the_middle_of(rows.fetchall()) as reader:
                readers.append(reader)
                await asyncio.sleep(0.1)
                if body == "raises":
                    raise ZeroDivisionError
                if body == "is_cancelled":
                    await asyncio.sleep(LIMIT)

    async def work(manager: DatabaseSessionManager) -> None:
        readers: list[asyncio.Task[Any]] = []
        scope = asyncio.create_task(read(manager, readers))
        if body == "is_cancelled":
            while not readers:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            scope.cancel()
        (told,) = await asyncio.gather(scope, return_exceptions=True)
        expected = {"returns": SessionInUse, "raises": ZeroDivisionError}
        assert type(told) is expected.get(body, asyncio.CancelledError)
        with pytest.raises((SQLAlchemyError, PostgresConnectionError)):  # asyncpg's, as it is
            await readers[0]
        assert await stored(manager) == []

    on(work)


# -- what no check sees, the pool does: a connection that comes back in the middle of its work -----


async def in_a_connect_scope(manager: DatabaseSessionManager) -> None:
    """It has no guard; another task's statement is ended with it."""
    async with manager.connect() as connection:
        async with in_the_middle_of(connection.execute(endless(manager))) as call:
            await asyncio.sleep(0.1)
            raise ZeroDivisionError
    await call


async def in_a_transaction_begun_by_hand(manager: DatabaseSessionManager) -> None:
    """`begin()` commits beside the guarded verbs."""
    async with manager.session() as db:
        async with db.begin():
            await db.execute(insert(Item).values(id=1))
            async with in_the_middle_of(db.scalar(ANSWER)):
                pass
    raise ZeroDivisionError


async def in_a_begin_of_its_own(manager: DatabaseSessionManager) -> None:
    """The driver did not send it, and does not know of it."""
    async with manager.connect(isolation_level="AUTOCOMMIT") as connection:
        await connection.execute(text("BEGIN"))
        await connection.execute(insert(Item).values(id=1))
        raise ZeroDivisionError


@pytest.mark.parametrize("url", ["asyncpg", "psycopg"], indirect=True)
@pytest.mark.parametrize("loop", ["asyncio"])
@pytest.mark.parametrize(
    "leave", [in_a_connect_scope, in_a_transaction_begun_by_hand, in_a_begin_of_its_own]
)
def test_a_connection_that_comes_back_at_work_is_not_lent_again(on: Any, leave: Any) -> None:
    """It would take the next one's rows with it, who was told of success."""

    async def work(manager: DatabaseSessionManager) -> None:
        with suppress(ZeroDivisionError, SQLAlchemyError):
            await leave(manager)
        async with manager.connect(isolation_level="AUTOCOMMIT") as connection:
            await connection.execute(insert(Item).values(id=7))
        assert 7 in await stored(manager)  # over another connection

    on(work)


@every_driver_and_loop
def test_reset_in_the_middle_of_a_call_is_told(on: Any) -> None:
    async def work(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            async with in_the_middle_of(db.scalar(ANSWER)) as first:
                with pytest.raises(SessionInUse):
                    await db.reset()
                assert await first == 42

    on(work)
