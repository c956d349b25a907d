"""The shop as a service: one session for each request, and a page that shows who holds what.

    make demo SERVE=1                                        # on the shop's own SQLite file
    make demo SERVE=1 DATABASE_URL=postgresql://… PORT=8001  # the same program on a server

It goes on with the tables that are there, and fills the shelves only where there are none. Behind
another server it is `uvicorn examples.shop.service:app`, and reads DATABASE_URL itself.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.exc import NoResultFound
from starlette.routing import Route

from engineroom import Stats, on_commit, session_manager
from engineroom.asgi import DatabaseMiddleware, Readiness
from engineroom.fastapi import AsyncSessionDep, ReaderDep, SessionDep, lifespan

from .app import EMBEDDED, Order, Product, SoldOut, fill_shelves, purchase

logger = logging.getLogger(__name__)


# --- The application: opened and closed with the database. ----------------------------------------


async def opening(app: FastAPI) -> AsyncGenerator[None]:
    """Make the tables and fill the shelves, where that was not done yet."""
    await session_manager.create_all()
    async with session_manager.session() as db:
        if await db.scalar(select(Product.id).limit(1)) is None:
            fill_shelves(db, 100)
    yield


app = FastAPI(
    title="engineroom's shop",
    lifespan=lifespan(wraps=opening, pool_size=3, max_overflow=0),  # few, so that one sees them
    openapi_url="/docs/openapi.json",
)
app.add_middleware(DatabaseMiddleware)  # cancels the work for a client that has gone
app.routes.append(Route("/ready", Readiness()))


@app.exception_handler(SoldOut)
async def sold_out(request: Request, error: SoldOut) -> JSONResponse:
    """Answer 409; the transaction was rolled back when the exception left the endpoint."""
    return JSONResponse({"detail": f"{error}: there are not so many left"}, 409)


@app.exception_handler(NoResultFound)
async def not_found(request: Request, error: NoResultFound) -> JSONResponse:
    """Answer 404 for what `get_one` did not find."""
    return JSONResponse({"detail": "There is no such product"}, 404)


# --- What is said over the wire. ------------------------------------------------------------------

Number = Annotated[int, Field(ge=1, le=1_000_000)]
Seconds = Annotated[float, Field(ge=0, le=60)]


class Line(BaseModel):
    """So many of a product."""

    product_id: Number
    quantity: Number = 1


class Purchase(Line):
    """What a buyer wants, and for how long this one looks for the purse."""

    pays_after: Seconds = 0


class Shelf(BaseModel):
    """A product and how many are left."""

    id: int
    name: str
    price: int
    stock: int


class Receipt(BaseModel):
    """An order that was made."""

    id: int
    product_id: int
    quantity: int
    total: int


# --- What can be done. ----------------------------------------------------------------------------


@app.get("/stock", response_model=list[Shelf])
async def stock(db: ReaderDep) -> Sequence[Product]:
    """Tell what is on the shelves: no transaction, one round trip."""
    return (await db.scalars(select(Product).order_by(Product.id))).all()


@app.get("/orders", response_model=list[Receipt])
async def latest_orders(db: ReaderDep) -> Sequence[Order]:
    """Tell the latest orders, newest first."""
    return (await db.scalars(select(Order).order_by(Order.id.desc()).limit(8))).all()


@app.post("/orders", status_code=201, response_model=Receipt, responses={409: {}})
async def buy(wanted: Purchase, db: AsyncSessionDep) -> Order:
    """Sell; what is answered with 201 is committed."""
    order = await purchase(db, wanted.product_id, wanted.quantity)
    on_commit(db, partial(tell_the_warehouse, order))  # not before, and not if it is rolled back
    await asyncio.sleep(wanted.pays_after)
    return order


def tell_the_warehouse(order: Order) -> None:
    """Have an order packed."""
    logger.info("Order %d is paid: pack %d of %d", order.id, order.quantity, order.product_id)


@app.post("/deliveries", status_code=204)
def deliver(delivered: Line, db: SessionDep) -> None:
    """Fill a shelf up. A `def` endpoint: it runs in a thread, with the synchronous session."""
    product = db.get_one(Product, delivered.product_id, with_for_update=True)
    product.delivered += delivered.quantity
    product.stock += delivered.quantity


# --- What there is to see. ------------------------------------------------------------------------


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Show all this to a person."""
    return FileResponse(Path(__file__).with_name("page.html"))


@app.get("/stats")
async def stats() -> Stats:
    """Tell who holds which connection. It asks the database nothing, and waits for nobody."""
    return session_manager.stats()


@app.post("/hold", status_code=204)
async def hold(db: ReaderDep, seconds: Annotated[Seconds, Query()] = 10) -> None:
    """Hold a connection for some seconds: what one should not do, for the page to show it."""
    await db.scalar(select(1))
    await asyncio.sleep(seconds)


# --- The program. ---------------------------------------------------------------------------------


def serve(listener: socket.socket) -> bool:
    """Serve until Ctrl-C; return whether the shop could open."""
    config: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **config))
    # Who still holds a connection then is cancelled. That is no error to report.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not was_cancelled(record))
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn's way to say that it has ended because of it
        print("The shop is closed.")
    return server.started


def was_cancelled(record: logging.LogRecord) -> bool:
    """Whether what is logged is that a request was cancelled."""
    return record.exc_info is not None and record.exc_info[0] is asyncio.CancelledError


def main() -> int:
    """Open the shop at a port."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=os.environ.get("PORT") or "8000")
    wanted: int = parser.parse_args().port
    os.environ["DATABASE_URL"] = os.environ.get("DATABASE_URL") or str(EMBEDDED)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        listener = socket.create_server(("127.0.0.1", wanted))
    except (OSError, OverflowError) as error:
        print(f"The shop cannot open at port {wanted}: {error}.", file=sys.stderr)
        print("Name another one: make demo SERVE=1 PORT=8001 (0: any free one).", file=sys.stderr)
        return 1
    with listener:
        port = listener.getsockname()[1]
        print(f"The shop is at http://127.0.0.1:{port} (Ctrl-C closes it)", flush=True)
        return 0 if serve(listener) else 1


if __name__ == "__main__":
    sys.exit(main())
