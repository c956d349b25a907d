"""The keeper: the process that a throwaway server belongs to, and that ends with its owner.

A small `sh` in a session of its own is the parent of everything that belongs to a server: its
folder, `initdb`, the postmaster. It takes orders from a pipe that only the owner holds. When the
pipe closes, and the kernel closes it however the owner ends, the keeper stops the server and
removes the folder. `stop()` does no more than close that pipe: there is one way to end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, cast

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
        read -r state && case "$first $state" in
        "$pid ready" | "$pid standby") ;;  # the latter lets nobody in, as hot_standby=off has it
        *) return 1 ;;
        esac
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
    initdb)                   # the argument is what the server keeps in the password's place
        echo "$argument" >"$folder/verifier" &&
            { [ -z "$user" ] || chown "$user" "$folder/verifier"; } &&
            "$@" "$binaries/initdb" -D "$folder/data" -U postgres -E UTF8 --locale=C \
                -A scram-sha-256 --pwfile="$folder/verifier" \
                --no-sync --no-instructions --wal-segsize=4 </dev/null >&2 || answer=failed
        rm -f "$folder/verifier" ;;
    start)
        "$@" "$binaries/postgres" -D "$folder/data" -p "$argument" </dev/null >&2 &
        pid=$!
        until is_ready <"$folder/data/postmaster.pid"; do
            sleep 0.02
            kill -s 0 "$pid" || { pid= answer=failed; break; }
        done 2>/dev/null
        [ "$pid" ] && answer=$pid ;;
    # (Of the children one may have ended since they were counted: the server itself says.)
    freeze) kill -s STOP "$pid" && { tell STOP; true; } || answer=failed ;;
    thaw) tell CONT; kill -s 0 "$pid" || answer=failed ;;
    shutdown) tell CONT; end INT ;;
    kill) kill -s STOP "$pid" && tell KILL; end KILL ;;
    esac
    echo "$number $answer"
done
"""

_open_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


class Keeper:
    """The owner's end of a keeper: gives it orders, and lets it end.

    Attributes:
        folder: The server's own folder, which the keeper has made.
    """

    folder: Path

    def __init__(self, directory: Path, bindir: Path, environment: Mapping[str, str]) -> None:
        """Start a keeper, which makes a folder in this directory.

        Raises:
            RuntimeError: The folder cannot be made, or root's rights cannot be given away.
        """
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._count = 0
        user, drop_rights = _without_root(bindir / "postgres", directory)
        self._process = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", _KEEPER, "keeper", str(directory), str(bindir), user, *drop_rights],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
        self._orders = cast(IO[bytes], self._process.stdin)
        self._answers = cast(IO[bytes], self._process.stdout)
        _open_keepers.add(self)
        try:
            self.folder = Path(self._answer(0, f"make a folder in {directory}"))
        except BaseException:
            self.stop()
            raise

    def order(self, verb: str, argument: str = "") -> str:
        """Have the keeper do something, and return its answer; "failed" if it could not.

        Raises:
            RuntimeError: This is not the process that started it, or it has ended.
        """
        if os.getpid() != self._owner:
            raise RuntimeError(f"the server belongs to process {self._owner}: {verb} it there")
        with self._lock:
            if self._orders.closed:
                raise RuntimeError(f"the server has been stopped: cannot {verb} it")
            self._count += 1
            with contextlib.suppress(BrokenPipeError):  # no answer will come, which says the same
                self._orders.write(f"{self._count} {verb} {argument}\n".encode())
            return self._answer(self._count, verb)

    def stop(self) -> None:
        """Have it end the server and remove the folder, and wait until it has.

        A second call, and one in a forked child, whose server it is not, do nothing.
        """
        if os.getpid() != self._owner:
            return
        self._orders.close()
        self._answers.close()
        self._process.wait()
        _open_keepers.discard(self)

    def _answer(self, number: int, what: str) -> str:
        """Return the answer to an order; answers to interrupted orders before it are passed by."""
        while line := os.fsdecode(self._answers.readline()).rstrip("\n"):
            answered, _, answer = line.partition(" ")
            if answered == str(number):
                return answer
            if not answered.isdigit():
                raise RuntimeError(f"cannot {what}: {line}")
        raise RuntimeError(f"cannot {what}: the server's keeper has ended")

    def _forget(self) -> None:
        """Let go of the server in a forked child, which must neither keep it alive nor end it."""
        self._orders.close()
        self._answers.close()
        self._process.returncode = 0  # Popen must not look for a child that is not this process's


def _forget_after_fork() -> None:
    for keeper in list(_open_keepers):
        keeper._forget()
    _open_keepers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


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
