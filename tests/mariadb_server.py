"""A MariaDB server that lives exactly as long as the process that asked for it.

It has the shape of `engineroom.testing.PostgresServer`, but not its reach: the binaries are the
system's (Debian's `mariadb-server`), and it is for this suite only.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pymysql

if TYPE_CHECKING:
    from tls import Certificates

# Runs the server below it, in a session of its own, until nobody holds the other end of its input.
KEEPER = r"""
trap '' HUP INT TERM
"$@" </dev/null >>"$FOLDER/log" 2>&1 &
echo $!
read -r _
kill -s CONT $! 2>/dev/null
kill -s KILL $! 2>/dev/null
wait
rm -rf "$FOLDER"
"""

SETTINGS = {
    "bind-address": "127.0.0.1",
    "skip-name-resolve": "1",
    "max-connections": "200",
    # The data is thrown away: nothing has to survive a crash of the machine.
    "innodb-flush-log-at-trx-commit": "0",
    "innodb-flush-method": "nosync",
    "innodb-doublewrite": "0",
    "innodb-buffer-pool-size": "32M",
    "innodb-log-file-size": "16M",
    "innodb-fast-shutdown": "2",
    "performance-schema": "0",
    "skip-log-bin": "1",
    "character-set-server": "utf8mb4",
    "default-time-zone": "+00:00",
}
STARTS_WITHIN = 60.0  # seconds; a busy machine takes a few


def has_stopped(stat: Path) -> bool:
    """Whether a thread stands still, or is no more, by the kernel's line about it."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in "TZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def find_mariadbd() -> str | None:
    """Return the server's binary, if this machine has it; Debian's is not on everybody's PATH."""
    return shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin:/usr/libexec")


class MariaServer:
    """A running throwaway server; `stop()`, or leaving `with`, ends it and removes its folder."""

    host = "127.0.0.1"

    def __init__(self, certificates: Certificates | None = None) -> None:
        """Start it.

        Args:
            certificates: For TLS, as `localhost` and by no other name; without, it speaks none.
        """
        self._certificates = certificates
        self.password = secrets.token_urlsafe(24)
        self.folder = Path(tempfile.mkdtemp(prefix="engineroom-maria-"))
        self._as_somebody: list[str] = []
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            ids = (f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups")
            self._as_somebody = ["setpriv", *ids]
        self._keeper: subprocess.Popen[bytes] | None = None
        try:
            self._install()
            self._start()
        except BaseException:
            self.stop()
            raise

    def _install(self) -> None:
        made = subprocess.run(
            [
                *self._as_somebody,
                "mariadb-install-db",
                "--no-defaults",
                f"--datadir={self.folder}/data",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                "--skip-name-resolve",
                "--innodb-flush-method=nosync",
                "--innodb-log-file-size=16M",
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env={**os.environ, "TMPDIR": str(self.folder)},
        )
        if made.returncode != 0:
            raise RuntimeError(f"mariadb-install-db failed:\n{made.stderr or made.stdout}")

    def _tls_settings(self) -> dict[str, str]:
        """Write the server's certificate and key where it may read them."""
        if self._certificates is None:
            return {}
        own = self._certificates.authority.issue_cert("localhost")
        files = {"ssl-ca": self.folder / "root.crt", "ssl-cert": self.folder / "own.crt"}
        files["ssl-key"] = self.folder / "own.key"
        self._certificates.authority.cert_pem.write_to_path(str(files["ssl-ca"]))
        own.cert_chain_pems[0].write_to_path(str(files["ssl-cert"]))
        own.private_key_pem.write_to_path(str(files["ssl-key"]))
        if self._as_somebody:
            for path in files.values():
                shutil.chown(path, "nobody")
        return {name: str(path) for name, path in files.items()}

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            self.port: int = probe.getsockname()[1]
        first = self.folder / "first.sql"
        first.write_text(
            f"ALTER USER root@localhost IDENTIFIED BY '{self.password}';\n"
            f"CREATE OR REPLACE USER root@'127.0.0.1' IDENTIFIED BY '{self.password}';\n"
            "GRANT ALL ON *.* TO root@'127.0.0.1' WITH GRANT OPTION;\n"
        )
        if self._as_somebody:
            shutil.chown(first, "nobody")
        first.chmod(0o600)
        settings = {
            "datadir": f"{self.folder}/data",
            "socket": f"{self.folder}/socket",
            "pid-file": f"{self.folder}/pid",
            "tmpdir": str(self.folder),
            "port": str(self.port),
            "init-file": str(first),
            **SETTINGS,
            **self._tls_settings(),
        }
        server = str(find_mariadbd())
        options = ["--no-defaults", *(f"--{name}={value}" for name, value in settings.items())]
        self._keeper = subprocess.Popen(
            ["/bin/sh", "-c", KEEPER, "keeper", *self._as_somebody, server, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "FOLDER": str(self.folder)},
            cwd="/",
            start_new_session=True,
        )
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline())
        end = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                self.execute("SELECT 1")
                break
            except pymysql.OperationalError as error:
                refused = error.args[0] == 2003  # it does not listen yet
                if not refused or time.monotonic() > end or not Path(f"/proc/{self.pid}").exists():
                    log = (self.folder / "log").read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"MariaDB did not start ({error}):\n{log}") from None
                time.sleep(0.02)
        first.unlink()

    def url(self, database: str = "mysql", driver: str | None = None, name: str = "mysql") -> str:
        """Return the SQLAlchemy URL of a database; its name is that of the dialect."""
        scheme = f"{name}+{driver}" if driver else name
        return f"{scheme}://root:{self.password}@{self.host}:{self.port}/{database}"

    def execute(self, sql: str, database: str | None = None) -> tuple[tuple[Any, ...], ...]:
        """Run a statement on a connection of its own, and return its rows."""
        with (
            pymysql.connect(
                host=self.host,
                port=self.port,
                user="root",
                password=self.password,
                database=database,
                autocommit=True,
                ssl_disabled=True,
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(sql)
            return tuple(cursor.fetchall())

    def create_database(self) -> str:
        """Create an empty database, and return its name."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        """End who is still in a database, and drop it."""
        for number, *_ in self.backends(name):
            self.kill_backend(number)
        self.execute(f"DROP DATABASE IF EXISTS {name}")

    def kill_backend(self, number: int) -> None:
        """End a connection; one that has just ended itself is as good."""
        try:
            self.execute(f"KILL {number}")
        except pymysql.err.MySQLError as error:
            if error.args[0] != 1094:  # "unknown thread id"
                raise

    def backends(self, database: str) -> tuple[tuple[Any, ...], ...]:
        """Return who is in a database: the connection's number, its command, its query."""
        return self.execute(
            "SELECT id, command, coalesce(info, '') FROM information_schema.processlist"
            f" WHERE db = '{database}' ORDER BY id"
        )

    def freeze(self) -> None:
        """Stop the server where it stands: it is silent, not gone."""
        os.kill(self.pid, signal.SIGSTOP)
        # One of its threads takes the signal and has the others stop: until then they may answer.
        while not all(map(has_stopped, Path(f"/proc/{self.pid}/task").glob("*/stat"))):
            time.sleep(0.001)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the server now, and remove its folder."""
        if self._keeper is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for pipe in (self._keeper.stdin, self._keeper.stdout):
            assert pipe is not None
            pipe.close()
        self._keeper.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
