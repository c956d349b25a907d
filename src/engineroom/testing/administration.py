"""One connection to a PostgreSQL server, which makes, renames and drops databases there.

Its databases are called `engineroom_<place>_<key>_<what>`. The place is the database that it is
connected to, for locks are known only to those who share one. Whoever uses a key holds its lock,
which the server takes back however a process ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from sqlalchemy import NullPool, event, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import greenlet_spawn

from engineroom.backends import Role, Side
from engineroom.backends.postgresql import PostgreSQL, backend_pid, sqlstate
from engineroom.backends.postgresql.undeclared import is_made_up
from engineroom.connecting import watch_connects
from engineroom.credentials import Credentials
from engineroom.engines import create
from engineroom.errors import DriverNotInstalled, TemplateUnusable
from engineroom.testing.templates import not_behind_pooler
from engineroom.urls import masked

logger: logging.Logger = logging.getLogger("engineroom.testing")

T = TypeVar("T")

NO_RIGHT, IN_USE = "42501", "55006"  # SQLSTATEs
MAKING, USING = 1, 2  # the two locks of a key
KEY_LENGTH = 12

# A role or a database may have limits that are meant for an application.
WITHOUT_LIMITS = """
SELECT set_config(name, '0', false) FROM pg_settings
WHERE name IN ('statement_timeout', 'lock_timeout', 'idle_session_timeout')
"""
FACTS = """
SELECT oid, current_setting('fsync'), current_setting('server_version_num')::int, pg_backend_pid()
FROM pg_database WHERE datname = current_database()
"""
CONNECTED = """
SELECT pid, usename, application_name FROM pg_stat_activity WHERE datname = :name ORDER BY pid
"""


class Administrator:
    """A connection in AUTOCOMMIT, by whichever driver is installed; for one thread."""

    def __init__(self, url: URL) -> None:
        """Connect.

        Raises:
            NotBehindPooler: it is no server that answers there.
        """
        self._url = url
        backend, side = PostgreSQL(url), Side.SYNC
        if url.drivername == "postgresql+asyncpg":  # the URL's parameters are for it
            side = Side.ASYNC
        try:
            where = backend.engine_url(side)
        except DriverNotInstalled:
            side = Side.ASYNC
            where = backend.engine_url(side)
        options = backend.engine_options(side, Role.PRIMARY, {})
        engine = create(side, where, poolclass=NullPool, isolation_level="AUTOCOMMIT", **options)
        watch_connects(engine, side, backend, Credentials())

        def look(opened: Any, record: object) -> None:
            self._pid: int = backend_pid(engine.dialect.get_driver_connection(opened))
            if is_made_up(self._pid):
                self._refuse_pooler()

        event.listen(engine, "connect", look, insert=True)  # before SQLAlchemy asks anything
        # An asynchronous driver gets a loop that is nobody else's.
        self._runner = asyncio.Runner() if side is Side.ASYNC else None
        try:
            self._connection = self._run(engine.connect)
        except BaseException:
            self._end_loop()
            raise
        try:
            place, fsync, version, pid = self.execute(FACTS)[0]
            if pid != self._pid:
                self._refuse_pooler()
            self.execute(WITHOUT_LIMITS)
        except BaseException:
            self.close()
            raise
        self.place: str = f"engineroom_{place}_"
        # Copying files is faster where nothing is synced, and much slower where it is.
        strategy = "file_copy" if fsync == "off" else "wal_log"
        self._strategy = f" STRATEGY {strategy}" if version >= 150_000 else ""

    def _refuse_pooler(self) -> NoReturn:
        raise not_behind_pooler(
            f"A clone of {masked(self._url)}",
            f"{self._pid} is no process id of that server",
            "in the URL of clones(), or as the DATABASE_URL of the tests",
        )

    def execute(self, statement: str, **values: object) -> Sequence[Any]:
        """Run a statement and return its rows."""

        def execute() -> Sequence[Any]:
            result = self._connection.execute(text(statement), values)
            return result.all() if result.returns_rows else ()

        return self._run(execute)

    def close(self) -> None:
        """Disconnect, which also gives back the locks."""
        try:
            self._run(self._connection.close)
        finally:
            self._end_loop()

    # -- databases ----------------------------------------------------------------------------

    def names(self, prefix: str) -> list[str]:
        """Return the databases whose name begins like this."""
        found = "SELECT datname FROM pg_database WHERE starts_with(datname, :prefix)"
        return [name for (name,) in self.execute(found, prefix=prefix)]

    def create(self, name: str, template: str | None = None) -> None:
        """Create a database, empty or like a template.

        Raises:
            TemplateUnusable: the user may not, or somebody is connected to the template.
        """
        source = "" if template is None else f" TEMPLATE {quoted(template)}"
        with self._explained(template or "template1"):
            self.execute(f"CREATE DATABASE {quoted(name)}{source}{self._strategy}")

    def seal(self, name: str, new_name: str) -> None:
        """Give a database its name, and let nobody connect to it any more.

        Raises:
            TemplateUnusable: somebody is connected to it.
        """
        with self._explained(name):
            self.execute(f"ALTER DATABASE {quoted(name)} ALLOW_CONNECTIONS false")
            self.execute(f"ALTER DATABASE {quoted(name)} RENAME TO {quoted(new_name)}")

    def drop(self, name: str) -> None:
        """Drop a database, if it is there, with the connections to it."""
        self.execute(f"DROP DATABASE IF EXISTS {quoted(name)} WITH (FORCE)")

    # -- locks --------------------------------------------------------------------------------

    @contextmanager
    def making(self, key: str) -> Generator[None]:
        """Be the only one who makes or drops what belongs to a key; wait for that."""
        self.execute("SELECT pg_advisory_lock(hashtext(:key), :lock)", key=key, lock=MAKING)
        try:
            yield
        finally:
            self._unlock(key, MAKING)

    def use(self, key: str) -> None:
        """Note that what belongs to a key is in use, beside others who use it."""
        self.execute("SELECT pg_advisory_lock_shared(hashtext(:key), :lock)", key=key, lock=USING)

    def leave(self, key: str) -> None:
        """Use it no more; the last one drops all that belongs to it."""
        with self.making(key):
            unlock = "SELECT pg_advisory_unlock_shared(hashtext(:key), :lock)"
            self.execute(unlock, key=key, lock=USING)
            self._drop_unused(key)

    def sweep(self) -> None:
        """Drop what belongs to keys that nobody uses: their processes were killed."""
        for key in {name.removeprefix(self.place)[:KEY_LENGTH] for name in self.names(self.place)}:
            if self._try_lock(key, MAKING):
                try:
                    self._drop_unused(key)
                finally:
                    self._unlock(key, MAKING)

    def _drop_unused(self, key: str) -> None:
        if not self._try_lock(key, USING):
            return
        try:
            for name in self.names(f"{self.place}{key}_"):
                with logged_failure(name):
                    self.drop(name)
        finally:
            self._unlock(key, USING)

    def _try_lock(self, key: str, lock: int) -> bool:
        asked = "SELECT pg_try_advisory_lock(hashtext(:key), :lock)"
        return bool(self.execute(asked, key=key, lock=lock)[0][0])

    def _unlock(self, key: str, lock: int) -> None:
        self.execute("SELECT pg_advisory_unlock(hashtext(:key), :lock)", key=key, lock=lock)

    # -- the rest -----------------------------------------------------------------------------

    @contextmanager
    def _explained(self, name: str) -> Generator[None]:
        """Say what to do about what the server refused."""
        try:
            yield
        except DBAPIError as error:
            code = sqlstate(error.orig)
            if code == NO_RIGHT:
                user = self.execute("SELECT current_user")[0][0]
                raise TemplateUnusable(
                    f"The user {user} may not create databases on {self._url.host or 'this host'}, "
                    "and tests that need one of their own cannot share the URL's. Grant the right, "
                    f"ALTER ROLE {quoted(user)} CREATEDB, or give the URL of a user who has it."
                ) from error
            if code == IN_USE:
                rows = self.execute(CONNECTED, name=name)
                who = ", ".join(" ".join(map(str, filter(None, row))) for row in rows)
                raise TemplateUnusable(
                    f"The database {name} cannot be a template while somebody is connected to it: "
                    f"backend {who or 'that has just gone'}. Close the engine or manager that is, "
                    "in a function that prepares the template before it returns."
                ) from error
            raise

    def _run(self, call: Callable[[], T]) -> T:
        if self._runner is None:
            return call()
        return self._runner.run(greenlet_spawn(call))

    def _end_loop(self) -> None:
        if self._runner is not None:
            self._runner.close()


@contextmanager
def logged_failure(name: str) -> Generator[None]:
    """Leave a database that cannot be dropped to whoever comes next."""
    try:
        yield
    except DBAPIError as error:
        logger.info("The database %s could not be dropped: %r", name, error)


def quoted(name: str) -> str:
    """Quote an identifier."""
    return '"' + name.replace('"', '""') + '"'
