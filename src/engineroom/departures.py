"""When a closed connection is really gone: once the server has let go of it as well.

A driver's `close()` returns while the server still counts the backend, for some milliseconds.
"""

from __future__ import annotations

import _thread
import asyncio
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

logger: logging.Logger = logging.getLogger("engineroom.pool")

GONE_LIMIT = 1.0  # seconds that a server has to let go
UNSEEN = 0.05  # seconds for a connection that failed on its way: its socket was never seen
LOOK_EVERY = 0.002  # seconds

Departure = tuple[int | None, float, Callable[[], object]]  # a descriptor, a deadline, what is next


class Departures:
    """Watches sockets until their servers have closed them, in one thread for the process.

    It is asked in destructors, too: nothing here waits for a lock.
    """

    def __init__(self) -> None:
        self.disown()

    def disown(self) -> None:
        """Start afresh, in a forked child as well: the thread is the parent's."""
        self._arriving: deque[Departure] = deque()
        self._on_duty = threading.Lock()  # held by the thread, while there is one

    def see_off(self, descriptor: int | None, then: Callable[[], object]) -> None:
        """Call `then` once the server has let go of a connection that the driver has closed.

        Args:
            descriptor: A duplicate of the connection's, which is closed here. None: it failed
                before it could be seen, so it gets a moment.
        """
        if descriptor is None:
            self._watch((None, time.monotonic() + UNSEEN, then))
            return
        shut(descriptor)
        os.set_blocking(descriptor, False)
        if hung_up(descriptor):
            os.close(descriptor)
            then()
        else:
            self._watch((descriptor, time.monotonic() + GONE_LIMIT, then))

    def _watch(self, departure: Departure) -> None:
        self._arriving.append(departure)
        if self._on_duty.acquire(blocking=False):
            try:
                # `threading.Thread.start()` takes locks that the interrupted line may hold.
                _thread.start_new_thread(self._run, ())
            except RuntimeError:  # the interpreter is at its end
                self._on_duty.release()

    def _run(self) -> None:
        """Watch until nothing is left; what comes between the last look and the release as well."""
        is_on_duty = True
        while is_on_duty:
            try:
                watched: list[Departure] = []
                while watched or self._arriving:
                    while self._arriving:
                        watched.append(self._arriving.popleft())
                    watched = [one for one in watched if not self._has_left(one)]
                    if watched:
                        time.sleep(LOOK_EVERY)
            finally:
                self._on_duty.release()
            is_on_duty = bool(self._arriving) and self._on_duty.acquire(blocking=False)

    def _has_left(self, departure: Departure) -> bool:
        descriptor, deadline, then = departure
        late = time.monotonic() >= deadline
        if descriptor is None:
            if not late:
                return False
        else:
            if not late and not hung_up(descriptor):
                return False
            if late:
                logger.info(
                    "A server did not let go of a closed connection within %g s", GONE_LIMIT
                )
            os.close(descriptor)
        then()
        return True


class Farewell:
    """Idle connections that are about to be closed: whether their servers have let go of all."""

    def __init__(self, descriptors: Iterable[int]) -> None:
        """Take duplicates of their sockets: who closes his own hears no more of the server."""
        self._descriptors: set[int] = set(descriptors)
        self._deadline = time.monotonic() + GONE_LIMIT

    def is_over(self) -> bool:
        """Whether nobody is left to be waited for."""
        late = time.monotonic() > self._deadline
        for descriptor in list(self._descriptors):
            shut(descriptor)
            os.set_blocking(descriptor, False)
            if late or hung_up(descriptor):
                os.close(descriptor)
                self._descriptors.remove(descriptor)
        return not self._descriptors

    def wait(self) -> None:
        """Wait until it is over, in a thread."""
        try:
            while not self.is_over():
                time.sleep(LOOK_EVERY)
        finally:
            self._leave()

    async def answered(self) -> None:
        """Wait until it is over, in an event loop."""
        try:
            while not self.is_over():  # noqa: ASYNC110  # a socket that nobody else may read from
                await asyncio.sleep(LOOK_EVERY)
        finally:
            self._leave()

    def _leave(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def hung_up(descriptor: int) -> bool:
    """Whether the other side has closed the connection: nothing more can be read.

    (`select.poll` could tell; but gevent puts one of its own there, which does not.)
    """
    try:
        while os.read(descriptor, 4096):  # its last words are for nobody
            pass
    except BlockingIOError:
        return False
    except OSError:  # it was reset
        pass
    return True


def shut(descriptor: int) -> None:
    """Say that nothing more will come: the driver has closed its own descriptor only."""
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as duplicate:
        duplicate.shutdown(socket.SHUT_WR)


DEPARTURES: Departures = Departures()
