"""The drivers' connections, which spare what the server would answer with "nothing to do".

SQLAlchemy commits and rolls back where no transaction is open: after each COMMIT, and for sessions
whose statements stand alone. Other drivers know better than to ask; these send it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from sqlalchemy.engine.characteristics import ConnectionCharacteristic

IN_TRANSACTION = 1  # SERVER_STATUS_IN_TRANS, in what the server says with each of its answers
READ_ONLY = "engineroom_read_only"


class Notes:
    """What is noted of a connection, beside what its driver knows."""

    rests: bool = False
    """Whether the server has said last that no transaction is open."""
    reads_only: bool = False
    """Whether its transactions begin as those of a reader."""
    another: Callable[[], Any]
    """Opens another connection to the same server, as SQLAlchemy has it."""


@cache
def sparing(driver_class: Any) -> Any:
    """Return the class of a connection of this driver that spares what is not needed."""
    return _of_asyncmy(driver_class) if hasattr(driver_class, "ensure_closed") else _of_pymysql(
        driver_class
    )


def _of_pymysql(driver_class: Any) -> Any:
    class SparingConnection(Notes, driver_class):  # type: ignore[misc]
        def query(self, sql: Any, unbuffered: bool = False) -> Any:
            """Send a statement: each one passes here."""
            self.rests = False  # an error says nothing about the transaction
            affected = super().query(sql, unbuffered)
            self.rests = not unbuffered and not self.server_status & IN_TRANSACTION
            return affected

        def commit(self) -> None:
            """Commit what there is."""
            if not self.rests:
                super().commit()
                self.rests = True

        def rollback(self) -> None:
            """Roll back what there is."""
            if not self.rests:
                super().rollback()
                self.rests = True

    return SparingConnection


def _of_asyncmy(driver_class: Any) -> Any:
    class SparingConnection(Notes, driver_class):  # type: ignore[misc]
        async def query(self, sql: Any, unbuffered: bool = False) -> Any:
            """Send a statement: each one passes here."""
            self.rests = False
            affected = await super().query(sql, unbuffered)
            self.rests = not unbuffered and not self.server_status & IN_TRANSACTION
            return affected

        async def commit(self) -> None:
            """Commit what there is."""
            if not self.rests:
                await super().commit()
                self.rests = True

        async def rollback(self) -> None:
            """Roll back what there is."""
            if not self.rests:
                await super().rollback()
                self.rests = True

        async def show_warnings(self) -> Any:
            """Ask nothing: after each statement with a warning, asyncmy asks in order to log it."""
            return ()

    return SparingConnection


class ReadOnly(ConnectionCharacteristic):
    """The execution option whose transactions begin as those of a reader."""

    __slots__ = ()

    transactional = True

    def set_characteristic(self, dialect: Any, dbapi_conn: Any, value: Any) -> None:
        """Note it: `begin` reads it."""
        dialect.get_driver_connection(dbapi_conn).reads_only = bool(value)

    def reset_characteristic(self, dialect: Any, dbapi_conn: Any) -> None:
        """Have the connection's next user write."""
        dialect.get_driver_connection(dbapi_conn).reads_only = False

    def get_characteristic(self, dialect: Any, dbapi_conn: Any) -> bool:
        """Whether it is noted."""
        return bool(dialect.get_driver_connection(dbapi_conn).reads_only)


def beginning(begin: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap BEGIN, which is not sent, since the server begins by itself: but to read, it is told."""

    def begin_as_asked(connection: Any) -> None:
        begin(connection)
        driver = connection.driver_connection
        if driver is not None and driver.reads_only:
            cursor = connection.cursor()
            cursor.execute("START TRANSACTION READ ONLY")
            cursor.close()

    return begin_as_asked
