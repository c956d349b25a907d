"""Starters: processes that are told to begin at the same time, and what a starter makes."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
from scenario import is_postgres, run, until
from sqlalchemy import (
    CheckConstraint,
    Column,
    Enum,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    inspect,
    text,
)

from engineroom import Base, Database, DatabaseSessionManager

if TYPE_CHECKING:
    from alembic.config import Config

HERE = Path(__file__).parent
DEADLINE = 100  # seconds for a crowd of starters, on a machine that is busy
READY = "ready"


def models(schema: str | None = None) -> MetaData:
    """Return tables with everything that has a name: keys, constraints, an index and a type."""
    metadata = MetaData(naming_convention=Base.metadata.naming_convention)
    Table(
        "customer",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("email", String(80), nullable=False, unique=True),
        Column("kind", Enum("person", "company", name="customer_kind"), nullable=False),
        Column("discount", Integer, nullable=False),
        CheckConstraint("discount >= 0"),
        schema=schema,
    )
    parent = f"{schema}.customer" if schema else "customer"
    orders = Table(
        "orders",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("customer_id", ForeignKey(f"{parent}.id", ondelete="CASCADE"), nullable=False),
        Column("number", Integer, nullable=False),
        Column("state", String(10), nullable=False, index=True),
        UniqueConstraint("customer_id", "number"),
    )
    Index("orders_by_number", orders.c.number.desc(), orders.c.id)
    return metadata


def wanted(url: str) -> MetaData:
    return models("sales" if is_postgres(url) else None)


def names(url: str) -> set[str]:
    with Database(url) as database, database.connect() as connection:
        inspector = inspect(connection)
        found = set(inspector.get_table_names())
        if is_postgres(url):
            found |= set(inspector.get_table_names("sales"))
    return found


def create_on(side: str, url: str, **options: Any) -> None:
    options = {"metadata": wanted(url)} | options
    if side == "sync":
        with Database(url, **options) as database:
            database.create_all()
        return

    async def main() -> None:
        async with DatabaseSessionManager().init(url, **options) as manager:
            await manager.create_all()

    asyncio.run(main())


FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["aiosqlite", "alembic.config", "asyncpg", "engineroom.alembic", "psycopg", "pytest"]
FORKS.set_forkserver_preload(PRELOADED)


class Starter:
    """A process that runs a function of a test's module, once it is told to begin.

    It is forked from one that has imported what is large.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._folder = TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name, name) for name in ("out", "err"))
        begin, self._begin = FORKS.Pipe(duplex=False)
        call = (function.__module__, function.__name__, arguments)
        place = (str(self._out), str(self._err), str(Path.cwd()), dict(os.environ))
        self.process = FORKS.Process(target=main, args=(begin, place, call), daemon=True)
        self.process.start()
        begin.close()

    def says(self, word: str) -> None:
        """Wait until it says this."""

        def said() -> bool:
            return self._out.exists() and word in self._out.read_text().splitlines()

        until(lambda: said() or not self.process.is_alive(), bool, DEADLINE)
        assert said(), f"{word!r} was not said: {self.ended()}"

    def begin(self) -> None:
        """Let it begin; it has imported what it needs."""
        self._begin.send(None)

    def kill(self) -> None:
        """End it as the kernel does where memory is short."""
        self.process.kill()
        self.process.join()

    def ended(self) -> tuple[int, str, str]:
        """Wait for its end, and return its exit code, what it said and what it complained about."""
        self.process.join(DEADLINE)
        code = self.process.exitcode
        assert code is not None, "it has not ended"
        return code, self._out.read_text(), self._err.read_text()

    def close(self) -> None:
        """End it if need be, and leave nothing of it."""
        self.kill()
        self.process.close()
        self._begin.close()
        self._folder.cleanup()


def together(
    count: int, function: Callable[..., Any], *arguments: Any, deadline: int = DEADLINE
) -> list[list[Any]]:
    """Have so many processes begin at the same time, and return what `ended` says of each.

    They are forked from one that has imported everything: a machine with two processors would be
    busy with imports for a minute, and the processes would not be at it at the same time.
    """
    call = (count, function.__module__, function.__name__, arguments, deadline)
    ends: list[list[Any]] = run(fork_crowd, *call, deadline=deadline)
    assert len(ends) == count
    return ends


def fork_crowd(
    count: int, module: str, name: str, arguments: list[Any], deadline: int
) -> list[list[Any]]:
    """Fork, let them begin, and collect."""
    function = getattr(importlib.import_module(module), name)
    for needed in PRELOADED:
        importlib.import_module(needed)
    begin, hold = os.pipe()
    with TemporaryDirectory() as folder:
        files = [(Path(folder, f"out{n}"), Path(folder, f"err{n}")) for n in range(count)]
        children = [
            fork_one(begin, hold, *files[n], partial(function, n, *arguments), deadline - 10)
            for n in range(count)
        ]
        os.close(hold)  # all who read the other end go on
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return [
            [code, out.read_text(), err.read_text()]
            for code, (out, err) in zip(codes, files, strict=True)
        ]


def fork_one(
    begin: int, hold: int, out: Path, err: Path, work: Callable[[], object], limit: int
) -> int:
    """Fork one, which waits until nobody holds the pipe any more."""
    if child := os.fork():
        return child
    code = 1
    try:
        signal.alarm(limit)
        os.close(hold)
        for number, file in enumerate((out, err), 1):
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        os.read(begin, 1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return 0


@contextmanager
def starters(count: int, function: Callable[..., Any], *arguments: Any) -> Iterator[list[Starter]]:
    """Have so many processes ready to begin; the function gets its number first."""
    crowd = [Starter(function, number, *arguments) for number in range(count)]
    try:
        for starter in crowd:
            starter.says(READY)
        yield crowd
    finally:
        for starter in crowd:
            starter.close()


def main(
    begin: Connection,
    place: tuple[str, str, str, dict[str, str]],
    call: tuple[str, str, tuple[Any, ...]],
) -> None:
    """Stand at the other end."""
    out, err, folder, environment = place
    for number, file in enumerate((out, err), 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("error")
    signal.alarm(DEADLINE)
    module, name, arguments = call
    function = getattr(importlib.import_module(module), name)
    print(READY, flush=True)
    begin.recv()
    function(*arguments)


def say(word: str) -> None:
    """Say something to the test, at once."""
    os.write(1, f"{word}\n".encode())


# -- a project with migrations --------------------------------------------------------------------

reads_toml = pytest.mark.skipif(
    tuple(map(int, version("alembic").split(".")[:2])) < (1, 16),
    reason="Alembic reads pyproject.toml from 1.16 on",
)

ENV = """
from engineroom import alembic
from starting import models

alembic.run(metadata=models({schema!r}){options})
"""
STEP = """
import time

import sqlalchemy as sa
from alembic import op
{imports}
revision = {revision!r}
down_revision = {down!r}


def upgrade() -> None:
    {body}


def downgrade() -> None:
    pass
"""
FIRST = """op.create_table("ran", sa.Column("step", sa.String(20)))
    op.execute("INSERT INTO ran VALUES ('first')")"""
SECOND = """op.execute("INSERT INTO ran VALUES ('second')")"""


def project(
    folder: Path, *steps: str, ini: str = "", schema: str | None = None, options: str = ""
) -> Path:
    """Write a project whose migrations do this, and return its `alembic.ini`."""
    (folder / "migrations" / "versions").mkdir(parents=True, exist_ok=True)
    (folder / "alembic.ini").write_text(
        f"[alembic]\nscript_location = %(here)s/migrations\n{ini}\n"
    )
    write_migrations(folder / "migrations", *steps, schema=schema, options=options)
    return folder / "alembic.ini"


def write_migrations(
    folder: Path, *steps: str, schema: str | None = None, options: str = ""
) -> None:
    """Write `env.py`, and migrations that do this."""
    (folder / "env.py").write_text(ENV.format(schema=schema, options=options))
    for number, body in enumerate(steps or (FIRST, SECOND), 1):
        down = f"r{number - 1}" if number > 1 else None
        text = STEP.format(revision=f"r{number}", down=down, body=body, imports="")
        (folder / "versions" / f"r{number}.py").write_text(text)


def steps(url: str) -> list[str]:
    """Return what the migrations did, by its side effects."""
    with Database(url) as database, database.connect() as connection:
        return list(connection.scalars(text("SELECT step FROM ran ORDER BY step")))


def config(ini: Path, *arguments: str) -> Config:
    """Return what the command line would make of `-x`."""
    from alembic.config import Config

    made = Config(str(ini))
    made.cmd_opts = Namespace(x=list(arguments))
    return made


def upgrade(ini: Path, url: str) -> None:
    from alembic import command

    command.upgrade(config(ini, f"url={url}"), "heads")


def alembic(number: int, ini: str, *arguments: str) -> None:
    """Be the command line of Alembic."""
    from alembic.config import main as command_line

    sys.path.insert(0, str(HERE))
    command_line(argv=["-c", ini, *arguments])


def connect_apart(url: str) -> str:
    """Return the source of a migration's step that works on another connection for a while."""
    if url.startswith("sqlite"):
        return "time.sleep(1.6)"
    return f"""import psycopg
    with psycopg.connect({url!r}, autocommit=True) as apart:
        apart.execute("SELECT pg_sleep(1.6)")"""
