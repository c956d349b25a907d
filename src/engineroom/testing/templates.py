"""What a database is cloned from: each kind of database has a kind of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from engineroom.errors import NotBehindPooler

NOT_ENTERED = (
    "The template was not made yet, or is gone: use it inside of `with clones(…) as template:`."
)
NO_CLONE = "This is no clone of this template, or it was discarded before."


def not_behind_pooler(what: str, how: str, cure: str) -> NotBehindPooler:
    """Say why no database can be cloned through a pooler.

    Args:
        what: was to be had.
        how: the pooler is known.
        cure: What to do with the server's own address.
    """
    return NotBehindPooler(
        f"{what} cannot be had behind a pooler ({how}): databases are cloned under locks of a "
        "session, and what the pooler keeps open would keep the template in use. Take the server's "
        f"own address: {cure}. See docs/pgbouncer.md."
    )


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
