"""PostgreSQL: asyncpg on the asynchronous side, psycopg (or psycopg2) on the synchronous one."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import socket
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from traceback import clear_frames
from typing import Any, ClassVar

from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from ..cancellation import settle
from ..errors import InvalidOption
from . import Role, Side, choose_driver, refuse_unknown_driver

logger: logging.Logger = logging.getLogger("engineroom")

DRIVERS = {
    Side.ASYNC: {"asyncpg": "asyncpg", "psycopg": "psycopg"},
    Side.SYNC: {"psycopg": "psycopg", "psycopg2": "psycopg2"},
}
READ_ONLY = "default_transaction_read_only"
LEVEL = "READ COMMITTED"  # of who changes the schema

BAD = 1  # libpq's CONNECTION_BAD
IDLE = 0  # libpq's PQTRANS_IDLE
AT_REST = (IDLE, 4)  # and PQTRANS_UNKNOWN: it is closed

CANCEL_EVERY = 0.02  # seconds
BREAK_OFF_LIMIT = 1.0  # seconds for the server to take a cancel request


def sqlstate(error: BaseException | None) -> str | None:
    """Return the code that the server gave an error of a driver, or of SQLAlchemy's adapter."""
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


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
            arguments.setdefault("async_creator_fn", _settling_connection().connect)
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

        psycopg's is closed already: `_settling_connection` did that where it was interrupted.
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


class AdvisoryLock:
    """An advisory lock: one for all that changes the schema of a database, whatever its tables."""

    # A database has advisory locks of its own, so the key need not say which one it is. Any other
    # tool can take it as well: it stands in docs/migrations.md.
    KEY: ClassVar[int] = int.from_bytes(b"engnroom", "big")
    longest_pause: float = 0.2

    def __init__(self) -> None:
        self._before: dict[str, str] = {}  # what the guards of the session were
        self._stood_alone = False
        self._is_held = False

    def options(self) -> dict[str, Any]:
        """See what others have committed while one waited, though the snapshot would be older."""
        return {"isolation_level": LEVEL}

    def look_options(self) -> dict[str, Any]:
        """Begin a transaction in which the server refuses writes, on an AUTOCOMMIT engine too."""
        return {"postgresql_readonly": True, "isolation_level": LEVEL}

    def begin(self, connection: Connection, *, writes: bool) -> None:
        """Begin at the level that is needed, which is what most connections begin at anyhow."""
        if _stands_alone(connection) or (writes and connection.get_isolation_level() != LEVEL):
            connection.execution_options(**self.options())
        connection.begin()
        if not writes:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")

    def looking(self, connection: Connection) -> AbstractContextManager[None]:
        """The transaction is read-only."""
        return nullcontext()

    def is_refusal(self, error: BaseException | None) -> bool:
        """Ask for "read_only_sql_transaction"."""
        return sqlstate(error) == "25006"

    def set_guards(self, connection: Connection, *, whole_session: bool) -> None:
        """Put those at 0 that this server has.

        A step that works elsewhere (in Python, on another connection) leaves this one idle, and a
        server that ended it for that would let a second starter begin.
        """
        if whole_session and _stands_alone(connection):
            self._stood_alone = True
            connection.execution_options(**self.options())
        guards = connection.exec_driver_sql(
            f"SELECT name, setting, set_config(name, '0', {not whole_session}) "  # noqa: S608
            "FROM pg_catalog.pg_settings WHERE name IN ('idle_in_transaction_session_timeout', "
            "'idle_session_timeout', 'statement_timeout', 'transaction_timeout')"
        )
        self._before = {name: setting for name, setting, _ in guards}

    def try_take(self, connection: Connection, *, whole_session: bool) -> bool:
        """Ask, and do not wait: a statement that waits has a snapshot.

        CREATE INDEX CONCURRENTLY, of who holds the lock, would wait for that snapshot to end.
        """
        if not whole_session and _stands_alone(connection):
            raise InvalidOption(
                "The lock under which the schema is changed cannot be taken: the connection is in "
                "AUTOCOMMIT, and would lose it with the statement that takes it. Give one in a "
                'transaction (isolation_level="READ COMMITTED"); to Alembic, one that nothing has '
                "begun on: engine.connect()."
            )
        verb = "pg_try_advisory_lock" if whole_session else "pg_try_advisory_xact_lock"
        taken = bool(connection.exec_driver_sql(f"SELECT {verb}({self.KEY})").scalar_one())
        if whole_session:
            connection.commit()
            self._is_held = taken
        return taken

    def minding_drops(self, connection: Connection) -> AbstractContextManager[None]:
        """The server itself refuses to drop what is referred to."""
        return nullcontext()

    def finish(self, connection: Connection) -> None:
        """Alembic has committed what it did; what it only asked ends here."""
        connection.rollback()

    def release(self, connection: Connection) -> None:
        """Unlock, and have the guards as the session had them."""
        calls = [f"set_config('{name}', '{was}', false)" for name, was in self._before.items()]
        if self._is_held:
            calls.append(f"pg_advisory_unlock({self.KEY})")
        connection.exec_driver_sql(f"SELECT {', '.join(calls)}")
        connection.commit()
        if self._stood_alone:
            connection.execution_options(isolation_level="AUTOCOMMIT")

    def holder(self, connection: Connection) -> str:
        """Ask the server; of another role's backends it tells but the half to most."""
        connection.exec_driver_sql("SELECT pg_stat_clear_snapshot()")  # it may have answered before
        row = connection.exec_driver_sql(WHO_HOLDS.format(key=self.KEY)).mappings().first()
        if row is None:
            return "whoever held it has just let go of it"
        place = f"from {row['client']}" if row["client"] else "from a local socket"
        begun = f", in a transaction since {row['begun']}" if row["begun"] else ""
        doing = "is doing what only its own role and superusers may see"
        if row["state"] == "active":
            doing = f"has run for {row['seconds']} s: {without_literals(row['query'])}"
        elif row["state"]:
            doing = (
                f"is {row['state']} for {row['seconds']} s, after {without_literals(row['query'])}"
            )
        return (
            f"backend {row['pid']} (application_name {row['application']!r}, role {row['role']}, "
            f"{place}, connected since {row['since']}{begun}), which {doing}"
        )

    def cure(self) -> str:
        """Say how a backend is ended."""
        return "end it (SELECT pg_terminate_backend(…) with that number)"


def _stands_alone(connection: Connection) -> bool:
    """Whether each of its statements does, whatever has been begun (AUTOCOMMIT)."""
    lent: Any = connection.connection.dbapi_connection
    return connection.dialect.detect_autocommit_setting(lent)


WHO_HOLDS = """
SELECT a.pid, a.application_name AS application, a.usename AS role, host(a.client_addr) AS client,
    to_char(a.backend_start, 'YYYY-MM-DD HH24:MI:SS TZ') AS since,
    to_char(a.xact_start, 'YYYY-MM-DD HH24:MI:SS TZ') AS begun,
    a.state, a.query,
    round(extract(epoch FROM clock_timestamp() - coalesce(
        CASE WHEN a.state = 'active' THEN a.query_start END, a.state_change)))::bigint AS seconds
FROM pg_catalog.pg_locks AS l JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
    AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
    AND (l.classid::bigint << 32) + l.objid::bigint = {key}
"""
SHOWN = 200  # characters of a statement
LITERAL = re.compile(r"'(?:[^']|'')*'?|(\$\w*\$).*?(?:\1|$)", re.DOTALL)


def without_literals(statement: str) -> str:
    """Return the beginning of a statement that the server shows, on one line, without values."""
    text = " ".join(LITERAL.sub("'…'", statement).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


@cache
def _settling_connection() -> Any:
    """Make psycopg's connection a class that stops its statement however often it is cancelled.

    psycopg asks the server to cancel when its task is; but a second cancellation interrupts that
    request, and the statement runs on with its locks.
    """
    from psycopg import AsyncConnection, Error, waiting
    from psycopg.pq import TransactionStatus

    class SettlingConnection(AsyncConnection[Any]):
        def __init__(self, *args: Any, **kw: Any) -> None:
            super().__init__(*args, **kw)
            self.server_cursor_factory = _settling_cursor()

        @classmethod
        async def connect(cls, *args: Any, **kw: Any) -> Any:
            """Connect; a connection that is half made ends with the frames that hold it.

            psycopg closes it nowhere: whoever keeps the error would keep the backend as well.
            """
            with _clearing_frames():
                return await super().connect(*args, **kw)

        async def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            try:
                return await waiting.wait_async(gen, self.pgconn.socket, interval, timeout)
            except asyncio.CancelledError:
                await settle(self._break_off())
                raise

        async def _break_off(self) -> None:
            """Ask until the server has answered: a request may overtake its own statement."""
            try:
                if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                    async with asyncio.timeout(BREAK_OFF_LIMIT):
                        await self.cancel_safe(timeout=BREAK_OFF_LIMIT)
                        while self._is_at_work():
                            await asyncio.sleep(CANCEL_EVERY)
                            await self.cancel_safe(timeout=BREAK_OFF_LIMIT)
            except (TimeoutError, Error) as error:
                logger.info("A cancelled statement may run on: %r", error)
            finally:
                self.pgconn.finish()

        def _is_at_work(self) -> bool:
            self.pgconn.consume_input()
            return bool(self.pgconn.is_busy())

    return SettlingConnection


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


@cache
def _settling_cursor() -> Any:
    """Make psycopg's cursor a class that is closed though its closing is cancelled."""
    from psycopg import AsyncServerCursor

    class SettlingCursor(AsyncServerCursor[Any]):
        async def close(self) -> None:
            await settle(super().close())  # interrupted, psycopg would warn that it is open still

    return SettlingCursor


@contextmanager
def _clearing_frames() -> Generator[None]:
    """Let go of what the frames hold that an error has come through."""
    try:
        yield
    except BaseException as error:
        clear_frames(error.__traceback__)
        raise


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
