"""A door opens from one URL, closes, and opens again."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from behaviour_tables import Item
from sqlalchemy import Column, Integer, MetaData, Table, inspect, make_url, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

import engineroom
from engineroom import Base, Database, DatabaseSessionManager
from engineroom.errors import AlreadyInitialized, CloseInsideScope, ManagerClosed


def answer(door: Any) -> int:
    with door.session() as db:
        return int(db.scalar(text("SELECT 42")))


@pytest.mark.parametrize("spelling", ["positional", "url", "database_url"])
@pytest.mark.parametrize("kind", [str, make_url])
def test_a_url_is_a_string_or_a_url_under_any_name(
    open_door: Any, url: str, spelling: str, kind: Any
) -> None:
    given = kind(url)
    door = open_door(given) if spelling == "positional" else open_door(**{spelling: given})
    assert answer(door) == 42


@pytest.mark.parametrize("variable", ["DATABASE_URL", "DB_URL"])
def test_a_url_may_come_from_the_environment(
    twin: str, behind: Any, url: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, url)
    with behind(Database() if twin == "sync" else DatabaseSessionManager()) as door:
        assert answer(door) == 42
    assert door.stats().state == "closed"


def test_init_returns_the_door_itself(open_door: Any, url: str, plain: Any) -> None:
    door = open_door()
    door.close()
    assert plain(door.init(url)) is plain(door)
    assert answer(door) == 42


def test_a_with_block_closes_the_door(open_door: Any) -> None:
    with open_door() as door:
        assert answer(door) == 42
        assert door.stats().state == "open"
    assert door.stats().state == "closed"
    with pytest.raises(ManagerClosed), door.session():
        pass


def test_a_with_block_closes_the_door_when_its_body_fails(open_door: Any) -> None:
    with pytest.raises(ValueError, match="mine"), open_door() as door:
        assert answer(door) == 42
        raise ValueError("mine")
    assert door.stats().state == "closed"


def test_closing_twice_does_nothing(door: Any) -> None:
    assert answer(door) == 42
    door.close()
    door.close()
    assert door.stats().state == "closed"
    assert door.stats().pools == ()


def test_a_closed_door_opens_again(open_door: Any, url: str) -> None:
    door = open_door()
    for _ in range(3):
        assert answer(door) == 42
        door.close()
        with pytest.raises(ManagerClosed):
            answer(door)
        door.init(url)
    assert answer(door) == 42


@pytest.mark.parametrize("how", ["with", "init"])
def test_a_door_opens_again_as_it_was(open_door: Any, url: str, how: str) -> None:
    """Without arguments: not from the environment, which names another database or none."""
    door = open_door(pool_size=2, max_overflow=0)
    for _ in range(3):
        door.close()
        if how == "init":
            door.init()
            assert answer(door) == 42
            (pool,) = door.stats().pools
        else:
            with door:
                assert answer(door) == 42
                (pool,) = door.stats().pools
        assert (pool.size, pool.overflow) == (2, 0)
    door.close()
    with door, door.reader() as db:
        assert db.connection().engine.url.database == make_url(url).database


def test_a_door_that_got_new_arguments_opens_again_with_those(open_door: Any, url: str) -> None:
    door = open_door(pool_size=2)
    door.close()
    with door.init(url, max_overflow=1):
        pass
    with door:
        answer(door)
        assert [(pool.size, pool.overflow) for pool in door.stats().pools] == [(5, 1)]


def test_init_again_takes_its_own_options(open_door: Any, url: str) -> None:
    door = open_door(pool_size=2, max_overflow=0)
    answer(door)
    assert [(pool.size, pool.overflow) for pool in door.stats().pools] == [(2, 0)]
    door.close()
    door.init(url, pool_size=3, max_overflow=1)
    answer(door)
    assert [(pool.size, pool.overflow) for pool in door.stats().pools] == [(3, 1)]


def test_a_second_init_is_refused_and_changes_nothing(door: Any, url: str) -> None:
    answer(door)
    before = door.engine
    with pytest.raises(AlreadyInitialized):
        door.init(url, pool_size=1)
    assert door.engine is before
    assert answer(door) == 42


def test_a_failed_init_leaves_the_door_as_it_was(open_door: Any, url: str) -> None:
    door = open_door()
    door.close()
    with pytest.raises(engineroom.ConfigurationError):
        door.init("nonsense")
    assert door.stats().state == "closed"
    door.init(url)
    assert answer(door) == 42


def test_close_inside_a_scope_is_refused_and_closes_nothing(door: Any) -> None:
    with door.session() as db:
        with pytest.raises(CloseInsideScope, match="opened at .*, and would wait"):
            door.close()
        assert db.scalar(text("SELECT 1")) == 1
    assert answer(door) == 42


def test_close_leaves_no_backend(door: Any, url: str, request: pytest.FixtureRequest) -> None:
    """Behind a pooler, whose backends stay, none of its clients."""
    with door.session() as db, door.reader() as reader:
        db.scalar(text("SELECT 1"))
        reader.scalar(text("SELECT 1"))
    door.close()
    if not url.startswith("sqlite"):
        wait = request.getfixturevalue("eventually")
        pooled = "DB_POOLER" in os.environ
        backends = request.getfixturevalue("pgbouncer").clients if pooled else None
        backends = backends or request.getfixturevalue("backends")
        wait(lambda: backends(url) == [])


def test_create_all_makes_the_tables_of_base(door: Any, url: str) -> None:
    door.create_all()
    door.create_all()
    with Database(url) as looker:
        assert Item.__tablename__ in inspect(looker.engine).get_table_names()


def test_create_all_takes_a_metadata(door: Any, url: str) -> None:
    mine = MetaData()
    Table("mine", mine, Column("n", Integer, primary_key=True))
    door.create_all(mine)
    with Database(url) as looker:
        assert inspect(looker.engine).get_table_names() == ["mine"]


def test_create_all_takes_the_metadata_of_init(open_door: Any, url: str) -> None:
    mine = MetaData()
    Table("mine", mine, Column("n", Integer, primary_key=True))
    open_door(metadata=mine).create_all()
    with Database(url) as looker:
        assert inspect(looker.engine).get_table_names() == ["mine"]


def test_the_engine_is_one_and_of_its_side(door: Any, twin: str) -> None:
    assert isinstance(door.engine, Engine if twin == "sync" else AsyncEngine)
    assert door.engine is door.engine


def test_sessions_use_the_pool_of_the_engine(door: Any) -> None:
    """Used directly, the engine shares permits and connections with the sessions."""
    answer(door)
    before = door.stats().pools[0].idle
    assert before == 1
    answer(door)
    assert [pool.idle for pool in door.stats().pools] == [1]


def test_the_managers_sync_side_is_a_database(sqlite_url: str) -> None:
    """`.sync` shares its manager's state; `sync_engine` and `sync_session()` are short for it."""

    async def main() -> None:
        manager = DatabaseSessionManager()
        assert isinstance(manager.sync, Database)
        async with manager.init(sqlite_url, sync_in_async="allow"):
            assert manager.sync_engine is manager.sync.engine
            await manager.create_all()
            with manager.sync_session() as db:
                assert isinstance(db, Session)
                db.add(Item(sku="a"))
            async with manager.session() as session:
                assert (await session.scalars(select(Item.sku))).all() == ["a"]
            assert manager.sync.stats().state == "open"
        assert manager.sync.stats().state == "closed"
        with pytest.raises(ManagerClosed), manager.sync.session():
            pass

    asyncio.run(main())


def test_sync_session_takes_what_session_takes(postgres_url: str) -> None:
    manager = DatabaseSessionManager().init(postgres_url)
    with manager.sync_session(read_only=True, isolation_level="SERIALIZABLE") as db:
        assert db.scalar(text("SHOW transaction_isolation")) == "serializable"
        assert db.scalar(text("SHOW transaction_read_only")) == "on"
    manager.sync.close()
    assert manager.stats().state == "closed"


def test_closing_before_init_does_nothing() -> None:
    manager = DatabaseSessionManager()
    manager.sync.close()
    asyncio.run(manager.close())
    assert manager.stats().state == "new"


def test_the_modules_manager_is_not_open() -> None:
    assert engineroom.session_manager.stats().state in ("new", "closed")  # by another test
    assert isinstance(engineroom.session_manager, DatabaseSessionManager)


def test_database_keeps_contract_two(url: str) -> None:
    """`get_engine()`, `get_session()` which the caller closes, `Base` and `get_base()`."""
    db = Database(url)
    assert db.get_engine() is db.engine
    assert Database.Base is Base
    assert db.get_base() is Base
    assert Database.get_base() is Base
    db.create_all()
    session = db.get_session()
    item = Item(sku="a")
    session.add(item)
    session.commit()
    assert "sku" in item.__dict__  # expire_on_commit=False here too
    session.close()
    session = db.get_session()
    session.add(Item(sku="b"))
    session.flush()
    session.close()  # without a commit
    with db.get_session() as session:
        assert session.scalars(select(Item.sku)).all() == ["a"]
    assert [pool.lent for pool in db.stats().pools] == [0]
    db.close()
    with pytest.raises(ManagerClosed):
        db.get_session()
    with pytest.raises(ManagerClosed):
        db.get_engine()


def test_a_database_is_open_when_made_and_has_not_connected(url: str) -> None:
    db = Database(url)
    assert db.stats().state == "open"
    assert db.stats().pools == ()
    with pytest.raises(AlreadyInitialized):
        db.init(url)
    db.close()


def test_a_subclass_may_bring_its_own_base() -> None:
    from sqlalchemy.orm import DeclarativeBase

    class Mine(DeclarativeBase):
        pass

    class Shop(Database):
        Base = Mine

    assert Shop.get_base() is Mine
