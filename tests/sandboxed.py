"""What the tests of sandboxes share: tables, a manager, and the look at what is left."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ForeignKey, MetaData, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from engineroom import Database, DatabaseSessionManager


class Model(DeclarativeBase):
    metadata = MetaData()


class Item(Model):
    __tablename__ = "sandboxed_item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")


class Link(Model):
    """Its foreign key is checked at COMMIT."""

    __tablename__ = "sandboxed_link"

    id: Mapped[int] = mapped_column(primary_key=True)
    other: Mapped[int] = mapped_column(
        ForeignKey("sandboxed_link.id", deferrable=True, initially="DEFERRED")
    )


COUNT = select(func.count()).select_from(Item)


def create_tables(url: str) -> None:
    """Make the tables, over a connection that is gone afterwards."""
    with Database(url) as database:
        Model.metadata.create_all(database.engine)


def opened(url: str) -> DatabaseSessionManager:
    """Return a manager with its tables; the test's loop closes its connections."""
    create_tables(url)
    options: Any = {"metadata": Model.metadata, "sync_in_async": "allow"}
    return DatabaseSessionManager().init(url, **options)


def assert_nothing_left(url: str) -> None:
    """See that no row is there, and that nobody is in a transaction."""
    with Database(url) as database, database.session() as db:
        assert db.scalar(COUNT) == 0
        assert db.scalar(text("SELECT count(*) FROM sandboxed_link")) == 0
        states = db.execute(
            text(
                "SELECT state, query FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() AND state LIKE '%transaction%'"
            )
        )
        assert states.all() == []


async def count(manager: DatabaseSessionManager) -> int:
    async with manager.session() as db:
        return await db.scalar(COUNT) or 0


async def add(manager: DatabaseSessionManager, key: int) -> None:
    async with manager.session() as db:
        db.add(Item(id=key))


def sync_add(manager: DatabaseSessionManager, key: int) -> None:
    with manager.sync_session() as session:
        session.add(Item(id=key))
