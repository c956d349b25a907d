"""An application's lifespan: opens a manager at its start, drains and closes it at its end."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from inspect import isasyncgenfunction, isgeneratorfunction
from typing import Any, Unpack

from sqlalchemy import URL

from .arguments import mind_manager
from .errors import AlreadyInitialized, InvalidOption
from .hooks import is_coroutine_function
from .manager import DatabaseSessionManager, session_manager
from .secrecy import Sealed, unseen
from .settings import Options, check_names

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]  # frameworks differ in what it gives


@unseen
def lifespan(
    manager: DatabaseSessionManager = session_manager,
    *,
    url: str | URL | None = None,
    wraps: Any = None,
    migrate: bool = False,
    **options: Unpack[Options],
) -> Lifespan:
    """Return a lifespan that opens the manager at the start, and drains and closes it at the end.

    Args:
        manager: Which one.
        url: Where the database is; without it, `DATABASE_URL` or `DB_URL` says so.
        wraps: A lifespan of one's own, which runs inside: a function of the application that gives
            an asynchronous context manager, or the bare generator function. What it yields is
            passed on.
        migrate: Run the migrations first, as `alembic upgrade head` does: once, however many
            processes start at the same time.
        options: What else `init()` takes.

    Raises:
        InvalidOption: `manager` or `wraps` is something else.
        UnknownOption: an option does not exist.
    """
    mind_manager("lifespan", manager, DatabaseSessionManager)
    check_names(options)
    if wraps is not None and not is_lifespan(wraps):
        raise InvalidOption(
            f"lifespan() got wraps={wraps!r}. It takes a function of the application that gives an "
            "asynchronous context manager, or an asynchronous generator: async def …: yield"
        )
    given: Sealed[dict[str, Any]] = Sealed({"url": url, **options})
    inner = asynccontextmanager(wraps) if isasyncgenfunction(wraps) else wraps

    @asynccontextmanager
    async def opened(app: Any) -> AsyncGenerator[Mapping[str, Any] | None]:
        if manager.stats().state == "open" and manager._room.sandbox is None:
            raise AlreadyInitialized(
                f"lifespan(): {type(manager).__name__} is open already, and one application opens "
                "and closes it. Give the second application a manager of its own, leave out the "
                "other lifespan or init(), or end the first test client before the next."
            )
        manager.init(**given.reveal())
        try:
            if migrate and manager._room.sandbox is None:  # a test's database has its tables
                from .alembic import upgrade

                await asyncio.to_thread(upgrade, manager)
            if inner is None:
                yield None
            else:
                async with inner(app) as state:
                    yield state
        finally:
            await manager.close()

    return opened


def is_lifespan(wraps: Any) -> bool:
    """Whether it may be one: what it gives is known only once it is called."""
    made = inspect.unwrap(wraps) if callable(wraps) else wraps  # what a decorator was put on
    return callable(made) and not (isgeneratorfunction(made) or is_coroutine_function(made))
