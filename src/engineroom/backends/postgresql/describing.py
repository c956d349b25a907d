"""What psycopg says of a result's columns, for those who ask.

SQLAlchemy asks each result whether it has any, and which they are once for each statement that it
has compiled. psycopg writes all of them down each time: a tenth of the CPU of a row of ten columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar


def describe_when_read(driver: Any) -> None:
    """Have the cursors of a connection of psycopg write the columns down when they are read."""
    if hasattr(driver, "server_cursor_factory"):
        driver.cursor_factory = _describing_late(driver.cursor_factory)


@cache
def _describing_late(base: Any) -> Any:
    """Make a class of cursors that do; one whose description is its own keeps it."""
    from psycopg import Cursor
    from psycopg.pq import ExecStatus

    if base.description is not Cursor.description:
        return base
    rows = int(ExecStatus.TUPLES_OK)

    def description(self: Any) -> Sequence[Any] | None:
        result = self.pgresult
        if result is None or result.status != rows:
            described: Sequence[Any] | None = base.description.fget(self)
            return described
        return Columns(base, self.connection, result)

    own = {"__slots__": (), "description": property(description, doc=base.description.__doc__)}
    return type(base.__name__, (base,), own)


class Columns(Sequence[Any]):
    """The columns of a result, which psycopg writes down as soon as somebody looks at one."""

    __slots__ = ("_connection", "_cursor_class", "_read", "_result")

    def __init__(self, cursor_class: Any, connection: Any, result: Any) -> None:
        self._cursor_class = cursor_class
        self._connection = connection
        self._result = result
        self._read: list[Any] | None = None

    @property
    def _columns(self) -> list[Any]:
        if self._read is None:
            # A cursor of their own: the one that had the result may have another by now.
            cursor = self._cursor_class(self._connection)
            cursor.pgresult = self._result
            self._read = list(cursor.description)
        return self._read

    def __len__(self) -> int:
        return int(self._result.nfields)

    def __getitem__(self, index: Any) -> Any:
        return self._columns[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._columns)

    def __eq__(self, other: object) -> bool:
        return self._columns == (other._columns if isinstance(other, Columns) else other)

    __hash__: ClassVar[None]  # type: ignore[assignment]  # as a list has none

    def __repr__(self) -> str:
        return repr(self._columns)
