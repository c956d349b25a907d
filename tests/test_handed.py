"""A synchronous session that a framework hands around, and the permit that waits for it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text

from engineroom import DatabaseSessionManager
from engineroom.backends import Role
from engineroom.cancellation import settle
from engineroom.errors import PoolDeadlock, PoolExhausted
from engineroom.handed import HandedScope
from engineroom.ledger import REQUEST, Request
from engineroom.slots import WAITING, Permit, Reservation, Slots

LONG = 60.0  # seconds: a test that waited for it would not end
ONE = text("SELECT 1")

# -- the reservation alone -------------------------------------------------------------------------


class Scope:
    """Stands for the scope that a permit is reserved for."""


def reserved(slots: Slots, scope: Scope) -> Reservation:
    permit = slots.take()
    assert permit is not None
    return Reservation(slots, permit, weakref.ref(scope))


def free(slots: Slots) -> int:
    """Count the permits that can be had; each is there once."""
    permits = []
    while (permit := slots.take()) is not None:
        permits.append(permit)
    for permit in permits:
        slots.give(permit)
    assert len(set(map(id, permits))) == len(permits)
    return len(permits)


def test_a_reserved_permit_is_taken_by_the_thread_it_was_handed_to() -> None:
    slots, scope = Slots(2), Scope()
    reservation = reserved(slots, scope)
    (permit,) = slots.held
    assert permit.entry() is scope
    reservation.hand_to(1)
    other = slots.take(2)
    assert other is not None
    assert other is not permit
    assert slots.take(3) is None
    assert slots.take(1) is permit
    assert (permit.owner, permit.entry) == (1, None)  # the checkout will say whose it is
    assert slots.reserved == {}
    reservation.cancel()  # it was used: not given back twice
    assert slots.take(1) is None
    slots.give(permit)
    slots.give(other)
    assert free(slots) == 2


def test_a_reserved_permit_that_is_never_used_comes_back() -> None:
    slots, scope = Slots(1), Scope()
    for threads in ((), (1,), (1, 2, 1)):
        reservation = reserved(slots, scope)
        for thread in threads:
            reservation.hand_to(thread)
        assert list(slots.reserved) == list(threads[-1:])
        assert slots.take(7) is None
        reservation.cancel()
        reservation.cancel()
        assert slots.reserved == {}
        assert free(slots) == 1


def test_a_reserved_permit_overtakes_the_queue() -> None:
    """It was waited for already."""
    slots, scope = Slots(1), Scope()
    reservation = reserved(slots, scope)
    ticket = slots.queue("late", lambda: None)
    reservation.hand_to(1)
    permit = slots.take(1)
    assert permit is not None
    assert ticket.waits
    slots.give(permit)
    assert ticket.granted is permit


def test_one_that_comes_back_serves_the_queue() -> None:
    slots, scope = Slots(1), Scope()
    reservation = reserved(slots, scope)
    ticket = slots.queue("waits", lambda: None)
    reservation.cancel()
    assert not ticket.waits


def test_a_thread_may_have_several() -> None:
    slots, scopes = Slots(2), [Scope(), Scope()]
    first, second = (reserved(slots, scope) for scope in scopes)
    first.hand_to(1)
    second.hand_to(1)
    taken = [slots.take(1), slots.take(1)]
    assert all(isinstance(permit, Permit) for permit in taken)
    assert taken[0] is not taken[1]
    assert slots.take(1) is None
    assert slots.reserved == {}
    first.cancel()
    second.cancel()
    assert free(slots) == 0


# -- with a pool -----------------------------------------------------------------------------------


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncGenerator[DatabaseSessionManager]:
    """Open a manager, and find its pool whole in the end."""
    manager = DatabaseSessionManager().init(
        url, **{"pool_size": 1, "max_overflow": 0, "pool_timeout": LONG} | options
    )
    async with manager, asyncio.timeout(20):
        yield manager
        (pool,) = manager.stats().pools
        assert (pool.lent, pool.waiting, manager.stats().scopes) == (0, 0, ())
        assert slots_of(manager).reserved == {}
        assert free(slots_of(manager)) == pool.size
        gc.collect()
        assert [key for key in WAITING if isinstance(key, str)] == []


def slots_of(manager: DatabaseSessionManager) -> Slots:
    slots: Slots = manager.sync.engine.pool.slots  # type: ignore[attr-defined]
    return slots


@asynccontextmanager
async def request(
    manager: DatabaseSessionManager, name: str = "GET /"
) -> AsyncGenerator[tuple[Any, HandedScope]]:
    """Do what the dependency of a framework does."""
    known = REQUEST.get()
    before = REQUEST.set(known if str(known) == name else Request(name))
    try:
        scope = HandedScope(manager._room, "session", Role.PRIMARY, read_only=True)
        scope.stand_at(slots_of)  # a `def` endpoint
        session = scope.open()
        try:
            await scope.reserve()
            yield session, scope
        except BaseException as error:
            await settle(asyncio.to_thread(scope.__exit__, type(error), error, None))
            raise
        await settle(asyncio.to_thread(scope.__exit__, None, None, None))
    finally:
        REQUEST.reset(before)


async def in_thread(function: Callable[[], Any]) -> Any:
    """Run in a thread of its own, that ends."""
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def work() -> None:
        try:
            result, error = function(), None
        except BaseException as caught:
            result, error = None, caught
        loop.call_soon_threadsafe(
            lambda: done.set_exception(error) if error else done.set_result(result)
        )

    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,))
    thread.start()
    try:
        return await done
    finally:
        thread.join()


@pytest.mark.anyio
async def test_reserved_and_used_in_threads(url: str) -> None:
    async with opened(url) as manager:
        async with request(manager) as (session, scope):
            (permit,) = slots_of(manager).held
            for _ in range(3):
                assert await in_thread(lambda: session.scalar(ONE)) == 1
                assert slots_of(manager).held == [permit]
            (holder,) = manager.stats().pools[0].holders
            assert "GET /" in holder.owner
            assert scope.held() is not None


@pytest.mark.anyio
async def test_reserved_and_never_used(url: str) -> None:
    async with opened(url) as manager:
        async with request(manager) as (session, _):
            (holder,) = manager.stats().pools[0].holders
            assert "GET /" in holder.owner
            assert holder.doing == "with nothing begun yet"
        async with request(manager) as (session, _):
            await in_thread(session.flush)  # a thread has it, and connects with nothing
        with pytest.raises(KeyError):
            async with request(manager) as (session, _):
                raise KeyError


@pytest.mark.anyio
async def test_reserved_and_used_by_another_session_of_the_same_thread(url: str) -> None:
    """It is the same thread's work, and the first to need a connection takes it."""
    async with opened(url) as manager:
        async with request(manager) as (session, _):

            def work() -> Any:
                session.flush()
                with manager.sync_session(read_only=True) as other:
                    assert other.scalar(ONE) == 1
                return session.scalar(ONE)

            assert await in_thread(work) == 1


@pytest.mark.anyio
async def test_two_sessions_of_one_request_each_have_theirs(url: str) -> None:
    async with opened(url, pool_size=2) as manager:
        async with request(manager) as (one, _), request(manager) as (two, _):

            def work() -> Any:
                one.flush()
                two.flush()
                return one.connection(), two.connection()

            first, second = await in_thread(work)
            assert first is not second


@pytest.mark.anyio
async def test_cancelled_while_it_waits_for_the_permit(url: str) -> None:
    async with opened(url) as manager:

        async def second() -> None:
            async with request(manager, "GET /second"):
                pass

        async with request(manager):
            for _ in range(2):
                task = asyncio.create_task(second())
                while not slots_of(manager).waiting:
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
                assert slots_of(manager).waiting == 0
        await second()


@pytest.mark.anyio
async def test_cancelled_as_the_permit_comes(url: str) -> None:
    async with opened(url) as manager:

        async def second() -> None:
            async with request(manager, "GET /second"):
                pass

        for steps in range(6):
            async with request(manager):
                task = asyncio.create_task(second())
                while not slots_of(manager).waiting:
                    await asyncio.sleep(0)
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])


@pytest.mark.anyio
async def test_exhausted_while_it_waits_on_the_loop(url: str) -> None:
    """The loop goes on; the error names the request that has the connection."""
    async with opened(url, pool_timeout=0.2) as manager:
        async with request(manager) as (session, _):
            await in_thread(lambda: session.scalar(ONE))
            beats = 0

            async def beat() -> None:
                nonlocal beats
                while True:
                    beats += 1
                    await asyncio.sleep(0.01)

            beating = asyncio.create_task(beat())
            with pytest.raises(PoolExhausted, match="GET /") as caught:
                async with request(manager, "GET /second"):
                    pass
            beating.cancel()
            assert type(caught.value) is PoolExhausted
            assert beats > 3
            assert await in_thread(lambda: session.scalar(ONE)) == 1


@pytest.mark.anyio
async def test_the_pool_grows_while_it_waits_on_the_loop(url: str) -> None:
    async with opened(url, max_overflow=1) as manager:
        async with request(manager) as (one, _):
            await in_thread(lambda: one.scalar(ONE))
            async with request(manager, "GET /second") as (two, _):
                await in_thread(lambda: two.scalar(ONE))
                (pool,) = manager.stats().pools
                assert pool.lent == 2


@pytest.mark.anyio
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("moves", [True, False])
async def test_requests_that_all_wait_for_another_connection(
    url: str, size: int, moves: bool
) -> None:
    """The last of them is told at once; then the others go on.

    It is the request that holds the first one, whichever of its threads waits.
    """
    outcomes: list[Any] = []
    barrier = threading.Barrier(size)

    async with opened(url, pool_size=size) as manager:

        def work(session: Any) -> None:
            if moves:
                session.scalar(ONE)
            barrier.wait(10)
            try:
                with manager.sync_session(read_only=True) as other:
                    outcomes.append(other.scalar(ONE))
            except PoolExhausted as error:
                outcomes.append(type(error))

        async def serve(number: int) -> None:
            async with request(manager, f"GET /{number}") as (session, _):
                await asyncio.to_thread(session.scalar, ONE)  # that thread lives on, idle
                await in_thread(lambda: work(session))

        before = time.monotonic()
        await asyncio.gather(*(serve(number) for number in range(size)))
        assert outcomes.count(PoolDeadlock) >= 1
        assert set(outcomes) <= {1, PoolDeadlock}
        assert time.monotonic() - before < LONG / 2


@pytest.mark.anyio
async def test_a_request_whose_thread_only_works_is_no_deadlock(url: str) -> None:
    async with opened(url) as manager:
        go_on = threading.Event()

        def work() -> Any:
            go_on.wait(10)
            return session.scalar(ONE)

        async def second() -> Any:
            async with request(manager, "GET /second") as (other, _):
                return await in_thread(lambda: other.scalar(ONE))

        async with request(manager) as (session, _):
            await in_thread(lambda: session.scalar(ONE))
            working = asyncio.create_task(in_thread(work))
            waiting = asyncio.create_task(second())
            while not slots_of(manager).waiting:
                await asyncio.sleep(0)
            go_on.set()
            assert await working == 1
        assert await waiting == 1


@pytest.mark.anyio
async def test_a_second_reservation_inside_the_only_one_is_a_deadlock(url: str) -> None:
    """Both wait on the loop, for the same request."""
    async with opened(url) as manager:
        async with request(manager):
            with pytest.raises(PoolDeadlock, match="GET /"):
                async with request(manager):
                    pass
