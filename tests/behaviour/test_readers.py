"""A reader has no transaction: each statement stands alone, and the server refuses writes."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
from behaviour_tables import Item
from sqlalchemy import select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from engineroom import SessionClosed


def test_a_reader_sees_committed_rows(shop: Any) -> None:
    with shop.session() as db:
        db.add(Item(sku="a"))
    with shop.reader() as db:
        assert [item.sku for item in db.scalars(select(Item))] == ["a"]


def test_each_statement_of_a_reader_stands_alone(shop: Any) -> None:
    """What was committed in between is seen by the next statement: no snapshot is held."""
    with shop.reader() as reader:
        assert reader.scalars(select(Item)).all() == []
        with shop.session() as db:
            db.add(Item(sku="a"))
        assert [item.sku for item in reader.scalars(select(Item))] == ["a"]


def test_a_reader_does_not_see_what_is_not_committed(shop: Any) -> None:
    with shop.session() as db:
        db.add(Item(sku="a"))
        db.flush()
        with shop.reader() as reader:
            assert reader.scalars(select(Item)).all() == []


@pytest.mark.parametrize(
    "write",
    [
        "INSERT INTO behaviour_item (sku, stock) VALUES ('x', 1)",
        "UPDATE behaviour_item SET stock = 7",
        "DELETE FROM behaviour_item",
        "CREATE TABLE sneaked (n int)",
    ],
)
def test_the_server_refuses_a_readers_writes_in_text_too(shop: Any, write: str) -> None:
    with shop.session() as db:
        db.add(Item(sku="a", stock=1))
    with pytest.raises(DBAPIError, match="(?i)read.?only"), shop.reader() as db:
        db.execute(text(write))
    with shop.reader() as db:
        assert [(item.sku, item.stock) for item in db.scalars(select(Item))] == [("a", 1)]


def test_the_server_refuses_what_a_reader_would_flush(shop: Any) -> None:
    with pytest.raises(DBAPIError, match="(?i)read.?only"), shop.reader() as db:
        db.add(Item(sku="a"))
        db.flush()
    with shop.reader() as db:
        assert db.scalars(select(Item)).all() == []


def test_pending_changes_of_a_reader_do_not_vanish_silently(shop: Any) -> None:
    """A reader never writes; and it says so, rather than to drop what was added."""
    with pytest.raises(Exception, match="(?i)read.?only|reader"), shop.reader() as db:
        db.scalars(select(Item)).all()
        db.add(Item(sku="a"))


def test_what_a_reader_loaded_stays_readable(shop: Any) -> None:
    with shop.session() as db:
        db.add(Item(sku="a"))
    with shop.reader() as db:
        item = db.scalars(select(Item)).one()
    assert item.sku == "a"
    with pytest.raises(SessionClosed):
        db.scalars(select(Item))


def test_a_refused_write_leaves_the_reader_and_its_pool_usable(shop: Any) -> None:
    with shop.reader() as db:
        with pytest.raises(DBAPIError):
            db.execute(text("DELETE FROM behaviour_item"))
        assert db.scalar(text("SELECT 1")) == 1
    with shop.reader() as db:
        assert db.scalar(text("SELECT 2")) == 2


def test_check_says_what_the_database_is_and_how_it_was_reached(door: Any, url: str) -> None:
    found = door.check()
    assert found.seconds >= found.latency > 0
    assert (found.role, found.tls, found.problems) == ("primary", None, ())
    assert found.url == str(make_url(url).set(drivername=url.partition(":")[0]))
    if url.startswith("sqlite"):
        assert (found.address, found.skew) == (None, None)
        assert found.server == f"SQLite {sqlite3.sqlite_version}"
    else:
        assert found.server.startswith(("PostgreSQL ", "MariaDB "))
        assert abs(found.skew) < 1  # one machine has one clock
    assert found.pools == door.stats().pools
    assert f"{found.server}, primary" in str(found)
    assert door.stats().scopes == ()
    assert sum(pool.idle for pool in door.stats().pools) == 1


def test_check_raises_what_the_driver_says(open_door: Any, url: str, tmp_path: Any) -> None:
    if url.startswith("sqlite"):
        broken = tmp_path / "no-database.sqlite"
        broken.write_bytes(b"This is not a database, and long enough to tell." * 100)
        nowhere = open_door(f"sqlite:///{broken}")
    else:
        nowhere = open_door(f"{url.partition(':')[0]}://nobody@127.0.0.1:1/nothing")
    with pytest.raises((DBAPIError, OSError)):
        nowhere.check()


def has_no_transaction(request: pytest.FixtureRequest) -> bool:
    """Whether it is PostgreSQL, and no pooler stands before it: there a reader has one."""
    return "postgresql" in request.node.name


INSTEAD = [
    ("SAVEPOINT one", "session(read_only=True)"),
    ("LOCK TABLE pg_class IN ACCESS SHARE MODE", "session(read_only=True)"),
    ("DECLARE c CURSOR FOR SELECT 1", "session(read_only=True)"),
    ("CREATE TEMPORARY TABLE t (id int)", "Take session()."),
]


@pytest.mark.parametrize(("statement", "instead"), INSTEAD)
def test_an_error_says_what_to_take_instead_of_a_reader(
    shop: Any, statement: str, instead: str, request: pytest.FixtureRequest
) -> None:
    if not has_no_transaction(request):
        return
    with pytest.raises(DBAPIError) as caught, shop.reader() as db:
        db.execute(text(statement))
    assert instead in caught.value.__notes__[-1]
    with shop.session(read_only=True) as db:
        if "TEMPORARY" not in statement:
            db.execute(text(statement))


def test_an_error_of_a_stream_says_what_to_take_instead_of_a_reader(
    shop: Any, request: pytest.FixtureRequest
) -> None:
    if not has_no_transaction(request):
        return
    with pytest.raises(DBAPIError) as caught, shop.reader() as db:
        db.scalars(select(Item).execution_options(yield_per=10)).all()
    assert "session(read_only=True)" in caught.value.__notes__[-1]
