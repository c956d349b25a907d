"""One suite for both twins: each test is written once, for a door whose verbs return when done.

The asynchronous twin gets that face from SQLAlchemy's own seam: its tests run in a greenlet of an
event loop, and whatever a verb gives to be awaited is awaited from there.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from behaviour_tables import Item
from pgbouncer import PgBouncer
from sqlalchemy.util import await_only, greenlet_spawn

from engineroom import Database, DatabaseSessionManager

OpenDoor = Callable[..., Any]
POOLED = {"test_connections.py", "test_readers.py", "test_sessions.py"}  # the others: `make soak`


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most of what runs behind a pooler to the long runs."""
    for item in items:
        if "pooled" in item.nodeid.rpartition("[")[2] and item.path.name not in POOLED:
            item.add_marker(pytest.mark.soak)


class Waited:
    """An asynchronous object whose verbs return when done; `plain` is the object itself."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.plain, name)
        if not callable(value) or inspect.isclass(value):
            return value
        return lambda *args, **kw: waited(value(*args, **kw))

    def __enter__(self) -> Any:
        return waited(await_only(self.plain.__aenter__()))

    def __exit__(self, *raised: object) -> Any:
        return await_only(self.plain.__aexit__(*raised))


def waited(value: Any) -> Any:
    """Wait for what can be awaited, and wrap what has asynchronous verbs."""
    if hasattr(value, "__aenter__"):
        return Waited(value)
    return waited(await_only(value)) if inspect.isawaitable(value) else value


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test of the asynchronous twin in an event loop."""
    if pyfuncitem.funcargs.get("twin") != "async":
        return None
    given = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(greenlet_spawn(pyfuncitem.obj, **given))
    return True


@pytest.fixture(params=["sqlite", "postgresql", "pooled", "mysql"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a fresh database on each of the three, and behind PgBouncer."""
    if request.param == "pooled":
        monkeypatch.setenv("DB_POOLER", "transaction")
        pooler: PgBouncer = request.getfixturevalue("pgbouncer")
        return pooler.url(request.getfixturevalue("database"))
    names = {"sqlite": "sqlite_url", "postgresql": "postgres_url", "mysql": "mysql_url"}
    value: str = request.getfixturevalue(names[request.param])
    return value


@pytest.fixture(params=["sync", "async"])
def twin(request: pytest.FixtureRequest) -> str:
    """Which of the twins the test is run for."""
    return str(request.param)


@pytest.fixture
def plain() -> Callable[[Any], Any]:
    """Give what stands behind a door, a session or a connection: either twin's own object."""
    return lambda thing: thing.plain if isinstance(thing, Waited) else thing


@pytest.fixture
def behind(twin: str) -> Callable[[Any], Any]:
    """Put the door's face on an object that the test has made on a line of its own."""
    return (lambda thing: thing) if twin == "sync" else Waited


@pytest.fixture
def open_door(twin: str, url: str) -> Iterator[OpenDoor]:
    """Open a door of this twin, to a fresh database unless told where; it is closed at the end."""
    opened: list[Any] = []

    def open_one(*where: Any, **options: Any) -> Any:
        if not where and not {"url", "database_url"} & options.keys():
            where = (url,)
        door: Any
        if twin == "sync":
            door = Database(*where, **options)
        else:
            door = Waited(DatabaseSessionManager().init(*where, **options))
        opened.append(door)
        return door

    yield open_one
    for door in opened:
        if twin == "sync":
            door.close(timeout=0)
        else:
            asyncio.run(door.plain.close(timeout=0))


@pytest.fixture
def door(open_door: OpenDoor) -> Any:
    """A door of this twin, open to a fresh database."""
    return open_door()


@pytest.fixture
def shop(door: Any, url: str) -> Any:
    """A door to a database that has the table `Item`, and that has not connected so far."""
    with Database(url) as maker:
        Item.metadata.create_all(maker.engine, [Item.__table__])
    return door
