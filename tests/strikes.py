"""Strikes: cancel a task at each of its awaits, in every way there is, and look at what is left.

A task factory counts every await of every task. A load runs in a victim task; at step `k` the
victim is struck, and then nothing of it may be left: no statement, transaction or lock in the
database, no connection or permit lent, no task, no warning. `Arena` runs one load, one kind and one
pool through all its steps; the two grounds are what is struck: engineroom, and the recipe that it
replaces.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sqlite3
import sys
import threading
import traceback
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import anyio
import psycopg
from scenario import Item, Model, is_mysql, is_postgres, mysql_server
from sqlalchemy import insert, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from engineroom import DatabaseSessionManager

KINDS = {
    "once": "as the await begins",
    "late": "as what is awaited arrives: the task has not yet run",
    "twice": "again at the victim's next await",
    "always": "again at each following await of the victim",
    "level": "an anyio scope that stays cancelled",
    "timeout": "asyncio.timeout",
}
POOLS = {
    "cold": "nothing was ever connected",
    "warm": "an idle connection waits",
    "ping": "and the server is asked whether it lives",
}
COLUMNS = "id int PRIMARY KEY, value int NOT NULL, mark varchar(20)"  # those of `Item`
SIZE, OVERFLOW = 2, 1
LOOKS, PAUSE = 100, 0.01  # until all is quiet: 1 s, or longer on a machine that has no time for us
STALL = 0.15  # seconds in which a load that is to stall takes its last step
HANGS = 10.0  # seconds: a victim that takes longer will never end
LONG = 60  # seconds: a statement that nobody waits for


# -- counting and striking -------------------------------------------------------------------------


class Strike:
    """One blow at one step of a victim."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind = kind
        self.at = at
        self.steps = 0
        self.blows = 0
        self.victim: asyncio.Task[Any] | None = None
        self.hit: Callable[[], object] = lambda: None  # a blow of this kind
        self.told: str | None = None  # the error and notes that the load's code was told
        self.replaced = ""  # by something that is neither the cancellation nor the body's own
        self.over = False  # the load has ended
        self.stalled = False  # it was struck while it took no more steps
        self.fallen = asyncio.Event()

    def blow(self, *_: object) -> None:
        if not self.over:
            self.blows += 1
            self.hit()
            self.fallen.set()

    def step(self, awaited: Any) -> None:
        """Count an await; `awaited` is the future in it."""
        self.steps += 1
        if self.blows:
            if asyncio.current_task() is self.victim and (
                self.kind == "always" or (self.kind == "twice" and self.blows == 1)
            ):
                self.blow()
        elif self.steps == self.at:
            if self.kind != "late":
                self.blow()
            elif awaited is None:
                asyncio.get_running_loop().call_soon(self.blow)
            else:
                awaited.add_done_callback(self.blow)  # before the task adds its own

    def stall(self) -> None:
        """Say that no more steps are to be expected soon: strike then, if not before."""
        asyncio.get_running_loop().call_later(STALL, self._strike_stalled)

    def _strike_stalled(self) -> None:
        if not self.blows:
            self.stalled = not self.over
            self.blow()


class Counted(Coroutine[Any, Any, Any]):
    """A task's coroutine, each of whose awaits is a step."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def send(self, value: Any) -> Any:
        return self._step(self.inner.send(value))

    def throw(self, *error: Any) -> Any:
        return self._step(self.inner.throw(*error))

    def close(self) -> None:
        self.inner.close()

    def __await__(self) -> Any:
        return self.inner.__await__()

    def __getattr__(self, name: str) -> Any:  # cr_frame, cr_running, …: for whoever looks
        return getattr(self.inner, name)

    def _step(self, awaited: Any) -> Any:
        if Counted.strike is not None:
            Counted.strike.step(awaited)
        return awaited

    strike: Strike | None = None  # the one whose steps are counted now


def counted_task(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """Be a loop's task factory."""
    return asyncio.Task(Counted(coroutine), loop=loop, **options)


# -- what is struck --------------------------------------------------------------------------------


class Ground(Protocol):
    """Sessions, and how to look behind them."""

    name: str
    url: str

    def session(self) -> AbstractAsyncContextManager[Any]: ...
    def connect(self) -> AbstractAsyncContextManager[Any]: ...
    def reader(self) -> AbstractAsyncContextManager[Any]: ...
    async def close(self) -> None: ...
    def idle(self) -> int: ...
    def unclean(self) -> str: ...


class Engineroom:
    """The product."""

    name = "engineroom"

    def __init__(self, url: str, pool: str) -> None:
        self.url = url
        self.manager = DatabaseSessionManager().init(
            url,
            metadata=Model.metadata,
            pool_size=SIZE,
            max_overflow=OVERFLOW,
            pool_pre_ping=pool == "ping",
        )
        self.session = self.manager.session
        self.connect = self.manager.connect
        self.closes = False

    def reader(self) -> AbstractAsyncContextManager[Any]:
        # one pool is enough to look at: the reader's would be another
        return self.manager.session(read_only=True)

    async def close(self) -> None:
        await self.manager.close(timeout=0.02)

    def idle(self) -> int:
        return sum(pool.idle for pool in self.manager.stats().pools)

    def unclean(self) -> str:
        stats = self.manager.stats()
        lent = sum(pool.lent for pool in stats.pools)
        waiting = sum(pool.waiting for pool in stats.pools)
        if lent or waiting or stats.scopes:
            return f"{lent} lent, {waiting} waiting, {len(stats.scopes)} scopes open"
        return ""


class Recipe:
    """What services copy from each other."""

    name = "recipe"

    def __init__(self, url: str, pool: str) -> None:
        self.url = url
        self.engine = create_async_engine(
            url, pool_size=SIZE, max_overflow=OVERFLOW, pool_pre_ping=pool == "ping"
        )
        self.factory = async_sessionmaker(self.engine, expire_on_commit=False)
        self.reader = self.session
        self.connect = self.engine.begin

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        session = self.factory()
        try:
            yield session
            await session.commit()
        except BaseException:
            await session.rollback()
            raise
        finally:
            await session.close()

    async def close(self) -> None:
        await self.engine.dispose()

    def idle(self) -> int:
        pool: Any = self.engine.pool
        return int(pool.checkedin())

    def unclean(self) -> str:
        pool: Any = self.engine.pool
        return f"{pool.checkedout()} lent" if pool.checkedout() else ""


GROUNDS: dict[str, Callable[[str, str], Ground]] = {"engineroom": Engineroom, "recipe": Recipe}


# -- the loads -------------------------------------------------------------------------------------


class Boom(Exception):
    """The body's own."""


def slow(url: str) -> Any:
    if is_postgres(url):
        return text(f"SELECT pg_sleep({LONG})")
    if is_mysql(url):
        return text(f"SELECT sleep({LONG})")
    return text(
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 40000000000)"
        " SELECT count(*) FROM t"
    )


def many(url: str) -> Any:
    if is_postgres(url):
        return text("SELECT n FROM generate_series(1, 1000000) n")
    if is_mysql(url):  # whose rows are all read, though nobody asks for them
        return text("SELECT seq FROM seq_1_to_20000")
    return text(
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 1000000)"
        " SELECT n FROM t"
    )


async def short_load(ground: Ground, strike: Strike, number: int) -> None:
    async with ground.session() as db:
        await db.execute(insert(Item).values(id=number))


async def slow_load(ground: Ground, strike: Strike, number: int) -> None:
    async with ground.session() as db:
        await db.execute(insert(Item).values(id=number))
        strike.stall()
        await db.execute(slow(ground.url))


async def slow_commit_load(ground: Ground, strike: Strike, number: int) -> None:
    async with ground.session() as db:
        await db.execute(insert(Item).values(id=number))
        await db.execute(text("INSERT INTO lazy VALUES (1)"))
        strike.stall()


async def stream_load(ground: Ground, strike: Strike, number: int) -> None:
    async with ground.session() as db:
        await db.execute(insert(Item).values(id=number))
        rows = await db.stream(many(ground.url), execution_options={"yield_per": 100})
        await take(rows)
    async with ground.connect() as connection:
        await take(await connection.stream(many(ground.url)))


async def take(rows: Any) -> None:
    """Read some rows, and leave the rest."""
    seen = 0
    try:
        async for _ in rows:
            seen += 1
            if seen == 250:
                break
    finally:
        await rows.close()


async def fail_load(ground: Ground, strike: Strike, number: int) -> None:
    async with ground.session() as db:
        await db.execute(insert(Item).values(id=number))
        raise Boom


async def connect_load(ground: Ground, strike: Strike, number: int) -> None:
    async with ground.reader() as db:
        await db.execute(text("SELECT 1"))
    async with ground.connect() as connection:
        await connection.execute(insert(Item).values(id=number))


async def close_load(ground: Ground, strike: Strike, number: int) -> None:
    await ground.close()


LOADS: dict[str, Callable[[Ground, Strike, int], Awaitable[None]]] = {
    "short": short_load,
    "slow": slow_load,
    "slow_commit": slow_commit_load,
    "stream": stream_load,
    "fail": fail_load,
    "connect": connect_load,
    "wait": short_load,
    "close": close_load,
}


@asynccontextmanager
async def full_pool(ground: Ground, strike: Strike) -> AsyncIterator[None]:
    """Hold every connection, until the victim must have come to wait for one."""
    held, leave = asyncio.Semaphore(0), asyncio.Event()

    async def hold() -> None:
        async with ground.reader() as db:
            await db.execute(text("SELECT 1"))
            held.release()
            await leave.wait()

    async with asyncio.timeout(3 * HANGS), asyncio.TaskGroup() as tasks:
        for _ in range(SIZE + OVERFLOW):
            tasks.create_task(hold())
        for _ in range(SIZE + OVERFLOW):
            await held.acquire()
        asyncio.get_running_loop().call_later(PAUSE, leave.set)
        yield


@asynccontextmanager
async def neighbour(ground: Ground, strike: Strike) -> AsyncIterator[None]:
    """Run a scope that `close()` must end."""
    inside = asyncio.Event()

    async def work() -> None:
        try:
            async with ground.session() as db:
                await db.execute(text("SELECT 1"))
                inside.set()
                await db.execute(slow(ground.url))
        except Exception:  # that it was closed, in this driver's words
            pass

    async with asyncio.timeout(3 * HANGS), asyncio.TaskGroup() as tasks:
        tasks.create_task(work())
        await inside.wait()
        yield


@asynccontextmanager
async def nobody(ground: Ground, strike: Strike) -> AsyncIterator[None]:
    yield


COMPANY = {"wait": full_pool, "close": neighbour}


# -- what is left ----------------------------------------------------------------------------------


class Witness(Protocol):
    """Who looks at the database from outside, and tidies up after what was unclean."""

    def running(self) -> list[str]: ...
    def connections(self) -> int: ...
    def has(self, number: int) -> bool: ...
    def clean(self) -> None: ...


class PostgresWitness:
    """A connection of its own."""

    def __init__(self, url: str) -> None:
        plain = make_url(url).set(drivername="postgresql")
        self.raw = psycopg.connect(plain.render_as_string(hide_password=False), autocommit=True)
        self.raw.execute(
            f"""
            DROP TABLE IF EXISTS lazy;
            DROP FUNCTION IF EXISTS nap;
            DROP TABLE IF EXISTS item;
            CREATE TABLE item ({COLUMNS});
            CREATE TABLE lazy (id int);
            CREATE FUNCTION nap() RETURNS trigger LANGUAGE plpgsql
                AS $$ BEGIN PERFORM pg_sleep({LONG}); RETURN NULL; END $$;
            CREATE CONSTRAINT TRIGGER nap AFTER INSERT ON lazy DEFERRABLE INITIALLY DEFERRED
                FOR EACH ROW EXECUTE FUNCTION nap();
            """
        )

    def _others(self) -> list[tuple[str | None, str]]:
        return self.raw.execute(
            "SELECT state, query FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchall()

    def running(self) -> list[str]:
        return [f"{state}: {query}" for state, query in self._others() if state != "idle"]

    def connections(self) -> int:
        return len(self._others())

    def has(self, number: int) -> bool:
        row = self.raw.execute("SELECT 1 FROM item WHERE id = %s", [number]).fetchone()
        return row is not None

    def clean(self) -> None:
        self.raw.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


class MySQLWitness:
    """Connections of its own, in no database."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.database = make_url(url).database
        self._run(f"DROP TABLE IF EXISTS {self.database}.item")
        self._run(f"CREATE TABLE {self.database}.item ({COLUMNS})")

    def _run(self, statement: str) -> Any:
        with mysql_server(self.url) as cursor:
            cursor.execute(statement)
            return cursor.fetchall()

    def _others(self) -> Any:
        return self._run(
            "SELECT p.id, p.command, p.info, t.trx_state FROM information_schema.processlist p"
            " LEFT JOIN information_schema.innodb_trx t ON t.trx_mysql_thread_id = p.id"
            f" WHERE p.db = '{self.database}'"
        )

    def running(self) -> list[str]:
        return [
            f"{command}, transaction {state}: {info}"
            for _, command, info, state in self._others()
            if command != "Sleep" or state
        ]

    def connections(self) -> int:
        return len(self._others())

    def has(self, number: int) -> bool:
        return bool(self._run(f"SELECT 1 FROM {self.database}.item WHERE id = {number}"))

    def clean(self) -> None:
        for number, *_ in self._others():
            with suppress(Exception):  # it has just ended
                self._run(f"KILL {number}")


class SQLiteWitness:
    """A stranger who wants to write, and the threads of aiosqlite."""

    def __init__(self, url: str) -> None:
        self.file = make_url(url).database or ""
        with self._connected(timeout=5.0) as raw:
            raw.execute("PRAGMA journal_mode=WAL")
            raw.execute(f"CREATE TABLE item ({COLUMNS})")

    @contextmanager
    def _connected(self, timeout: float) -> Iterator[sqlite3.Connection]:
        raw = sqlite3.connect(self.file, timeout=timeout, isolation_level=None)
        try:
            yield raw
        finally:
            raw.close()

    def running(self) -> list[str]:
        with self._connected(timeout=0.0) as raw:
            try:
                raw.execute("BEGIN IMMEDIATE")
                raw.execute("ROLLBACK")
            except sqlite3.OperationalError as error:
                return [str(error)]
        return []

    def connections(self) -> int:
        return sum("_connection_worker_thread" in thread.name for thread in threading.enumerate())

    def has(self, number: int) -> bool:
        with self._connected(timeout=5.0) as raw:
            row = raw.execute("SELECT 1 FROM item WHERE id = ?", [number]).fetchone()
            return row is not None

    def clean(self) -> None:
        """There is nobody to ask."""


class Noise(logging.Handler):
    """Whatever was complained about: warnings, logs, what a loop or a destructor could not raise.

    Not noise are two of asyncpg's own, of a strike inside its connect: a future that it drops.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        logging.getLogger().addHandler(self)
        asyncio.get_running_loop().set_exception_handler(self._loop)
        warnings.simplefilter("always")
        warnings.showwarning = self._warning  # type: ignore[assignment]
        sys.unraisablehook = self._unraisable
        threading.excepthook = self._thread

    def emit(self, record: logging.LogRecord) -> None:
        if not record.getMessage().startswith("close() rolls back"):  # as it should
            tail = "" if not record.exc_info else repr(record.exc_info[1])
            self.heard.append(f"log: {record.getMessage()} {tail}")

    def _loop(self, loop: Any, context: dict[str, Any]) -> None:
        message, error = context["message"], context.get("exception")
        if (
            message == "Future exception was never retrieved"
            and isinstance(error, ConnectionError)
            and "connection_lost() call" in str(error)
        ):
            return
        self.heard.append(f"loop: {message} {error!r}")

    def _warning(self, message: Any, category: Any, *place: object) -> None:
        self.heard.append(f"{category.__name__}: {message}")

    def _unraisable(self, unraisable: Any) -> None:
        self.heard.append(f"unraisable: {unraisable.exc_value!r} in {unraisable.object!r}")

    def _thread(self, arguments: Any) -> None:
        self.heard.append(f"thread: {arguments.exc_value!r}")


# -- striking and looking --------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of one load, kind and pool."""

    ground: str
    load: str
    pool: str
    kind: str
    strikes: int = 0
    unclean: list[str] = field(default_factory=list)


class Arena:
    """One ground on one database, where strikes fall one after the other."""

    def __init__(self, ground: str, url: str) -> None:
        self.make = GROUNDS[ground]
        self.url = url
        witnesses = {"postgresql": PostgresWitness, "mysql": MySQLWitness, "sqlite": SQLiteWitness}
        self.witness: Witness = witnesses[make_url(url).get_backend_name()](url)
        self.noise = Noise()
        self.rows = 0
        self.ground: Ground | None = None
        asyncio.get_running_loop().set_task_factory(counted_task)

    async def run(self, load: str, pool: str, kind: str, first: int, stride: int) -> Tally:
        """Strike a load at every `stride`-th step, until it comes to its end unharmed."""
        tally = Tally(self.make.__name__.lower(), load, pool, kind)
        at = first
        while True:
            strike = Strike(kind, at)
            faults = await self._strike(strike, load, pool)
            tally.strikes += strike.blows > 0
            if faults:
                tally.unclean.append(f"step {at}: {'; '.join(faults)}")
            if strike.stalled or not strike.blows:
                break
            at += stride
        await self._part()
        return tally

    async def _strike(self, strike: Strike, load: str, pool: str) -> list[str]:
        self.rows += 1
        gc.freeze()  # so that looking for what this strike leaves behind is quick
        if self.ground is None or pool == "cold":
            await self._part()
            self.ground = self.make(self.url, pool)
            if pool != "cold":
                await self._take_all(self.ground)
        ground = self.ground
        faults: list[str] = []
        async with COMPANY.get(load, nobody)(ground, strike):
            Counted.strike = strike
            strike.victim = asyncio.create_task(self._victim(strike, LOADS[load], self.rows))
            await self._fall(strike)
        faults += await self._quiet(strike, closed=load == "close")
        faults += self._truth(strike, load)
        if load == "close":
            self.ground = None
        elif not faults:
            try:
                async with asyncio.timeout(HANGS):
                    await self._take_all(ground)
            except Exception as error:
                faults.append(f"the pool is not whole: {error!r}")
        gc.collect()
        await asyncio.sleep(0)
        faults += self.noise.heard
        self.noise.heard.clear()
        if faults:
            await self._part()
            self.noise.heard.clear()
        return faults

    async def _victim(
        self, strike: Strike, load: Callable[[Ground, Strike, int], Awaitable[None]], number: int
    ) -> None:
        assert self.ground is not None
        work = self._told(strike, load(self.ground, strike, number))
        with suppress(asyncio.CancelledError, Exception):  # (nor may a task keep the traceback)
            await self._exposed(strike, work)

    async def _exposed(self, strike: Strike, work: Coroutine[Any, Any, None]) -> None:
        if strike.kind == "level":
            with anyio.CancelScope() as scope:
                strike.hit = scope.cancel
                await work
        elif strike.kind == "timeout":
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(None) as limit:
                strike.hit = lambda: limit.reschedule(loop.time())
                await work
        else:
            assert strike.victim is not None
            strike.hit = strike.victim.cancel
            await work

    async def _told(self, strike: Strike, work: Awaitable[None]) -> None:
        try:
            await work
        except BaseException as error:
            # A copy in words: a traceback would keep alive what the load has let go of.
            strike.told = " ".join([repr(error), *getattr(error, "__notes__", [])])
            if not isinstance(error, (asyncio.CancelledError, Boom)):
                strike.replaced = "".join(traceback.format_exception(error))
            raise
        finally:
            strike.over = True

    async def _fall(self, strike: Strike) -> None:
        """Wait until the strike has fallen, or the victim came to its end without."""
        assert strike.victim is not None
        strike.victim.add_done_callback(lambda _: strike.fallen.set())
        with suppress(TimeoutError):  # it hangs before it was struck: `_quiet` will say so
            async with asyncio.timeout(HANGS):
                await strike.fallen.wait()

    async def _quiet(self, strike: Strike, closed: bool) -> list[str]:
        """Look until nothing is left; say what is, if it stays."""
        victim, ground = strike.victim, self.ground
        assert victim is not None
        assert ground is not None
        faults: list[str] = []
        for _ in range(LOOKS):
            faults = []
            if not victim.done():
                faults.append("the victim goes on")
            tasks = asyncio.all_tasks() - {asyncio.current_task(), victim}
            if tasks:
                faults.append(f"tasks are left: {[task.get_coro() for task in tasks]}")
            if left := ground.unclean():
                faults.append(left)
            if running := self.witness.running():
                faults.append(f"runs on: {running}")
            connected, idle = self.witness.connections(), ground.idle()
            if connected > idle:  # (an idle one may be an empty place, which an error has left)
                faults.append(f"{connected} connected, {idle} idle in the pool")
            if closed and idle:
                faults.append(f"{idle} idle after close()")
            if not faults:
                break
            await asyncio.sleep(PAUSE)
        Counted.strike = None
        if not victim.done():
            await asyncio.wait((victim,), timeout=HANGS)
        if not victim.done():
            faults.append("the victim hangs")
            victim.cancel()
            await asyncio.wait((victim,), timeout=HANGS)
        return faults

    def _truth(self, strike: Strike, load: str) -> list[str]:
        """Compare what the caller was told with what the table holds."""
        told = strike.told
        if strike.replaced:
            return [f"told {told} instead of the cancellation: {strike.replaced}"]
        if load in {"close", "stream"}:
            return []
        there = self.witness.has(self.rows)
        if told is not None and "unknown" in told:
            return []
        if there is not (told is None or "stays committed" in told):
            return [f"told {told or 'that all is well'}; the row is {'' if there else 'not '}there"]
        return []

    async def _take_all(self, ground: Ground) -> None:
        """Use all connections at once."""
        inside, all_inside = 0, asyncio.Event()

        async def use() -> None:
            nonlocal inside
            async with ground.reader() as db:
                await db.execute(text("SELECT 1"))
                inside += 1
                if inside == SIZE + OVERFLOW:
                    all_inside.set()
                await all_inside.wait()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(SIZE + OVERFLOW):
                tasks.create_task(use())

    async def _part(self) -> None:
        """Close the ground; after an unclean strike, whatever it has left too."""
        if self.ground is not None:
            ground, self.ground = self.ground, None
            self.witness.clean()
            try:
                async with asyncio.timeout(HANGS):
                    await ground.close()
            except Exception:
                pass
            gc.collect()
            self.noise.heard.clear()


async def fight(
    ground: str, url: str, plan: list[tuple[str, str, str]], stride: int
) -> list[dict[str, Any]]:
    """Run through loads, pools and kinds; each begins one step after the one before."""
    arena = Arena(ground, url)
    tallies = []
    for number, (load, pool, kind) in enumerate(plan):
        tallies.append(await arena.run(load, pool, kind, 1 + number % stride, stride))
    return [asdict(tally) for tally in tallies]
