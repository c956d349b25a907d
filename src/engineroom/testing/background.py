"""An event loop in a thread of its own, for what belongs to no test's loop."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_running: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a forked child has none of it
_lock = threading.Lock()


def loop() -> asyncio.AbstractEventLoop:
    """Return the loop, which runs; it is started at its first use, once in each process."""
    with _lock:
        known = _running.get(os.getpid())
        if known is None:
            known = _running[os.getpid()] = asyncio.new_event_loop()
            thread = threading.Thread(
                target=_run, args=(known,), name="engineroom-sandbox", daemon=True
            )
            thread.start()
            atexit.register(_stop, known, thread)
    return known


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine in the loop, from any thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop())


async def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine there, and wait for it in the running loop."""
    return await asyncio.wrap_future(submit(coroutine))


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())  # the pools of this loop end here
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if _running.get(os.getpid()) is loop:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5.0)
