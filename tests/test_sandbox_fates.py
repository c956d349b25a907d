"""Transactions that are one in a sandbox, and two outside: each has the fate that it would have.

Where one transaction cannot serve them like that, an error says so and names both lines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import sandboxed
from psycopg import sql
from sandboxed import COUNT, Item, Link, add, assert_nothing_left, count, opened
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from engineroom import Database, DatabaseSessionManager
from engineroom.errors import NotInSandbox, SandboxConflict
from engineroom.testing import PostgresServer, sandbox

LINKS = select(func.count()).select_from(Link)
TENANT = text("SELECT current_setting('app.tenant', true)")

pytestmark = pytest.mark.anyio


@pytest.fixture
def manager(driver_url: str) -> DatabaseSessionManager:
    return opened(driver_url)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    used = "driver_url" in request.fixturenames
    url = request.getfixturevalue("driver_url") if used else ""
    yield
    if used:
        assert_nothing_left(url)


async def insert(db: Any, key: int) -> None:
    await db.execute(text("INSERT INTO sandboxed_item VALUES (:key, '')"), {"key": key})


def assert_both_lines(said: str) -> None:
    """See that the line of this module and that of `add()` are named."""
    assert __file__ in said
    assert sandboxed.__file__ in said


# -- rollbacks -------------------------------------------------------------------------------------


async def test_rows_that_an_outer_rollback_takes_along_are_an_error(
    manager: DatabaseSessionManager,
) -> None:
    """Outside they would stay. Nobody sees a database without them."""
    async with manager:
        async with sandbox(manager):
            async with manager.session() as db:
                await insert(db, 1)
                await add(manager, 2)
                with pytest.raises(SandboxConflict, match=r'isolation="database"') as caught:
                    await db.rollback()
                assert_both_lines(str(caught.value))
                with pytest.raises(SandboxConflict, match="rolled back"):
                    await db.scalar(COUNT)
        async with sandbox(manager):
            with pytest.raises(KeyError):  # the application's own error comes first
                async with manager.session() as db:
                    await insert(db, 1)
                    await add(manager, 2)
                    raise KeyError
            with pytest.raises(SandboxConflict, match=r'isolation="database"'):
                await count(manager)
        async with sandbox(manager):
            assert await count(manager) == 0


async def test_no_error_where_nothing_was_committed_inside(
    manager: DatabaseSessionManager,
) -> None:
    """By one that only reads, or that rolls back itself; or where both are committed."""
    async with manager, sandbox(manager):
        with pytest.raises(KeyError):
            async with manager.session() as db:
                await insert(db, 1)
                assert await count(manager) == 1
                async with manager.session() as inner:
                    await insert(inner, 2)
                    await inner.rollback()
                async with manager.reader() as reader:
                    assert await reader.scalar(COUNT) == 1
                raise KeyError
        assert await count(manager) == 0
        async with manager.session() as db:
            await insert(db, 1)
            await add(manager, 2)
            await db.commit()
            await insert(db, 3)
            await db.rollback()
        assert await count(manager) == 2


# -- savepoints of the application's own -----------------------------------------------------------


async def test_a_session_goes_on_in_its_savepoint_after_one_that_only_read(
    manager: DatabaseSessionManager,
) -> None:
    async with manager, sandbox(manager):
        async with manager.session() as db:
            await insert(db, 1)
            async with db.begin_nested():
                await insert(db, 2)
                async with manager.session() as inner:
                    assert await inner.scalar(COUNT) == 2
                    await insert(db, 3)
                    assert await inner.scalar(COUNT) == 3
        assert await count(manager) == 3


async def test_a_savepoint_without_a_row_is_rolled_back_alone(
    manager: DatabaseSessionManager,
) -> None:
    """What another session has committed meanwhile stays; the savepoint is set again."""
    async with manager, sandbox(manager):
        async with manager.session() as db:
            for key, write_before in ((1, False), (10, True)):
                if write_before:
                    await insert(db, key)
                nested = await db.begin_nested()
                await db.scalar(COUNT)  # sent with the first statement inside
                await add(manager, key + 1)
                await insert(db, key + 2)
                await nested.rollback()
                nested = await db.begin_nested()
                await insert(db, key + 3)
                await nested.commit()
        async with manager.session() as db:
            found = (await db.scalars(select(Item.id).order_by(Item.id))).all()
        assert found == [2, 4, 10, 11, 13]


async def test_rows_that_a_savepoints_rollback_takes_along_are_an_error(
    manager: DatabaseSessionManager,
) -> None:
    async with manager, sandbox(manager):
        with pytest.raises(SandboxConflict):  # at its end, too
            async with manager.session() as db:
                released = await db.begin_nested()
                await insert(db, 1)
                await add(manager, 2)
                await released.commit()
                nested = await db.begin_nested()  # 2 stands below this one
                await insert(db, 3)
                await nested.rollback()
                assert await db.scalar(COUNT) == 2
                nested = await db.begin_nested()
                await insert(db, 4)
                await add(manager, 5)
                with pytest.raises(SandboxConflict) as caught:
                    await nested.rollback()
                assert_both_lines(str(caught.value))


async def test_a_failure_is_logged_by_another_session_before_its_rollback(
    manager: DatabaseSessionManager,
) -> None:
    """In a savepoint, or without one: what another session writes then stays."""
    async with manager, sandbox(manager):
        await add(manager, 1)
        async with manager.session() as db:
            await insert(db, 2)
            with pytest.raises(IntegrityError):
                async with db.begin_nested():
                    try:
                        await insert(db, 1)
                    except IntegrityError:
                        await add(manager, 3)
                        with pytest.raises(DBAPIError):  # it has failed, as it would outside
                            await db.execute(text("SELECT 1"))
                        raise
            await insert(db, 4)
        assert await count(manager) == 4
        with pytest.raises(IntegrityError):
            async with manager.session() as db:
                try:
                    await insert(db, 1)
                except IntegrityError:
                    await add(manager, 5)
                    raise
        assert await count(manager) == 5


async def test_the_commit_of_one_that_failed_is_a_rollback(manager: DatabaseSessionManager) -> None:
    """As the server takes it: also where another session came in between."""
    async with manager, sandbox(manager):
        await add(manager, 1)
        for logs in (False, True):
            async with manager.connect() as connection:
                await insert(connection, 2)
                with pytest.raises(IntegrityError):
                    await insert(connection, 1)
                if logs:
                    await count(manager)
                await connection.commit()
            assert await count(manager) == 1


# -- constraints -----------------------------------------------------------------------------------


async def test_what_an_outer_one_violates_for_the_moment_fails_nobody_inside(
    manager: DatabaseSessionManager,
) -> None:
    """The constraint is checked with the outer one; the others, and those of the next, as ever."""
    link = text("INSERT INTO sandboxed_link VALUES (:id, :other)")
    async with manager, sandbox(manager):
        async with manager.session() as db:
            await db.execute(link, {"id": 1, "other": 2})
            await add(manager, 1)
            async with manager.connect(isolation_level="AUTOCOMMIT") as connection:
                await insert(connection, 2)
            await db.execute(link, {"id": 2, "other": 1})
            with pytest.raises(IntegrityError):
                async with manager.session() as inner:
                    await inner.execute(link, {"id": 3, "other": 99})
        with pytest.raises(IntegrityError):
            async with manager.session() as db:
                await db.execute(link, {"id": 4, "other": 99})
                await count(manager)
        async with manager.session() as db:
            assert (await db.scalar(LINKS), await db.scalar(COUNT)) == (2, 2)


LATE = """
CREATE FUNCTION make_late() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    CREATE TABLE late (id int UNIQUE DEFERRABLE INITIALLY {initially});
END $$
"""


@pytest.mark.parametrize("initially", ["DEFERRED", "IMMEDIATE"])
async def test_a_constraint_that_a_function_made(
    manager: DatabaseSessionManager, initially: str
) -> None:
    """No text that was sent says that it is there."""
    twice = text("INSERT INTO late VALUES (1), (1)")
    async with manager:
        async with manager.session() as db:
            await db.execute(
                text("ALTER TABLE sandboxed_link DROP CONSTRAINT sandboxed_link_other_fkey")
            )
            await db.execute(text(LATE.format(initially=initially)))
        async with sandbox(manager):
            await add(manager, 1)
            async with manager.session() as db:
                await db.execute(text("SELECT make_late()"))
            with pytest.raises(IntegrityError):
                async with manager.session() as db:
                    await db.execute(twice)
                    if initially == "DEFERRED":
                        await db.execute(text("DELETE FROM late"))
                        await db.execute(twice)
                        await db.commit()
                    raise AssertionError("it was not checked")
        async with sandbox(manager):
            with pytest.raises(IntegrityError):  # in the transaction that has made it
                async with manager.session() as db:
                    await db.execute(text("SELECT make_late()"))
                    await db.execute(twice)


# -- settings --------------------------------------------------------------------------------------


async def test_what_an_outer_one_has_set_is_not_for_those_inside(
    manager: DatabaseSessionManager,
) -> None:
    """Both have written: they stand on each other."""
    async with manager, sandbox(manager):
        async with manager.session() as db:
            await insert(db, 1)
            await db.execute(text("SET LOCAL app.tenant = 'A'"))
            async with manager.session() as inner:
                assert not await inner.scalar(TENANT)
                await inner.execute(text("SET LOCAL app.tenant = 'B'"))
                await insert(inner, 2)
                assert await inner.scalar(TENANT) == "B"
            assert await db.scalar(TENANT) == "A"
            async with manager.session() as inner:
                await insert(inner, 3)
                await inner.rollback()
            assert await db.scalar(TENANT) == "A"
        async with manager.session() as db:
            assert not await db.scalar(TENANT)


async def test_no_guard_strikes_the_sandbox(driver_url: str) -> None:
    """A server that ends idle or long transactions ends a long test's neither."""
    opened(driver_url)
    async with DatabaseSessionManager().init(driver_url) as manager:
        async with manager.connect(isolation_level="AUTOCOMMIT") as connection:
            name = await connection.scalar(text("SELECT current_database()"))
            for guard in "idle_in_transaction_session_timeout", "transaction_timeout":
                await connection.execute(text(f"ALTER DATABASE {name} SET {guard} = 200"))
    async with DatabaseSessionManager().init(driver_url) as manager, sandbox(manager):
        await add(manager, 1)
        await asyncio.sleep(0.6)
        assert await count(manager) == 1


# -- engines and drivers ---------------------------------------------------------------------------


async def test_engines_with_options_from_before_are_inside(manager: DatabaseSessionManager) -> None:
    """And those from inside work afterwards."""
    named = manager.sync_engine.execution_options(name="one").execution_options(other="two")
    anamed = manager.engine.execution_options(name="one")
    async with manager:
        for _ in range(2):
            async with sandbox(manager):
                with named.begin() as one:
                    one.execute(text("INSERT INTO sandboxed_item VALUES (:key, '')"), {"key": 1})
                async with anamed.begin() as connection:
                    await insert(connection, 2)
                inside = manager.sync_engine.execution_options(name="three")
                with inside.begin() as one:
                    assert one.scalar(COUNT) == 2
            for engine in (named, inside):
                with engine.begin() as one:
                    assert one.scalar(select(func.count()).where(Item.id > 0)) == 0
            async with anamed.connect() as connection:
                assert await connection.scalar(select(func.count()).where(Item.id > 0)) == 0


async def test_copy_by_asyncpg_takes_its_turn(pg18: PostgresServer, database: str) -> None:
    async with opened(pg18.url(database, "asyncpg")) as manager:
        async with sandbox(manager):
            async with manager.connect() as connection:
                raw = await connection.get_raw_connection()
                driver: Any = raw.driver_connection
                await driver.copy_records_to_table("sandboxed_item", records=[(1, ""), (2, "")])
            async with manager.connect() as connection:
                raw = await connection.get_raw_connection()
                driver = raw.driver_connection
                await driver.copy_records_to_table("sandboxed_item", records=[(3, "")])
                await connection.rollback()
            assert await count(manager) == 2
        assert await count(manager) == 0


async def test_copy_by_psycopg_is_refused(pg18: PostgresServer, database: str) -> None:
    async with opened(pg18.url(database, "psycopg")) as manager, sandbox(manager):
        with manager.sync_engine.connect() as connection:
            cursor: Any = connection.connection.cursor()
            with pytest.raises(NotInSandbox, match=r'isolation="database"'):
                cursor.copy("COPY sandboxed_item FROM STDIN")
            with pytest.raises(NotInSandbox, match=r'isolation="database"'):
                connection.connection.driver_connection.cursor()  # type: ignore[union-attr]


@pytest.mark.parametrize("change", ["{}", "DO $$ BEGIN {}; END $$"])
async def test_a_plan_from_before_a_change_that_was_undone(
    pg18: PostgresServer, database: str, change: str
) -> None:
    """asyncpg keeps what it has prepared: the next test meets the table as it was."""
    every = text("SELECT * FROM sandboxed_item")
    change = change.format("ALTER TABLE sandboxed_item ADD COLUMN more int")
    async with opened(pg18.url(database, "asyncpg")) as manager:
        async with sandbox(manager):
            async with manager.session() as db:
                await db.execute(text(change))
            async with manager.session() as db:
                assert len((await db.execute(every)).keys()) == 3
        async with sandbox(manager), manager.session() as db:
            assert len((await db.execute(every)).keys()) == 2


def test_an_end_that_no_text_shows_is_noticed(
    pg18: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's status says it, at no cost: nothing in the sandbox is believed any more."""
    from engineroom.testing import outer

    for name in ("psycopg", "psycopg2"):
        url = pg18.url(database, name)
        with Database(url) as manager:
            with sandbox(manager), manager.connect() as connection:
                cursor: Any = connection.connection.cursor()
                with pytest.raises(NotInSandbox, match="COMMIT was sent as text"):
                    cursor.execute(sql.SQL("COMMIT") if name == "psycopg" else b"COMMIT")
            with sandbox(manager), monkeypatch.context() as blind:
                blind.setattr(outer, "refuse_escape", lambda text: None)
                with pytest.raises(NotInSandbox, match="could not be seen"):
                    with manager.connect() as connection:
                        connection.execute(text("COMMIT"))
                with pytest.raises(NotInSandbox, match="could not be seen"):
                    manager.check()
