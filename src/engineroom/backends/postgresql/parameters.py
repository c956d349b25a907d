"""libpq's parameters: their names, in a URL and in the environment, and what they may be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import InvalidURL
from ...urls import LAST_PORT, is_port
from ..sockets import ARRIVES_WITHIN, KEEPALIVE_COUNT, KEEPALIVE_IDLE, KEEPALIVE_INTERVAL

SSLMODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
WISHES = ("disable", "prefer", "require")
TARGETS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
OLDEST = "TLSv1.2"  # where nobody says otherwise
LIMITS = ("ssl_min_protocol_version", "ssl_max_protocol_version")
VERSIONS = ("TLSv1.3", "TLSv1.2", "TLSv1.1", "TLSv1", "")  # of TLS, from new to old; then: no limit
FLAG = ("0", "1", "")  # libpq takes the last like none
HOST_AND_PORT = re.compile(r"[A-Za-z0-9.-]+:[0-9]+")
NUMBER = re.compile(r"\s*[+-]?[0-9]+\s*")
DEFAULT_PORT = 5432
# Where nobody says otherwise; the server says nothing of it, and libpq's are the system's: hours.
ALIVE = {
    "keepalives_idle": str(KEEPALIVE_IDLE),
    "keepalives_interval": str(KEEPALIVE_INTERVAL),
    "keepalives_count": str(KEEPALIVE_COUNT),
    "tcp_user_timeout": str(ARRIVES_WITHIN * 1000),  # milliseconds
}
SYSTEM = "system"  # of sslrootcert: the certificates that the machine trusts


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of libpq."""

    variable: str = ""
    """Where the environment has it."""
    values: tuple[str, ...] = ()
    """What it may be; without any, that is for others to know."""
    is_number: bool = False


KNOWN: dict[str, Parameter] = {
    "host": Parameter("PGHOST"),
    "hostaddr": Parameter("PGHOSTADDR"),
    "port": Parameter("PGPORT"),
    "dbname": Parameter("PGDATABASE"),
    "user": Parameter("PGUSER"),
    "password": Parameter("PGPASSWORD"),
    "passfile": Parameter("PGPASSFILE"),
    "service": Parameter("PGSERVICE"),
    "servicefile": Parameter("PGSERVICEFILE"),
    "require_auth": Parameter("PGREQUIREAUTH"),
    "channel_binding": Parameter("PGCHANNELBINDING", WISHES),
    "connect_timeout": Parameter("PGCONNECT_TIMEOUT", is_number=True),
    "client_encoding": Parameter("PGCLIENTENCODING"),
    "options": Parameter("PGOPTIONS"),
    "application_name": Parameter("PGAPPNAME"),
    "fallback_application_name": Parameter(),
    "keepalives": Parameter(is_number=True),
    "keepalives_idle": Parameter(is_number=True),
    "keepalives_interval": Parameter(is_number=True),
    "keepalives_count": Parameter(is_number=True),
    "tcp_user_timeout": Parameter(is_number=True),
    "replication": Parameter(),
    "gssencmode": Parameter("PGGSSENCMODE", WISHES),
    "sslmode": Parameter("PGSSLMODE", SSLMODES),
    "sslnegotiation": Parameter("PGSSLNEGOTIATION", ("postgres", "direct")),
    "sslcompression": Parameter("PGSSLCOMPRESSION", FLAG),
    "sslcert": Parameter("PGSSLCERT"),
    "sslkey": Parameter("PGSSLKEY"),
    "sslpassword": Parameter(),
    "sslcertmode": Parameter("PGSSLCERTMODE", ("disable", "allow", "require")),
    "sslrootcert": Parameter("PGSSLROOTCERT"),
    "sslcrl": Parameter("PGSSLCRL"),
    "sslcrldir": Parameter("PGSSLCRLDIR"),
    "sslsni": Parameter("PGSSLSNI", FLAG),
    "sslkeylogfile": Parameter(),
    "requirepeer": Parameter("PGREQUIREPEER"),
    "ssl_min_protocol_version": Parameter("PGSSLMINPROTOCOLVERSION", VERSIONS),
    "ssl_max_protocol_version": Parameter("PGSSLMAXPROTOCOLVERSION", VERSIONS),
    "min_protocol_version": Parameter("PGMINPROTOCOLVERSION"),
    "max_protocol_version": Parameter("PGMAXPROTOCOLVERSION"),
    "krbsrvname": Parameter("PGKRBSRVNAME"),
    "gsslib": Parameter("PGGSSLIB", ("gssapi", "sspi", "")),
    "gssdelegation": Parameter("PGGSSDELEGATION", FLAG),
    "target_session_attrs": Parameter("PGTARGETSESSIONATTRS", TARGETS),
    "load_balance_hosts": Parameter("PGLOADBALANCEHOSTS", ("disable", "random")),
    "scram_client_key": Parameter(),
    "scram_server_key": Parameter(),
    "oauth_issuer": Parameter(),
    "oauth_client_id": Parameter(),
    "oauth_client_secret": Parameter(),
    "oauth_scope": Parameter(),
}
# What libpq refuses when it is blank, beside what has its own values.
NEVER_BLANK = (
    *("require_auth", "min_protocol_version", "max_protocol_version"),
    *("scram_client_key", "scram_server_key"),
)
# What others call them: SQLAlchemy, JDBC and asyncpg.
ALIASES = {"username": "user", "database": "dbname", "ssl": "sslmode"}
SSL = {"true": "require", "false": "disable"}
ANY_CASE = {version.lower(): version for version in VERSIONS}  # libpq reads these so
# Not libpq's, but in many a URL: SQLAlchemy's and asyncpg's caches. They concern no other driver.
CACHES = ("prepared_statement_cache_size", "statement_cache_size")
# What belongs to other tools, and how the same is said here.
SCHEMA = "options=-csearch_path%3D{value} (or leave it out, and set the role's search_path)"
FOREIGN = {
    "schema": SCHEMA,
    "currentSchema": SCHEMA,
    "search_path": SCHEMA,
    "connection_limit": "pool_size={value} as an argument, or DB_POOL_SIZE={value}",
    "pool_timeout": "pool_timeout={value} as an argument, or DB_POOL_TIMEOUT={value}",
    "pgbouncer": 'pooler="transaction" as an argument, or DB_POOLER=transaction',
    "statement_timeout": "options=-cstatement_timeout%3D{value}",
}


def read_parameters(given: Mapping[str, str | tuple[str, ...]], origin: str) -> dict[str, str]:
    """Read parameters of a URL, a service file or the environment by libpq's names.

    Args:
        origin: Where they stand, for the errors.

    Raises:
        InvalidURL: one is not known, or has a value that it cannot have.
    """
    read: dict[str, str] = {}
    for name, value in given.items():
        known = ALIASES.get(name, name)
        if known not in KNOWN and known not in CACHES:
            raise _unknown(name, value, origin)
        text = ",".join(value) if isinstance(value, tuple) else value
        text = SSL.get(text, text) if name == "ssl" else text
        if known in LIMITS:
            text = ANY_CASE.get(text.lower(), text)
        _mind_value(name, known, text, origin)
        read[known] = text
    hosts = given.get("host", ())
    if isinstance(hosts, tuple) or HOST_AND_PORT.fullmatch(hosts):
        read |= _split_hosts(hosts if isinstance(hosts, tuple) else (hosts,))
    return read


def read_integer(parameters: Mapping[str, str], name: str) -> int | None:
    """Return a number, which `read_parameters` has seen to be one; None if it was not given."""
    text = parameters.get(name)
    return None if text is None else int(text)


def read_limits(parameters: Mapping[str, str]) -> tuple[str, str]:
    """Return the oldest and the newest version of TLS; a blank is no limit."""
    oldest, newest = LIMITS
    return parameters.get(oldest, OLDEST), parameters.get(newest, "")


def _unknown(name: str, value: str | tuple[str, ...], origin: str) -> InvalidURL:
    if name in FOREIGN:
        instead = FOREIGN[name].format(value=value)
        return InvalidURL(f"{origin} has {name}=, which libpq does not know. Write {instead}.")
    nearest = difflib.get_close_matches(name, KNOWN, 1)
    hint = f"Did you mean {nearest[0]}?" if nearest else "Leave it out."
    return InvalidURL(
        f"{origin} has {name}=, which libpq does not know. {hint} (What only a driver knows goes "
        'into engine_options={"connect_args": …}.)'
    )


def _mind_value(name: str, known: str, text: str, origin: str) -> None:
    parameter = KNOWN.get(known, Parameter(is_number=True))
    if parameter.values and text not in parameter.values:
        wanted = ", ".join(filter(None, parameter.values))
    elif known in NEVER_BLANK and not text:
        wanted = "no blank"
    elif parameter.is_number and not NUMBER.fullmatch(text):
        wanted = "a whole number"
    elif known == "port" and not all(one == "" or is_port(one) for one in text.split(",")):
        wanted = f"a number from 1 to {LAST_PORT} for each host, with commas between"
    else:
        return
    shown = "" if known == "port" else repr(text)
    raise InvalidURL(f"{origin} has {name}={shown}, which has to be {wanted}.")


def _split_hosts(places: tuple[str, ...]) -> dict[str, str]:
    """Read `host=a:1&host=b:2`, as SQLAlchemy writes hosts."""
    if not places:
        return {}
    pairs = [place.rpartition(":") if ":" in place else (place, "", "") for place in places]
    split = {"host": ",".join(host for host, _, _ in pairs)}
    if any(port for _, _, port in pairs):
        split["port"] = ",".join(port for _, _, port in pairs)
    return split
