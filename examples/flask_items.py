"""A Flask application, complete: `flask --app examples/flask_items run`, then
`curl -X POST localhost:5000/items/anvil` and `curl localhost:5000/items`.
"""

from flask import Flask
from sqlalchemy import select
from sqlalchemy.orm import Mapped, mapped_column

from engineroom import Base
from engineroom.flask import EngineRoom

app = Flask(__name__)
db = EngineRoom(app, url="sqlite:///items.db")


class Item(Base):
    """Something in the shop."""

    __tablename__ = "flask_items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@app.post("/items/<name>")
def create_item(name: str) -> tuple[str, int]:
    """Add one; it is committed before the response leaves."""
    db.session.add(Item(name=name))
    return f"{name} is there\n", 201


@app.get("/items")
def list_items() -> list[str]:
    """List their names."""
    return list(db.session.scalars(select(Item.name)))


with app.app_context():
    db.database.create_all()
