"""The schema, made once: whoever changes it holds a lock that the database itself keeps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Column, MetaData, String, Table, inspect, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only

from .backends import SchemaLock, find_schema_lock
from .errors import InvalidOption, SchemaLocked, SchemaMismatch
from .extras import brought_by
from .ledger import permit_of
from .scopes import AsyncConnectScope, ConnectScope
from .settings import DatabaseSettings

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

logger: logging.Logger = logging.getLogger("engineroom")

TIMEOUT = 300.0  # seconds; the default of the setting `schema_timeout`
TELL_AFTER = 2.0  # seconds of waiting, before the log says for whom
FIRST_PAUSE = 0.01  # seconds; each that follows is half as long again

PROJECT = "pyproject.toml"  # which Alembic reads beside its ini file, or without one


class SchemaScope(ConnectScope):
    """A connection on which `create_once` begins."""

    begins = False


class AsyncSchemaScope(AsyncConnectScope):
    """A connection on which `create_once` begins."""

    begins = False


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
    with engine.connect() as connection:
        create_once(connection, metadata, timeout)
        connection.commit()


def create_once(connection: Connection, metadata: MetaData, timeout: float = TIMEOUT) -> None:
    """Look what is missing, and create it in a transaction of its own, which the caller commits.

    Args:
        connection: In no transaction yet.
        timeout: Seconds for another one to be ready with the same.

    Raises:
        SchemaLocked: it was not.
    """
    if not metadata.tables:
        logger.warning(
            "create_all() has no table to create. Import the modules of your models before it, and "
            "derive them from engineroom's Base, or pass their metadata=."
        )
    lock = find_schema_lock(connection)
    if lock is None:
        metadata.create_all(connection)
    elif not is_complete(lock, connection, metadata):
        lock.begin(connection, writes=True)
        create_missing(connection, metadata, timeout)


def is_complete(lock: SchemaLock, connection: Connection, metadata: MetaData) -> bool:
    """Whether there is nothing to create; nothing is written, and no lock is taken.

    Where all tables are there, `create_all` itself is asked, in a transaction that refuses writes:
    types, sequences, and what the application's own events add, only SQLAlchemy knows.
    """
    lock.begin(connection, writes=False)
    complete = not missing_tables(connection, metadata)
    if complete:
        try:
            with lock.looking(connection):
                metadata.create_all(connection)
        except DBAPIError as error:
            if not lock.is_refusal(error.orig):
                raise
            complete = False
    connection.rollback()
    return complete


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
        connection: Nothing was done yet in its transaction, which the caller commits.
        timeout: Seconds for another one to be ready with the same.

    Raises:
        SchemaLocked: it was not.
    """
    lock = find_schema_lock(connection)
    if lock is not None:
        take(lock, connection, "create_all()", timeout, is_fresh=True)
    metadata.create_all(connection)


@contextmanager
def locked(connection: Connection, what: str, timeout: float = TIMEOUT) -> Generator[None]:
    """Hold the lock of the schema over any number of transactions of a connection.

    On SQLite it is one transaction, which is committed at the end, and in which no foreign key is
    enforced before: Alembic's batches drop tables that others refer to. On a connection that is in
    a transaction already the lock belongs to that, and goes with it.

    Args:
        connection: It belongs to whoever migrates, alone; what is set on it is put back.
        what: Who waits, for the log and the error.
        timeout: Seconds for another one to be ready.

    Raises:
        SchemaLocked: it was not.
    """
    lock = find_schema_lock(connection)
    if lock is None:
        yield
    elif connection.in_transaction():
        take(lock, connection, what, timeout)
        with lock.minding_drops(connection):
            yield
    else:
        try:
            take(lock, connection, what, timeout, whole_session=True, is_fresh=True)
            yield
            lock.finish(connection)
        except BaseException:
            with suppress(Exception):  # the connection may be lost, and the lock with it
                connection.rollback()
                lock.release(connection)
            raise
        lock.release(connection)


def take(
    lock: SchemaLock,
    connection: Connection,
    what: str,
    timeout: float,
    *,
    whole_session: bool = False,
    is_fresh: bool = False,
) -> None:
    """Wait for the lock and take it.

    Args:
        is_fresh: Nothing was done in the transaction yet: it need not stand while one waits.

    Raises:
        SchemaLocked: it did not come free in time.
    """
    started = time.monotonic()
    pause, told = FIRST_PAUSE, False
    lock.set_guards(connection, whole_session=whole_session)
    if (permit := permit_of(connection.connection)) is not None:
        permit.mark().statement_within = 0.0  # our own deadline as well
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
        if taken:
            if told:
                logger.info("%s goes on: it has the lock after %.1f s", what, waited)
            return
        if is_fresh:
            lock.rest(connection)
        _sleep(connection, min(pause, timeout - waited))
        pause = min(pause * 1.5, lock.longest_pause)


def _sleep(connection: Connection, seconds: float) -> None:
    if connection.dialect.is_async:
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


# -- where it stands -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Revisions:
    """The migrations, as this code knows them."""

    heads: tuple[str, ...]
    parents: dict[str, tuple[str, ...]]
    """Of each revision, newest first, what must have been run before."""
    table: str = "alembic_version"
    schema: str | None = None

    @classmethod
    def of(
        cls, script: ScriptDirectory, table: str = "alembic_version", schema: str | None = None
    ) -> Revisions:
        """Read them all."""
        parents = {}
        for each in script.walk_revisions():
            before = [*_several(each.down_revision), *_several(each.dependencies)]
            parents[each.revision] = tuple(script.get_revision(name).revision for name in before)
        return cls(tuple(script.get_heads()), parents, table, schema)

    def missing(self, current: Sequence[str]) -> list[str]:
        """Return what is to be run on a database that stands there, oldest first."""
        run: set[str] = set()
        left = list(current)
        while left:
            revision = left.pop()
            if revision not in run:
                run.add(revision)
                left += self.parents[revision]
        return [revision for revision in reversed(self.parents) if revision not in run]


def _several(names: str | Sequence[str] | None) -> Sequence[str]:
    return [names] if isinstance(names, str) else names or ()


def find_ini(settings: DatabaseSettings) -> Path | None:
    """Find Alembic's file; None where the application has no migrations.

    Raises:
        InvalidOption: the setting names one that is not there.
    """
    if not settings.alembic_ini:
        return None
    if "alembic_ini" not in settings.model_fields_set:
        return find_ini_in(Path.cwd())
    ini = Path(settings.alembic_ini)
    if not ini.is_file():
        raise InvalidOption(
            f"DB_ALEMBIC_INI={settings.alembic_ini!r} cannot be used: there is no such file in "
            f"{Path.cwd()}. Name Alembic's file, or leave it out where there are no migrations."
        )
    return ini.absolute()


def find_ini_in(folder: Path) -> Path | None:
    """Find the file that configures Alembic there: alembic.ini, or a pyproject.toml that does."""
    if (ini := folder / "alembic.ini").is_file():
        return ini
    toml = folder / PROJECT
    if not toml.is_file():
        return None
    import tomllib  # only for who has such a file

    return toml if "alembic" in tomllib.loads(toml.read_text()).get("tool", {}) else None


def read_config(ini: Path) -> Config:
    """Read Alembic's configuration, as its command line does in the folder of that file.

    Raises:
        InvalidOption: it stands in a pyproject.toml, which this Alembic does not read.
    """
    from alembic.config import Config

    toml = ini.with_name(PROJECT)
    ini = ini.with_name("alembic.ini") if ini == toml else ini
    name = str(ini) if ini.is_file() else None
    if hasattr(Config, "get_alembic_option"):
        config = Config(name, toml_file=str(toml))
    elif name is None:
        raise InvalidOption(
            f"{toml} cannot be used: Alembic reads pyproject.toml from 1.16 on, and an older one "
            f"is installed. Install that, or write an alembic.ini."
        )
    else:
        config = Config(name)
    # Have the migrations be found from any working directory.
    location = read_option(config, "script_location") or ""
    if location and ":" not in location and not Path(location).exists():
        placed = str(toml.absolute().parent / location)
        config.set_main_option("script_location", placed.replace("%", "%%"))
    return config


def read_option(config: Config, name: str) -> str | None:
    """Read an option of Alembic: of the ini file, or else of pyproject.toml."""
    read: Callable[[str], str | None]
    read = getattr(config, "get_alembic_option", config.get_main_option)
    return read(name)


@cache
def read_revisions(ini: Path) -> Revisions:
    """Read the migrations of an application; once, for they are a part of the code that runs.

    Raises:
        ModuleNotFoundError: Alembic is not installed.
    """
    with brought_by("alembic", f"{ini} says that migrations make the tables"):
        from alembic.script import ScriptDirectory
    config = read_config(ini)
    table = read_option(config, "version_table") or "alembic_version"
    schema = read_option(config, "version_table_schema")
    return Revisions.of(ScriptDirectory.from_config(config), table, schema)


def revisions_of(settings: DatabaseSettings) -> Revisions | None:
    """Return the migrations of an application, if it has any."""
    ini = find_ini(settings)
    return None if ini is None else read_revisions(ini)


def mind_schema(connection: Connection, metadata: MetaData, revisions: Revisions | None) -> None:
    """Refuse a database that does not stand where the code needs it.

    Args:
        metadata: Whose tables must be there, where there are no migrations.

    Raises:
        SchemaMismatch: it does not.
    """
    if revisions is None:
        if missing := missing_tables(connection, metadata):
            raise SchemaMismatch(
                f"The database has not all tables of the models: {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not there. Create them: create_all().",
                missing=missing,
            )
        return
    current: tuple[str, ...] = ()
    if inspect(connection).has_table(revisions.table, revisions.schema):
        column: Column[str] = Column("version_num", String)
        Table(revisions.table, MetaData(), column, schema=revisions.schema)
        current = tuple(sorted(connection.scalars(select(column))))
    refuse_unknown(revisions, current)
    if missing := revisions.missing(current):
        stands = f"it is at {', '.join(current)}" if current else "nothing was ever migrated there"
        raise SchemaMismatch(
            f"The database does not stand at head: {stands}, and this code needs "
            f"{', '.join(revisions.heads)}, which is {len(missing)} "
            f"{'migration' if len(missing) == 1 else 'migrations'} further ({', '.join(missing)}). "
            "Run them: alembic upgrade head.",
            current,
            revisions.heads,
            missing,
        )


def refuse_unknown(revisions: Revisions, current: Sequence[str]) -> None:
    """Refuse a database that newer code has migrated.

    Raises:
        SchemaMismatch: it stands where this code knows no revision.
    """
    if unknown := [revision for revision in current if revision not in revisions.parents]:
        raise SchemaMismatch(
            f"The database is at revision {', '.join(unknown)}, which this code does not know (its "
            f"head is {', '.join(revisions.heads)}): newer code has migrated it, or it is another "
            "application's. Deploy the code that knows it, or have that downgrade the database "
            "first.",
            current,
            revisions.heads,
            unknown=unknown,
        )
