"""What psycopg's error keeps of a connection that did not come about: its secrets are sealed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...secrecy import Sealed, chain
from .translation import SECRETS


def sealing(connect: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a way to connect: the error's `pgconn` would show the password in its own text."""

    def connect_or_seal(*args: Any, **kw: Any) -> Any:
        try:
            return connect(*args, **kw)
        except Exception as error:
            seal(error)
            raise

    return connect_or_seal


def seal(error: BaseException) -> None:
    """Seal what is secret in the connections of an error and of those that it came of."""
    from psycopg.errors import FinishedPGconn

    for each in chain(error):
        pgconn: Any = getattr(each, "pgconn", None)
        if isinstance(pgconn, FinishedPGconn) and not isinstance(pgconn.password, Sealed):
            pgconn.password = Sealed(pgconn.password)  # type: ignore[assignment]
            pgconn.info = [
                option._replace(val=Sealed(option.val))  # type: ignore[arg-type]
                if option.keyword.decode() in SECRETS and option.val is not None
                else option
                for option in pgconn.info
            ]


def options_of(pgconn: Any) -> dict[str, str]:
    """Return what libpq was told, with its secrets."""
    values = {option.keyword.decode(): option.val for option in pgconn.info}
    return {
        name: (value.reveal() if isinstance(value, Sealed) else value).decode()
        for name, value in values.items()
        if value is not None
    }
