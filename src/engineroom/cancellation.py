"""Clean-ups that run to their end, however often they are cancelled."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

SETTLE_LIMIT = 5.0  # seconds; on a server that answers, every clean-up takes milliseconds


async def settle(coroutine: Coroutine[Any, Any, T], limit: float | None = SETTLE_LIMIT) -> T:
    """Run a clean-up to its end in a task of its own; then let the last cancellation go on.

    After the limit the clean-up itself is cancelled, and its own clean-up waited for: no task is
    left behind.

    Args:
        limit: Seconds; without one, the usual limit holds from the first cancellation on.

    Raises:
        TimeoutError: it did not end in time.
    """
    task = asyncio.ensure_future(coroutine)
    loop = asyncio.get_running_loop()
    giving_up = None if limit is None else loop.call_later(limit, task.cancel)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
            giving_up = giving_up or loop.call_later(SETTLE_LIMIT, task.cancel)
    if giving_up is not None:
        giving_up.cancel()
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen, or asyncio would report it: the cancellation says more
        raise cancelled
    if task.cancelled():
        seconds = SETTLE_LIMIT if limit is None else limit
        raise TimeoutError(f"A clean-up did not end within {seconds:g} s, and was given up.")
    return task.result()


def for_one_cancellation(clean: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap a clean-up that ends what a cancellation left: a second one changes nothing then.

    SQLAlchemy ends so what was cancelled as it was opened, and would log the second as an error.
    """

    def cleaned(what: Any) -> None:
        on_its_way = sys.exception()
        try:
            clean(what)
        except asyncio.CancelledError:
            if not isinstance(on_its_way, asyncio.CancelledError):
                raise

    return cleaned


def to_its_end(
    close: Callable[[Any], None], terminate: Callable[[Any], None]
) -> Callable[[Any], None]:
    """Wrap a driver's close: a cancellation that strikes in it goes on after it.

    SQLAlchemy would log it as an error, and keep open what it was to close after that.
    """

    def closed(connection: Any) -> None:
        try:
            close(connection)
        except asyncio.CancelledError as error:
            terminate(connection)
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # nobody has cancelled it: that is news
                raise
            task.uncancel()
            task.cancel(*error.args)

    return closed
