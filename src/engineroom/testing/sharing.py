"""One throwaway server for all processes of a run: the first that asks has it started.

The process that the others belong to, xdist's controller, sits at a desk: it owns the server, which
ends with it, however it ends. No server is started in a run that needs none.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from pathlib import Path

from engineroom.testing.servers import PostgresServer, postgres

QUICK = Path("/dev/shm")  # noqa: S108  # a folder in memory, where there is one
ENOUGH = 1 << 30  # bytes; a database takes 8 MB, and a run has a few of them at once
END = ""


def start_server(version: int) -> PostgresServer:
    """Start a server for the databases of a run, in memory if there is room."""
    with suppress(OSError):
        if shutil.disk_usage(QUICK).free > ENOUGH:
            return postgres(version, directory=QUICK)
    return postgres(version)


class Desk:
    """Tells whoever asks the URL of the server, which it starts at the first question."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._key = secrets.token_bytes()
        self._server: PostgresServer | None = None
        self._listener = Listener(("127.0.0.1", 0), backlog=64, authkey=self._key)
        self._thread = threading.Thread(target=self._sit, name="engineroom-desk", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[int, str]:
        """The port on 127.0.0.1, and the secret that opens it."""
        return self._listener.address[1], self._key.hex()

    def close(self) -> None:
        """End the server and the desk."""
        with suppress(OSError):
            ask(self.address, END)
        self._thread.join()
        self._listener.close()
        if self._server is not None:
            self._server.stop()

    def _sit(self) -> None:
        while True:
            try:
                with self._listener.accept() as caller:
                    if caller.recv() == END:
                        caller.send((True, END))
                        return
                    caller.send(self._answer())
            except (AuthenticationError, EOFError, OSError):
                pass  # a stranger, or a caller that was killed

    def _answer(self) -> tuple[bool, str]:
        """Return the URL, or why there is none."""
        try:
            self._server = self._server or start_server(self._version)
        except Exception as error:  # noqa: BLE001  # it is the caller's
            return False, str(error)
        return True, self._server.url()


def ask(address: tuple[int, str], question: str = "url") -> str:
    """Ask the desk of another process for the server's URL.

    Raises:
        RuntimeError: no server can be started there; the message says why.
    """
    port, key = address
    with Client(("127.0.0.1", port), authkey=bytes.fromhex(key)) as desk:
        desk.send(question)
        is_good, answer = desk.recv()
    if not is_good:
        raise RuntimeError(answer)
    return str(answer)
