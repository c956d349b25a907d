"""The model, and the units of work through an ORM session: the same for all who offer one."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from . import Units

SESSION = {"expire_on_commit": False, "autoflush": False}
INSERTED = 10  # rows
NAP = 0.05  # seconds that a unit of work takes on the server, where a pool is put under load


class Base(DeclarativeBase):
    """SQLAlchemy's own declarative base: the model favours nobody."""


class Item(Base):
    """What is read and updated."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    count: Mapped[int]


class Line(Base):
    """What is inserted."""

    __tablename__ = "line"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def an_update(key: int) -> Any:
    """One UPDATE."""
    return update(Item).where(Item.id == key).values(count=Item.count + 1)


def lines(key: int) -> list[Line]:
    """Ten rows to insert."""
    return [Line(name=f"line {key}") for _ in range(INSERTED)]


def shown(item: Item) -> dict[str, Any]:
    """What a request answers."""
    return {"id": item.id, "name": item.name, "count": item.count}


def reading(scope: Any) -> Units:
    """What a session of one's own does that only reads."""

    async def empty(key: int) -> None:
        async with scope():
            pass

    async def get(key: int) -> None:
        async with scope() as db:
            await db.get_one(Item, key)

    async def rows(key: int) -> None:
        async with scope() as db:
            (await db.scalars(select(Item))).all()

    async def hold(wait: Any) -> None:
        async with scope() as db:
            await db.get_one(Item, 1)
            await wait()

    async def sleep(seconds: float) -> None:
        async with scope() as db:
            await db.scalar(select(func.pg_sleep(seconds)))

    async def nap(key: int) -> None:
        await sleep(NAP)

    units = {"empty": empty, "get": get, "list": rows, "hold": hold}
    return {**units, "sleep": sleep, "nap": nap}


def writing(scope: Any) -> Units:
    """And what a session does that writes."""

    async def change(key: int) -> None:
        async with scope() as db:
            await db.execute(an_update(key))

    async def insert(key: int) -> None:
        async with scope() as db:
            db.add_all(lines(key))

    return {"update": change, "insert": insert}


def reading_sync(scope: Any) -> Units:
    """The same, synchronously."""

    def empty(key: int) -> None:
        with scope():
            pass

    def get(key: int) -> None:
        with scope() as db:
            db.get_one(Item, key)

    def rows(key: int) -> None:
        with scope() as db:
            db.scalars(select(Item)).all()

    def hold(wait: Any) -> None:
        with scope() as db:
            db.get_one(Item, 1)
            wait()

    return {"empty": empty, "get": get, "list": rows, "hold": hold}


def writing_sync(scope: Any) -> Units:
    """The same, synchronously."""

    def change(key: int) -> None:
        with scope() as db:
            db.execute(an_update(key))

    def insert(key: int) -> None:
        with scope() as db:
            db.add_all(lines(key))

    return {"update": change, "insert": insert}
