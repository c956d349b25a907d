"""psycopg's columns: written down when they are read, and then as psycopg itself would."""

from __future__ import annotations

import asyncio
import copy
import operator
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types import TypeInfo
from scenario import Item, Model
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from engineroom import DatabaseSessionManager

KINDS = "SELECT 1 AS one, 'x'::varchar(9) AS nine, 1.5::numeric(4, 2) AS price, '{}'::date[], NULL"


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[Callable[..., Any]]:
    """Runs a unit with a session, on either side of psycopg."""
    manager = DatabaseSessionManager().init(
        postgres_url.replace(":", "+psycopg:", 1), metadata=Model.metadata
    )
    manager.sync.create_all()
    loop = asyncio.new_event_loop()

    def run_sync(work: Callable[[Session], Any]) -> Any:
        with manager.sync_session() as db:
            return work(db)

    async def run_async(work: Callable[[Session], Any]) -> Any:
        async with manager.session() as db:
            return await db.run_sync(work)

    is_sync = request.param == "sync"
    yield run_sync if is_sync else lambda work: loop.run_until_complete(run_async(work))
    loop.run_until_complete(manager.close())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def said(description: Any) -> list[Any]:
    """Return all that psycopg says of the columns."""
    return [(*column, column.type_display, repr(column)) for column in description]


@contextmanager
def counted() -> Iterator[list[str]]:
    """Note each column that psycopg writes down."""
    written: list[str] = []

    def look(frame: FrameType, what: str, argument: object) -> None:
        if what == "call" and frame.f_code is psycopg.Column.__init__.__code__:
            written.append(repr(frame.f_locals["index"]))

    sys.setprofile(look)
    try:
        yield written
    finally:
        sys.setprofile(None)


def test_nothing_is_written_down_of_what_is_known(run: Callable[..., Any]) -> None:
    def read(db: Session) -> None:
        assert db.get_one(Item, 1).value == 5

    def watched(db: Session) -> list[str]:
        with counted() as written:
            read(db)
        return written

    run(lambda db: db.add(Item(id=1, value=5)))
    assert len(run(watched)) == len(Item.__table__.columns)  # the first time
    assert run(watched) == []


@pytest.mark.parametrize("late", [True, False])
def test_it_says_what_psycopg_says_whenever_it_is_read(
    run: Callable[..., Any], postgres_url: str, late: bool
) -> None:
    with psycopg.connect(postgres_url) as plain:
        expected = plain.execute(KINDS).description
        assert expected is not None
        nothing = plain.execute("SELECT").description

    def compare(db: Session) -> None:
        with closing(db.connection().connection.cursor()) as cursor:
            if late:  # as those are that SQLAlchemy asks for itself
                getattr(cursor, "_cursor", cursor).describes_late = True
            assert cursor.description is None
            cursor.execute("SELECT")
            assert cursor.description == nothing == []
            cursor.execute(KINDS)
            at_once, later, closed = (cursor.description for _ in range(3))
            assert said(at_once) == said(expected)
            assert (type(at_once) is list) == (not late)
            assert len(later) == len(expected)
            cursor.execute("SELECT 2 AS two")
            assert said(later) == said(expected)
            assert (later[1].name, later[-1].name) == ("nine", expected[-1].name)
            assert [column.name for column in later[:2]] == ["one", "nine"]
            assert later != at_once  # (each of psycopg's columns is equal to itself alone)
            assert later == list(later)
            assert repr(later) == repr(expected)
            assert cursor.description[0].name == "two"
            cursor.execute("CREATE TEMP TABLE gone (id int) ON COMMIT DROP")
            assert cursor.description is None
        assert said(closed) == said(expected)

    run(compare)


def test_rows_by_name_are_as_without_it(run: Callable[..., Any]) -> None:
    def read(db: Session) -> None:
        driver = db.connection().connection.driver_connection
        cursor = driver.cursor(row_factory=dict_row)
        asked = cursor.execute("SELECT 1 AS one, 2 AS two")
        if asyncio.iscoroutine(asked):
            asked.close()
            return
        assert cursor.fetchall() == [{"one": 1, "two": 2}]

    run(read)


def test_a_cursor_that_describes_by_itself_is_left_alone(postgres_url: str) -> None:
    class Own(psycopg.Cursor[Any]):
        @property
        def description(self) -> Any:
            return None if super().description is None else ["mine"]

    manager = DatabaseSessionManager().init(
        postgres_url.replace(":", "+psycopg:", 1),
        engine_options={"connect_args": {"cursor_factory": Own}},
    )
    with manager.sync.connect() as connection:
        cursor: Any = connection.connection.cursor()
        cursor.execute("SELECT 1")
        assert cursor.description == ["mine"]
    manager.sync.close()


def test_what_a_cursor_knows_of_types_is_said(run: Callable[..., Any], postgres_url: str) -> None:
    with psycopg.connect(postgres_url) as plain:
        plain.execute("CREATE TYPE mood AS ENUM ('well')")
        info = TypeInfo.fetch(plain, "mood")
        assert info is not None

    def register(context: Any) -> None:
        cursor = getattr(context.cursor, "_cursor", context.cursor)
        info.register(cursor)

    def work(db: Session) -> list[str]:
        def before(*arguments: Any) -> None:
            register(arguments[4])

        event.listen(db.get_bind(), "before_cursor_execute", before)
        said: list[str] = []
        event.listen(
            db.get_bind(),
            "after_cursor_execute",
            lambda *arguments: said.append(arguments[1].description[0].type_display),
        )
        db.execute(text("SELECT 'well'::mood"))
        return said

    assert run(work) == ["mood"]


def test_a_cursor_class_that_wants_its_row_factory_is_used_as_it_is(
    run: Callable[..., Any],
) -> None:
    def work(db: Session) -> list[str]:
        driver: Any = db.connection().connection.driver_connection
        base = driver.cursor_factory

        class Own(base):  # type: ignore[misc]  # a parameter is its base
            def __init__(self, connection: Any, *, row_factory: Any) -> None:
                super().__init__(connection, row_factory=row_factory)

        driver.cursor_factory = Own
        return list(db.execute(text("SELECT 1 AS one, 2 AS two")).keys())

    assert run(work) == ["one", "two"]


def test_what_takes_a_list_takes_it(run: Callable[..., Any]) -> None:
    def work(db: Session) -> list[Any]:
        said: list[Any] = []
        event.listen(
            db.get_bind(),
            "after_cursor_execute",
            lambda *arguments: said.append(arguments[1].description),
        )
        for _ in range(3):
            db.execute(text("SELECT 1 AS one, 2 AS two"))
        return said

    first, second, third = run(work)
    more = operator.add([*second], operator.add(third, second))
    assert [column.name for column in more] == ["one", "two"] * 3
    assert [column.name for column in pickle.loads(pickle.dumps(first))] == ["one", "two"]
    assert copy.copy(third) == [*third]
