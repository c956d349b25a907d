"""BEGIN and the first statement in one round trip, by psycopg's pipeline mode.

psycopg sends a BEGIN of its own before the first statement, and waits for its answer. Here a cursor
puts both on the wire at once, and is back when both are answered: whoever uses it sees a result or
an error as ever, and whatever else begins a transaction (`executemany`, `stream`, `copy`, a server's
cursor, `tpc_begin`) does it in psycopg's way.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from inspect import iscoroutinefunction
from typing import Any, Literal

from sqlalchemy import event
from sqlalchemy.engine import Engine

from ...errors import InvalidOption

Pipeline = Literal["auto", "on", "off"]

# Seconds of a round trip from which on it pays. A pipeline costs the client 0.05 ms of CPU, what a
# session costs is 0.4 ms: a trip of less than this is often a wait for the client's own CPU.
FAR = 0.002
LOOKS = 3  # transactions that begin in two trips, and slowly, before one does in one
IDLE = 0  # libpq's PQTRANS_IDLE


def attach(engine: Engine, setting: Pipeline) -> None:
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
            raise InvalidOption(
                f"pipeline='on' (DB_PIPELINE) cannot be had: libpq is {psycopg.pq.version() // 10000}, "
                'and pipelines came with 14. Install one: pip install "psycopg[binary]", or leave '
                "it out."
            )
        return

    def equip(opened: Any, record: object) -> None:
        driver = dialect.get_driver_connection(opened)
        is_async = iscoroutinefunction(driver.rollback)
        driver.course = Course(driver.cursor_factory, is_sure=setting == "on")
        driver.cursor_factory = _beginning_cursor(driver.cursor_factory, is_async)

    event.listen(engine, "connect", equip)


class Course:
    """How a connection begins its transactions: what it has learned about its server's distance."""

    def __init__(self, plain: Any, *, is_sure: bool) -> None:
        self.pipelines: bool = is_sure
        self._plain = plain  # the cursors that it would have without us
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
            driver.cursor_factory = self._plain
        else:
            self._slow += 1
            self.pipelines = self._slow >= LOOKS


def is_beginning(cursor: Any) -> bool:
    """Whether a cursor of psycopg has sent BEGIN with its statement, and no answer has come."""
    cursor = getattr(cursor, "_cursor", cursor)  # SQLAlchemy's adapter has it so
    return getattr(cursor, "travels", False) and cursor.pgresult is None


@cache
def _beginning_cursor(base: Any, is_async: bool) -> Any:
    """Make a class of cursors that begin a transaction where none is open."""

    def execute(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        driver = self.connection
        if not _may_begin(driver, query):
            return base.execute(self, query, *arguments, **options)
        began = time.perf_counter()
        if driver.course.pipelines:
            with _travelling(self) as failures, driver.pipeline() as pipeline:
                try:
                    _send_begin(self, driver, pipeline)
                    base.execute(self, query, *arguments, **options)
                except BaseException as error:  # noqa: BLE001  # it is raised again
                    failures.append(error)
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
            with _travelling(self) as failures:
                async with driver.pipeline() as pipeline:
                    try:
                        _send_begin(self, driver, pipeline)
                        await base.execute(self, query, *arguments, **options)
                    except BaseException as error:  # noqa: BLE001  # it is raised again
                        failures.append(error)
        else:
            await base.execute(self, query, *arguments, **options)
        driver.course.learn(driver, time.perf_counter() - began)
        return self

    verb = execute_on_loop if is_async else execute
    return type(base.__name__, (base,), {"execute": verb, "travels": False})


def _may_begin(driver: Any, query: Any) -> bool:
    """Whether a transaction begins with a text, of one command: no other goes into a pipeline."""
    pgconn = driver.pgconn
    return bool(
        pgconn.transaction_status == IDLE
        and not driver.autocommit
        and query.__class__ is str
        and ";" not in query
        and not pgconn.pipeline_status  # it is the user's own
    )


@contextmanager
def _travelling(cursor: Any) -> Generator[list[BaseException]]:
    """Mark a cursor while its BEGIN and its statement are on their way.

    What fails is kept until the pipeline has ended: psycopg would log what the end finds beside it.
    """
    failures: list[BaseException] = []
    cursor.travels = True
    try:
        yield failures
    except Exception:
        if not failures:
            raise
    finally:
        cursor.travels = False
    if failures:
        raise failures.pop()


def _send_begin(cursor: Any, driver: Any, pipeline: Any) -> None:
    """Send BEGIN, to be answered at once; from then on psycopg sees no need for its own.

    `Pipeline.result_queue` is in no documentation: there psycopg looks whom an answer is for. The
    cursor has that of its statement next. A test in `tests/test_private_names.py` fails when it
    goes.
    """
    text = _begin_text(driver.isolation_level, driver.read_only, driver.deferrable)
    driver.pgconn.send_query_params(text, None)
    driver.pgconn.send_flush_request()  # who waits for a silent server is to know what it owes
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
