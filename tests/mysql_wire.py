"""Counts the commands that pass on the way to a MySQL server: each is one round trip."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Self

COM_QUERY = 3


class CommandCounter:
    """A proxy before a server; `commands` are the texts of queries, and the numbers of others."""

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self.commands: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            server = socket.create_connection(self._server)
            self._sockets += [client, server]
            for pump in (self._count, self._pass):
                thread = threading.Thread(target=pump, args=(client, server), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _count(self, client: socket.socket, server: socket.socket) -> None:
        """Pass on what the client says; a packet with the number 0 begins a command."""
        with client.makefile("rb") as spoken:
            while len(header := spoken.read(4)) == 4:
                payload = spoken.read(int.from_bytes(header[:3], "little"))
                if header[3] == 0:
                    is_query = payload[0] == COM_QUERY
                    text = payload[1:].decode() if is_query else f"command {payload[0]}"
                    self.commands.append(text)
                try:
                    server.sendall(header + payload)
                except OSError:
                    break
        self._shut(server)

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        """Pass on what the server says."""
        try:
            while data := server.recv(65536):
                client.sendall(data)
        except OSError:
            pass
        self._shut(client)

    def _shut(self, connection: socket.socket) -> None:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._shut(self._listener)
        self._listener.close()
        for connection in self._sockets:
            self._shut(connection)
        for thread in self._threads:
            thread.join()
        for connection in self._sockets:
            connection.close()
