"""How asyncpg reaches a server the way libpq does: host after host, each in its time."""

from __future__ import annotations

import getpass
import os
import random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from typing import Any, cast

from ...errors import InvalidURL
from ..sockets import duplicate
from .parameters import DEFAULT_PORT, read_integer
from .sockets import descriptor_of
from .sources import default_folder, find_password

# libpq's names, and the kernel's.
KEEPALIVES = {
    "keepalives_idle": "TCP_KEEPIDLE",
    "keepalives_interval": "TCP_KEEPINTVL",
    "keepalives_count": "TCP_KEEPCNT",
}
USER_TIMEOUT = "tcp_user_timeout"


@dataclass(frozen=True, slots=True)
class Reach:
    """Connects as the parameters say for which asyncpg has no argument."""

    parameters: Mapping[str, str]

    async def connect(
        self,
        *,
        host: str | Sequence[str] | None = None,
        port: int | Sequence[int] = DEFAULT_PORT,
        target_session_attrs: str = "any",
        **arguments: Any,
    ) -> Any:
        """Connect to the first host that will do; the last error is raised where none will.

        Each has the `timeout` for itself. "prefer-standby" first asks all of them for a standby.
        """
        from asyncpg import CannotConnectNowError, TargetServerAttributeNotMatched

        places = list(zip(_listed(host), cycle(_listed(port))))  # one port serves all
        if self.parameters.get("load_balance_hosts") == "random":
            random.shuffle(places)
        targets = [target_session_attrs]
        if targets == ["prefer-standby"]:
            targets = ["standby", "any"]
        failure: Exception | None = None
        for target, (address, number) in product(targets, places):
            try:
                return await self._connect_to(address, number, target, **arguments)
            except (OSError, CannotConnectNowError, TargetServerAttributeNotMatched) as error:
                failure = error
        raise cast(Exception, failure)

    async def _connect_to(
        self,
        host: str | None,
        port: int,
        target: str,
        *,
        user: str | None = None,
        password: str | None = None,
        ssl: Any = None,
        **arguments: Any,
    ) -> Any:
        import asyncpg

        user = user or default_user()
        if password is None:
            password = find_password(self.parameters, host or "", port, user)
        connect = partial(
            asyncpg.connect,
            host=host or default_folder(port),  # asyncpg would go on to localhost
            port=port,
            user=user,
            # A function, for asyncpg keeps its arguments, and looks up what is None for itself.
            password=lambda: password,
            target_session_attrs=target,
            **arguments,
        )
        if isinstance(ssl, tuple):  # with TLS and without, in turn
            try:
                driver = await connect(ssl=ssl[0])
            except (ConnectionError, asyncpg.InvalidAuthorizationSpecificationError):
                driver = await connect(ssl=ssl[1])
        else:
            driver = await connect(ssl=ssl)
        self._set_options(driver)
        return driver

    def _set_options(self, driver: Any) -> None:
        """Have the kernel look after the connection: by default as libpq does."""
        descriptor = descriptor_of(driver)
        if descriptor is None:
            return
        with duplicate(descriptor) as same:
            if same.family == socket.AF_UNIX:
                return
            options = {USER_TIMEOUT: _option_of("TCP_USER_TIMEOUT")}
            if read_integer(self.parameters, "keepalives") != 0:
                same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                options |= {name: _option_of(option) for name, option in KEEPALIVES.items()}
            for name, option in options.items():
                number = read_integer(self.parameters, name)
                if number is None or option is None or (name == USER_TIMEOUT and number <= 0):
                    continue
                try:
                    same.setsockopt(socket.IPPROTO_TCP, option, max(number, 0))
                except (OSError, OverflowError) as error:
                    driver.terminate()
                    raise InvalidURL(
                        f"{name}={number} cannot be: the system does not take it. Write a larger "
                        "number, or a smaller one, or leave it out."
                    ) from error


def default_user() -> str:
    """Return whom libpq takes where nobody is named; asyncpg would ask the environment first."""
    try:
        import pwd  # not everywhere

        return pwd.getpwuid(os.geteuid()).pw_name
    except (ImportError, KeyError):
        return getpass.getuser()


def _option_of(name: str) -> int | None:
    """Return the number of an option of TCP sockets; None where the system has none."""
    return getattr(socket, name, None)


def _listed(given: Any) -> Sequence[Any]:
    return given if isinstance(given, (list, tuple)) else [given]
