"""What the library rides through by itself, and what it says of what it cannot."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from nights import Load, WatchedLoad
from scenario import Model, backends, run, server
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from test_deadlines import Door, door, every_side

from engineroom import Database, DatabaseSessionManager
from engineroom.errors import ConnectTimeout
from engineroom.testing import PostgresServer, WireProxy, postgres

__all__ = ["door"]

OPTIONS: list[dict[str, Any]] = [{}, {"isolation_level": "SERIALIZABLE"}, {"read_only": True}]


# -- a BEGIN that meets a dead connection ------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "serializable", "read only"])
@pytest.mark.parametrize("fault", ["cut_before", "cut_after"])
@every_side
def test_a_begin_that_was_not_answered_is_repeated_elsewhere(
    door: Callable[..., Door],
    proxy: WireProxy,
    side: str,
    driver: str,
    fault: str,
    options: dict[str, Any],
) -> None:
    one = door(side, driver)
    checkouts: list[object] = []
    engine = one.manager.engine.sync_engine if side == "async" else one.manager.sync_engine
    event.listen(engine, "checkout", lambda *args: checkouts.append(args[0]))
    struck = getattr(proxy, fault)("BEGIN")
    shown = one.show(options)
    assert struck.happened
    assert shown == [
        "serializable" if "isolation_level" in options else "read committed",
        "on" if "read_only" in options else "off",
    ]
    assert len(checkouts) == 2  # what the application does at a checkout was done with both
    assert checkouts[0] is not checkouts[1]
    assert one.lent() == 0
    assert one.show({}) == ["read committed", "off"]  # nothing of it stays


@every_side
def test_a_statement_is_not_repeated(
    door: Callable[..., Door], proxy: WireProxy, side: str, driver: str
) -> None:
    one = door(side, driver)
    for fault in (proxy.cut_before, proxy.cut_after):
        struck = fault("SELECT 3")
        proxy.reset()
        with pytest.raises(DBAPIError):
            one.unit(lambda db: db.execute(text("SELECT 3")))
        assert struck.happened
        assert sum("SELECT 3" in each for each in proxy.statements) == 1
        assert one.lent() == 0


@every_side
def test_a_begin_after_something_was_done_is_not_repeated(
    door: Callable[..., Door], proxy: WireProxy, side: str, driver: str
) -> None:
    """What the first transaction left on the connection would be missing."""
    one = door(side, driver)

    def work(connection: Any) -> None:
        connection.execute(text("SELECT 1"))
        connection.commit()
        fault = proxy.cut_before("BEGIN")
        with pytest.raises(DBAPIError):
            connection.execute(text("SELECT 1"))
        assert fault.happened

    if side == "sync":
        with one.manager.sync_engine.connect() as connection:
            work(connection)
    else:

        async def main() -> None:
            async with one.manager.engine.connect() as connection:
                await connection.run_sync(work)

        one.runner.run(main())
    assert one.lent() == 0


# -- siblings ----------------------------------------------------------------------------------


def test_the_siblings_of_a_dead_connection_are_asked(
    pg18: PostgresServer, database: str, proxy: WireProxy
) -> None:
    with Database(
        proxy.url(pg18.url(database, "psycopg")), pool_size=2, pool_ping_after=60
    ) as door:

        def pid(db: Any) -> int:
            return int(db.scalar(text("SELECT pg_backend_pid()")))

        with door.session() as first, door.session() as second:
            pids = [pid(first), pid(second)]
        proxy.reset()
        with door.session() as db:
            top = pid(db)
        assert proxy.round_trips == 3
        with server(pg18.url(database)) as raw:
            raw.execute("SELECT pg_terminate_backend(%s, 5000)", [top])
        proxy.reset()
        with door.session() as first, door.session() as second:
            assert pid(first) not in pids
            assert pid(second) in pids
        assert proxy.connections == 1
        assert "" in proxy.statements or proxy.round_trips - 6 >= 1  # it was asked


# -- a server that starts again under load -----------------------------------------------------


async def under_load(load: Load, side: str, count: int, nights: Callable[[], Any]) -> None:
    threads: list[threading.Thread] = []
    async with asyncio.TaskGroup() as tasks:
        for _ in range(count):
            if side == "async":
                tasks.create_task(load.task())
            else:
                threads.append(threading.Thread(target=load.thread))
                threads[-1].start()
        try:
            await nights()
        finally:
            load.stop.set()
            for thread in threads:
                await asyncio.to_thread(thread.join)


@every_side
def test_a_restart_under_load_fails_what_is_in_flight_and_nothing_else(
    pg16: PostgresServer, caplog: pytest.LogCaptureFixture, side: str, driver: str
) -> None:
    name = pg16.create_database()

    async def main() -> None:
        manager = DatabaseSessionManager().init(pg16.url(name, driver), metadata=Model.metadata)
        await manager.create_all()
        load = Load(manager)
        accounts = load.accounts

        async def nights() -> None:
            while len(accounts.done) < 100:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            await asyncio.to_thread(pg16.restart)
            ready = time.monotonic()
            before = len(accounts.done)
            while len(accounts.done) == before:
                await asyncio.sleep(0.001)
            assert time.monotonic() - ready < 1.0
            while len(accounts.done) < before + 200:
                await asyncio.sleep(0.01)
            failures = accounts.failed | accounts.unknown
            assert len(failures) <= 20  # each caller had one unit in flight
            assert all(accounts.began[number] < ready for number in failures)
            assert began < ready

        with caplog.at_level(logging.WARNING, "engineroom.pool"):
            await under_load(load, side, 20, nights)
        accounts.compare(await load.stored())
        await manager.close()

    asyncio.run(main())
    pg16.drop_database(name)


# -- a server that is full, or just starts -----------------------------------------------------


@every_side
def test_a_server_at_its_limit_is_waited_for(side: str, driver: str) -> None:
    settings = {
        "max_connections": 6,
        "superuser_reserved_connections": 0,
        "reserved_connections": 0,
    }
    with postgres(18, settings=settings) as full:
        taken = [psycopg.connect(full.url()) for _ in range(6)]
        give = threading.Timer(0.5, taken[0].close)
        give.start()
        one = Door(side, full.url("postgres", driver))  # asks at once
        give.join()
        one.close()
        for each in taken:
            each.close()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.anyio
async def test_who_waits_for_a_full_server_takes_what_comes_back(
    pg18: PostgresServer, database: str, driver: str
) -> None:
    """A connection that lies idle meanwhile; they need not open another one."""
    pg18.execute("CREATE ROLE few LOGIN PASSWORD 'few' CONNECTION LIMIT 2")
    url = make_url(pg18.url(database, driver)).set(username="few", password="few")
    manager = DatabaseSessionManager().init(url, pool_size=12, pool_timeout=5)

    async def unit() -> None:
        async with manager.session() as db:
            await db.execute(text("SELECT pg_sleep(0.3)"))

    try:
        began = time.monotonic()
        async with manager:
            await asyncio.gather(*(unit() for _ in range(12)))
        assert time.monotonic() - began < 5
    finally:
        pg18.execute("DROP ROLE few")


def silent_listener() -> socket.socket:
    """Accept, by the kernel, and never answer."""
    return socket.create_server(("127.0.0.1", 0))


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.anyio
async def test_the_wait_for_the_first_connect_counts(driver: str) -> None:
    took: list[float] = []
    with silent_listener() as listener:
        port = listener.getsockname()[1]
        url = f"postgresql+{driver}://somebody:secret@127.0.0.1:{port}/nothing"
        async with DatabaseSessionManager().init(url, pool_timeout=2) as manager:

            async def unit(after: float) -> None:
                await asyncio.sleep(after)
                began = time.monotonic()
                with pytest.raises((ConnectTimeout, OperationalError)):
                    async with manager.session() as db:
                        await db.execute(text("SELECT 1"))
                took.append(time.monotonic() - began)

            await asyncio.gather(unit(0), unit(0.3), unit(0.6))
    assert max(took) < 2 + 1


def test_who_was_never_there_is_not_waited_for() -> None:
    began = time.monotonic()
    with (
        Database("postgresql+psycopg://nobody:x@127.0.0.1:1/none", pool_timeout=20) as door,
        pytest.raises(DBAPIError),
        door.session() as db,
    ):
        db.execute(text("SELECT 1"))
    assert time.monotonic() - began < 10


# -- backends that are killed ------------------------------------------------------------------


def kill_at_random(url: str, side: str, seconds: float) -> dict[str, int]:
    """Kill backends under 50 callers; an error is told only of what was in flight, and once."""
    logging.getLogger("engineroom").setLevel(logging.CRITICAL)
    killed: dict[int, float] = {}

    def kill() -> None:
        with server(url) as raw:
            found = raw.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'shop' "
                "ORDER BY random() LIMIT 1"
            ).fetchone()
            if found is None:
                return
            raw.execute("SELECT pg_terminate_backend(%s)", found)
        while Path(f"/proc/{found[0]}").exists():
            time.sleep(0.0005)
        killed[found[0]] = time.monotonic()

    async def main() -> dict[str, int]:
        where = make_url(url).update_query_dict({"application_name": "shop"})
        manager = DatabaseSessionManager().init(
            where, metadata=Model.metadata, pool_size=50, max_overflow=0
        )
        await manager.create_all()
        load = WatchedLoad(manager)
        end = time.monotonic() + seconds

        async def nights() -> None:
            while time.monotonic() < end:
                await asyncio.to_thread(kill)
                await asyncio.sleep(random.uniform(0, 0.05))

        await under_load(load, side, 50, nights)
        failures = load.accounts.failed | load.accounts.unknown
        backends_of = [load.lent[number][0] for number in failures]
        assert sorted(set(backends_of)) == sorted(backends_of), "one death failed two units"
        for number, error in failures.items():
            backend, lent = load.lent[number]
            assert backend in killed, (number, error)
            assert killed[backend] > lent - 0.01, "it was gone before that was lent"
        load.accounts.compare(await load.stored())
        await manager.close()
        done = len(load.accounts.done)
        return {"killed": len(killed), "failed": len(failures), "done": done}

    return asyncio.run(main())


KILLING = [pytest.param(4, id="sample"), pytest.param(60, id="long", marks=pytest.mark.soak)]


@pytest.mark.parametrize("seconds", KILLING)
@every_side
def test_who_is_killed_fails_what_was_in_flight_and_nothing_else(
    pg18: PostgresServer, database: str, side: str, driver: str, seconds: int
) -> None:
    seen = run(kill_at_random, pg18.url(database, driver), side, seconds, deadline=seconds + 60)
    print(seen)
    assert seen["killed"] > 2 * seconds
    assert seen["failed"] < seen["killed"]


# -- long runs ---------------------------------------------------------------------------------


def state(url: str) -> dict[str, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "MB": pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000,
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "backends": len(backends(url)),
    }


def soak(side: str, driver: str, seconds: float) -> dict[str, Any]:
    """Let random nights fall on 50 callers, and compare the ledger, and what is left at the end."""
    logging.getLogger("engineroom").setLevel(logging.CRITICAL)
    dice = random.Random(16)
    counts: dict[str, int] = {}

    async def main(own: PostgresServer) -> dict[str, Any]:
        database = own.create_database()
        url = own.url(database, driver)
        with WireProxy(own.host, own.port) as proxy:
            manager = DatabaseSessionManager().init(
                proxy.url(url),
                metadata=Model.metadata,
                pool_size=10,
                response_timeout=1,
                statement_timeout=1,
                pool_timeout=10,
            )
            await manager.create_all()

            def kill() -> None:
                with server(url) as raw:
                    raw.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
                        " ORDER BY random() LIMIT 3",
                        [database],
                    )

            def silence() -> None:
                proxy.freeze()
                time.sleep(dice.uniform(0.2, 2.5))
                proxy.thaw()

            def stop() -> None:
                own.freeze()
                time.sleep(dice.uniform(0.2, 2.5))
                own.thaw()

            def close_accounts() -> None:
                plain = make_url(url).set(drivername="postgresql")
                where = plain.render_as_string(hide_password=False)
                with psycopg.connect(where, autocommit=True) as raw:
                    load.accounts.close(raw)

            faults = [kill, kill, kill, proxy.cut, silence, stop, own.restart]
            end = time.monotonic() + seconds
            load = Load(manager)
            states: list[dict[str, int]] = []

            async def nights() -> None:
                while time.monotonic() < end:
                    fault = dice.choice(faults)
                    counts[fault.__name__] = counts.get(fault.__name__, 0) + 1
                    await asyncio.to_thread(fault)
                    proxy.reset()  # it remembers each statement
                    done = len(load.accounts.done)
                    while len(load.accounts.done) < done + 100:
                        await asyncio.sleep(0.01)
                    await asyncio.sleep(dice.uniform(0, 0.3))
                    await asyncio.to_thread(close_accounts)
                    if len(states) < 2 and time.monotonic() > end - seconds * 3 / 4:
                        states.append(state(url))

            await under_load(load, side, 50, nights)
            load.accounts.compare(await load.stored())
            await asyncio.to_thread(close_accounts)
            states.append(state(url))
            lent = sum(pool.lent for pool in manager.stats().pools)
            tasks = len(asyncio.all_tasks())
            await manager.close()
            return {
                "lent": lent,
                "tasks": tasks,
                "states": states,
                "counts": counts,
                **load.accounts.closed,
            }

    with postgres(18) as own:
        return asyncio.run(main(own))


SECONDS = [pytest.param(15, id="sample"), pytest.param(600, id="long", marks=pytest.mark.soak)]


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize(("side", "driver"), [("async", "asyncpg"), ("sync", "psycopg")])
@pytest.mark.timeout(900)
def test_random_nights_lose_nothing_and_leave_nothing(side: str, driver: str, seconds: int) -> None:
    seen = run(soak, side, driver, seconds, deadline=seconds + 120)
    print(seen)
    assert (seen["lent"], seen["tasks"]) == (0, 1)
    first, last = seen["states"][0], seen["states"][-1]
    assert last["descriptors"] <= first["descriptors"] + 20
    assert last["threads"] <= first["threads"] + 2
    assert last["backends"] <= 26  # of the pool and its overflow, over both sides
    assert last["MB"] <= first["MB"] + 30
    assert seen["done"] > 100
