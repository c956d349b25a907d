"""The drivers' connections, which spare what the server would answer with "nothing to do".

And which tell what a session leaves on them.

SQLAlchemy commits and rolls back where no transaction is open: after each COMMIT, and for sessions
whose statements stand alone. Other drivers know better than to ask; these send it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from sqlalchemy.engine.characteristics import ConnectionCharacteristic

from .. import Leaving, Sent

READ_ONLY = "engineroom_read_only"

# What leaves something on a connection: settings, temporary tables, locks, variables and more.
READ_OF_IT = 2000  # characters: values stand in the texts, and may be long
LEAVES = re.compile(
    r"""
    ^ (?:\s | /\*.*?\*/ | \#[^\n]*\n | --[^\n]*\n)*
    (?: set \s+ (?!transaction\b | statement\b) | create \s+ (?:or \s+ replace \s+)? temporary \b
        | lock \s+ tables? | prepare | deallocate | use | call | handler | flush ) \b
    | \bget_lock \s* \( | :=
    """,
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)

# In what the server says with its answers: SERVER_STATUS_IN_TRANS and SERVER_STATUS_AUTOCOMMIT.
IN_TRANSACTION, AUTOCOMMIT = 1, 2
ENDS = ("COMMIT", "ROLLBACK")


class Notes:
    """What is noted of a connection, beside what its driver knows."""

    rests: bool = False
    """Whether no transaction is open, for sure."""
    reads_only: bool = False
    """Whether its next transaction is one that only reads."""
    was_told: bool = False
    """Whether the server knows its transactions as such."""
    another: Callable[[], Any]
    """Opens another connection to the same server, as SQLAlchemy has it."""
    tell: Callable[[Leaving, Sent], None] | None = None
    """Whom to tell what is left on it."""
    server_status: int

    def read(self, sql: Any) -> None:
        """Tell what a statement leaves, if it does."""
        if self.tell is not None:
            text = sql if isinstance(sql, str) else bytes(sql).decode(errors="replace")
            if LEAVES.search(text, 0, READ_OF_IT):
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
    return (_of_asyncmy if is_asyncmy else _of_pymysql)(driver_class)


def _of_pymysql(driver_class: Any) -> Any:
    class SparingConnection(Notes, driver_class):  # type: ignore[misc]
        def query(self, sql: Any, unbuffered: bool = False) -> Any:
            """Send a statement: each one passes here."""
            self.read(sql)
            self.rests = False  # an error says nothing about the transaction
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


def _of_asyncmy(driver_class: Any) -> Any:
    class SparingConnection(Notes, driver_class):  # type: ignore[misc]
        async def query(self, sql: Any, unbuffered: bool = False) -> Any:
            """Send a statement: each one passes here."""
            self.read(sql)
            self.rests = False  # an error says nothing about the transaction
            affected = await super().query(sql, unbuffered)
            self.note(sql)
            return affected

        async def commit(self) -> None:
            """Commit what there is."""
            if not self.rests:
                await super().commit()
                self.rests = True

        async def rollback(self) -> None:
            """Roll back what there is; a connection that was closed has nothing."""
            if not self.rests and self.connected:
                await super().rollback()
                self.rests = True

        async def show_warnings(self) -> Any:
            """Ask nothing: after each statement with a warning, asyncmy asks in order to log it."""
            return ()

    return SparingConnection


class ReadOnly(ConnectionCharacteristic):
    """The execution option of transactions that only read."""

    __slots__ = ()

    transactional = True

    def set_characteristic(self, dialect: Any, dbapi_conn: Any, value: Any) -> None:
        """Note it, for `beginning`."""
        dialect.get_driver_connection(dbapi_conn).reads_only = bool(value)

    def reset_characteristic(self, dialect: Any, dbapi_conn: Any) -> None:
        """Have the connection's next user write."""
        dialect.get_driver_connection(dbapi_conn).reads_only = False

    def get_characteristic(self, dialect: Any, dbapi_conn: Any) -> bool:
        """Whether it is noted."""
        return bool(dialect.get_driver_connection(dbapi_conn).reads_only)


def beginning(begin: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap BEGIN, which is not sent: the server begins by itself, as a reader if it is told so.

    START TRANSACTION READ ONLY would not do: a CREATE TABLE in it commits it first, and is then
    carried out. And what the server was told is left so until somebody wants the other.
    """

    def begin_as_asked(connection: Any) -> None:
        begin(connection)
        driver = connection.driver_connection
        if driver is not None and driver.reads_only is not driver.was_told:
            tell(connection, driver.reads_only)
            driver.was_told = driver.reads_only

    return begin_as_asked


def tell(connection: Any, reads_only: bool) -> None:
    """Tell the server whether the transactions of a connection only read from now on."""
    driver = getattr(connection, "driver_connection", connection)  # or the driver's itself
    listener, driver.tell = driver.tell, None
    try:
        send(connection, f"SET SESSION TRANSACTION READ {'ONLY' if reads_only else 'WRITE'}")
    finally:
        driver.tell = listener


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
