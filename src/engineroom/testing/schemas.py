"""What the databases of tests hold: the tables of the models, or what the migrations make."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, MetaData
from sqlalchemy.engine import make_url

from engineroom.database import Database
from engineroom.errors import DriverNotInstalled, TemplateUnusable
from engineroom.extras import brought_by
from engineroom.manager import DatabaseSessionManager
from engineroom.schema import missing_tables
from engineroom.secrecy import unseen

T = TypeVar("T")


@unseen
def create_tables(url: str, metadata: MetaData) -> None:
    """Create the tables of the models in an empty database.

    Raises:
        TemplateUnusable: there are none.
    """
    if not metadata.tables:
        raise TemplateUnusable(
            "There are no tables to create for the tests: no model's module was imported, or the "
            "models have another base than engineroom.Base. Import them where the manager is "
            'defined, or have the fixture db_options return {"metadata": YourBase.metadata}.'
        )
    work_on(url, metadata.create_all)


@unseen
def migrate(url: str, ini: Path, metadata: MetaData) -> None:
    """Run the project's migrations on an empty database.

    `env.py` finds the URL where it looks for it: in `sqlalchemy.url`, or in `DATABASE_URL`.

    Args:
        ini: Alembic's file; what it says is relative to its folder.
        metadata: Of the models, all of whose tables must be there afterwards.

    Raises:
        ModuleNotFoundError: Alembic is not installed.
        TemplateUnusable: tables are missing.
    """
    why = f"{ini} says that migrations make the tables, and no fixture db_prepare does"
    with brought_by("alembic", why):
        from alembic import command

        from engineroom.alembic import config_for, same_logging
    config = config_for(ini, make_url(url))
    with chdir(ini.parent), database_url(url), same_logging():
        command.upgrade(config, "heads")
    missing = work_on(url, lambda connection: missing_tables(connection, metadata))
    if missing:
        everything = len(missing) == len(metadata.tables)
        raise TemplateUnusable(
            f"The migrations of {ini} did not make these tables of the models: "
            f"{', '.join(missing)}. "
            + (
                "Have env.py take its URL from DATABASE_URL or from sqlalchemy.url of its config: "
                "it seems to have worked on another database."
                if everything
                else "Add the missing migration, or have the fixture db_prepare make them."
            )
        )


@unseen
def work_on(url: str, work: Callable[[Connection], T]) -> T:
    """Do something in a transaction, with whichever driver there is; outside of event loops."""

    async def work_asynchronously() -> T:
        async with DatabaseSessionManager().init(url) as manager, manager.connect() as connection:
            return await connection.run_sync(work)

    if make_url(url).drivername != "postgresql+asyncpg":
        with suppress(DriverNotInstalled), Database(url) as database, database.connect() as it:
            return work(it)
    return asyncio.run(work_asynchronously())


@contextmanager
def database_url(url: str) -> Generator[None]:
    """Have the environment say where the database is."""
    before = os.environ.get("DATABASE_URL")
    os.environ["DATABASE_URL"] = url
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("DATABASE_URL", None)
        else:
            os.environ["DATABASE_URL"] = before
