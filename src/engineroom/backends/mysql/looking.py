"""What a server of MySQL or MariaDB says of itself, how it was reached, and why it was not."""

from __future__ import annotations

import socket
import ssl
import time

from sqlalchemy.engine import Connection

from .. import Diagnosis, Reached
from ..sockets import address_of, is_far
from .errnos import (
    BLOCKED,
    FULL,
    NO_DATABASE,
    NO_RIGHT,
    NO_TLS,
    REFUSED,
    SHUTTING_DOWN,
    UNREACHED,
    errno,
)

QUESTION = (
    "SELECT VERSION(), @@version_comment, @@global.read_only, @@max_connections, "
    "UNIX_TIMESTAMP(NOW(6))"
)


def look(connection: Connection, descriptor: int | None, tls: str | None, wanted: int) -> Reached:
    """Ask the server, and the socket.

    Args:
        descriptor: Of the socket, if there is one to be seen.
        wanted: How many connections one pool may open.
    """
    asked, started = time.time(), time.perf_counter()
    version, comment, is_read_only, most, now = connection.exec_driver_sql(QUESTION).one()
    latency = time.perf_counter() - started
    address = address_of(descriptor)
    problems: list[str] = []
    if is_read_only:
        problems.append(
            "This server is read-only, as replicas are, and every write fails (1290). Name the "
            "primary's host."
        )
    if tls is None and address is not None and is_far(address):
        problems.append(
            f"What is said to {address} can be read on the way, the data included. Add "
            "ssl_mode=VERIFY_IDENTITY to the URL (or REQUIRED, which does not ask who answers)."
        )
    if wanted > most:
        problems.append(
            f"One pool here may open {wanted} connections, and the server has {most} for everybody "
            "(max_connections). Lower DB_POOL_SIZE or DB_MAX_OVERFLOW, or set DB_MAX_CONNECTIONS."
        )
    is_mariadb = "mariadb" in f"{version} {comment}".lower()
    return Reached(
        server=f"{'MariaDB' if is_mariadb else 'MySQL'} {version}",
        role="standby" if is_read_only else "primary",
        address=address,
        tls=tls,
        pooler=None,
        latency=latency,
        skew=float(now) - (asked + latency / 2),
        problems=tuple(problems),
    )


NO_TLS_CAME = Diagnosis(
    False,
    "no TLS came about with the server",
    "Have it speak TLS, and name with ssl_ca who signed its certificate.",
)
NOT_TRUSTED = Diagnosis(
    False,
    "the server's certificate is not to be trusted",
    "Name with ssl_ca who signed it, and the host as the certificate does.",
)
BY_NUMBER: dict[int, Diagnosis] = {
    **dict.fromkeys(
        SHUTTING_DOWN,
        Diagnosis(True, "the server is shutting down", "Wait for it: check(wait=30)."),
    ),
    **dict.fromkeys(
        FULL,
        Diagnosis(
            True,
            "the server has no connection left",
            "Take fewer (DB_POOL_SIZE, DB_MAX_CONNECTIONS), or raise its max_connections, or what "
            "this user has of them (max_user_connections).",
        ),
    ),
    **dict.fromkeys(
        REFUSED,
        Diagnosis(
            False,
            "the server refuses the user or the password",
            "Correct them in the URL or where they come from (DB_PASSWORD), and let this user in "
            "from here (GRANT).",
        ),
    ),
    **dict.fromkeys(
        BLOCKED,
        Diagnosis(
            False,
            "the server lets nobody in from this host",
            "Let this user in from here (GRANT); after too many errors (1129), FLUSH HOSTS.",
        ),
    ),
    NO_TLS: NO_TLS_CAME,
    **dict.fromkeys(
        (*NO_DATABASE, NO_RIGHT),
        Diagnosis(
            False,
            "the database does not exist, or this user may not use it",
            "Create it, correct its name, or GRANT what is missing.",
        ),
    ),
}


def diagnose(error: BaseException, host: str) -> Diagnosis | None:
    """Tell why a connect failed; None where it is no driver that says so.

    Args:
        error: Of the driver, which puts the system's behind its own.
    """
    number = errno(error)
    if number in BY_NUMBER:
        return BY_NUMBER[number]
    causes = [error, error.__cause__, error.__context__, getattr(error, "original_exception", None)]
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return NOT_TRUSTED
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return NO_TLS_CAME
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return Diagnosis(
            True,
            f"the name {host} does not resolve",
            "See that it is spelled right; that of a container is known once it runs.",
            is_reached=False,
        )
    if number in UNREACHED or any(isinstance(cause, OSError) for cause in causes):
        return Diagnosis(
            True,
            f"nothing answers at {host or 'the default place'}",
            "See that the server runs, that host and port are its own, and that no firewall is "
            "between.",
            is_reached=False,
            is_silent=any(isinstance(cause, TimeoutError) for cause in causes),
        )
    return None
