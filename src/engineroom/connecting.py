"""One physical connect: in the time that is left, and without its secrets in a traceback."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Engine

from .backends import Backend, Side
from .lending import Lender
from .secrecy import Sealed, Unseen


def watch_connects(engine: Engine, side: Side, backend: Backend) -> None:
    """Have an engine connect so: around the dialect's verb, below whoever listens to connects.

    For one `do_connect` event makes every statement slower.
    """
    dialect: Any = engine.dialect
    connect = dialect.connect

    def connect_in_time(*args: Any, **arguments: Any) -> Any:
        if side is Side.SYNC and isinstance(engine.pool, Lender):
            # Nobody can stop a synchronous driver from outside.
            backend.limit_connect(arguments, engine.pool.seconds_left())
        with Unseen():
            return connect(*args, **revealed(arguments))

    dialect.connect = connect_in_time


def revealed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a driver with their secrets."""
    return {
        name: value.reveal() if isinstance(value, Sealed) else value
        for name, value in arguments.items()
    }
