"""A session is a transaction: it commits, or rolls back, and is always closed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from behaviour_tables import Item
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from engineroom import SessionClosed
from engineroom.errors import AlreadyEntered


def skus(door: Any) -> list[str]:
    with door.session(read_only=True) as db:
        return list(db.scalars(select(Item.sku).order_by(Item.sku)))


class Oops(BaseException):
    """Not even an `Exception`."""


def test_a_session_commits_at_its_end(shop: Any) -> None:
    with shop.session() as db:
        db.add(Item(sku="a"))
    assert skus(shop) == ["a"]


@pytest.mark.parametrize("kind", [ValueError, Oops, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_session_rolls_back_on_any_exception_and_lets_it_through(
    shop: Any, kind: type[BaseException]
) -> None:
    mine = kind("mine")
    with pytest.raises(kind) as caught, shop.session() as db:
        db.add(Item(sku="a"))
        db.flush()
        raise mine
    assert caught.value is mine
    assert skus(shop) == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_session_is_closed_and_its_connection_returned_either_way(shop: Any, fails: bool) -> None:
    kept = []
    try:
        with shop.session() as db:
            kept.append(db)
            db.scalar(text("SELECT 1"))
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert not kept[0].in_transaction()
    assert shop.stats().scopes == ()
    assert sum(pool.lent for pool in shop.stats().pools) == 0
    with pytest.raises(SessionClosed):
        kept[0].scalar(text("SELECT 1"))


@pytest.mark.parametrize("loses", [True, False])
def test_who_closes_a_session_too_early_hears_what_is_lost(
    shop: Any, loses: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As an endpoint does whose recipe had it: it would answer 201, and nothing is stored."""
    with shop.session() as db:
        db.add(Item(sku="a"))
        if not loses:
            db.commit()
        db.close()
    assert skus(shop) == ([] if loses else ["a"])
    said = [r.getMessage() for r in caplog.records if "had not sent" in r.getMessage()]
    assert len(said) == loses
    assert not loses or re.match(
        r"The session opened at .*\.py:\d+ in .* was closed with 1 ", said[0]
    )


def test_a_commit_that_fails_raises_and_stores_nothing(shop: Any) -> None:
    with shop.session() as db:
        db.add(Item(sku="a"))
    with pytest.raises(IntegrityError), shop.session() as db:
        db.add(Item(sku="b"))
        db.add(Item(sku="a"))
    assert skus(shop) == ["a"]
    assert sum(pool.lent for pool in shop.stats().pools) == 0


def test_a_session_may_be_committed_and_rolled_back_in_between(shop: Any) -> None:
    with shop.session() as db:
        db.add(Item(sku="a"))
        db.commit()
        db.add(Item(sku="b"))
        db.flush()
        db.rollback()
        db.add(Item(sku="c"))
    assert skus(shop) == ["a", "c"]


@pytest.mark.parametrize("where", ["inside", "after"])
def test_a_session_goes_on_after_an_error_and_a_rollback(shop: Any, where: str) -> None:
    """Though the exception is kept, and its traceback keeps the old connection's proxy alive."""
    kept = []
    with shop.session() as db:
        db.add(Item(sku="a"))
        db.commit()
        try:
            db.add(Item(sku="a"))
            db.flush()
        except IntegrityError as error:
            kept.append(error)
            db.rollback()
            if where == "inside":
                assert db.scalar(select(Item.sku)) == "a"
                db.add(Item(sku="b"))
                db.flush()
        db.add(Item(sku="c"))
    with shop.session() as db:
        db.add(Item(sku="d"))
    with shop.connect() as connection:
        connection.execute(text("DELETE FROM behaviour_item WHERE sku = 'b'"))
    assert len(kept) == 1
    assert skus(shop) == ["a", "c", "d"]


@pytest.mark.parametrize("verb", ["session", "reader", "connect"])
def test_a_scope_is_not_entered_while_it_is_open(
    shop: Any, plain: Any, behind: Any, verb: str
) -> None:
    """But again after its end; and the first entry goes on, and commits."""
    scope = getattr(plain(shop), verb)()
    for number in range(2):
        with behind(scope) as db:
            if verb != "reader":
                db.execute(text(f"INSERT INTO behaviour_item (sku, stock) VALUES ('{number}', 0)"))
            for _ in range(2):
                with pytest.raises(AlreadyEntered, match=f"{verb} opened at .*in test_a_scope"):
                    behind(scope).__enter__()
            (seen,) = shop.stats().scopes
            assert seen.kind == verb
            assert db.scalar(text("SELECT count(*) FROM behaviour_item")) in {0, number + 1}
        assert shop.stats().scopes == ()
    assert skus(shop) == ([] if verb == "reader" else ["0", "1"])


def test_an_empty_session_sends_nothing(shop: Any) -> None:
    """Nothing is sent before the first statement: not even a connection is made."""
    connects: list[Any] = []
    engine = shop.engine
    event.listen(
        getattr(engine, "sync_engine", engine), "connect", lambda *args: connects.append(args)
    )
    with shop.session() as db:
        db.add(Item(sku="a"))
        assert not connects
        db.expunge_all()
    with pytest.raises(ValueError), shop.session():  # noqa: PT011
        raise ValueError
    with shop.reader():
        pass
    assert not connects
    assert sum(pool.idle + pool.lent for pool in shop.stats().pools) == 0


def test_a_read_only_session_reads(shop: Any) -> None:
    with shop.session() as db:
        db.add(Item(sku="a"))
    assert skus(shop) == ["a"]


@pytest.mark.parametrize(
    "write",
    ["INSERT INTO behaviour_item (sku, stock) VALUES ('x', 1)", "CREATE TABLE sneaked (n int)"],
)
def test_the_server_refuses_writes_of_a_read_only_session(shop: Any, write: str) -> None:
    with pytest.raises(DBAPIError, match="(?i)read.?only"), shop.session(read_only=True) as db:
        db.execute(text(write))
    assert skus(shop) == []


def test_a_read_only_session_leaves_the_next_one_free_to_write(open_door: Any, shop: Any) -> None:
    one = open_door(pool_size=1, max_overflow=0)
    assert skus(one) == []
    with one.session() as db:
        db.add(Item(sku="a"))
    assert skus(one) == ["a"]


def test_a_read_only_session_sees_one_moment_of_the_database(
    shop: Any, open_door: Any, url: str
) -> None:
    isolation = None if url.startswith("sqlite") else "REPEATABLE READ"
    with shop.session(read_only=True, isolation_level=isolation) as db:
        assert db.scalars(select(Item.sku)).all() == []
        with shop.session() as other:
            other.add(Item(sku="late"))
        assert db.scalars(select(Item.sku)).all() == []
    assert skus(shop) == ["late"]


def test_the_isolation_level_is_that_of_one_transaction(open_door: Any, url: str) -> None:
    one = open_door(pool_size=1, max_overflow=0)
    if url.startswith("sqlite"):
        question, asked, usual = "PRAGMA read_uncommitted", 1, 0
        level = "READ UNCOMMITTED"
    elif url.startswith("mysql"):
        question, asked, usual = "SELECT @@tx_isolation", "SERIALIZABLE", "REPEATABLE-READ"
        level = "SERIALIZABLE"
    else:
        question, asked, usual = "SHOW transaction_isolation", "serializable", "read committed"
        level = "SERIALIZABLE"
    for _ in range(2):
        with one.session(isolation_level=level) as db:
            assert db.scalar(text(question)) == asked
        with one.session() as db:
            assert db.scalar(text(question)) == usual


def test_isolation_level_and_read_only_go_together(open_door: Any, url: str) -> None:
    with open_door().session(read_only=True, isolation_level="SERIALIZABLE") as db:
        if url.startswith("sqlite"):
            assert db.scalar(text("PRAGMA query_only")) == 1
            assert db.scalar(text("PRAGMA read_uncommitted")) == 0
        elif url.startswith("mysql"):
            assert db.scalar(text("SELECT @@tx_read_only")) == 1
            assert db.scalar(text("SELECT @@tx_isolation")) == "SERIALIZABLE"
        else:
            assert db.scalar(text("SHOW transaction_read_only")) == "on"
            assert db.scalar(text("SHOW transaction_isolation")) == "serializable"


def test_a_savepoint_rolls_back_alone(shop: Any) -> None:
    """On SQLite too, where the driver by itself would begin too late for it."""
    with shop.session() as db:
        db.add(Item(sku="before"))
        with pytest.raises(ValueError, match="mine"), db.begin_nested():
            db.add(Item(sku="inside"))
            db.flush()
            raise ValueError("mine")
        with db.begin_nested():
            db.add(Item(sku="kept"))
        db.add(Item(sku="after"))
    assert skus(shop) == ["after", "before", "kept"]


def test_a_savepoint_goes_down_with_its_session(shop: Any) -> None:
    """A released savepoint does not survive the rollback of its transaction."""
    with pytest.raises(ValueError, match="mine"), shop.session() as db:
        with db.begin_nested():
            db.add(Item(sku="inside"))
        raise ValueError("mine")
    assert skus(shop) == []


def test_a_savepoint_as_the_first_statement_rolls_back(shop: Any) -> None:
    with shop.session() as db:
        with pytest.raises(IntegrityError), db.begin_nested():
            db.execute(text("INSERT INTO behaviour_item (id, sku, stock) VALUES (1, 'a', 0)"))
            db.execute(text("INSERT INTO behaviour_item (id, sku, stock) VALUES (1, 'b', 0)"))
        db.execute(text("INSERT INTO behaviour_item (id, sku, stock) VALUES (2, 'c', 0)"))
    assert skus(shop) == ["c"]


def test_rows_are_whole_after_a_flush(shop: Any) -> None:
    with shop.session() as db:
        item = Item(sku="a")
        db.add(item)
        db.flush()
        assert "made" in item.__dict__
        assert item.id
    assert item.made


def test_expire_on_commit_and_autoflush_are_off(shop: Any) -> None:
    with shop.session() as db:
        item = Item(sku="a")
        db.add(item)
        assert db.scalars(select(Item)).all() == []  # no autoflush
        db.commit()
        assert "sku" in item.__dict__  # not expired


def test_expire_on_commit_is_a_setting(shop: Any, open_door: Any) -> None:
    with open_door(expire_on_commit=True).session() as db:
        item = Item(sku="a")
        db.add(item)
        db.commit()
        assert "sku" not in item.__dict__


def test_autoflush_is_a_setting(shop: Any, open_door: Any) -> None:
    with open_door(autoflush=True).session() as db:
        db.add(Item(sku="a"))
        assert [item.sku for item in db.scalars(select(Item))] == ["a"]


def test_a_user_may_begin_a_transaction_block(shop: Any) -> None:
    with shop.session() as db:
        with db.begin():
            db.add(Item(sku="a"))
        with pytest.raises(ValueError, match="mine"), db.begin():
            db.add(Item(sku="b"))
            raise ValueError("mine")
    assert skus(shop) == ["a"]


def test_sessions_side_by_side_are_two_transactions(shop: Any) -> None:
    """One session does not see what another has not committed."""
    with shop.session() as db:
        db.add(Item(sku="a"))
        db.flush()
        assert skus(shop) == []
    assert skus(shop) == ["a"]
