"""When a closed connection is really gone: once the server has let go of it as well.

A driver's `close()` returns while the server still counts the backend, for some milliseconds.
"""

from __future__ import annotations

import _thread
import logging
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

logger: logging.Logger = logging.getLogger("engineroom.pool")

# POLLRDHUP, where the platform has it: the other side has closed its half of the connection.
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR | select.POLLNVAL

GONE_LIMIT = 1.0  # seconds that a server has to let go
UNSEEN = 0.05  # seconds for a connection that failed on its way: its socket was never seen
LOOK_EVERY = 2  # milliseconds
LINGER = 0.1  # seconds without anything to watch, after which the thread ends

Departure = tuple[int | None, float, Callable[[], object]]  # a descriptor, a deadline, what is next


class Departures:
    """Watches sockets until their servers have closed them, in one thread for the process.

    It is asked in destructors, too: nothing here waits for a lock.
    """

    def __init__(self) -> None:
        self.disown()

    def disown(self) -> None:
        """Start afresh, in a forked child as well: the thread is the parent's."""
        self._arriving: queue.SimpleQueue[Departure] = queue.SimpleQueue()
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
        if hung_up(descriptor):
            os.close(descriptor)
            then()
        else:
            self._watch((descriptor, time.monotonic() + GONE_LIMIT, then))

    def _watch(self, departure: Departure) -> None:
        self._arriving.put(departure)
        if self._on_duty.acquire(blocking=False):
            try:
                # `threading.Thread.start()` takes locks that the interrupted line may hold.
                _thread.start_new_thread(self._run, ())
            except RuntimeError:  # the interpreter is at its end
                self._on_duty.release()

    def _run(self) -> None:
        watched: list[Departure] = []
        try:
            while True:
                with suppress(queue.Empty):
                    while True:
                        watched.append(self._arriving.get(not watched, LINGER))
                if not watched:
                    break
                watched = [one for one in watched if not self._has_left(one)]
                if watched:
                    time.sleep(LOOK_EVERY / 1000)
        finally:
            self._on_duty.release()
        if not self._arriving.empty() and self._on_duty.acquire(blocking=False):
            self._run()  # it came between the last look and the release

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


def hung_up(descriptor: int) -> bool:
    """Whether the other side has closed the connection."""
    watcher = select.poll()
    watcher.register(descriptor, HUNG_UP)
    return bool(watcher.poll(0))


def shut(descriptor: int) -> None:
    """Say that nothing more will come: the driver has closed its own descriptor only."""
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as duplicate:
        duplicate.shutdown(socket.SHUT_WR)


DEPARTURES: Departures = Departures()
