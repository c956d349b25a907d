"""Why no connection came about, whether that may pass, and what to do about it.

By type and SQLSTATE, and never by a message, save PgBouncer's. libpq keeps the SQLSTATE of a
connect to itself: where it is spoken, the server is asked for it once more.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from itertools import cycle

from ...secrecy import unseen
from .. import ASK_FOR, Diagnosis
from .finished import options_of
from .knocking import NoPostgreSQL, NoTLS, Silent, ask_again, knock
from .parameters import DEFAULT_PORT
from .sources import default_folder
from .sqlstates import PROTOCOL_VIOLATION, sqlstate
from .translation import PLAIN
from .undeclared import DECLARE, SAID

SHUTTING_DOWN = ("57P01", "57P02", "57P03")  # or starting up: cannot_connect_now
FULL = ("53300",)  # too_many_connections
# invalid_password; invalid_authorization_specification (of PAM, through which Amazon's tokens go)
REFUSED = ("28P01", "28000")
NO_DATABASE = ("3D000",)

# As drivers say that a server is not of the kind which target_session_attrs asks for.
WANTS_ANOTHER = re.compile(r"session is (?:not )?read-only|hot standby|target attribute")
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
UNKNOWN_PARAMETER = Diagnosis(
    False,
    "a pooler such as PgBouncer refuses a parameter that it does not know",
    f"{DECLARE} Where it is declared, leave out of the URL what it refuses.",
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
        is_reached=False,
    ),
}


@unseen  # a signal may strike here, too
def diagnose(
    error: BaseException, parameters: Mapping[str, str], seconds: float = ASK_FOR
) -> Diagnosis | None:
    """Tell why a connect failed; None where it is no driver that says so.

    Args:
        error: Of the driver.
        parameters: Where it was to lead.
        seconds: For the server, or all of them, to be asked.
    """
    if type(error).__module__.partition(".")[0] in DRIVERS and SAID in str(error):
        return UNKNOWN_PARAMETER
    end = time.monotonic() + seconds
    pgconn = getattr(error, "pgconn", None)  # psycopg's
    if pgconn is not None and pgconn.used_password and sqlstate(error) is None:
        error.sqlstate = ask_again(options_of(pgconn), seconds)  # type: ignore[attr-defined]
    if (said := _said(sqlstate(error))) is not None:
        return said
    if pgconn is not None and pgconn.needs_password:
        return NOT_TAKEN
    if type(error).__name__ == "ConnectionTimeout":  # psycopg's
        error = TimeoutError()
    if isinstance(error, ssl.SSLCertVerificationError):
        return BAD_CERTIFICATE
    is_systems = isinstance(error, OSError) and not isinstance(error, ssl.SSLError)
    if is_systems and type(error) is not ConnectionError:  # (which is asyncpg's)
        return _not_reached(error, *places(parameters))
    is_drivers = type(error).__module__.partition(".")[0] in DRIVERS
    return _ask(str(error), parameters, end) if is_drivers or is_systems else None


def _said(state: str | None) -> Diagnosis | None:
    """Read what the server has said; 08003 is asyncpg's word for one that hung up without any."""
    if state in (None, "08003"):
        return None
    lost = state.startswith("08")
    unknown = Diagnosis(lost, f"the server says {state}", "See what it says beside that.")
    return BY_STATE.get(state, unknown)


def _not_reached(error: BaseException, *tried: tuple[str, int]) -> Diagnosis:
    place = ", ".join(f"{host}:{port}" for host, port in tried)
    if isinstance(error, socket.gaierror):
        return Diagnosis(
            True,
            f"the name {' or '.join(host for host, _ in tried)} does not resolve",
            "See that it is spelled right; that of a container is known once it runs.",
            is_reached=False,
        )
    if isinstance(error, Silent):
        return Diagnosis(
            True,
            f"what listens at {place} does not answer",
            "See that it is not stopped or overloaded. A pooler does not while it waits for a "
            "server behind it: its log says why.",
            is_reached=False,
            is_silent=True,
        )
    return Diagnosis(
        True,
        f"nothing answers at {place} ({type(error).__name__})",
        "See that the server runs, that host and port are its own, and that no firewall is "
        "between.",
        is_reached=False,
        is_silent=isinstance(error, TimeoutError),
    )


def _ask(said: str, parameters: Mapping[str, str], end: float) -> Diagnosis:
    """Ask each host in turn; one that may come serves, where none is there that has refused.

    Args:
        said: By the driver.
    """
    found: list[Diagnosis] = []
    refuses = False
    needs_tls = (
        parameters.get("sslmode", "prefer") not in ("disable", *PLAIN)
        and parameters.get("sslnegotiation") != "direct"
    )
    for host, port in places(parameters):
        place = f"{host}:{port}"
        try:
            state = knock(host, port, end - time.monotonic(), needs_tls=needs_tls)
        except OSError as error:
            found.append(_not_reached(error, (host, port)))
        except NoTLS:
            found.append(NO_TLS)
        except NoPostgreSQL:
            found.append(
                Diagnosis(
                    True,
                    f"what answers at {place} is no PostgreSQL server",
                    "See that host and port are its own, and what is between.",
                    is_reached=False,
                )
            )
        else:
            if state in BY_STATE and BY_STATE[state].passes and state != PROTOCOL_VIOLATION:
                found.append(BY_STATE[state])
            else:  # it would take somebody: unless it is a standby, it is what has refused us
                refuses = WANTS_ANOTHER.search(said) is None
    refused = Diagnosis(
        False,
        "the server answers, and lets nobody in so",
        "See the driver's own words: they are about the password, TLS, pg_hba.conf, the "
        "database's name, or target_session_attrs.",
        is_certain=False,  # it may have come up between the driver's question and ours
    )
    if refuses or not found:
        return refused
    return next((one for one in found if one.passes), found[0])


def places(parameters: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Return each host, or folder of sockets, with its port."""
    hosts = (parameters.get("hostaddr") or parameters.get("host") or "").split(",")
    ports = [int(port or DEFAULT_PORT) for port in parameters.get("port", "").split(",")]
    return ((host or default_folder(port), port) for host, port in zip(hosts, cycle(ports)))
