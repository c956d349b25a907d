"""A proxy in front of a PostgreSQL server that counts how often a client had to wait for it.

It reads the frames of the protocol and changes nothing in them. A *round trip* begins with the
client's first message while nothing is awaited, and is over when the server has answered all that
was asked, so several messages sent at once are one trip, however they are cut into packets.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

__all__ = ["WireProxy"]

_CANCEL, _SSL, _GSS = 80877102, 80877103, 80877104


class WireProxy:
    """Stand between clients and a server on loopback, count round trips, add delay, cut wires.

        with WireProxy(server.host, server.port) as proxy:
            engine = create_engine(proxy.url(server.url(driver="psycopg")))

    It refuses encryption in the server's place, since it must read what passes. The counts are
    exact for clients that wait for each answer. Of a client that pipelines, each batch sent before
    the answers to the last one had passed counts as one trip with it.

    Attributes:
        port: The proxy's port on 127.0.0.1.
        delay: Seconds that a round trip takes longer, half of it each way; may be set at any time.
    """

    def __init__(self, host: str, port: int, delay: float = 0.0) -> None:
        """Listen on a free port, for the server at this host and port."""
        self.delay = delay
        self._upstream = (host, port)
        self._wires: list[_Wire] = []
        self._statements: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._done = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="engineroom-proxy", daemon=True)
        self._thread.start()

    def url(self, original_url: str) -> str:
        """Return the same URL with the proxy's host and port in it."""
        parts = urlsplit(original_url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}").geturl()

    @property
    def round_trips(self) -> int:
        """How often clients waited for the server since the last `reset()`, logins apart."""
        return sum(self.round_trips_by_connection)

    @property
    def round_trips_by_connection(self) -> list[int]:
        """The round trips of each connection, in the order in which they were opened."""
        return [wire.trips for wire in list(self._wires)]

    @property
    def startup_round_trips(self) -> int:
        """How often clients waited while they connected and logged in, since the last `reset()`."""
        return sum(wire.startup_trips for wire in list(self._wires))

    @property
    def connections(self) -> int:
        """How many connections were opened since the last `reset()`, cancel requests apart."""
        return sum(wire.is_new for wire in list(self._wires))

    @property
    def notifications(self) -> int:
        """How many NOTIFYs were passed on to clients since the last `reset()`."""
        return sum(wire.notifications for wire in list(self._wires))

    @property
    def statements(self) -> list[str]:
        """The SQL that was executed since the last `reset()`, in order.

        A prepared statement is listed each time it is bound, not when it is parsed.
        """
        return list(self._statements)

    def reset(self) -> None:
        """Set all counts to 0 and forget the statements; connections stay open."""
        self._call(self._reset())

    def cut(self) -> None:
        """Break all live connections, on both sides and without a word (TCP reset)."""
        self._call(self._cut())

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

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the proxy's thread, where all its state is changed."""
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _main(self) -> None:
        server = await asyncio.start_server(self._accept, sock=self._listener)
        await self._done.wait()
        server.close()
        await self._cut()

    async def _reset(self) -> None:
        self._statements.clear()
        self._wires = [wire for wire in self._wires if wire.is_open]
        for wire in self._wires:
            wire.trips = wire.startup_trips = wire.notifications = 0
            wire.is_new = False

    async def _cut(self) -> None:
        for wire in self._wires:
            wire.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._relay(reader, writer)
        except* (OSError, ValueError, asyncio.CancelledError):
            # One side is gone, or does not speak the protocol, or the proxy closes. (The last is
            # not passed on: asyncio's streams in 3.11 take a cancelled handler for an error.)
            _break(writer)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*self._upstream)
        wire = _Wire(self._statements, writer, server_writer)
        self._wires.append(wire)
        to_server, to_client = _Lane(self, server_writer), _Lane(self, writer, wire.hear_server)

        async def from_client() -> None:
            while data := await reader.read(65536):
                forward, reply = wire.hear_client(data)
                await to_client.put(reply)
                await to_server.put(forward)
            await to_server.end()

        async def from_server() -> None:
            while data := await server_reader.read(65536):
                await to_client.put(data)
            await to_client.end()

        try:
            async with asyncio.TaskGroup() as tasks:
                for pump in (from_client(), from_server(), to_server.run(), to_client.run()):
                    tasks.create_task(pump)
            wire.close()
        finally:
            wire.cut()


class _Lane:
    """One direction of a connection: hands on what comes, in order, after half of the delay."""

    def __init__(
        self,
        proxy: WireProxy,
        writer: asyncio.StreamWriter,
        watch: Callable[[bytes], None] | None = None,
    ) -> None:
        self._proxy = proxy
        self._writer = writer
        self._watch = watch
        self._queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

    async def put(self, data: bytes) -> None:
        if data:
            await self._put(data)

    async def end(self) -> None:
        await self._put(b"")

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due, data = await self._queue.get()
            if (rest := due - clock()) > 0:
                await asyncio.sleep(rest)
            if not data:
                self._writer.write_eof()
                return
            if self._watch:
                self._watch(data)
            self._writer.write(data)
            await self._writer.drain()

    async def _put(self, data: bytes) -> None:
        due = asyncio.get_running_loop().time() + self._proxy.delay / 2
        await self._queue.put((due, data))


class _Wire:
    """One connection: follows the protocol on it and counts; does no I/O but ending it."""

    def __init__(self, statements: list[str], *writers: asyncio.StreamWriter) -> None:
        self.trips = 0
        self.startup_trips = 0
        self.notifications = 0
        self.is_new = False  # set by the startup packet, which a cancel request has not
        self.is_open = True
        self._statements = statements
        self._writers = writers
        self._phase = "greeting"  # then "login" and "session", or "cancel"
        self._is_waiting = False
        self._ready_due = 0  # how many ReadyForQuery the server owes
        self._parsed: dict[bytes, str] = {}
        self._client_bytes = bytearray()
        self._server_bytes = bytearray()

    def hear_client(self, data: bytes) -> tuple[bytes, bytes]:
        """Note what the client says; return what the server gets and what the proxy answers."""
        self._client_bytes += data
        if self._phase == "greeting":
            return self._hear_greeting()
        if self._phase != "cancel":
            self._hear_client_messages()
        return data, b""

    def hear_server(self, data: bytes) -> None:
        """Note what the server says, at the moment when it goes to the client."""
        if self._phase == "greeting":
            self._is_waiting = False  # our own answer to the wish for encryption
            return
        self._server_bytes += data
        for kind, _ in _messages(self._server_bytes):
            if kind == b"Z":  # ReadyForQuery
                self._phase = "session"
                self._ready_due = max(0, self._ready_due - 1)
                self._is_waiting = self._ready_due > 0
            elif kind == b"A":
                self.notifications += 1
            elif kind in b"NS":  # a notice, a setting: they may come unasked, as "A" does
                pass
            elif kind in b"RGW" or self._ready_due == 0:
                # The client's turn: it has to log in or to send COPY data, or had asked to Flush.
                self._is_waiting = False

    def close(self) -> None:
        self.is_open = False
        for writer in self._writers:
            writer.close()

    def cut(self) -> None:
        if self.is_open:
            self.is_open = False
            for writer in self._writers:
                _break(writer)

    def _hear_greeting(self) -> tuple[bytes, bytes]:
        """Hold the untyped packets that open a connection back until they are whole."""
        if len(self._client_bytes) < 8:
            return b"", b""
        length, code = struct.unpack_from("!II", self._client_bytes)
        if not 8 <= length <= 10_000:  # the server's own limit
            raise ValueError("this is no PostgreSQL startup packet")
        if len(self._client_bytes) < length:
            return b"", b""
        if code in (_SSL, _GSS):
            del self._client_bytes[:length]
            self._note_question()
            return b"", b"N"
        forward = bytes(self._client_bytes)
        del self._client_bytes[:length]
        if code == _CANCEL:
            self._phase = "cancel"
        else:
            self._phase = "login"
            self.is_new = True
            self._ready_due = 1
            self._note_question()
            self._hear_client_messages()
        return forward, b""

    def _hear_client_messages(self) -> None:
        for kind, body in _messages(self._client_bytes):
            if kind == b"X":  # Terminate: nobody answers
                continue
            self._note_question()
            if kind in b"QSF":  # Query, Sync, FunctionCall
                self._ready_due += 1
            if kind == b"Q":
                self._statements.append(body[:-1].decode(errors="replace"))
            elif kind == b"P":  # Parse: name, text, types
                name, text, _ = body.split(b"\0", 2)
                self._parsed[name] = text.decode(errors="replace")
            elif kind == b"B":  # Bind: portal, statement, values
                _, name, _ = body.split(b"\0", 2)
                self._statements.append(self._parsed.get(name, ""))

    def _note_question(self) -> None:
        if self._is_waiting:
            return
        self._is_waiting = True
        if self._phase == "session":
            self.trips += 1
        else:
            self.startup_trips += 1


def _messages(buffer: bytearray) -> Iterator[tuple[bytes, bytes]]:
    """Take the whole messages out of a buffer: each one's type and body."""
    while len(buffer) >= 5:
        end = 1 + int.from_bytes(buffer[1:5], "big")
        if len(buffer) < end:
            return
        kind, body = bytes(buffer[:1]), bytes(buffer[5:end])
        del buffer[:end]
        yield kind, body


def _break(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset; at once, even while a forked child holds a copy of it."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    writer.transport.abort()
