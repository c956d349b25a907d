"""A cancel request of libpq's drivers, from another thread or task: a frozen server takes none."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from inspect import iscoroutinefunction
from typing import Any

from sqlalchemy.util import await_only

BREAK_OFF_LIMIT = 1.0  # seconds for the server to take a cancel request
SSL_REQUEST = struct.pack("!II", 8, 80877103)  # every server answers it, with one byte


def request_cancel(driver: Any) -> None:
    """Ask the server to cancel what a connection runs; one that is silent is not asked.

    Raises:
        psycopg.errors.CancellationTimeout: it did not take the request in time.
    """
    if not _is_patient(driver):
        if _answers(driver.info.host, driver.info.port):
            driver.cancel()
    elif not iscoroutinefunction(driver.cancel_safe):
        driver.cancel_safe(timeout=BREAK_OFF_LIMIT)
    elif asyncio._get_running_loop() is None:  # its own does not run any more
        asyncio.run(driver.cancel_safe(timeout=BREAK_OFF_LIMIT))
    else:
        await_only(driver.cancel_safe(timeout=BREAK_OFF_LIMIT))


def _is_patient(driver: Any) -> bool:
    """Whether the driver can give up: libpq before 17, and psycopg2 with any, stop all threads
    until the server hangs up.
    """
    if not hasattr(driver, "cancel_safe"):
        return False
    from psycopg import capabilities

    return capabilities.has_cancel_safe()


def _answers(host: str, port: int) -> bool:
    with suppress(OSError):
        if host.startswith("/"):
            opened = socket.socket(socket.AF_UNIX)
            opened.settimeout(BREAK_OFF_LIMIT)
            opened.connect(f"{host}/.s.PGSQL.{port}")
        else:
            opened = socket.create_connection((host, port), BREAK_OFF_LIMIT)
        with opened:
            opened.sendall(SSL_REQUEST)
            return bool(opened.recv(1))
    return False
