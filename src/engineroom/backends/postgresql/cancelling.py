"""A cancel request of libpq's drivers, from another thread or task: a frozen server takes none."""

from __future__ import annotations

import asyncio
from inspect import iscoroutinefunction
from typing import Any

from sqlalchemy.util import await_only

from .knocking import answers

BREAK_OFF_LIMIT = 1.0  # seconds for the server to take a cancel request


def request_cancel(driver: Any) -> None:
    """Ask the server to cancel what a connection runs; one that is silent is not asked.

    Raises:
        psycopg.errors.CancellationTimeout: it did not take the request in time.
    """
    if not _is_patient(driver):
        if answers(driver.info.host, driver.info.port, BREAK_OFF_LIMIT):
            driver.cancel()
    elif not iscoroutinefunction(driver.cancel_safe):
        driver.cancel_safe(timeout=BREAK_OFF_LIMIT)
    elif asyncio._get_running_loop() is None:  # its own does not run any more
        asyncio.run(driver.cancel_safe(timeout=BREAK_OFF_LIMIT))
    else:
        await_only(driver.cancel_safe(timeout=BREAK_OFF_LIMIT))


def _is_patient(driver: Any) -> bool:
    """Whether the driver can give up: libpq before 17, and psycopg2 with any, stop all threads
    until the server hangs up.
    """
    if not hasattr(driver, "cancel_safe"):
        return False
    from psycopg import capabilities

    return capabilities.has_cancel_safe()
