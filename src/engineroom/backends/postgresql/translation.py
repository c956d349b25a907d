"""What each driver is told of libpq's parameters; what it cannot do is an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import filterfalse
from typing import Any
from urllib.parse import urlencode

from ...errors import InvalidURL, UnsupportedByDriver
from ...secrecy import Sealed
from ...urls import HARMLESS
from .parameters import CACHES, DEFAULT_PORT, LIMITS, SYSTEM, read_integer
from .reaching import Reach
from .tls import FILES, find_authorities, is_home_closed, make_context

SECRETS = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
PLAIN = ("allow", "prefer")  # of sslmode: without TLS, too
VERIFIERS = ("sslrootcert", "sslcrl")  # which those do not ask
# What asyncpg takes by the same name.
ALIKE = ("user", "krbsrvname", "gsslib", "target_session_attrs")
NO_FILE = f"{os.devnull}/none"
LEAST_TIMEOUT = 2  # seconds, of libpq's `connect_timeout`
# What libpq tells the server at the start, for these variables.
AT_START = {"PGTZ": "timezone", "PGDATESTYLE": "datestyle", "PGGEQO": "geqo"}
UTF8 = ("utf8", "utf-8", "unicode", "auto")
# What asyncpg cannot do, unless it has one of these values.
UNABLE: dict[str, tuple[str, ...]] = {
    "channel_binding": ("disable", "prefer"),
    "gssencmode": ("disable", "prefer"),
    "gssdelegation": ("0",),
    "hostaddr": (),
    "require_auth": (),
    "requirepeer": (),
    "replication": ("false", "off", "no", "0"),
    "sslcertmode": ("allow",),
    "sslcrldir": (),
    "sslkeylogfile": (),
    "sslsni": ("1",),
    "min_protocol_version": ("3.0",),
    "max_protocol_version": ("3.0", "latest"),
    "scram_client_key": (),
    "scram_server_key": (),
    "oauth_issuer": (),
    "oauth_client_id": (),
    "oauth_client_secret": (),
    "oauth_scope": (),
}


def unable(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters that ask for what asyncpg cannot do."""
    asked = {
        name: parameters[name]
        for name, values in UNABLE.items()
        if parameters.get(name) and parameters[name] not in values
    }
    encoding = parameters.get("client_encoding") or "utf8"
    return asked | ({} if encoding.lower() in UTF8 else {"client_encoding": encoding})


def refuse_unable(parameters: Mapping[str, str], shown: str) -> None:
    """Refuse what asyncpg cannot do.

    Raises:
        UnsupportedByDriver: something of it is asked for.
    """
    if asked := unable(parameters):
        what = ", ".join(
            f"{name}={value}" if name in HARMLESS else name for name, value in asked.items()
        )
        raise UnsupportedByDriver(
            f"asyncpg cannot do what {shown} asks for: {what}. Write postgresql+psycopg://, whose "
            "driver can (with plain postgresql:// it is taken where it is installed), or leave it "
            "out."
        )


def refuse_unknown_to_libpq(driver: str, parameters: Mapping[str, str], shown: str) -> None:
    """Refuse what the libpq is too old for that psycopg or psycopg2 was linked with.

    Raises:
        UnsupportedByDriver: something of it is asked for.
    """
    asked = [name for name in parameters if name not in CACHES]
    if driver == "psycopg2":
        from psycopg2 import extensions

        version, unknown = extensions.libpq_version(), [*filterfalse(_psycopg2_knows, asked)]
    else:
        from psycopg import pq

        known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
        version, unknown = pq.version(), [name for name in asked if name not in known]
    if unknown:
        raise UnsupportedByDriver(
            f"{driver} cannot do what {shown} asks for: its libpq is {version // 10_000}, which "
            f"does not know {', '.join(unknown)}. Take one that is newer (psycopg has its own), or "
            "leave it out."
        )


def _psycopg2_knows(name: str) -> bool:
    """Ask libpq, which reads the names, and later the values."""
    from psycopg2 import ProgrammingError, extensions

    try:
        extensions.parse_dsn(f"{name}=0")
    except ProgrammingError:
        return False
    return True


def for_libpq(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of psycopg and psycopg2, which speak libpq; secrets are sealed."""
    if parameters.get("sslrootcert") == SYSTEM and (authorities := find_authorities()):
        parameters = {**parameters, "sslrootcert": authorities}  # (the mode is verify-full)
    if not parameters.get("sslcert") and is_home_closed():
        # libpq takes what it may not look for as an error, and does without TLS then, or fails.
        parameters = {**parameters, "sslcert": NO_FILE}
    return {
        name: Sealed(value) if name in SECRETS else value
        for name, value in parameters.items()
        if name not in CACHES
    }


def for_asyncpg(parameters: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of `asyncpg.connect()`, complete: it looks nothing up for itself.

    Raises:
        InvalidCertificate: what TLS needs cannot be read.
    """
    arguments: dict[str, Any] = {name: parameters[name] for name in ALIKE if parameters.get(name)}
    arguments |= {name: int(parameters[name]) for name in CACHES if name in parameters}
    arguments["async_creator_fn"] = Reach(_without_secrets(parameters)).connect
    arguments |= _places(parameters)
    if parameters.get("dbname"):
        arguments["database"] = parameters["dbname"]
    if parameters.get("password"):
        arguments["password"] = Sealed(parameters["password"])
    timeout = read_integer(parameters, "connect_timeout") or 0
    if timeout > 0:
        arguments["timeout"] = max(timeout, LEAST_TIMEOUT)
    return arguments | _tls(parameters) | _settings(parameters, environment)


def _without_secrets(parameters: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in parameters.items() if name not in SECRETS}


def _places(parameters: Mapping[str, str]) -> dict[str, Any]:
    hosts = parameters.get("host", "").split(",")
    ports = [int(port or DEFAULT_PORT) for port in parameters.get("port", "").split(",")]
    if len(ports) not in (1, len(hosts)):
        raise InvalidURL(f"{len(ports)} ports are given for {len(hosts)} hosts. Give one for each.")
    if len(hosts) == 1:
        return {"host": hosts[0] or None, "port": ports[0]}
    return {"host": hosts, "port": ports if len(ports) > 1 else ports[0]}


def _tls(parameters: Mapping[str, str]) -> dict[str, Any]:
    mode = parameters.get("sslmode", "prefer")
    if mode == "disable":
        return {"ssl": False, "direct_tls": False}
    tls: dict[str, Any] = {"direct_tls": parameters.get("sslnegotiation") == "direct"}
    if mode not in PLAIN:
        return tls | {"ssl": make_context(parameters)}
    if is_home_closed():
        unverified = {name: parameters[name] for name in parameters if name not in VERIFIERS}
        context = make_context(unverified)
        return tls | {"ssl": (context, False) if mode == "prefer" else (False, context)}
    # asyncpg tries both ways in its own modes only, and takes certificates for them in a DSN.
    texts = {
        name: parameters[name] for name in (*FILES, "sslpassword", *LIMITS) if name in parameters
    }
    return (
        tls
        | {"ssl": mode}
        | ({"dsn": Sealed(f"postgresql://?{urlencode(texts)}")} if texts else {})
    )


def _settings(parameters: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what the server is told at the start."""
    settings = {
        setting: environment[variable]
        for variable, setting in AT_START.items()
        if environment.get(variable, "").lower()
        not in ("", "default")  # the server's own, to libpq
    }
    name = parameters.get("application_name") or parameters.get("fallback_application_name")
    if name:
        settings["application_name"] = name
    if "options" in parameters:
        settings["options"] = parameters["options"]
    return {"server_settings": settings} if settings else {}
