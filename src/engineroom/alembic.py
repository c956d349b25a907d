"""Alembic: a ready `env.py`, whose migrations run once however many start at the same time."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from configparser import InterpolationError
from contextlib import contextmanager
from functools import partial
from logging.config import fileConfig
from pathlib import Path
from typing import Any, Self

from sqlalchemy import MetaData
from sqlalchemy.engine import URL, Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from .backends import POOLER, Role, Side, find_schema_lock
from .database import Database
from .errors import DriverNotInstalled, InvalidOption, NoDatabaseURL, NoMigrations
from .extras import brought_by
from .manager import DatabaseSessionManager
from .models import Base
from .schema import Revisions, find_ini, locked, read_config, read_option, refuse_unknown
from .secrecy import Sealed
from .settings import read_settings
from .urls import in_full, read_url

with brought_by("alembic", "engineroom.alembic is imported"):
    from alembic import command, context
    from alembic.config import Config

__all__ = ["run", "upgrade"]

logger: logging.Logger = logging.getLogger("engineroom")

Manager = DatabaseSessionManager | Database

# What stands in `config.attributes`: whose database it is, and whether `run` has seen to it.
MANAGER = "engineroom.manager"
HAS_RUN = "engineroom.has_run"
PLACEHOLDER = "driver://user:pass@localhost/dbname"  # what `alembic init` writes for a URL
TELL_EVERY = 10.0  # seconds
SAID_OTHERWISE = {
    "connection": 'config.attributes["connection"]',
    "url": "-x url=…, sqlalchemy.url or DATABASE_URL",
    "target_metadata": "metadata=",
}

_turn = threading.Lock()  # Alembic knows one `context` for all threads


def run(
    metadata: MetaData | Sequence[MetaData] | None = None,
    manager: Manager | None = None,
    **options: Any,
) -> None:
    """Be the body of `env.py`: the migrations run, under the lock of the schema.

        from engineroom import alembic
        from myapp.models import Base

        alembic.run(metadata=Base.metadata)

    The database is, in this order: `-x url=…` of the command line; the connection that is given in
    `config.attributes["connection"]`; `sqlalchemy.url` of the ini file; that of the manager, if it
    is open; `DATABASE_URL` or `DB_URL`.

    Args:
        metadata: Of the models; the manager's, or `Base.metadata`, without it.
        manager: Whose database it is.
        options: For Alembic's `context.configure()`: `compare_type`, `include_object`, …

    Raises:
        SchemaLocked: somebody else was not ready within `schema_timeout`.
        SchemaMismatch: the database stands at a revision that is not among the migrations.
        InvalidOption: an option that `run` itself sets.
    """
    config = context.config
    _mind_options(options, config)
    if config.cmd_opts is not None and config.config_file_name is not None:
        _configure_logging(config.config_file_name)
    config.attributes[HAS_RUN] = True
    given: Manager | None = config.attributes.get(MANAGER, manager)
    if given is not None and not given._room.life.is_usable:
        given = None  # it has no URL yet
    if metadata is None:
        metadata = Base.metadata if given is None else given._room.metadata
    _see_named_schemas(metadata, options)
    url = _commanded_url()
    connection = None if url else config.attributes.get("connection")
    if url is None and MANAGER not in config.attributes:
        url = _written_url(config)
    work = partial(_migrate, metadata=metadata, options=options)
    if context.is_offline_mode():
        _write_sql(read_url(url.reveal()) if url else _url_of(given), metadata, options)
    elif connection is not None:
        settings = read_settings()
        given_connection = getattr(connection, "sync_connection", connection)
        if settings.pooler is not None:
            given_connection.execution_options(**{POOLER: settings.pooler})
        work(given_connection, timeout=settings.schema_timeout)
    elif url is None and given is not None:
        _on_connection(given, work)
    else:
        own = DatabaseSessionManager().init(url.reveal() if url else _url_of(None))
        try:
            _on_connection(own, work)
        finally:
            own.sync.close(0)


def _mind_options(options: dict[str, Any], config: Config) -> None:
    for name in options.keys() & SAID_OTHERWISE.keys():
        raise InvalidOption(
            f"alembic.run() sets {name} of context.configure() itself: say {SAID_OTHERWISE[name]}."
        )
    for name in ("version_table", "version_table_schema"):  # `check(schema=True)` reads them there
        if (value := read_option(config, name)) is not None:
            options.setdefault(name, value)


def upgrade(manager: Manager, ini: Path | None = None) -> None:
    """Run the migrations of `alembic.ini` on the manager's database; `lifespan(migrate=True)` does.

    Args:
        manager: It is open.
        ini: Alembic's file; what the setting `alembic_ini` says without it.

    Raises:
        NoMigrations: there is none.
        SchemaLocked: somebody else was not ready within `schema_timeout`.
        SchemaMismatch: the database stands at a revision that is not among the migrations.
    """
    settings = manager._room.settings
    ini = ini or find_ini(settings)
    if ini is None:
        raise NoMigrations(
            f"There are no migrations to run: no alembic.ini in {Path.cwd()}, and no "
            "[tool.alembic] in its pyproject.toml. Make them (alembic init migrations), or say "
            "where they are: init(alembic_ini=…), DB_ALEMBIC_INI. Without migrations, create_all() "
            "makes the tables."
        )
    config = config_for(ini, settings.url)
    config.attributes[MANAGER] = manager
    with _turn, same_logging():
        command.upgrade(config, "heads")
    if HAS_RUN not in config.attributes:
        logger.warning(
            "The migrations of %s ran without the lock of the schema: two that start at once may "
            "both run them. Have its env.py call engineroom.alembic.run().",
            ini,
        )


# -- where ---------------------------------------------------------------------------------------


def config_for(ini: Path, url: URL) -> Config:
    """Return Alembic's configuration with a URL in it, for whichever `env.py` reads it there."""
    config = read_config(ini)
    written = _written_url(config)
    known = None if written is None else read_url(written.reveal())
    if known is not None and known.get_backend_name() == url.get_backend_name():
        url = url.set(drivername=known.drivername)  # env.py may be written for it
    config.set_main_option("sqlalchemy.url", in_full(url).replace("%", "%%"))
    return config


def _commanded_url() -> Sealed[str] | None:
    """Return what the command line says."""
    url = context.get_x_argument(as_dictionary=True).get("url")
    return Sealed(url) if url else None


def _written_url(config: Config) -> Sealed[str] | None:
    """Return what the ini file says; a `%` need not be doubled there, as configparser has it."""
    read = partial(
        config.file_config.get, config.config_ini_section, "sqlalchemy.url", fallback=None
    )
    try:
        written = read()
    except InterpolationError:
        written = read(raw=True)
    return None if written in (None, "", PLACEHOLDER) else Sealed(written)


def _url_of(manager: Manager | None) -> URL:
    try:
        return (read_settings() if manager is None else manager._room.settings).url
    except NoDatabaseURL as error:
        raise NoDatabaseURL(
            f"{error.message} Alembic takes it from its command line as well (alembic -x url=… "
            "upgrade head), or from sqlalchemy.url in alembic.ini."
        ) from None


def _on_connection(manager: Manager, work: Callable[..., None]) -> None:
    """Work on a connection that belongs to nobody else, of the side whose driver is installed."""
    room = manager._room
    work = partial(work, timeout=room.settings.schema_timeout)
    try:
        engine = room.engine(Side.SYNC)
    except DriverNotInstalled:
        _run_in_a_loop(room.bind(Side.ASYNC, Role.PRIMARY), work)
        return
    with engine.connect() as connection:
        _work_and_part(connection, work)


def _work_and_part(connection: Connection, work: Callable[[Connection], None]) -> None:
    """Work, and keep the connection from being lent again: who knows what a migration has set."""
    if (lock := find_schema_lock(connection)) is not None:
        options = lock.look_options() if _only_looks() else lock.options()
        connection = connection.execution_options(**options)
    try:
        work(connection)
    finally:
        connection.invalidate()


def _run_in_a_loop(engine: AsyncEngine, work: Callable[[Connection], None]) -> None:
    """Work on a connection of the asynchronous side; in another thread where a loop runs here."""

    async def main() -> None:
        async with engine.connect() as connection:
            await connection.run_sync(_work_and_part, work)

    with ThreadPoolExecutor(1, "engineroom-migrations") as thread:
        thread.submit(asyncio.run, main()).result()


# -- what ----------------------------------------------------------------------------------------


def _migrate(
    connection: Connection,
    *,
    metadata: MetaData | Sequence[MetaData],
    options: dict[str, Any],
    timeout: float,
) -> None:
    if _only_looks():
        _configure(connection, metadata, options)
        with context.begin_transaction():
            context.run_migrations()
        return
    with locked(connection, "alembic", timeout), Progress() as progress:
        theirs = options.get("on_version_apply", ())
        callbacks = [theirs] if callable(theirs) else [*theirs]
        _configure(
            connection, metadata, options | {"on_version_apply": [progress.note, *callbacks]}
        )
        migration = context.get_context()
        lock = find_schema_lock(connection)
        if lock is not None and lock.autocommit_block is not None:
            migration.autocommit_block = lock.autocommit_block  # type: ignore[method-assign,assignment]
        if not migration.purge:
            _refuse_unknown(connection, migration)
        with context.begin_transaction():
            context.run_migrations()


def _refuse_unknown(connection: Connection, migration: Any) -> None:
    was_in_transaction = connection.in_transaction()
    heads = migration.get_current_heads()
    if not was_in_transaction:
        connection.rollback()
    refuse_unknown(Revisions.of(context.script), heads)


def _configure(
    connection: Connection, metadata: MetaData | Sequence[MetaData], options: dict[str, Any]
) -> None:
    defaults: dict[str, Any] = {"render_as_batch": connection.dialect.name == "sqlite"}
    context.configure(connection=connection, target_metadata=metadata, **(defaults | options))


def _write_sql(url: URL, metadata: MetaData | Sequence[MetaData], options: dict[str, Any]) -> None:
    """Write the statements instead of sending them (`--sql`)."""
    defaults: dict[str, Any] = {"literal_binds": True, "dialect_opts": {"paramstyle": "named"}}
    context.configure(url=url, target_metadata=metadata, **(defaults | options))
    with context.begin_transaction():
        context.run_migrations()


def _see_named_schemas(metadata: MetaData | Sequence[MetaData], options: dict[str, Any]) -> None:
    """Have autogenerate compare the schemas that the models name, and no others."""
    several = [metadata] if isinstance(metadata, MetaData) else metadata
    schemas = {table.schema for each in several for table in each.tables.values()}
    if schemas - {None} and "include_schemas" not in options and "include_name" not in options:

        def is_named(name: str | None, kind: str, parents: Any) -> bool:
            return kind != "schema" or name is None or name in schemas

        options |= {"include_schemas": True, "include_name": is_named}


def _only_looks() -> bool:
    """Whether the command (`current`, `check`, …) changes nothing: it need not wait for the lock.

    No public name leads to what the command asked for before `configure()`, and that needs a
    connection. `tests/test_private_names.py` fails when it goes.
    """
    proxy: Any = vars(context)["_proxy"]
    return bool(proxy.context_opts.get("dont_mutate", False))


# -- what the log says ---------------------------------------------------------------------------


class Progress:
    """What the log says of migrations: each one's time, and a line while one takes long."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last = "none was finished yet"
        self._ended = threading.Event()
        self._teller = threading.Thread(target=self._tell, name="engineroom-progress", daemon=True)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._teller.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._ended.set()
        self._teller.join()

    def note(self, *, step: Any, **_: Any) -> None:
        """Note a migration that was run (Alembic's `on_version_apply`)."""
        now = time.monotonic()
        name = (
            ", ".join(step.up_revision_ids) if step.is_upgrade else f"out of {step.up_revision_id}"
        )
        logger.info("Migrated %s in %.1f s", name, now - self._began)
        self._began, self._last = now, f"the last one finished was {name}"

    def _tell(self) -> None:
        while not self._ended.wait(TELL_EVERY):
            logger.warning(
                "A migration has been running for %.0f s; %s",
                time.monotonic() - self._began,
                self._last,
            )


def _configure_logging(ini: str) -> None:
    """Set up logging as the ini file of the command line says, if it says anything."""
    if Path(ini).is_file() and "[loggers]" in Path(ini).read_text():
        fileConfig(ini, disable_existing_loggers=False)


@contextmanager
def same_logging() -> Generator[None]:
    """Undo what `fileConfig` of the usual `env.py` does to everybody's loggers."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    loggers = [
        each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger)
    ]
    disabled = [each.disabled for each in loggers]
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for logger, was in zip(loggers, disabled, strict=True):
            logger.disabled = was
