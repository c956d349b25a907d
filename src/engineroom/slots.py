"""Who may hold a connection: permits, a fair queue, growth, and who waits for whom.

It knows no loop, thread or driver: an owner is any object, and whoever waits says how it is woken.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, cast

GROW_AFTER = 0.01  # seconds without a return before a connection beyond `pool_size` is opened
CONNECTS_AT_ONCE = 5  # beyond `pool_size`: a server that is slow to connect gets no more of them
NO_OPTIONS: Mapping[str, Any] = {}
RECOVER_AFTER = 1.0  # seconds that a permit was nobody's, before it is taken for lost


@dataclass(slots=True)
class Marks:
    """What befalls few who hold a permit."""

    statement_within: float | None = None  # seconds that are the scope's own; else the pool's
    failed_after: tuple[float, float] | None = None  # seconds idle, and run, of the last statement
    epitaph: str = ""  # why its connection was cut
    is_reported: bool = False  # held too long, and the log has said so
    is_interrupted: bool = False  # from outside: what did that may still be on its way


class Permit:
    """The right to hold one connection, and what its holder is known by."""

    __slots__ = (
        "answered",
        "connection",
        "cursor",
        "entry",
        "is_marked",
        "key",
        "marks",
        "options",
        "owner",
        "running",
        "since",
        "statement",
        "statement_since",
        "waited",
    )

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the holder."""
        self.owner: Any = None  # a task, or a thread's identifier; a scope's `entry`; None: nobody
        self.connection: Any = None  # a weak reference, once it is open
        self.key: int = 0  # of that connection, in `LENT`
        self.entry: Any = None  # a weak reference to the scope that uses it
        self.since: float = 0.0
        self.waited: float = 0.0  # seconds in the queue before
        self.statement: str = ""  # the last one
        self.options: Mapping[str, Any] = NO_OPTIONS  # its execution options
        self.statement_since: float = 0.0  # when it began; when it ended, if it runs no more
        self.answered: float = 0.0  # when the last statement ended; a COMMIT may send nothing
        self.running: bool = False
        self.cursor: Any = None  # what runs the statement; None of COMMIT and ROLLBACK
        self.marks: Marks = Marks()  # to look at
        self.is_marked: bool = False

    @property
    def scope(self) -> Any:
        """The scope that uses its connection; None if there is none, or nobody has it any more."""
        entry = self.entry
        return None if entry is None else entry()

    def mark(self) -> Marks:
        """Return its marks to write to."""
        self.is_marked = True
        return self.marks

    @property
    def lent(self) -> Permit:
        """The permit that knows who has the connection: this one."""
        return self


DISMISSED = Permit()  # stands in a ticket that was sent away


class Ticket:
    """A place in the queue. Either it is granted a permit or its holder gives up: never both."""

    __slots__ = ("_outcome", "_wake", "lender", "offered", "owner", "since", "slots")

    def __init__(
        self, slots: Slots, owner: object, wake: Callable[[], object], lender: object = None
    ) -> None:
        self.slots: Slots = slots
        self.owner: object = owner
        self.lender: object = lender  # the pool that waits here
        self.offered: Permit | None = None  # what it is just being granted
        self.since: float = time.monotonic()
        self._wake = wake
        self._outcome: dict[str, Permit | None] = {}  # what came first; `setdefault` is atomic

    @property
    def waits(self) -> bool:
        """Whether it has neither its permit nor given up."""
        return not self._outcome

    @property
    def granted(self) -> Permit:
        """The permit of a ticket that was granted."""
        return cast(Permit, self._outcome["first"])

    def grant(self, permit: Permit) -> bool:
        """Hand over a permit and wake the waiter; False if it has given up, or is no more."""
        try:
            self.offered = permit
            permit.owner, permit.since = self.owner, time.monotonic()
            if self._outcome.setdefault("first", permit) is permit and self._is_woken():
                return True
        except BaseException:  # Ctrl-C in between
            if self._outcome.get("first") is permit:
                self._is_woken()
            else:
                permit.clear()
            raise
        permit.clear()
        return False

    def give_up(self) -> bool:
        """Want a permit no more; False if one came first: then it is the caller's to give back."""
        return self._outcome.setdefault("first", None) in (None, DISMISSED)

    def dismiss(self) -> None:
        """Wake the waiter without a permit."""
        if self._outcome.setdefault("first", DISMISSED) is DISMISSED:
            self._is_woken()

    def _is_woken(self) -> bool:
        try:
            self._wake()
        except RuntimeError:  # its event loop was closed: it never goes on
            return False
        return True


# Where each owner waits that does; and an event loop, where a thread that runs it waits.
WAITING: dict[object, Ticket] = {}


class Reservation:
    """A permit that was waited for beforehand; a thread takes it at its first checkout."""

    __slots__ = ("_permit", "_slots", "_thread")

    def __init__(self, slots: Slots, permit: Permit, entry: Any) -> None:
        """Hold the permit for a scope (a weak reference), which from here on is its owner."""
        permit.owner = permit.entry = entry
        self._slots = slots
        self._permit: Permit | None = permit
        self._thread: object = None

    def hand_to(self, thread: object) -> None:
        """Have this thread take it next."""
        self._withdraw()
        if self._permit is not None:
            self._thread = thread
            self._slots.reserved.setdefault(thread, []).append(self)

    def use(self, owner: object) -> Permit | None:
        """Take the permit."""
        self._withdraw()
        permit, self._permit = self._permit, None
        if permit is not None:
            permit.owner, permit.entry = owner, None
        return permit

    def cancel(self) -> None:
        """Give the permit back, unless it was used."""
        self._withdraw()
        permit, self._permit = self._permit, None
        if permit is not None:
            self._slots.give(permit)

    def _withdraw(self) -> None:
        waiting = self._slots.reserved.get(self._thread, [])
        if self in waiting:
            waiting.remove(self)
        if not waiting:
            self._slots.reserved.pop(self._thread, None)


class Slots:
    """So many permits, lent first come, first served.

    `size` of them are there at once. Those beyond, the overflow, are handed out by `grow()`: short
    units of work are over before a connection more would be open.

    Permits come back in destructors too, at any line of any thread, so handing out never waits for
    a lock: whoever finds it taken leaves word, and the one who holds it looks again.
    """

    permit_class: ClassVar[type[Permit]] = Permit

    def __init__(self, size: int, overflow: int = 0) -> None:
        self.size: int = size
        self.permits: tuple[Permit, ...] = tuple(
            self.permit_class() for _ in range(size + overflow)
        )
        # One for each connection that is being opened; weakly, for Ctrl-C may strike anywhere.
        self.connecting: weakref.WeakSet[Any] = weakref.WeakSet()
        self.reserved: dict[object, list[Reservation]] = {}  # by the thread that takes them next
        self.came_back: float | None = None  # when a connection last was ready for the next
        self._free = deque(self.permits[:size])
        self._spare = deque(self.permits[size:])
        self._queue: deque[Ticket] = deque()
        self._handing_out = threading.Lock()
        self._again = False
        self._suspects: dict[object, float] = {}  # what `recover` thinks lost, and since when

    def take(self, owner: object = None) -> Permit | None:
        """Take a permit at once; None if there is none, or if others were here first."""
        if self.reserved and (reservations := self.reserved.get(owner)):
            return reservations[-1].use(owner)
        if self._queue:
            return None
        try:
            permit = self._free.pop()
        except IndexError:
            return None
        permit.owner = owner
        return permit

    def queue(self, owner: object, wake: Callable[[], object], lender: object = None) -> Ticket:
        """Stand in the queue; `wake` is called, from any thread, once the ticket has its permit.

        It raises RuntimeError where nobody can be woken any more.
        """
        ticket = Ticket(self, owner, wake, lender)
        self._queue.append(ticket)
        if self._free:  # one came back just now: who gives back later looks at the queue
            self._hand_out()
        return ticket

    def serve(self, ticket: Ticket, permit: Permit) -> bool:
        """Hand a permit to one in the queue, out of turn; False if that one has given up."""
        if not ticket.grant(permit):
            return False
        with suppress(ValueError):  # it is just being skipped
            self._queue.remove(ticket)
        return True

    def leave(self, ticket: Ticket) -> bool:
        """Leave the queue; False if a permit came first: then it is the caller's to give back."""
        if not ticket.give_up():
            return False
        with suppress(ValueError):  # it was dismissed, or is just being skipped
            self._queue.remove(ticket)
        return True

    def forsake(self, owner: object) -> None:
        """Take back what an owner was about to connect with, at whatever line it was interrupted.

        What it has connected with already is passed over.
        """
        for ticket in self.waiters:
            if ticket.owner == owner:
                self.leave(ticket)
        for permit in self.permits:
            if permit.owner == owner and permit.connection is None:
                self.give(permit)

    def recover(self) -> None:
        """Take back what was lost between two lines, where Ctrl-C can strike: asked now and then.

        For a moment a permit is nobody's whenever it changes hands. So it must have been for long.
        """
        lost: list[Any] = self.nobodys()
        if lost:
            ours = {*self._free, *self._spare}
            lost = [one for one in lost if one not in ours]
        if self._queue and self._free:
            lost.append(self._handing_out)
        if not (lost or self._suspects):  # the common case, and who begins to wait asks
            return
        now = time.monotonic()
        self._suspects = {one: self._suspects.get(one, now) for one in lost}
        for one, since in list(self._suspects.items()):
            if now - since >= RECOVER_AFTER:
                del self._suspects[one]
                if isinstance(one, Permit):
                    self.give(one)
                else:  # it was left locked
                    self._handing_out = threading.Lock()
                    self._hand_out()

    def nobodys(self) -> list[Permit]:
        """Return the permits that are nobody's, who would give them back."""
        return [permit for permit in self.permits if permit.owner is None]

    def give(self, permit: Permit) -> None:
        """Give a permit back, and with it serve whoever waits longest."""
        # `clear()`, written out: every return passes here.
        permit.owner = permit.connection = permit.entry = permit.cursor = None
        permit.since = permit.waited = permit.statement_since = permit.answered = 0.0
        permit.statement, permit.options = "", NO_OPTIONS
        permit.running, permit.key = False, 0
        if permit.is_marked:
            permit.is_marked, permit.marks = False, Marks()
        self.came_back = time.monotonic()
        self._free.append(permit)
        if self._queue:
            self._hand_out()
        if len(self._free) > self.size:
            self._shrink()

    def _shrink(self) -> None:
        with suppress(IndexError):  # a `take` was faster
            self._spare.append(self._free.pop())

    def make_room(self) -> None:
        """Have others give way to those who wait; in one pool there is nobody who could."""

    def dismiss(self) -> None:
        """Send everyone in the queue away, without a permit."""
        for ticket in self.waiters:
            ticket.dismiss()

    def connected(self) -> None:
        """Note that a connection was opened: one of the first `size` may now be waited for."""
        if len(self._spare) == self.overflow:
            self.came_back = time.monotonic()

    @property
    def may_lend(self) -> bool:
        """Whether nobody has to wait."""
        return not self._queue and bool(self._free or self._spare)

    @property
    def may_grow(self) -> bool:
        """Whether waiting may be met by opening one more."""
        return bool(self._spare)

    def grow(self) -> bool:
        """Hand out overflow to those who wait, if no connection came back lately.

        Returns:
            Whether more of it may be handed out later.
        """
        lately = self.came_back is None or time.monotonic() - self.came_back < GROW_AFTER
        more = 0 if lately else min(CONNECTS_AT_ONCE - len(self.connecting), self.waiting)
        for _ in range(more):
            try:
                self._free.append(self._spare.pop())
            except IndexError:
                break
        self._hand_out()
        return bool(self._spare and self.waiting)

    def _hand_out(self) -> None:
        self._again = True
        while self._again and (turn := self._handing_out).acquire(blocking=False):
            try:
                self._again = False
                while self._queue and self._free:
                    ticket: Ticket | None = None
                    try:
                        ticket = self._queue.popleft()
                        permit = self._free.pop()
                        if not ticket.grant(permit):  # it gave up: skip it
                            self._free.append(permit)
                    except BaseException as error:
                        if ticket is not None and ticket.waits:
                            self._queue.appendleft(ticket)
                        if not isinstance(error, IndexError):  # Ctrl-C; else others were faster
                            raise
                        break
            finally:
                turn.release()

    @property
    def overflow(self) -> int:
        """How many permits there are beyond `size`."""
        return len(self.permits) - self.size

    @property
    def waiters(self) -> list[Ticket]:
        """The tickets that wait, first come first."""
        return [ticket for ticket in list(self._queue) if ticket.waits]

    @property
    def waiting(self) -> int:
        """How many wait in the queue: who gives up leaves it."""
        return len(self._queue)

    @property
    def held(self) -> list[Permit]:
        """The permits that are lent."""
        return [permit for permit in self.permits if permit.owner is not None]

    def deadlocked(self) -> list[Slots]:
        """Return the slots that can never serve again, this one first; none if this one can.

        Each of their permits is held by someone who waits for another of them. It is enough to ask
        when somebody begins to wait: nothing else makes a holder one who waits.
        """
        if self._can_serve():  # the common case, and a cheap one: somebody waits for nothing
            return []
        stuck = list(self._reachable())
        while freed := [slots for slots in stuck if slots._can_serve(stuck)]:
            stuck = [slots for slots in stuck if slots not in freed]
        return stuck if self in stuck else []

    def _reachable(self) -> Iterator[Slots]:
        """Yield this one, and every other that its holders wait for, and the holders of those."""
        seen: list[Slots] = []
        ahead: list[Slots] = [self]
        while ahead:
            slots = ahead.pop()
            if slots not in seen:
                seen.append(slots)
                yield slots
                for permit in slots.permits:
                    ahead += [ticket.slots for ticket in _awaited_by(permit)]

    def _can_serve(self, stuck: list[Slots] | None = None) -> bool:
        """Whether a permit is free, on its way, or held by one who waits for none of `stuck`."""
        return any(
            not any(stuck is None or ticket.slots in stuck for ticket in _awaited_by(permit))
            for permit in self.permits
        )


def _awaited_by(permit: Permit) -> Iterator[Ticket]:
    """Yield what a holder waits for: its own ticket, and one that its event loop stands still for.

    A ticket that was granted counts no more, nor one that is just being granted this very permit,
    nor one whose task is cancelled, though none of them may have run yet. And who took a connection
    without a scope, or may have handed his scope on, may do something else by now, while somebody
    works with it; but not before it is connected.
    """
    asked, permit = permit, permit.lent
    entry = permit.scope
    if entry is None and permit.connection is not None:
        return
    owner = permit.owner if entry is None else entry.holder
    in_loop = hasattr(owner, "get_loop")
    for key in (owner, owner.get_loop()) if in_loop else (owner,):
        ticket = WAITING.get(key)
        if ticket is None or not ticket.waits or ticket.offered is asked:
            continue
        if not (in_loop and owner.cancelling()) and not (
            entry is not None and entry.may_be_elsewhere()
        ):
            yield ticket
