"""Contract 4: one file for Celery's own class, where the contract is Celery's, and for ours."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from celery.backends.database.models import Task
from celery.backends.database.session import ResultModelBase
from celery.backends.database.session import SessionManager as CelerysSessionManager
from scenario import fork, in_threads, on_all_three, run, settled, until
from sqlalchemy import NullPool, QueuePool, create_engine, event, inspect, text
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from test_cap import Watch

from engineroom import Database, Stats, UsageError, on_commit
from engineroom.engines import ROOMS
from engineroom.errors import (
    CloseInsideScope,
    InvalidOption,
    InvalidURL,
    ManagerClosed,
    SyncInAsync,
    UnknownOption,
)
from engineroom.registry import SessionManager
from engineroom.sessions import guarded
from engineroom.testing import PostgresServer
from engineroom.urls import masked

SECRET = "hunter2"
CELERYS = ResultModelBase.metadata


def ours(engine_callback: Any = None, **options: Any) -> Any:
    return SessionManager(engine_callback, CELERYS, **options)


@pytest.fixture(params=[CelerysSessionManager, ours], ids=["Celery's", "ours"])
def make(request: pytest.FixtureRequest) -> Any:
    """What makes a manager, of either kind."""
    return request.param


@pytest.fixture
def close_all() -> Iterator[Callable[[Any], Any]]:
    """Have managers and engines end with the test."""
    made: list[Any] = []

    def keep(one: Any) -> Any:
        made.append(one)
        return one

    yield keep
    for one in made:
        if isinstance(one, SessionManager):
            one.close(0)
        elif isinstance(one, Engine):
            one.dispose()
        else:
            for engine in one._engines.values():
                engine.dispose()


@pytest.fixture
def manager(close_all: Any) -> SessionManager:
    """One of ours, in a process that has forked."""
    made: SessionManager = close_all(ours())
    made.forked = True
    return made


# -- what both do --------------------------------------------------------------------------------


def test_a_new_manager_has_not_forked_and_has_prepared_nothing(make: Any) -> None:
    manager = make()
    assert (manager.forked, manager.prepared, manager.engine_callback) == (False, False, None)
    assert (manager._engines, manager._sessions) == ({}, {})
    assert isinstance(manager._engines, dict)
    assert isinstance(manager._sessions, dict)
    manager._after_fork()
    assert manager.forked is True


@on_all_three
def test_without_a_fork_each_call_makes_an_engine_that_keeps_nothing(
    make: Any, url: str, backends: Any, close_all: Any
) -> None:
    manager = close_all(make())
    dropped = {"pool_size": 3, "pool_recycle": 9, "max_overflow": 2, "pool_nonsense": 1}
    one, other = manager.get_engine(url, echo_pool=True, **dropped), manager.get_engine(url)
    assert one is not other
    assert isinstance(one.pool, NullPool)
    with one.connect() as connection:
        assert connection.scalar(text("SELECT 40 + 2")) == 42
    assert manager._engines == {}
    if url.startswith("postgresql"):
        assert settled(url) == []


def test_after_a_fork_there_is_one_engine_for_each_url(
    make: Any, url: str, postgres_url: str, close_all: Any
) -> None:
    manager = close_all(make())
    manager._after_fork()
    engine = manager.get_engine(url, pool_size=2)
    assert manager.get_engine(url, pool_size=2) is engine
    assert isinstance(engine.pool, QueuePool)
    assert engine.pool.size() == 2
    assert manager._engines == {url: engine}
    other = f"{postgres_url}?application_name=another"
    assert manager.get_engine(other) is not engine
    assert set(manager._engines) == {url, other}


@on_all_three
def test_sessions_come_with_their_engine(make: Any, url: str, close_all: Any) -> None:
    manager = close_all(make())
    engine, sessions = manager.create_session(url)
    with sessions() as session:
        assert isinstance(session, Session)
        assert session.get_bind() is engine
    assert manager._sessions == {}
    manager._after_fork()
    engine, sessions = manager.create_session(url)
    assert manager.create_session(url) == (engine, sessions)
    assert manager._sessions == {url: sessions}
    assert manager.create_session(url, short_lived_sessions=True)[1] is not sessions


@on_all_three
def test_the_session_of_the_factory_finds_its_tables(make: Any, url: str, close_all: Any) -> None:
    manager = close_all(make())
    manager._after_fork()
    session = manager.session_factory(dburi=url, short_lived_sessions=False, pool_pre_ping=True)
    session.add(Task("one"))
    session.flush()
    assert session.query(Task).filter(Task.task_id == "one").one().status == "PENDING"
    session.commit()
    session.close()
    assert manager.prepared is True
    names = inspect(manager.get_engine(url, pool_pre_ping=True)).get_table_names()
    assert {"celery_taskmeta", "celery_tasksetmeta"} <= set(names)


@on_all_three
def test_a_callback_meets_every_engine_before_its_tables(
    make: Any, url: str, close_all: Any
) -> None:
    seen: list[list[str]] = []
    manager = close_all(make(lambda engine: seen.append(inspect(engine).get_table_names())))
    manager.session_factory(url).close()
    assert seen == [[]]
    manager._after_fork()
    manager.session_factory(url).close()
    manager.session_factory(url).close()
    assert len(seen) == 2
    manager.invalidate(url)
    manager.session_factory(url).close()
    assert len(seen) == 3


def test_what_is_invalidated_is_forgotten_and_its_connections_are_closed(
    make: Any, postgres_url: str, close_all: Any
) -> None:
    manager = close_all(make())
    manager._after_fork()
    manager.session_factory(postgres_url).close()
    engine = manager.get_engine(postgres_url)
    engine.connect().close()
    assert len(settled(postgres_url, 1)) == 1
    manager.invalidate(postgres_url)
    manager.invalidate("postgresql://nobody@nowhere/unknown")
    assert (manager._engines, manager._sessions) == ({}, {})
    assert settled(postgres_url) == []
    assert manager.get_engine(postgres_url) is not engine


def test_what_others_put_into_its_dictionaries_is_theirs(
    make: Any, sqlite_url: str, close_all: Any
) -> None:
    """Celery's own tests put engines there, look, and clear."""
    manager = close_all(make())
    manager._after_fork()
    disposed: list[Engine] = []
    theirs = close_all(create_engine(sqlite_url))
    event.listen(theirs, "engine_disposed", disposed.append)
    manager._engines[sqlite_url] = theirs
    assert manager.get_engine(sqlite_url) is theirs
    assert manager.create_session(sqlite_url)[0] is theirs
    manager.session_factory(sqlite_url).close()
    assert sqlite_url in manager._sessions
    manager.invalidate(sqlite_url)
    assert disposed == [theirs]
    manager.get_engine(sqlite_url)
    manager._engines.clear()
    manager._sessions.clear()
    assert manager.get_engine(sqlite_url) is manager._engines[sqlite_url]


def test_a_foreign_engine_can_be_prepared(make: Any, url: str, close_all: Any) -> None:
    manager = close_all(make())
    driver = url.replace("postgresql://", "postgresql+psycopg://")
    engine = close_all(create_engine(driver))
    manager.prepare_models(engine)
    assert inspect(engine).has_table("celery_taskmeta")


def test_who_creates_the_same_tables_without_a_lock_is_tolerated(
    make: Any, pg18: PostgresServer, postgres_url: str, close_all: Any
) -> None:
    """The race, held still: another transaction has created them and commits in a moment."""
    manager = close_all(make())
    engine = manager.get_engine(postgres_url)
    rival = close_all(create_engine(postgres_url.replace("postgresql://", "postgresql+psycopg://")))
    with rival.connect() as connection:
        CELERYS.create_all(connection)
        worker = threading.Thread(target=manager.prepare_models, args=(engine,))
        worker.start()
        name = postgres_url.rpartition("/")[2]
        waiting = f"FROM pg_stat_activity WHERE datname = '{name}' AND wait_event_type = 'Lock'"
        until(lambda: pg18.execute(f"SELECT pid {waiting}"), bool)
        connection.commit()
        worker.join()
    assert manager.prepared is True


@pytest.mark.parametrize("method", ["fork"])
def test_a_child_of_multiprocessing_has_forked(make: Any, method: str) -> None:
    manager = make()
    context = multiprocessing.get_context(method)
    answer = context.SimpleQueue()
    child = context.Process(target=lambda: answer.put(manager.forked))
    child.start()
    assert answer.get() is True
    child.join()
    assert manager.forked is False


# -- the traps of the original, which ours has not ---------------------------------------------


def test_each_url_is_prepared_by_itself(
    manager: SessionManager, sqlite_url: str, postgres_url: str
) -> None:
    """The first trap: one flag for all; the second database never got its tables."""
    for url in (sqlite_url, postgres_url):
        session = manager.session_factory(url)
        assert session.query(Task).all() == []
        session.close()


def test_a_url_is_prepared_once_and_anew_after_it_was_invalidated(
    manager: SessionManager, sqlite_url: str
) -> None:
    looked: list[str] = []
    engine = manager.get_engine(sqlite_url)
    manager.prepare_models(engine)

    @event.listens_for(engine, "before_cursor_execute")
    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        looked.append(statement)

    manager.prepare_models(engine)
    assert looked == []
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE celery_taskmeta")
    manager.invalidate(sqlite_url)
    session = manager.session_factory(sqlite_url)
    assert session.query(Task).all() == []
    session.close()


def spellings(url: str) -> list[Any]:
    """Return other ways to write a URL of PostgreSQL, all of one database."""
    plain = make_url(url).set(drivername="postgresql")
    rest = plain.render_as_string(hide_password=False).partition("://")[2]
    return [plain, f"postgres://{rest}", f"postgresql+psycopg2://{rest}", f" {url}"]


def test_however_a_url_is_written_invalidating_it_reaches_all_of_its_engines(
    manager: SessionManager, postgres_url: str
) -> None:
    for other in spellings(postgres_url):
        for url in (postgres_url, other):
            session = manager.session_factory(url)
            session.scalar(text("SELECT 1"))
            session.close()
        with manager.get_engine(postgres_url).begin() as connection:
            connection.exec_driver_sql("DROP TABLE celery_taskmeta")
        manager.invalidate(other)
        assert (manager._engines, manager._sessions) == ({}, {})
        assert settled(postgres_url) == []
        for url in (postgres_url, other):
            session = manager.session_factory(url)
            assert session.query(Task).all() == []
            session.close()
    another = f"{postgres_url}?application_name=another"
    work(manager, another)
    manager.invalidate(postgres_url)
    assert set(manager._engines) == {another}


def notices(url: str) -> list[bool]:
    manager = ours()
    seen = []

    def child() -> None:
        assert manager.forked, "the fork was not noticed"

    fork(child)()
    seen.append(manager.forked)
    manager.close()
    return seen


def test_a_plain_fork_is_noticed(sqlite_url: str) -> None:
    """The second: only what multiprocessing and billiard start was noticed, where kombu is."""
    assert run(notices, sqlite_url) == [False]


def shares_nothing(url: str) -> list[int]:
    manager = ours()
    manager.forked = True

    def pid() -> int:
        session = manager.session_factory(url)
        try:
            return int(session.scalar(text("SELECT pg_backend_pid()")))
        finally:
            session.close()

    held = manager.create_session(url)[1]()  # in a transaction, over the fork
    first = [pid(), int(held.scalar(text("SELECT pg_backend_pid()")))]
    engine = manager.get_engine(url)

    def child() -> None:
        assert manager.get_engine(url) is engine
        assert pid() not in first, "the child took its parent's connection"
        with pytest.raises(UsageError):
            held.scalar(text("SELECT 1"))
        manager.close()
        assert pid_is_refused()

    def pid_is_refused() -> bool:
        with pytest.raises(ManagerClosed):
            pid()
        return True

    waits = [fork(child) for _ in range(3)]
    for wait in waits:
        wait()
    assert held.scalar(text("SELECT pg_backend_pid()")) == first[1]
    held.close()
    assert pid() in first
    manager.close()
    return settled(url)


def test_a_child_has_no_part_in_what_was_kept_before(postgres_url: str) -> None:
    """The third: engines that were kept before a fork went with their sockets into the child."""
    assert run(shares_nothing, postgres_url) == []


def passes_over(url: str) -> list[int]:
    manager = ours()
    session = manager.session_factory(url)  # no fork yet: an engine that keeps nothing
    first = session.scalar(text("SELECT pg_backend_pid()"))

    def child() -> None:
        with pytest.raises(UsageError):
            session.scalar(text("SELECT 1"))
        other = manager.session_factory(url)
        assert other.scalar(text("SELECT pg_backend_pid()")) != first
        other.close()

    fork(child)()
    assert session.scalar(text("SELECT pg_backend_pid()")) == first, "the child ended it"
    session.close()
    manager.close()
    return settled(url)


def test_a_session_open_at_the_first_fork_stays_the_parents(postgres_url: str) -> None:
    assert run(passes_over, postgres_url) == []


def test_threads_that_come_at_once_get_one_engine(postgres_url: str, close_all: Any) -> None:
    """The fourth: look, and then make. Each thread made one, and all but one leaked."""
    made: list[Engine] = []

    def slow(engine: Engine) -> None:
        made.append(engine)
        time.sleep(0.05)

    manager = close_all(ours(slow))
    manager.forked = True
    start = threading.Barrier(50)
    got: list[Any] = [None] * 50

    def ask(number: int) -> None:
        start.wait()
        got[number] = manager.create_session(postgres_url)

    in_threads(50, ask)
    assert len(made) == 1
    assert set(got) == {(made[0], manager._sessions[postgres_url])}


def test_it_works_while_threads_invalidate(manager: SessionManager, postgres_url: str) -> None:
    """As Celery's backend does at every error that it tries again."""
    served: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if number == 0:
                manager.invalidate(postgres_url)
                continue
            session = manager.session_factory(postgres_url)
            served.append(session.scalar(text("SELECT 1")))
            session.close()

    in_threads(8, work)
    assert len(served) == 140
    manager.close()
    assert settled(postgres_url) == []


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize(
    "uri",
    [
        f"me:{SECRET}@host/db",
        f"oracle://me:{SECRET}@host/db",
        f"postgresql://me:{SECRET}@host:x/db",
    ],
)
def test_what_is_no_url_is_told_without_its_secrets(
    manager: SessionManager, uri: str, forked: bool
) -> None:
    manager.forked = forked
    for verb in (manager.get_engine, manager.session_factory, manager.database):
        with pytest.raises(InvalidURL) as told:
            verb(uri)
        assert SECRET not in str(told.value)
    assert manager._engines == {}


def test_no_secret_is_in_what_it_prints(close_all: Any) -> None:
    def failing(engine: Engine) -> None:
        raise LookupError("no")

    uri = f"postgresql://me:{SECRET}@host/db?sslpassword={SECRET}"
    manager = close_all(ours())
    manager.forked = True
    manager.create_session(uri)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        manager.get_engine(uri, connect_args={"password": SECRET})
    printed = [repr(manager._engines), str(manager._sessions), f"{manager._tenants}"]
    printed.append(str(seen[0].message))
    printed.append(manager.database(uri).stats().pools.__repr__())
    assert SECRET not in "".join(printed)
    assert "postgresql://me:***@host/db" in printed[0]
    assert "postgresql://me:***@host/db" in printed[1]


@pytest.mark.parametrize("forked", [False, True])
def test_an_argument_that_create_engine_does_not_know_is_named(
    manager: SessionManager, sqlite_url: str, forked: bool
) -> None:
    manager.forked = forked
    with pytest.raises(UnknownOption, match="create_engine\\(\\) takes no colour for sqlite:"):
        manager.get_engine(sqlite_url, colour="red")
    assert (manager._engines, manager._tenants) == ({}, {})
    manager.forked = True
    with pytest.raises(UnknownOption, match="Did you mean pool_size\\?"):
        manager.get_engine(sqlite_url, pool_sise=3)
    with pytest.raises(InvalidOption, match="pool_size=0 cannot be used"):
        manager.get_engine(sqlite_url, pool_size=0)
    with pytest.raises(InvalidOption, match="cannot carry 'poolclass'"):
        manager.get_engine(sqlite_url, poolclass=NullPool)
    with pytest.raises(TypeError, match="nonsense"):  # the driver's own errors pass
        manager.get_engine(sqlite_url, connect_args={"nonsense": 1}).connect()


def test_arguments_reach_the_engine(manager: SessionManager, postgres_url: str) -> None:
    engine = manager.get_engine(
        postgres_url,
        pool_size=3,
        pool_timeout=7,
        pool_recycle=11,
        pool_pre_ping=True,
        echo=False,
        isolation_level="SERIALIZABLE",
        connect_args={"application_name": "theirs"},
    )
    settings = manager._tenants[postgres_url].settings
    assert (settings.pool_size, settings.pool_timeout, settings.pool_recycle) == (3, 7, 11)
    assert settings.pool_pre_ping is True
    with engine.connect() as connection:
        seen = (
            "SELECT current_setting('application_name'), current_setting('transaction_isolation')"
        )
        assert tuple(connection.execute(text(seen)).one()) == ("theirs", "serializable")


def test_other_arguments_give_the_same_engine_and_one_warning(
    manager: SessionManager, sqlite_url: str
) -> None:
    engine = manager.get_engine(sqlite_url, pool_size=2, echo=False)
    with pytest.warns(RuntimeWarning, match=r"other arguments \(max_overflow, pool_size\)") as seen:
        assert manager.get_engine(sqlite_url, pool_size=3, echo=False, max_overflow=1) is engine
    assert seen[0].filename == __file__
    assert manager.get_engine(sqlite_url, pool_size=4) is engine  # a second one would be an error
    assert manager.get_engine(sqlite_url) is engine


@pytest.mark.parametrize("forked", [False, True])
def test_the_engine_of_a_callback_that_raises_is_gone(
    postgres_url: str, close_all: Any, forked: bool
) -> None:
    kept: list[Any] = []

    def failing(engine: Engine) -> None:
        with engine.connect() as connection:
            connection.scalar(text("SELECT 1"))
        kept.append(engine.connect())
        raise LookupError("no such tenant")

    manager = close_all(ours(failing))
    manager.forked = forked
    with pytest.raises(LookupError, match="no such tenant"):
        manager.session_factory(postgres_url)
    assert (manager._engines, manager._sessions, manager._tenants) == ({}, {}, {})
    assert settled(postgres_url) == []
    manager.engine_callback = None
    manager.session_factory(postgres_url).close()


def test_a_server_that_is_not_there_is_the_drivers_error(close_all: Any) -> None:
    manager = close_all(ours())
    with pytest.raises(OperationalError):
        manager.session_factory("postgresql://127.0.0.1:1/none")
    assert manager.prepared is False


@pytest.mark.parametrize("option", ["max_engines", "max_connections"])
def test_a_limit_is_one_or_more(option: str) -> None:
    with pytest.raises(InvalidOption, match=f"{option}=0"):
        SessionManager(**{option: 0})  # type: ignore[arg-type]


# -- beyond the contract -------------------------------------------------------------------------


def names(url: str, count: int) -> list[str]:
    """Return so many URLs of one database; asyncpg takes other parameters than libpq."""
    if "asyncpg" in url:
        return [f"{url}?prepared_statement_cache_size={number}" for number in range(1, count + 1)]
    return [f"{url}?application_name=tenant{number}" for number in range(count)]


def work(manager: SessionManager, url: str) -> None:
    session = manager.create_session(url)[1]()
    assert session.scalar(text("SELECT 1")) == 1
    session.commit()
    session.close()


def test_the_engine_used_longest_ago_gives_way(close_all: Any, postgres_url: str) -> None:
    manager = close_all(ours(max_engines=3))
    manager.forked = True
    first, second, third, fourth = names(postgres_url, 4)
    for url in (first, second, third):
        work(manager, url)
    assert len(settled(postgres_url, 3)) == 3
    work(manager, first)  # now the second is the oldest
    work(manager, fourth)
    assert set(manager._engines) == set(manager._sessions) == {first, third, fourth}
    assert len(settled(postgres_url, 3)) == 3


def test_an_engine_in_use_does_not_give_way(close_all: Any, postgres_url: str) -> None:
    manager = close_all(ours(max_engines=1))
    manager.forked = True
    first, second, third = names(postgres_url, 3)
    session = manager.create_session(first)[1]()
    session.scalar(text("SELECT 1"))
    work(manager, second)
    assert set(manager._engines) == {first, second}
    with manager.database(second).sync.session():
        work(manager, third)
        assert set(manager._engines) == {first, second, third}
    assert session.scalar(text("SELECT 1")) == 1
    session.close()
    work(manager, second)
    work(manager, f"{third}4")
    assert set(manager._engines) == {f"{third}4"}
    assert len(settled(postgres_url, 1)) == 1


def test_who_holds_an_engine_that_gave_way_may_go_on(close_all: Any, postgres_url: str) -> None:
    manager = close_all(ours(max_engines=1))
    manager.forked = True
    first, second = names(postgres_url, 2)
    engine, sessions = manager.create_session(first)
    work(manager, second)
    assert first not in manager._engines
    with sessions() as session:
        assert session.scalar(text("SELECT 1")) == 1
    assert len(settled(postgres_url, 1)) == 1, "an engine that gave way keeps nothing"
    assert manager.get_engine(first) is not engine


def test_there_is_one_cap_over_all_urls_forked_or_not(close_all: Any, postgres_url: str) -> None:
    manager = close_all(ours(max_connections=2))
    urls = names(postgres_url, 8)
    most: list[int] = []
    for forked in (False, True):
        manager.forked = forked
        in_threads(8, lambda number: [work(manager, urls[number]) for _ in range(5)])
        most.append(len(settled(postgres_url, 2 if forked else 0)))
        stats = manager.database(urls[0]).stats()
        assert [(cap.limit, cap.open <= 2) for cap in stats.caps] == [(2, True)]
    assert most == [0, 2]


def test_stats_are_those_of_every_url(manager: SessionManager, postgres_url: str) -> None:
    assert manager.stats() == Stats(state="open", scopes=(), pools=())
    first, second = names(postgres_url, 2)
    work(manager, first)
    with manager.database(second).sync.session() as db, manager.database(first).sync.session():
        db.execute(text("SELECT 1"))
        stats = manager.stats()
        assert [scope.connected for scope in stats.scopes] == [True, False]  # oldest first
        seen = {pool.url: (pool.lent, pool.idle) for pool in stats.pools}
        assert seen == {masked(first): (0, 1), masked(second): (1, 0)}
    manager.close()
    assert manager.stats().state == "closed"
    with SessionManager(max_connections=3) as another, Database(first, max_connections=5):
        work(another, first)
        until(lambda: [(cap.limit, cap.open) for cap in another.stats().caps], is_three_and_five)


def is_three_and_five(caps: list[tuple[int, int]]) -> bool:
    return caps == [(3, 0), (5, 0)]


@on_all_three
def test_a_session_has_hooks(manager: SessionManager, url: str) -> None:
    called: list[str] = []
    session = manager.session_factory(url)
    on_commit(session, lambda: called.append("committed"))
    session.add(Task("one"))
    session.commit()
    session.close()
    assert called == ["committed"]


def test_closing_leaves_no_connection_and_refuses_more(postgres_url: str) -> None:
    with ours() as manager:
        early = manager.session_factory(postgres_url)
        early.scalar(text("SELECT 1"))
        manager.forked = True
        late = manager.session_factory(postgres_url)
        late.scalar(text("SELECT 1"))
        engine = manager.get_engine(postgres_url)
    assert settled(postgres_url) == []
    for session in (early, late):
        with pytest.raises(UsageError):
            session.scalar(text("SELECT 1"))
    assert (manager._engines, manager._sessions) == ({}, {})
    for verb in (manager.get_engine, manager.create_session, manager.session_factory):
        with pytest.raises(ManagerClosed, match="Make another one"):
            verb(postgres_url)
    with pytest.raises(ManagerClosed):
        manager.database(postgres_url)
    manager.close()
    del engine


def test_closing_waits_for_scopes_and_is_refused_inside_one(
    manager: SessionManager, postgres_url: str
) -> None:
    other = f"{postgres_url}?application_name=other"
    work(manager, other)
    entered, leave = threading.Event(), threading.Event()
    seen: list[int] = []

    def in_scope() -> None:
        with manager.database(postgres_url).sync.session() as session:
            entered.set()
            leave.wait()
            seen.append(session.scalar(text("SELECT 1")))

    thread = threading.Thread(target=in_scope)
    thread.start()
    entered.wait()
    with manager.database(other).sync.session():
        with pytest.raises(CloseInsideScope):
            manager.close()
    work(manager, other)  # it is as open as before
    threading.Timer(0.05, leave.set).start()
    manager.close()
    thread.join()
    assert seen == [1]
    assert settled(postgres_url) == []


@pytest.mark.anyio
async def test_the_asynchronous_side_shares_all_of_it(
    driver_url: str, close_all: Any, backends: Any, eventually_async: Any
) -> None:
    called: list[Engine] = []
    async with SessionManager(called.append, CELERYS, max_connections=2) as manager:
        session = await manager.async_session_factory(driver_url, pool_size=2)
        task = Task("one")
        task.date_done = datetime(2026, 1, 1)  # noqa: DTZ001  # asyncpg takes none of Celery's own
        session.add(task)
        await session.commit()
        await session.close()
        assert manager.prepared is True
        database = manager.database(driver_url, pool_size=2)
        assert database.engine.sync_engine is called[0]
        assert called == [database.engine.sync_engine]
        async with database.session() as db:
            assert len((await db.scalars(text("SELECT task_id FROM celery_taskmeta"))).all()) == 1
        with pytest.raises(SyncInAsync, match="await manager.close"):
            manager.close()

        async def one(url: str) -> Any:
            async with manager.database(url).session() as db:
                return await db.scalar(text("SELECT 1"))

        assert await asyncio.gather(*map(one, names(driver_url, 8))) == [1] * 8
        assert len(backends(driver_url)) <= 2
    await eventually_async(lambda: not backends(driver_url))
    with pytest.raises(ManagerClosed):
        await manager.async_session_factory(driver_url)


@pytest.mark.anyio
async def test_a_session_that_would_stop_the_event_loop_is_told(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_SYNC_IN_ASYNC", "error")
    with SessionManager() as manager:
        with pytest.raises(SyncInAsync, match="async_session_factory"):
            manager.session_factory(sqlite_url)
        (await asyncio.to_thread(manager.session_factory, sqlite_url)).close()


@pytest.mark.anyio
async def test_invalidating_and_giving_way_reach_the_loop(
    driver_url: str, backends: Any, eventually_async: Any
) -> None:
    async with SessionManager(max_engines=1) as manager:
        urls = names(driver_url, 2)
        for url in urls:
            async with manager.database(url).session() as db:
                assert await db.scalar(text("SELECT 1")) == 1
        await eventually_async(lambda: len(backends(driver_url)) == 1)
        manager.invalidate(urls[1])
        await eventually_async(lambda: not backends(driver_url))


@pytest.mark.anyio
async def test_a_door_that_was_closed_is_opened_by_the_next_who_asks(driver_url: str) -> None:
    async with SessionManager() as manager:
        first = manager.database(driver_url)
        await first.close()
        async with manager.database(driver_url).session() as db:
            assert await db.scalar(text("SELECT 1")) == 1


# -- for a long time -----------------------------------------------------------------------------


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def meets_many(url: str, count: int, step: int) -> dict[str, Any]:
    """Meet so many URLs, one unit of work each; say what each `step` of them took and left."""
    manager = SessionManager(max_connections=20)
    manager.forked = True
    seconds, cpu, size = [], [], []
    for first in range(0, count, step):
        started, used = time.perf_counter(), time.process_time()
        for number in range(first, first + step):
            work(manager, f"{url}?application_name=tenant{number}")
        seconds.append(round(time.perf_counter() - started, 3))
        cpu.append(round(time.process_time() - used, 3))
        gc.collect()
        size.append(resident())
    classes = guarded(Session).__subclasses__()  # each factory has its own, while it lives
    kept = [len(manager._engines), len(manager._sessions), len(ROOMS), len(classes)]
    kept.append(len(manager._owners))
    manager.close()
    return {"seconds": seconds, "cpu": cpu, "size": size, "kept": kept, "left": settled(url)}


@pytest.mark.parametrize(
    ("count", "step"),
    [(400, 100), pytest.param(10_000, 1_000, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])],
)
def test_ten_thousand_urls(pg18: PostgresServer, postgres_url: str, count: int, step: int) -> None:
    with Watch(pg18, postgres_url.rpartition("/")[2]) as watch:
        seen = run(meets_many, postgres_url, count, step, deadline=1000)
    print(f"{count} URLs: {seen}, most backends {watch.most}")
    assert 0 < watch.most <= 20
    assert seen["left"] == []
    assert seen["kept"][:2] == [256, 256]
    assert max(seen["kept"]) <= 260  # what gave way is forgotten everywhere
    if count > 1_000:
        first, last = seen["size"][1], seen["size"][-1]
        assert last - first < 8_000_000, f"it grew by {(last - first) / 1e6:.1f} MB"
        assert seen["cpu"][0] / seen["cpu"][-1] >= 0.9, "it became slower"
