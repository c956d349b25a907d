"""A real PgBouncer in front of a throwaway server: its own folder, port, password and console."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
import pytest

from engineroom.testing import PostgresServer

DEADLINE = 20.0  # seconds; for what takes milliseconds


def program() -> str:
    """Return where PgBouncer is; without it the test is skipped, which CI counts as a failure."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/bin")
    if found is None:
        pytest.skip("did not run: there is no PgBouncer here. `make servers`, as root, installs it")
    return found


class PgBouncer:
    """A PgBouncer that pools the connections to a throwaway server, for every database there."""

    host = "127.0.0.1"

    def __init__(
        self,
        server: PostgresServer,
        *,
        mode: str = "transaction",
        size: int = 3,
        **settings: str | int,
    ) -> None:
        """Start it; for root it runs as `nobody`, for PgBouncer refuses to be root."""
        self._program = program()
        self._password = server.password
        self._folder = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
        self._user = "nobody" if os.geteuid() == 0 else None
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            self.port: int = probe.getsockname()[1]
        everything = {
            "listen_addr": self.host,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "md5",
            "auth_file": self._folder / "users",
            "admin_users": "postgres",
            "logfile": self._folder / "log",
            "pidfile": self._folder / "pid",
            "pool_mode": mode,
            "default_pool_size": size,
            "max_client_conn": 500,
            "server_login_retry": 1,
            **settings,
        }
        lines = [f"{name} = {value}" for name, value in everything.items()]
        databases = f"* = host={server.host} port={server.port}"
        text = "\n".join(["[databases]", databases, "[pgbouncer]", *lines])
        (self._folder / "ini").write_text(f"{text}\n")
        (self._folder / "users").write_text(f'"postgres" "{server.password}"\n')
        if self._user is not None:
            for file in (self._folder, *self._folder.iterdir()):
                shutil.chown(file, self._user)
        self._start()

    def url(self, database: str = "postgres", driver: str | None = None) -> str:
        """Return the URL of a database through the pooler."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://postgres:{self._password}@{self.host}:{self.port}/{database}"

    def through(self, url: str) -> str:
        """Return a URL of the server such that it leads through the pooler."""
        head, _, tail = url.rpartition("@")
        return f"{head}@{self.host}:{self.port}/{tail.partition('/')[2]}"

    def console(self, command: str) -> list[dict[str, Any]]:
        """Give the admin console a command, and return its rows."""
        where = self.url("pgbouncer")
        with psycopg.connect(where, autocommit=True, row_factory=psycopg.rows.dict_row) as admin:
            cursor = admin.execute(command)  # type: ignore[call-overload]
            return list(cursor.fetchall()) if cursor.description else []

    def servers(self, database: str) -> list[dict[str, Any]]:
        """Return its connections to a database."""
        return [row for row in self.console("SHOW SERVERS") if row["database"] == database]

    def clients(self, url: str) -> list[dict[str, Any]]:
        """Return who is connected to it for a database, given its name or URL."""
        name = url.rpartition("/")[2]
        return [row for row in self.console("SHOW CLIENTS") if row["database"] == name]

    @property
    def said(self) -> str:
        """The end of its log."""
        return (self._folder / "log").read_text()[-4000:]

    @property
    def is_up(self) -> bool:
        """Whether it runs: 1.18 has ways to end by itself."""
        return self._process.poll() is None

    def restart(self) -> None:
        """End it at once, with all connections, and start it on the same port."""
        self._end()
        self._start()

    def stop(self) -> None:
        """End it, and remove its folder."""
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [self._program, "--quiet", self._folder / "ini"],
            user=self._user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + DEADLINE
        while True:
            try:
                socket.create_connection((self.host, self.port), 1.0).close()
            except OSError:
                log = self._folder / "log"
                said = log.read_text() if log.exists() else "it logged nothing"
                assert self._process.poll() is None, f"PgBouncer did not start: {said}"
                assert time.monotonic() < end, f"PgBouncer does not listen: {said}"
                time.sleep(0.02)
            else:
                return

    def _end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(DEADLINE)
