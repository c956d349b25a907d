"""The shop as a service on a real socket: it never oversells, and shows who holds what.

What it sells is tested by its own suite, in `tests/shop`, with the pytest plugin.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scenario import until
from serving import served

CHECKOUT = Path(__file__).parent.parent
LAMP = 4  # of which there are five
PROOF = "Nothing oversold, and the books balance to the cent."


def told_by_shop(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the shop logged, and nobody else."""
    return [record.message for record in caplog.records if record.name == "examples.shop.service"]


@pytest.fixture
def shop(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """A client of the shop, which stands on a fresh database."""
    from examples.shop.service import app  # not at the top: its tables are only for these tests

    monkeypatch.setenv("DATABASE_URL", url)
    with served(app) as base, httpx.Client(base_url=base, timeout=30) as client:
        yield client


def left(shop: httpx.Client, product: int = LAMP) -> int:
    (stock,) = [shelf["stock"] for shelf in shop.get("/stock").json() if shelf["id"] == product]
    return int(stock)


def holders(shop: httpx.Client) -> list[dict[str, Any]]:
    return [scope for scope in shop.get("/stats").json()["scopes"] if scope["connected"]]


def audit(url: str) -> str:
    """Have the books looked at, by the demo's own program."""
    environment = os.environ | {"DATABASE_URL": url}
    command = [sys.executable, "-m", "examples.shop", "--audit"]
    run = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    return run.stdout + run.stderr


# -- buying ----------------------------------------------------------------------------------------


def test_fifty_buyers_at_once_never_oversell(shop: httpx.Client, url: str) -> None:
    shop.post("/deliveries", json={"product_id": LAMP, "quantity": 15})

    async def buyers() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=shop.base_url, timeout=60, limits=limits) as client:
            wanted = {"product_id": LAMP}
            crowd = [client.post("/orders", json=wanted) for _ in range(50)]
            return [answer.status_code for answer in await asyncio.gather(*crowd)]

    assert Counter(asyncio.run(buyers())) == {201: 20, 409: 30}
    assert left(shop) == 0
    assert PROOF in audit(url)


def test_who_hangs_up_at_the_till_has_bought_nothing(
    shop: httpx.Client, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = {"product_id": LAMP, "quantity": 2, "pays_after": 60}

    def at_the_till() -> bool:
        """Whether the buyer looks for the purse, with the order written: "idle in … for 0.5 s"."""
        pools = shop.get("/stats").json()["pools"]
        doing = [holder["doing"] for pool in pools for holder in pool["holders"]]
        return any(
            "idle in transaction" in said and float(said.split()[-2]) > 0.4 for said in doing
        )

    with caplog.at_level(logging.INFO, "examples.shop.service"):
        hang_up(shop, wanted, at_the_till)

        until(lambda: holders(shop), lambda now: now == [])
        assert (left(shop), shop.get("/orders").json()) == (5, [])
        assert shop.post("/orders", json={"product_id": LAMP, "quantity": 5}).status_code == 201
        assert [said.rpartition(": ")[2] for said in told_by_shop(caplog)] == ["pack 5 of 4"]
    assert PROOF in audit(url)


def hang_up(shop: httpx.Client, wanted: dict[str, int], when: Callable[[], bool]) -> None:
    """Ask for something, and leave without the answer."""
    with socket.create_connection((shop.base_url.host, shop.base_url.port or 0)) as client:
        request = shop.build_request("POST", "/orders", json=wanted)
        lines = [f"{name}: {value}" for name, value in request.headers.items()]
        head = "\r\n".join(["POST /orders HTTP/1.1", *lines, "", ""])
        client.sendall(head.encode() + request.read())
        until(when, bool)


# -- what there is to see --------------------------------------------------------------------------


def test_stats_name_the_route_and_the_line(shop: httpx.Client) -> None:
    held = threading.Thread(target=lambda: shop.post("/hold?seconds=3"))
    held.start()
    (holder,) = until(lambda: holders(shop), bool)
    pools = shop.get("/stats").json()["pools"]
    held.join()

    assert holder["kind"] == "reader"
    assert "(POST /hold)" in holder["owner"]
    assert holder["where"].endswith(" in hold")
    assert "service.py" in holder["where"]
    (readers,) = [pool for pool in pools if pool["role"] == "reader"]
    assert (readers["size"], readers["lent"], readers["waiting"]) == (3, 1, 0)
    assert holders(shop) == []
