"""`on_commit`, `on_rollback` and `rollback_only`: what is called at the end, when, and when not."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from behaviour_tables import Item
from sqlalchemy import event, select, text
from sqlalchemy.event import registry
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only
from sqlmodel import Session as ModelSession
from sqlmodel.ext.asyncio.session import AsyncSession as AsyncModelSession

from engineroom import SessionClosed, UsageError, errors, hooks, on_commit, on_rollback
from engineroom.errors import RollbackOnly


def bare(db: Any) -> Any:
    """Give the session itself, of either twin."""
    return getattr(db, "plain", db)


def after_commit(db: Any, callback: Any) -> None:
    on_commit(bare(db), callback)


def after_rollback(db: Any, callback: Any) -> None:
    on_rollback(bare(db), callback)


def rollback_only(db: Any) -> None:
    hooks.rollback_only(bare(db))


@pytest.fixture
def calls() -> list[str]:
    """What was called, in that order."""
    return []


@pytest.fixture
def note(twin: str, calls: list[str]) -> Callable[[str], Callable[[], Any]]:
    """Make a callback that notes its name; on the asynchronous side, a coroutine function."""

    def make(name: str) -> Callable[[], Any]:
        async def noted() -> None:
            await asyncio.sleep(0)
            calls.append(name)

        return noted if twin == "async" else partial(calls.append, name)

    return make


@pytest.fixture
def both(note: Any) -> Callable[[Any, str], None]:
    """Register for both ends: "+name" is called after the commit, "-name" after the rollback."""

    def register(db: Any, name: str) -> None:
        after_commit(db, note(f"+{name}"))
        after_rollback(db, note(f"-{name}"))

    return register


@pytest.fixture
def writer(twin: str) -> Callable[[Any, str], Callable[[], Any]]:
    """Make a callback that writes a row in a session of its own."""

    def make(door: Any, sku: str) -> Callable[[], Any]:
        async def write_async() -> None:
            async with bare(door).session() as db:
                db.add(Item(sku=sku))

        def write() -> None:
            with door.session() as db:
                db.add(Item(sku=sku))

        return write_async if twin == "async" else write

    return make


def begun(savepoint: Any) -> Any:
    """Begin a savepoint that no `with` ends."""
    if bare(savepoint) is not savepoint:
        await_only(savepoint.plain.start())
    return savepoint


def skus(door: Any) -> list[str]:
    with door.session(read_only=True) as db:
        return list(db.scalars(select(Item.sku).order_by(Item.sku)))


def lent(door: Any) -> int:
    return sum(pool.lent for pool in door.stats().pools)


# --- at the end of a scope ------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["session", "reader"])
@pytest.mark.parametrize("statement", [True, False])
def test_callbacks_run_after_the_scope_in_the_order_of_registration(
    shop: Any, both: Any, calls: list[str], verb: str, statement: bool
) -> None:
    with getattr(shop, verb)() as db:
        both(db, "a")
        if statement:
            db.scalar(text("SELECT 1"))
        both(db, "b")
        both(db, "c")
        assert calls == []
    assert calls == ["+a", "+b", "+c"]


@pytest.mark.parametrize("statement", [True, False])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_after_an_exception_those_of_the_rollback_run(
    shop: Any, both: Any, calls: list[str], kind: type[BaseException], statement: bool
) -> None:
    with pytest.raises(kind), shop.session() as db:
        both(db, "a")
        if statement:
            db.add(Item(sku="a"))
            db.flush()
        both(db, "b")
        raise kind
    assert calls == ["-a", "-b"]


@pytest.mark.parametrize("fails", [False, True])
def test_they_hold_nothing_and_may_open_a_session_of_their_own(
    open_door: Any, shop: Any, writer: Any, calls: list[str], fails: bool
) -> None:
    one = open_door(pool_size=1, max_overflow=0, pool_timeout=1.0)

    def look() -> None:
        calls.append(f"{len(one.stats().scopes)} scopes, {lent(one)} lent")

    try:
        with one.session() as db:
            db.add(Item(sku="a"))
            db.flush()
            for register in (after_commit, after_rollback):
                register(db, look)
                register(db, writer(one, "b"))
                register(db, look)
            assert lent(one) == 1
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert calls == ["0 scopes, 0 lent"] * 2
    assert skus(shop) == (["b"] if fails else ["a", "b"])


def test_what_was_committed_is_there_when_they_run(shop: Any, twin: str) -> None:
    seen: list[Any] = []

    async def look_async() -> None:
        async with bare(shop).reader() as db:
            seen.extend(await db.scalars(select(Item.sku)))

    def look() -> None:
        with shop.reader() as db:
            seen.extend(db.scalars(select(Item.sku)))

    with shop.session() as db:
        db.add(Item(sku="a"))
        after_commit(db, look_async if twin == "async" else look)
    assert seen == ["a"]


def test_each_scope_has_its_own(shop: Any, both: Any, calls: list[str]) -> None:
    with shop.session(read_only=True) as outer:
        both(outer, "outer")
        outer.scalar(text("SELECT 1"))
        with pytest.raises(ValueError, match="mine"), shop.session() as inner:
            both(inner, "inner")
            inner.scalar(text("SELECT 1"))
            raise ValueError("mine")
        assert calls == ["-inner"]
    assert calls == ["-inner", "+outer"]


def test_a_scope_that_is_entered_again_begins_afresh(
    shop: Any, behind: Any, note: Any, calls: list[str]
) -> None:
    scope = bare(shop).session()
    with behind(scope) as db:
        after_commit(db, note("first"))
        rollback_only(db)
    with behind(scope) as db:
        db.add(Item(sku="a"))
        after_commit(db, note("second"))
    with behind(scope) as db:
        rollback_only(db)
        with pytest.raises(RollbackOnly):
            db.commit()
    assert calls == ["second"]
    assert skus(shop) == ["a"]


# --- savepoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flushes", [False, True])
def test_what_was_registered_in_a_savepoint_shares_its_fate(
    shop: Any, both: Any, calls: list[str], flushes: bool
) -> None:
    with shop.session() as db:
        both(db, "before")
        with db.begin_nested():
            both(db, "released")
            db.add(Item(sku="a"))
            if flushes:
                db.flush()
        with pytest.raises(ValueError, match="mine"), db.begin_nested():
            both(db, "rolled back")
            db.add(Item(sku="b"))
            if flushes:
                db.flush()
            raise ValueError("mine")
        both(db, "after")
        assert calls == []
    assert calls == ["+before", "+released", "-rolled back", "+after"]
    assert skus(shop) == ["a"]


def test_a_released_savepoint_goes_down_with_the_whole(
    shop: Any, both: Any, calls: list[str]
) -> None:
    with pytest.raises(ValueError, match="mine"), shop.session() as db:
        both(db, "before")
        with db.begin_nested():
            both(db, "released")
        raise ValueError("mine")
    assert calls == ["-before", "-released"]


@pytest.mark.parametrize("inner", ["released", "rolled back"])
@pytest.mark.parametrize("outer", ["released", "rolled back"])
@pytest.mark.parametrize("whole", ["committed", "rolled back"])
def test_savepoints_inside_savepoints(
    shop: Any, both: Any, calls: list[str], inner: str, outer: str, whole: str
) -> None:
    def end(savepoint: Any, how: str) -> None:
        savepoint.commit() if how == "released" else savepoint.rollback()

    try:
        with shop.session() as db:
            both(db, "1")
            first = begun(db.begin_nested())
            both(db, "2")
            second = begun(db.begin_nested())
            both(db, "3")
            db.add(Item(sku="a"))
            db.flush()
            end(second, inner)
            both(db, "4")
            end(first, outer)
            both(db, "5")
            if whole == "rolled back":
                raise ValueError
    except ValueError:
        pass
    stays = whole == "committed"
    outer_stays = stays and outer == "released"
    inner_stays = outer_stays and inner == "released"
    signs = [stays, outer_stays, inner_stays, outer_stays, stays]
    assert calls == ["-+"[sign] + str(number) for number, sign in enumerate(signs, 1)]


def test_a_rollback_to_the_outer_savepoint_takes_the_open_inner_one_with_it(
    shop: Any, both: Any, calls: list[str]
) -> None:
    with shop.session() as db:
        outer = begun(db.begin_nested())
        both(db, "outer")
        begun(db.begin_nested())
        both(db, "inner")
        outer.rollback()
        both(db, "after")
    assert calls == ["-outer", "-inner", "+after"]


def test_a_release_of_the_outer_savepoint_takes_the_open_inner_one_with_it(
    shop: Any, both: Any, calls: list[str]
) -> None:
    with shop.session() as db:
        outer = begun(db.begin_nested())
        begun(db.begin_nested())
        both(db, "inner")
        outer.commit()
        with pytest.raises(ValueError, match="mine"), db.begin_nested():
            raise ValueError("mine")
    assert calls == ["+inner"]


def test_a_commit_inside_a_savepoint_commits_all(shop: Any, both: Any, calls: list[str]) -> None:
    with shop.session() as db:
        begun(db.begin_nested())
        both(db, "a")
        db.add(Item(sku="a"))
        db.commit()
        assert calls == ["+a"]
        begun(db.begin_nested())
        both(db, "b")
        db.rollback()
        assert calls == ["+a", "-b"]
    assert skus(shop) == ["a"]


def test_an_error_in_a_savepoint_that_is_caught_outside(
    shop: Any, both: Any, calls: list[str]
) -> None:
    with shop.session() as db:
        db.add(Item(id=1, sku="a"))
        db.flush()
        try:
            with db.begin_nested():
                both(db, "inside")
                db.add(Item(id=2, sku="a"))
        except IntegrityError:
            both(db, "handler")
    assert calls == ["-inside", "+handler"]
    assert skus(shop) == ["a"]


def test_what_a_flush_registers_belongs_to_the_savepoint_it_runs_in(
    shop: Any, both: Any, calls: list[str]
) -> None:
    with shop.session() as db:
        inner: Session = getattr(bare(db), "sync_session", bare(db))
        event.listen(inner, "after_flush", lambda *args: both(inner, f"flush {len(calls)}"))
        with pytest.raises(ValueError, match="mine"), db.begin_nested():
            db.add(Item(sku="a"))
            db.flush()
            raise ValueError("mine")
        db.add(Item(sku="b"))
    assert calls == ["-flush 0", "+flush 0"]


# --- in the middle of a scope ---------------------------------------------------------------------


def test_a_commit_in_the_middle_calls_at_once(
    open_door: Any, shop: Any, both: Any, writer: Any, calls: list[str]
) -> None:
    one = open_door(pool_size=1, max_overflow=0, pool_timeout=1.0)
    with one.session() as db:
        both(db, "a")
        db.add(Item(sku="a"))
        after_commit(db, writer(one, "b"))
        after_commit(db, lambda: calls.append(f"{lent(one)} lent"))
        db.commit()
        assert calls == ["+a", "0 lent"]
        both(db, "c")
        db.add(Item(sku="c"))
        db.flush()
        db.rollback()
        assert calls == ["+a", "0 lent", "-c"]
        both(db, "d")
    assert calls == ["+a", "0 lent", "-c", "+d"]
    assert skus(shop) == ["a", "b"]


@pytest.mark.parametrize("end", ["rollback", "reset", "close", "invalidate"])
@pytest.mark.parametrize("statement", [True, False])
def test_every_end_without_a_commit_is_a_rollback(
    shop: Any, both: Any, calls: list[str], end: str, statement: bool
) -> None:
    with shop.session() as db:
        both(db, "a")
        if statement:
            db.scalar(text("SELECT 1"))
        getattr(db, end)()
        assert calls == ["-a"]
    assert calls == ["-a"]


@pytest.mark.parametrize("fails", [False, True])
def test_begin_in_a_scope(shop: Any, both: Any, calls: list[str], fails: bool) -> None:
    try:
        with shop.session() as db:
            both(db, "before")
            with db.begin():
                both(db, "inside")
                db.add(Item(sku="a"))
                if fails:
                    raise ValueError
            assert calls == ["+before", "+inside"]
    except ValueError:
        pass
    assert calls == (["-before", "-inside"] if fails else ["+before", "+inside"])


def test_begin_is_still_possible_after_a_registration(shop: Any, both: Any) -> None:
    with shop.session() as db:
        both(db, "a")
        assert not db.in_transaction()
        with db.begin():
            pass


def test_in_the_middle_a_callback_may_register_another(
    shop: Any, note: Any, calls: list[str]
) -> None:
    with shop.session() as db:
        after_commit(db, lambda: after_commit(db, note("next")))
        db.add(Item(sku="a"))
        db.commit()
        assert calls == []
        db.commit()
        assert calls == ["next"]


# --- get_session(), sync_session() ----------------------------------------------------------------


def test_a_session_that_its_caller_closes(open_door: Any, shop: Any, twin: str, url: str) -> None:
    calls: list[Any] = []
    door = open_door(pool_size=1, max_overflow=0, pool_timeout=1.0)
    sync = door if twin == "sync" else bare(door).sync

    def look() -> None:
        with sync.session() as own:
            own.scalar(text("SELECT 1"))
        calls.append("looked")

    def loose() -> None:
        db = sync.get_session()
        on_commit(db, look)
        db.scalar(text("SELECT 1"))
        db.commit()
        assert calls == ["looked"]
        for ends in (db.rollback, db.close):
            for statement in (True, False):
                on_commit(db, partial(calls.append, "wrong")) if ends == db.rollback else None
                on_rollback(db, look)
                db.scalar(text("SELECT 1")) if statement else None
                calls.clear()
                ends()
                assert calls == ["looked"]
                if ends == db.close:
                    break
        with pytest.raises(SessionClosed):
            on_commit(db, look)
        with sync.get_session() as db:
            with pytest.raises(UsageError, match="get_session"):
                hooks.rollback_only(db)
            with pytest.raises(errors.AsyncCallback):
                on_commit(db, asyncio.sleep)

    if twin == "sync":
        loose()
    else:
        await_only(asyncio.to_thread(loose))


def test_what_a_closing_session_calls_finds_it_closed(open_door: Any, url: str, twin: str) -> None:
    """Or it would begin a transaction that nobody ends."""
    door = open_door()
    refused: list[BaseException] = []
    with door.session() as db:

        def use() -> None:
            try:
                on_commit(bare(db), print)
            except SessionClosed as error:
                refused.append(error)

        on_rollback(bare(db), use)
        db.scalar(text("SELECT 1"))
        db.close()
    assert len(refused) == 1
    assert lent(door) == 0


def test_sync_session_of_a_manager(open_door: Any, twin: str) -> None:
    if twin == "sync":
        return
    calls: list[int] = []
    door = bare(open_door())

    def work() -> None:
        with door.sync_session() as db:
            on_commit(db, partial(calls.append, 1))

    await_only(asyncio.to_thread(work))
    assert calls == [1]


# --- a COMMIT that fails --------------------------------------------------------------------------


deferring = pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True)  # not MySQL


def strict(shop: Any) -> Any:
    """Make a constraint that is checked by COMMIT."""
    with shop.connect() as connection:
        connection.execute(text("CREATE TABLE parent (id int PRIMARY KEY)"))
        connection.execute(
            text("CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
        )
    return shop


@deferring
@pytest.mark.parametrize("way", ["end", "commit", "begin"])
def test_a_commit_that_is_refused_is_a_rollback(
    shop: Any, both: Any, calls: list[str], way: str
) -> None:
    with pytest.raises(IntegrityError), strict(shop).session() as db:
        both(db, "a")
        if way == "begin":
            with db.begin():
                db.execute(text("INSERT INTO child VALUES (1)"))
        db.execute(text("INSERT INTO child VALUES (1)"))
        if way == "commit":
            db.commit()
    assert calls == ["-a"]


@deferring
def test_a_commit_that_is_refused_in_the_middle(shop: Any, both: Any, calls: list[str]) -> None:
    with strict(shop).session() as db:
        both(db, "a")
        db.execute(text("INSERT INTO child VALUES (1)"))
        with pytest.raises(IntegrityError):
            db.commit()
        assert calls == []
        db.rollback()
        assert calls == ["-a"]
        both(db, "b")
    assert calls == ["-a", "+b"]


def test_a_flush_that_fails_in_the_commit(shop: Any, both: Any, calls: list[str]) -> None:
    with pytest.raises(IntegrityError), shop.session() as db:
        both(db, "a")
        db.add_all([Item(sku="a"), Item(sku="a")])
    assert calls == ["-a"]


# --- callbacks that fail --------------------------------------------------------------------------


class Oops(Exception):
    """Raised by a callback."""


@pytest.mark.parametrize("where", ["end", "middle"])
@pytest.mark.parametrize("kind", [Oops, asyncio.CancelledError])
def test_one_that_raises_is_logged_with_its_line_and_the_others_run(
    shop: Any,
    note: Any,
    twin: str,
    calls: list[str],
    caplog: pytest.LogCaptureFixture,
    where: str,
    kind: type[BaseException],
) -> None:
    def fails() -> None:
        raise kind("on purpose")

    async def fails_async() -> None:
        raise kind("on purpose")

    def work() -> str:
        with shop.session() as db:
            db.add(Item(sku="a"))
            after_commit(db, note("before"))
            on_commit(bare(db), fails)
            on_commit(bare(db), fails_async if twin == "async" else fails)
            after_commit(db, note("after"))
            if where == "middle":
                db.commit()
                assert calls == ["before", "after"]
            return "result"

    assert work() == "result"
    assert calls == ["before", "after"]
    assert skus(shop) == ["a"]
    records = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(records) == 2
    for record in records:
        assert record.name == "engineroom"
        assert "on_commit callback registered at" in record.getMessage()
        assert "test_after_commit.py" in record.getMessage()
        assert " in work failed" in record.getMessage()
        assert record.exc_info
        assert record.exc_info[0] is kind


def test_the_bodys_exception_is_not_changed_by_one_that_raises(
    shop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise Oops

    mine = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, shop.session() as db:
        after_rollback(db, fails)
        raise mine
    assert caught.value is mine
    assert "on_rollback callback registered at" in caplog.text


def test_registered_by_a_callback_after_the_end(
    shop: Any, note: Any, calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caught: list[BaseException] = []

    def again() -> None:
        for register in (after_commit, after_rollback):
            try:
                register(db, note("never"))
            except SessionClosed as error:
                caught.append(error)
        rollback_only(db)

    with shop.session() as db:
        after_commit(db, again)
        after_commit(db, note("after"))
    assert calls == ["after"]
    assert len(caught) == 2
    assert "nothing can be planned" in str(caught[0])
    assert "SessionClosed" in caplog.text


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("register", [on_commit, on_rollback, hooks.rollback_only])
def test_a_session_of_somebody_else_is_refused(register: Any) -> None:
    more = () if register is hooks.rollback_only else (print,)
    for foreign in (Session(), object()):
        with pytest.raises(UsageError, match=type(foreign).__name__):
            register(foreign, *more)


@pytest.mark.parametrize("register", [on_commit, on_rollback])
def test_what_cannot_be_called_is_refused(shop: Any, register: Any, calls: list[str]) -> None:
    with shop.session() as db:
        with pytest.raises(UsageError, match="test_after_commit.py.*NoneType.*partial"):
            register(bare(db), calls.append("called too early"))


def test_sync_functions_in_an_async_scope(shop: Any, note: Any, calls: list[str]) -> None:
    with shop.session() as db:
        after_commit(db, partial(calls.append, "a"))
        after_commit(db, note("b"))
        after_commit(db, lambda name="c": note(name)())
        after_commit(db, partial(calls.append, "d"))
    assert calls == ["a", "b", "c", "d"]


# --- rollback_only --------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", [True, False])
def test_rollback_only_rolls_back_without_an_exception(
    shop: Any, both: Any, calls: list[str], statement: bool
) -> None:
    def work() -> str:
        with shop.session() as db:
            both(db, "a")
            if statement:
                db.add(Item(sku="a"))
                db.flush()
            rollback_only(db)
            rollback_only(db)  # twice is once
            both(db, "b")
            return "result"

    assert work() == "result"
    assert skus(shop) == []
    assert calls == ["-a", "-b"]
    assert lent(shop) == 0


def test_rollback_only_in_the_middle_of_the_commit_says_that_it_is_late(shop: Any) -> None:
    with pytest.raises(RollbackOnly, match="while the end of its scope commits"):
        with shop.session() as db:
            core = getattr(bare(db), "sync_session", bare(db))
            event.listen(core, "before_commit", hooks.rollback_only)
            db.add(Item(sku="a"))
    assert skus(shop) == []
    assert lent(shop) == 0


def test_rollback_only_refuses_commit_and_releases_savepoints(shop: Any) -> None:
    with shop.session() as db:
        db.add(Item(sku="a"))
        db.commit()
        rollback_only(db)
        for sku in "bc":
            with db.begin_nested():
                db.add(Item(sku=sku))
        with pytest.raises(RollbackOnly, match="test_after_commit.py.*Leave the scope"):
            db.commit()
        with pytest.raises(RollbackOnly):
            begun(db.begin_nested())
            db.commit()
        db.rollback()
        with pytest.raises(RollbackOnly), db.begin():
            db.add(Item(sku="d"))
    assert skus(shop) == ["a"]


def test_rollback_only_refuses_a_commit_around_an_open_savepoint(shop: Any) -> None:
    """SQLAlchemy announces it before it releases what is inside."""
    with shop.session() as db:
        rollback_only(db)
        with pytest.raises(RollbackOnly), db.begin():
            db.add(Item(sku="a"))
            begun(db.begin_nested())
    assert skus(shop) == []


# --- closed from outside; other session classes; memory -------------------------------------------


def test_close_over_an_open_scope_is_a_rollback(shop: Any, both: Any, calls: list[str]) -> None:
    with pytest.raises(SessionClosed), shop.session() as db:
        both(db, "a")
        db.add(Item(sku="a"))
        db.flush()
        close_beside(shop)
        with pytest.raises(SessionClosed):
            both(db, "b")
    assert calls == ["-a"]


def close_beside(door: Any) -> None:
    """Close from another task or thread."""
    if bare(door) is not door:
        await_only(asyncio.create_task(bare(door).close(timeout=0)))
        return
    thread = threading.Thread(target=partial(door.close, timeout=0))
    thread.start()
    thread.join()


def test_the_session_classes_of_sqlmodel(
    open_door: Any, both: Any, calls: list[str], twin: str
) -> None:
    sync = {"session_class": ModelSession}
    door = open_door(**(sync if twin == "sync" else {"async_session_class": AsyncModelSession}))
    with door.session() as db:
        both(db, "a")
        with db.begin_nested():
            both(db, "b")
        db.commit()
        both(db, "c")
        rollback_only(db)
    assert calls == ["+a", "+b", "-c"]


def test_two_thousand_scopes_with_hooks_leave_nothing_behind(shop: Any) -> None:
    def work(number: int) -> None:
        try:
            with shop.session(read_only=True) as db:
                after_commit(db, int)
                db.scalar(text("SELECT 1"))
                after_rollback(db, lambda: db)
                if number % 4 == 1:
                    rollback_only(db)
                if number % 4 == 2:
                    db.commit()
                if number % 4 == 3:
                    raise ValueError
        except ValueError:
            pass

    def counted() -> Counter[str]:
        kinds = (Session, SessionTransaction, hooks.Hooks, hooks.Hook)
        return Counter(type(one).__name__ for one in gc.get_objects() if isinstance(one, kinds))

    for number in range(20):
        work(number)
    gc.collect()
    before, listeners = counted(), len(registry._key_to_collection)
    for number in range(2000):
        work(number)
    gc.collect()
    assert counted() - before == Counter()
    assert len(registry._key_to_collection) <= listeners
    assert len(registry._collection_to_key) <= listeners + 50
    assert shop.stats().scopes == ()


def test_the_last_reference_frees_a_session_with_hooks(shop: Any) -> None:
    """No cycle: nothing is left to the garbage collector."""

    def left() -> list[str]:
        return [type(one).__name__ for one in gc.get_objects() if isinstance(one, hooks.Hooks)]

    gc.collect()
    gc.disable()
    try:
        assert left() == []
        for end in ("commit", "rollback", "close", "flush"):
            with shop.session() as db:
                after_commit(db, int)
                db.scalar(text("SELECT 1"))
                with db.begin_nested():
                    after_commit(db, int)
                getattr(db, end)()
            del db
            assert left() == [], end
    finally:
        gc.enable()
