"""Scenarios: functions that run in a process of their own, which a hang or a crash may take along.

    def counts(url: str) -> int: ...

    def test_it_counts(url: str) -> None:
        assert run(counts, url) == 2

Every warning is an error there, and a single line on stderr fails the scenario: that is where
`ResourceWarning`, unraisable exceptions and asyncio's own complaints end.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import gc
import importlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from types import FrameType
from typing import Any, NoReturn, TypeVar

import psycopg
import pymysql
import pytest
from sqlalchemy import MetaData, String
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Mapped, mapped_column
from unsaid import BOUND, learn, refuse

from engineroom import Base

T = TypeVar("T")

HERE = Path(__file__).parent
DEADLINE = 60  # seconds for a scenario that takes a few
CHILD_DEADLINE = 20  # seconds for a forked child

LOOPS = ["asyncio", "uvloop"]
ASYNC_DRIVERS = ["asyncpg", "psycopg", "aiosqlite"]
SYNC_DRIVERS = ["psycopg", "psycopg2", "sqlite"]
PRELOADED = [  # by the process from which scenarios are forked
    "asyncmy",
    "engineroom.backends.mysql",
    "engineroom.backends.postgresql",
    "engineroom.backends.sqlite",
    "engineroom.testing",
    "psycopg2",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "sqlalchemy.dialects.sqlite.aiosqlite",
    "aiosqlite",
    "asyncpg",
    "uvloop",
]


# What a process begins with that lacks the modules named in its first argument.
HIDE = """
import importlib.util, sys
hidden = set(sys.argv[1].split(","))
class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hider())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in hidden else find_spec(name, *a)
"""


def sample(names: str, first: list[tuple[Any, ...]], *axes: list[Any]) -> pytest.MarkDecorator:
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
# And where what differs are sockets and processes, MySQL's as well.
every_database_and_loop = sample(
    "url, loop",
    [
        ("asyncpg", "asyncio"),
        ("asyncpg", "uvloop"),
        ("psycopg", "uvloop"),
        ("aiosqlite", "asyncio"),
        ("asyncmy", "asyncio"),
    ],
    [*ASYNC_DRIVERS, "asyncmy"],
    LOOPS,
)
every_server_and_loop = sample(
    "url, loop",
    [("asyncpg", "asyncio"), ("psycopg", "uvloop"), ("asyncmy", "asyncio")],
    [*ASYNC_DRIVERS[:2], "asyncmy"],
    LOOPS,
)
# For the fixture `url`, where the database matters little: the other in the long runs only.
on_a_server = pytest.mark.parametrize(
    "url", ["postgresql", pytest.param("sqlite", marks=pytest.mark.soak)], indirect=True
)
on_a_file = pytest.mark.parametrize(
    "url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.soak)], indirect=True
)
# And MySQL's as well.
on_all_three = pytest.mark.parametrize("url", ["sqlite", "postgresql", "mysql"], indirect=True)
every_sync_database = pytest.mark.parametrize("url", [*SYNC_DRIVERS, "pymysql"], indirect=True)


class Model(Base):
    """The base of the tables of these tests, apart from everybody else's."""

    __abstract__ = True
    metadata = MetaData()


class Item(Model):
    """A row that counts, or is there or not."""

    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    # Bound by each insert, and so looked for in whatever these tests print (`unsaid`).
    mark: Mapped[str] = mapped_column(String(20), default=BOUND, server_default="")


# -- running one -----------------------------------------------------------------------------


def run(scenario: Callable[..., Any], *arguments: Any, deadline: int = DEADLINE) -> Any:
    """Run a scenario in a process of its own, and return what it returned."""
    call = json.dumps([scenario.__module__, scenario.__name__, deadline, arguments])
    place = json.dumps([str(Path.cwd()), dict(os.environ)])
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        code = nursery().run(place, call, out.fileno(), err.fileno(), deadline + 10)
        out.seek(0)
        err.seek(0)
        printed, complaints = out.read(), err.read()
    refuse(printed + complaints)
    assert (code, complaints) == (0, ""), f"exit code {code}\n{printed}\n{complaints}"
    return json.loads(printed)


@cache
def nursery() -> Nursery:
    """Return the one of this process."""
    return Nursery()


class Nursery:
    """Forks a process for each scenario, which then need not import everything once more.

    It has imported what most of them need, and has no manager, no loop and no thread.
    """

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import scenario; scenario.serve()"
        # Python's own (3.12) about a thread beside the fork: the only one let through.
        warnings = ("-W", "error", "-W", "ignore:This process:DeprecationWarning")
        self._process = subprocess.Popen(
            [sys.executable, *warnings, "-c", code], stdin=theirs, start_new_session=True
        )
        theirs.close()
        atexit.register(self.end)

    def run(self, place: str, call: str, out: int, err: int, deadline: int) -> int:
        """Run a scenario with these files for its output; return its exit code."""
        self._socket.settimeout(DEADLINE)
        messages = [place.encode(), call.encode()]
        sizes = b"".join(len(message).to_bytes(4) for message in messages)
        socket.send_fds(self._socket, [sizes], [out, err])
        self._socket.sendall(b"".join(messages))
        group = self._receive()
        try:
            self._socket.settimeout(deadline)
            code = self._receive()
            until(lambda: is_alive(group), lambda alive: not alive)  # its children as well
            return code
        except BaseException:  # the next scenario gets another one, which owes no answer
            nursery.cache_clear()
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            self.end()
            raise

    def _receive(self) -> int:
        data = self._socket.recv(4)
        assert data, "the nursery has ended"
        return int.from_bytes(data, signed=True)

    def end(self) -> None:
        """Have it end, and wait for that."""
        atexit.unregister(self.end)
        self._socket.close()
        self._process.wait()


def is_alive(group: int) -> bool:
    """Whether any process of a group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def serve() -> None:
    """Stand at the other end of a `Nursery`; in each fork, return when its scenario has run."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    asked = socket.socket(fileno=os.dup(0))
    while True:
        sizes, files, _, _ = socket.recv_fds(asked, 8, 2)
        if not sizes:
            return
        place, call = (
            asked.recv(int.from_bytes(size), socket.MSG_WAITALL) for size in (sizes[:4], sizes[4:])
        )
        with suppress(Exception):  # the scenario's process will say it
            importlib.import_module(json.loads(call)[0])
        gc.freeze()  # or the end of each fork goes through all this, and copies it for that
        pid = os.fork()
        if pid == 0:
            os.setsid()
            asked.close()
            for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
                os.dup2(file, number)
                os.close(file)
            folder, environment = json.loads(place)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            main(call)
            return
        for file in files:
            os.close(file)
        try:
            asked.sendall(pid.to_bytes(4))
            _, status = os.waitpid(pid, 0)
            asked.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, signed=True))
        except BrokenPipeError:  # who asked has given up
            return


def main(call: bytes) -> None:
    """Run the scenario, and print what it returned."""
    module, name, deadline, arguments = json.loads(call)
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)  # shows where it hangs
    signal.alarm(deadline)
    owner = os.getpid()
    for argument in arguments:
        learn(argument)
    result = getattr(importlib.import_module(module), name)(*arguments)
    if os.getpid() == owner:  # a forked child may end by returning to here
        print(json.dumps(result))


def end_at_once() -> NoReturn:
    """End a scenario, which returns nothing: a destroyed task cannot be closed in peace."""
    print(json.dumps(None), flush=True)
    os._exit(0)


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


def is_mysql(url: str) -> bool:
    return url.startswith("mysql")


def is_server(url: str) -> bool:
    return is_postgres(url) or is_mysql(url)


@contextmanager
def mysql_server(url: str) -> Iterator[Any]:
    """Give a cursor beside the manager, on a connection that is in no database."""
    place = make_url(url)
    with (
        pymysql.connect(
            host=place.host,
            port=place.port or 0,
            user=place.username,
            password=place.password,
            autocommit=True,
            ssl_disabled=True,
        ) as raw,
        raw.cursor() as cursor,
    ):
        yield cursor


@contextmanager
def server(url: str) -> Iterator[psycopg.Connection[Any]]:
    """Connect beside the manager, to look and to kill; elsewhere, so as not to be counted."""
    plain = make_url(url).set(drivername="postgresql", database="postgres")
    with psycopg.connect(plain.render_as_string(hide_password=False), autocommit=True) as raw:
        yield raw


def backends(url: str) -> list[int]:
    """Return the process ids of the backends that serve the URL's database."""
    if is_mysql(url):
        with mysql_server(url) as cursor:
            cursor.execute(
                "SELECT id FROM information_schema.processlist WHERE db = %s ORDER BY id",
                [make_url(url).database],
            )
            return [number for (number,) in cursor.fetchall()]
    with server(url) as raw:
        rows = raw.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = %s"
            " AND backend_type = 'client backend' ORDER BY pid",
            [make_url(url).database],
        ).fetchall()
    return [pid for (pid,) in rows]


def held(url: str) -> list[Any]:
    """Return what is still connected: backends of a server, open descriptors of a file."""
    if is_server(url):
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
        faulthandler.register(signal.SIGALRM, chain=True)  # says where it hangs
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
        refuse(text)
        self.messages.append(text)


def fail(message: str) -> NoReturn:
    """Stand where nothing should come."""
    raise AssertionError(message)


def is_struck(step: int, unit: Callable[[], object], where: tuple[str, ...]) -> bool:
    """Run a unit of work, and raise what Ctrl-C does at one of its lines; False if it has fewer.

    Args:
        where: The folders or files whose lines count.
    """
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(where):
            return None
        if event == "line":
            lines += 1
            if lines == step:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        unit()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return lines >= step
