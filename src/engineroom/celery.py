"""A result backend for Celery with engineroom's engines, and jobs that are queued with their rows.

It *is* Celery's database backend, tables and all: `result_backend = "engineroom+postgresql://…"`.
Tasks open their sessions like everyone: `with database.session()`. A worker may fork as it likes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import Column, inspect
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateColumn

from . import schema
from .backends import find_schema_lock
from .errors import SchemaMismatch
from .extras import brought_by
from .hooks import Callback, register
from .registry import SessionManager
from .urls import masked

with brought_by("celery", "engineroom.celery is imported"):
    from celery.backends.database.session import ResultModelBase

if TYPE_CHECKING:

    class CelerysBackend:
        """Celery's own, which has no types."""

        app: Any
else:
    from celery.backends.database import DatabaseBackend as CelerysBackend

logger: logging.Logger = logging.getLogger("engineroom")


class Job(Protocol):
    """What can be queued: a task, or a signature of one, of a group or a chain."""

    def delay(self, *args: Any, **kwargs: Any) -> object:
        """Queue it."""


def delay_on_commit(session: AsyncSession | Session, task: Job, *args: Any, **kwargs: Any) -> None:
    """Queue a job once the session's transaction has committed: its rows are there by then.

    Where that is rolled back, nothing is queued. Where the broker does not take the job, that is
    logged with the line of this call, and the rows stay.

    Args:
        task: A task; or a signature, which carries options: `send.s().set(countdown=10)`.
        args: The task's own, as those of `task.delay`.

    Raises:
        SessionClosed: the session has ended.
        UsageError: it is no session of engineroom.
    """
    queue: Callback = partial(task.delay, *args, **kwargs)
    if isinstance(session, AsyncSession):
        queue = partial(asyncio.to_thread, queue)  # the broker is not asked on the event loop
    register(session, "commit", queue)


class ResultSessionManager(SessionManager):
    """Celery's tables, in as many databases as its applications name.

    Engines are kept in every kind of worker, the parent of its pool included: a fork is noticed.
    """

    def __init__(self, engine_callback: Any = None) -> None:
        super().__init__(engine_callback, ResultModelBase.metadata)
        self.forked = True

    def _prepare(self, engine: Engine) -> None:
        """Create what is missing, columns in tables of older versions of Celery too.

        Raises:
            SchemaMismatch: they could not be added, for want of a right, say.
        """
        super()._prepare(engine)
        with engine.connect() as connection:
            missing = missing_columns(connection)
        if missing:
            try:
                add_missing_columns(engine)
            except DBAPIError as error:
                names = [f"{column.table.name}.{column.name}" for column in missing]
                cure = "; ".join(additions(missing, engine.dialect))
                told = (
                    f"The result tables of {masked(engine.url)} are of an older version of Celery: "
                    f"they lack {', '.join(names)}, which could not be added: "
                    f"{str(error.orig).strip()}. Have their owner run: {cure}"
                )
                # Celery reads around them, in a second statement. PostgreSQL refuses that after the
                # first has failed, so that nothing would work.
                if engine.dialect.name == "postgresql":
                    raise SchemaMismatch(told, missing=names) from error
                logger.warning(told)


def missing_columns(connection: Connection) -> list[Column[Any]]:
    """Return the columns that Celery's tables here lack, and that may be empty."""
    inspector = inspect(connection)
    missing: list[Column[Any]] = []
    for table in ResultModelBase.metadata.tables.values():
        there = {column["name"] for column in inspector.get_columns(table.name, table.schema)}
        missing += [one for one in table.columns if one.nullable and one.name not in there]
    return missing


def add_missing_columns(engine: Engine) -> None:
    """Add them, once, however many workers start at the same time."""
    lock = find_schema_lock(engine)
    if lock is None:
        return
    with engine.connect() as connection:
        lock.begin(connection, writes=True)
        schema.take(lock, connection, "adding columns to result tables", schema.TIMEOUT)
        for statement in additions(missing_columns(connection), connection.dialect):
            connection.exec_driver_sql(statement)
        connection.commit()


def additions(columns: list[Column[Any]], dialect: Dialect) -> list[str]:
    """Write down the statements that add columns."""
    return [
        f"ALTER TABLE {dialect.identifier_preparer.format_table(column.table)} "
        f"ADD COLUMN {CreateColumn(column).compile(dialect=dialect)}"
        for column in columns
    ]


# One for each application and callback, whichever of its threads asks.
_managers: weakref.WeakKeyDictionary[Any, dict[Any, ResultSessionManager]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()


class DatabaseBackend(CelerysBackend):
    """Celery's database backend, with engineroom's engines.

    Celery makes one for each thread; they share one manager, and so their connections.
    """

    @property
    def session_manager(self) -> ResultSessionManager:
        """What the results are read and written with."""
        return self._session_manager

    @session_manager.setter
    def session_manager(self, theirs: Any) -> None:
        """Take ours where Celery gives itself one of its own."""
        callback = theirs.engine_callback
        with _lock:
            known = _managers.setdefault(self.app, {})
            if callback not in known:
                known[callback] = ResultSessionManager(callback)
            self._session_manager = known[callback]
