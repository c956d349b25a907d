"""MySQL and MariaDB: asyncmy on the asynchronous side, PyMySQL on the synchronous one."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy.engine import URL, Connection, Dialect, Engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from ...errors import InvalidOption, UnsupportedByDriver
from ...secrecy import Sealed
from ...urls import masked
from .. import (
    Diagnosis,
    Leaving,
    Reached,
    Role,
    Sent,
    Side,
    choose_driver,
    refuse_unknown_driver,
)
from ..sockets import cut, disown, keep_alive, shut
from .errnos import NO_SUCH_THREAD, REFUSED, errno
from .guards import NAMES, NAMES_OF_MYSQL, at_start, is_mariadb, struck
from .looking import diagnose, look
from .option_file import FILE, read_tls
from .parameters import PLACE, SECRETS, for_driver, read_parameters
from .sparing import READ_ONLY, ReadOnly, break_off, kill, send, sparing, unnoticed
from .tls import ENCRYPTING, MODE, make_context, mode_of, with_file

logger: logging.Logger = logging.getLogger("engineroom")

DRIVERS = {Side.ASYNC: {"asyncmy": "asyncmy"}, Side.SYNC: {"pymysql": "pymysql"}}


class MySQL:
    """MySQL or MariaDB, spoken to directly."""

    has_server = True
    keeps_time = False  # the drivers count for each answer

    def __init__(self, url: URL, guards: Mapping[str, float] | None = None) -> None:
        refuse_unknown_driver(url, DRIVERS)
        self._shown = masked(url)
        parameters = read_parameters(url)
        mode = mode_of(parameters, self._shown)
        of_file = read_tls(parameters, self._shown, has_mode=mode is not None)
        parameters = with_file(parameters, of_file, mode)
        mode = mode_of(parameters, f"{self._shown} with its {FILE}" if of_file else self._shown)
        if mode in ENCRYPTING:
            make_context(parameters, mode)  # says now what cannot be read
        self._mode = mode
        self._has_file_of_tls = bool(of_file)
        self._sealed = Sealed(parameters)
        self._guards = guards or {}
        # Its parameters tell it apart from others; the secret ones are with the password.
        place = {name: parameters.get(name) for name in PLACE}
        self._url = URL.create(
            url.drivername,
            username=parameters.get("user"),
            **place,
            query=url.difference_update_query(SECRETS).query,
        )

    def engine_url(self, side: Side) -> URL:
        """Return the URL with the driver of a side, without what that is told beside it."""
        return choose_driver(self._url, DRIVERS[side], "mysql").set(query={})

    def engine_options(
        self, side: Side, role: Role, connect_args: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the options of a role: a reader's statements stand alone."""
        told = self._told(self.engine_url(side).get_driver_name())
        options: dict[str, Any] = {"connect_args": told | connect_args}
        if role is Role.READER:
            options["isolation_level"] = "AUTOCOMMIT"
        return options

    def _told(self, driver: str) -> dict[str, Any]:
        """Return what a driver is told of the URL; its secrets are sealed."""
        parameters, mode = self._sealed.reveal(), self._mode
        told = for_driver(driver, parameters, self._shown)
        if "password" in told:
            told["password"] = Sealed(told["password"])
        if mode in ENCRYPTING:
            told["ssl"] = make_context(parameters, mode)
        elif driver == "pymysql" and (mode == "DISABLED" or "unix_socket" in told):
            told["ssl_disabled"] = True
        elif driver == "asyncmy" and mode == "DISABLED" and self._has_file_of_tls:
            raise UnsupportedByDriver(
                f"asyncmy cannot do what {self._shown} asks for: with what its {FILE} says of TLS "
                f"it would encrypt in spite of {MODE}=DISABLED. Leave one of them out."
            )
        elif driver == "asyncmy" and mode == "PREFERRED":
            raise UnsupportedByDriver(
                f"asyncmy cannot do what {self._shown} asks for: with {MODE}=PREFERRED it would "
                f"never encrypt. Write {MODE}=REQUIRED, or DISABLED."
            )
        return told

    def read_only_options(self) -> dict[str, Any]:
        """Return the option by which a transaction begins READ ONLY."""
        return {READ_ONLY: True}

    def attach(
        self, engine: Engine, role: Role, before_write: Callable[[Connection], None]
    ) -> None:
        """Have connections spare round trips, and a reader's refuse to write."""
        engine.url = self._url.set(drivername=engine.url.drivername)
        dialect: Any = engine.dialect
        connect = dialect.connect

        def connect_sparing(*args: Any, **kw: Any) -> Any:
            opened = connect(*args, **kw)
            driver = dialect.get_driver_connection(opened)
            driver.__class__ = sparing(driver.__class__)
            driver.another = lambda: dialect.connect(*args, **kw)
            driver.reads_only = role is Role.READER
            if statement := at_start(self._guards, driver.get_server_info()):
                send(opened, statement)
            keep_alive(self.descriptor(driver))
            if not dialect.is_async:
                _read_for_ever(driver, kw.get("read_timeout"))
            return opened

        dialect.connect = connect_sparing
        dialect.set_isolation_level = unnoticed(dialect.set_isolation_level, dialect)
        if role is not Role.READER:
            known = dialect.connection_characteristics
            dialect.connection_characteristics = {**known, READ_ONLY: ReadOnly()}

    def way_to_connect(self, dialect: Dialect) -> Callable[..., Any]:
        """Leave it to SQLAlchemy, but for the password: that goes in UTF-8, as all others send it.

        Of a text the drivers would make Latin-1.
        """
        connect = dialect.connect

        def connect_in_utf_8(*args: Any, **kw: Any) -> Any:
            if isinstance(kw.get("password"), str):
                kw["password"] = kw["password"].encode()
            return connect(*args, **kw)

        return connect_in_utf_8

    def limit_connect(self, arguments: dict[str, Any], seconds: float) -> None:
        """Limit connecting, and each answer of the server on the way to that."""
        limit = min(arguments.get("connect_timeout", seconds), seconds)
        arguments["connect_timeout"] = arguments["read_timeout"] = limit

    def limit_each_host(self, arguments: dict[str, Any], seconds: float) -> None:
        """There is one at most."""

    def may_be_refused(self, error: Exception) -> bool:
        """Ask for "access denied"; MariaDB has a second number for who came without a password."""
        return errno(error) in REFUSED

    def look(self, connection: Connection, driver: Any, wanted: int) -> Reached:
        """Ask the server, and the driver's socket."""
        if driver is None:
            return look(connection, None, None, wanted)
        return look(connection, self.descriptor(driver), _tls_of(driver), wanted)

    def diagnose(self, error: BaseException, seconds: float = 0.0) -> Diagnosis | None:
        """Ask for the number of the server's error, or of the system's behind the driver's."""
        return diagnose(error, self._url.host or "")

    def descriptor(self, driver: Any) -> int | None:
        """Return the file descriptor of the connection's socket; None once it is closed."""
        if self.is_closed(driver):
            return None
        known = _socket_of(driver)
        return None if known is None else int(known.fileno())

    def is_closed(self, driver: Any) -> bool:
        """Ask the driver; asyncmy itself knows it no sooner than at its next statement."""
        if _is_pymysql(driver):
            return not driver.open
        return not driver.connected or bool(_transport_of(driver).is_closing())

    def tells_rest(self, driver: str) -> Callable[[Any], bool]:
        """Look at what was noted of its last statement."""
        return lambda opened: self.is_closed(opened) or bool(opened.rests)

    def ping(self, connection: PoolProxiedConnection, engine: Engine) -> None:
        """Ask the server in one round trip."""
        engine.dialect.do_ping(connection.dbapi_connection)  # type: ignore[arg-type]

    def awaits_begin(self, connection: PoolProxiedConnection, cursor: Any) -> bool:
        """A BEGIN is not told from what follows it."""
        return False

    def begins_with(self, driver: Any) -> bool:
        """None does."""
        return False

    def watch(self, driver: Any, note: Callable[[Leaving, Sent], None]) -> None:
        """Have its class, which is ours, tell."""
        driver.tell = note

    def clean(self, connection: ConnectionPoolEntry, hooks: Sequence[Sent]) -> None:
        """Close it: neither driver has a public word for COM_RESET_CONNECTION."""
        connection.close()

    def guard(self, connection: Connection, guards: Mapping[str, float]) -> None:
        """Set them for the connection, which has none for a transaction; it is closed after that.

        Raises:
            InvalidOption: this server does not have one of them.
        """
        driver: Any = connection.connection.driver_connection
        known = NAMES if is_mariadb(driver.get_server_info()) else NAMES_OF_MYSQL
        if missing := [name for name in guards if name not in known]:
            raise InvalidOption(
                f"{', '.join(missing)} cannot be set for a session of MySQL, which has no such "
                "deadline (MariaDB has). Leave it out."
            )
        if statement := at_start(guards, driver.get_server_info()):
            connection.exec_driver_sql(statement)

    def struck(
        self, error: BaseException, own: Mapping[str, float], idle: float, ran: float, is_lost: bool
    ) -> tuple[str, float] | None:
        """Tell them by the number of the error and by time."""
        return struck(errno(error), {**self._guards, **own}, idle, ran, is_lost)

    def holds_write_lock(self, connection: PoolProxiedConnection) -> bool:
        """Writers do not keep each other out."""
        return False

    def end(
        self,
        connections: Sequence[PoolProxiedConnection],
        apart: Callable[[Callable[[Connection], object]], None],
        *,
        is_abandoned: bool = False,
    ) -> None:
        """End the connections on the server: every user may do that with their own."""
        for connection in connections:
            driver: Any = connection.driver_connection
            if driver is None:  # it was lost meanwhile
                continue
            try:
                apart(partial(_kill_there, driver.thread_id()))
            except Exception as error:  # noqa: BLE001  # a server at its limit takes nobody
                if errno(error) != NO_SUCH_THREAD:
                    logger.info("A connection is shut, for it could not be ended: %r", error)
                    if (descriptor := self.descriptor(driver)) is not None:
                        shut(descriptor)  # the server sees it as soon as it reads from there

    def interrupt(self, driver: Any) -> None:
        """End the connection on the server, and what it runs."""
        kill(driver)

    async def break_off(self, driver: Any) -> None:
        """End the connection on the server."""
        await break_off(driver)

    def say_farewell(self, driver: Any) -> None:
        """None does."""

    def cut(self, driver: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Close the socket; the server ends the connection when it sees that."""
        cut(self.descriptor(driver), driver.close, loop)

    def disown(self, drivers: Iterable[Any]) -> None:
        """Put the null device in the place of each socket."""
        disown(
            (self.descriptor(one), None if _is_pymysql(one) else _transport_of(one))
            for one in drivers
        )

    def dispose(self) -> None:
        """There is nothing to remove."""


def _kill_there(number: int, connection: Connection) -> None:
    connection.exec_driver_sql(f"KILL {number}")


def _is_pymysql(driver: Any) -> bool:
    return hasattr(driver, "open")


def _socket_of(driver: Any) -> Any:
    """Return what has the file descriptor of a driver's connection; no public name leads to it.

    Without it there is no liveness without a round trip, and a forked child could not let go of
    its parent's socket. `tests/test_private_names.py` fails when the name goes.
    """
    return driver._sock if _is_pymysql(driver) else _transport_of(driver).get_extra_info("socket")


def _tls_of(driver: Any) -> str | None:
    """Return the version of TLS; None without."""
    if _is_pymysql(driver):
        channel = driver._sock if isinstance(driver._sock, ssl.SSLSocket) else None
    else:
        channel = _transport_of(driver).get_extra_info("ssl_object")
    return None if channel is None else channel.version()


def _transport_of(driver: Any) -> Any:
    """Return asyncmy's transport: its part of the above, with the same reason."""
    return driver._transport


def _read_for_ever(driver: Any, seconds: float | None) -> None:
    """Take the limit of connecting from a connection of PyMySQL: its statements may take longer.

    No public name leads to it, and its deadline for connecting ends before the server's first word.
    `tests/test_private_names.py` fails when the name goes.
    """
    driver._read_timeout = seconds
