"""PostgreSQL: asyncpg on the asynchronous side, psycopg (or psycopg2) on the synchronous one."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from .. import Role, Side, choose_driver, refuse_unknown_driver
from .schema_lock import AdvisoryLock, without_literals
from .settling import BREAK_OFF_LIMIT, settling_connection
from .sqlstates import sqlstate

__all__ = ["DRIVERS", "AdvisoryLock", "PostgreSQL", "sqlstate", "without_literals"]

logger: logging.Logger = logging.getLogger("engineroom")

DRIVERS = {
    Side.ASYNC: {"asyncpg": "asyncpg", "psycopg": "psycopg"},
    Side.SYNC: {"psycopg": "psycopg", "psycopg2": "psycopg2"},
}
READ_ONLY = "default_transaction_read_only"

BAD = 1  # libpq's CONNECTION_BAD
IDLE = 0  # libpq's PQTRANS_IDLE
AT_REST = (IDLE, 4)  # and PQTRANS_UNKNOWN: it is closed


class PostgreSQL:
    """PostgreSQL, spoken to directly."""

    def __init__(self, url: URL) -> None:
        refuse_unknown_driver(url, DRIVERS)
        self._url = url

    def engine_url(self, side: Side) -> URL:
        """Return the URL with the driver of a side."""
        return choose_driver(self._url, DRIVERS[side], "postgresql")

    def engine_options(
        self, side: Side, role: Role, connect_args: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the options of a role: a reader's statements stand alone, and write nothing."""
        arguments: dict[str, Any] = dict(connect_args)
        driver = self.engine_url(side).get_driver_name()
        if side is Side.ASYNC and driver == "psycopg":
            arguments.setdefault("async_creator_fn", settling_connection().connect)
        if role is Role.PRIMARY:
            return {"connect_args": arguments}
        if driver == "asyncpg":
            given = arguments.get("server_settings", {})
            arguments["server_settings"] = given | {READ_ONLY: "on"}
        else:
            texts = (self._url.query.get("options"), arguments.get("options"))
            arguments["options"] = " ".join(
                [*(str(text) for text in texts if text), f"-c {READ_ONLY}=on"]
            )
        return {"isolation_level": "AUTOCOMMIT", "connect_args": arguments}

    def read_only_options(self) -> dict[str, Any]:
        """Return what makes SQLAlchemy's drivers say BEGIN READ ONLY."""
        return {"postgresql_readonly": True}

    def attach(
        self, engine: Engine, role: Role, before_write: Callable[[Connection], None]
    ) -> None:
        """PostgreSQL behaves as it is; psycopg is spared a rollback where nothing has begun."""
        dialect: Any = engine.dialect
        if dialect.driver == "psycopg":
            dialect.do_rollback = _rolling_back(dialect.do_rollback, dialect.is_async)

    def limit_connect(self, arguments: dict[str, Any], seconds: float) -> None:
        """Set libpq's parameter, in whole seconds; fewer than two it does not know."""
        arguments["connect_timeout"] = max(2, math.ceil(seconds))

    def descriptor(self, driver: Any) -> int | None:
        """Return the file descriptor of the connection's socket; None once it is closed."""
        if self.is_closed(driver):
            return None
        if hasattr(driver, "fileno"):  # psycopg, psycopg2
            return int(driver.fileno())
        transport = _asyncpg_transport(driver)
        known = transport.get_extra_info("socket")
        return None if known is None or transport.is_closing() else int(known.fileno())

    def is_closed(self, driver: Any) -> bool:
        """Ask the driver: none of them forgets its socket before it knows that it is closed."""
        if hasattr(driver, "pgconn"):  # psycopg's own property is the same, and Python
            return bool(driver.pgconn.status == BAD)
        closed: bool | None = getattr(driver, "closed", None)
        return bool(driver.is_closed() if closed is None else closed)

    def is_at_rest(self, driver: Any) -> bool:
        """Ask the driver, which knows what the server said last."""
        if hasattr(driver, "pgconn"):
            return driver.pgconn.transaction_status in AT_REST
        if hasattr(driver, "get_transaction_status"):  # psycopg2
            return driver.get_transaction_status() in AT_REST
        return not driver.is_in_transaction()

    def ping(self, connection: PoolProxiedConnection, engine: Engine) -> None:
        """Ask the server in one round trip."""
        if engine.dialect.driver == "asyncpg":
            # The dialect's own ping costs three: BEGIN, a statement, ROLLBACK.
            adapted: Any = connection.dbapi_connection
            adapted.run_async(lambda driver: driver.execute("SELECT 1"))
        else:
            engine.dialect.do_ping(connection.dbapi_connection)  # type: ignore[arg-type]

    def holds_write_lock(self, connection: PoolProxiedConnection) -> bool:
        """Writers of PostgreSQL do not keep each other out."""
        return False

    def end(
        self,
        connections: Sequence[PoolProxiedConnection],
        execute: Callable[[str], None],
        *,
        is_abandoned: bool = False,
    ) -> None:
        """End the backends: every role may do that with its own."""
        drivers: list[Any] = [connection.driver_connection for connection in connections]
        array = ", ".join(str(_backend_pid(driver)) for driver in drivers)  # of numbers: safe
        try:
            execute(f"SELECT pg_terminate_backend(pid) FROM unnest(ARRAY[{array}]) AS pid")  # noqa: S608
        except Exception as error:  # noqa: BLE001  # a server at its limit takes cancel requests
            logger.info("Backends are cancelled, for none could be asked to end them: %r", error)
            for driver in drivers:
                with suppress(Exception):
                    if hasattr(driver, "get_server_pid"):
                        if not is_abandoned:  # (asyncpg asks in its own loop only)
                            await_only(self.break_off(driver))
                    else:
                        self.interrupt(driver)
                        _shut(int(driver.fileno()))  # it ends as soon as it reads from there

    def interrupt(self, driver: Any) -> None:
        """Have the server cancel what runs; what has not arrived there yet is not."""
        driver.cancel()

    async def break_off(self, driver: Any) -> None:
        """Close asyncpg's connection, which waits for the cancel request that is on its way.

        psycopg's is closed already: `settling_connection` did that where it was interrupted.
        """
        if hasattr(driver, "get_server_pid"):
            await driver.close(timeout=BREAK_OFF_LIMIT)

    def cut(self, driver: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Close the socket; the server ends the backend when it sees that."""
        if hasattr(driver, "pgconn"):
            driver.pgconn.finish()
            return
        descriptor = self.descriptor(driver)
        if descriptor is not None and descriptor >= 0:
            # Not for reading: whoever waits for the server to let go would see our own end.
            _shut(descriptor, socket.SHUT_WR)
        if isinstance(loop, asyncio.BaseEventLoop):
            # asyncio closes its socket in a callback that this loop will never run: run it here.
            loop.call_soon = _run_unless_it_resumes_a_task  # type: ignore[method-assign,assignment]
            try:
                driver.terminate()
            finally:
                del loop.call_soon
        else:  # uvloop's have closed their sockets themselves
            with suppress(RuntimeError):
                driver.terminate()

    def disown(self, drivers: Iterable[Any]) -> None:
        """Put the null device in the place of each socket."""
        nothing = os.open(os.devnull, os.O_RDWR)
        for driver in drivers:
            descriptor = self.descriptor(driver)
            if descriptor is not None:
                os.dup2(nothing, descriptor, inheritable=False)
                if not hasattr(driver, "fileno"):
                    # The inherited loop, if it runs, would miss asyncpg's transport at its end.
                    _asyncpg_transport(driver).abort()
        os.close(nothing)

    def dispose(self) -> None:
        """There is nothing to remove."""


def _rolling_back(rollback: Callable[[Any], None], is_async: bool) -> Callable[[Any], None]:
    """Wrap ROLLBACK, which SQLAlchemy repeats after each COMMIT.

    psycopg sends nothing either, but takes a lock and runs a generator to find that out.
    """

    def roll_back_what_has_begun(connection: Any) -> None:
        driver = connection.dbapi_connection
        if is_async and driver is not None:
            driver = driver.driver_connection
        pgconn = None if driver is None else driver.pgconn
        if pgconn is None or pgconn.transaction_status != IDLE or pgconn.pipeline_status:
            rollback(connection)

    return roll_back_what_has_begun


def _asyncpg_transport(driver: Any) -> Any:
    """Return asyncpg's transport, whose socket no public name leads to.

    Without it there is no liveness without a round trip, and a forked child could not let go of
    its parent's socket. `tests/test_private_names.py` fails when the name goes.
    """
    return driver._transport


def _run_unless_it_resumes_a_task(callback: Any, *args: Any, context: object = None) -> None:
    """Stand in for the `call_soon` of a loop that has ended: no task of it may go on in another."""
    if not isinstance(getattr(callback, "__self__", None), asyncio.Future):
        callback(*args)


def _shut(descriptor: int, how: int = socket.SHUT_RDWR) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        duplicate.shutdown(how)


def _backend_pid(driver: Any) -> int:
    if hasattr(driver, "get_server_pid"):  # asyncpg
        return int(driver.get_server_pid())
    if hasattr(driver, "get_backend_pid"):  # psycopg2
        return int(driver.get_backend_pid())
    return int(driver.info.backend_pid)
