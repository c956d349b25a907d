"""Faults on demand: a proxy that counts, delays, freezes and cuts, and the killing of backends.

The proxy stands in front of a PostgreSQL server and reads the frames of the protocol; what it hands
on, it does not change. A *round trip* begins with the client's first message while nothing is
awaited, and is over when the server has answered all that was asked, so several messages sent at
once are one trip, however they are cut into packets.

What a whole server can suffer (`freeze`, `kill`, `restart`) are verbs of `PostgresServer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.engine import URL

from engineroom.backends import Side, choose_driver
from engineroom.backends.postgresql import DRIVERS
from engineroom.secrecy import unseen
from engineroom.testing.wire import Fault, Message, Moment, Parcel, What, Wire
from engineroom.urls import read_url

__all__ = ["Fault", "Message", "WireProxy", "kill_backends"]


class WireProxy:
    """Stand between clients and a server: count round trips, delay, freeze and cut.

        with WireProxy(server.host, server.port) as proxy:
            engine = create_engine(proxy.url(server.url(driver="psycopg")))
            fault = proxy.cut_before("COMMIT")

    It refuses encryption in the server's place, since it must read what passes. The counts are
    exact for clients that wait for each answer. Of a client that pipelines, each batch sent before
    the answers to the last one had passed counts as one trip with it.

    The verbs with `before`, `during` and `after` arm a fault for one message, once, on whichever
    connection it passes: the `nth` one that `what` matches. A text matches where a statement that
    contains it is executed, whatever its case; a function gets each `Message`; None matches every
    statement that is executed.

    Attributes:
        port: The proxy's port on 127.0.0.1.
        delay: Seconds that a round trip takes longer, half of it each way; may be set at any time.
    """

    def __init__(self, host: str, port: int, delay: float = 0.0) -> None:
        """Listen on a free port, for the server at this host and port."""
        self.delay = delay
        self._upstream = (host, port)
        self._connections: list[_Connection] = []
        self._statements: list[str] = []
        self._faults: list[Fault] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._done = asyncio.Event()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._run, name="engineroom-proxy", daemon=True)
        self._thread.start()

    def url(self, original_url: str) -> str:
        """Return the same URL with the proxy's host and port in it."""
        parts = urlsplit(original_url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}").geturl()

    # -- counting -----------------------------------------------------------------------------

    @property
    def round_trips(self) -> int:
        """How often clients waited for the server since the last `reset()`, logins apart."""
        return sum(self.round_trips_by_connection)

    @property
    def round_trips_by_connection(self) -> list[int]:
        """The round trips of each connection, in the order in which they were opened."""
        return [each.wire.trips for each in list(self._connections)]

    @property
    def startup_round_trips(self) -> int:
        """How often clients waited while they connected and logged in, since the last `reset()`."""
        return sum(each.wire.startup_trips for each in list(self._connections))

    @property
    def connections(self) -> int:
        """How many connections were opened since the last `reset()`, cancel requests apart."""
        return sum(each.wire.is_new for each in list(self._connections))

    @property
    def notifications(self) -> int:
        """How many NOTIFYs were passed on to clients since the last `reset()`."""
        return sum(each.wire.notifications for each in list(self._connections))

    @property
    def statements(self) -> list[str]:
        """The SQL that was executed since the last `reset()`, in order.

        A prepared statement is listed each time it is bound, not when it is parsed.
        """
        return list(self._statements)

    def reset(self) -> None:
        """Set all counts to 0 and forget the statements; connections and faults stay."""
        self._call(self._reset)

    # -- faults -------------------------------------------------------------------------------

    def cut(self) -> None:
        """Break all live connections now, on both sides and without a word (TCP reset)."""
        self._call(self._cut)

    def cut_before(self, what: What = None, *, nth: int = 1) -> Fault:
        """Break the connection instead of handing the message on: the server never gets it."""
        return self._arm("cut", "before", what, nth)

    def cut_during(self, what: What = None, *, nth: int = 1) -> Fault:
        """Break the connection in the middle of the message: the server gets a part of it."""
        return self._arm("cut", "during", what, nth)

    def cut_after(self, what: What = None, *, nth: int = 1) -> Fault:
        """Break the connection when the server has answered: the client gets none of the answer."""
        return self._arm("cut", "after", what, nth)

    def freeze(self) -> None:
        """Let nothing pass from now on; connections stay open, and new ones get no answer."""
        self._call(self._flowing.clear)

    def freeze_before(self, what: What = None, *, nth: int = 1) -> Fault:
        """Freeze when the message comes; the server gets it after `thaw()`."""
        return self._arm("freeze", "before", what, nth)

    def freeze_after(self, what: What = None, *, nth: int = 1) -> Fault:
        """Freeze when the server has answered; the client gets the answer after `thaw()`."""
        return self._arm("freeze", "after", what, nth)

    def thaw(self) -> None:
        """Let everything pass again, first what has been held back."""
        self._call(self._flowing.set)

    def close(self) -> None:
        """Cut all connections and stop listening. A second call does nothing."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _arm(self, action: str, moment: Moment, what: What, nth: int) -> Fault:
        fault = Fault(action, moment, what, nth)
        self._faults.append(fault)
        return fault

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    def _call(self, function: Callable[[], None]) -> None:
        """Call a function in the proxy's thread, where all its state is changed."""

        async def call() -> None:
            function()

        asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    async def _main(self) -> None:
        server = await asyncio.start_server(self._accept, sock=self._listener)
        await self._done.wait()
        server.close()
        self._cut()

    def _reset(self) -> None:
        self._statements.clear()
        self._connections = [each for each in self._connections if each.is_open]
        for each in self._connections:
            each.wire.forget()

    def _cut(self) -> None:
        for each in self._connections:
            each.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, reader, writer)
        try:
            await connection.relay()
        except* (OSError, ValueError, asyncio.CancelledError):
            # One side is gone, or does not speak the protocol, or it was cut. (The last is not
            # passed on: asyncio's streams in 3.11 take a cancelled handler for an error.)
            _break(writer)


class _Connection:
    """One client's connection and the one to the server: hands on what passes between them."""

    def __init__(
        self, proxy: WireProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.wire = Wire(proxy._statements, proxy._faults)
        self.is_open = True
        self._proxy = proxy
        self._reader = reader
        self._client = writer
        self._server: asyncio.StreamWriter | None = None
        proxy._connections.append(self)

    async def relay(self) -> None:
        """Hand on until either side ends, or it is cut."""
        try:
            await self._proxy._flowing.wait()
            reader, self._server = await asyncio.open_connection(*self._proxy._upstream)
            to_server, to_client = self._lane(self._server), self._lane(self._client)
            async with asyncio.TaskGroup() as tasks:
                for pump in (
                    self._from_client(to_server, to_client),
                    self._from_server(reader, to_client),
                    to_server.run(),
                    to_client.run(self.wire.note_delivery),
                ):
                    tasks.create_task(pump)
            self.is_open = False
            for writer in (self._client, self._server):
                writer.close()
        finally:
            self.cut()

    def cut(self) -> None:
        """Break both sides."""
        if not self.is_open:
            return
        self.is_open = False
        if self._server is not None:
            _break(self._server)
        _break(self._client)

    def _lane(self, writer: asyncio.StreamWriter) -> _Lane:
        return _Lane(self._proxy, writer, self._strike)

    def _strike(self, fault: Fault, message: Message) -> None:
        self._proxy._faults.remove(fault)
        if fault.action == "freeze":
            self._proxy._flowing.clear()
        fault.strike(message)
        if fault.action == "cut":  # last: whom it breaks may ask at once whether it has happened
            self.cut()

    async def _from_client(self, to_server: _Lane, to_client: _Lane) -> None:
        while data := await self._reader.read(65536):
            parcels, reply = self.wire.hear_client(data)
            await to_client.put(Parcel(reply))
            for parcel in parcels:
                await to_server.put(parcel)
        await to_server.end()

    async def _from_server(self, reader: asyncio.StreamReader, to_client: _Lane) -> None:
        while data := await reader.read(65536):
            for parcel in self.wire.hear_server(data):
                await to_client.put(parcel)
        await to_client.end()


class _Lane:
    """One direction of a connection: hands on what comes, in order, after half of the delay."""

    def __init__(
        self,
        proxy: WireProxy,
        writer: asyncio.StreamWriter,
        strike: Callable[[Fault, Message], None],
    ) -> None:
        self._proxy = proxy
        self._writer = writer
        self._strike = strike
        self._queue: asyncio.Queue[tuple[float, Parcel | None]] = asyncio.Queue(256)

    async def put(self, parcel: Parcel) -> None:
        if parcel.data or parcel.fault:
            await self._put(parcel)

    async def end(self) -> None:
        await self._put(None)

    async def run(self, note: Callable[[bytes], None] | None = None) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due, parcel = await self._queue.get()
            if (rest := due - clock()) > 0:
                await asyncio.sleep(rest)
            await self._proxy._flowing.wait()
            if parcel is None:
                self._writer.write_eof()
                return
            if parcel.fault:
                self._strike(*parcel.fault)
                continue
            if note:
                note(parcel.kinds)
            self._writer.write(parcel.data)
            await self._writer.drain()

    async def _put(self, parcel: Parcel | None) -> None:
        due = asyncio.get_running_loop().time() + self._proxy.delay / 2
        await self._queue.put((due, parcel))


@unseen
def kill_backends(url: str | URL, *pids: int, timeout: float = 10.0) -> list[int]:
    """End backends as an administrator would (57P01), and return their process ids.

    They are gone when it returns. It connects for itself, with the synchronous driver, and needs
    PostgreSQL 14 or newer.

    Args:
        url: A database of the server; without `pids`, all other clients of that database are ended.
        pids: The backends to end, of whichever database.
        timeout: Seconds for each to end.

    Raises:
        TimeoutError: One has not ended.
        sqlalchemy.exc.DBAPIError: The server refused, as for backends of another role.
    """
    which = "pid = ANY(:pids)" if pids else "datname = current_database()"
    ask = text(
        "SELECT pid, pg_terminate_backend(pid, :milliseconds) FROM pg_stat_activity"  # noqa: S608
        f" WHERE {which} AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    values: dict[str, Any] = {"milliseconds": int(timeout * 1000)}
    if pids:
        values["pids"] = list(pids)
    engine = create_engine(
        choose_driver(read_url(url), DRIVERS[Side.SYNC], "postgresql"),
        poolclass=NullPool,
        hide_parameters=True,
    )
    with engine.connect() as connection:
        answers = connection.execute(ask, values).all()
    if alive := [str(pid) for pid, has_ended in answers if not has_ended]:
        raise TimeoutError(f"backends {', '.join(alive)} have not ended within {timeout:g} s")
    return [pid for pid, _ in answers]


def _break(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset; at once, even while a forked child holds a copy of it."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    writer.transport.abort()
