"""Slots: first come, first served; no permit is lost, and none is given twice."""

from __future__ import annotations

import gc
import queue
import random
import threading
from functools import partial

import pytest

from engineroom.slots import Permit, Slots, Ticket


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
    tickets = [slots.queue(lambda number=number: served.append(number)) for number in range(10)]  # type: ignore[misc]
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
    tickets = [slots.queue(lambda number=number: served.append(number)) for number in range(4)]  # type: ignore[misc]
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
    tickets = [slots.queue(nothing) for _ in range(100)]
    assert all(ticket.give_up() for ticket in tickets)
    slots.give(permit)
    assert slots.take() is permit
    assert slots.take() is None


def test_a_ticket_is_granted_or_given_up_never_both() -> None:
    granted, given_up = Ticket(nothing), Ticket(nothing)
    assert granted.grant(Permit())
    assert not granted.give_up()
    assert given_up.give_up()
    assert not given_up.grant(Permit())
    assert not granted.grant(Permit())


def test_who_is_too_late_to_give_up_has_the_permit_to_give_back() -> None:
    slots = Slots(1)
    ticket = slots.queue(nothing)  # granted at once: one was free
    assert not ticket.give_up()
    slots.give(ticket.granted)
    assert slots.take() is not None


def test_take_never_overtakes_the_queue() -> None:
    """Not even in the moment between a permit's return and its being handed out."""
    slots = Slots(1)
    permit = taken(slots)
    served: list[int] = []
    ticket = slots.queue(lambda: served.append(1))
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
        slots.queue(lambda number=number: served.append(number))  # type: ignore[misc]
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

    slots.queue(wake_first)
    slots.queue(lambda: served.append(2))
    giver = threading.Thread(target=slots.give, args=(first,), daemon=True)
    giver.start()
    giver.join(20)
    assert not giver.is_alive()
    assert served == [1, 2]
    assert slots.waiting == 0


def test_giving_back_forgets_the_holder() -> None:
    slots = Slots(1)
    permit = taken(slots)
    permit.since, permit.thread, permit.task, permit.connection = 1.0, 7, object(), object()
    assert slots.held == [permit]
    slots.give(permit)
    assert slots.held == []
    assert (permit.since, permit.thread, permit.task, permit.connection) == (0.0, 0, None, None)


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
            ticket = slots.queue(bell.release)
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

    tickets.extend(slots.queue(partial(serve, number)) for number in range(count))

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
