"""One physical connect: as whom, in the time that is left, and without secrets in a traceback."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.util import await_only

from .backends import Backend, Side
from .credentials import Credentials
from .lending import Lender
from .pool import LoopPool
from .secrecy import Sealed, unseen

LIMIT = 30.0  # seconds for credentials, where no pool counts them
SPARE = 0.05  # seconds that they get less than the connect: so that theirs is the error


def watch_connects(engine: Engine, side: Side, backend: Backend, credentials: Credentials) -> None:
    """Have an engine connect so: around the dialect's verb, below whoever listens to connects.

    For one `do_connect` event makes every statement slower. Mappers remember dialects: this one
    must not keep engine and manager for as long.
    """
    dialect: Any = engine.dialect
    connect, known = backend.way_to_connect(dialect), weakref.ref(engine)

    def connect_as(account: dict[str, Sealed[str]], *args: Any, **arguments: Any) -> Any:
        limit(arguments, known(), side, backend)
        return connect(*args, **revealed(arguments | account))

    def ask(arguments: dict[str, Any]) -> dict[str, Sealed[str]]:
        own = float(arguments.get("connect_timeout") or arguments.get("timeout") or 0)
        left = seconds_left(known())
        seconds = max((min(left, own) if own > 0 else left) - SPARE, SPARE)
        if side is Side.SYNC:
            return credentials.ask(seconds)
        account: dict[str, Sealed[str]] = await_only(credentials.ask_on_loop(seconds))
        return account

    def connect_by_asking(*args: Any, **arguments: Any) -> Any:
        """Connect; where the answers were refused and are others by now, once more."""
        account = ask(arguments)
        try:
            return connect_as(account, *args, **arguments)
        except Exception as error:
            if not backend.may_be_refused(error):
                raise
            again = ask(arguments)
            if revealed(again) == revealed(account):
                raise
        return connect_as(again, *args, **arguments)

    def connect_plainly(*args: Any, **arguments: Any) -> Any:
        return connect_as({}, *args, **arguments)

    way: Callable[..., Any] = connect_by_asking if credentials else connect_plainly
    # Twice: a Ctrl-C that psycopg2 hears of late strikes just where the first begins to empty.
    dialect.connect = unseen(unseen(way))


def limit(arguments: dict[str, Any], engine: Engine | None, side: Side, backend: Backend) -> None:
    """Add to a driver's arguments how long it may take, where a pool counts that."""
    pool = getattr(engine, "pool", None)
    if side is Side.SYNC and isinstance(pool, Lender):
        # Nobody can stop a synchronous driver from outside.
        backend.limit_connect(arguments, pool.seconds_left())
    elif isinstance(pool, (LoopPool, Lender)):  # (the latter of one that connects apart)
        backend.limit_each_host(arguments, seconds_left(engine))


def seconds_left(engine: Engine | None) -> float:
    """Return how long whoever connects now may still take."""
    pool: Any = getattr(engine, "pool", None)
    if isinstance(pool, LoopPool):
        pool = pool.shelves.get(asyncio.get_running_loop())
    return pool.seconds_left() if isinstance(pool, Lender) else LIMIT


def revealed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a driver with their secrets."""
    return {
        name: value.reveal() if isinstance(value, Sealed) else value
        for name, value in arguments.items()
    }
