"""What the tests share: real servers, a fresh database for a test, and waits without sleeps."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import covers
import pytest
import unsaid
from databases import Databases
from mariadb_server import MariaServer, find_mariadbd
from pgbouncer import PgBouncer

from engineroom.testing import PostgresServer, WireProxy, postgres

if TYPE_CHECKING:
    from tls import Certificates, TLSProxy

collect_ignore = ["shop"]  # a suite of its own, which test_shop_suite.py runs

DEADLINE = 20.0  # seconds; for what takes milliseconds on a machine that is not busy


class Backend(NamedTuple):
    """One connection, as the server sees it."""

    pid: int
    state: str
    query: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, default=1, help="run one test of so many, the same ones")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to the long runs what is theirs, and keep a sample of the others where one is wanted.

    By names: neighbours in the list differ by their parameters, in turn.
    """
    covers.leave_to_the_long_runs(items)
    every = config.getoption("sample")
    chosen = [item for item in items if crc32(unit(item).encode()) % every == 0]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[*{*items} - {*chosen}])
        items[:] = chosen


def unit(item: pytest.Item) -> str:
    """Name what is run or left: a test, or all examples of a page, which go on from each other."""
    return item.nodeid if isinstance(item, pytest.Function) else item.path.name


def pytest_configure(config: pytest.Config) -> None:
    subprocess.Popen = unsaid.Listening  # type: ignore[misc]  # whoever starts one is heard
    for name, level in unsaid.LEVELS.items():
        logging.getLogger(name).setLevel(level)
    config.addinivalue_line("markers", "both_loops: run the test on asyncio's loop and on uvloop")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("both_loops"):
        loops = [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})]
        metafunc.fixturenames.append("anyio_backend")
        metafunc.parametrize("anyio_backend", loops, ids=["asyncio", "uvloop"], scope="session")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test in whose output or log is what must not be, whatever it tests."""
    report = yield
    if report.passed:
        try:
            unsaid.refuse("\n".join(printed for _, printed in report.sections))
        except AssertionError as error:
            report.outcome, report.longrepr = "failed", str(error)
    return report


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Run `@pytest.mark.anyio` tests on asyncio; `@pytest.mark.both_loops` adds uvloop."""
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(scope="session")
def pg18() -> Iterator[PostgresServer]:
    """PostgreSQL 18, one for the run."""
    with postgres(18) as server:
        unsaid.learn(server.url())
        yield server


@pytest.fixture(scope="session")
def pg16() -> Iterator[PostgresServer]:
    """PostgreSQL 16, one for the run."""
    with postgres(16) as server:
        unsaid.learn(server.url())
        yield server


@pytest.fixture(scope="session")
def pgbouncer(pg18: PostgresServer) -> Iterator[PgBouncer]:
    """PgBouncer in transaction mode, with three connections to each database of PostgreSQL 18."""
    with PgBouncer(pg18) as pooler:
        yield pooler


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaServer]:
    """MariaDB, as the system has it, one for the run."""
    if find_mariadbd() is None:
        pytest.skip("did not run: there is no mariadbd here. `make servers`, as root, installs it")
    with MariaServer() as server:
        unsaid.learn(server.url())
        yield server


@pytest.fixture
def mysql_database(mariadb: MariaServer) -> Iterator[str]:
    """The name of a fresh database on MariaDB."""
    name = mariadb.create_database()
    yield name
    mariadb.drop_database(name)


@pytest.fixture
def mysql_url(mariadb: MariaServer, mysql_database: str) -> str:
    """The URL of a fresh database, `mysql://…`, without a driver."""
    return mariadb.url(mysql_database)


@pytest.fixture(scope="session")
def databases(pg18: PostgresServer) -> Databases:
    """The databases of PostgreSQL 18 that are lent to tests."""
    return Databases(pg18)


@pytest.fixture
def database(databases: Databases) -> Iterator[str]:
    """The name of a fresh database on PostgreSQL 18."""
    name = databases.lend()
    yield name
    databases.take_back(name)


@pytest.fixture
def postgres_url(pg18: PostgresServer, database: str) -> str:
    """The URL of a fresh database, `postgresql://…`, without a driver."""
    return pg18.url(database)


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver_url(request: pytest.FixtureRequest, pg18: PostgresServer, database: str) -> str:
    """The URL of a fresh database, once for each driver that has an asynchronous side."""
    return pg18.url(database, request.param)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'test.sqlite'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh database, once on SQLite and once on PostgreSQL."""
    names = {"sqlite": "sqlite_url", "postgresql": "postgres_url", "mysql": "mysql_url"}
    value: str = request.getfixturevalue(names[request.param])
    return value.replace("mysql:", "mysql+pymysql:")  # SQLAlchemy's own choice is not installed


@pytest.fixture(params=[pytest.param("pg16", marks=pytest.mark.soak), "pg18", "sqlite"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a fresh database, on each that guarantee 13 names; with the schema `sales`.

    On PostgreSQL 16 in the long runs only, unless a test says so.
    """
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_url")
        return
    server: PostgresServer = request.getfixturevalue(request.param)
    name = server.create_database()
    server.execute("CREATE SCHEMA sales", name)
    yield server.url(name)
    server.drop_database(name)


@pytest.fixture
def proxy(pg18: PostgresServer) -> Iterator[WireProxy]:
    """A counting proxy in front of PostgreSQL 18; `proxy.url(postgres_url)` goes through it."""
    with WireProxy(pg18.host, pg18.port) as wire:
        yield wire


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of an authority of their own."""
    from tls import Certificates  # only for who needs any

    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls(pg18: PostgresServer, certificates: Certificates) -> Iterator[TLSProxy]:
    """A server with TLS, whose name is localhost."""
    from tls import TLSProxy

    with TLSProxy(pg18.host, pg18.port, certificates.server) as proxy:
        yield proxy


@pytest.fixture
def backends(request: pytest.FixtureRequest) -> Callable[[str], list[Backend]]:
    """Ask who is connected to a database, given its URL, or on PostgreSQL 18 its name."""

    def ask(database: str) -> list[Backend]:
        name = database.rpartition("/")[2].partition("?")[0]
        if database.startswith("mysql"):
            maria: MariaServer = request.getfixturevalue("mariadb")
            return [Backend(*row) for row in maria.backends(name)]
        pg18: PostgresServer = request.getfixturevalue("pg18")
        rows = pg18.execute(
            "SELECT pid, state, query FROM pg_stat_activity"
            f" WHERE datname = '{name}' AND backend_type = 'client backend' ORDER BY pid"
        )
        return [Backend(int(pid), state, query) for pid, state, query in rows]

    return ask


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], None]:
    """Wait until something holds, and fail if it does not within the deadline."""

    def wait(predicate: Callable[[], object], deadline: float = DEADLINE) -> None:
        end = time.monotonic() + deadline
        while not (seen := predicate()):
            assert time.monotonic() < end, f"still {seen!r} after {deadline} s"
            time.sleep(0.01)

    return wait


@pytest.fixture
def eventually_async() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """Wait likewise in a coroutine: the predicate runs in a thread, the loop goes on."""

    async def wait(predicate: Callable[[], object], deadline: float = DEADLINE) -> None:
        end = time.monotonic() + deadline
        while not (seen := await asyncio.to_thread(predicate)):
            assert time.monotonic() < end, f"still {seen!r} after {deadline} s"
            await asyncio.sleep(0.01)

    return wait
