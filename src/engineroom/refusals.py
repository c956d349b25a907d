"""What a client is told where the pool was empty, and what only the log is."""

from __future__ import annotations

import logging

from .errors import PoolExhausted
from .ledger import REQUEST

logger: logging.Logger = logging.getLogger("engineroom")

BUSY = "The service is busy. Please try again."
RETRY_AFTER = 1  # seconds that a client is asked to wait
TRY_AGAIN_LATER = 1013  # the code with which a WebSocket is closed


def pool_exhausted(error: BaseException | None) -> PoolExhausted | None:
    """Return the error of an empty pool, if it is one, or several that a task group has wrapped."""
    if isinstance(error, BaseExceptionGroup):
        found, other = error.split(PoolExhausted)
        error = None if other else found
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
    return error if isinstance(error, PoolExhausted) else None


def log_refusal(error: PoolExhausted) -> None:
    """Log what the client is not told, if it is still there."""
    request = REQUEST.get()
    if request is None or not request.is_abandoned:
        logger.warning("%s got no connection: %s", request, error)
