"""The drivers' connections, which spare what the server would answer with "nothing to do".

And which tell what a session leaves on them.

SQLAlchemy commits and rolls back where no transaction is open: after each COMMIT, and for sessions
whose statements stand alone. Other drivers know better than to ask; these send it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from sqlalchemy.engine.characteristics import ConnectionCharacteristic
from sqlalchemy.util import greenlet_spawn

from .. import Leaving, Sent
from .errnos import NO_SUCH_THREAD, errno
from .leavings import leaves

logger: logging.Logger = logging.getLogger("engineroom")

READ_ONLY = "engineroom_read_only"

# In what the server says with its answers: SERVER_STATUS_IN_TRANS, SERVER_STATUS_AUTOCOMMIT and
# SERVER_STATUS_NO_BACKSLASH_ESCAPES.
IN_TRANSACTION, AUTOCOMMIT, NO_ESCAPES = 1, 2, 512
ENDS = ("COMMIT", "ROLLBACK")
# What the drivers themselves have for leaving something; `connect` is that of ping(reconnect=True).
VERBS = ("autocommit", "select_db", "set_charset", "set_character_set", "connect")

BREAK_OFF_LIMIT = 1.0  # seconds for the server to end a connection


class Notes:
    """What is noted of a connection, beside what its driver knows."""

    rests: bool = False
    """Whether no transaction is open, for sure."""
    reads_only: bool = False
    """Whether its transactions are to read only."""
    was_told: bool = False
    """Whether the server knows that."""
    another: Callable[[], Any]
    """Opens another connection to the same server, as SQLAlchemy has it."""
    tell: Callable[[Leaving, Sent], None] | None = None
    """Whom to tell what is left on it."""
    server_status: int

    def read(self, sql: Any) -> None:
        """Tell what a statement leaves, if it does; an error says nothing about the transaction."""
        self.rests = False
        if self.tell is not None:
            # (Those who send bytes have put strings into them: no byte may be lost.)
            text = sql if isinstance(sql, str) else bytes(sql).decode("latin-1")
            if leaves(text, has_escapes=not self.server_status & NO_ESCAPES):
                self.tell(Leaving.STATE, ("query", (sql,)))

    def note(self, sql: Any) -> None:
        """Note that a statement has succeeded.

        PyMySQL does not look at what the server says behind rows, nor asyncmy at a status of 0. So
        that is believed only where each statement stands alone, and none but BEGIN begins.
        """
        state = self.server_status & (IN_TRANSACTION | AUTOCOMMIT)
        self.rests = state == AUTOCOMMIT or sql in ENDS


@cache
def sparing(driver_class: type[Any]) -> Any:
    """Return the class of a connection of this driver that spares what is not needed."""
    is_asyncmy = hasattr(driver_class, "ensure_closed")
    known = [name for name in VERBS if hasattr(driver_class, name)]
    verbs = {name: _telling(getattr(driver_class, name), name) for name in known}
    base = (_of_asyncmy if is_asyncmy else _of_pymysql)(driver_class)
    return type(base.__name__, (base,), verbs)


def _telling(send: Callable[..., Any], verb: str) -> Callable[..., Any]:
    def tell_and_send(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.tell is not None:
            self.tell(Leaving.STATE, (verb, arguments))
        return send(self, *arguments, **options)

    return tell_and_send


def _of_pymysql(driver_class: Any) -> Any:
    class SparingConnection(Notes, driver_class):  # type: ignore[misc]
        def query(self, sql: Any, unbuffered: bool = False) -> Any:
            """Send a statement: each one passes here."""
            if self.reads_only is not self.was_told:
                super().query(mode(self.reads_only))
                self.was_told = self.reads_only
            self.read(sql)
            affected = super().query(sql, unbuffered)
            self.note(sql)
            return affected

        def commit(self) -> None:
            """Commit what there is."""
            if not self.rests:
                super().commit()
                self.rests = True

        def rollback(self) -> None:
            """Roll back what there is; a connection that was closed has nothing."""
            if not self.rests and self.open:
                super().rollback()
                self.rests = True

    return SparingConnection


async def ask_no_warnings(driver: Any) -> Any:
    """Ask nothing: after each statement with a warning, asyncmy asks in order to log it."""
    return ()


def _of_asyncmy(driver_class: Any) -> Any:
    class SparingConnection(Notes, driver_class):  # type: ignore[misc]
        async def query(self, sql: Any, unbuffered: bool = False) -> Any:
            """Send a statement: each one passes here, but for those that were prepared."""
            if self.reads_only is not self.was_told:
                await self.tell_mode()
            self.read(sql)
            affected = await super().query(sql, unbuffered)
            self.note(sql)
            return affected

        async def tell_mode(self) -> None:
            """Tell the server whether the next transactions only read."""
            await super().query(mode(self.reads_only))
            self.was_told = self.reads_only

        async def prepare(self, query: Any) -> Any:
            """Prepare a statement, whose uses do not pass `query`."""
            statement = await super().prepare(query)
            statement.__class__ = sparing_statement(statement.__class__)
            statement.driver, statement.sql = self, query
            return statement

        async def commit(self) -> None:
            """Commit what there is."""
            if not self.rests:
                await super().commit()
                self.rests = True

        async def rollback(self) -> None:
            """Roll back what there is; a connection that was closed has nothing.

            What is left of a stream would be read to its end first, which may take long, and the
            loop with it.
            """
            if self.connected and is_unread(self):
                await break_off(self)
            elif self.connected and not self.rests:
                await super().rollback()
                self.rests = True

        show_warnings = ask_no_warnings

    return SparingConnection


@cache
def sparing_statement(prepared: Any) -> Any:
    """Return the class of a statement that asyncmy has prepared, and that is noted when it runs."""

    class SparingStatement(prepared):  # type: ignore[misc]
        driver: Any
        sql: Any

        async def execute(self, args: Any = ()) -> Any:
            """Run it."""
            return await self._noted(super().execute, args)

        async def execute_bulk(self, rows: Any) -> Any:
            """Run it for many rows at once."""
            return await self._noted(super().execute_bulk, rows)

        async def _noted(self, run: Callable[[Any], Any], arguments: Any) -> Any:
            driver = self.driver
            if driver.reads_only is not driver.was_told:
                await driver.tell_mode()
            driver.read(self.sql)
            result = await run(arguments)
            driver.note(self.sql)
            return result

    return SparingStatement


def mode(reads_only: bool) -> str:
    """Write down what tells the server whether transactions only read from now on.

    START TRANSACTION READ ONLY would not do: a CREATE TABLE in it commits it first, and is then
    carried out. And what the server was told is left so until somebody wants the other.
    """
    return f"SET SESSION TRANSACTION READ {'ONLY' if reads_only else 'WRITE'}"


class ReadOnly(ConnectionCharacteristic):
    """The execution option of transactions that only read."""

    __slots__ = ()

    transactional = True

    def set_characteristic(self, dialect: Any, dbapi_conn: Any, value: Any) -> None:
        """Note it, for the next statement."""
        dialect.get_driver_connection(dbapi_conn).reads_only = bool(value)

    def reset_characteristic(self, dialect: Any, dbapi_conn: Any) -> None:
        """Have the connection's next user write."""
        dialect.get_driver_connection(dbapi_conn).reads_only = False

    def get_characteristic(self, dialect: Any, dbapi_conn: Any) -> bool:
        """Whether it is noted."""
        return bool(dialect.get_driver_connection(dbapi_conn).reads_only)


def is_unread(driver: Any) -> bool:
    """Whether rows of a stream of asyncmy are on their way; no public name tells.

    Without it, a scope that is cancelled in its middle would read all the rest of it, and block
    the loop with that. `tests/test_private_names.py` fails when the names go.
    """
    result = driver._result
    return result is not None and bool(result.unbuffered_active)


async def break_off(driver: Any) -> None:
    """End a connection of asyncmy on the server: at work, that does not look at a socket.

    asyncmy itself has closed its end where it was cancelled.
    """
    try:
        async with asyncio.timeout(BREAK_OFF_LIMIT):
            await greenlet_spawn(kill, driver)
    except Exception as error:  # noqa: BLE001  # whatever it says, no more can be done
        logger.info("A cancelled statement may run on: %r", error)
    finally:
        driver.close()


def kill(driver: Any) -> None:
    """End a connection on the server, over another one."""
    killer = driver.another()
    try:
        cursor = killer.cursor()
        try:
            cursor.execute(f"KILL {driver.thread_id()}")
        except Exception as error:
            if errno(error) != NO_SUCH_THREAD:
                raise
        finally:
            cursor.close()
    finally:
        killer.close()


def send(connection: Any, statement: str) -> None:
    """Send a statement that has no rows."""
    cursor = connection.cursor()
    cursor.execute(statement)
    cursor.close()


def unnoticed(set_level: Callable[..., None], dialect: Any) -> Callable[..., None]:
    """Wrap how a dialect sets the isolation level, which it sets back itself."""

    def set_unnoticed(connection: Any, level: Any) -> None:
        driver = dialect.get_driver_connection(connection)
        listener, driver.tell = driver.tell, None
        try:
            set_level(connection, level)
        finally:
            driver.tell = listener

    return set_unnoticed
