"""Slots: first come, first served; no permit is lost, and none is given twice."""

from __future__ import annotations

import gc
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from engineroom import slots as slots_module
from engineroom.slots import CONNECTS_AT_ONCE, GROW_AFTER, WAITING, Permit, Slots, Ticket


def nothing() -> None:
    """Wake nobody."""


def taken(slots: Slots) -> Permit:
    permit = slots.take()
    assert permit is not None
    return permit


def test_as_many_permits_as_the_limit_and_no_more() -> None:
    slots = Slots(3)
    permits = [taken(slots) for _ in range(3)]
    assert len(set(map(id, permits))) == 3
    assert slots.take() is None
    slots.give(permits.pop())
    assert slots.take() is not None


def test_who_came_first_is_served_first() -> None:
    slots = Slots(1)
    permit = taken(slots)
    served: list[int] = []
    tickets = [
        slots.queue(None, lambda number=number: served.append(number)) for number in range(10)
    ]  # type: ignore[misc]
    assert slots.waiting == 10
    for number in range(10):
        slots.give(permit)
        assert served == list(range(number + 1))
        assert tickets[number].granted is permit
    assert slots.waiting == 0


def test_who_gave_up_is_skipped_and_costs_nothing() -> None:
    slots = Slots(1)
    permit = taken(slots)
    served: list[int] = []
    tickets = [
        slots.queue(None, lambda number=number: served.append(number)) for number in range(4)
    ]  # type: ignore[misc]
    assert tickets[0].give_up()
    assert tickets[2].give_up()
    slots.give(permit)
    slots.give(permit)
    assert served == [1, 3]
    slots.give(permit)
    assert taken(slots) is permit


def test_when_all_gave_up_the_permit_is_free() -> None:
    slots = Slots(1)
    permit = taken(slots)
    tickets = [slots.queue(None, nothing) for _ in range(100)]
    assert all(ticket.give_up() for ticket in tickets)
    slots.give(permit)
    assert slots.take() is permit
    assert slots.take() is None


def test_a_ticket_is_granted_or_given_up_never_both() -> None:
    granted, given_up = (Ticket(Slots(1), None, nothing) for _ in range(2))
    assert granted.grant(Permit())
    assert not granted.give_up()
    assert given_up.give_up()
    assert not given_up.grant(Permit())
    assert not granted.grant(Permit())


def test_who_is_too_late_to_give_up_has_the_permit_to_give_back() -> None:
    slots = Slots(1)
    ticket = slots.queue(None, nothing)  # granted at once: one was free
    assert not ticket.give_up()
    slots.give(ticket.granted)
    assert slots.take() is not None


def test_take_never_overtakes_the_queue() -> None:
    """Not even in the moment between a permit's return and its being handed out."""
    slots = Slots(1)
    permit = taken(slots)
    served: list[int] = []
    ticket = slots.queue(None, lambda: served.append(1))
    with slots._handing_out:  # somebody else hands out just now
        slots.give(permit)
        assert served == []
        assert slots.take() is None
    slots._hand_out()
    assert served == [1]
    assert ticket.granted is permit


def test_a_permit_in_the_queue_wakes_one_waiter_only() -> None:
    slots = Slots(2)
    permits = [taken(slots), taken(slots)]
    served: list[int] = []
    for number in range(3):
        slots.queue(None, lambda number=number: served.append(number))  # type: ignore[misc]
    slots.give(permits[0])
    assert served == [0]
    slots.give(permits[1])
    assert served == [0, 1]


def test_give_in_a_destructor_while_the_queue_is_served() -> None:
    """Handing out waits for no lock, so a destructor at any line of it cannot block."""
    slots = Slots(2)
    first, second = taken(slots), taken(slots)
    served: list[int] = []

    class Dropped:
        """Gives its permit back when it is collected, as a forgotten connection does."""

        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            slots.give(second)

    def wake_first() -> None:
        served.append(1)
        Dropped()
        gc.collect()  # the destructor runs here: in `grant`, with the lock held

    slots.queue(None, wake_first)
    slots.queue(None, lambda: served.append(2))
    giver = threading.Thread(target=slots.give, args=(first,), daemon=True)
    giver.start()
    giver.join(20)
    assert not giver.is_alive()
    assert served == [1, 2]
    assert slots.waiting == 0


def test_giving_back_forgets_the_holder() -> None:
    slots = Slots(1)
    permit = taken(slots)
    blank = {name: getattr(permit, name) for name in Permit.__slots__}
    for name in Permit.__slots__:
        setattr(permit, name, object())
    assert slots.held == [permit]
    slots.give(permit)
    assert slots.held == []
    changed = {name: getattr(permit, name) for name in Permit.__slots__}
    assert changed | {"statement_since": blank["statement_since"]} == blank


class Told(Permit):
    """A permit that is looked at while it changes hands, as another thread may."""

    __slots__ = ("_since",)
    looks: ClassVar[list[Callable[[], object]]] = []

    @property
    def since(self) -> float:  # type: ignore[override]
        return self._since

    @since.setter
    def since(self, value: float) -> None:
        self._since = value
        for look in self.looks:
            look()


class ToldSlots(Slots):
    permit_class = Told


def test_who_is_just_granted_a_permit_does_not_wait_for_it() -> None:
    """Another thread that asks in that moment was told of a deadlock."""
    slots = ToldSlots(1)
    permit = slots.take("first")
    assert permit is not None
    WAITING["second"] = ticket = slots.queue("second", lambda: None)
    seen: list[list[Slots]] = []
    Told.looks.append(lambda: seen.append(slots.deadlocked()))
    try:
        slots.give(permit)
    finally:
        del WAITING["second"]
        Told.looks.clear()
    assert ticket.granted is permit
    assert len(seen) == 2  # as it was given, and as it was granted
    assert seen == [[], []]


@pytest.mark.parametrize("limit", [1, 7])
def test_ten_thousand_callers_of_whom_half_give_up(limit: int) -> None:
    """20 threads; no permit is lost, and none is in two hands at once."""
    slots = Slots(limit)
    holders = {id(permit): 0 for permit in slots.permits}
    troubles: list[str] = []

    def hold(permit: Permit) -> None:
        holders[id(permit)] += 1
        if holders[id(permit)] != 1:
            troubles.append("given twice")
        holders[id(permit)] -= 1
        slots.give(permit)

    def call(dice: random.Random) -> None:
        permit = slots.take()
        if permit is None:
            bell = threading.Lock()
            bell.acquire()
            ticket = slots.queue(None, bell.release)
            if dice.random() < 0.5:
                if ticket.give_up():
                    return
            elif not bell.acquire(timeout=20):
                troubles.append("never served")
                return
            permit = ticket.granted
        hold(permit)

    def run(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(500):
            call(dice)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert troubles == []
    assert slots.waiting == 0
    assert {id(taken(slots)) for _ in range(limit)} == set(holders)
    assert slots.take() is None


def test_order_is_kept_when_many_threads_give_back() -> None:
    """Whoever stood in the queue earlier is served earlier."""
    slots = Slots(4)
    permits = [taken(slots) for _ in range(4)]
    order: list[int] = []
    granted: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
    tickets: list[Ticket] = []
    count = 2000

    def serve(number: int) -> None:
        order.append(number)
        granted.put(tickets[number])

    tickets.extend(slots.queue(None, partial(serve, number)) for number in range(count))

    def give_back() -> None:
        while (ticket := granted.get()) is not None:
            slots.give(ticket.granted)

    threads = [threading.Thread(target=give_back) for _ in range(4)]
    for thread in threads:
        thread.start()
    for permit in permits:
        slots.give(permit)
    while len(order) < count:
        threading.Event().wait(0.001)
    for _ in threads:
        granted.put(None)
    for thread in threads:
        thread.join()
    assert order == list(range(count))


# -- growth --------------------------------------------------------------------------------------


@pytest.fixture
def lately(monkeypatch: pytest.MonkeyPatch) -> float:
    """What counts as lately, in seconds: so long that the test itself does not outlast it."""
    monkeypatch.setattr(slots_module, "GROW_AFTER", 1.0)
    return 1.0


def granted(tickets: list[Ticket]) -> list[bool]:
    return [not ticket.waits for ticket in tickets]


def test_overflow_is_handed_out_only_when_nothing_comes_back(lately: float) -> None:
    slots = Slots(1, 10)
    permit = taken(slots)
    assert slots.take() is None  # though there is overflow
    tickets = [slots.queue(None, nothing) for _ in range(8)]
    assert slots.grow()  # nothing is connected: nothing can have come back, and nothing is given
    assert not any(granted(tickets))
    slots.connected()
    assert slots.grow()
    assert not any(granted(tickets))
    time.sleep(lately)
    assert slots.grow()
    assert granted(tickets) == [True] * CONNECTS_AT_ONCE + [False] * 3
    slots.give(permit)
    assert sum(granted(tickets)) == CONNECTS_AT_ONCE + 1
    assert slots.grow()  # that was just now
    assert sum(granted(tickets)) == CONNECTS_AT_ONCE + 1


def test_no_more_connects_at_once_than_a_server_likes() -> None:
    slots = Slots(1, 10)
    taken(slots)
    slots.connected()
    tickets = [slots.queue(None, nothing) for _ in range(10)]
    opening = [threading.Event() for _ in range(CONNECTS_AT_ONCE - 1)]  # (any objects)
    slots.connecting.update(opening)
    time.sleep(GROW_AFTER)
    assert slots.grow()
    assert sum(granted(tickets)) == 1


def test_overflow_goes_back_to_where_it_came_from() -> None:
    slots = Slots(2, 3)
    permits = [taken(slots), taken(slots)]
    slots.connected()
    tickets = [slots.queue(None, nothing) for _ in range(3)]
    time.sleep(GROW_AFTER)
    assert not slots.grow()  # there is no more
    for permit in (*permits, *(ticket.granted for ticket in tickets)):
        slots.give(permit)
    assert [slots.take() is None for _ in range(3)] == [False, False, True]
    assert slots.may_grow


def test_who_is_dismissed_is_woken_without_a_permit() -> None:
    slots = Slots(1)
    permit = taken(slots)
    woken: list[int] = []
    ticket = slots.queue(None, lambda: woken.append(1))
    slots.dismiss()
    assert (woken, slots.leave(ticket), slots.waiting) == ([1], True, 0)
    slots.give(permit)
    assert slots.take() is permit


def test_whose_loop_was_closed_is_skipped() -> None:
    def closed() -> None:
        raise RuntimeError("Event loop is closed")

    slots = Slots(1)
    permit = taken(slots)
    slots.queue("dead", closed)
    woken: list[int] = []
    slots.queue("alive", lambda: woken.append(1))
    slots.give(permit)
    assert (woken, permit.owner, slots.waiting) == ([1], "alive", 0)


def test_who_gave_up_costs_nothing() -> None:
    slots = Slots(1)
    taken(slots)
    assert slots.leave(slots.queue("impatient", nothing))
    assert (slots.waiting, slots.waiters) == (0, [])


def test_what_an_owner_was_about_to_use_is_taken_back() -> None:
    slots = Slots(3)
    first, second, other = (slots.take(owner) for owner in ("us", "us", "them"))
    assert first is not None
    assert second is not None
    assert other is not None
    first.connection = "a connection"
    slots.queue("us", nothing)
    slots.forsake("us")
    assert (second.owner, first.owner, other.owner) == (None, "us", "them")
    assert (slots.take(), slots.waiting) == (second, 0)


def test_what_was_lost_between_two_lines_is_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(2)
    kept = slots.take("us")
    slots._free.pop()  # Ctrl-C struck before it was anybody's
    slots._handing_out.acquire()  # or here
    woken: list[int] = []
    slots.queue("waits", lambda: woken.append(1))
    slots.recover()
    assert woken == []  # it may just be changing hands
    monkeypatch.setattr("engineroom.slots.RECOVER_AFTER", 0.0)
    slots.recover()
    slots.recover()
    assert woken == [1]
    assert kept is not None
    assert kept.owner == "us"


# -- who waits for whom --------------------------------------------------------------------------


class Wait:
    """Somebody who holds permits of some slots, and waits for one of another."""

    def __init__(self, name: str, *holds: Slots) -> None:
        self.name = name
        for slots in holds:
            permit = taken(slots)
            permit.owner, permit.entry = self, lambda: self

    @property
    def holder(self) -> Wait:
        return self

    def may_be_elsewhere(self) -> bool:
        return False

    def waits_for(self, slots: Slots) -> list[Slots]:
        WAITING[self] = slots.queue(self, nothing)
        return slots.deadlocked()


@pytest.fixture(autouse=True)
def nobody_waits() -> Iterator[None]:
    WAITING.clear()
    yield
    WAITING.clear()


def test_whoever_closes_the_circle_is_told() -> None:
    slots = Slots(3)
    holders = [Wait(name, slots) for name in "abc"]
    assert holders[0].waits_for(slots) == []
    assert holders[1].waits_for(slots) == []
    assert holders[2].waits_for(slots) == [slots]


def test_one_who_holds_and_does_not_wait_is_enough() -> None:
    slots = Slots(2)
    waiting, _ = Wait("a", slots), Wait("b", slots)
    assert waiting.waits_for(slots) == []


def test_a_circle_over_several_slots() -> None:
    first, second, third = Slots(1), Slots(1), Slots(1)
    a, b, c = Wait("a", first), Wait("b", second), Wait("c", third)
    assert a.waits_for(second) == []
    assert b.waits_for(third) == []
    stuck = c.waits_for(first)
    assert stuck[0] is first
    assert set(map(id, stuck)) == {id(first), id(second), id(third)}


def test_a_way_out_of_the_circle_is_seen() -> None:
    first, second = Slots(1), Slots(2)
    a, b, _ = Wait("a", first), Wait("b", second), Wait("c", second)
    assert a.waits_for(second) == []
    assert b.waits_for(first) == []  # c will give back what a waits for


def test_overflow_that_is_still_there_is_a_way_out() -> None:
    slots = Slots(1, 1)
    assert Wait("a", slots).waits_for(slots) == []


def test_a_permit_on_its_way_is_a_way_out() -> None:
    """The waiter has it and has not run yet: FACTS knows of false alarms here."""
    slots = Slots(2)
    a, b = Wait("a", slots), Wait("b", slots)
    late = Wait("late")
    assert late.waits_for(slots) == []
    assert a.waits_for(slots) == []
    slots.give(slots.permits[1])  # b's: granted to `late`, who still stands among the waiting
    b_again = Wait("b again")
    assert b_again.waits_for(slots) == []
    assert b.name == "b"


def test_a_loop_that_stands_still_holds_up_its_tasks() -> None:
    class Loop:
        """Runs a task that holds, and a thread's own wait."""

    class InLoop(Wait):
        def get_loop(self) -> Loop:
            return loop

        def cancelling(self) -> int:
            return 0

    loop, slots, others = Loop(), Slots(1), Slots(1)
    InLoop("holds", slots)  # and waits for nothing itself
    waiting = Wait("thread", others)
    ticket = slots.queue(waiting, nothing)
    WAITING[waiting] = WAITING[loop] = ticket
    assert slots.deadlocked() == [slots]


# -- any schedule --------------------------------------------------------------------------------


class AnySchedule(RuleBasedStateMachine):
    """Whatever is done in whatever order: first come, first served, and nothing is lost."""

    @initialize(size=st.integers(1, 3), overflow=st.integers(0, 3))
    def open(self, size: int, overflow: int) -> None:
        self.slots = Slots(size, overflow)
        self.in_hand: list[Permit] = []
        self.tickets: list[Ticket] = []
        self.served: list[int] = []
        self.collected = 0  # of those
        self.given_up: set[int] = set()

    @rule()
    def take(self) -> None:
        permit = self.slots.take()
        if permit is not None:
            permit.owner = "somebody"
            self.in_hand.append(permit)

    @rule()
    def queue(self) -> None:
        number = len(self.tickets)
        self.tickets.append(self.slots.queue(number, partial(self.serve, number)))
        self.collect()

    def serve(self, number: int) -> None:
        self.served.append(number)

    def collect(self) -> None:
        for number in self.served[self.collected :]:
            permit = self.tickets[number].granted
            permit.owner = number
            self.in_hand.append(permit)
        self.collected = len(self.served)

    @precondition(lambda self: self.in_hand)
    @rule(which=st.integers(0))
    def give(self, which: int) -> None:
        self.slots.give(self.in_hand.pop(which % len(self.in_hand)))
        self.collect()

    @precondition(lambda self: self.tickets)
    @rule(which=st.integers(0))
    def give_up(self, which: int) -> None:
        number = which % len(self.tickets)
        if number not in self.served and number not in self.given_up:
            assert self.tickets[number].give_up()
            self.given_up.add(number)

    @rule()
    def grow(self) -> None:
        self.slots.came_back = 0.0  # long ago
        self.slots.grow()
        self.collect()

    @invariant()
    def nothing_is_lost_and_nothing_twice(self) -> None:
        if hasattr(self, "slots"):
            assert len(set(map(id, self.in_hand))) == len(self.in_hand)
            there = {*self.slots._free, *self.slots._spare, *self.in_hand}
            assert len(self.slots._free) + len(self.slots._spare) + len(self.in_hand) == len(there)
            assert there == set(self.slots.permits)
            assert len(self.slots._spare) <= self.slots.overflow

    @invariant()
    def first_come_first_served(self) -> None:
        if hasattr(self, "slots"):
            assert self.served == sorted(self.served)
            waiting = [n for n in range(len(self.tickets)) if self.tickets[n].waits]
            assert all(n > max(self.served, default=-1) for n in waiting)
            assert not (waiting and self.slots._free)


TestAnySchedule = AnySchedule.TestCase
TestAnySchedule.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
