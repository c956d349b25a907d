"""The schema, made once: whoever changes it holds a lock that the database itself keeps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress

from sqlalchemy import MetaData, inspect
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util import await_only

from .backends import SchemaLock, find_schema_lock
from .errors import SchemaLocked
from .scopes import AsyncConnectScope, ConnectScope

logger: logging.Logger = logging.getLogger("engineroom")

TIMEOUT = 300.0  # seconds; the default of the setting `schema_timeout`
TELL_AFTER = 2.0  # seconds of waiting, before the log says for whom
FIRST_PAUSE = 0.01  # seconds; each that follows is half as long again


class SchemaScope(ConnectScope):
    """A connection on which the schema is changed."""

    __slots__ = ()

    def _open(self, engine: Engine) -> Connection:
        lock = find_schema_lock(engine.dialect.name)
        return super()._open(engine.execution_options(**(lock.options() if lock else {})))


class AsyncSchemaScope(AsyncConnectScope):
    """A connection on which the schema is changed."""

    __slots__ = ()

    async def _open(self, engine: AsyncEngine) -> AsyncConnection:
        lock = find_schema_lock(engine.dialect.name)
        return await super()._open(engine.execution_options(**(lock.options() if lock else {})))


def create_all(engine: Engine, metadata: MetaData, timeout: float = TIMEOUT) -> None:
    """Create what is missing, on any engine; once, however many start at the same time.

    The synchronous core of an asynchronous engine (`sync_engine`) is welcome inside of
    `AsyncConnection.run_sync` or SQLAlchemy's `greenlet_spawn`.

    Args:
        engine: Of PostgreSQL or SQLite; elsewhere SQLAlchemy's own `create_all` is called.
        timeout: Seconds for another one to be ready with the same.

    Raises:
        SchemaLocked: it was not.
    """
    lock = find_schema_lock(engine.dialect.name)
    if lock is None:
        metadata.create_all(engine)
        return
    with engine.execution_options(**lock.look_options()).connect() as connection:
        complete = is_complete(connection, metadata)
    if not complete:
        with engine.execution_options(**lock.options()).begin() as connection:
            create_missing(connection, metadata, timeout)


def is_complete(connection: Connection, metadata: MetaData) -> bool:
    """Whether there is nothing to create; nothing is written, and no lock is taken.

    Where all tables are there, `create_all` itself is asked, in a transaction that refuses writes:
    types, sequences, and what the application's own events add, only SQLAlchemy knows.

    Args:
        connection: In a read-only transaction, which is over where the answer is no.
    """
    lock = find_schema_lock(connection.dialect.name)
    if lock is None or missing_tables(connection, metadata):
        return False
    try:
        with lock.looking(connection):
            metadata.create_all(connection)
    except DBAPIError as error:
        if not lock.is_refusal(error.orig):
            raise
        connection.rollback()
        return False
    return True


def missing_tables(connection: Connection, metadata: MetaData) -> list[str]:
    """Return the tables of the models that are not there."""
    inspector = inspect(connection)
    there = {schema: set[str]() for schema in {table.schema for table in metadata.tables.values()}}
    for schema, names in there.items():
        names.update(inspector.get_table_names(schema))
    return [
        table.fullname
        for table in metadata.sorted_tables
        if table.name not in there[table.schema]
        and not inspector.has_table(table.name, table.schema)  # a view, or in the search path
    ]


def create_missing(connection: Connection, metadata: MetaData, timeout: float = TIMEOUT) -> None:
    """Create what is still missing once the lock is held; both last until the transaction ends.

    Args:
        connection: In a transaction, which the caller commits.
        timeout: Seconds for another one to be ready with the same.

    Raises:
        SchemaLocked: it was not.
    """
    lock = find_schema_lock(connection.dialect.name)
    if lock is not None:
        take(lock, connection, "create_all()", timeout)
    metadata.create_all(connection)


@contextmanager
def locked(connection: Connection, what: str, timeout: float = TIMEOUT) -> Generator[None]:
    """Hold the lock of the schema over any number of transactions of a connection.

    On SQLite it is one transaction, which is committed at the end. On a connection that is in a
    transaction already the lock belongs to that, and goes with it.

    Args:
        connection: It belongs to whoever migrates, alone.
        what: Who waits, for the log and the error.
        timeout: Seconds for another one to be ready.

    Raises:
        SchemaLocked: it was not.
    """
    lock = find_schema_lock(connection.dialect.name)
    if lock is None:
        yield
    elif connection.in_transaction():
        take(lock, connection, what, timeout)
        yield
    elif connection.dialect.name == "sqlite":
        with connection.begin():
            take(lock, connection, what, timeout)
            yield
    else:
        take(lock, connection, what, timeout, whole_session=True)
        try:
            yield
        except BaseException:
            with suppress(Exception):  # the connection may be lost, and the lock with it
                _release(lock, connection)
            raise
        _release(lock, connection)


def _release(lock: SchemaLock, connection: Connection) -> None:
    connection.rollback()
    lock.release(connection)
    connection.commit()


def take(
    lock: SchemaLock,
    connection: Connection,
    what: str,
    timeout: float,
    *,
    whole_session: bool = False,
) -> None:
    """Wait for the lock and take it.

    Raises:
        SchemaLocked: it did not come free in time.
    """
    started = time.monotonic()
    pause, told = FIRST_PAUSE, False
    lock.set_guards(connection, whole_session=whole_session)
    while True:
        taken = lock.try_take(connection, whole_session=whole_session)
        waited = time.monotonic() - started
        if not taken and waited >= timeout:
            raise SchemaLocked(
                f"{what} has waited for {waited:.1f} s (DB_SCHEMA_TIMEOUT={timeout:g}) for the "
                "lock under which the schema is changed, which is held by "
                f"{lock.holder(connection)}. It creates tables or migrates as well, or hangs: wait "
                f"for it, set DB_SCHEMA_TIMEOUT higher, or {lock.cure()}. Nothing was changed here."
            )
        if not taken and not told and waited >= TELL_AFTER:
            logger.warning(
                "%s waits for the lock under which the schema is changed (up to %g s), held by %s",
                what,
                timeout,
                lock.holder(connection),
            )
            told = True
        if whole_session:
            connection.commit()  # nobody is to wait for a transaction of who waits
        if taken:
            if told:
                logger.info("%s goes on: it has the lock after %.1f s", what, waited)
            return
        _sleep(connection, min(pause, timeout - waited))
        pause = min(pause * 1.5, lock.longest_pause)


def _sleep(connection: Connection, seconds: float) -> None:
    if connection.dialect.is_async:
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)
