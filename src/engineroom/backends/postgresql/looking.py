"""What a server of PostgreSQL says of itself, and how it was reached: one round trip."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy.engine import Connection

from .. import Reached
from ..sockets import address_of, is_far
from .sockets import asyncpg_transport, descriptor_of

QUESTION = (
    "SELECT current_setting('server_version'), pg_is_in_recovery(), "
    "extract(epoch FROM clock_timestamp())::float8, current_setting('max_connections')::int"
)
TLS = "TLS"


def look(connection: Connection, driver: Any, pooler: str | None, wanted: int) -> Reached:
    """Ask the server, and the driver.

    Args:
        driver: Its connection, if it can be seen.
        pooler: Which one stands before the server, as far as anybody knows.
        wanted: How many connections one pool may open.
    """
    asked, started = time.time(), time.perf_counter()
    version, is_standby, now, most = connection.exec_driver_sql(QUESTION).one()
    latency = time.perf_counter() - started
    address, tls = (
        (None, None) if driver is None else (address_of(descriptor_of(driver)), _tls(driver))
    )
    problems: list[str] = []
    if is_standby:
        problems.append(
            "This is a standby, on which every write fails (25006). Name the primary's host, or "
            "all hosts and target_session_attrs=read-write."
        )
    if tls is None and address is not None and is_far(address):
        problems.append(
            f"What is said to {address} can be read on the way, the data included. Add "
            "sslmode=verify-full to the URL (or require, which does not ask who answers)."
        )
    if pooler is None and wanted > most:
        problems.append(
            f"One pool here may open {wanted} connections, and the server has {most} for everybody "
            "(max_connections). Lower DB_POOL_SIZE or DB_MAX_OVERFLOW, or set DB_MAX_CONNECTIONS."
        )
    return Reached(
        server=f"PostgreSQL {version}",
        role="standby" if is_standby else "primary",
        address=address,
        tls=tls,
        pooler=pooler,
        latency=latency,
        skew=now - (asked + latency / 2),
        problems=tuple(problems),
    )


def _tls(driver: Any) -> str | None:
    """Return the version, where the driver tells; None without TLS."""
    if hasattr(driver, "pgconn"):
        return TLS if driver.pgconn.ssl_in_use else None
    if hasattr(driver, "get_backend_pid"):  # psycopg2
        return driver.info.ssl_attribute("protocol") if driver.info.ssl_in_use else None
    channel = asyncpg_transport(driver).get_extra_info("ssl_object")
    return None if channel is None else channel.version() or TLS
