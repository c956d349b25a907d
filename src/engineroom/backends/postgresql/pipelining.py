"""BEGIN and the first statement in one round trip, by psycopg's pipeline mode.

psycopg sends a BEGIN of its own before the first statement, and waits for its answer. Here a cursor
puts both on the wire at once, and is back when both are answered: whoever uses it sees a result or
an error as ever. Whatever else begins a transaction (`executemany`, `stream`, `copy`, a cursor of
the server, `tpc_begin`) does it in psycopg's way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import cache, partial
from inspect import iscoroutinefunction
from typing import Any, Literal

from sqlalchemy import event
from sqlalchemy.engine import Engine

from ...errors import InvalidOption
from .beginning import forget_what_is_sent
from .settling import break_off

Setting = Literal["auto", "on", "off"]

# Seconds of a round trip from which on it pays. A pipeline costs the client 0.05 ms of CPU, what a
# session costs is 0.4 ms: a trip of less than this is often a wait for the client's own CPU.
FAR = 0.002
LOOKS = 10  # transactions that begin in two trips, and slowly, before one does in one
IDLE = 0  # libpq's PQTRANS_IDLE
CONNECTED = 0  # and CONNECTION_OK


def attach(engine: Engine, setting: Setting) -> None:
    """Have the connections of an engine begin so, where psycopg opens them.

    Raises:
        InvalidOption: it is asked for, and libpq is too old.
    """
    dialect: Any = engine.dialect
    if setting == "off" or dialect.driver != "psycopg":
        return
    import psycopg

    if not psycopg.Pipeline.is_supported():
        if setting == "on":
            found = psycopg.pq.version() // 10000
            raise InvalidOption(
                f"pipeline='on' (DB_PIPELINE) cannot be had: libpq is {found}, "
                'and pipelines came with 14. Install one: pip install "psycopg[binary]", or leave '
                "it out."
            )
        return

    def equip(opened: Any, record: object) -> None:
        driver = dialect.get_driver_connection(opened)
        is_async = iscoroutinefunction(driver.rollback)
        plain = driver.cursor_factory
        driver.cursor_factory = ours = _beginning_cursor(plain, is_async)
        driver.course = Course(plain, ours, is_sure=setting == "on")

    event.listen(engine, "connect", equip)


class Course:
    """How a connection begins its transactions: what it has learned about its server's distance."""

    def __init__(self, plain: Any, ours: Any, *, is_sure: bool) -> None:
        self.is_near: bool = False
        self.pipelines: bool = is_sure
        self.beginning: Any = None  # the cursor by which a transaction begins just now
        self._plain = plain  # the cursors that it would have without us
        self._ours = ours
        self._is_sure = is_sure
        self._slow = 0

    def learn(self, driver: Any, seconds: float) -> None:
        """Learn from how long it took to begin, with a statement whose own time nobody knows.

        What was quick proves that the server is near: from then on all is as if nobody had looked.
        Where the statements alone are slow, it does not matter much which way is taken.
        """
        if self._is_sure:
            return
        if seconds < (FAR if self.pipelines else 2 * FAR):
            self.is_near = True
            if driver.cursor_factory is self._ours:  # and none of the application's made of it
                driver.cursor_factory = self._plain
        else:
            self._slow += 1
            self.pipelines = self._slow >= LOOKS

    @property
    def awaits_begin(self) -> bool:
        """Whether a BEGIN that travels with a statement was not answered yet."""
        cursor = self.beginning
        return cursor is not None and cursor.pgresult is None


@cache
def _beginning_cursor(base: Any, is_async: bool) -> Any:
    """Make a class of cursors that begin a transaction where none is open."""

    def execute(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        driver = self.connection
        if not _may_begin(driver, query):
            return base.execute(self, query, *arguments, **options)
        began = time.perf_counter()
        if driver.course.pipelines:
            _in_one_trip(self, partial(base.execute, self, query, *arguments, **options))
        else:
            base.execute(self, query, *arguments, **options)
        driver.course.learn(driver, time.perf_counter() - began)
        return self

    async def execute_on_loop(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        driver = self.connection
        if not _may_begin(driver, query):
            return await base.execute(self, query, *arguments, **options)
        began = time.perf_counter()
        if driver.course.pipelines:
            await _in_one_trip_on_loop(
                self, partial(base.execute, self, query, *arguments, **options)
            )
        else:
            await base.execute(self, query, *arguments, **options)
        driver.course.learn(driver, time.perf_counter() - began)
        return self

    verb = execute_on_loop if is_async else execute
    return type(base.__name__, (base,), {"execute": verb})


def _may_begin(driver: Any, query: Any) -> bool:
    """Whether a transaction begins with a text, of one command: no other goes into a pipeline."""
    pgconn = driver.pgconn
    return bool(
        pgconn.transaction_status == IDLE
        and not driver.autocommit
        and not driver.course.is_near
        and query.__class__ is str
        and ";" not in query
        and not pgconn.pipeline_status  # it is the user's own
    )


def _in_one_trip(cursor: Any, execute: Callable[[], Any]) -> None:
    """Begin with a statement; both are answered then, and psycopg in no pipeline any more."""
    from psycopg import Error

    driver = cursor.connection
    with _pipeline_of(cursor) as pipeline:
        try:
            _send_begin(cursor, pipeline)
            execute()
            driver.wait(_rest_of(pipeline))
        except BaseException as error:
            if pipeline.command_queue.is_sent and not isinstance(error, Error):
                break_off(driver)  # a signal struck, and Sync may not be sent: nobody would answer
            with suppress(Exception):  # an error may come early; and the connection be lost
                driver.wait(_rest_of(pipeline))
            raise


async def _in_one_trip_on_loop(cursor: Any, execute: Callable[[], Any]) -> None:
    """Begin with a statement, as above."""
    driver = cursor.connection
    with _pipeline_of(cursor) as pipeline:
        try:
            _send_begin(cursor, pipeline)
            await execute()
            await driver.wait(_rest_of(pipeline))
        except BaseException:
            with suppress(Exception):  # an error may come early; and the connection be lost
                await driver.wait(_rest_of(pipeline))
            raise


class Burst(deque[Callable[[], Any]]):
    """What psycopg would send one after the other: it goes out together, with a Sync behind.

    Before all that the server is asked to answer BEGIN: one that is frozen is known by it.
    """

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self._pipeline = pipeline
        self.is_sent: bool = False

    def popleft(self) -> Callable[[], Any]:
        """Take everything at once."""
        return super().popleft() if self.is_sent else self._send

    def _send(self) -> None:
        self.is_sent = True
        self._pipeline.pgconn.send_flush_request()
        while self:
            self.popleft()()
        self._pipeline.pgconn.pipeline_sync()
        self._pipeline.result_queue.append(None)


def _rest_of(pipeline: Any) -> Generator[Any, Any, None]:
    """Take the answers that are due still; psycopg runs it.

    What did not fit on the wire is sent first, and where nothing was sent yet, or more has come up
    (an old statement is forgotten), that is. `Pipeline._fetch_gen` and `_sync_gen` are private:
    `Pipeline.sync()` alone is public, and a second Sync would be a round trip more. A test in
    `tests/test_private_names.py` fails when they go.
    """
    from psycopg.generators import send

    if pipeline.command_queue or not pipeline.command_queue.is_sent:
        pipeline.command_queue.is_sent = True
        yield from pipeline._sync_gen()
    else:
        if pipeline.pgconn.flush():
            yield from send(pipeline.pgconn)
        yield from pipeline._fetch_gen(flush=False)


@contextmanager
def _pipeline_of(cursor: Any) -> Generator[Any]:
    """Have a connection in a pipeline, which the caller synchronizes.

    `Connection.pipeline()` sends a Flush behind its Sync, and with that the server forgets that who
    is in a transaction may be idle for so long only. So psycopg is told of the pipeline where it
    looks for one, at `Connection._pipeline`. A test in `tests/test_private_names.py` fails when
    that goes.
    """
    from psycopg import AsyncPipeline, Pipeline

    driver = cursor.connection
    kind = AsyncPipeline if iscoroutinefunction(driver.rollback) else Pipeline
    driver.pgconn.enter_pipeline_mode()
    driver._pipeline = pipeline = kind(driver)
    driver.course.beginning = cursor
    pipeline.command_queue = Burst(pipeline)
    try:
        yield pipeline
    except BaseException:
        with suppress(Exception):  # a COPY has no way out; the pool ends its connection
            _leave_pipeline(driver)
        if driver.pgconn.status != CONNECTED and cursor.pgresult is None:
            forget_what_is_sent(cursor)
        raise
    _leave_pipeline(driver)


def _leave_pipeline(driver: Any) -> None:
    """Have a connection in no pipeline, if it is not lost."""
    driver._pipeline = driver.course.beginning = None
    if driver.pgconn.status == CONNECTED:
        driver.pgconn.exit_pipeline_mode()


def _send_begin(cursor: Any, pipeline: Any) -> None:
    """Send BEGIN, whose answer is the cursor's first result; psycopg sees no need for its own then.

    `Pipeline.result_queue` is in no documentation: there psycopg looks whom an answer is for. A
    test in `tests/test_private_names.py` fails when it goes.
    """
    driver = cursor.connection
    text = _begin_text(driver.isolation_level, driver.read_only, driver.deferrable)
    driver.pgconn.send_query_params(text, None)
    pipeline.result_queue.append((cursor, None))


@cache
def _begin_text(level: Any, read_only: bool | None, deferrable: bool | None) -> bytes:
    parts = ["BEGIN"]
    if level is not None:
        parts.append(f"ISOLATION LEVEL {level.name.replace('_', ' ')}")
    if read_only is not None:
        parts.append("READ ONLY" if read_only else "READ WRITE")
    if deferrable is not None:
        parts.append("DEFERRABLE" if deferrable else "NOT DEFERRABLE")
    return " ".join(parts).encode()
