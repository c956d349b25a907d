"""The tables of the behaviour suite."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import String, func
from sqlalchemy.orm import Mapped, mapped_column

from engineroom import Base


class Item(Base):
    """Something in stock."""

    __tablename__ = "behaviour_item"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(String(50), unique=True)
    stock: Mapped[int] = mapped_column(default=0)
    made: Mapped[datetime] = mapped_column(server_default=func.now())
