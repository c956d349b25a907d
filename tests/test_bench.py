"""The benchmark runs, and what it counts is what is promised. Time is printed, never asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

CHECKOUT = Path(__file__).parent.parent
FILES = {"results.json", "results.md", "get.svg", "update.svg"}

GROUPS = ["asyncpg", "sync"]  # of the tiny run

KEPT = CHECKOUT / "docs" / "_benchmark"
NOBODY = "nobody has written this one"

# `bench/run.py --tiny`, with a contender that cannot be started.
RUN = f"""
import sys
from dataclasses import replace
sys.path.insert(0, "bench")
import contenders
contenders.ENTRIES += (contenders.Entry({NOBODY!r}, "sync", "nobody", "synchronous"),)
import run
run.TINY = replace(run.TINY, names=(*run.TINY.names, {NOBODY!r}))
run.main()
"""

# The first test waits for a whole run of the benchmark, beside the other workers.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `bench/run.py --tiny` has left what it measured."""
    output = tmp_path_factory.mktemp("bench")
    done = subprocess.run(
        [sys.executable, "-c", RUN, "--tiny", "--output", str(output)],
        cwd=CHECKOUT,
        # Beside other workers, a server looks far away, and `auto` would save a trip now and then.
        env=os.environ | {"DB_PIPELINE": "off"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize(
    ("contender", "unit", "trips"),
    [
        ("engineroom session()", "empty", 0),
        ("engineroom session()", "get", 3),  # BEGIN, SELECT, COMMIT
        ("engineroom session()", "update", 3),
        ("engineroom session()", "insert", 3),
        ("engineroom session()", "request", 3),
        ("engineroom reader()", "empty", 0),
        ("engineroom reader()", "get", 1),
        ("engineroom reader()", "list", 1),
        ("engineroom reader()", "request", 1),
        ("SQLAlchemy by hand", "get", 3),
        ("SQLAlchemy by hand", "update", 3),
    ],
)
def test_round_trips(results: dict[str, Any], contender: str, unit: str, trips: int) -> None:
    assert [count(results, group, contender, unit) for group in GROUPS] == [trips, trips]


@pytest.mark.parametrize(("group", "trips"), [("asyncpg", 6), ("sync", 4)])
def test_the_recipe_pays_for_its_pings(results: dict[str, Any], group: str, trips: int) -> None:
    assert count(results, group, "the recipe", "get") == trips


@pytest.mark.parametrize(
    ("contender", "most"), [("engineroom session()", 1.06), ("engineroom reader()", 1.0)]
)
@pytest.mark.parametrize("group", GROUPS)
def test_a_get_takes_no_more_instructions_than_by_hand(
    results: dict[str, Any], group: str, contender: str, most: float
) -> None:
    """CPU differs from run to run; what the interpreter executes hardly does, with the timers.

    Python tells of it from 3.12 on.
    """
    if sys.version_info >= (3, 12):
        ours, by_hand = (
            count(results, group, name, "get", "instructions")
            for name in (contender, "SQLAlchemy by hand")
        )
        assert ours <= most * by_hand
    else:
        assert not any("instructions" in each for each in results["counts"])


def test_every_byte_waits(results: dict[str, Any]) -> None:
    assert len(results["rtt"]) == len(GROUPS)  # once for each
    for each in results["rtt"]:
        assert each["seen"] >= each["asked"] == 0.005


def test_who_cannot_be_started_is_named_and_the_others_go_on(
    folder: Path, results: dict[str, Any]
) -> None:
    [remark] = results["remarks"]
    assert remark["contender"] == NOBODY
    reason = "cannot be started: ModuleNotFoundError: No module named 'contenders.nobody'"
    assert remark["remark"] == reason
    assert f"{NOBODY}, synchronous, psycopg: {reason}" in (folder / "results.md").read_text()


def test_who_cannot_be_installed_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(CHECKOUT / "bench")
    import contenders
    import crew

    pins = tmp_path / "nobody.txt"
    pins.write_text("./there-is-no-such-folder\n")
    monkeypatch.setattr(contenders.Entry, "pins", pins)
    monkeypatch.setattr(crew, "CACHE", tmp_path)
    with pytest.raises(crew.Unable, match=r"cannot be installed: .*there-is-no-such-folder"):
        crew.environment(contenders.Entry(NOBODY, "sync", "nobody", "synchronous"))


def test_everything_else_is_measured(results: dict[str, Any]) -> None:
    names = {"the recipe", "SQLAlchemy by hand", "engineroom session()", "engineroom reader()"}
    for group in GROUPS:
        for measured in "speed", "cold":
            found = {each["contender"] for each in results[measured] if each["group"] == group}
            assert found == names
    beside = names - {"SQLAlchemy by hand"} | {"SQLAlchemy by hand, again"}
    assert {each["contender"] for each in results["pairs"]} == beside
    for measured in "growth", "overload":
        found = {each["contender"] for each in results[measured]}
        assert found == {"engineroom session()", "SQLAlchemy by hand"}
    for each in results["overload"]:
        assert each["served"] + each["refused"] == each["callers"]


def test_the_pairs_can_be_measured_alone() -> None:
    done = subprocess.run(
        [sys.executable, "bench/run.py", "--tiny", "--pairs"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in "SQLAlchemy by hand, again", "engineroom session()", "engineroom reader()":
        assert f"| {name} (asyncpg) | get | asyncio | 1 |" in done.stdout


def test_the_tables_and_pictures_are_written(folder: Path, results: dict[str, Any]) -> None:
    assert {each.name for each in folder.iterdir()} == FILES
    table = (folder / "results.md").read_text()
    for measured in "speed", "cold", "growth", "overload":
        assert results[measured][0]["contender"] in table
    assert results["machine"]["cpu"] in table
    for picture in folder.glob("*.svg"):
        ET.parse(picture)


def test_the_page_of_the_docs_is_made_from_its_results(tmp_path: Path) -> None:
    """Nobody has typed a figure: what stands there is made again from the JSON beside it."""
    (tmp_path / "results.json").write_bytes((KEPT / "results.json").read_bytes())
    subprocess.run([sys.executable, "bench/report.py", str(tmp_path)], cwd=CHECKOUT, check=True)
    for name in FILES:
        assert (tmp_path / name).read_text() == (KEPT / name).read_text()


def count(
    results: dict[str, Any], group: str, contender: str, unit: str, what: str = "trips"
) -> float:
    [found] = [
        each[what]
        for each in results["counts"]
        if (each["group"], each["contender"], each["unit"]) == (group, contender, unit)
    ]
    return float(found)
