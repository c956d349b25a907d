"""Who is measured: engineroom, SQLAlchemy tuned by hand, and the recipe that people copy.

All of them ask the same of the same table, each through an engine of its own with the same pool and
the same session settings. What differs is what the comparison is about.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from typing import Any, Literal, Protocol, TypedDict

from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from engineroom import Database, DatabaseSessionManager

ROWS = 100


class PoolOptions(TypedDict):
    """What an engine takes about its pool."""

    pool_size: int
    max_overflow: int
    pool_recycle: int


class SessionOptions(TypedDict):
    """What a session takes."""

    expire_on_commit: bool
    autoflush: bool


POOL: PoolOptions = {"pool_size": 10, "max_overflow": 0, "pool_recycle": 3600}
SESSION: SessionOptions = {"expire_on_commit": False, "autoflush": False}


class Base(DeclarativeBase):
    """SQLAlchemy's own declarative base: the model favours nobody."""


class Item(Base):
    """The one table."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    count: Mapped[int]


def fill(url: str) -> None:
    """Make the table and its rows."""
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    with Session(engine) as db, db.begin():
        db.add_all(Item(id=key, name=f"item {key}", count=0) for key in range(1, ROWS + 1))
    engine.dispose()


# --- What they do, and how often. -----------------------------------------------------------------

Side = Literal["asyncio", "uvloop", "sync"]
Work = Literal["get", "update"]
Name = Literal["hand-tuned", "engineroom", "engineroom reader", "recipe"]
BASELINE: Name = "hand-tuned"
READER: Name = "engineroom reader"

AsyncScope = Callable[[], AbstractAsyncContextManager[AsyncSession]]
SyncScope = Callable[[], AbstractContextManager[Session]]


class Contender(Protocol):
    """One way to open a session, and units of work done through it."""

    def do(self, work: Work, units: int, concurrency: int = 1) -> None:
        """Do so many units of work, by so many tasks at once, each on rows of its own."""

    def close(self) -> None:
        """Close its connections."""


@contextmanager
def contender(name: Name, url: str, side: Side) -> Generator[Contender]:
    """Open a contender on one side, with an engine (and an event loop) of its own."""
    opened: Contender
    if side == "sync":
        opened = SyncContender(*SYNC[name](make_url(url)))
    else:
        opened = AsyncContender(*ASYNC[name](make_url(url)), loop_factory(side))
    try:
        yield opened
    finally:
        opened.close()


def loop_factory(side: Side) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes this side's event loop."""
    if side == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    return asyncio.new_event_loop


def keys(task: int, units: int, concurrency: int) -> Iterator[int]:
    """Choose the rows for one task's share of the units."""
    for unit in range(task, units, concurrency):
        yield unit % ROWS + 1


class AsyncContender:
    """Units of work on an event loop."""

    def __init__(
        self,
        scope: AsyncScope,
        dispose: Callable[[], Coroutine[Any, Any, None]],
        loop_factory: Callable[[], asyncio.AbstractEventLoop],
    ) -> None:
        self.scope = scope
        self.dispose = dispose
        self.runner = asyncio.Runner(loop_factory=loop_factory)

    def do(self, work: Work, units: int, concurrency: int = 1) -> None:
        """Do so many units of work, by so many tasks at once, each on rows of its own."""
        self.runner.run(self._do(work, units, concurrency))

    async def _do(self, work: Work, units: int, concurrency: int) -> None:
        task = self._get if work == "get" else self._update
        await asyncio.gather(
            *(task(keys(number, units, concurrency)) for number in range(concurrency))
        )

    async def _get(self, keys: Iterator[int]) -> None:
        for key in keys:
            async with self.scope() as db:
                await db.get_one(Item, key)

    async def _update(self, keys: Iterator[int]) -> None:
        for key in keys:
            async with self.scope() as db:
                item = await db.get_one(Item, key)
                item.count += 1

    def close(self) -> None:
        """Close its connections and its event loop."""
        with self.runner:
            self.runner.run(self.dispose())


class SyncContender:
    """Units of work in this thread, one after another."""

    def __init__(self, scope: SyncScope, dispose: Callable[[], None]) -> None:
        self.scope = scope
        self.dispose = dispose

    def do(self, work: Work, units: int, concurrency: int = 1) -> None:
        """Do so many units of work."""
        assert concurrency == 1, "one thread does one thing at a time"
        if work == "get":
            self._get(keys(0, units, 1))
        else:
            self._update(keys(0, units, 1))

    def _get(self, keys: Iterator[int]) -> None:
        for key in keys:
            with self.scope() as db:
                db.get_one(Item, key)

    def _update(self, keys: Iterator[int]) -> None:
        for key in keys:
            with self.scope() as db:
                item = db.get_one(Item, key)
                item.count += 1

    def close(self) -> None:
        """Close its connections."""
        self.dispose()


# --- Who they are: how each opens a session, and how it closes its engine. ------------------------

AsyncDoor = tuple[AsyncScope, Callable[[], Coroutine[Any, Any, None]]]
SyncDoor = tuple[SyncScope, Callable[[], None]]


def engineroom(url: URL) -> AsyncDoor:
    """A transaction."""
    manager = DatabaseSessionManager().init(url, **POOL, **SESSION)
    return manager.session, manager.close


def engineroom_reader(url: URL) -> AsyncDoor:
    """No transaction."""
    manager = DatabaseSessionManager().init(url, **POOL, **SESSION)
    return manager.reader, manager.close


def hand_tuned(url: URL) -> AsyncDoor:
    """What SQLAlchemy's documentation shows: nothing more than is needed."""
    engine = create_async_engine(url, **POOL)
    return async_sessionmaker(engine, **SESSION).begin, engine.dispose


def recipe(url: URL) -> AsyncDoor:
    """The `database.py` that services copy from each other."""
    engine = create_async_engine(url, pool_pre_ping=True, **POOL)
    factory = async_sessionmaker(engine, **SESSION)

    @asynccontextmanager
    async def get_session() -> AsyncGenerator[AsyncSession]:
        session = factory()
        try:
            yield session
            await session.commit()
        except Exception:
            await session.rollback()
            raise
        finally:
            await session.close()

    return get_session, engine.dispose


def engineroom_sync(url: URL) -> SyncDoor:
    """A transaction."""
    database = Database(url, **POOL, **SESSION)
    return database.session, database.close


def engineroom_reader_sync(url: URL) -> SyncDoor:
    """No transaction."""
    database = Database(url, **POOL, **SESSION)
    return database.reader, database.close


def hand_tuned_sync(url: URL) -> SyncDoor:
    """What SQLAlchemy's documentation shows: nothing more than is needed."""
    engine = create_engine(url, **POOL)
    return sessionmaker(engine, **SESSION).begin, engine.dispose


def recipe_sync(url: URL) -> SyncDoor:
    """The `database.py` that services copy from each other."""
    engine = create_engine(url, pool_pre_ping=True, **POOL)
    factory = sessionmaker(engine, **SESSION)

    @contextmanager
    def get_session() -> Generator[Session]:
        session = factory()
        try:
            yield session
            session.commit()
        except Exception:
            session.rollback()
            raise
        finally:
            session.close()

    return get_session, engine.dispose


ASYNC: dict[Name, Callable[[URL], AsyncDoor]] = {
    "hand-tuned": hand_tuned,
    "engineroom": engineroom,
    "engineroom reader": engineroom_reader,
    "recipe": recipe,
}
SYNC: dict[Name, Callable[[URL], SyncDoor]] = {
    "hand-tuned": hand_tuned_sync,
    "engineroom": engineroom_sync,
    "engineroom reader": engineroom_reader_sync,
    "recipe": recipe_sync,
}
