"""The one connection of a sandbox, in the transaction that is rolled back."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from ..backends.postgresql import sqlstate
from ..errors import SandboxEnded

logger: logging.Logger = logging.getLogger("engineroom.sandbox")

LOST = ("08", "57P", "25P03", "25P04")  # how the SQLSTATEs of lost connections begin
IDLE = 0  # libpq's transaction status

# How many rows the last statement of a message has found, all drivers tell for nothing.
DEFERRABLE = "SELECT 1 FROM pg_catalog.pg_constraint WHERE condeferrable"


class HeldConnection:
    """A connection of the manager's own pool; what is here runs on the background loop."""

    fairy: PoolProxiedConnection

    def __init__(self, engine: Engine) -> None:
        self.dialect: Any = engine.dialect
        self._pool = engine.pool
        self._own: Any = None  # asyncpg's transaction: before 0.32 it streams in no other
        self.changes_schema: bool = False  # something inside did
        self.takes_locks: bool = False  # of the session, which no rollback gives back

    def begin(self) -> int:
        """Take the connection, and begin.

        Returns:
            How many constraints can wait for COMMIT.
        """
        self.fairy = self._pool.connect()
        try:
            # The driver begins nothing by itself.
            self.dialect.set_isolation_level(self.adapted, "AUTOCOMMIT")
            driver = self.driver
            if hasattr(driver, "get_server_pid"):
                self._own = driver.transaction()
                await_only(self._own.start())
            guards = ["idle_in_transaction_session_timeout"]
            if self.dialect.server_version_info >= (17,):
                guards.append("transaction_timeout")
            statements = [] if self._own else ["BEGIN"]
            statements += [f"SET LOCAL {guard} = 0" for guard in guards]
            return self.control("; ".join([*statements, DEFERRABLE]))
        except BaseException:
            self.fairy.invalidate()
            raise

    def end(self) -> None:
        """Roll everything back; give the connection back as it came."""
        try:
            if self._own is not None:
                await_only(self._own.rollback())
            else:
                self.control("ROLLBACK")
            if self.takes_locks:
                self.control("SELECT pg_advisory_unlock_all()")
            self.dialect.reset_isolation_level(self.adapted)
            if self._own is not None and self.changes_schema:
                self.fairy.invalidate()  # what it has prepared fits tables that are no more
        except Exception as error:  # noqa: BLE001  # a test may have killed it
            logger.info("The sandbox's connection was lost: %r", error)
            self.fairy.invalidate()
        else:
            self.fairy.close()

    @property
    def adapted(self) -> Any:
        """The DBAPI connection."""
        return self.fairy.dbapi_connection

    @property
    def driver(self) -> Any:
        """The driver's own connection."""
        return self.dialect.get_driver_connection(self.adapted)

    def control(self, statements: str) -> int:
        """Run statements of our own in one message, for which the driver has to be asked.

        Returns:
            The number of rows that the last one has found.
        """
        driver = self.driver
        try:
            if not hasattr(driver, "execute"):  # psycopg2
                return len(self.send(statements))
            done = driver.execute(statements)
            done = await_only(done) if self.dialect.is_async else done
            if isinstance(done, str):  # asyncpg's is "SELECT 1", say
                return int(done.split()[-1]) if done[-1:].isdigit() else 0
            while done.nextset():
                pass
            return int(done.rowcount)
        except Exception as error:
            state = sqlstate(error)
            if state is not None and not state.startswith(LOST):
                raise
            raise SandboxEnded(
                "The sandbox lost its connection, and with it whatever was done inside. See the "
                "cause: a test may have killed it, or the server."
            ) from error

    def send(self, statement: str) -> list[Any]:
        """Run a statement of our own; its errors are the application's."""
        cursor = self.adapted.cursor()
        try:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []
        finally:
            cursor.close()

    @property
    def is_in_transaction(self) -> bool:
        """Whether the outer transaction is still there: the driver knows without asking."""
        driver = self.driver
        if hasattr(driver, "is_in_transaction"):  # asyncpg
            return bool(driver.is_closed() or driver.is_in_transaction())
        return bool(driver.closed or driver.info.transaction_status != IDLE)


def joined(before: Iterable[str], settings: dict[str, str], after: Iterable[str] = ()) -> str:
    """Make one message of statements, and between them of what gives settings their values."""
    sets = []
    for name, value in settings.items():
        literal = value.replace("'", "''")
        sets.append(f"SELECT set_config('{name}', '{literal}', true)")
    return "; ".join([*before, *sets, *after])
