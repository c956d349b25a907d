"""A MySQL database for each test: its tables are copied one by one, for no command clones it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

from sqlalchemy import NullPool, text
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import DBAPIError

from engineroom.backends import Role, Side
from engineroom.backends.mysql import MySQL
from engineroom.backends.mysql.errnos import NO_RIGHT, errno
from engineroom.connecting import watch_connects
from engineroom.credentials import Credentials
from engineroom.engines import create
from engineroom.errors import TemplateUnusable
from engineroom.testing.templates import NO_CLONE, NOT_ENTERED, Template

# What is in a database beside tables, and would be missing in a copy.
OTHERS = """
SELECT table_type, table_name FROM information_schema.tables
    WHERE table_schema = :name AND table_type NOT IN ('BASE TABLE', 'SYSTEM VERSIONED')
UNION ALL SELECT 'TRIGGER', trigger_name FROM information_schema.triggers
    WHERE trigger_schema = :name
UNION ALL SELECT routine_type, routine_name FROM information_schema.routines
    WHERE routine_schema = :name
UNION ALL SELECT 'EVENT', event_name FROM information_schema.events WHERE event_schema = :name
"""
TABLES = "SELECT table_name FROM information_schema.tables WHERE table_schema = :name"
WRITABLE = """
SELECT column_name FROM information_schema.columns
WHERE table_schema = :name AND table_name = :table AND extra NOT LIKE '%GENERATED%'
ORDER BY ordinal_position
"""


class TableTemplate(Template):
    """A database of a MySQL server; each process makes its own."""

    def __init__(self, url: URL, prepare: Callable[[str], object] | None) -> None:
        self._url = url
        self._prepare = prepare
        self._owner = os.getpid()
        self._template: str | None = None
        self._made: set[str] = set()  # databases, all of which are to be dropped
        backend = MySQL(url)
        options = backend.engine_options(Side.SYNC, Role.PRIMARY, {})
        options |= {"poolclass": NullPool, "isolation_level": "AUTOCOMMIT", "hide_parameters": True}
        self._engine = create(Side.SYNC, backend.engine_url(Side.SYNC), **options)
        watch_connects(self._engine, Side.SYNC, backend, Credentials())

    def __enter__(self) -> Self:
        try:
            if self._prepare is None:
                self._template = str(self._url.database)
            else:
                self._template = self._create()
                self._prepare(self._url_of(self._template))
            with self._engine.connect() as connection:
                self._refuse_others(connection, self._template)
        except BaseException:
            self.close()
            raise
        return self

    def clone(self) -> str:
        """Make a database, and copy each table with its rows."""
        if self._template is None:
            raise TemplateUnusable(NOT_ENTERED)
        name = self._create()
        with self._engine.connect() as connection:
            tables = [row[0] for row in ask(connection, TABLES, name=self._template)]
            connection.exec_driver_sql("SET SESSION foreign_key_checks = 0")
            connection.exec_driver_sql(f"USE {quoted(name)}")
            for table in tables:
                self._copy(connection, self._template, table)
        return self._url_of(name)

    def _copy(self, connection: Connection, template: str, table: str) -> None:
        source = f"{quoted(template)}.{quoted(table)}"
        ddl = connection.exec_driver_sql(f"SHOW CREATE TABLE {source}").one()[1]
        connection.exec_driver_sql(ddl.replace("%", "%%"))
        names = [row[0] for row in ask(connection, WRITABLE, name=template, table=table)]
        columns = ", ".join(map(quoted, names))
        copy = f"INSERT INTO {quoted(table)} ({columns}) SELECT {columns} FROM {source}"  # noqa: S608
        connection.exec_driver_sql(copy.replace("%", "%%"))

    def discard(self, url: str) -> None:
        """End the connections to a clone, and drop it."""
        name = next((one for one in self._made if self._url_of(one) == url), None)
        if name is None or name == self._template:
            raise ValueError(NO_CLONE)
        self._drop(name)

    def close(self) -> None:
        """Drop what was made."""
        if os.getpid() == self._owner:
            for name in list(self._made):
                self._drop(name)
        self._template = None

    def _create(self) -> str:
        name = f"engineroom_{uuid.uuid4().hex[:12]}"
        with self._explained(), self._engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {quoted(name)}")
        self._made.add(name)
        return name

    def _drop(self, name: str) -> None:
        with self._engine.connect() as connection:
            inside = "SELECT id FROM information_schema.processlist WHERE db = :name"
            for (number,) in ask(connection, inside, name=name):
                with suppress(DBAPIError):  # it has just ended
                    connection.exec_driver_sql(f"KILL {number}")
            connection.exec_driver_sql(f"DROP DATABASE {quoted(name)}")
        self._made.discard(name)

    def _url_of(self, name: str) -> str:
        return self._url.set(database=name).render_as_string(hide_password=False)

    def _refuse_others(self, connection: Connection, name: str) -> None:
        """Refuse what would not be copied.

        Raises:
            TemplateUnusable: the database has something else than tables.
        """
        if found := [f"{kind} {what}" for kind, what in ask(connection, OTHERS, name=name)]:
            raise TemplateUnusable(
                f"The database {name} cannot be cloned: on MySQL only tables are copied, and it "
                f"has {', '.join(found)}. Give clones() a function that makes the tables alone, "
                "and make the rest in the clone."
            )

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except DBAPIError as error:
            if errno(error) == NO_RIGHT:
                raise TemplateUnusable(
                    f"The user {self._url.username} may not create databases on {self._url.host}, "
                    "and tests that need one of their own cannot share the URL's. Grant the right, "
                    "GRANT ALL ON `engineroom\\_%`.* TO …, or give the URL of a user who has it."
                ) from error
            raise


def ask(connection: Connection, statement: str, **values: object) -> Sequence[Any]:
    """Return the rows of a question."""
    return connection.execute(text(statement), values).all()


def quoted(name: str) -> str:
    """Quote an identifier."""
    return "`" + name.replace("`", "``") + "`"
