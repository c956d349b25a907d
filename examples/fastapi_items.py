"""Items over HTTP, with FastAPI: `uvicorn examples.fastapi_items:app`."""

from collections.abc import AsyncIterator

from fastapi import FastAPI
from sqlalchemy import select
from sqlalchemy.orm import Mapped, mapped_column

from engineroom import Base, session_manager
from engineroom.fastapi import AsyncSessionDep, ReaderDep, lifespan


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


async def tables(app: FastAPI) -> AsyncIterator[None]:
    await session_manager.create_all()
    yield


app = FastAPI(lifespan=lifespan(url="sqlite:///items.db", wraps=tables))


@app.post("/items", status_code=201)
async def add_item(name: str, db: AsyncSessionDep) -> int:
    item = Item(name=name)
    db.add(item)
    await db.flush()  # gives it its id; COMMIT comes by itself, before the response
    return item.id


@app.get("/items")
async def list_items(db: ReaderDep) -> list[str]:
    return list(await db.scalars(select(Item.name)))
