"""A connection that comes out of the pool lives, and finding that out costs no round trip."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scenario import in_threads, run, run_on, server, until
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from engineroom import Database, DatabaseSessionManager
from engineroom.errors import ConnectTimeout
from engineroom.testing import PostgresServer, WireProxy

ROUNDS = 8  # of 50 units each
ASYNC = [
    ("asyncpg", "asyncio"),
    ("asyncpg", "uvloop"),
    ("psycopg", "asyncio"),
    ("psycopg", "uvloop"),
]
SYNC = ["psycopg", "psycopg2"]

every_driver = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
every_sync_driver = pytest.mark.parametrize("driver", SYNC)


def kill(url: str) -> int:
    """End every backend of the database, and come back 10 ms after the last process has ended."""
    with server(url) as raw:
        rows = raw.execute(
            "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = %s AND backend_type = 'client backend'",
            [make_url(url).database],
        ).fetchall()
    for pid, _ in rows:  # until then its socket may be open
        until(Path(f"/proc/{pid}").exists, lambda there: not there)
    time.sleep(0.01)
    return len(rows)


# -- killed backends ---------------------------------------------------------------------------


def killed_async(url: str, loop: str) -> None:
    manager = DatabaseSessionManager().init(url, pool_size=5, max_overflow=0)

    async def warm() -> None:
        together = asyncio.Barrier(5)

        async def one() -> None:
            async with manager.session() as db:
                await db.execute(text("SELECT 1"))
                await together.wait()

        await asyncio.gather(*(one() for _ in range(5)))

    async def unit(number: int) -> None:
        async with manager.session() as db:
            assert await db.scalar(text(f"SELECT {number}")) == number

    async def main() -> None:
        for number in range(ROUNDS):
            await warm()
            # In the loop's own thread: the loop has seen nothing of it when the units begin.
            assert kill(url) == 5
            if number % 2:
                await asyncio.gather(*(unit(number) for number in range(50)))
            else:
                for unit_number in range(50):
                    await unit(unit_number)
        await manager.close()

    run_on(loop, main())


@pytest.mark.parametrize(("driver", "loop"), ASYNC)
def test_killed_backends_cost_no_unit_an_error(
    pg18: PostgresServer, database: str, driver: str, loop: str
) -> None:
    run(killed_async, pg18.url(database, driver), loop)


def reused(url: str, loop: str) -> None:
    """Let the loop close the dead sockets, and others take their descriptors' numbers."""
    manager = DatabaseSessionManager().init(url, pool_size=5, max_overflow=0, pool_ping_after=60)

    async def unit(together: asyncio.Barrier | None = None) -> None:
        async with manager.session() as db:
            assert await db.scalar(text("SELECT 1")) == 1
            if together is not None:
                await together.wait()

    async def main() -> None:
        for _ in range(3):
            together = asyncio.Barrier(5)
            await asyncio.gather(*(unit(together) for _ in range(5)))
            assert kill(url) == 5
            await asyncio.sleep(0.1)
            pairs = [socket.socketpair() for _ in range(20)]
            for _ in range(10):
                await unit()
            for pair in pairs:
                pair[0].close()
                pair[1].close()
        await manager.close()

    run_on(loop, main())


@pytest.mark.parametrize(("driver", "loop"), ASYNC)
def test_a_dead_connection_is_known_by_more_than_its_descriptor(
    pg18: PostgresServer, database: str, driver: str, loop: str
) -> None:
    run(reused, pg18.url(database, driver), loop)


def killed_sync(url: str) -> None:
    database = Database(url, pool_size=5, max_overflow=0)

    def warm() -> None:
        together = threading.Barrier(5)

        def one(_: int) -> None:
            with database.session() as db:
                db.execute(text("SELECT 1"))
                together.wait()

        in_threads(5, one)

    def unit(number: int) -> None:
        with database.session() as db:
            assert db.scalar(text(f"SELECT {number}")) == number

    for number in range(ROUNDS):
        warm()
        assert kill(url) == 5
        if number % 2:
            in_threads(10, lambda number: [unit(number * 5 + n) for n in range(5)])
        else:
            for n in range(50):
                unit(n)
    database.close()


@every_sync_driver
def test_killed_backends_cost_no_synchronous_unit_an_error(
    pg18: PostgresServer, database: str, driver: str
) -> None:
    run(killed_sync, pg18.url(database, driver))


@pytest.mark.parametrize("ends_at", ["a statement", "COMMIT"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_connection_that_is_lost_is_not_said_to_be_in_use(
    pg18: PostgresServer, database: str, loop: str, ends_at: str
) -> None:
    """asyncpg has read the server's last words, and not yet that nothing comes behind them."""
    url = pg18.url(database, "asyncpg")
    pg18.execute("CREATE TABLE kept (id int)", database)
    noted: list[str] = []

    async def unit(manager: DatabaseSessionManager, turns: int) -> None:
        async with manager.session() as db:
            await db.execute(text("INSERT INTO kept VALUES (1)"))
            kill(url)  # and the loop stands still
            for _ in range(turns):
                await asyncio.sleep(0)
            if ends_at == "a statement":
                await db.execute(text("SELECT 1"))

    async def main() -> None:
        async with DatabaseSessionManager().init(url) as manager:
            for turns in range(5):
                with pytest.raises(DBAPIError) as caught:
                    await unit(manager, turns)
                if "another operation" in str(caught.value):
                    noted.extend(getattr(caught.value, "__notes__", [""]))

    run_on(loop, main())
    assert noted
    assert all("lost in the middle of its work" in note for note in noted)
    assert pg18.execute("SELECT count(*) FROM kept", database) == [["0"]]


# -- a server that starts again ----------------------------------------------------------------


def test_a_restarted_server_costs_no_unit_an_error(pg16: PostgresServer) -> None:
    name = pg16.create_database()

    async def unit(manager: DatabaseSessionManager) -> None:
        async with manager.session() as db:
            assert await db.scalar(text("SELECT 1")) == 1

    async def main(driver: str) -> None:
        manager = DatabaseSessionManager().init(pg16.url(name, driver))
        await asyncio.gather(*(unit(manager) for _ in range(5)))
        with Database(pg16.url(name, "psycopg2")) as other:
            for database in (manager.sync, other):
                await asyncio.to_thread(database.check)
            await asyncio.to_thread(pg16.restart)
            await asyncio.gather(*(unit(manager) for _ in range(20)))
            for database in (manager.sync, other):
                for _ in range(5):
                    await asyncio.to_thread(database.check)
            await manager.close()

    try:
        asyncio.run(main("asyncpg"))
        asyncio.run(main("psycopg"))
    finally:
        pg16.drop_database(name)


# -- a server that is frozen -------------------------------------------------------------------


@every_sync_driver
def test_a_frozen_server_is_not_asked_for_ever(pg16: PostgresServer, driver: str) -> None:
    """It keeps its connections, so no keepalive notices, and neither driver gives up by itself."""
    name = pg16.create_database()
    told: list[BaseException] = []
    with Database(pg16.url(name, driver), pool_timeout=1, pool_pre_ping=True) as door:

        def unit() -> None:
            with door.session() as db:
                assert db.scalar(text("SELECT 42")) == 42

        def unit_in_vain() -> None:
            try:
                unit()
            except ConnectTimeout as error:
                told.append(error)

        unit()
        pg16.freeze()
        try:
            asking = threading.Thread(target=unit_in_vain, daemon=True)
            asking.start()
            asking.join(20)
            is_stuck = asking.is_alive()
        finally:
            pg16.thaw()
        asking.join()
        assert not is_stuck
        assert len(told) == 1
        assert door.stats().pools[0].lent == 0
        unit()
    pg16.drop_database(name)


# -- what the question costs -------------------------------------------------------------------

UNIT = 3  # round trips: BEGIN, SELECT, COMMIT


class Units:
    """Count the round trips of units of work, on either side."""

    def __init__(self, proxy: WireProxy, url: str, side: str, **options: Any) -> None:
        self.proxy = proxy
        # Beside other workers, a server looks far away, and `auto` would save a trip now and then.
        self.manager = DatabaseSessionManager().init(proxy.url(url), pipeline="off", **options)
        self.runner = asyncio.Runner()
        self.side = side
        for _ in range(8):  # psycopg prepares at the sixth
            self.unit()

    def unit(self, statement: str = "SELECT 1") -> None:
        if self.side == "async":
            self.runner.run(self._unit(statement))
            return
        with self.manager.sync_session() as db:
            db.execute(text(statement))

    async def _unit(self, statement: str) -> None:
        async with self.manager.session() as db:
            await db.execute(text(statement))

    def __call__(self, count: int = 1, before: Callable[[], object] = lambda: None) -> float:
        """Return the round trips of each unit; no connection was opened for any."""
        self.proxy.reset()
        for _ in range(count):
            before()
            self.unit()
        assert (self.proxy.connections, self.proxy.startup_round_trips) == (0, 0)
        return self.proxy.round_trips / count

    def is_spoken_to(self) -> bool:
        """Whether the idle connection has something to read."""
        return bool(self.berth().poll(0))

    def berth(self) -> Any:
        """Return what the pool knows of its idle connection."""
        if self.side == "async":
            loops: Any = self.manager.engine.pool
            (pool,) = loops.shelves.values()
        else:
            pool = self.manager.sync_engine.pool
        (record,) = pool.rack.items
        return record.record_info["berth"]

    def close(self) -> None:
        self.runner.run(self.manager.close())
        self.runner.close()


SIDES = [("async", "asyncpg"), ("async", "psycopg"), ("sync", "psycopg"), ("sync", "psycopg2")]
every_side = pytest.mark.parametrize(("side", "driver"), SIDES)


@every_side
def test_a_hot_loop_asks_nothing(
    pg18: PostgresServer, database: str, proxy: WireProxy, side: str, driver: str
) -> None:
    units = Units(proxy, pg18.url(database, driver), side, pool_ping_after=60)
    assert units(100) == UNIT
    units.close()


@every_side
def test_a_connection_that_was_idle_for_long_is_asked(
    pg18: PostgresServer, database: str, proxy: WireProxy, side: str, driver: str
) -> None:
    units = Units(proxy, pg18.url(database, driver), side, pool_ping_after=0.2)
    assert units(3, lambda: time.sleep(0.25)) == UNIT + 1
    units.close()


@every_side
def test_pool_pre_ping_asks_always(
    pg18: PostgresServer, database: str, proxy: WireProxy, side: str, driver: str
) -> None:
    units = Units(proxy, pg18.url(database, driver), side, pool_pre_ping=True)
    assert units(100) == UNIT + 1
    units.close()


@every_side
def test_a_notification_costs_a_ping_and_not_the_connection(
    pg18: PostgresServer, database: str, proxy: WireProxy, side: str, driver: str
) -> None:
    def listen(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("LISTEN somebody")
        cursor.close()
        connection.commit()

    event.listen(Pool, "connect", listen)  # what a session listens to ends with it
    try:
        units = Units(proxy, pg18.url(database, driver), side, pool_ping_after=60)
    finally:
        event.remove(Pool, "connect", listen)

    def notify() -> None:
        seen = proxy.notifications
        pg18.execute("NOTIFY somebody", database)
        until(lambda: proxy.notifications, lambda now: now > seen)
        until(units.is_spoken_to, bool)  # from the proxy's hands into the client's socket

    assert units(5, notify) == UNIT + 1
    assert units(5) == UNIT  # and it was read: the socket is silent again
    units.close()


@every_side
def test_what_was_sent_is_not_repeated(
    pg18: PostgresServer, database: str, side: str, driver: str
) -> None:
    """The first statement of a transaction ends its own backend; its driver has prepared it."""
    pg18.execute("CREATE SEQUENCE drawn", database)
    manager = DatabaseSessionManager().init(pg18.url(database, driver), pool_size=1)
    draw = text(
        "SELECT nextval('drawn'), pg_terminate_backend(CASE WHEN :ends THEN pg_backend_pid() END)"
    )

    def work(db: Session, number: int) -> None:
        db.execute(draw, {"ends": number == 8})

    async def on_loop() -> None:
        async with manager:
            for number in range(9):
                async with manager.session() as db:
                    await db.run_sync(work, number)

    with pytest.raises(DBAPIError):
        if side == "async":
            asyncio.run(on_loop())
        else:
            for number in range(9):
                with manager.sync_session() as db:
                    work(db, number)
    manager.sync.close()
    assert pg18.execute("SELECT last_value FROM drawn", database) == [["9"]]


@pytest.mark.parametrize("found_by", ["BEGIN", "a listener"])
@every_side
def test_what_connect_hooks_set_outlives_a_replaced_connection(
    pg18: PostgresServer, database: str, side: str, driver: str, found_by: str
) -> None:
    """Sent in the middle of a lend it looks like what the holder leaves: it is not cleaned."""
    url = pg18.url(database, driver)
    manager = DatabaseSessionManager().init(url, pool_size=1, max_overflow=0)
    engine = manager.sync_engine if side == "sync" else manager.engine.sync_engine
    dead = [False]

    @event.listens_for(engine, "connect")
    def set_path(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("SET search_path = shop, public")
        cursor.close()
        connection.commit()

    @event.listens_for(engine, "checkout")
    def refuse(*lent: object) -> None:
        if dead[0]:
            dead[0] = False
            raise DisconnectionError("as SQLAlchemy's own page on pools has it")

    def show(db: Session) -> str | None:
        db.connection()
        if dead[0]:
            kill(url)
            dead[0] = False
        return db.scalar(text("SHOW search_path"))

    async def on_loop() -> list[str | None]:
        shown = []
        async with manager:
            for number in range(4):
                dead[0] = number == 1
                async with manager.session() as db:
                    shown.append(await db.run_sync(show))
        return shown

    if found_by == "BEGIN":
        event.remove(engine, "checkout", refuse)
    if side == "async":
        shown = asyncio.run(on_loop())
    else:
        shown = []
        for number in range(4):
            dead[0] = number == 1
            with manager.sync_session() as db:
                shown.append(show(db))
        manager.sync.close()
    assert shown == ["shop, public"] * 4


@every_side
def test_pool_recycle_replaces_what_is_old(
    pg18: PostgresServer, database: str, proxy: WireProxy, side: str, driver: str
) -> None:
    # A window of the pings that is longer changes nothing of it.
    units = Units(proxy, pg18.url(database, driver), side, pool_recycle=1, pool_ping_after=60)
    time.sleep(1.1)
    proxy.reset()
    units.unit()
    assert proxy.connections == 1
    units.close()


@every_side
def test_what_was_opened_together_does_not_go_together(
    pg18: PostgresServer, database: str, proxy: WireProxy, side: str, driver: str
) -> None:
    units = Units(proxy, pg18.url(database, driver), side, pool_recycle=1000)
    lives = []
    for _ in range(5):
        first: Any = units.berth()
        lives.append(first.expires - time.monotonic())
        first.expires = time.monotonic()
        units.unit()  # its holder keeps it to the end
        units.unit()
    assert 790 < min(lives) < max(lives) < 1000
    assert max(lives) - min(lives) > 5
    first = units.berth()
    first.expires = time.monotonic()
    proxy.reset()
    units.unit()  # its holder keeps it to the end
    assert proxy.connections == 0
    units.unit()
    assert proxy.connections == 1
    units.close()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_what_died_in_a_reader_is_lent_to_nobody(
    pg18: PostgresServer, database: str, driver: str
) -> None:
    """Nothing is sent at a reader's end: that it came back just now does not say that it lives."""
    with Database(pg18.url(database, driver), pool_size=1, max_overflow=0) as door:
        for _ in range(20):
            with door.reader() as db:
                pid = db.scalar(text("SELECT pg_backend_pid()"))
                pg18.execute(f"SELECT pg_terminate_backend({pid})")
                time.sleep(0.02)
            with door.reader() as db:
                assert db.scalar(text("SELECT 1")) == 1
