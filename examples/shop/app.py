"""A small shop: fifty buyers at once, one transaction each, and books that balance to the cent.

    python examples/shop/app.py                              # an embedded SQLite file
    DATABASE_URL=postgresql://… python examples/shop/app.py  # the same program on a server

The shop owns three tables, engineroom_shop_product, engineroom_shop_order and
engineroom_shop_entry: it drops them and makes them anew at each start, and touches nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import URL, ForeignKey, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, Session, mapped_column

from engineroom import Base, session_manager

EMBEDDED = URL.create("sqlite", database=str(Path(__file__).with_name("shop.db")))
console = Console()


# --- What the shop remembers. All money is in whole cents. ----------------------------------------


class Product(Base):
    """Something on the shelf."""

    __tablename__ = "engineroom_shop_product"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    price: Mapped[int]
    delivered: Mapped[int]
    stock: Mapped[int]


class Order(Base):
    """A purchase that was made."""

    __tablename__ = "engineroom_shop_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey(Product.id), index=True)
    quantity: Mapped[int]
    total: Mapped[int]


class Entry(Base):
    """One side of a booking: every order has two, and together they are zero."""

    __tablename__ = "engineroom_shop_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id), index=True)
    account: Mapped[str]
    amount: Mapped[int]


# --- What happens in it. --------------------------------------------------------------------------


class SoldOut(Exception):
    """There is less on the shelf than the buyer wants."""


@dataclass(frozen=True)
class Wish:
    """What a buyer comes for, and whether this one walks out at the till."""

    product_id: int
    quantity: int
    gives_up: bool


async def purchase(db: AsyncSession, product_id: int, quantity: int) -> Order:
    """Take the goods off the shelf, write the order and book the money."""
    # FOR UPDATE: nobody else takes from this shelf before we are done. SQLite has no such words and
    # needs none: there, a transaction that writes is alone from its BEGIN.
    product = await db.get_one(Product, product_id, with_for_update=True)
    if product.stock < quantity:
        raise SoldOut(product.name)
    product.stock -= quantity

    order = Order(product_id=product.id, quantity=quantity, total=quantity * product.price)
    db.add(order)
    await db.flush()  # gives the order its number
    db.add(Entry(order_id=order.id, account="till", amount=order.total))
    db.add(Entry(order_id=order.id, account="sales", amount=-order.total))
    await db.flush()
    return order


async def serve(wish: Wish) -> str:
    """Serve one buyer in one transaction, and say how it ended."""
    try:
        async with asyncio.timeout(None) as patience, session_manager.session() as db:
            await purchase(db, wish.product_id, wish.quantity)
            if wish.gives_up:  # the goods are off the shelf, and here the purchase is cancelled
                patience.reschedule(asyncio.get_running_loop().time())
                await asyncio.sleep(60)
    except SoldOut:
        return "sold out"
    except TimeoutError:
        return "gave up at the till"
    return "sold"


async def open_shop(orders: int) -> None:
    """Make the tables anew, and fill the shelves."""
    async with session_manager.connect() as connection:
        await connection.run_sync(Base.metadata.drop_all)
    await session_manager.create_all()
    async with session_manager.session() as db:
        fill_shelves(db, orders)


def fill_shelves(db: AsyncSession, orders: int) -> None:
    """Fill the shelves, with too few teapots and far too few lamps."""
    for name, price, stock in [
        ("Notebook", 349, orders),
        ("Umbrella", 1_995, orders),
        ("Teapot", 2_450, orders // 4),
        ("Lamp", 8_999, orders // 20),
    ]:
        db.add(Product(name=name, price=price, delivered=stock, stock=stock))


def wishes(orders: int) -> Iterator[Wish]:
    """Draw what the buyers will want; the same at every run. One in thirty gives up."""
    dice = random.Random(2_000)
    for number in range(1, orders + 1):
        yield Wish(dice.randint(1, 4), quantity=dice.randint(1, 3), gives_up=number % 30 == 0)


async def sell(orders: int, buyers: int) -> Counter[str]:
    """Let all buyers in at once and return how their visits ended."""
    outcomes: Counter[str] = Counter()
    queue = wishes(orders)
    columns = TextColumn("Selling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()

    async def buyer() -> None:
        for wish in queue:  # one queue for all: whoever is free takes the next
            outcomes[await serve(wish)] += 1
            progress.advance(bar)

    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("selling", total=orders)
        async with asyncio.TaskGroup() as crowd:
            for _ in range(buyers):
                crowd.create_task(buyer())
    return outcomes


# --- What the books say afterwards, read by the synchronous side. ---------------------------------


class Shelf(NamedTuple):
    """A product and what became of it."""

    product: Product
    orders: int
    sold: int
    earned: int


def shelves(db: Session) -> list[Shelf]:
    """Return every product with its sales."""
    sold, earned = func.sum(Order.quantity), func.sum(Order.total)
    sales = (
        select(Product, func.count(Order.id), func.coalesce(sold, 0), func.coalesce(earned, 0))
        .outerjoin(Order)
        .group_by(Product.id)
        .order_by(Product.id)
    )
    return [Shelf(*row) for row in db.execute(sales)]


def books(sales: list[Shelf]) -> Table:
    """Lay out the sales as a table."""
    table = Table("Product", "Price", "Delivered", "Left", "Sold", "Orders", "Earned")
    for column in table.columns[1:]:
        column.justify = "right"
    for product, orders, sold, earned in sales:
        numbers = product.delivered, product.stock, sold, orders
        table.add_row(product.name, money(product.price), *map(str, numbers), money(earned))
    table.add_section()
    orders, earned = sum(shelf.orders for shelf in sales), sum(shelf.earned for shelf in sales)
    table.add_row("All", "", "", "", "", str(orders), money(earned))
    return table


def faults(db: Session, sales: list[Shelf], confirmed: int | None) -> Iterator[str]:
    """Look for everything that cannot be true in an honest shop."""
    orders = sum(shelf.orders for shelf in sales)
    if confirmed not in (None, orders):
        yield f"{confirmed} orders were confirmed, {orders} are in the books"

    for product, _, sold, _ in sales:
        if product.stock < 0 or sold + product.stock != product.delivered:
            left = product.stock
            yield f"{product.name}: {product.delivered} delivered, {sold} sold, {left} left"

    one_sided = or_(func.count(Entry.id) != 2, func.sum(Entry.amount) != 0)
    for order in db.scalars(select(Order.id).outerjoin(Entry).group_by(Order.id).having(one_sided)):
        yield f"order {order}: its two entries do not balance"

    till = db.scalar(select(func.sum(Entry.amount)).where(Entry.account == "till")) or 0
    earned = sum(shelf.earned for shelf in sales)
    if till != earned:
        yield f"{money(till)} in the till, {money(earned)} in the orders"


def audit(confirmed: int | None) -> bool:
    """Print the books and the verdict; return whether they are right.

    Args:
        confirmed: how many buyers were told that they had bought; None: nobody knows any more.
    """
    with session_manager.sync_session() as db:
        sales = shelves(db)
        wrong = list(faults(db, sales, confirmed))
    console.print(books(sales))
    for fault in wrong:
        console.print(f"[red]Wrong:[/] {fault}.")
    if not wrong:
        console.print("[green]Nothing oversold, and the books balance to the cent.[/]")
    return not wrong


def money(cents: int) -> str:
    """Write cents as a price."""
    return f"{cents // 100:,}.{cents % 100:02}"


# --- The program. ---------------------------------------------------------------------------------


async def run(orders: int, buyers: int) -> bool:
    """Open, sell, and let the books be audited; return whether they are right."""
    confirmed = None
    async with session_manager.init(os.environ.get("DATABASE_URL") or EMBEDDED):
        if orders:
            await open_shop(orders)
            outcomes = await sell(orders, buyers)
            console.print(", ".join(f"{count:,} {end}" for end, count in outcomes.most_common()))
            confirmed = outcomes["sold"]
        return await asyncio.to_thread(audit, confirmed)  # in a thread: the event loop stays free


def main() -> int:
    """Run the shop; the exit status is 0 only if the books are right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--orders", type=int, default=2_000, help="how many to take")
    parser.add_argument("--buyers", type=int, default=50, help="how many at once")
    parser.add_argument(
        "--audit", action="store_const", dest="orders", const=0, help="only look at the books"
    )
    arguments = parser.parse_args()
    try:
        return 0 if asyncio.run(run(arguments.orders, arguments.buyers)) else 1
    except KeyboardInterrupt:
        console.print("Closed early; what was not paid is back on the shelf.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
