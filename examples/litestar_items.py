"""Items in Litestar.

python -m uvicorn examples.litestar_items:app
curl -X POST localhost:8000/valve; curl localhost:8000
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from litestar import Litestar, get, post
from litestar.params import FromPath
from sqlalchemy import select
from sqlalchemy.orm import Mapped, mapped_column

from engineroom import Base, session_manager
from engineroom.litestar import AsyncSessionDep, EngineRoomPlugin


class Item(Base):
    """What there is."""

    __tablename__ = "litestar_item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@get("/")
async def list_items(reader: AsyncSessionDep) -> list[str]:
    """List what there is, in one round trip."""
    return list(await reader.scalars(select(Item.name)))


@post("/{name:str}")
async def add_item(name: FromPath[str], db: AsyncSessionDep) -> None:
    """Store one more; it is committed when the answer comes."""
    db.add(Item(name=name))


@asynccontextmanager
async def tables(app: Litestar) -> AsyncGenerator[None]:
    """Make the table, once the manager is open."""
    await session_manager.create_all()
    yield


URL = os.environ.get("DATABASE_URL", "sqlite:///items.db")
app = Litestar([list_items, add_item], lifespan=[tables], plugins=[EngineRoomPlugin(url=URL)])
