"""Guarantee 4 under real servers: what was opened before they fork is shared with nobody."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from scenario import settled, until

HERE = Path(__file__).parent
CLIENTS = 8

Answer = list[Any]  # who answered, who had imported the application, its backends, the parent's


@contextmanager
def serving(url: str, log: Path, *command: str) -> Iterator[str]:
    """Start a server on a socket that it inherits, and give its address."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        port, descriptor = listener.getsockname()[1], listener.fileno()
        env = os.environ | {"DATABASE_URL": url, "PYTHONPATH": str(HERE)}
        env.pop("FORWARDED_ALLOW_IPS", None)
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *(part.format(fd=descriptor) for part in command)],
                cwd=log.parent,
                env=env,
                stdout=out,
                stderr=out,
                pass_fds=[descriptor],
            )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            finally:
                process.kill()


def ask(address: str, count: int) -> list[Answer]:
    """Send so many requests, each over a connection of its own, so that all workers get some."""

    # One client, for each loads certificates for 30 ms.
    client = httpx.Client(timeout=60, headers={"Connection": "close"})

    def one(number: int) -> Answer:
        answer = client.get(address)
        assert answer.status_code == 200, answer.text
        seen: Answer = answer.json()
        return seen

    with client, ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(one, range(count)))


def assert_nothing_is_shared(answers: list[Answer], *, forked: bool) -> set[int]:
    """Assert that no two processes met the same backend; return the processes."""
    served = defaultdict(set)
    for pid, imported_by, backends, parents in answers:
        assert (pid != imported_by) is forked
        for backend in backends:
            served[backend].add(pid)
            assert not forked or backend not in parents, (
                "a child spoke over its parent's connection"
            )
    assert {backend: pids for backend, pids in served.items() if len(pids) > 1} == {}
    return {pid for pid, *_ in answers}


WORKERS = {
    "gthread": ("preload_app:wsgi", "gthread", "--threads", "4"),
    "uvicorn": ("preload_app:app", "uvicorn.workers.UvicornWorker"),
}


@pytest.mark.parametrize(
    "count", [100, pytest.param(2_000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
@pytest.mark.parametrize("kind", WORKERS)
def test_gunicorn_that_preloads(postgres_url: str, tmp_path: Path, kind: str, count: int) -> None:
    application, worker, *options = WORKERS[kind]
    log = tmp_path / "server.log"
    command = ["gunicorn", application, "--preload", "--workers", "4", "-k", worker, *options]
    with serving(postgres_url, log, *command, "--bind", "fd://{fd}") as address:
        answers = ask(address, count)
    workers = assert_nothing_is_shared(answers, forked=True)
    print(f"{count} requests, {len(workers)} workers")
    assert len(workers) > 1
    for trouble in ("Traceback", "Warning", "[ERROR]"):
        assert trouble not in log.read_text(), log.read_text()
    assert settled(postgres_url) == []


def test_uvicorn_with_workers(postgres_url: str, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    command = ["uvicorn", "preload_app:app", "--workers", "2", "--fd", "{fd}"]
    with serving(postgres_url, log, *command) as address:
        answers = ask(address, 60)
        workers = assert_nothing_is_shared(answers, forked=False)
    print(f"{len(workers)} workers")
    for trouble in ("Traceback", "Warning", "ERROR"):
        assert trouble not in log.read_text(), log.read_text()
    until(lambda: settled(postgres_url), lambda seen: seen == [])


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(postgres_url: str, method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import preload_app; preload_app.main({method!r}, 30)"],
        cwd=HERE,
        env=os.environ | {"DATABASE_URL": postgres_url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    answers = httpx.Response(200, text=done.stdout).json()
    assert len(answers) == 30
    assert_nothing_is_shared(answers, forked=method != "spawn")
    assert settled(postgres_url) == []
