"""The SELECT behind `session.get()`, made once for a class; SQLAlchemy makes one each time."""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple

from sqlalchemy import Select, bindparam, select
from sqlalchemy.orm import Mapper

PLAIN = frozenset({int, str, uuid.UUID})  # of anything else SQLAlchemy knows what it may stand for


class ByKey(NamedTuple):
    """How an object of a class is found by the value of its primary key."""

    statement: Select[Any]
    name: str  # of the parameter


def by_key(mapper: Mapper[Any]) -> ByKey | None:
    """Make it for a class that is no other's subclass and has one column for a key."""
    if mapper.inherits is not None or len(mapper.primary_key) != 1:
        return None
    [column] = mapper.primary_key
    parameter = bindparam("pk", type_=column.type, unique=True)
    attribute = mapper.get_property_by_column(column).class_attribute
    return ByKey(select(mapper).where(attribute == parameter), parameter.key)
