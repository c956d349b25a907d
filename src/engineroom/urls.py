"""Reads a database URL and masks its secrets; knows no driver."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn
from urllib.parse import parse_qsl, unquote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from .errors import InvalidURL

# What providers and other tools call a database, beside what SQLAlchemy calls it.
ALIASES = {"postgres": "postgresql"}
# Parameters whose values everybody may see. Of others nobody knows: a key, a text that may hold
# anything, a password whose name is misspelt.
HARMLESS = frozenset(
    (
        *("user", "username", "host", "hostaddr", "port", "dbname", "database", "db"),
        *("service", "servicefile", "passfile", "unix_socket", "mode", "cache", "uri"),
        *("application_name", "fallback_application_name", "client_encoding", "charset"),
        *("ssl", "sslmode", "ssl_mode", "sslnegotiation", "sslcompression", "sslsni"),
        *("sslcert", "sslkey", "sslrootcert", "sslcrl", "sslcrldir", "sslcertmode"),
        *("ssl_ca", "ssl_cert", "ssl_key"),
        *("ssl_min_protocol_version", "ssl_max_protocol_version"),
        *("min_protocol_version", "max_protocol_version", "channel_binding", "require_auth"),
        *("gssencmode", "gsslib", "gssdelegation", "krbsrvname", "requirepeer", "replication"),
        *("target_session_attrs", "load_balance_hosts"),
        *("connect_timeout", "read_timeout", "write_timeout", "tcp_user_timeout"),
        *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
    )
)

# The parts of an account, and which parameters may have them instead.
ACCOUNT: dict[str, tuple[str, ...]] = {"username": ("user", "username"), "password": ("password",)}

SCHEME = re.compile(r"([A-Za-z]\w*)(?:\+\w+)?://")
PLACE = re.compile(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<name>[^:\[\]]*))(?::(?P<port>.*))?")
LAST_PORT = 65535
# A host that a URL can carry before its path; others (a folder of sockets, several) are parameters.
PLAIN_HOST = re.compile(r"[\w.:-]*")


def read_url(url: str | URL) -> URL:
    """Read a URL as a person would write it, and as libpq does.

    `postgres://` is `postgresql://`. What stands before the first `/` ends at its last `@` with the
    password, so that an `@` or a `:` there need not be percent-encoded. Several hosts, and a host
    that is a folder of sockets, are returned as the parameters `host` and `port`.

    Raises:
        InvalidURL: it is none; the message shows nothing of it that may be secret.
    """
    if isinstance(url, URL):
        return _sendable(url.set(drivername=_drivername(*url.drivername.partition("+"))))
    if not isinstance(url, str):
        raise InvalidURL(
            f"A database URL is a string or a sqlalchemy.URL, not {type(url).__name__}. "
            'Write it like "postgresql://user:password@host/database".'
        )
    text = url.strip()
    scheme = SCHEME.match(text)
    if scheme is not None and scheme[1] != "sqlite":
        drivername = _drivername(*scheme[0].removesuffix("://").partition("+"))
        return _sendable(_read_parts(drivername, text[scheme.end() :]))
    with suppress(ArgumentError, ValueError):
        if scheme is not None:  # what follows is a path, and may hold anything
            return make_url(text)
    shown = f'"{_hidden(url)}"' if text else "An empty text"
    raise InvalidURL(
        f"{shown} is not a database URL. Write it like "
        '"postgresql://user:password@host:5432/database" or "sqlite:///file.db"; special '
        "characters in the password are percent-encoded (urllib.parse.quote)."
    )


def masked(url: str | URL) -> str:
    """Return the URL as text that can be shown: its password masked, and what may be one."""
    try:
        parsed = read_url(url)
    except InvalidURL:
        return _hidden(url)
    unknown = {name: "***" for name in parsed.query if name not in HARMLESS}
    shown = parsed.update_query_dict(unknown).render_as_string(hide_password=True)
    text = shown.replace("=%2A%2A%2A", "=***")
    if "@" in f"{parsed.host}{parsed.database}":  # a password with an @ or a / that was not encoded
        return f"{parsed.drivername}://…"
    return text


def has_account(url: URL, part: str) -> bool:
    """Whether a URL has a user name or a password, among its parameters or before."""
    return bool(getattr(url, part)) or any(name in url.query for name in ACCOUNT[part])


def replace_account(url: URL, part: str, value: str | None) -> URL:
    """Return a URL with another user name or password; None: with none."""
    parts = {name: getattr(url, name) for name in ("username", "password", "host", "port")}
    query = url.difference_update_query(ACCOUNT[part]).query
    account = parts | {part: value}
    return _sendable(URL.create(url.drivername, **account, database=url.database, query=query))


def in_full(url: URL) -> str:
    """Return a URL as text, its secrets included.

    Of an account without a user name SQLAlchemy leaves the password out.
    """
    if url.username is not None or url.password is None:
        return url.render_as_string(hide_password=False)
    return in_full(url.set(username="_")).replace("://_:", "://:", 1)


def flaw(text: str) -> str:
    """Return why no driver can send a text; "" where all can.

    libpq reads up to a zero byte alone: what stands behind it, sslmode too, would not be.
    """
    if "\0" in text:
        return "has a zero byte (%00), where libpq would stop reading"
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are none, as the environment may have them
        return "is not UTF-8, which the drivers send"
    return ""


def _sendable(url: URL) -> URL:
    """Refuse a URL that cannot be sent; what would raise later has it in its own error."""
    parts = (url.username, url.password, url.host, url.database, *url.query, *url.query.values())
    if why := flaw("".join("".join(part) for part in parts if part)):
        raise InvalidURL(
            f"The URL {url.drivername}://… {why}, in one of its parts. Write them in UTF-8, "
            "percent-encoded or not, a % itself as %25, and without a zero byte."
        )
    return url


def _decode(text: str) -> str:
    """Decode what is percent-encoded; bytes that are no UTF-8 are seen to be none."""
    return unquote(text, errors="surrogateescape")


def _hidden(url: object) -> str:
    """Return no more than the scheme of what is no URL: any part of it may be the secret."""
    scheme = re.match(r"\s*(\w+://)", str(url))
    return (scheme[1] if scheme else "") + "…"


def _drivername(dialect: str, plus: str, driver: str) -> str:
    return ALIASES.get(dialect, dialect) + plus + driver


def _read_parts(drivername: str, text: str) -> URL:
    """Read what follows the scheme."""
    authority, mark, beyond = _cut(text, "/?#")
    if mark == "#" or "#" in beyond or "@" in beyond:
        raise InvalidURL(
            f"The URL {drivername}://… has a special character that is not percent-encoded. In a "
            "user name or a password write / as %2F, ? as %3F and # as %23; behind the host write "
            "@ as %40 and # as %23 (urllib.parse.quote)."
        )
    path, _, query = beyond.partition("?") if mark == "/" else ("", "", beyond)
    account, at, places = authority.rpartition("@")
    user, colon, password = account.partition(":")
    shown = f"{drivername}://…@{places}" if at else f"{drivername}://…"
    hosts, ports = zip(*(_read_place(place, shown) for place in places.split(",")), strict=True)
    parameters = _read_query(query, shown)
    host, port = hosts[0] or None, ports[0]
    if len(hosts) > 1 or not PLAIN_HOST.fullmatch(hosts[0]):
        host = port = None
        parameters.setdefault("host", ",".join(hosts))
        if any(ports):
            parameters.setdefault("port", ",".join(str(one or "") for one in ports))
    return URL.create(
        drivername,
        username=_decode(user) or None,
        password=_decode(password) if colon else None,
        host=host,
        port=port,
        database=_decode(path) or None,
        query=parameters,
    )


def _cut(text: str, marks: Iterable[str]) -> tuple[str, str, str]:
    """Divide a text at the first of some characters."""
    end = min((text.index(mark) for mark in marks if mark in text), default=len(text))
    return text[:end], text[end : end + 1], text[end + 1 :]


def _read_place(place: str, shown: str) -> tuple[str, int | None]:
    """Read one `host:port`."""
    match = PLACE.fullmatch(place)
    if match is None:
        _refuse_place(shown)
    port = match["port"] or None
    if port is None:
        return _decode(match["v6"] or match["name"]), None
    if not is_port(port):
        _refuse_place(shown)
    return _decode(match["v6"] or match["name"]), int(port)


def is_port(text: str) -> bool:
    """Whether a text is a number from 1 to 65535."""
    return re.fullmatch("[0-9]{1,5}", text) is not None and 0 < int(text) <= LAST_PORT


def _refuse_place(shown: str) -> NoReturn:
    raise InvalidURL(
        f"The port of {shown} is not a number from 1 to {LAST_PORT}. Write host:port; an IPv6 "
        "address stands in brackets ([::1]:5432), and a : in a user name is percent-encoded (%3A)."
    )


def _read_query(query: str, shown: str) -> dict[str, str | tuple[str, ...]]:
    """Read the parameters; SQLAlchemy writes a space as +, and so it is read."""
    read: dict[str, str | tuple[str, ...]] = {}
    if any("=" not in pair for pair in query.split("&") if pair):
        raise InvalidURL(f"{shown} has a parameter without a value. Write name=value.")
    for name, value in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        known = read.get(name)
        if known is None:
            read[name] = value
        elif name == "host":  # as SQLAlchemy writes several: host=a:5432&host=b:5432
            read[name] = (*((known,) if isinstance(known, str) else known), value)
        else:
            raise InvalidURL(f"{shown} gives {name} twice. Give it once.")
    return read
