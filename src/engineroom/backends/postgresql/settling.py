"""psycopg's connections, which stop their statement on the server however they are interrupted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from traceback import clear_frames
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

from ...cancellation import settle
from .cancelling import BREAK_OFF_LIMIT, request_cancel

logger: logging.Logger = logging.getLogger("engineroom")

CANCEL_EVERY = 0.02  # seconds


@cache
def settling_connection() -> Any:
    """Make psycopg's connection a class that stops its statement however often it is cancelled.

    psycopg asks the server to cancel when its task is; but a second cancellation interrupts that
    request, and the statement runs on with its locks.
    """
    from psycopg import AsyncConnection, Error, waiting
    from psycopg.pq import TransactionStatus

    class SettlingConnection(AsyncConnection[Any]):
        def __init__(self, *args: Any, **kw: Any) -> None:
            super().__init__(*args, **kw)
            self.server_cursor_factory = _settling_cursor()

        @classmethod
        async def connect(cls, *args: Any, **kw: Any) -> Any:
            """Connect; a connection that is half made ends with the frames that hold it.

            psycopg closes it nowhere: whoever keeps the error would keep the backend as well.
            """
            with _clearing_frames():
                return await super().connect(*args, **kw)

        async def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            try:
                return await waiting.wait_async(gen, self.pgconn.socket, interval, timeout)
            except asyncio.CancelledError:
                await settle(self._break_off())
                raise

        async def _break_off(self) -> None:
            """Ask until the server has answered: a request may overtake its own statement."""
            try:
                if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                    _synchronize(self.pgconn)
                    async with asyncio.timeout(BREAK_OFF_LIMIT):
                        await self.cancel_safe(timeout=BREAK_OFF_LIMIT)
                        while _is_at_work(self.pgconn):
                            await asyncio.sleep(CANCEL_EVERY)
                            await self.cancel_safe(timeout=BREAK_OFF_LIMIT)
            except (TimeoutError, Error) as error:
                logger.info("A cancelled statement may run on: %r", error)
            finally:
                self.pgconn.finish()

    return SettlingConnection


def interruptible(connect: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a way to connect: psycopg's connections become such that a signal can interrupt."""
    import psycopg

    kind = _interruptible_connection()

    def connect_interruptible(*args: Any, **kw: Any) -> Any:
        if psycopg.connect == psycopg.Connection.connect:
            return kind.connect(*args, **kw)
        opened = connect(*args, **kw)  # some instrumentation's
        if type(opened) is psycopg.Connection:  # (Python 3.13 finds its attributes slowly then)
            opened.__class__ = kind
        return opened

    return connect_interruptible


@cache
def _interruptible_connection() -> Any:
    """Make psycopg's synchronous connection a class that stops its statement for any signal.

    psycopg does so for Ctrl-C alone, for up to ten seconds, while others raise what they like in
    the handler of a signal, as Celery does its `SoftTimeLimitExceeded`.
    """
    from psycopg import Connection, Error, waiting
    from psycopg.pq import TransactionStatus

    class InterruptibleConnection(Connection[Any]):
        was_broken_off = False

        def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            try:
                return waiting.wait(gen, self.pgconn.socket, interval, timeout)
            except Error:
                raise
            except BaseException as error:
                # In a pipeline a value that cannot be sent is found while BEGIN is under way; what
                # the generator has raised itself has ended it.
                is_its_own = self.pgconn.pipeline_status and getattr(gen, "gi_frame", gen) is None
                is_at_work = self.pgconn.transaction_status == TransactionStatus.ACTIVE
                if is_at_work and not (is_its_own and isinstance(error, Exception)):
                    self.break_off()
                raise

        def break_off(self) -> None:
            deadline = time.monotonic() + BREAK_OFF_LIMIT
            try:
                _synchronize(self.pgconn)
                request_cancel(self)
                while _is_at_work(self.pgconn) and time.monotonic() < deadline:
                    time.sleep(CANCEL_EVERY)
                    request_cancel(self)
            except Error as error:
                logger.info("An interrupted statement may run on: %r", error)
            finally:
                self.was_broken_off = True
                self.pgconn.finish()

    return InterruptibleConnection


def break_off(driver: Any) -> None:
    """End what a connection does, and the connection."""
    if hasattr(driver, "break_off"):
        driver.break_off()
    driver.pgconn.finish()


def watch_broken_off(engine: Engine) -> None:
    """Have SQLAlchemy part with a connection that a signal has interrupted, whatever was raised.

    By itself it does so for Ctrl-C, and would go on with what is closed for any `Exception`.
    """
    event.listen(engine, "handle_error", _part)


def _part(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    if getattr(connection.connection.driver_connection, "was_broken_off", False):
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False  # the others are as they were


def _synchronize(pgconn: Any) -> None:
    """Ask, in a pipeline, for an answer that comes behind all others."""
    if pgconn.pipeline_status:
        pgconn.pipeline_sync()


def _is_at_work(pgconn: Any) -> bool:
    """Whether the server still works; in a pipeline, the answer to Sync says that it does not."""
    from psycopg.pq import ConnStatus, ExecStatus

    pgconn.consume_input()
    while pgconn.pipeline_status and pgconn.status == ConnStatus.OK and not pgconn.is_busy():
        result = pgconn.get_result()  # (None parts those of two commands)
        if result is not None and result.status == ExecStatus.PIPELINE_SYNC:
            return False
    return bool(pgconn.is_busy())


@cache
def _settling_cursor() -> Any:
    """Make psycopg's cursor a class that is closed though its closing is cancelled."""
    from psycopg import AsyncServerCursor

    class SettlingCursor(AsyncServerCursor[Any]):
        async def close(self) -> None:
            await settle(super().close())  # interrupted, psycopg would warn that it is open still

    return SettlingCursor


@contextmanager
def _clearing_frames() -> Generator[None]:
    """Let go of what the frames hold that an error has come through."""
    try:
        yield
    except BaseException as error:
        clear_frames(error.__traceback__)
        raise
