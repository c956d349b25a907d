"""Runs a command in the checkout's own environment, and leaves nothing behind.

    python3 -B dev/bootstrap.py GROUP… -- COMMAND…

It makes `.venv`, installs the project with the dependency groups, and runs the command. Nothing but
a Python is needed. Caches and temporary files stay in the checkout (`.cache`, `.tmp`), and whatever
the command started ends with it, however it ends.

Two processes see to that. The first stays in the process group of `make`, takes its signals and
watches whether it lives. The second has a session of its own, out of reach of a kill of that group;
it runs the work, and ends all of it when the first one's end of a pipe closes. On Linux both adopt
what their descendants orphan (a server that made itself a daemon), so nothing gets out of sight.

For root on Linux what the command writes to `.tmp` stays in memory, and is gone with the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
VENV, CACHE, TEMP = ROOT / ".venv", ROOT / ".cache", ROOT / ".tmp"
PYTHON = VENV / "bin" / "python"
UNFINISHED = VENV / "unfinished"  # there while .venv is being made or changed
OLDEST = (3, 11)
LINUX = sys.platform == "linux"


class Failed(Exception):
    """A step of the set-up failed, or we were told to stop."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Waiter:
    """Sleeps until a signal, a child's end or a closed pipe, and misses none of them."""

    def __init__(self, pipe: int | None = None) -> None:
        self.pipe = pipe
        self.received = 0
        self._awake, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._awake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self.received = number

    def wait(self, seconds: float) -> bool:
        """Sleep for at most so long; true once we are told to stop."""
        watched: list[int] = [self._awake.fileno()]
        if self.pipe is not None:
            watched.append(self.pipe)
        ready, _, _ = select.select(watched, [], [], seconds)
        if self._awake.fileno() in ready:
            self._awake.recv(4096)
        return bool(self.received) or (self.pipe is not None and self.pipe in ready)


# --- processes ----------------------------------------------------------------------------------


def adopt_orphans() -> None:
    """Become the parent of what our descendants leave behind."""
    if LINUX:
        subreaper = 36  # PR_SET_CHILD_SUBREAPER
        ctypes.CDLL(None).prctl(subreaper, 1, 0, 0, 0)


def keep_in_memory(folder: Path) -> None:
    """Keep a folder's files in memory, where a database is made in a tenth of the time.

    They are mounted in a namespace of our own: only we and our descendants see them, and they end
    with the last of us, killed or not. Who may not mount anything works on the disk as before.
    """
    if not LINUX or os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None)
    apart, private = 0x20000, ctypes.c_ulong(0x44000)  # CLONE_NEWNS; MS_REC and MS_PRIVATE
    if libc.unshare(apart) == 0 and libc.mount(b"none", b"/", None, private, None) == 0:
        libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), b"mode=755")


def descendants() -> list[int]:
    """Return the processes below this one that still run; Linux only, elsewhere none."""
    if not LINUX:
        return []
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended meanwhile
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(status.parent.name))
    found, ahead = [], [os.getpid()]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def reap(keep: int = 0) -> None:
    """Collect the ended children; the one to keep is its Popen's to collect."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == keep:
                return
            os.waitpid(ended.si_pid, 0)
        except ChildProcessError:
            return


def end_descendants(keep: int = 0) -> None:
    """End everything below us: politely (a server takes SIGINT for a fast shutdown), then not."""
    for number, patience in ((signal.SIGINT, 4.0), (signal.SIGTERM, 1.0), (signal.SIGKILL, 10.0)):
        until = time.monotonic() + patience
        told: set[int] = set()
        while time.monotonic() < until:
            reap(keep)
            left = [pid for pid in descendants() if pid != keep]
            if not left:
                return
            for pid in left:
                if pid not in told:
                    told.add(pid)
                    signal_quietly(os.kill, pid, number)
            time.sleep(0.02)


def signal_quietly(how, target: int, number: int) -> None:  # type: ignore[no-untyped-def]
    """Send a signal to what may have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        how(target, number)


# --- the work, in the second process -------------------------------------------------------------


class Work:
    """Sets up `.venv` and runs commands in it, until told to stop."""

    def __init__(self, waiter: Waiter, temporary: Path) -> None:
        self.waiter = waiter
        inside = {
            "TMPDIR": temporary,
            "PIP_CACHE_DIR": CACHE / "pip",
            "XDG_CACHE_HOME": CACHE,
            "XDG_DATA_HOME": CACHE / "data",
            "XDG_STATE_HOME": CACHE / "state",
            "XDG_RUNTIME_DIR": temporary,
            "PYTHONPYCACHEPREFIX": CACHE / "bytecode",
            "PYRIGHT_PYTHON_CACHE_DIR": CACHE / "pyright",
            "MYPY_CACHE_DIR": CACHE / "mypy",
            "RUFF_CACHE_DIR": CACHE / "ruff",
            "npm_config_cache": CACHE / "npm",
            "VIRTUAL_ENV": VENV,
        }
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in FOREIGN},
            **{key: str(value) for key, value in inside.items()},
            "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def run(self, command: Sequence[str | Path], *, quiet: bool = False) -> int:
        """Run a command to its end; ours to end when we are told to stop."""
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=self.environment,
            process_group=0,
            stdout=subprocess.DEVNULL if quiet else None,
            stderr=subprocess.DEVNULL if quiet else None,
        )
        while process.poll() is None:
            if self.waiter.wait(1.0):
                # As Ctrl-C at a terminal would: the whole group, once, with time to clean up.
                signal_quietly(os.killpg, process.pid, signal.SIGINT)
                until = time.monotonic() + 5.0
                while process.poll() is None and time.monotonic() < until:
                    reap(keep=process.pid)
                    time.sleep(0.02)
                raise Failed("stopped", 130)
            reap(keep=process.pid)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def step(self, title: str, *command: str | Path) -> None:
        """Run a step of the set-up, which must succeed."""
        say(title)
        if code := self.run(command):
            raise Failed(f"{title}: failed (exit {code})", code)

    def prepare(self, groups: Sequence[str]) -> None:
        """Make `.venv` where it is missing or half made; install what a group lacks."""
        CACHE.mkdir(exist_ok=True)
        with (CACHE / "setup.lock").open("w") as lock:
            while not locked(lock.fileno()):
                if self.waiter.wait(0.2):
                    raise Failed("stopped", 130)
            stamp = VENV / "stamps"
            wanted = [f"{fingerprint()} {group}" for group in whole(groups)]
            if self.usable():
                done = stamp.read_text().splitlines() if stamp.exists() else []
                if set(wanted) <= set(done):
                    return
            else:
                done = []
                self.make_venv()
            UNFINISHED.touch()
            extras = ",".join(pyproject()["project"]["optional-dependencies"])
            command: list[str | Path] = [PYTHON, "-m", "pip", "install", "--quiet", "--no-compile"]
            command += ["--editable", f".[{extras}]"]
            command += [word for group in groups for word in ("--group", group)]
            self.step(f"installing engineroom[{extras}] with {', '.join(groups)}", *command)
            kept = [line for line in done if line.startswith(fingerprint())]
            stamp.write_text("\n".join([*kept, *wanted]) + "\n")
            UNFINISHED.unlink()

    def usable(self) -> bool:
        """Whether `.venv` is whole, stands where it was made, and has our Python, which runs."""
        if UNFINISHED.exists() or not PYTHON.exists():
            return False
        pip = VENV / "bin" / "pip"
        if not pip.exists() or f"#!{VENV}/" not in pip.read_text():
            return False
        test = f"import sys, pip; sys.exit(sys.version != {sys.version!r})"
        return self.run([PYTHON, "-c", test], quiet=True) == 0

    def make_venv(self) -> None:
        """Make an empty `.venv` with a pip that knows dependency groups."""
        if VENV.exists():
            say("removing a .venv that is half made, moved or another Python's")
            old = Path(self.environment["TMPDIR"]) / "old-venv"
            VENV.rename(old)  # at once: a .venv is never half removed
            shutil.rmtree(old)
        VENV.mkdir()
        UNFINISHED.touch()
        pip = ("install", "--quiet", "--upgrade", "pip>=25.1")
        if self.run([sys.executable, "-c", "import ensurepip"], quiet=True) == 0:
            self.step("making .venv", sys.executable, "-m", "venv", VENV)
            self.step("upgrading its pip", PYTHON, "-m", "pip", *pip)
        elif self.run([sys.executable, "-m", "pip", "--version"], quiet=True) == 0:
            self.step("making .venv", sys.executable, "-m", "venv", "--without-pip", VENV)
            self.step("installing its pip", sys.executable, "-m", "pip", "--python", PYTHON, *pip)
        else:
            raise Failed(
                f"{sys.executable} has neither ensurepip nor pip, so no packages can be installed. "
                "On Debian and Ubuntu: apt install python3-venv."
            )


# What would lead elsewhere, or have each process compile anew what it imports.
FOREIGN = {
    *("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONDONTWRITEBYTECODE"),
    *("PIP_USER", "PIP_TARGET", "PIP_PREFIX"),
}


def pyproject() -> dict:  # type: ignore[type-arg]
    """Read pyproject.toml."""
    import tomllib  # not at the top: an old Python must get as far as our message

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def whole(groups: Sequence[str]) -> list[str]:
    """Return the groups with those that they include."""
    known, found = pyproject()["dependency-groups"], list(groups)
    for group in found:  # it grows meanwhile
        found += [each["include-group"] for each in known[group] if isinstance(each, dict)]
    return found


def fingerprint() -> str:
    """Return a hash of what an installation depends on: the project's file and where it stands."""
    content = (ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode() + sys.version.encode()
    return hashlib.sha256(content).hexdigest()[:16]


def locked(file: int) -> bool:
    """Try to take the lock of the set-up: two runs at once make one `.venv`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def say(text: str) -> None:
    """Tell what is going on, on standard error: the output is the command's."""
    print(f"· {text}", file=sys.stderr, flush=True)


def leftovers() -> Iterator[str]:
    """Name what still runs a moment after the command ended."""
    until = time.monotonic() + 3.0
    while descendants() and time.monotonic() < until:
        reap()
        time.sleep(0.02)
    for pid in descendants():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        yield f"{pid} {b' '.join(words).decode(errors='replace').strip()}"


def work(pipe: int, temporary: Path, groups: Sequence[str], command: Sequence[str]) -> int:
    """Be the second process."""
    os.setsid()
    adopt_orphans()
    job = Work(Waiter(pipe), temporary)
    code = 1
    try:
        job.prepare(groups)
        keep_in_memory(temporary)
        code = job.run([VENV / "bin" / command[0], *command[1:]])
        if left := list(leftovers()):
            say("the command ended but left running: " + "; ".join(left))
            code = code or 1
    except Failed as failure:
        say(str(failure))
        code = failure.code
    finally:
        end_descendants()
        shutil.rmtree(temporary, ignore_errors=True)
    return code


# --- the first process ----------------------------------------------------------------------------


def sweep() -> None:
    """Remove the temporary folders of runs that were killed with all their processes."""
    for folder in TEMP.iterdir():
        try:
            os.kill(int(folder.name), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            pass  # another user's run


def catches_interrupt(pid: int) -> bool:
    """Whether a process has a handler for SIGINT; outside Linux nobody knows, so no."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGINT - 1) & 1)


def main(words: list[str]) -> int:
    """Start the work in a process of its own, pass on that we are to stop, and wait for it."""
    if sys.version_info < OLDEST:
        wanted, found = ".".join(map(str, OLDEST)), sys.version.split()[0]
        print(f"engineroom needs Python {wanted} or newer; {sys.executable} is {found}.")
        print("Name another one: make PYTHON=/path/to/python3 …")
        return 1
    split = words.index("--")
    groups, command = words[:split], words[split + 1 :]
    parent = os.getppid()
    handles = catches_interrupt(parent)
    adopt_orphans()
    TEMP.mkdir(exist_ok=True)
    sweep()
    temporary = TEMP / str(os.getpid())
    temporary.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(writing)
        code = 1
        try:
            code = work(reading, temporary, groups, command)
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(reading)
    waiter = Waiter()
    told = False
    while True:
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            break
        stop = waiter.wait(0.25) or os.getppid() != parent
        # A make that got SIGINT alone takes its handler away, passes nothing on, and waits for us.
        stop = stop or (handles and not catches_interrupt(parent))
        if stop and not told:
            told = True
            os.close(writing)  # the second process reads its end: stop
        elif told:
            time.sleep(0.02)
    end_descendants()  # there are some only if the second process was killed
    shutil.rmtree(temporary, ignore_errors=True)
    if waiter.received:
        return 128 + waiter.received
    return os.waitstatus_to_exitcode(status) & 0xFF


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
