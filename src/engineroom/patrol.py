"""Looks out for clients that leave, and ends what was done for them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from sqlalchemy.exc import SQLAlchemyError

from .engines import ROOMS
from .errors import EngineroomError
from .handed import HandedScope
from .ledger import Request
from .requests import Message, Receive
from .scopes import SyncScope

READ_AHEAD = 2**18  # bytes of a body that are read before the application asks for them
STOP_LIMIT = 1.0  # seconds for which what threads run on is stopped, after a client has gone


class Patrol:
    """Looks out for the client's leave, and cancels the task that serves it.

    It reads ahead of the application, but no more of a body than `READ_AHEAD`: memory is the
    client's to fill otherwise.
    """

    def __init__(self, receive: Receive, request: Request) -> None:
        self.has_cancelled: bool = False
        self._receive = receive
        self._served = asyncio.current_task()
        self._request = request
        self._messages: deque[Message] = deque()
        self._ahead = 0  # bytes
        self._arrived, self._taken = asyncio.Event(), asyncio.Event()
        self._is_on_duty = True
        self._watch = asyncio.ensure_future(self._look_out())

    async def receive(self) -> Message:
        """Return the next message, as the server's own `receive` would."""
        while not self._messages:
            if self._watch.done():
                self._watch.result()  # the server's own error
            self._arrived.clear()
            await self._arrived.wait()
        if self._messages[0]["type"] == "http.disconnect":  # however often it is asked for
            return self._messages[0]
        self._taken.set()
        message = self._messages.popleft()
        self._ahead -= size_of(message)
        return message

    def explains(self, error: BaseException) -> bool:
        """Whether it is what becomes of work that is cancelled, and no news to anybody."""
        if isinstance(error, BaseExceptionGroup):
            return all(map(self.explains, error.exceptions))
        return self.has_cancelled and any(
            isinstance(cause, EXPECTED) or type(cause).__name__ == "ClientDisconnect"  # Starlette's
            for cause in chain_of(error)
        )

    def stand_down(self) -> None:
        """Let the client go from now on: its response is complete."""
        self._is_on_duty = False

    async def end(self) -> None:
        """Stop looking out, and take back the cancellation."""
        if not self.has_cancelled:
            self._watch.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await self._watch
        if self.has_cancelled and self._served is not None:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)  # where it has not arrived yet, it does here
            if self._served.uncancel():
                raise asyncio.CancelledError

    async def _look_out(self) -> None:
        more = True
        try:
            while True:
                while more and self._ahead >= READ_AHEAD:
                    self._taken.clear()
                    await self._taken.wait()
                message = await self._receive()
                more = bool(message.get("more_body"))
                self._messages.append(message)
                self._ahead += size_of(message)
                self._arrived.set()
                if message["type"] == "http.disconnect":
                    break
        finally:
            self._arrived.set()
        if self._is_on_duty and self._served is not None:
            self.has_cancelled = self._request.is_abandoned = True
            self._served.cancel("the client has gone")
            await stop_threads(self._request)


def size_of(message: Message) -> int:
    """Return what it takes in memory, about: small ones count as well."""
    return len(message.get("body", b"")) + 512


# What cancelled work may raise: its sessions refuse use, its statements are stopped.
EXPECTED = (asyncio.CancelledError, EngineroomError, SQLAlchemyError, OSError)


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what it was raised from, or while that was handled."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


async def stop_threads(request: Request) -> None:
    """Stop what threads do for a request: what they run now, and what they would run next."""
    deadline = time.monotonic() + STOP_LIMIT
    while time.monotonic() < deadline:
        working = [
            (room, entry)
            for room in list(ROOMS)
            for entry in room.ledger
            if entry.request is request and isinstance(entry, SyncScope)
        ]
        if not working:
            break
        for room, entry in working:
            entry.retire(f"The client of {request} has gone. Its {entry.kind} is rolled back.")
            await asyncio.to_thread(room.interrupt, entry)
            if not isinstance(entry, HandedScope) and not entry.is_in_use():
                # A generator that was left where it stood: nobody else will ever end it.
                await asyncio.to_thread(entry.abandon)
        await asyncio.sleep(0.01)
