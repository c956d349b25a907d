"""`stats()` is a snapshot: the state, who holds what since which line, and what the pools lend."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from engineroom import DatabaseSessionManager, PoolInfo, ScopeInfo, Stats


@pytest.mark.parametrize("verb", ["session", "reader", "connect"])
def test_stats_name_the_line_that_opened_a_scope(
    door: Any, plain: Any, behind: Any, verb: str
) -> None:
    make = getattr(plain(door), verb)
    scope, line = make(), sys._getframe().f_lineno
    assert door.stats().scopes == ()
    with behind(scope):
        (seen,) = door.stats().scopes
        assert f"{__file__}:{line} in {sys._getframe().f_code.co_name}" == seen.where
    assert door.stats().scopes == ()


@pytest.mark.parametrize("verb", ["session", "reader", "connect"])
def test_stats_say_what_kind_of_scope_it_is(door: Any, verb: str) -> None:
    """The verb that opened it, on both sides."""
    with getattr(door, verb)():
        assert [scope.kind for scope in door.stats().scopes] == [verb]


def test_stats_name_the_owner_and_count_the_seconds(door: Any, twin: str) -> None:
    with door.session():
        (first,) = door.stats().scopes
        (second,) = door.stats().scopes
    assert first.owner.startswith("thread MainThread" if twin == "sync" else "task Task-")
    assert 0 <= first.seconds <= second.seconds


def test_stats_list_scopes_oldest_first(door: Any) -> None:
    with door.reader(), door.session(), door.reader():
        kinds = [scope.kind for scope in door.stats().scopes]
    assert kinds == ["reader", "session", "reader"]


def test_stats_tell_who_is_connected(door: Any) -> None:
    with door.session() as db:
        assert [scope.connected for scope in door.stats().scopes] == [False]
        db.scalar(text("SELECT 1"))
        assert [scope.connected for scope in door.stats().scopes] == [True]
        db.commit()
        assert [scope.connected for scope in door.stats().scopes] == [False]
    with door.connect():
        assert [scope.connected for scope in door.stats().scopes] == [True]


def test_a_kept_exception_does_not_keep_what_it_held_in_the_stats(door: Any) -> None:
    """Its traceback keeps alive the connection's proxy, which went back to the pool."""
    kept = []

    def seen() -> tuple[list[bool], int, int]:
        stats = door.stats()
        connected = [scope.connected for scope in stats.scopes]
        (pool,) = stats.pools
        return connected, pool.lent, len(pool.holders)

    with door.session() as db:
        try:
            db.scalar(text("SELECT nonsense"))
        except DBAPIError as error:
            kept.append(error)
            db.rollback()
            assert seen() == ([False], 0, 0)
        assert seen() == ([False], 0, 0)
        db.scalar(text("SELECT 1"))
        assert seen() == ([True], 1, 1)
        (holder,) = door.stats().pools[0].holders
        assert (holder.kind, holder.where) == ("session", door.stats().scopes[0].where)
    assert seen() == ([], 0, 0)
    with pytest.raises(DBAPIError) as caught, door.connect() as connection:
        connection.scalar(text("SELECT nonsense"))
    assert caught.value is not kept[0]
    assert seen() == ([], 0, 0)


def test_stats_count_what_is_lent_and_idle(open_door: Any, twin: str) -> None:
    door = open_door(pool_size=3, max_overflow=4)
    assert door.stats().pools == ()
    with door.session(read_only=True) as one, door.session(read_only=True) as two:
        one.scalar(text("SELECT 1"))
        two.scalar(text("SELECT 1"))
        (pool,) = door.stats().pools
        assert (pool.side, pool.role, pool.size, pool.overflow) == (twin, "primary", 3, 4)
        assert (pool.lent, pool.idle, pool.waiting) == (2, 0, 0)
    (pool,) = door.stats().pools
    assert (pool.lent, pool.idle, pool.waiting) == (0, 2, 0)
    with door.session() as one:
        one.scalar(text("SELECT 1"))
        (pool,) = door.stats().pools
        assert (pool.lent, pool.idle, pool.waiting) == (1, 1, 0)
    with door.reader() as one:
        one.scalar(text("SELECT 1"))
        lent = {pool.role: pool.lent for pool in door.stats().pools}
    assert lent == {"primary": 0, "reader": 1}


def test_stats_name_the_loop_of_a_pool(open_door: Any, twin: str) -> None:
    door = open_door()
    door.check()
    (pool,) = door.stats().pools
    assert pool.loop is None if twin == "sync" else "EventLoop" in str(pool.loop)


def test_stats_count_who_waits(postgres_url: str, eventually_async: Any) -> None:
    async def main() -> None:
        async with DatabaseSessionManager().init(
            postgres_url, pool_size=1, max_overflow=0
        ) as manager:

            async def ask() -> None:
                async with manager.session() as db:
                    await db.scalar(text("SELECT 1"))

            async with manager.session() as db:
                await db.scalar(text("SELECT 1"))
                asking = [asyncio.create_task(ask()) for _ in range(3)]
                await eventually_async(lambda: manager.stats().pools[0].waiting == 3)
                assert manager.stats().pools[0].lent == 1
                assert len(manager.stats().scopes) == 4
            await asyncio.gather(*asking)
            assert manager.stats().pools[0].waiting == 0

    asyncio.run(main())


def test_stats_know_the_state(open_door: Any) -> None:
    door = open_door()
    assert door.stats().state == "open"
    door.close()
    assert door.stats().state == "closed"
    assert DatabaseSessionManager().stats() == Stats(state="new", scopes=(), pools=())


@pytest.mark.parametrize("kind", [Stats, ScopeInfo, PoolInfo])
def test_a_snapshot_is_frozen(kind: type) -> None:
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
