"""What `close()` does: let scopes end, roll back those that do not, and leave no connection."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from sqlalchemy.util import greenlet_spawn

from .backends import Role, Side
from .cancellation import settle
from .departures import Farewell
from .engines import END_LIMIT, EngineRoom
from .errors import CloseInsideScope, SyncInAsync
from .lending import Lender
from .lifecycle import State
from .pool import Shelf

logger: logging.Logger = logging.getLogger("engineroom")

LOOK_EVERY = 0.01  # seconds between two looks at the ledger
CONNECT_LIMIT = 1.0  # seconds for connections that are just being opened, which are closed then
POOL_LIMIT = 5.0  # seconds for the end of one pool, before `close()` goes on without it
STOPPED_FOR = 0.1  # seconds; a loop that runs one job after another stands still for microseconds


def close(room: EngineRoom, timeout: float | None) -> None:
    """Drain and close, from a thread."""
    refuse_in_loop(room)
    if not start(room):
        return
    deadline = deadline_of(room, timeout)
    try:
        while room.ledger and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY)
    finally:
        retire_overdue(room)
        try:
            opened_by = time.monotonic() + CONNECT_LIMIT
            while connecting(room) and time.monotonic() < opened_by:
                time.sleep(LOOK_EVERY)
            farewell = say_farewell(room)
            try:
                for pool in list(room.lenders()):
                    end_now(room, *pool)
            finally:
                farewell.wait()
        finally:
            room.clear()


def end_now(
    room: EngineRoom,
    side: Side,
    role: Role,
    loop: asyncio.AbstractEventLoop | None,
    lender: Lender,
) -> None:
    """End a pool, from a thread, and wait for it."""
    with log_failure():
        if elsewhere := end_where_it_belongs(room, side, role, loop, lender):
            deadline = time.monotonic() + POOL_LIMIT
            while elsewhere.is_pending():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"its loop did not end a pool within {POOL_LIMIT:g} s")
                time.sleep(LOOK_EVERY)


async def aclose(room: EngineRoom, timeout: float | None) -> None:
    """Drain and close, from an event loop; a cancellation ends the waiting, not the closing."""
    if not start(room):
        return
    deadline = deadline_of(room, timeout)
    try:
        while room.ledger and time.monotonic() < deadline:  # noqa: ASYNC110  # it has many writers
            await asyncio.sleep(LOOK_EVERY)
    finally:
        retire_overdue(room)
        pools = sum(1 for _ in room.lenders())
        await settle(end_pools_and_clear(room), CONNECT_LIMIT + POOL_LIMIT * (pools + 1))


async def end_pools_and_clear(room: EngineRoom) -> None:
    """End every pool, and forget the engines."""
    try:
        await end_pools(room)
    finally:
        room.clear()


async def end_pools(room: EngineRoom) -> None:
    """End every pool, each in the loop that its connections belong to."""
    deadline = time.monotonic() + CONNECT_LIMIT
    while connecting(room) and time.monotonic() < deadline:  # noqa: ASYNC110  # as above
        await asyncio.sleep(LOOK_EVERY)

    async def end_one(pool: tuple[Side, Role, asyncio.AbstractEventLoop | None, Lender]) -> None:
        with log_failure():
            async with asyncio.timeout(POOL_LIMIT):
                if elsewhere := await greenlet_spawn(end_where_it_belongs, room, *pool):
                    while await greenlet_spawn(elsewhere.is_pending):  # noqa: ASYNC110  # it may stop
                        await asyncio.sleep(LOOK_EVERY)

    farewell = say_farewell(room)
    try:
        await asyncio.gather(*(end_one(pool) for pool in list(room.lenders())))
    finally:
        await farewell.answered()


class Elsewhere:
    """The end of a pool that another thread's loop was asked for."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        shelf: Shelf,
        end: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._loop = loop
        self._shelf = shelf
        self._over = shelf.end_there(end)
        self._ran = time.monotonic()  # when the loop was last seen to run

    def is_pending(self) -> bool:
        """Whether the loop has yet to end the pool; of one that does not go on, it is ended here.

        Raises:
            Exception: what the end of the pool has raised.
        """
        if self._over.done():
            if not self._over.cancelled():
                self._over.result()
            return False
        if self._loop.is_running():
            self._ran = time.monotonic()
        if not self._loop.is_closed() and time.monotonic() - self._ran < STOPPED_FOR:
            return True
        self._shelf.reap(self._loop)  # nothing, unless it was stopped or closed by hand
        return False


def say_farewell(room: EngineRoom) -> Farewell:
    """Take leave of what lies idle: a driver's `close()` may return before the server has ended."""
    return Farewell(
        descriptor
        for _, _, loop, lender in room.lenders()
        if loop is None or not loop.is_closed()  # (their sockets are closed, or will be)
        for descriptor in lender.duplicate_idle()
    )


def connecting(room: EngineRoom) -> bool:
    """Whether a connection is just being opened: it is nobody's yet, and cannot be ended.

    To its opening belong what SQLAlchemy asks, and the listeners of the application.
    """
    return any(
        permit.connection is None
        for _, _, loop, lender in room.lenders()
        if loop is None or loop.is_running()  # or nobody goes on with it
        for permit in lender.slots.held
    )


def end_where_it_belongs(
    room: EngineRoom,
    side: Side,
    role: Role,
    loop: asyncio.AbstractEventLoop | None,
    lender: Lender,
) -> Elsewhere | None:
    """End a pool in the loop of its connections, or without it where that does not run.

    Returns:
        What ends with it, if that is another thread's work.
    """
    work = partial(end_pool, room, side, role, lender)
    if loop is None or loop is asyncio._get_running_loop():
        work()
    elif loop.is_running():
        return Elsewhere(loop, cast(Shelf, lender), partial(greenlet_spawn, work))
    else:
        lender.reap(loop)
    return None


def end_pool(room: EngineRoom, side: Side, role: Role, lender: Lender) -> None:
    """End what runs on a pool's connections, and close them."""
    overdue = lender.lent()
    if overdue:
        with log_failure():
            room.backend.end(overdue, partial(room.work_apart, side, role, seconds=END_LIMIT))
    lender.end()


def start(room: EngineRoom) -> bool:
    """Refuse new scopes from now on; False if there is nothing to close.

    Raises:
        CloseInsideScope: the caller is inside a scope, and would wait for itself.
    """
    if room.sandbox is not None or not room.life.allows("close"):
        return False
    refuse_inside(room)
    room.life.enter(State.CLOSING)
    return True


def refuse_in_loop(room: EngineRoom) -> None:
    """Refuse to wait, in a thread, for the event loop that this thread runs.

    Raises:
        SyncInAsync: it has connections of the room.
    """
    running = asyncio._get_running_loop()
    if running is not None and any(loop is running for _, _, loop, _ in room.lenders()):
        raise SyncInAsync(
            "close() of the synchronous side was called inside the event loop whose connections it "
            "would close, and would wait for itself. Close the manager: await manager.close()."
        )


def refuse_inside(room: EngineRoom) -> None:
    """Refuse to close where the end of a scope would be waited for inside of it.

    Raises:
        CloseInsideScope: the caller is inside a scope.
    """
    if any(entry.belongs_here() for entry in room.ledger):
        gc.collect()  # one whose end Ctrl-C prevented may be nobody's any more
    for entry in room.ledger:
        if entry.belongs_here():
            raise CloseInsideScope(
                f"close() was called inside the {entry.kind} opened at {entry.where}, and would "
                "wait for it to end. Close after it."
            )


def deadline_of(room: EngineRoom, timeout: float | None) -> float:
    """Return when running scopes must have ended."""
    return time.monotonic() + (room.settings.close_timeout if timeout is None else timeout)


def latest(rooms: Iterable[EngineRoom], timeout: float | None) -> float:
    """Return when the running scopes of several rooms must have ended."""
    return max((deadline_of(room, timeout) for room in rooms), default=time.monotonic())


def retire_overdue(room: EngineRoom) -> None:
    """Say which scopes did not end in time; from here on they are dead, and say so at any use."""
    room.retire_loose(f"{room.life.name} was closed before this session. Close the session first.")
    for _, _, _, lender in room.lenders():
        lender.refuse(
            f"{room.life.name} was closed while this waited for a connection. Close it when the "
            "work is done, or give close(timeout=…) more time."
        )
    for entry in room.ledger:
        entry.is_overdue = True
        if entry.obituary:  # (its owner has yet to notice)
            continue
        seconds = time.monotonic() - entry.since
        logger.warning(
            "close() rolls back %s %.1f s ago: it did not end in time",
            entry,
            seconds,
        )
        entry.retire(
            f"{room.life.name} was closed {seconds:.1f} s after this {entry.kind} was opened at "
            f"{entry.where}, and rolled it back. End it sooner, or give close(timeout=…) more time."
        )


@contextmanager
def log_failure() -> Generator[None]:
    """Log what a clean-up could not do, and go on with the next."""
    try:
        yield
    except Exception:
        logger.exception("A part of close() failed; connections may be open still")
