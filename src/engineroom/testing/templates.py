"""What a database is cloned from: each kind of database has a kind of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

NOT_ENTERED = (
    "The template was not made yet, or is gone: use it inside of `with clones(…) as template:`."
)
NO_CLONE = "This is no clone of this template, or it was discarded before."


class Template(ABC):
    """A database that others are cloned from, made by `clones()`; use it in a `with`."""

    @abstractmethod
    def clone(self) -> str:
        """Return the URL of a new database like the template, password included."""

    @abstractmethod
    def discard(self, url: str) -> None:
        """Drop a clone, in its own time; whoever is connected to it loses the connection.

        Raises:
            ValueError: it is no clone of this template, or was discarded before.
        """

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def close(self) -> None:
        """Drop what there is; `with` calls it. A second call does nothing."""

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
