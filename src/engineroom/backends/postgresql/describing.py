"""What psycopg says of a result's columns, for those who ask.

SQLAlchemy asks each result whether it has any, and which they are once for each statement that it
has compiled. psycopg writes all of them down each time: three are 3 % of what Python
executes for a `get`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, ClassVar


def describe_when_read(driver: Any) -> None:
    """Have the cursors of a connection of psycopg be such that can."""
    if hasattr(driver, "server_cursor_factory"):
        driver.cursor_factory = _describing_late(driver.cursor_factory)


@cache
def asking_late(base: Any, is_async: bool) -> Any:
    """Make a class of execution contexts whose cursors do; those of the driver's users do not."""

    def create_default_cursor(self: Any) -> Any:
        cursor = base.create_default_cursor(self)
        driver = cursor._cursor if is_async else cursor  # (its adapter keeps it so)
        if hasattr(driver.__class__, "describes_late"):
            driver.describes_late = True
        return cursor

    return type(base.__name__, (base,), {"create_default_cursor": create_default_cursor})


@cache
def _describing_late(base: Any) -> Any:
    """Make a class of cursors that can; one whose description is its own keeps it."""
    from psycopg import Cursor
    from psycopg.pq import ExecStatus

    psycopgs: Any = Cursor.description
    if base.description is not psycopgs:
        return base
    describe: Callable[[Any], list[Any] | None] = psycopgs.fget
    rows = int(ExecStatus.TUPLES_OK)

    def description(self: Any) -> Sequence[Any] | None:
        result = self.pgresult
        if result is None or result.status != rows or not getattr(self, "describes_late", False):
            return describe(self)

        def read() -> list[Any]:
            now, self.pgresult = self.pgresult, result  # it may have another by now
            try:
                return describe(self) or []
            finally:
                self.pgresult = now

        return Columns(read)

    own = {
        "__slots__": ("describes_late",),
        "description": property(description, doc=psycopgs.__doc__),
    }
    return type(base.__name__, (base,), own)


class Columns(Sequence[Any]):
    """The columns of a result, which psycopg writes down as soon as somebody looks at one."""

    __slots__ = ("_columns", "_read")

    def __init__(self, read: Callable[[], list[Any]]) -> None:
        self._read: Callable[[], list[Any]] | None = read

    def _written(self) -> list[Any]:
        if self._read is not None:
            self._columns, self._read = self._read(), None
        return self._columns

    def __len__(self) -> int:
        return len(self._written())

    def __getitem__(self, index: Any) -> Any:
        return self._written()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._written())

    def __eq__(self, other: object) -> bool:
        return self._written() == (other._written() if isinstance(other, Columns) else other)

    __hash__: ClassVar[None]  # type: ignore[assignment]  # as a list has none

    def __add__(self, other: Sequence[Any]) -> list[Any]:
        return [*self, *other]

    def __radd__(self, other: Sequence[Any]) -> list[Any]:
        return [*other, *self]

    def __reduce__(self) -> Any:
        return list, (self._written(),)

    def __repr__(self) -> str:
        return repr(self._written())
