"""Who may hold a connection: permits and a fair queue; knows no loop, thread or driver."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, cast


class Permit:
    """The right to hold one connection, and what its holder is known by."""

    __slots__ = ("connection", "since", "task", "thread")

    def __init__(self) -> None:
        self.connection: Any = None
        self.task: Any = None
        self.thread: int = 0
        self.since: float = 0.0  # 0 while nobody holds it


class Ticket:
    """A place in the queue. Either it is granted a permit or its holder gives up: never both."""

    __slots__ = ("_undecided", "_wake", "permit")

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._undecided = [True]
        self.permit: Permit | None = None

    @property
    def waits(self) -> bool:
        """Whether it has neither its permit nor given up."""
        return bool(self._undecided)

    def _decide(self) -> bool:
        """Settle the ticket: True for the one caller who is first (a list's pop is atomic)."""
        try:
            return self._undecided.pop()
        except IndexError:
            return False

    @property
    def granted(self) -> Permit:
        """The permit of a ticket that was granted."""
        return cast(Permit, self.permit)

    def grant(self, permit: Permit) -> bool:
        """Hand over a permit and wake the waiter; False if it has given up."""
        self.permit = permit  # before the decision: the waiter reads it as soon as that has fallen
        if not self._decide():
            return False
        self._wake()
        return True

    def give_up(self) -> bool:
        """Leave the queue; False if the permit came first: then it is the caller's to give back."""
        return self._decide()


class Slots:
    """A fixed number of permits, lent first come, first served.

    Permits come back in destructors too, at any line of any thread, so handing out never waits for
    a lock: whoever finds it taken leaves word, and the one who holds it looks again.
    """

    def __init__(self, limit: int) -> None:
        self.permits: tuple[Permit, ...] = tuple(Permit() for _ in range(limit))
        self._free = deque(self.permits)
        self._queue: deque[Ticket] = deque()
        self._handing_out = threading.Lock()
        self._again = False

    def take(self) -> Permit | None:
        """Take a permit at once; None if there is none, or if others were here first."""
        if self._queue:
            return None
        try:
            return self._free.pop()
        except IndexError:
            return None

    def queue(self, wake: Callable[[], object]) -> Ticket:
        """Stand in the queue; `wake` is called, from any thread, once the ticket has its permit."""
        ticket = Ticket(wake)
        self._queue.append(ticket)
        self._hand_out()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Leave the queue; a permit that came just before goes back."""
        if not ticket.give_up():
            self.give(ticket.granted)

    def give(self, permit: Permit) -> None:
        """Give a permit back, and with it serve whoever waits longest."""
        permit.connection = permit.task = None
        permit.since = 0.0
        self._free.append(permit)
        if self._queue:
            self._hand_out()

    def _hand_out(self) -> None:
        self._again = True
        while self._again and self._handing_out.acquire(blocking=False):
            try:
                self._again = False
                while self._queue and self._free:
                    ticket = self._queue.popleft()
                    try:
                        permit = self._free.pop()
                    except IndexError:  # a `take` was faster
                        self._queue.appendleft(ticket)
                        break
                    if not ticket.grant(permit):  # it gave up: skip it
                        self._free.append(permit)
            finally:
                self._handing_out.release()

    @property
    def waiting(self) -> int:
        """How many wait in the queue."""
        return sum(ticket.waits for ticket in list(self._queue))

    @property
    def held(self) -> list[Permit]:
        """The permits that are lent."""
        return [permit for permit in self.permits if permit.since]
