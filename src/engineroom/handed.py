"""Synchronous sessions that a framework ends, whichever thread or event loop used them last."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection

from .cancellation import settle
from .ledger import applications_line, is_inside
from .pool import Reservations
from .scopes import SessionScope, mind_the_loop, triple


class FrameworkScope(SessionScope):
    """A session that a framework ends, whichever thread or event loop used it last."""

    def can_end(self) -> bool:
        """Whether somebody may still leave it."""
        return True

    def may_be_elsewhere(self) -> bool:
        """Whether its thread may serve another by now: not before the framework has left it."""
        return False


class HandedScope(FrameworkScope):
    """A synchronous session that a framework hands from thread to thread, for one request.

    It is entered and left on the framework's event loop; statements and its end run in threads.
    """

    _reservations: Reservations | None = None

    def open(self) -> Session:
        """Open the session; no thread has it yet."""
        session = self.__enter__()
        self.thread: int = 0
        self.task: asyncio.Task[Any] | None = None
        return session

    @property
    def holder(self) -> Any:
        """The request: its threads change."""
        return self.request

    def mind_the_loop(self) -> None:
        """Let it be opened there: what matters is where it is used."""

    @property
    def has_work(self) -> bool:
        """Whether its end sends anything, or calls what may."""
        return self.hooks is not None or self._resource.in_transaction()

    async def reserve(self) -> None:
        """Wait on the event loop for the permit of its first connection, instead of in a thread.

        Raises:
            PoolExhausted: none came free in time.
            PoolDeadlock: none ever would.
        """
        pool: Any = self._room.engine(*self._target[:2]).pool
        self._reservations = await pool.reserve(self)

    def move_here(self) -> None:
        """Note that a thread goes on with the session; it takes what was reserved."""
        if asyncio._get_running_loop() is not None:
            line = applications_line()
            mind_the_loop(
                self._room, self.kind, *line, "Declare AsyncSessionDep there, or write def"
            )
        super().move_here()
        if self._reservations is not None:
            self._reservations.hand_to(self.thread)

    def hold(self, connection: PoolProxiedConnection) -> None:
        """Note which connection the session uses; of what was reserved it needs no more."""
        super().hold(connection)
        if self._reservations is not None:
            self._reservations.cancel()

    async def leave(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """End the session on the event loop: in a thread, if its end has anything to do."""
        from anyio.lowlevel import checkpoint_if_cancelled  # Flask comes here without anyio

        if isinstance(error, asyncio.CancelledError):
            # In a task of its own: where anyio cancels a scope, nothing can be awaited.
            await settle(self._leave_cancelled(error))
        elif self.is_open and self.has_work:
            try:
                await checkpoint_if_cancelled()  # while its thread worked, nobody noticed
            except asyncio.CancelledError as cancelled:
                await settle(self._leave_cancelled(cancelled))
                raise
            await settle(self._leave_in_thread(error), None)
        else:
            self.__exit__(kind, error, traceback)

    async def _leave_cancelled(self, error: asyncio.CancelledError) -> None:
        """Have the thread that is left alone with the session leave it, and its statement end."""
        session = self._resource
        while is_inside(self.thread, session):
            self.retire(f"{self.request} was cancelled. What a thread does for it ends here.")
            await asyncio.to_thread(self._room.interrupt, self)
            await asyncio.sleep(0.01)
        await self._leave_in_thread(error)

    async def _leave_in_thread(self, error: BaseException | None) -> None:
        from anyio import CapacityLimiter, to_thread

        # A limiter of its own: those that are usual may be taken by threads that wait for this one.
        await to_thread.run_sync(self.__exit__, *triple(error), limiter=CapacityLimiter(1))

    def _leave(self) -> None:
        super()._leave()
        if self._reservations is not None:
            self._reservations.cancel()
