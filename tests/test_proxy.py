"""The proxy counts what a client waits for: no more, no less."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

import asyncpg
import psycopg
import pytest

from engineroom.testing import PostgresServer, WireProxy

pytestmark = pytest.mark.anyio

Backends = Callable[[str], list[object]]


def trips(proxy: WireProxy) -> int:
    """Return the round trips since the last look."""
    seen = proxy.round_trips
    proxy.reset()
    return seen


def test_url_replaces_host_and_port_only(proxy: WireProxy) -> None:
    here = f"127.0.0.1:{proxy.port}"
    assert proxy.url("postgresql://db.example/app") == f"postgresql://{here}/app"
    assert (
        proxy.url("postgresql+psycopg://u:p%40@[::1]:5/app?sslmode=prefer&x=1")
        == f"postgresql+psycopg://u:p%40@{here}/app?sslmode=prefer&x=1"
    )


async def test_asyncpg_counts(proxy: WireProxy, postgres_url: str) -> None:
    connection = await asyncpg.connect(proxy.url(postgres_url))
    assert (proxy.round_trips, proxy.connections) == (0, 1)
    assert proxy.startup_round_trips == 4  # the wish for encryption, the login's three
    proxy.reset()

    await connection.execute("SELECT 1")
    assert trips(proxy) == 1
    await connection.fetch("SELECT $1::int", 1)
    assert trips(proxy) == 2  # Parse, Describe, Flush; then Bind, Execute, Sync
    await connection.fetch("SELECT $1::int", 2)
    assert trips(proxy) == 1
    async with connection.transaction():
        await connection.fetch("SELECT $1::int", 3)
    assert proxy.statements == ["BEGIN;", "SELECT $1::int", "COMMIT;"]
    assert trips(proxy) == 3
    with pytest.raises(asyncpg.PostgresSyntaxError):
        await connection.fetch("SELEC")
    assert trips(proxy) == 2  # the refusal; then Sync
    await connection.executemany("SELECT $1::int", [(n,) for n in range(10)])
    assert (len(proxy.statements), trips(proxy)) == (10, 1)
    await connection.close()
    assert (proxy.round_trips, proxy.connections) == (0, 0)


async def test_copy_is_counted(proxy: WireProxy, postgres_url: str) -> None:
    connection = await asyncpg.connect(proxy.url(postgres_url))
    await connection.execute("CREATE TABLE t (a text)")
    proxy.reset()
    rows = [("x" * 1000,)] * 5000
    await connection.copy_records_to_table("t", records=rows, columns=["a"])
    # asyncpg asks for the columns' types, then sends COPY and the data. It does not wait for the
    # leave to send them, but may get it in between: then the rest counts once more.
    assert trips(proxy) in {2, 3}
    assert await connection.fetchval("SELECT count(*) FROM t") == 5000
    assert trips(proxy) == 2
    await connection.close()


def test_psycopg_counts(proxy: WireProxy, postgres_url: str) -> None:
    with psycopg.connect(proxy.url(postgres_url)) as connection:
        assert (proxy.round_trips, proxy.connections, proxy.startup_round_trips) == (0, 1, 4)
        connection.execute("SELECT 1")
        connection.commit()
        assert proxy.statements == ["BEGIN", "SELECT 1", "COMMIT"]
        assert trips(proxy) == 3

        connection.autocommit = True
        connection.execute("SELECT %s::int", [1], prepare=True)
        assert trips(proxy) == 2  # prepared by a message of its own
        connection.execute("SELECT %s::int", [2], prepare=True)
        assert proxy.statements == ["SELECT $1::int"]
        assert trips(proxy) == 1


def test_a_batch_sent_at_once_is_one_trip(proxy: WireProxy, postgres_url: str) -> None:
    with psycopg.connect(proxy.url(postgres_url), autocommit=True) as connection:
        proxy.reset()
        proxy.delay = 1.0  # so that nothing is answered while the batch is still being sent
        with connection.pipeline():
            for number in range(10):
                connection.execute("SELECT %s::int", [number])
        assert (len(proxy.statements), trips(proxy)) == (10, 1)


def test_each_connection_has_its_count(proxy: WireProxy, postgres_url: str) -> None:
    url = proxy.url(postgres_url)
    with (
        psycopg.connect(url, autocommit=True) as first,
        psycopg.connect(url, autocommit=True) as second,
    ):
        first.execute("SELECT 1")
        for _ in range(2):
            second.execute("SELECT 2")
        assert proxy.round_trips_by_connection == [1, 2]
        assert (proxy.round_trips, proxy.connections) == (3, 2)
        proxy.reset()
        second.execute("SELECT 2")
        assert proxy.round_trips_by_connection == [0, 1]
        assert (proxy.connections, proxy.startup_round_trips) == (0, 0)


async def test_a_cancel_request_passes_and_is_no_connection(
    proxy: WireProxy, postgres_url: str
) -> None:
    connection = await asyncpg.connect(proxy.url(postgres_url))
    with pytest.raises(TimeoutError):
        await connection.execute("SELECT pg_sleep(1000)", timeout=0.2)
    assert await connection.fetchval("SELECT 1") == 1
    assert proxy.connections == 1
    await connection.close()


async def test_delay_is_added_to_each_trip(proxy: WireProxy, postgres_url: str) -> None:
    connection = await asyncpg.connect(proxy.url(postgres_url))
    proxy.delay = 0.3
    began = time.monotonic()
    await connection.execute("SELECT 1")
    await connection.execute("SELECT 1")
    assert time.monotonic() - began >= 0.6
    proxy.delay = 0
    await connection.close()


async def test_a_cut_is_seen_on_both_sides(
    proxy: WireProxy,
    postgres_url: str,
    backends: Backends,
    eventually_async: Callable[[Callable[[], object]], asyncio.Future[None]],
) -> None:
    idle = await asyncpg.connect(proxy.url(postgres_url))
    busy = await asyncpg.connect(proxy.url(postgres_url))
    running = asyncio.create_task(busy.execute("SELECT pg_sleep(1000)"))
    await eventually_async(lambda: proxy.statements)
    proxy.cut()
    with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
        await running
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
        await idle.execute("SELECT 1")
    # One has ended; the sleeper has not looked at its socket yet.
    await eventually_async(lambda: len(backends(postgres_url)) <= 1)
    again = await asyncpg.connect(proxy.url(postgres_url))
    assert await again.fetchval("SELECT 1") == 1
    await again.close()


def test_the_end_of_either_side_reaches_the_other(
    proxy: WireProxy,
    pg18: PostgresServer,
    postgres_url: str,
    backends: Backends,
    eventually: Callable[[Callable[[], object]], None],
) -> None:
    connection = psycopg.connect(proxy.url(postgres_url))
    assert len(backends(postgres_url)) == 1
    connection.close()
    eventually(lambda: not backends(postgres_url))

    with psycopg.connect(proxy.url(postgres_url)) as connection:
        pid = connection.info.backend_pid
        pg18.execute(f"SELECT pg_terminate_backend({pid}, 20000)")  # and wait for its end
        with pytest.raises(psycopg.errors.AdminShutdown):  # the server's last words arrive
            connection.execute("SELECT 1")


def test_a_server_that_is_not_there_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with WireProxy("127.0.0.1", port) as proxy:
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(proxy.url("postgresql://postgres@nowhere/postgres"))
        assert proxy.connections == 0


async def test_close_ends_what_is_open_and_may_be_repeated(
    pg18: PostgresServer,
    postgres_url: str,
    eventually_async: Callable[[Callable[[], object]], asyncio.Future[None]],
) -> None:
    proxy = WireProxy(pg18.host, pg18.port)
    connection = await asyncpg.connect(proxy.url(postgres_url))
    running = asyncio.create_task(connection.execute("SELECT pg_sleep(1000)"))
    await eventually_async(lambda: proxy.statements)
    proxy.close()
    proxy.close()
    with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
        await running
    with pytest.raises(ConnectionRefusedError):
        await asyncpg.connect(proxy.url(postgres_url))


@pytest.mark.both_loops
async def test_it_is_the_same_on_both_loops(proxy: WireProxy, postgres_url: str) -> None:
    connection = await asyncpg.connect(proxy.url(postgres_url))
    proxy.reset()
    await connection.execute("SELECT 1")
    assert (trips(proxy), connection._loop) == (1, asyncio.get_running_loop())
    await connection.close()
