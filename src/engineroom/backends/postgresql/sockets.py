"""The socket beneath a driver's connection: where it is."""

from __future__ import annotations

from typing import Any

BAD = 1  # libpq's CONNECTION_BAD


def descriptor_of(driver: Any) -> int | None:
    """Return the file descriptor of the connection's socket; None once it is closed."""
    if is_closed(driver):
        return None
    if hasattr(driver, "fileno"):  # psycopg, psycopg2
        return int(driver.fileno())
    transport = asyncpg_transport(driver)
    known = transport.get_extra_info("socket")
    return None if known is None or transport.is_closing() else int(known.fileno())


def is_closed(driver: Any) -> bool:
    """Ask the driver: none of them forgets its socket before it knows that it is closed."""
    if hasattr(driver, "pgconn"):  # psycopg's own property is the same, and Python
        return bool(driver.pgconn.status == BAD)
    closed: bool | None = getattr(driver, "closed", None)
    return bool(driver.is_closed() if closed is None else closed)


def asyncpg_transport(driver: Any) -> Any:
    """Return asyncpg's transport, whose socket no public name leads to.

    Without it there is no liveness without a round trip, a forked child could not let go of its
    parent's socket, and `keepalives` and `tcp_user_timeout` would not be there. A test in
    `tests/test_private_names.py` fails when the name goes.
    """
    return driver._transport
