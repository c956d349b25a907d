"""What the tests of TLS share: certificates, and a proxy that ends TLS before a server without."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trustme

SSL_REQUEST, GSS_REQUEST, CANCEL = 80877103, 80877104, 80877102


class Certificates:
    """An authority, what it has signed for a server and a client, and another authority."""

    def __init__(self, folder: Path) -> None:
        authority, other = trustme.CA(), trustme.CA()
        self.server = authority.issue_cert("localhost", "127.0.0.1")
        self.elsewhere = authority.issue_cert("db.example")
        client = authority.issue_cert("client@db.example", common_name="client")
        self.authority = authority
        self.root = folder / "root.crt"
        self.other_root = folder / "other.crt"
        self.cert = folder / "client.crt"
        self.key = folder / "client.key"
        authority.cert_pem.write_to_path(str(self.root))
        other.cert_pem.write_to_path(str(self.other_root))
        client.cert_chain_pems[0].write_to_path(str(self.cert))
        client.private_key_pem.write_to_path(str(self.key))
        self.key.chmod(0o600)

    def encrypt_key(self, path: Path, password: str) -> None:
        """Write the client's key so that it takes a password to read it."""
        from cryptography.hazmat.primitives import serialization as of

        key: Any = of.load_pem_private_key(self.key.read_bytes(), None)
        how = of.BestAvailableEncryption(password.encode())
        path.write_bytes(key.private_bytes(of.Encoding.PEM, of.PrivateFormat.PKCS8, how))
        path.chmod(0o600)


@dataclass
class Seen:
    """One connection, as the proxy saw it."""

    tls: bool = False
    version: str = ""
    client: str = ""
    """The common name of the client's certificate."""
    startup: dict[str, str] = field(default_factory=dict)
    """What the client told the server at the start."""


class TLSProxy:
    """Speak TLS with clients as a server of PostgreSQL would, and plainly with a server behind.

    Attributes:
        seen: Every connection that got as far as its startup packet.
    """

    def __init__(
        self,
        host: str,
        port: int,
        certificate: trustme.LeafCert,
        *,
        asks: trustme.CA | None = None,
        refuses_plain: bool = False,
    ) -> None:
        """Listen on a free port.

        Args:
            asks: Whose certificate a client has to show.
            refuses_plain: Let nobody in without TLS, as `hostssl` in `pg_hba.conf` does.
        """
        self.seen: list[Seen] = []
        self._upstream = (host, port)
        self._refuses_plain = refuses_plain
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.set_alpn_protocols(["postgresql"])
        certificate.configure_cert(self._context)
        if asks is not None:
            asks.configure_trust(self._context)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._loop = asyncio.new_event_loop()
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.port, self.direct_port = (one.getsockname()[1] for one in self._listeners)
        self._done = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._serve()])
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()
        self._loop.close()

    def url(self, original_url: str, host: str = "localhost") -> str:
        """Return the same URL through the proxy."""
        account, _, place = original_url.partition("@")
        return f"{account}@{host}:{self.port}/{place.partition('/')[2]}"

    async def _serve(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        plain, direct = self._listeners
        servers = [
            await asyncio.start_server(self._accept, sock=plain),
            await asyncio.start_server(self._accept, sock=direct, ssl=self._context),
        ]
        await self._done.wait()
        for server in servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # the client's choice
                await self._serve_one(reader, writer)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = Seen(tls=writer.get_extra_info("ssl_object") is not None)
        while True:
            head = await reader.readexactly(8)
            length, code = struct.unpack("!II", head)
            packet = head + await reader.readexactly(length - 8)
            if code == SSL_REQUEST:
                writer.write(b"S")
                await writer.start_tls(self._context)
                seen.tls = True
            elif code == GSS_REQUEST:
                writer.write(b"N")
            else:
                break
        if code != CANCEL:
            words = packet[8:].split(b"\0")
            seen.startup = {
                name.decode(): value.decode()
                for name, value in zip(words[::2], words[1::2], strict=False)
                if name
            }
            if seen.tls:
                seen.version = writer.get_extra_info("ssl_object").version()
            certificate: Any = writer.get_extra_info("peercert") or {}
            subject = dict(pair for (pair,) in certificate.get("subject", ()))
            seen.client = subject.get("commonName", "")
            self.seen.append(seen)
            if self._refuses_plain and not seen.tls:
                fields = b"SFATAL\0VFATAL\0C28000\0Mno encryption\0\0"
                writer.write(b"E" + struct.pack("!I", len(fields) + 4) + fields)
                await writer.drain()
                return
        opening = asyncio.ensure_future(asyncio.open_connection(*self._upstream))
        try:
            behind, before = await asyncio.shield(opening)
        except asyncio.CancelledError:  # interrupted, it would leave its socket open
            _, before = await opening
            before.transport.abort()
            raise
        before.write(packet)
        pumps = [
            asyncio.ensure_future(pump(reader, before)),
            asyncio.ensure_future(pump(behind, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            before.transport.abort()  # first: the next line may be cancelled
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
