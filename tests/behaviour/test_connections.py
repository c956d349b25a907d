"""`connect()` gives a connection in a transaction, for Core."""

from __future__ import annotations

from typing import Any

import pytest
from behaviour_tables import Item
from sqlalchemy import insert, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncConnection


def count(door: Any) -> int:
    with door.connect() as connection:
        return int(connection.scalar(text("SELECT count(*) FROM behaviour_item")))


def test_connect_gives_a_connection_of_its_side(door: Any, twin: str, plain: Any) -> None:
    with door.connect() as connection:
        assert isinstance(plain(connection), Connection if twin == "sync" else AsyncConnection)
        assert connection.in_transaction()


def test_connect_commits_at_its_end(shop: Any) -> None:
    with shop.connect() as connection:
        connection.execute(insert(Item).values(sku="a"))
    assert count(shop) == 1


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_connect_rolls_back_on_any_exception(shop: Any, kind: type[BaseException]) -> None:
    with pytest.raises(kind, match="mine"), shop.connect() as connection:
        connection.execute(insert(Item).values(sku="a"))
        raise kind("mine")
    assert count(shop) == 0
    assert sum(pool.lent for pool in shop.stats().pools) == 0


def test_a_connection_is_closed_after_its_scope(door: Any) -> None:
    with door.connect() as connection:
        connection.execute(text("SELECT 1"))
    assert connection.closed
    with pytest.raises(ResourceClosedError):
        connection.execute(text("SELECT 1"))


def test_a_savepoint_of_a_connection_rolls_back_alone(shop: Any) -> None:
    with shop.connect() as connection:
        with pytest.raises(ValueError, match="mine"), connection.begin_nested():
            connection.execute(insert(Item).values(sku="a"))
            raise ValueError("mine")
        connection.execute(insert(Item).values(sku="b"))
    assert count(shop) == 1


@pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True)  # MySQL refuses nothing
def test_autocommit_runs_what_refuses_a_transaction(shop: Any) -> None:
    with pytest.raises(DBAPIError, match="VACUUM"), shop.connect() as connection:
        connection.execute(text("VACUUM"))
    with shop.connect(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM"))


def test_autocommit_keeps_each_statement(shop: Any) -> None:
    with (
        pytest.raises(ValueError, match="mine"),
        shop.connect(isolation_level="AUTOCOMMIT") as connection,
    ):
        connection.execute(insert(Item).values(sku="a"))
        raise ValueError("mine")
    assert count(shop) == 1


def test_autocommit_ends_with_its_scope(shop: Any, open_door: Any) -> None:
    one = open_door(pool_size=1, max_overflow=0)
    with one.connect(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SELECT 1"))
    with pytest.raises(ValueError, match="mine"), one.connect() as connection:
        connection.execute(insert(Item).values(sku="a"))
        raise ValueError("mine")
    with pytest.raises(ValueError, match="mine"), one.session() as db:
        with db.begin_nested():
            db.execute(insert(Item).values(sku="b"))
        raise ValueError("mine")
    assert count(one) == 0


def test_a_user_may_end_the_transaction_early(shop: Any) -> None:
    with shop.connect() as connection:
        connection.execute(insert(Item).values(sku="a"))
        connection.rollback()
    with shop.connect() as connection:
        connection.execute(insert(Item).values(sku="b"))
        connection.commit()
        connection.execute(insert(Item).values(sku="c"))
    assert count(shop) == 2


def test_a_user_may_close_the_connection_early(shop: Any) -> None:
    with shop.connect() as connection:
        connection.execute(insert(Item).values(sku="a"))
        connection.commit()
        connection.close()
    assert count(shop) == 1
    assert shop.stats().scopes == ()


def test_sessions_read_what_core_wrote(shop: Any) -> None:
    with shop.connect() as connection:
        connection.execute(insert(Item).values(sku="a"))
    with shop.session() as db:
        assert db.scalars(select(Item.sku)).all() == ["a"]
