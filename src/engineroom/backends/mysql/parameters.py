"""The parameters of a URL: what each of the two drivers is told of them, with the same meaning."""

from __future__ import annotations

import difflib
from codecs import lookup
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from sqlalchemy.engine import URL

from ...errors import InvalidURL, UnsupportedByDriver
from ...urls import masked
from .tls import FLAGS, MODE, MODES, TEXTS

# What is a whole number, from which to which: a driver raises errors of its own outside of that.
TIME: tuple[int, int] = (1, 31536000)  # seconds
NUMBERS: dict[str, tuple[int, int]] = {
    "connect_timeout": TIME,
    "read_timeout": TIME,
    "write_timeout": TIME,
    "client_flag": (0, 2**32 - 1),
    "max_allowed_packet": (1, 2**30),
    "port": (1, 65535),
    "stmt_cache_size": (0, 65535),
}
ANSWERS = ("use_unicode", "local_infile", "binary_prefix", *FLAGS)
PLAIN = (
    *("host", "user", "password", "database", "unix_socket"),
    *("charset", "init_command", "sql_mode", "program_name"),
    *("read_default_file", "read_default_group", *TEXTS),
)
# What only one of them knows.
ONLY: dict[str, tuple[str, ...]] = {
    "pymysql": ("write_timeout", "bind_address", "collation"),
    "asyncmy": ("stmt_cache_size",),
}
OTHERS: dict[str, str] = {name: driver for driver, names in ONLY.items() for name in names}
KNOWN: tuple[str, ...] = (MODE, *NUMBERS, *ANSWERS, *PLAIN, *OTHERS)

PLACE = ("host", "port", "database", "password")
SECRETS = ("password", "passwd", "ssl_key_password", "ssl-key-password")

# What others call them: SQLAlchemy and the drivers, MySQL's own client, JDBC.
ALIASES = {
    "username": "user",
    "passwd": "password",
    "db": "database",
    "socket": "unix_socket",
    "sslmode": MODE,
    "sslMode": MODE,
    "useSSL": "ssl",
}
# What belongs to other tools, and how the same is said here.
FOREIGN = {
    "sslaccept": "ssl_mode=VERIFY_IDENTITY",
    "sslcert": "ssl_ca={value}",
    "serverTimezone": "init_command=SET time_zone=…",
    "connection_limit": "pool_size={value} as an argument, or DB_POOL_SIZE={value}",
    "pool_timeout": "pool_timeout={value} as an argument, or DB_POOL_TIMEOUT={value}",
    "autocommit": 'session(isolation_level="AUTOCOMMIT") where it is wanted',
    "echo": "echo=True as an argument, or DB_ECHO=true",
}
YES, NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def read_parameters(url: URL) -> dict[str, Any]:
    """Read all that a URL tells, by one name each.

    Raises:
        InvalidURL: a parameter is not known, has a value that it cannot have, or is there twice;
            or there are several hosts.
    """
    shown = masked(url)
    account = {"host": url.host, "user": url.username, "password": url.password}
    place = {"port": url.port, "database": url.database}
    read = {name: value for name, value in (account | place).items() if value is not None}
    seen: set[str] = set()
    for name, value in url.query.items():
        known = ALIASES.get(name, name.replace("-", "_"))
        if known not in KNOWN:
            raise _unknown(name, value, shown)
        if known in seen:
            raise InvalidURL(f"{shown} gives {known} twice. Give it once.")
        seen.add(known)
        if not isinstance(value, str) or (known in ("host", "port") and "," in value):
            raise InvalidURL(
                f"{shown} has several hosts, and the drivers of MySQL connect to one. Name one: "
                "the server that is written to, or what leads there (MySQL Router, ProxySQL, "
                "MaxScale)."
            )
        read[known] = _value(name, known, value, shown)
    if str(read.get("host", "")).startswith("/"):
        read["unix_socket"] = read.pop("host")
    return read


def for_driver(driver: str, parameters: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """Return what a driver is told beside the place, the user and TLS.

    Raises:
        UnsupportedByDriver: only the other one knows what is asked for.
        InvalidURL: it does not know the charset.
    """
    for name in parameters:
        if OTHERS.get(name, driver) != driver:
            raise UnsupportedByDriver(
                f"{driver} cannot do what {shown} asks for: {name}={parameters[name]}. Leave it "
                f"out, or use the side only that {OTHERS[name]} serves, and put it into "
                'engine_options={"connect_args": …}.'
            )
    if driver == "asyncmy" and parameters.get("charset") == "utf8mb3":
        parameters = {**parameters, "charset": "utf8"}  # which it calls so, as old servers did
    if "charset" in parameters and not _knows(driver, parameters["charset"]):
        raise InvalidURL(
            f"{shown} has charset={parameters['charset']}, which {driver} does not know (or "
            "Python). Leave it out for utf8mb4, or write a name of MySQL's, like latin1."
        )
    elsewhere = ("user", "host", "port", "database", MODE, *FLAGS, *TEXTS)
    told = {name: value for name, value in parameters.items() if name not in elsewhere}
    if driver == "asyncmy" and "sql_mode" in told:  # which it puts into its SET as it is
        told["sql_mode"] = "'" + told["sql_mode"].replace("'", "''") + "'"
    return told


def _knows(driver: str, charset: str) -> bool:
    """Whether a driver has a charset that texts can be sent in."""
    found = import_module(f"{driver}.charset").charset_by_name(charset)
    try:
        return found is not None and bool(lookup(found.encoding))
    except LookupError:
        return False


def _value(name: str, known: str, text: str, shown: str) -> Any:
    if not text and known != "password":
        raise InvalidURL(f"{shown} has {name}= without a value. Write one, or leave it out.")
    if known in NUMBERS:
        least, most = NUMBERS[known]
        is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(most))
        if not (is_number and least <= int(text) <= most):
            raise InvalidURL(
                f"{shown} has {name}={text!r}, which has to be a whole number from {least} to "
                f"{most}. Correct it, or leave it out."
            )
        return int(text)
    if known == MODE:
        mode = text.upper().replace("-", "_")
        if mode not in MODES:
            raise InvalidURL(f"{shown} has {name}={text!r}, which has to be {', '.join(MODES)}.")
        return mode
    if known in ANSWERS:
        if text.lower() not in (*YES, *NO):
            raise InvalidURL(f"{shown} has {name}={text!r}, which has to be true or false.")
        return text.lower() in YES
    return text


def _unknown(name: str, value: object, shown: str) -> InvalidURL:
    what = f"{shown} has {name}=, which the drivers of MySQL do not know."
    if name in FOREIGN:
        return InvalidURL(f"{what} Write {FOREIGN[name].format(value=value)}.")
    nearest = difflib.get_close_matches(name.replace("-", "_"), KNOWN, 1)
    hint = f"Did you mean {nearest[0]}?" if nearest else "Leave it out."
    return InvalidURL(
        f"{what} {hint} (What only one driver knows goes into "
        'engine_options={"connect_args": …}.)'
    )
