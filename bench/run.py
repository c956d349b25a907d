"""Compare engineroom with everyone, in one run on a throwaway PostgreSQL 18: `make bench`.

    python bench/run.py            # everything: an hour; the docs' page is made from it
    python bench/run.py --quick    # everything, a little of each: two minutes
    python bench/run.py --tiny     # what the tests run: only what needs no other environment

`measure.py` says what is measured, `contenders/` of whom, `worker.py` is the process of each, and
`report.py` makes the tables and the pictures. docs/benchmark.md says how to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import report
from contenders import BASELINE, BY_HAND, READER, SESSION
from crew import CACHE
from measure import Bench, Plan, fill
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engineroom.testing import postgres

CHECKOUT = Path(__file__).resolve().parent.parent
DOCS = CHECKOUT / "docs" / "_benchmark"

FULL = Plan(
    rounds=10,
    turns=2,
    seconds=0.05,
    warm={"asyncpg": 2, "psycopg": 6, "sync": 6},  # psycopg prepares a statement at its sixth use
    trips=(0.0, 0.0005, 0.005),
    cells=(
        ("get", 1),
        ("get", 10),
        ("get", 100),
        ("update", 1),
        ("update", 10),
        ("insert", 10),
        ("list", 10),
        ("request", 10),
    ),
    pairs=30,
    pair_rounds=30,
    slices=24,
    places=(
        ("asyncpg", "asyncio", "get", 1),
        ("asyncpg", "asyncio", "get", 10),
        ("asyncpg", "uvloop", "get", 10),
        ("psycopg", "asyncio", "get", 1),
        ("sync", "asyncio", "get", 1),
    ),
    bursts=5,
    overload=60,
)
QUICK = Plan(
    rounds=1,
    turns=1,
    seconds=0.03,
    warm={"asyncpg": 2, "psycopg": 2, "sync": 2},
    trips=(0.0, 0.0005),
    cells=(("get", 1), ("get", 10), ("update", 1), ("request", 1)),
    pairs=2,
    pair_rounds=1,
    slices=4,
    places=(("asyncpg", "asyncio", "get", 1), ("sync", "asyncio", "get", 1)),
    bursts=1,
    overload=2,
)
TINY = Plan(
    rounds=1,
    turns=1,
    seconds=0.02,
    warm={"asyncpg": 1, "sync": 1},
    trips=(0.005,),
    cells=(("get", 10),),
    pairs=2,
    pair_rounds=1,
    slices=1,
    places=(("asyncpg", "asyncio", "get", 1),),
    bursts=1,
    overload=1,
    connections=10,
    managers=5,
    names=(BASELINE, BY_HAND, SESSION, READER),
    groups=("asyncpg", "sync"),
)


def circumstances(server: Any) -> dict[str, Any]:
    """Describe when and where this is measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
            "postgresql": server.execute("SHOW server_version")[0][0],
            "load": round(os.getloadavg()[0], 1),
        },
    }


def commit() -> str | None:
    """Return the commit that is measured, where it is known."""
    asked = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """Return the name of the CPU, where the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure(plan: Plan, only_pairs: bool = False) -> dict[str, Any]:
    """Run a plan, or its pairs alone, with a bar that shows how far it is."""
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with postgres(18, settings={"max_connections": 400}) as server:
        fill(server)
        results = circumstances(server)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            steps = plan.steps_of_pairs if only_pairs else plan.steps
            task = progress.add_task("", total=steps)

            def tell(where: str) -> None:
                progress.update(task, description=where, advance=1)

            bench = Bench(server, plan, tell)
            results.update(bench.compare_cpu() if only_pairs else bench.run())
            progress.update(task, description="", completed=steps)
    results["machine"]["load_after"] = round(os.getloadavg()[0], 1)
    return results


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a little of everything: two minutes")
    parser.add_argument("--tiny", action="store_true", help="a sample for the tests: seconds")
    parser.add_argument("--pairs", action="store_true", help="client CPU alone, which is printed")
    parser.add_argument("--output", type=Path, help="a folder; the docs' own for a whole run")
    arguments = parser.parse_args()
    kind = "tiny" if arguments.tiny else "quick" if arguments.quick else "full"
    plan = {"tiny": TINY, "quick": QUICK, "full": FULL}[kind]
    if arguments.pairs:
        print("\n".join(report.pairs(measure(plan, only_pairs=True))))
        return
    folder = arguments.output or (DOCS if kind == "full" else CACHE / kind)
    results = {"kind": kind, **measure(plan)}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, default=list)
    (folder / "results.json").write_text(text + "\n")
    for name, content in report.files(json.loads(text)).items():
        (folder / name).write_text(content)
    print("\n".join(report.summary(results)))
    print(f"All of it is in {folder / 'results.md'}, with pictures beside it.", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
