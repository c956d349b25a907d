"""Scenarios: functions that run in a process of their own, which a hang or a crash may take along.

    def counts(url: str) -> int: ...

    def test_it_counts(url: str) -> None:
        assert run(counts, url) == 2

Every warning is an error there, and a single line on stderr fails the scenario: that is where
`ResourceWarning`, unraisable exceptions and asyncio's own complaints end.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psycopg
import pytest
from sqlalchemy import MetaData
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Mapped, mapped_column

from engineroom import Base

T = TypeVar("T")

HERE = Path(__file__).parent
DEADLINE = 60  # seconds for a scenario that takes a few
CHILD_DEADLINE = 20  # seconds for a forked child

LOOPS = ["asyncio", "uvloop"]
ASYNC_DRIVERS = ["asyncpg", "psycopg", "aiosqlite"]
SYNC_DRIVERS = ["psycopg", "psycopg2", "sqlite"]


def sample(names: str, first: list[tuple[str, str]], *axes: list[str]) -> pytest.MarkDecorator:
    """Run a test with these each time, and with all other combinations in the long runs."""
    rest = [
        pytest.param(*values, marks=pytest.mark.soak)
        for values in itertools.product(*axes)
        if values not in first
    ]
    return pytest.mark.parametrize(
        names, [*first, *rest], indirect=["url"] if "url" in names else []
    )


every_driver_and_loop = sample(
    "url, loop",
    [
        ("asyncpg", "asyncio"),
        ("asyncpg", "uvloop"),
        ("psycopg", "uvloop"),
        ("aiosqlite", "asyncio"),
    ],
    ASYNC_DRIVERS,
    LOOPS,
)
server_driver_and_loop = sample(
    "url, loop", [("asyncpg", "asyncio"), ("psycopg", "uvloop")], ASYNC_DRIVERS[:2], LOOPS
)
every_sync_driver = pytest.mark.parametrize("url", SYNC_DRIVERS, indirect=True)


class Model(Base):
    """The base of the tables of these tests, apart from everybody else's."""

    __abstract__ = True
    metadata = MetaData()


class Item(Model):
    """A row that counts, or is there or not."""

    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)


# -- running one -----------------------------------------------------------------------------


def run(scenario: Callable[..., Any], *arguments: Any, deadline: int = DEADLINE) -> Any:
    """Run a scenario in a process of its own, and return what it returned."""
    call = json.dumps([scenario.__module__, scenario.__name__, deadline, arguments])
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "error"),
            # Python's own (3.12) about a thread beside the fork: the only one let through.
            *("-W", "ignore:This process:DeprecationWarning"),
            *(
                "-c",
                f"import sys; sys.path.insert(0, {str(HERE)!r}); import scenario; scenario.main()",
            ),
            call,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own: a hang is killed with its children
    )
    try:
        out, err = process.communicate(timeout=deadline + 10)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    assert (process.returncode, err) == (0, ""), f"exit code {process.returncode}\n{out}\n{err}"
    return json.loads(out)


def main() -> None:
    """Stand at the other end of `run`."""
    module, name, deadline, arguments = json.loads(sys.argv[1])
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)  # shows where it hangs
    signal.alarm(deadline)
    owner = os.getpid()
    result = getattr(importlib.import_module(module), name)(*arguments)
    if os.getpid() == owner:  # a forked child may end by returning to here
        print(json.dumps(result))


# -- what they need --------------------------------------------------------------------------


def run_on(loop: str, main: Coroutine[Any, Any, T]) -> T:
    """Do what `asyncio.run` does, on a loop of this kind."""
    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        return runner.run(main)


def loop_factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes a loop of this kind."""
    if loop == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    return asyncio.new_event_loop


def is_postgres(url: str) -> bool:
    return url.startswith("postgresql")


@contextmanager
def server(url: str) -> Iterator[psycopg.Connection[Any]]:
    """Connect beside the manager, to look and to kill; elsewhere, so as not to be counted."""
    plain = make_url(url).set(drivername="postgresql", database="postgres")
    with psycopg.connect(plain.render_as_string(hide_password=False), autocommit=True) as raw:
        yield raw


def backends(url: str) -> list[int]:
    """Return the process ids of the backends that serve the URL's database."""
    with server(url) as raw:
        rows = raw.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = %s"
            " AND backend_type = 'client backend' ORDER BY pid",
            [make_url(url).database],
        ).fetchall()
    return [pid for (pid,) in rows]


def held(url: str) -> list[Any]:
    """Return what is still connected: backends of a server, open descriptors of a file."""
    if is_postgres(url):
        return backends(url)
    file = make_url(url).database
    assert file is not None
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(descriptor.readlink()))
        except FileNotFoundError:  # the folder's own
            pass
    return [link for link in links if link.startswith(file)]


def settled(url: str, expected: int = 0) -> list[Any]:
    """Wait until so many are connected (a backend takes a moment to end), and return them."""
    return until(lambda: held(url), lambda seen: len(seen) == expected)


def until(look: Callable[[], T], right: Callable[[T], bool], deadline: float = 15.0) -> T:
    """Look until it is right, and return what was seen."""
    end = time.monotonic() + deadline
    while not right(seen := look()):
        assert time.monotonic() < end, f"still {seen!r}"
        time.sleep(0.02)
    return seen


def fork(child: Callable[[], object], end: str = "_exit") -> Callable[[], None]:
    """Fork; return what waits for the child and fails if it failed.

    The child ends by `os._exit` (code 0 if it got that far), or by `SystemExit` through whatever
    `with` it stands in, which is also how returning ends it.
    """
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_DEADLINE)
        try:
            child()
        except SystemExit:  # of a grandchild that ends by it
            raise
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        if end == "_exit":
            os._exit(0)
        sys.exit(0)

    def wait() -> None:
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"

    return wait


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run it in so many threads at once, and raise what any of them raised."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=guarded, args=(number,), name=f"worker-{number}")
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Log(logging.Handler):
    """What engineroom logged, at WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logger = logging.getLogger("engineroom")
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += "".join(traceback.format_exception(*record.exc_info))
        self.messages.append(text)


def fail(message: str) -> NoReturn:
    """Stand where nothing should come."""
    raise AssertionError(message)
