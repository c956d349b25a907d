"""Who is compared. A file here is one contender; a `.txt` beside it pins the environment it needs.

Those without a `.txt` run in the environment of the checkout, with engineroom. This file is
imported in every one of the environments, so it needs nothing but Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Side = Literal["async", "sync"]
Group = Literal["asyncpg", "psycopg", "sync"]
Units = Mapping[str, Callable[..., Any]]
"""A unit of work by its name; on the asynchronous side they are coroutine functions."""

ROWS = 1_000  # of the table `item`
BASELINE, BY_HAND = "the recipe", "SQLAlchemy by hand"
AGAIN = f"{BY_HAND}, again"  # what the same in another process shows is noise
AUTOCOMMIT = f"{BY_HAND}, AUTOCOMMIT"
READER, SESSION = "engineroom reader()", "engineroom session()"
PIPELINED = f"{SESSION}, pipeline='on'"


@dataclass(frozen=True)
class Contender:
    """What a file here offers, for one side.

    Attributes:
        side: Whether its units are coroutines.
        opened: A context manager, given a URL and the arguments of a pool: one open manager (or
            engine), as its units of work.
        application: The same for a web application, whose unit is one request.
        several: Whether a process can have several of them open.
    """

    side: Side
    opened: Callable[[str, dict[str, Any]], Any]
    application: Callable[[str, dict[str, Any]], Any] | None = None
    several: bool = True


@dataclass(frozen=True)
class Entry:
    """One line of the tables."""

    name: str
    group: Group
    """Those of a group talk to the database by the same driver, and are compared."""
    file: str
    attribute: str
    wants: tuple[int, int] = (3, 11)
    """The oldest Python that its project supports."""

    @property
    def pins(self) -> Path:
        """The requirements of its environment."""
        return Path(__file__).parent / f"{self.file}.txt"


ENTRIES = (
    Entry(BASELINE, "asyncpg", "recipe", "asynchronous"),
    Entry(BY_HAND, "asyncpg", "by_hand", "asynchronous"),
    Entry(AGAIN, "asyncpg", "by_hand", "asynchronous"),
    Entry(AUTOCOMMIT, "asyncpg", "by_hand", "autocommit"),
    Entry(SESSION, "asyncpg", "engineroom", "session"),
    Entry(READER, "asyncpg", "engineroom", "reader"),
    Entry("advanced-alchemy", "asyncpg", "advanced_alchemy", "asynchronous"),
    Entry("fastapi-sqla", "asyncpg", "fastapi_sqla", "asynchronous"),
    Entry(
        "fastapi-async-sqlalchemy",
        "asyncpg",
        "fastapi_async_sqlalchemy",
        "asynchronous",
        wants=(3, 12),
    ),
    Entry("FastSQLA", "asyncpg", "fastsqla", "asynchronous", wants=(3, 12)),
    Entry("raw asyncpg", "asyncpg", "raw_asyncpg", "asynchronous"),
    Entry(BASELINE, "psycopg", "recipe", "asynchronous"),
    Entry(BY_HAND, "psycopg", "by_hand", "asynchronous"),
    Entry(AGAIN, "psycopg", "by_hand", "asynchronous"),
    Entry(AUTOCOMMIT, "psycopg", "by_hand", "autocommit"),
    Entry(SESSION, "psycopg", "engineroom", "session"),
    Entry(PIPELINED, "psycopg", "engineroom", "pipelined"),
    Entry(READER, "psycopg", "engineroom", "reader"),
    Entry(BASELINE, "sync", "recipe", "synchronous"),
    Entry(BY_HAND, "sync", "by_hand", "synchronous"),
    Entry(AGAIN, "sync", "by_hand", "synchronous"),
    Entry(AUTOCOMMIT, "sync", "by_hand", "sync_autocommit"),
    Entry(SESSION, "sync", "engineroom", "sync_session"),
    Entry(PIPELINED, "sync", "engineroom", "sync_pipelined"),
    Entry(READER, "sync", "engineroom", "sync_reader"),
    Entry("Flask-SQLAlchemy-Lite", "sync", "flask_sqlalchemy_lite", "synchronous"),
    Entry("oslo.db", "sync", "oslo_db", "synchronous"),
    Entry("raw psycopg", "sync", "raw_psycopg", "synchronous"),
)
