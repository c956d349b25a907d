"""Each fault strikes the message that it was armed for, and leaves what it promises to leave."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import psycopg
import pytest

from engineroom.testing import Fault, Message, PostgresServer, WireProxy, kill_backends, postgres
from engineroom.testing.wire import Parcel, Wire

pytestmark = pytest.mark.anyio

EventuallyAsync = Callable[[Callable[[], object]], Awaitable[None]]
Backends = Callable[[str], list[Any]]

# What the drivers say when their connection breaks.
BROKEN = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    psycopg.OperationalError,
    OSError,
)
BIG = 300_000


class Client:
    """A connection of either driver, with the same verbs."""

    def __init__(self, driver: str, connection: Any) -> None:
        self.driver = driver
        self.connection = connection

    async def insert(self, *values: int) -> None:
        statement = "INSERT INTO t VALUES ($1)" if self.driver == "asyncpg" else INSERT
        for value in values:
            await self.run(statement, value)

    async def run(self, statement: str, *values: object) -> None:
        if self.driver == "asyncpg":
            await self.connection.execute(statement, *values)
        else:
            await self.connection.execute(statement, values or None)

    async def commit(self, *values: int) -> None:
        """Insert in a transaction."""
        await self.run("BEGIN")
        await self.insert(*values)
        await self.run("COMMIT")


INSERT = "INSERT INTO t VALUES (%s)"


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@asynccontextmanager
async def connected(driver: str, url: str) -> AsyncIterator[Client]:
    if driver == "asyncpg":
        connection = await asyncpg.connect(url)
        try:
            yield Client(driver, connection)
        finally:
            connection.terminate()
    else:
        one = await psycopg.AsyncConnection.connect(url, autocommit=True)
        try:
            yield Client(driver, one)
        finally:
            await one.close()


@pytest.fixture
def rows(pg18: PostgresServer, database: str) -> Callable[[], list[int]]:
    """What is stored; the server is asked directly."""
    pg18.execute("CREATE TABLE t (a int, b bytea)", database)
    return lambda: [int(row[0]) for row in pg18.execute("SELECT a FROM t ORDER BY a", database)]


async def test_cut_before_commit_nothing_is_committed(
    driver: str,
    proxy: WireProxy,
    postgres_url: str,
    rows: Callable[[], list[int]],
    backends: Backends,
    eventually_async: EventuallyAsync,
) -> None:
    fault = proxy.cut_before("COMMIT")
    async with connected(driver, proxy.url(postgres_url)) as client:
        with pytest.raises(BROKEN):
            await client.commit(1)
    assert fault.happened
    await eventually_async(lambda: not backends(postgres_url))
    assert rows() == []


async def test_cut_during_commit_nothing_is_committed(
    driver: str,
    proxy: WireProxy,
    pg18: PostgresServer,
    postgres_url: str,
    rows: Callable[[], list[int]],
    backends: Backends,
    eventually_async: EventuallyAsync,
) -> None:
    log = pg18._keeper.folder / "log"
    before = log.stat().st_size
    fault = proxy.cut_during("COMMIT")
    async with connected(driver, proxy.url(postgres_url)) as client:
        with pytest.raises(BROKEN):
            await client.commit(1)
    assert fault.happened
    await eventually_async(lambda: not backends(postgres_url))
    assert "incomplete message from client" in log.read_bytes()[before:].decode()
    assert rows() == []


async def test_cut_after_commit_it_is_committed_and_the_client_has_an_error(
    driver: str, proxy: WireProxy, postgres_url: str, rows: Callable[[], list[int]]
) -> None:
    fault = proxy.cut_after("commit")
    async with connected(driver, proxy.url(postgres_url)) as client:
        with pytest.raises(BROKEN):
            await client.commit(1)
    assert fault.wait().sql.rstrip(";") == "COMMIT"
    assert rows() == [1]


@pytest.mark.parametrize(("moment", "stored"), [("before", []), ("during", []), ("after", [1])])
async def test_a_statement_that_stands_alone(
    moment: str,
    stored: list[int],
    driver: str,
    proxy: WireProxy,
    postgres_url: str,
    rows: Callable[[], list[int]],
    backends: Backends,
    eventually_async: EventuallyAsync,
) -> None:
    arm: Callable[[str], Fault] = getattr(proxy, f"cut_{moment}")
    async with connected(driver, proxy.url(postgres_url)) as client:
        arm("INTO t")
        with pytest.raises(BROKEN):
            await client.insert(1)
    await eventually_async(lambda: not backends(postgres_url))
    assert rows() == stored


async def test_the_nth_by_text_by_count_and_by_function(
    driver: str, proxy: WireProxy, postgres_url: str, rows: Callable[[], list[int]]
) -> None:
    url = proxy.url(postgres_url)
    async with connected(driver, url) as client:
        proxy.cut_after("insert", nth=2)
        with pytest.raises(BROKEN):
            await client.insert(1, 2, 3)
    async with connected(driver, url) as client:
        fault = proxy.cut_after(nth=4)
        with pytest.raises(BROKEN):
            await client.commit(4, 5, 6)
    assert "INSERT" in fault.wait().sql
    assert rows() == [1, 2]

    def carries_nine(message: Message) -> bool:
        return message.kind == "Bind" and message.body.find((9).to_bytes(2, "big")) > 0

    async with connected(driver, url) as client:
        fault = proxy.cut_before(carries_nine)
        with pytest.raises(BROKEN):
            await client.insert(7, 8, 9)
    assert (fault.wait().kind, "INSERT" in fault.wait().sql) == ("Bind", True)
    assert rows() == [1, 2, 7, 8]


@pytest.mark.parametrize("kind", ["Parse", "Bind", "Describe", "Execute", "Sync", "Password"])
async def test_after_any_kind_of_message_it_does_not_hang(
    kind: str, driver: str, proxy: WireProxy, postgres_url: str, rows: Callable[[], list[int]]
) -> None:
    fault = proxy.cut_after(lambda message: message.kind == kind)
    with pytest.raises(BROKEN):
        async with connected(driver, proxy.url(postgres_url)) as client:
            await client.insert(1)
    assert fault.wait().kind == kind


async def test_after_the_leave_to_copy_it_does_not_hang(
    proxy: WireProxy, postgres_url: str, rows: Callable[[], list[int]]
) -> None:
    fault = proxy.cut_after("COPY")
    async with connected("psycopg", proxy.url(postgres_url)) as client:
        with pytest.raises(BROKEN):
            async with client.connection.cursor() as cursor:
                async with cursor.copy("COPY t (a) FROM STDIN") as copy:
                    await copy.write_row((1,))
    assert fault.happened
    assert rows() == []


def test_the_answers_of_a_pipeline_before_it_pass() -> None:
    """With the bytes themselves, for when a driver's arrive is chance."""
    ready = b"Z\0\0\0\5I"
    fault = Fault("cut", "after", "SELECT 3", 1)
    wire = Wire([], [fault])
    wire.hear_client(struct.pack("!II", 8, 196608))
    wire.hear_server(ready)
    wire.note_delivery(b"Z")
    for number in (1, 2, 3, 4):
        text = f"SELECT {number}\0".encode()
        wire.hear_client(b"Q" + struct.pack("!I", 4 + len(text)) + text)
    complete = b"C" + struct.pack("!I", 13) + b"SELECT 1\0"
    assert wire.hear_server(complete + ready) == [Parcel(complete + ready, b"CZ")]
    assert wire.hear_server(complete + ready + complete) == [Parcel(complete + ready, b"CZ")]
    ((_, _, nothing), (_, _, struck), (held, _, _)) = wire.hear_server(ready + complete)
    assert (nothing, struck) == (None, (fault, Message("Query", "SELECT 3", b"SELECT 3\0")))
    assert held == complete + ready + complete  # which a frozen wire hands on after `thaw()`


async def test_a_message_of_many_packets(
    driver: str, proxy: WireProxy, postgres_url: str, rows: Callable[[], list[int]]
) -> None:
    statement = "INSERT INTO t VALUES (1, $1)" if driver == "asyncpg" else INSERT_BIG
    async with connected(driver, proxy.url(postgres_url)) as client:
        await client.run(statement, b"\x00" * BIG)
        assert rows() == [1]
        fault = proxy.cut_during(lambda message: len(message.body) > BIG)
        with pytest.raises(BROKEN):
            await client.run(statement, b"\x00" * BIG)
    assert len(fault.wait().body) > BIG
    assert rows() == [1]


INSERT_BIG = "INSERT INTO t VALUES (1, %s)"


async def test_it_strikes_once_and_only_what_it_is_for(
    driver: str, proxy: WireProxy, postgres_url: str, rows: Callable[[], list[int]]
) -> None:
    url = proxy.url(postgres_url)
    never = proxy.cut_before("DELETE")
    disarmed = proxy.cut_before("INSERT")
    disarmed.disarm()
    fault = proxy.cut_before("INSERT", nth=2)
    async with connected(driver, url) as other, connected(driver, url) as client:
        with pytest.raises(BROKEN):
            await client.insert(1, 2)
        await other.commit(3)
    assert rows() == [1, 3]
    assert (never.happened, disarmed.happened, fault.happened) == (False, False, True)
    assert never.message is None
    with pytest.raises(TimeoutError, match=r"<cut before 'DELETE'> did not happen within 0\.1 s"):
        never.wait(0.1)


def test_what_a_message_shows() -> None:
    assert "secret" not in repr(Message("Bind", "SELECT $1", b"secret"))
    assert Message("Query", "SELECT 1", b"").executes
    assert not Message("Parse", "SELECT 1", b"").executes


def test_the_first_is_number_one(proxy: WireProxy) -> None:
    with pytest.raises(ValueError, match="nth=0: the messages that match are counted from 1"):
        proxy.cut_before("COMMIT", nth=0)


# -- freezing ----------------------------------------------------------------------------------


async def test_a_frozen_wire_is_silent_until_it_thaws(
    driver: str, proxy: WireProxy, postgres_url: str, rows: Callable[[], list[int]]
) -> None:
    url = proxy.url(postgres_url)
    async with connected(driver, url) as client:
        proxy.freeze()
        asked = asyncio.create_task(client.insert(1))
        late = asyncio.create_task(self_contained(driver, url))
        done, _ = await asyncio.wait((asked, late), timeout=0.3)
        assert (done, rows()) == (set(), [])
        proxy.thaw()
        await asyncio.gather(asked, late)
        assert rows() == [1, 2]


async def self_contained(driver: str, url: str) -> None:
    async with connected(driver, url) as client:
        await client.insert(2)


async def test_frozen_before_commit_the_transaction_stays_open(
    driver: str,
    proxy: WireProxy,
    postgres_url: str,
    rows: Callable[[], list[int]],
    backends: Backends,
) -> None:
    async with connected(driver, proxy.url(postgres_url)) as client:
        fault = proxy.freeze_before("COMMIT")
        asked = asyncio.create_task(client.commit(1))
        await asyncio.to_thread(fault.wait)
        assert [backend.state for backend in backends(postgres_url)] == ["idle in transaction"]
        assert (rows(), asked.done()) == ([], False)
        proxy.thaw()
        await asked
        assert rows() == [1]


async def test_frozen_after_commit_it_is_committed_and_not_told(
    driver: str, proxy: WireProxy, postgres_url: str, rows: Callable[[], list[int]]
) -> None:
    async with connected(driver, proxy.url(postgres_url)) as client:
        fault = proxy.freeze_after("COMMIT")
        asked = asyncio.create_task(client.commit(1))
        await asyncio.to_thread(fault.wait)
        assert rows() == [1]
        assert (await asyncio.wait((asked,), timeout=0.2))[0] == set()
        proxy.thaw()
        await asked
        await client.insert(2)
        assert rows() == [1, 2]


@pytest.mark.parametrize("end", ["cut", "close"])
async def test_a_frozen_wire_can_be_cut(
    end: str, driver: str, proxy: WireProxy, postgres_url: str, rows: Callable[[], list[int]]
) -> None:
    async with connected(driver, proxy.url(postgres_url)) as client:
        proxy.freeze()
        asked = asyncio.create_task(client.insert(1))
        await asyncio.wait((asked,), timeout=0.1)
        getattr(proxy, end)()
        with pytest.raises(BROKEN):
            await asked
    assert rows() == []


# -- backends ----------------------------------------------------------------------------------


async def test_backends_are_killed_by_pid_and_by_database(
    driver: str, pg18: PostgresServer, postgres_url: str, backends: Backends
) -> None:
    async with (
        connected(driver, pg18.url()) as elsewhere,
        connected(driver, postgres_url) as first,
        connected(driver, postgres_url) as second,
    ):
        pids = [backend.pid for backend in backends(postgres_url)]
        assert kill_backends(pg18.url(), pids[0]) == [pids[0]]
        assert [backend.pid for backend in backends(postgres_url)] == [pids[1]]
        assert kill_backends(postgres_url) == [pids[1]]
        assert kill_backends(postgres_url) == []
        assert backends(postgres_url) == []
        for client in (first, second):
            with pytest.raises(BROKEN):
                await client.run("SELECT 1")
        await elsewhere.run("SELECT 1")


@pytest.fixture(scope="module")
def hanging() -> Iterator[PostgresServer]:
    with postgres(18) as server:
        yield server


def test_a_backend_that_does_not_end_is_told(hanging: PostgresServer) -> None:
    with psycopg.connect(hanging.url()) as connection:
        pid = connection.info.backend_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError, match=f"backends {pid} have not ended within 0.1 s"):
                kill_backends(hanging.url(), timeout=0.1)
        finally:
            os.kill(pid, signal.SIGCONT)
        with pytest.raises(psycopg.errors.AdminShutdown):
            connection.execute("SELECT 1")
