"""Starts the contenders' processes, each in the environment that it needs, and asks them.

An environment is made once, in `.cache/bench`, from the pins beside the contender's file, and again
when they change. Whoever cannot be installed or started is told about in the tables.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, Self

from contenders import Entry

BENCH = Path(__file__).resolve().parent
sys.path.append(str(BENCH.parent / "dev"))

from pythons import pythons  # noqa: E402  # beside us, in no package

CACHE = BENCH.parent / ".cache" / "bench"


class Unable(Exception):
    """A contender cannot be installed, started or used; the message is the reason in the tables."""


def environment(entry: Entry) -> Path:
    """Return the Python of an entry's environment, which is made if it is missing.

    Raises:
        Unable: It cannot be made.
    """
    if not entry.pins.exists():
        return Path(sys.executable)
    python = interpreter(entry.wants)
    pins = entry.pins.read_bytes() + str(python).encode() + sys.version.encode()
    stamp = hashlib.sha256(pins).hexdigest()[:16]
    folder = CACHE / entry.file
    inside, made = folder / "bin" / "python", folder / "made"
    if made.exists() and made.read_text() == stamp:
        return inside
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--python", inside, "install", "--quiet", "-r", entry.pins]
    if sys.version_info < entry.wants and python == Path(sys.executable):
        pip.append("--ignore-requires-python")  # it may work all the same, and the table says so
    for command in ([python, "-m", "venv", "--without-pip", folder], pip):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unable(f"cannot be installed: {last_line(done.stderr)}{remark(entry)}")
    made.write_text(stamp)
    return inside


@cache
def interpreter(wants: tuple[int, int]) -> Path:
    """Return this Python, or a newer one of the machine where that is too old, if there is one."""
    if sys.version_info >= wants:
        return Path(sys.executable)
    able = (path for version, path in pythons().items() if numbers(version) >= wants)
    return next(able, Path(sys.executable))


def numbers(version: str) -> tuple[int, ...]:
    """Read a version."""
    return tuple(map(int, version.split(".")))


def remark(entry: Entry) -> str:
    """Say that an entry runs on another Python, or on one that its project does not support."""
    if sys.version_info >= entry.wants:
        return ""
    wanted, have = (".".join(map(str, version[:2])) for version in (entry.wants, sys.version_info))
    if interpreter(entry.wants) == Path(sys.executable):
        return f" (it is for Python {wanted} and newer; this machine has {have})"
    return f" (on a newer Python than the others, for it supports {wanted} and newer only)"


def last_line(text: str) -> str:
    """Return the last line of a program's complaint."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason")


class Worker:
    """A contender in a process of its own.

    In one process they disturb each other, as nothing does in an application: there, a contender
    cost up to a tenth more beside the others than alone.
    """

    def __init__(self, entry: Entry, loop: str = "asyncio") -> None:
        """Start the process; `ready()` waits until it has imported what it needs."""
        self.entry = entry
        log = CACHE / "logs" / f"{entry.file}-{entry.attribute}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [environment(entry), BENCH / "worker.py", entry.file, entry.attribute, loop]
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**inherited, "PYTHONWARNINGS": "ignore"},
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ready(self) -> Self:
        """Wait until it can be asked.

        Raises:
            Unable: It cannot be started.
        """
        self._answer("cannot be started")
        return self

    def ask(self, do: str, **fields: Any) -> Any:
        """Give an order and wait for what it answers.

        Raises:
            Unable: It failed.
        """
        assert self._process.stdin
        try:
            print(json.dumps({"do": do, **fields}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Unable("its process has ended") from None
        return self._answer(f"{fields.get('unit', do)} failed")

    def _answer(self, what: str) -> Any:
        assert self._process.stdout
        answer = json.loads(self._process.stdout.readline() or '{"error": "its process has ended"}')
        if "error" in answer:
            raise Unable(f"{what}: {answer['error']}{remark(self.entry)}")
        return answer["value"]

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Delay:
    """The proxy of `delay.py`, or nothing at all where there is no time to add."""

    def __init__(self, host: str, port: int, seconds: float) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._was, self._is = f"{host}:{port}/", f"{host}:{port}/"
        if seconds:
            command = [sys.executable, BENCH / "delay.py", host, str(port), str(seconds)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert self._process.stdout
            self._is = f"127.0.0.1:{int(self._process.stdout.readline())}/"

    def url(self, url: str) -> str:
        """Return the URL that leads through it."""
        return url.replace(self._was, self._is)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.communicate("")
