"""Other session classes, other metadata, and whatever else SQLAlchemy's engines take."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from behaviour_tables import Item
from sqlalchemy import JSON, Column, Integer, MetaData, Table, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from engineroom import ConfigurationError, Database, SessionClosed


class Counting(Session):
    """Counts its flushes, and has a verb of its own."""

    flushes = 0

    def flush(self, objects: Any = None) -> None:
        self.flushes += 1
        super().flush(objects)

    def one_more(self) -> Any:
        return self.scalar(text("SELECT 1"))


class AsyncCounting(AsyncSession):
    """Brings its synchronous class along, as SQLAlchemy documents it."""

    sync_session_class = Counting

    async def one_more(self) -> Any:
        return await self.scalar(text("SELECT 1"))


class Outspoken(Session):
    """Has attributes of its own, under names that engineroom might want for itself."""

    scope = "mine"
    obituary = "mine"
    closed = False

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.last_seen = "mine"
        self.greenlet = self.task = "mine"

    @property
    def ending(self) -> str:
        return "mine"


def test_a_session_class_may_name_its_attributes_as_it_likes(
    open_door: Any, shop: Any, plain: Any
) -> None:
    door = open_door(session_class=Outspoken)
    kept = []
    with door.session() as db:
        inner = getattr(plain(db), "sync_session", plain(db))
        kept.append(inner)
        db.add(Item(sku="a"))
        db.commit()
        db.add(Item(sku="b"))
        db.flush()
        db.rollback()
        db.add(Item(sku="c"))
        assert (inner.scope, inner.ending, inner.last_seen, inner.obituary) == ("mine",) * 4
    assert (inner.scope, inner.ending, inner.last_seen, inner.obituary) == ("mine",) * 4
    with pytest.raises(SessionClosed, match="that was opened at"):
        kept[0].scalar(text("SELECT 1"))
    with door.reader() as db:
        assert list(db.scalars(select(Item.sku).order_by(Item.sku))) == ["a", "c"]


def test_session_class_is_the_class_of_sessions(open_door: Any, plain: Any) -> None:
    door = open_door(session_class=Counting)
    with door.session() as db:
        inner = getattr(plain(db), "sync_session", plain(db))
        assert isinstance(inner, Counting)
        db.flush()
        assert inner.flushes == 1


def test_async_session_class_is_the_class_of_asynchronous_sessions(
    open_door: Any, plain: Any, twin: str
) -> None:
    """And its `sync_session_class` is the class under both twins."""
    door = open_door(async_session_class=AsyncCounting)
    with door.session() as db:
        if twin == "async":
            assert isinstance(plain(db), AsyncCounting)
            assert isinstance(plain(db).sync_session, Counting)
        else:
            assert isinstance(plain(db), Counting)
        assert db.one_more() == 1
    with pytest.raises(SessionClosed):
        db.one_more()


def test_listeners_of_a_session_class_hear_its_sessions(open_door: Any) -> None:
    class Mine(Session):
        pass

    heard: list[str] = []
    event.listen(Mine, "after_commit", lambda session: heard.append("commit"))
    event.listen(Mine, "after_rollback", lambda session: heard.append("rollback"))
    door = open_door(session_class=Mine)
    with door.session() as db:
        db.scalar(text("SELECT 1"))
    with pytest.raises(ValueError, match="mine"), door.session() as db:
        db.scalar(text("SELECT 1"))
        raise ValueError("mine")
    assert heard == ["commit", "rollback"]


def test_get_session_gives_the_session_class(url: str) -> None:
    with Database(url, session_class=Counting) as db, db.get_session() as session:
        assert isinstance(session, Counting)


def test_engine_options_reach_sqlalchemy(open_door: Any, url: str) -> None:
    documents = Table(
        "documents", MetaData(), Column("id", Integer, primary_key=True), Column("body", JSON)
    )
    door = open_door(
        metadata=documents.metadata,
        engine_options={"json_serializer": lambda value: json.dumps({"wrapped": value})},
    )
    door.create_all()
    with door.session() as db:
        db.execute(documents.insert().values(id=1, body=[1, 2]))
        assert db.scalar(select(documents.c.body)) == {"wrapped": [1, 2]}


def test_connect_args_reach_the_driver(open_door: Any, url: str, twin: str) -> None:
    if url.startswith("sqlite"):
        arguments, question, expected = (
            {"cached_statements": 0, "timeout": 1.5},
            "PRAGMA busy_timeout",
            1500,
        )
    elif url.startswith("mysql"):
        arguments = {"init_command": "SET @mine = 'mine'"}
        question, expected = "SELECT @mine", "mine"
    else:
        name: dict[str, Any] = {"application_name": "mine"}
        arguments = name if twin == "sync" else {"server_settings": name}
        question, expected = "SHOW application_name", "mine"
    door = open_door(engine_options={"connect_args": arguments})
    with door.session() as db:
        assert db.scalar(text(question)) == expected


def test_connect_args_do_not_undo_the_readers_guard(
    open_door: Any, shop: Any, url: str, twin: str
) -> None:
    """A user's `server_settings` or `options` are joined with ours, not replaced by them."""
    if url.startswith("sqlite"):
        arguments: dict[str, Any] = {"cached_statements": 10}
    elif twin == "sync" and "DB_POOLER" in os.environ:  # which refuses `options`
        arguments = {"application_name": "mine"}
    elif url.startswith("mysql"):
        arguments = {"init_command": "SET SESSION TRANSACTION READ WRITE"}
    elif twin == "sync":
        arguments = {"options": "-c application_name=mine"}
    else:
        arguments = {"server_settings": {"application_name": "mine"}}
    door = open_door(engine_options={"connect_args": arguments})
    with door.reader() as db:
        if url.startswith("postgresql"):
            assert db.scalar(text("SHOW application_name")) == "mine"
            assert db.scalar(text("SHOW transaction_read_only")) == "on"
        with pytest.raises(Exception, match="(?i)read.?only"):
            db.execute(text("DELETE FROM behaviour_item"))


def test_an_isolation_level_for_the_engine_does_not_undo_a_reader(
    open_door: Any, shop: Any
) -> None:
    """`engine_options={"isolation_level": …}` is of transactions; a reader has none."""
    door = open_door(engine_options={"isolation_level": "SERIALIZABLE"})
    with door.reader() as reader:
        assert reader.scalars(select(Item)).all() == []
        with shop.session() as db:
            db.add(Item(sku="a"))
        assert len(reader.scalars(select(Item)).all()) == 1


def test_execution_options_of_the_engine_reach_connections(open_door: Any, plain: Any) -> None:
    door = open_door(engine_options={"execution_options": {"mine": 1}})
    with door.connect() as connection:
        core = getattr(plain(connection), "sync_connection", connection)
        assert core.get_execution_options()["mine"] == 1


@pytest.mark.parametrize("name", ["poolclass", "pool_size", "creator", "echo"])
def test_what_engineroom_decides_is_refused_in_engine_options(open_door: Any, name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        open_door(engine_options={name: 1})


def test_an_engine_option_that_does_not_exist_is_named(open_door: Any) -> None:
    """SQLAlchemy's own error passes unchanged."""
    with pytest.raises(TypeError, match="jason_serializer"):
        open_door(engine_options={"jason_serializer": 1}).check()


def test_listeners_of_the_engine_hear_every_connection(open_door: Any) -> None:
    door = open_door()
    heard: list[Any] = []
    engine = getattr(door.engine, "sync_engine", door.engine)
    event.listen(engine, "connect", lambda *args: heard.append(args))
    with door.session(read_only=True) as one, door.session(read_only=True) as two:
        one.scalar(text("SELECT 1"))
        two.scalar(text("SELECT 1"))
    assert len(heard) == 2


def test_listeners_of_the_engine_hear_statements_of_sessions(open_door: Any) -> None:
    """With options too: a read-only session's bind is the same engine to its listeners."""
    door = open_door()
    heard: list[str] = []
    engine = getattr(door.engine, "sync_engine", door.engine)
    event.listen(engine, "before_cursor_execute", lambda *args: heard.append(args[2]))
    with door.session() as db:
        db.scalar(text("SELECT 41"))
    with door.session(read_only=True) as db:
        db.scalar(text("SELECT 42"))
    assert [text for text in heard if "SELECT" in text] == ["SELECT 41", "SELECT 42"]
