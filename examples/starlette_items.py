"""Items over HTTP, with Starlette: `uvicorn examples.starlette_items:app`."""

from collections.abc import AsyncIterator

from sqlalchemy import select
from sqlalchemy.orm import Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from engineroom import Base, session_manager
from engineroom.asgi import DatabaseMiddleware, Readiness, lifespan


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


async def tables(app: Starlette) -> AsyncIterator[None]:
    await session_manager.create_all()
    yield


async def add_item(request: Request) -> JSONResponse:
    item = Item(name=request.query_params["name"])
    request.state.db.add(item)
    await request.state.db.flush()
    return JSONResponse(item.id, status_code=201)


async def list_items(request: Request) -> JSONResponse:
    return JSONResponse(list(await request.state.db.scalars(select(Item.name))))


routes = [
    Route("/items", add_item, methods=["POST"]),
    Route("/items", list_items),
    Route("/ready", Readiness()),
]
app = Starlette(routes=routes, lifespan=lifespan(url="sqlite:///items.db", wraps=tables))
app.add_middleware(DatabaseMiddleware)
