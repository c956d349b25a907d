"""Base: the declarative base with names that PostgreSQL itself would choose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

from sqlalchemy import CheckConstraint, MetaData, Table
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.schema import Constraint

NAME_BYTES = 63  # PostgreSQL's NAMEDATALEN - 1


def _postgresql_name(constraint: Constraint, table: Table, columns: list[str], label: str) -> str:
    """Name a constraint as PostgreSQL's `makeObjectName` and `ChooseConstraintName` do.

    The longer of table and columns gives way until it fits; a name that is taken gets a number.
    """
    taken = {other.name for other in _constraints(table) if other is not constraint}
    number = 0
    while True:
        suffix = f"_{label}{number or ''}"
        first, second = table.name.encode(), "_".join(columns).encode()
        kept_first, kept_second = len(first), len(second)
        while kept_first + kept_second > NAME_BYTES - len(suffix) - bool(second):
            if kept_first > kept_second:
                kept_first -= 1
            else:
                kept_second -= 1
        parts = [part for part in (_clip(first, kept_first), _clip(second, kept_second)) if part]
        name = "_".join(parts) + suffix
        if name not in taken:
            return name
        number += 1


def _clip(name: bytes, length: int) -> str:
    """Cut to a number of bytes, but not through a character."""
    return name[:length].decode(errors="ignore")


def _constraints(table: Table) -> Iterator[Any]:
    """Yield every constraint of the table's schema: their names must differ."""
    for other in table.metadata.tables.values():
        if other.schema == table.schema:
            yield from other.constraints
            for column in other.columns:
                yield from column.constraints


def _columns(constraint: Any) -> list[str]:
    return [column.name for column in constraint.columns]


def _key(constraint: Constraint, table: Table) -> str:
    return _postgresql_name(constraint, table, _columns(constraint), "key")


def _fkey(constraint: Constraint, table: Table) -> str:
    return _postgresql_name(constraint, table, _columns(constraint), "fkey")


def _pkey(constraint: Constraint, table: Table) -> str:
    return _postgresql_name(constraint, table, [], "pkey")


def _check(constraint: CheckConstraint, table: Table) -> str:
    # SQL that was written as text has no columns, only words that may be their names.
    code = re.sub(r"'(?:[^']|'')*'", "", str(constraint.sqltext))
    columns = {word for word in re.findall(r"\w+", code) if word in table.columns}
    return _postgresql_name(constraint, table, list(columns) if len(columns) == 1 else [], "check")


# `ix` is SQLAlchemy's own: Index(…) and index=True already have a name in existing schemas.
NAMING_CONVENTION: dict[str, Any] = {
    "ix": "ix_%(column_0_label)s",
    "uq": "%(postgresql_key)s",
    "fk": "%(postgresql_fkey)s",
    "pk": "%(postgresql_pkey)s",
    "ck": "%(postgresql_check)s",
    "postgresql_key": _key,
    "postgresql_fkey": _fkey,
    "postgresql_pkey": _pkey,
    "postgresql_check": _check,
}


class Base(AsyncAttrs, DeclarativeBase):
    """A declarative base whose constraints have names and whose rows are whole after a flush.

    Constraints are named as PostgreSQL names them (`item_pkey`, `item_sku_key`,
    `item_shop_id_fkey`, `item_price_check`), so Alembic can drop what it named and finds no
    difference in an existing schema. `eager_defaults` fetches what the server computes with the
    INSERT or UPDATE itself, so no attribute is left to be loaded after the session has ended.
    """

    __abstract__ = True

    metadata: ClassVar[MetaData] = MetaData(naming_convention=NAMING_CONVENTION)
    __mapper_args__: Any = {"eager_defaults": True}  # noqa: RUF012
