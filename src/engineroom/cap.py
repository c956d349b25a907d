"""How many connections there may be over several pools, and whose gives way at the limit.

Each connection has a place from before it is opened until the server has let go of it.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast

from . import departures
from .departures import DEPARTURES
from .errors import Holder, InvalidOption
from .ledger import current_owner, describe, has_ended
from .slots import Permit, Slots, Ticket

VARIABLE = "DB_MAX_CONNECTIONS"

# For so many times what it took to open it, a connection first serves those who wait in its own
# pool, for they need not connect. Then it is the turn of whoever waits longest.
TURN = 10
LONGEST_TURN = 1.0  # seconds
STUCK_AFTER = 0.9  # seconds in which a connection that was asked to give way should be closed
ANSWERS_WITHIN = 0.1  # seconds in which an event loop begins with that, if nothing blocks it


@dataclass(frozen=True, slots=True)
class CapInfo:
    """A limit over several pools as it is right now."""

    name: str
    """`DB_MAX_CONNECTIONS`, or what the limit of a group is called."""
    limit: int
    """The connections that there may be."""
    open: int
    """Those that there are, those being opened and those being closed included."""
    waiting: int
    """Callers that wait until they may open one."""

    def __str__(self) -> str:
        return f"{self.name}: {self.open} of {self.limit} open, {self.waiting} waiting"


class Pool(Protocol):
    """A pool whose connections count."""

    name: ClassVar[str]

    def take_out(self, stay: Stay) -> bool:
        """Take an idle connection out; False if it is lent or gone."""

    def put_back(self, stay: Stay) -> None:
        """Put back what was taken out."""

    def give_way(self, stay: Stay) -> bool:
        """Close an idle connection, where it belongs; False if it is lent or gone."""

    def has(self, stay: Stay) -> bool:
        """Whether it lies here, idle."""

    @property
    def unanswered_since(self) -> float | None:
        """Since when its event loop owes an answer to that; None if it owes none."""

    def reap_ended(self) -> None:
        """Part with what belongs to an event loop that was closed."""

    def whereabouts(self) -> str:
        """Name the event loop whose connections these are, and the line at which it stands."""


def is_blocked(pool: Pool | None) -> bool:
    """Whether its event loop stands still: something blocks it, or it does not run."""
    since = None if pool is None else pool.unanswered_since
    return since is not None and time.monotonic() - since > ANSWERS_WITHIN


class Berth(Protocol):
    """What a pool knows of an open connection."""

    permit: Permit | None
    returned: float


class Place(Permit):
    """The right to have one connection open."""

    __slots__ = ("stay",)

    def __init__(self) -> None:
        super().__init__()
        self.stay: Stay | None = None  # the connection that has it

    @property
    def lent(self) -> Permit:
        """The permit against which its connection is lent; itself if it is not."""
        berth = None if (stay := self.stay) is None else stay.berth
        return self if berth is None else berth.permit or self


class Stay:
    """One physical connection, and the places that it has: one under each limit."""

    __slots__ = (
        "__weakref__",
        "_berth",
        "_pool",
        "_socket",
        "asked",
        "began",
        "driver",
        "kept",
        "key",
        "places",
        "record",
        "taken_by",
        "turn_ends",
    )

    def __init__(self, pool: Pool, record: Any) -> None:
        self.key: int | None = None  # the identity of SQLAlchemy's connection
        self.record: Callable[[], Any] = weakref.ref(record)
        self.kept: Any = None  # the record, while it is out of its pool and lent to nobody
        self.taken_by: Any = None  # who takes it out just now, or has
        self.places: list[tuple[Cap, Place]] = []
        self.asked: float | None = None  # when it was asked to give way, or closed
        self.began: float = 0.0  # when it began to be opened
        self.turn_ends: float = 0.0
        self._pool: Callable[[], Pool | None] = weakref.ref(pool)
        self._berth: Callable[[], Berth | None] = nothing  # weak references, once it is open
        self.driver: Callable[[], Any] = nothing
        self._socket: list[int | None] = [None]  # who takes it out ends the stay: nobody else does

    @property
    def berth(self) -> Berth | None:
        """What its pool knows of it; None before it is open, and when nobody knows it any more."""
        return self._berth()

    @property
    def pool(self) -> Pool | None:
        """The pool that lends it."""
        return self._pool()

    def take(self, cap: Cap, permit: Permit) -> None:
        """Take a place."""
        place = cast(Place, permit)
        self.places.append((cap, place))
        place.stay = self

    def begin(self, connection: object, driver: Any, descriptor: int | None, berth: Berth) -> None:
        """Note that the connection is open."""
        if descriptor is not None:
            # However the driver closes its own: this one tells when the server has let go.
            self._socket[0] = os.dup(descriptor)
        self._berth = weakref.ref(berth)
        try:
            self.driver = weakref.ref(driver, self._lost)
        except TypeError:  # sqlite3's: its berth lives as long as what SQLAlchemy has of it
            self._berth = weakref.ref(berth, self._lost)
        self.key, now = id(connection), time.monotonic()
        self.turn_ends = now + min(TURN * (now - self.began), LONGEST_TURN)
        self.settle()

    def _lost(self, dropped: object) -> None:
        self.end()

    def settle(self) -> None:
        """Be nobody's but the pool's."""
        for _, place in self.places:
            place.owner = OPEN

    def put_back(self) -> None:
        """Go back into the pool."""
        self.asked = self.taken_by = None
        self.settle()
        if (pool := self.pool) is not None:
            pool.put_back(self)
        else:
            self.kept = None

    @property
    def is_idle(self) -> bool:
        """Whether it lies in its pool."""
        berth, record = self.berth, self.record()
        return (
            berth is not None
            and berth.permit is None
            and berth.returned > 0
            and self.kept is None
            and record is not None
            and record.dbapi_connection is not None
            and record.record_info.get("berth") is berth
        )

    @property
    def is_leaving(self) -> bool:
        """Whether its places will be free in a moment."""
        if self.asked is None or time.monotonic() - self.asked >= STUCK_AFTER:
            return False
        return self.key is None or not is_blocked(self.pool)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a place."""
        return any(cap.waiting for cap, _ in self.places)

    def come_back(self) -> None:
        """Be there for those who wait, if any do."""
        for cap, place in self.places:
            if cap.waiting:
                cap.offer(self, place)

    def stay_on(self) -> None:
        """Have others asked to give way: this one is in use."""
        self.asked = None
        for cap, _ in self.places.copy():
            cap.make_room()

    def end(self) -> None:
        """Give the places back as soon as the server has let go of the connection."""
        self.asked = time.monotonic()
        try:
            descriptor = self._socket.pop()
        except IndexError:
            return
        self.key = self.kept = None
        for _, place in self.places:
            place.owner = GONE
        if descriptor is None and (self.turn_ends or not self.began):  # a file, or nothing at all
            self._vacate()
        else:
            DEPARTURES.see_off(descriptor, self._vacate)

    def salvage(self) -> None:
        """Go back, if the caller was interrupted as it was taking this one out: at any line."""
        if self.taken_by == current_owner():
            self.taken_by = None
            record, pool = self.record(), self.pool
            if pool is None or record is None or record.dbapi_connection is None:
                self.end()
            elif self._socket and not pool.has(self):
                self.kept = record
                self.put_back()

    def vacate_if_overdue(self) -> None:
        """Give the places back if its end was interrupted: it would have by now."""
        long_since = time.monotonic() - 2 * departures.GONE_LIMIT
        if not self._socket and self.asked is not None and self.asked < long_since:
            self._vacate()

    def _vacate(self) -> None:
        while self.places:
            cap, place = self.places.pop()
            place.stay = None
            cap.give(place)

    def disown(self) -> None:
        """Forget the parent's connection, in a forked child."""
        self.places = []
        with suppress(IndexError, OSError):
            if (descriptor := self._socket.pop()) is not None:
                os.close(descriptor)


OPEN, GONE = NOBODY = ("an open connection", "a closed connection")  # who owns what no caller does


class CameBack(Exception):  # no error: the way back to the pool, through SQLAlchemy
    """Whoever waited for a place has a connection of his own pool instead."""

    def __init__(self, stay: Stay) -> None:
        super().__init__()
        self._stay = stay

    def put_back(self) -> None:
        """Have the pool lend it next."""
        self._stay.put_back()


class Cap(Slots):
    """So many connections, over all the pools that ask it; idle ones give way to those who wait.

    A caller that has a permit of its pool, and finds nothing idle there, asks for a place. It may
    be given one together with its connection, which has just come back to that very pool.
    """

    permit_class: ClassVar[type[Permit]] = Place

    def __init__(self, limit: int, name: str = VARIABLE) -> None:
        super().__init__(limit)
        self.name: str = name
        CAPS.add(self)

    def info(self) -> CapInfo:
        """Take a snapshot."""
        return CapInfo(self.name, self.size, len(self.held), self.waiting)

    def give(self, permit: Permit) -> None:
        """Give a place back, whatever has become of it."""
        stay = stay_of(permit)
        if stay is None or not stay.places:
            cast(Place, permit).stay = None
            super().give(permit)
        elif stay.kept is None:  # it was being opened
            stay.end()
        else:  # it came too late, with its connection
            stay.put_back()
            stay.come_back()

    def forsake(self, owner: object) -> None:
        """Take back what an owner was about to connect with, at whatever line it was interrupted.

        An open connection's place is the owner's no more.
        """
        for ticket in self.waiters:
            if ticket.owner == owner:
                self.leave(ticket)
        for place in self.permits:
            if place.owner == owner:
                self.give(place)

    def recover(self) -> None:
        """Take back what was lost, and ask anew where nobody has answered."""
        for place in self.permits:
            if has_ended(place.owner):
                self.give(place)
        for stay in self.stays():
            stay.vacate_if_overdue()
        super().recover()
        self.make_room()

    def nobodys(self) -> list[Permit]:
        """Return the places that are neither a caller's nor an open or a leaving connection's."""
        stays = ((place, stay_of(place)) for place in self.permits if place.owner is GONE)
        return super().nobodys() + [
            place for place, stay in stays if stay is None or not stay.places
        ]

    def offer(self, stay: Stay, place: Place) -> None:
        """Let those who wait have what has come back: in its own pool without connecting."""
        waiters = self.waiters
        for ticket in waiters:
            if ticket.lender is stay.pool:
                if ticket is waiters[0] or time.monotonic() < stay.turn_ends:
                    self._hand_over(stay, place, ticket)
                break
        self.make_room()

    def _hand_over(self, stay: Stay, place: Place, ticket: Ticket) -> None:
        pool = stay.pool
        try:
            if pool is not None and pool.take_out(stay) and not self.serve(ticket, place):
                stay.put_back()  # it has given up meanwhile
        except BaseException:
            if ticket.waits:
                stay.salvage()
            raise

    def make_room(self) -> None:
        """Have idle connections give way to those who wait, the one used longest ago first.

        Those of an event loop that is blocked come last: they may come never.
        """
        if not self._queue:
            return
        stays = self.stays()
        leaving = [stay.is_leaving for stay in stays]
        missing = self.waiting - sum(leaving)
        idle = [
            (is_blocked(stay.pool), stay.berth.returned, stay)
            for stay, is_leaving in zip(stays, leaving, strict=True)
            if not is_leaving and stay.is_idle and stay.berth
        ]
        for *_, stay in sorted(idle, key=lambda one: one[:2]):
            if missing <= 0:
                break
            stay.asked = stay.asked or time.monotonic()
            try:
                if (pool := stay.pool) is not None and pool.give_way(stay):
                    missing -= 1
                else:
                    stay.asked = None
            except BaseException:
                stay.salvage()
                raise

    def stays(self) -> list[Stay]:
        """Return the connections that have places."""
        return [stay for stay in map(stay_of, self.permits) if stay is not None]

    def pools(self) -> list[Pool]:
        """Return the pools that have connections open."""
        pools = [stay.pool for stay in self.stays()]
        return list(dict.fromkeys(pool for pool in pools if pool is not None))

    def idle(self, now: float) -> str:
        """Say what is idle, and why it has not given way."""
        told = []
        for pool, count in Counter(stay.pool for stay in self.stays() if stay.is_idle).items():
            since = None if pool is None else pool.unanswered_since
            if pool is None or since is None:
                told.append(f"{count} of them idle and about to give way")
            else:
                told.append(
                    f"{count} of them idle in {pool.whereabouts()}, which has not answered for "
                    f"{now - since:.1f} s (move what blocks it to a thread)"
                )
        return ", ".join(told) or "none of them idle"

    def holders(self, now: float) -> list[Holder]:
        """Say who has the connections, and in which pool; those that are idle are nobody's."""
        holders: list[Holder] = []
        for place in self.held:
            stay, permit = stay_of(place), place.lent
            pool = None if stay is None else stay.pool
            holder = None if permit.owner in NOBODY else describe(permit, now)
            if holder is not None:
                holders.append(replace(holder, pool="" if pool is None else pool.name))
        return holders

    def disown(self) -> None:
        """Start afresh in a forked child: the parent's connections are none of its own."""
        for stay in self.stays():
            stay.disown()
        super().__init__(self.size)


def nothing() -> None:
    """Stand in for a reference to what is not there yet."""


def stay_of(place: Permit) -> Stay | None:
    """Return the connection that has a place."""
    stay: Stay | None = getattr(place, "stay", None)
    return stay


CAPS: weakref.WeakSet[Cap] = weakref.WeakSet()


def leave(connection: object) -> None:
    """Note that SQLAlchemy has closed a connection, whichever way it went."""
    for cap in list(CAPS):
        for place in cap.permits:
            if (stay := stay_of(place)) is not None and stay.key == id(connection):
                stay.end()
                return


def note_closings(dialect: Any) -> None:
    """Have the places given back by whatever closes a connection of this dialect."""

    def leaving(close: Callable[[Any], None]) -> Callable[[Any], None]:
        def closed(connection: Any) -> None:
            try:
                close(connection)
            finally:
                leave(connection)

        return closed

    dialect.do_close = leaving(dialect.do_close)
    dialect.do_terminate = leaving(dialect.do_terminate)


# -- the cap of the process --------------------------------------------------------------------

PROCESS: dict[str, Cap] = {}  # at most one
STATED: weakref.WeakSet[Any] = weakref.WeakSet()  # the managers that are open, and have set it


def process_cap() -> Cap | None:
    """Return the limit of the whole process, if an open manager has set one."""
    cap = PROCESS.get(VARIABLE)
    return cap if cap is not None and STATED else None


def limit_process(manager: Any, limit: int) -> None:
    """Limit the connections of the process, for as long as this manager is open.

    Raises:
        InvalidOption: another one, which is open, has set another limit.
    """
    if not STATED:
        PROCESS.clear()
    cap = PROCESS.setdefault(VARIABLE, Cap(limit))
    if cap.size != limit:
        raise InvalidOption(
            f"max_connections={limit} cannot be used: it is one limit for the whole process, and "
            f"{cap.size} was set by a manager that is open ({VARIABLE}, or its own max_connections"
            "=). Give both the same, or set the variable alone."
        )
    STATED.add(manager)


def release_process(manager: Any) -> None:
    """Forget that a manager has set the limit."""
    STATED.discard(manager)
