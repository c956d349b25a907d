"""PostgreSQL: asyncpg on the asynchronous side, psycopg (or psycopg2) on the synchronous one."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from sqlalchemy.engine import URL, Connection, Dialect, Engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import await_only

from ...errors import InvalidOption
from ...secrecy import Sealed
from ...urls import masked
from .. import (
    ASK_FOR,
    Diagnosis,
    Leaving,
    Reached,
    Role,
    Sent,
    Side,
    choose_driver,
    refuse_unknown_driver,
)
from ..sockets import cut, disown, is_one_place, port_of, shut
from . import leavings, lost, pipelining, readers, undeclared
from .beginning import has_sent, tell_what_is_sent
from .cancelling import BREAK_OFF_LIMIT, request_cancel
from .describing import asking_late, describe_when_read
from .diagnosing import REFUSED, diagnose
from .finished import sealing
from .guards import at_start, for_transaction, struck
from .looking import look
from .parameters import ALIVE
from .schema_lock import AdvisoryLock, stands_alone, without_literals
from .settling import interruptible, settling_connection, watch_broken_off
from .sockets import asyncpg_transport, descriptor_of, is_closed
from .sources import resolve
from .sqlstates import PROTOCOL_VIOLATION, sqlstate
from .tls import make_context, uses_files
from .translation import (
    LEAST_TIMEOUT,
    SECRETS,
    for_asyncpg,
    for_libpq,
    refuse_unable,
    refuse_unknown_to_libpq,
    unable,
)

__all__ = ["DRIVERS", "AdvisoryLock", "PostgreSQL", "sqlstate", "without_literals"]

logger: logging.Logger = logging.getLogger("engineroom")

DRIVERS = {
    Side.ASYNC: {"asyncpg": "asyncpg", "psycopg": "psycopg"},
    Side.SYNC: {"psycopg": "psycopg", "psycopg2": "psycopg2"},
}
NO_GUARDS: Mapping[str, float] = {}
READ_ONLY = "default_transaction_read_only"

IDLE = 0  # libpq's PQTRANS_IDLE
READY = 1  # psycopg2's STATUS_READY: it has begun nothing


class PostgreSQL:
    """PostgreSQL, spoken to directly."""

    has_server = True
    pooler: str | None = None
    """What stands before the server, as it was declared."""

    def __init__(
        self,
        url: URL,
        guards: Mapping[str, float] = NO_GUARDS,
        pipeline: pipelining.Setting = "auto",
    ) -> None:
        refuse_unknown_driver(url, DRIVERS)
        parameters = ALIVE | resolve(url)
        if uses_files(parameters):
            make_context(parameters)  # says now what cannot be read, for all drivers
        places = parameters.get("hostaddr") or parameters.get("host", "")
        self.keeps_time: bool = all(map(is_one_place, places.split(",")))
        self._has_many_hosts = "," in places
        self._sealed = Sealed(parameters)
        self._guards = guards  # those that a session of the server begins with
        self._pipeline = pipeline
        self._shown = masked(url)
        # Its parameters tell it apart from others; their secrets are with the password.
        self._url = url.set(password=parameters.get("password") or url.password)
        self._url = self._url.difference_update_query(SECRETS)

    @property
    def start_guards(self) -> Mapping[str, float]:
        """What the server is told of them when one connects."""
        return self._guards

    @property
    def _parameters(self) -> dict[str, str]:
        return self._sealed.reveal()

    def engine_url(self, side: Side) -> URL:
        """Return the URL with the driver of a side, without what that is told beside it."""
        drivers = DRIVERS[side]
        if unable(self._parameters) and not self._url.drivername.endswith("+asyncpg"):
            able = {name: module for name, module in drivers.items() if name != "asyncpg"}
            drivers = able if any(map(find_spec, able.values())) else drivers
        return choose_driver(self._url, drivers, "postgresql").set(query={})

    def engine_options(
        self, side: Side, role: Role, connect_args: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the options of a role: a reader's statements stand alone, and write nothing."""
        driver = self.engine_url(side).get_driver_name()
        if driver == "asyncpg":
            refuse_unable(self._parameters, self._shown)
            told = for_asyncpg(self._parameters, os.environ)
        else:
            refuse_unknown_to_libpq(driver, self._parameters, self._shown)
            told = for_libpq(self._parameters)
        arguments = told | connect_args
        if side is Side.ASYNC and driver == "psycopg":
            arguments.setdefault("async_creator_fn", settling_connection().connect)
        if role is Role.READER and arguments.get("target_session_attrs") == "read-write":
            # Its own sessions are read-only, so none would ever match.
            arguments["target_session_attrs"] = "primary"
        settings = {READ_ONLY: "on"} if role is Role.READER else {}
        guards = at_start(
            self.start_guards
        )  # first: the server takes the last of each that it is told
        if driver == "asyncpg":
            name: str = "server_settings"
            merged: Any = told.get(name, {}) | connect_args.get(name, {}) | settings
            if line := " ".join(filter(None, [guards, merged.get("options")])):
                merged["options"] = line
        else:
            name = "options"
            texts = [guards, told.get(name), connect_args.get(name)]
            texts += [f"-c {setting}={value}" for setting, value in settings.items()]
            merged = " ".join(text for text in texts if text)
        if merged:
            arguments[name] = merged
        arguments |= leavings.watching(driver, arguments)
        options: dict[str, Any] = {"connect_args": arguments}
        if role is Role.READER:
            options["isolation_level"] = "AUTOCOMMIT"
        return options

    def read_only_options(self) -> dict[str, Any]:
        """Return what makes SQLAlchemy's drivers say BEGIN READ ONLY."""
        return {"postgresql_readonly": True}

    def attach(
        self, engine: Engine, role: Role, before_write: Callable[[Connection], None]
    ) -> None:
        """PostgreSQL behaves as it is; a pooler before it would not."""
        self.tune(engine)
        undeclared.watch(engine, backend_pid)
        if role is Role.PRIMARY:
            pipelining.attach(engine, self._pipeline)
        else:
            readers.watch(engine)

    def tune(self, engine: Engine) -> None:
        """Name what is connected to; spare psycopg a rollback where nothing has begun, and hide
        what its errors keep.
        """
        engine.url = self._url.set(drivername=engine.url.drivername)
        dialect: Any = engine.dialect
        if dialect.driver == "psycopg":
            dialect.do_rollback = _rolling_back(dialect.do_rollback, dialect.is_async)
            dialect.execution_ctx_cls = asking_late(dialect.execution_ctx_cls, dialect.is_async)
            dialect.connect = sealing(dialect.connect)
            if not dialect.is_async:
                watch_broken_off(engine)
        elif dialect.driver == "asyncpg":
            lost.watch(engine)

    def way_to_connect(self, dialect: Dialect) -> Callable[..., Any]:
        """Have psycopg's synchronous connections be such that a signal can interrupt."""
        connect = dialect.connect
        is_theirs = dialect.driver == "psycopg" and not dialect.is_async
        return interruptible(connect) if is_theirs else connect

    def limit_connect(self, arguments: dict[str, Any], seconds: float) -> None:
        """Set libpq's parameter, unless it is less: whole seconds for each host, from two on."""
        limit = max(LEAST_TIMEOUT, math.ceil(seconds / _turns(arguments)))
        _shorten(arguments, "connect_timeout", limit)

    def limit_each_host(self, arguments: dict[str, Any], seconds: float) -> None:
        """Set the parameter where there are several; asyncpg, which has them listed, its own."""
        if (turns := _turns(arguments)) == 1:
            return  # the pool keeps the time, and its error says so
        if isinstance(arguments.get("host"), list):
            _shorten(arguments, "timeout", seconds / turns)
        else:
            self.limit_connect(arguments, seconds)

    def may_be_refused(self, error: Exception) -> bool:
        """Ask the SQLSTATE; libpq keeps that of a connect to itself, and tells less, or nothing."""
        if (state := sqlstate(error)) is not None:
            return state in (*REFUSED, PROTOCOL_VIOLATION)  # the latter: PgBouncer's, of all
        if (pgconn := getattr(error, "pgconn", None)) is not None:  # psycopg's
            return bool(pgconn.used_password)
        return type(error).__module__ == "psycopg2"

    def look(self, connection: Connection, driver: Any, wanted: int) -> Reached:
        """Ask the server; a pooler that nobody has declared is known by what it calls itself."""
        found = look(connection, driver, self.pooler, wanted)
        if (
            driver is not None
            and self.pooler is None
            and undeclared.is_made_up(backend_pid(driver))
        ):
            return replace(
                found, pooler="undeclared", problems=(undeclared.UNDECLARED, *found.problems)
            )
        return found

    def diagnose(self, error: BaseException, seconds: float = ASK_FOR) -> Diagnosis | None:
        """Ask the SQLSTATE or, where libpq keeps it, the server."""
        return diagnose(error, self._parameters, seconds)

    def descriptor(self, driver: Any) -> int | None:
        """Return the file descriptor of the connection's socket; None once it is closed."""
        return descriptor_of(driver)

    def is_closed(self, driver: Any) -> bool:
        """Ask the driver: none of them forgets its socket before it knows that it is closed."""
        return is_closed(driver)

    def tells_rest(self, driver: str) -> Callable[[Any], bool]:
        """Ask the driver, which knows what the server said last."""
        return {"asyncpg": _rests_asyncpg, "psycopg": _rests_psycopg}.get(driver, _rests_psycopg2)

    def ping(self, connection: PoolProxiedConnection, engine: Engine) -> None:
        """Ask the server in one round trip."""
        if engine.dialect.driver == "asyncpg":
            # The dialect's own ping costs three: BEGIN, a statement, ROLLBACK.
            adapted: Any = connection.dbapi_connection
            adapted.run_async(lambda driver: driver.execute("SELECT 1"))
        else:
            engine.dialect.do_ping(connection.dbapi_connection)  # type: ignore[arg-type]

    def awaits_begin(self, connection: PoolProxiedConnection, cursor: Any) -> bool:
        """Ask the driver, each of which keeps that in another place."""
        adapted: Any = connection.dbapi_connection
        driver = connection.driver_connection
        if adapted is None or driver is None or adapted.autocommit:
            return False
        if hasattr(driver, "get_server_pid"):  # asyncpg: as the server has said last
            return _has_begun(driver) is False
        if hasattr(driver, "pgconn"):
            return not has_sent(cursor)
        return bool(driver.status == READY)

    def begins_with(self, driver: Any) -> bool:
        """Ask the pipeline, if the connection is in one of ours."""
        course: pipelining.Course | None = getattr(driver, "course", None)
        return course is not None and course.awaits_begin

    def watch(self, driver: Any, note: Callable[[Leaving, Sent], None]) -> None:
        """Have its class, which is ours, tell."""
        leavings.watch(driver, note)
        tell_what_is_sent(driver)
        describe_when_read(driver)

    def clean(self, connection: ConnectionPoolEntry, hooks: Sequence[Sent]) -> None:
        """Clean in one message; each of the hooks' has its own."""
        leavings.clean(connection.driver_connection, hooks)

    def guard(self, connection: Connection, guards: Mapping[str, float]) -> None:
        """Set them with BEGIN, where the driver sends that by a verb of its own: asyncpg."""
        if not guards:
            return
        driver: Any = connection.connection.driver_connection
        if stands_alone(connection):
            raise InvalidOption(
                f"{', '.join(guards)} cannot be set where each statement stands alone "
                "(AUTOCOMMIT): they end with a transaction. Leave them out, or the isolation level."
            )
        statements = for_transaction(guards)
        if hasattr(driver, "get_server_pid"):
            driver.with_begin = "; ".join(statements)
        elif connection.dialect.driver == "asyncpg":  # in a sandbox, where nothing begins
            for statement in statements:
                connection.exec_driver_sql(statement)
        else:
            connection.exec_driver_sql("; ".join(statements))

    def struck(
        self, error: BaseException, own: Mapping[str, float], idle: float, ran: float, is_lost: bool
    ) -> tuple[str, float] | None:
        """Tell them by SQLSTATE and by time."""
        return struck(error, {**self._guards, **own}, idle, ran, is_lost)

    def holds_write_lock(self, connection: PoolProxiedConnection) -> bool:
        """Writers of PostgreSQL do not keep each other out."""
        return False

    def end(
        self,
        connections: Sequence[PoolProxiedConnection],
        apart: Callable[[Callable[[Connection], object]], None],
        *,
        is_abandoned: bool = False,
    ) -> None:
        """End the backends: every role may do that with its own.

        Of several servers the wrong one may be asked, which may have a backend of the same number,
        but hardly of the same client. Those that are not found there, and all of a server at its
        limit, are cancelled where they are, which takes no connection.
        """
        drivers: list[Any] = [connection.driver_connection for connection in connections]
        left = {
            (backend_pid(one), port_of(self.descriptor(one)) if self._has_many_hosts else 0): one
            for one in drivers
            if one is not None and not self.is_closed(one)
        }
        wanted = " OR ".join(
            f"pid = {pid}" + (f" AND client_port = {port}" if port else "") for pid, port in left
        )

        def terminate(connection: Connection) -> None:
            ended = connection.exec_driver_sql(
                "SELECT pid, client_port, pg_terminate_backend(pid)"  # noqa: S608  # of numbers
                f" FROM pg_stat_activity WHERE {wanted}"
            )
            for pid, port, _ in ended.all():
                left.pop((pid, port), None)
                left.pop((pid, 0), None)

        try:
            if left:
                apart(terminate)
        except Exception as error:  # noqa: BLE001  # a server at its limit takes cancel requests
            logger.info("Backends are cancelled, for none could be asked to end them: %r", error)
        asks = True
        for driver in left.values():
            began = time.monotonic()
            with suppress(Exception):
                self.stop(driver, is_abandoned, asks=asks)
            asks = asks and time.monotonic() - began < BREAK_OFF_LIMIT  # or it is silent

    def stop(self, driver: Any, is_abandoned: bool, *, asks: bool = True) -> None:
        """Stop what a connection runs, and close it, without another one that could end it.

        Args:
            is_abandoned: Its event loop has ended.
            asks: Whether the server is asked to cancel; one that is silent would not hear that.
        """
        if not hasattr(driver, "get_server_pid"):
            try:
                if asks:
                    self.interrupt(driver)
            finally:
                shut(int(driver.fileno()))  # it ends as soon as it reads from there
        elif not asks:
            driver.terminate()
        elif not is_abandoned:  # (asyncpg asks in its own loop only)
            await_only(self.break_off(driver))

    def interrupt(self, driver: Any) -> None:
        """Have the server cancel what runs; what has not arrived there yet is not."""
        request_cancel(driver)

    async def break_off(self, driver: Any) -> None:
        """Close asyncpg's connection, which waits for the cancel request that is on its way.

        psycopg's is closed already: `settling_connection` did that where it was interrupted.
        """
        if hasattr(driver, "get_server_pid"):
            await driver.close(timeout=BREAK_OFF_LIMIT)

    def say_farewell(self, driver: Any) -> None:
        """Say so to asyncpg's server, and hang up; the other drivers' `close()` does just that."""
        if hasattr(driver, "get_server_pid"):
            closing = driver.close()
            with suppress(StopIteration):  # it was closed
                closing.send(None)  # up to where it waits for the answer
            closing.close()
            driver.terminate()

    def cut(self, driver: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Close the socket; the server ends the backend when it sees that."""
        close = partial(_finish, driver, loop) if hasattr(driver, "pgconn") else driver.terminate
        cut(self.descriptor(driver), close, loop)

    def disown(self, drivers: Iterable[Any]) -> None:
        """Put the null device in the place of each socket."""
        disown(
            (descriptor_of(one), None if hasattr(one, "fileno") else asyncpg_transport(one))
            for one in drivers
        )

    def dispose(self) -> None:
        """There is nothing to remove."""


def _finish(driver: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Close psycopg's connection, unless a task of a loop that goes on waits at its socket.

    That one sees the server's end, and closes it; with its number given away, it would never.
    """
    if loop.is_closed() or not driver.lock.locked():
        driver.pgconn.finish()


def _turns(arguments: Mapping[str, Any]) -> int:
    """Return how often a host is tried, before none is left."""
    hosts = arguments.get("host") or arguments.get("hostaddr") or ""
    turns = len(hosts) if isinstance(hosts, list) else hosts.count(",") + 1
    again = turns > 1 and arguments.get("target_session_attrs") == "prefer-standby"
    return turns * 2 if again else turns


def _shorten(arguments: dict[str, Any], name: str, limit: float) -> None:
    """Set a time to a limit, unless a shorter one is given; to libpq, 0 is none at all."""
    if not 0 < float(arguments.get(name) or 0) <= limit:
        arguments[name] = limit


def _has_begun(driver: Any) -> bool | None:
    """Ask asyncpg whether a transaction is open; once it was terminated, it does not know."""
    try:
        return bool(driver.is_in_transaction())
    except AttributeError:
        return None


def _rests_asyncpg(opened: Any) -> bool:
    if getattr(opened, "with_begin", ""):
        opened.with_begin = ""  # no BEGIN took it along: it goes with its session
    return not _has_begun(opened)


def _rests_psycopg(opened: Any) -> bool:
    pgconn = opened.pgconn
    return pgconn.transaction_status == IDLE and not pgconn.pipeline_status


def _rests_psycopg2(opened: Any) -> bool:
    return bool(opened.get_transaction_status() == IDLE)


def _rolling_back(rollback: Callable[[Any], None], is_async: bool) -> Callable[[Any], None]:
    """Wrap ROLLBACK, which SQLAlchemy repeats after each COMMIT.

    psycopg sends nothing either, but takes a lock and runs a generator to find that out.
    """

    def roll_back_what_has_begun(connection: Any) -> None:
        driver = connection.dbapi_connection
        if is_async and driver is not None:
            driver = driver.driver_connection
        pgconn = None if driver is None else driver.pgconn
        if (
            pgconn is None or pgconn.transaction_status != IDLE or pgconn.pipeline_status
        ) and not getattr(driver, "was_broken_off", False):  # (where the server does it)
            rollback(connection)

    return roll_back_what_has_begun


def backend_pid(driver: Any) -> int:
    """Return the number of the server's process, as a driver's connection was told."""
    if hasattr(driver, "get_server_pid"):  # asyncpg
        return int(driver.get_server_pid())
    if hasattr(driver, "get_backend_pid"):  # psycopg2
        return int(driver.get_backend_pid())
    return int(driver.info.backend_pid)
