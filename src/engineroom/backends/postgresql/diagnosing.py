"""Why no connection came about, whether that may pass, and what to do about it.

By type and SQLSTATE, and never by a message. libpq keeps the SQLSTATE of a connect to itself: where
it is spoken, the server is asked for it over a socket of our own.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterator, Mapping
from itertools import cycle

from .. import Diagnosis
from .parameters import DEFAULT_PORT
from .sqlstates import PROTOCOL_VIOLATION, sqlstate

LIMIT = 2.0  # seconds for a server to say something
PROTOCOL = 196608  # 3.0
STRANGER = b"user\0engineroom\0\0"  # it need not exist: a server that starts refuses everybody
SHUTTING_DOWN = ("57P01", "57P02", "57P03")  # or starting up: cannot_connect_now
FULL = ("53300",)  # too_many_connections
# invalid_password; invalid_authorization_specification (of PAM, through which Amazon's tokens go)
REFUSED = ("28P01", "28000")
NO_DATABASE = ("3D000",)

DRIVERS = ("asyncpg", "psycopg", "psycopg2", "sqlalchemy")  # the last: in the name of asyncpg

STARTING = Diagnosis(
    True, "the server is starting up or shutting down", "Wait for it: check(wait=30)."
)
NOT_TAKEN = Diagnosis(
    False,
    "the server refuses the user or the password",
    "Correct them in the URL or where they come from (DB_PASSWORD, PGPASSWORD, ~/.pgpass), and "
    "have the server's pg_hba.conf let this user in from here.",
)
BAD_CERTIFICATE = Diagnosis(
    False,
    "the server's certificate is not to be trusted",
    "Name the certificate of who signed it with sslrootcert, and the host as the certificate does.",
)
NO_TLS = Diagnosis(
    False,
    "the server does not speak TLS",
    "Have it do so (ssl = on), or, in a network that nobody else reads, leave out sslmode.",
)
BY_STATE: dict[str, Diagnosis] = {
    **dict.fromkeys(SHUTTING_DOWN, STARTING),
    **dict.fromkeys(REFUSED, NOT_TAKEN),
    **dict.fromkeys(
        FULL,
        Diagnosis(
            True,
            "the server has no connection left",
            "Take fewer (DB_POOL_SIZE, DB_MAX_CONNECTIONS), raise its max_connections, or put a "
            "pooler before it.",
        ),
    ),
    **dict.fromkeys(
        NO_DATABASE,
        Diagnosis(False, "the database does not exist", "Create it, or correct its name."),
    ),
    PROTOCOL_VIOLATION: Diagnosis(
        True,
        "a pooler such as PgBouncer refuses, and does not say in a code why",
        "See its own words, and its log: a wrong password, a database that it does not know, "
        "or a server behind it that is not there yet.",
    ),
}


def diagnose(error: BaseException, parameters: Mapping[str, str]) -> Diagnosis | None:
    """Tell why a connect failed; None where it is no driver that says so.

    Args:
        error: Of the driver.
        parameters: Where it was to lead.
    """
    if (state := sqlstate(error)) is not None:
        lost = state.startswith("08")
        unknown = Diagnosis(lost, f"the server says {state}", "See what it says beside that.")
        return BY_STATE.get(state, unknown)
    if isinstance(error, ssl.SSLCertVerificationError):
        return BAD_CERTIFICATE
    if type(error) is ConnectionError:  # asyncpg's, and none of the system's
        return NO_TLS
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
        return _not_reached(error, parameters.get("host", ""))
    pgconn = getattr(error, "pgconn", None)  # psycopg's
    if pgconn is not None and (pgconn.needs_password or pgconn.used_password):
        return NOT_TAKEN
    return _ask(parameters) if type(error).__module__.partition(".")[0] in DRIVERS else None


def _not_reached(error: OSError, place: str) -> Diagnosis:
    if isinstance(error, socket.gaierror):
        return Diagnosis(
            True,
            f"the name {place} does not resolve",
            "See that it is spelled right; that of a container is known once it runs.",
        )
    return Diagnosis(
        True,
        f"nothing answers at {place or 'the default place'} ({type(error).__name__})",
        "See that the server runs, that host and port are its own, and that no firewall is "
        "between.",
    )


def _ask(parameters: Mapping[str, str]) -> Diagnosis:
    """Ask each host in turn; one that may come serves."""
    found: list[Diagnosis] = []
    for host, port in _places(parameters):
        try:
            state = knock(host, port)
        except OSError as error:
            found.append(_not_reached(error, f"{host}:{port}"))
        else:
            if state in BY_STATE and BY_STATE[state].passes and state != PROTOCOL_VIOLATION:
                found.append(BY_STATE[state])
    refused = Diagnosis(
        False,
        "the server answers, and lets nobody in so",
        "See the driver's own words: they are about TLS, pg_hba.conf, the database's name, or "
        "target_session_attrs.",
        is_certain=False,  # it may have come up between the driver's question and ours
    )
    return next(iter(found), refused)


def _places(parameters: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    hosts = (parameters.get("hostaddr") or parameters.get("host") or "").split(",")
    ports = [int(port or DEFAULT_PORT) for port in parameters.get("port", "").split(",")]
    return ((host, port) for host, port in zip(hosts, cycle(ports)) if host)


def knock(host: str, port: int) -> str | None:
    """Say hello as a stranger, and return the SQLSTATE of the refusal; None if there was none.

    Raises:
        OSError: there is no server, or it hangs up.
    """
    if host.startswith("/"):
        opened = socket.socket(socket.AF_UNIX)
        opened.settimeout(LIMIT)
    else:
        opened = socket.create_connection((host, port), LIMIT)
    with opened:
        if host.startswith("/"):
            opened.connect(f"{host}/.s.PGSQL.{port}")
        opened.sendall(struct.pack("!II", len(STRANGER) + 8, PROTOCOL) + STRANGER)
        with opened.makefile("rb") as answer:
            kind, length = answer.read(1), answer.read(4)
            if len(length) < 4:
                raise ConnectionResetError("The server hung up")
            if kind != b"E":  # it asks who we are
                return None
            fields = answer.read(struct.unpack("!I", length)[0] - 4).split(b"\0")
    return next((field[1:].decode() for field in fields if field.startswith(b"C")), None)
