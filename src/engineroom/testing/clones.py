"""A database for each test: cloned from a template that is made once, the next one made ahead.

On PostgreSQL one thread with a connection of its own makes and drops the databases. What they are
called says which template they belong to, and whoever uses a template holds an advisory lock that
the server takes back however its process ends. So the last one to go can drop what others left, and
the next run what nobody could.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from engineroom.backends import MYSQL
from engineroom.errors import InvalidURL, TemplateUnusable
from engineroom.secrecy import unseen
from engineroom.testing.administration import KEY_LENGTH, Administrator, logged_failure
from engineroom.testing.templates import NO_CLONE, NOT_ENTERED, Template
from engineroom.urls import masked, read_url

__all__ = ["Template", "clones"]

logger: logging.Logger = logging.getLogger("engineroom.testing")

CARELESS = "PRAGMA synchronous=OFF"  # nobody reads a clone after its process


@unseen
def clones(
    url: str | URL,
    prepare: Callable[[str], object] | None = None,
    *,
    name: str | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Template:
    """Make a template database; `with` gives it, and drops it and all its clones at the end.

        with clones("postgresql://localhost/postgres", make_tables) as template:
            url = template.clone()
            ...
            template.discard(url)

    Args:
        url: Of a database on the server that is to hold them, which is left as it is, by a user who
            may create databases; or of a SQLite file.
        prepare: Is called with the URL of an empty database and makes the template of it; it must
            leave no connection open. Without it the URL's own database is the template.
        name: Processes that give the same one share a template, which only the first prepares
            (PostgreSQL).
        directory: Where the files of SQLite are kept; `tempfile.gettempdir()` by default.

    Raises:
        InvalidURL: It is of another kind of database.
        TemplateUnusable: (on entering) the user may not create databases, somebody is connected to
            the template (PostgreSQL), or it has more than tables (MySQL).
        NotBehindPooler: (on entering) a pooler answers at the URL.
    """
    where = read_url(url)
    if where.get_backend_name() == "postgresql":
        return PostgresTemplate(where, prepare, name or uuid.uuid4().hex)
    if where.get_backend_name() == "sqlite":
        return FileTemplate(where, prepare, directory)
    if where.get_backend_name() in MYSQL:
        from engineroom.testing.copies import TableTemplate

        return TableTemplate(where, prepare)
    raise InvalidURL(
        f"{masked(where)}: only postgresql://, mysql://, mariadb:// and sqlite:// can be cloned."
    )


class FileTemplate(Template):
    """A SQLite file: SQLite's own backup copies it, also while others write to it."""

    def __init__(
        self,
        url: URL,
        prepare: Callable[[str], object] | None,
        directory: str | os.PathLike[str] | None,
    ) -> None:
        self._url = url
        self._prepare = prepare
        self._directory = directory
        self._folder: Path | None = None
        self._clones: dict[str, Path] = {}
        self._owner = os.getpid()
        self._worker: ThreadPoolExecutor | None = None  # where nobody writes to the template
        self._next: Future[Path] | None = None

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="engineroom-", dir=self._directory))
        try:
            if self._prepare is not None:
                self._url = self._url.set(database=str(self._folder / "template.db"))
                self._prepare(self._url.render_as_string(hide_password=False))
                self._worker = ThreadPoolExecutor(1, "engineroom-clones")
                self._next = self._worker.submit(self._copy, self._folder)
            else:
                self._check_file(self._url.database)
        except BaseException:
            self.close()
            raise
        return self

    def clone(self) -> str:
        """Copy the file; what was prepared for it was copied ahead."""
        if self._folder is None:
            raise TemplateUnusable(NOT_ENTERED)
        if self._prepare is None:
            self._check_file(self._url.database)
        copy = partial(self._copy, self._folder)
        if self._worker is None or self._next is None or os.getpid() != self._owner:
            path = copy()
        else:
            made, self._next = self._next, self._worker.submit(copy)
            path = made.result()
        url = self._url.set(database=str(path)).render_as_string(hide_password=False)
        self._clones[url] = path
        return url

    def _copy(self, folder: Path) -> Path:
        import sqlite3

        path = folder / f"{uuid.uuid4().hex[:12]}.db"
        is_uri = self._url.query.get("uri") == "true"
        source = sqlite3.connect(str(self._url.database), uri=is_uri)
        target = sqlite3.connect(path)
        target.execute(CARELESS)
        try:
            source.backup(target)
        finally:
            source.close()
            target.close()
        return path

    def discard(self, url: str) -> None:
        """Remove the file, and what SQLite keeps beside it."""
        path = self._clones.pop(url, None)
        if path is None:
            raise ValueError(NO_CLONE)
        for suffix in ("", "-wal", "-shm", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)

    def _check_file(self, name: str | None) -> None:
        """Refuse what SQLite would take for a new and empty database."""
        if name in (None, "", ":memory:"):
            raise TemplateUnusable(
                "A SQLite database in memory was to be cloned, which nobody else can read. "
                "Give clones() the URL of a file, or a function that makes the tables."
            )
        if self._url.query.get("uri") != "true" and not Path(str(name)).exists():
            raise TemplateUnusable(
                f"There is no SQLite file {name} to be cloned. Make it first, or give clones() a "
                "function that makes the tables."
            )

    def close(self) -> None:
        """Remove the folder."""
        worker, folder, self._worker, self._folder = self._worker, self._folder, None, None
        if os.getpid() == self._owner:  # a forked child has no such thread, and the folder no more
            if worker is not None:
                worker.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


class PostgresTemplate(Template):
    """A database of a PostgreSQL server, beside the URL's own."""

    _admin: Administrator

    def __init__(self, url: URL, prepare: Callable[[str], object] | None, name: str) -> None:
        self._url = url
        self._prepare = prepare
        self._key = hashlib.sha256(name.encode()).hexdigest()[:KEY_LENGTH]
        self._owner = os.getpid()
        self._worker: ThreadPoolExecutor | None = None
        self._next: Future[str] | None = None
        self._made: set[str] = set()  # all that were not dropped yet
        self._clones: set[str] = set()  # those of them that somebody has

    def __enter__(self) -> Self:
        self._worker = ThreadPoolExecutor(1, "engineroom-clones")
        try:
            self._worker.submit(self._open).result()
            self._next = self._worker.submit(self._create)
        except BaseException:
            self.close()
            raise
        return self

    def clone(self) -> str:
        """Take the database that was made ahead, and have the next one made."""
        if self._worker is None or self._next is None:
            raise TemplateUnusable(NOT_ENTERED)
        made, self._next = self._next, self._worker.submit(self._create)
        name = made.result()
        self._clones.add(name)
        return self._url_of(name)

    def discard(self, url: str) -> None:
        """Have it dropped behind what is being made."""
        name = str(read_url(url).database)
        if self._worker is None or name not in self._clones:
            raise ValueError(NO_CLONE)
        self._clones.discard(name)
        self._worker.submit(self._drop, name)

    def close(self) -> None:
        """Drop the clones; the template goes with the last process that uses it."""
        worker, self._worker = self._worker, None
        if worker is not None and os.getpid() == self._owner:  # a forked child has no such thread
            if self._next is not None:
                worker.submit(self._end).result()
            worker.shutdown()

    def _url_of(self, name: str) -> str:
        return self._url.set(database=name).render_as_string(hide_password=False)

    # -- in the thread ------------------------------------------------------------------------

    def _open(self) -> None:
        self._admin = admin = Administrator(
            self._url if self._prepare else self._url.set(database="postgres")
        )
        try:
            self._prefix = f"{admin.place}{self._key}_"
            self._template = f"{self._prefix}template" if self._prepare else str(self._url.database)
            admin.sweep()
            with admin.making(self._key):
                admin.use(self._key)
                if self._prepare and self._template not in admin.names(self._prefix):
                    self._make(admin, self._prepare)
        except BaseException:
            admin.close()
            raise

    def _make(self, admin: Administrator, prepare: Callable[[str], object]) -> None:
        """Make it under another name: a template that has its name is whole."""
        new = f"{self._prefix}new"
        admin.drop(new)  # left by a process that was killed over it
        admin.create(new)
        try:
            prepare(self._url_of(new))
            admin.seal(new, self._template)
        except BaseException:
            admin.drop(new)
            raise

    def _create(self) -> str:
        name = f"{self._prefix}{uuid.uuid4().hex[:KEY_LENGTH]}"
        self._admin.create(name, self._template)
        self._made.add(name)
        return name

    def _drop(self, name: str) -> None:
        with logged_failure(name):
            self._admin.drop(name)
            self._made.discard(name)

    def _end(self) -> None:
        """Drop what this process made, and all the rest where it is the last."""
        try:
            for name in self._made:
                self._admin.drop(name)
            self._admin.leave(self._key)
        except DBAPIError as error:  # the server is gone, or the connection to it
            logger.info("The cloned databases are left to the next run: %r", error)
        finally:
            with suppress(DBAPIError):
                self._admin.close()
