"""A scope that one thread leaves while another is in the middle of a call on its session."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from scenario import Item, Model, is_postgres, until
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from engineroom import Database
from engineroom.errors import SessionClosed, SessionInUse
from engineroom.testing import PostgresServer

ENDLESS = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT sum(n) FROM t"


@pytest.fixture(params=["psycopg", "psycopg2", "sqlite"])
def door(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database with a table, on each synchronous driver."""
    if request.param == "sqlite":
        url: str = request.getfixturevalue("sqlite_url")
    else:
        server: PostgresServer = request.getfixturevalue("pg18")
        url = server.url(request.getfixturevalue("database"), request.param)
    with Database(url, metadata=Model.metadata, pool_size=1, max_overflow=0) as made:
        made.create_all()
        yield made


class Worker:
    """A thread that runs a statement without an end on somebody else's session."""

    def __init__(self, door: Database, session: Session) -> None:
        self.session = session
        self.statement = text(
            "SELECT pg_sleep(1000)" if is_postgres(str(door.engine.url)) else ENDLESS
        )
        self.caught: list[BaseException] = []
        self.thread = threading.Thread(target=self.run, name="worker", daemon=True)
        self.thread.start()
        until(lambda: doing(door), lambda words: "running for" in words)
        time.sleep(0.1)  # the statement is on its way by now

    def run(self) -> None:
        for statement in (self.statement, text("SELECT 1")):
            try:
                self.session.execute(statement)
            except BaseException as error:
                self.caught.append(error)

    def assert_left(self) -> None:
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert isinstance(self.caught[0], DBAPIError)
        assert isinstance(self.caught[1], SessionClosed)


def doing(door: Database) -> str:
    return " ".join(holder.doing for pool in door.stats().pools for holder in pool.holders)


def assert_nothing_is_left(door: Database) -> None:
    assert [pool.lent for pool in door.stats().pools if pool.role == "primary"] == [0]
    with door.session() as db:
        assert db.scalars(select(Item.id)).all() == []


def test_the_thread_is_made_to_leave_and_the_scope_says_so(door: Database) -> None:
    with pytest.raises(SessionInUse) as caught, door.session() as db:
        db.execute(insert(Item).values(id=1))
        worker = Worker(door, db)
    for word in ("test_threads.py", "thread MainThread", "thread worker", "open one in each"):
        assert word in str(caught.value)
    worker.assert_left()
    assert_nothing_is_left(door)


def test_the_bodys_own_exception_says_more(door: Database) -> None:
    with pytest.raises(ValueError, match="mine"), door.session() as db:
        db.execute(insert(Item).values(id=1))
        worker = Worker(door, db)
        raise ValueError("mine")
    worker.assert_left()
    assert_nothing_is_left(door)
