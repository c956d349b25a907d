"""An asynchronous session that is opened outside of its event loop, and ended inside of it.

Test runners make their loop before or after a synchronous fixture, keep it for one test or for all,
and close it before the fixture's end or after it. The session needs none to be opened. It notes the
loop of its first statement, and ends there: with the loop, or at the fixture's end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_only

from engineroom.scopes import AsyncSessionScope


@contextmanager
def session_for_any_loop(scope: AsyncSessionScope) -> Generator[AsyncSession]:
    """Open a session outside of its loop, and roll it back at the end."""
    session = scope.open()
    keepers: list[tuple[asyncio.AbstractEventLoop, AsyncGenerator[None]]] = []

    async def keep() -> AsyncGenerator[None]:
        """Stand at the `yield` until `loop.shutdown_asyncgens()`: the only hook at a loop's end."""
        try:
            yield
        finally:
            if scope.is_open:
                scope.is_rollback_only = True
                await scope.__aexit__(None, None, None)

    def note_loop(*_: object) -> None:
        if not keepers:
            keeper = keep()
            keepers.append((asyncio.get_running_loop(), keeper))
            await_only(anext(keeper))  # runs to its yield, without giving way to other tasks

    event.listen(session.sync_session, "after_begin", note_loop)
    try:
        yield session
    finally:
        for loop, keeper in keepers:
            if not (loop.is_closed() or loop.is_running()):
                loop.run_until_complete(keeper.aclose())
        if scope.is_open:  # nothing was sent
            abandon(scope)


def abandon(scope: Any) -> None:
    """Refuse the further use of what a scope gave, and forget it."""
    scope.retire("The test of this session has ended. Use it inside of the test only.")
    scope._leave()
