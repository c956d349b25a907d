"""The benchmark runs, and what it counts is what is promised. Time is printed, never asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parent.parent

# The first test waits for a whole run of the benchmark, beside the other workers.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `bench/run.py --quick` measures."""
    output = tmp_path_factory.mktemp("bench") / "results.json"
    done = subprocess.run(
        [sys.executable, "bench/run.py", "--quick", "--output", str(output)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(
    ("contender", "work", "trips"),
    [
        ("engineroom", "get", 3),  # BEGIN, SELECT, COMMIT
        ("engineroom", "update", 4),
        ("engineroom reader", "get", 1),
        ("hand-tuned", "get", 3),
        ("hand-tuned", "update", 4),
    ],
)
@pytest.mark.parametrize(
    ("side", "driver"), [("asyncio", "asyncpg"), ("asyncio", "psycopg"), ("sync", "psycopg")]
)
def test_round_trips(
    results: dict[str, Any], side: str, driver: str, contender: str, work: str, trips: int
) -> None:
    assert count(results, "round_trips", side, driver, contender, work) == trips


@pytest.mark.parametrize(
    ("side", "driver", "trips"),
    [("asyncio", "asyncpg", 6), ("asyncio", "psycopg", 4), ("sync", "psycopg", 4)],
)
def test_the_recipe_pays_for_its_pings(
    results: dict[str, Any], side: str, driver: str, trips: int
) -> None:
    assert count(results, "round_trips", side, driver, "recipe", "get") == trips


def test_everything_else_is_measured(results: dict[str, Any]) -> None:
    assert {"date", "machine", "versions"} <= results.keys()
    names = ["hand-tuned", "engineroom", "engineroom reader", "recipe"]
    for measured in "python_calls", "cpu":
        for side in "asyncio", "sync":
            found = [each["contender"] for each in results[measured] if each["side"] == side]
            assert set(found) == set(names)


def count(
    results: dict[str, Any], name: str, side: str, driver: str, contender: str, work: str
) -> float:
    [found] = [
        record["per_unit"]
        for record in results[name]
        if (record["side"], record["driver"]) == (side, driver)
        and (record["contender"], record["work"]) == (contender, work)
    ]
    return float(found)
