"""Reads a database URL and masks its secrets; knows no driver."""

from __future__ import annotations

import re

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from .errors import InvalidURL

# What providers and other tools call a database, beside what SQLAlchemy calls it.
ALIASES = {"postgres": "postgresql"}
# What a parameter of a URL is called whose value nobody may see.
SECRET = re.compile("pass|secret|token", re.IGNORECASE)


def read_url(url: str | URL) -> URL:
    """Read a URL as a person would write it: `postgres://` is `postgresql://`.

    Raises:
        InvalidURL: it is none; the message shows it with its secrets masked.
    """
    if not isinstance(url, str | URL):
        raise InvalidURL(
            f"A database URL is a string or a sqlalchemy.URL, not {type(url).__name__}. "
            'Write it like "postgresql://user:password@host/database".'
        )
    parsed = _parse(url)
    if parsed is None:  # raised here, for SQLAlchemy's own error carries the URL with its password
        raise InvalidURL(
            f'"{masked(url)}" is not a database URL. Write it like '
            '"postgresql://user:password@host:5432/database" or "sqlite:///file.db"; special '
            "characters in the password are percent-encoded (urllib.parse.quote)."
        )
    dialect, plus, driver = parsed.drivername.partition("+")
    return parsed.set(drivername=ALIASES.get(dialect, dialect) + plus + driver)


def masked(url: str | URL) -> str:
    """Return the URL as text that can be shown: its password, in its query too, masked."""
    parsed = _parse(url)
    if parsed is None:  # any part of it may be the secret
        scheme = re.match(r"\w+://", str(url))
        return (scheme[0] if scheme else "") + "…"
    secret = {name: "***" for name in parsed.query if SECRET.search(name)}
    text = parsed.update_query_dict(secret).render_as_string(hide_password=True)
    if "@" in f"{parsed.host}{parsed.database}":  # a password with an @ or a / that was not encoded
        return f"{parsed.drivername}://…"
    return text


def _parse(url: str | URL) -> URL | None:
    try:
        return make_url(url.strip() if isinstance(url, str) else url)
    except (ArgumentError, ValueError):
        return None
