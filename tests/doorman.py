"""A proxy that turns clients away, as one does whose server is not there, or is full."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from engineroom.testing import PostgresServer


class Doorman:
    """Lets nobody in for a while, then everybody: as a proxy before a server that starts.

    Attributes:
        left: How many it turns away from now on.
    """

    def __init__(self, server: PostgresServer, says: bytes | None, turns_away: int) -> None:
        self._server, self._says, self.left = server, says, turns_away
        self.turned_away = self.let_in = 0
        self._kept: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.port: int = self._listener.getsockname()[1]
        self._over = threading.Event()
        self._start(self._serve)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        for line in (self._listener, *self._kept):
            line.close()

    def url(self) -> str:
        return self._server.url().replace(f":{self._server.port}/", f":{self.port}/")

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=args))
        self._threads[-1].start()

    def _serve(self) -> None:
        while not self._over.is_set():
            with suppress(TimeoutError):
                line, _ = self._listener.accept()
                self._kept.append(line)
                if self.left > 0:
                    self.left -= 1
                    self.turned_away += 1
                    self._turn_away(line)
                else:
                    self.let_in += 1
                    behind = socket.create_connection((self._server.host, self._server.port))
                    self._kept.append(behind)
                    self._start(self._pass_on, line, behind)
                    self._start(self._pass_on, behind, line)

    def _turn_away(self, line: socket.socket) -> None:
        if self._says is None:  # it is silent
            return
        with suppress(OSError):
            if self._says:
                line.recv(4096)
                line.sendall(self._says)
            line.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        source.settimeout(0.05)
        while not self._over.is_set():
            try:
                data = source.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if not data:
                break
            sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
