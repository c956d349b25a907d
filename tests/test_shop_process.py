"""The shop as a service, in a process of its own: it ends as it is told to, and leaves no other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from scenario import until
from sqlalchemy import text

from engineroom import Database

CHECKOUT = Path(__file__).parent.parent
MAKE = ["make", f"PYTHON={CHECKOUT / '.venv' / 'bin' / 'python'}", "demo"]
SERVICE = [sys.executable, "-m", "examples.shop.service"]
LAMP = 4
OURS = {"ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}  # of the make that runs us


def start(url: str, *command: str, port: int = 0) -> subprocess.Popen[str]:
    """Start a command in a session of its own, as `make` does for a user."""
    inherited = {key: value for key, value in os.environ.items() if key not in OURS}
    return subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=inherited | {"DATABASE_URL": url, "PORT": str(port), "SERVE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def address(shop: subprocess.Popen[str]) -> str:
    """Return where it says that it listens."""
    assert shop.stdout is not None
    said = []
    for line in shop.stdout:
        said.append(line)
        if "The shop is at " in line:
            return line.split()[4]
    raise AssertionError("".join(said))


def processes(url: str) -> list[str]:
    """Return what runs with this database's URL in its environment, or names it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes()
            if f"DATABASE_URL={url}\0".encode() in variables:
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has ended, or is another user's
    return found


@pytest.mark.parametrize("ending", ["Ctrl-C", "SIGINT to make", "SIGKILL to make"])
def test_it_answers_and_leaves_no_process(ending: str, sqlite_url: str) -> None:
    with start(sqlite_url, *MAKE) as shop:
        base = address(shop)
        sold = httpx.post(f"{base}/orders", json={"product_id": LAMP}, timeout=30)
        assert sold.status_code == 201
        if ending == "Ctrl-C":
            os.killpg(shop.pid, signal.SIGINT)
        else:
            shop.send_signal(signal.SIGINT if ending.startswith("SIGINT") else signal.SIGKILL)
        said, _ = shop.communicate(timeout=30)
    assert "Traceback" not in said
    if ending != "SIGKILL to make":
        assert "The shop is closed." in said
    until(lambda: processes(sqlite_url), lambda now: now == [])
    with pytest.raises(httpx.ConnectError):
        httpx.get(base)
    with Database(sqlite_url) as database, database.reader() as db:
        assert db.scalar(text("SELECT count(*) FROM engineroom_shop_order")) == 1


def test_ctrl_c_ends_it_though_somebody_holds_a_connection(url: str) -> None:
    with start(url, *SERVICE) as shop:
        base = address(shop)
        with socket.create_connection(("127.0.0.1", int(base.rpartition(":")[2]))) as client:
            client.sendall(b"POST /hold?seconds=60 HTTP/1.1\r\nHost: test\r\n\r\n")
            until(lambda: httpx.get(f"{base}/stats", timeout=30).json()["scopes"], bool)
            shop.send_signal(signal.SIGINT)
            said, _ = shop.communicate(timeout=30)
    assert shop.returncode == 0, said
    assert "Traceback" not in said
    assert "The shop is closed." in said


def test_it_goes_on_where_it_was(sqlite_url: str) -> None:
    for number in 1, 2:
        with start(sqlite_url, *SERVICE) as shop:
            sold = httpx.post(f"{address(shop)}/orders", json={"product_id": LAMP}, timeout=30)
            assert sold.json()["id"] == number
            shop.send_signal(signal.SIGINT)
            shop.communicate(timeout=30)


def test_a_port_that_is_taken_is_told(sqlite_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with start(sqlite_url, *SERVICE, port=port) as shop:
            said, _ = shop.communicate(timeout=60)
    assert shop.returncode == 1
    assert f"The shop cannot open at port {port}" in said
    assert "make demo SERVE=1 PORT=" in said
    assert "Traceback" not in said
