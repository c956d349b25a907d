"""Measure what a unit of work costs: round trips on the wire, Python calls, client CPU.

    python bench/run.py            # everything, on a throwaway PostgreSQL 18: some minutes
    python bench/run.py --quick    # a sample for CI

Round trips and Python calls are counts, and the same on every machine. CPU is the client process's
own (`time.process_time`; the server is another process), taken in interleaved pairs: a sample of
SQLAlchemy tuned by hand and one of the contender, each in a process of its own and taking turns
every few milliseconds, and the ratio of the two. The machine may be slow, hot or busy: both halves
of a pair meet the same moment of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Self

from contenders import ASYNC, BASELINE, READER, Contender, Name, Side, Work, contender, fill
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engineroom.testing import PostgresServer, WireProxy, postgres

LATEST = Path(__file__).parent / "results" / "latest.json"
CHALLENGERS = [name for name in ASYNC if name != BASELINE]
COUNTED = {
    "round_trips": "Round trips per unit of work",
    "python_calls": "Python calls per unit of work",
}
SIDES: tuple[tuple[Side, str], ...] = (
    ("asyncio", "asyncpg"),
    ("asyncio", "psycopg"),
    ("sync", "psycopg"),
)


@dataclass(frozen=True)
class Plan:
    """How much is spent on counting, and on measuring CPU."""

    warm_up: int
    """Units before all else: connections open, statements prepared, caches filled."""
    counted: int
    """Units whose round trips and Python calls are counted."""
    rounds: int
    """Each with new processes: where a process's memory happens to lie makes a percent or two."""
    pairs: int
    """In all rounds together."""
    slices: int
    """Pieces of a sample; the two samples of a pair take turns piece by piece."""
    units: int
    """Units of work in a slice."""
    places: tuple[tuple[Side, str, int], ...]
    """Side, driver and concurrency."""


FULL = Plan(
    warm_up=100,
    counted=100,
    rounds=3,
    pairs=30,
    slices=8,
    units=50,
    places=(
        ("asyncio", "asyncpg", 1),
        ("asyncio", "asyncpg", 10),
        ("uvloop", "asyncpg", 1),
        ("uvloop", "asyncpg", 10),
        ("asyncio", "psycopg", 1),
        ("sync", "psycopg", 1),
    ),
)
QUICK = replace(
    FULL,
    warm_up=20,
    counted=20,
    rounds=1,
    pairs=2,
    slices=2,
    units=10,
    places=(("asyncio", "asyncpg", 1), ("sync", "psycopg", 1)),
)


@dataclass(frozen=True)
class Count:
    """Something counted, per unit of work."""

    side: Side
    driver: str
    work: Work
    contender: Name
    per_unit: float


@dataclass(frozen=True)
class Cost:
    """The client CPU of a `get`, and its ratio to the baseline's."""

    side: Side
    driver: str
    concurrency: int
    contender: Name
    microseconds: float
    """The median of its samples, per unit."""
    least: float
    """The least of them: what it costs where nothing disturbs."""
    ratio: float
    """The median over the pairs."""
    quartiles: tuple[float, float]
    pairs: int


# --- Counting. ------------------------------------------------------------------------------------


def units_of_work() -> Iterator[tuple[Side, str, Name, Work]]:
    """Pair each contender, on each side, with what it can do: a reader does not write."""
    works: tuple[Work, ...] = ("get", "update")
    for side, driver in SIDES:
        for name in ASYNC:
            for work in works:
                if work == "get" or name != READER:
                    yield side, driver, name, work


def round_trips(server: PostgresServer, plan: Plan) -> Iterator[Count]:
    """Count what passes between a contender and the server, once its connections are in use."""
    units = plan.counted
    with WireProxy(server.host, server.port) as proxy:
        for side, driver, name, work in units_of_work():
            with contender(name, proxy.url(server.url(driver=driver)), side) as one:
                one.do(work, plan.warm_up)
                proxy.reset()
                one.do(work, units)
                yield Count(side, driver, work, name, proxy.round_trips / units)


def python_calls(server: PostgresServer, plan: Plan) -> Iterator[Count]:
    """Count the calls of Python functions, resumed generators and coroutines included."""
    units = plan.counted
    for side, driver, name, work in units_of_work():
        with contender(name, server.url(driver=driver), side) as one:
            one.do(work, plan.warm_up)
            once, twice = calls_of(one, work, units), calls_of(one, work, 2 * units)
            # The difference: without what it costs to begin and to end.
            yield Count(side, driver, work, name, (twice - once) / units)


def calls_of(one: Contender, work: Work, units: int) -> int:
    """Return how many Python functions are called for so many units of work."""
    calls = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(note)
    try:
        one.do(work, units)
    finally:
        sys.setprofile(None)
    return calls


# --- CPU. -----------------------------------------------------------------------------------------


def cpu(server: PostgresServer, plan: Plan) -> Iterator[Cost]:
    """Compare each contender's CPU with the baseline's, in interleaved pairs."""
    for side, driver, concurrency in plan.places:
        own: dict[Name, list[float]] = {name: [] for name in ASYNC}
        ratios: dict[Name, list[float]] = {name: [] for name in ASYNC}
        label = f"{side}, {driver}, {concurrency} at once"
        start = partial(Sampler, server.url(driver=driver), side, plan, concurrency)
        for pairs in shares(plan.pairs, plan.rounds):
            with ExitStack() as stack:
                samplers = {name: stack.enter_context(start(name)) for name in ASYNC}
                for _ in track(range(pairs), label, console=Console(stderr=True)):
                    for challenger in CHALLENGERS:
                        pair = {name: samplers[name] for name in (BASELINE, challenger)}
                        costs = sample_pair(pair, plan.slices)
                        for name, cost in costs.items():
                            own[name].append(cost)
                            ratios[name].append(cost / costs[BASELINE])
        for name in ASYNC:
            lower, median, upper = statistics.quantiles(ratios[name], n=4, method="inclusive")
            yield Cost(
                side=side,
                driver=driver,
                concurrency=concurrency,
                contender=name,
                microseconds=statistics.median(own[name]),
                least=min(own[name]),
                ratio=median,
                quartiles=(lower, upper),
                pairs=plan.pairs,
            )


def shares(whole: int, parts: int) -> list[int]:
    """Divide a number of pairs among rounds."""
    return [whole // parts + (part < whole % parts) for part in range(parts)]


def sample_pair(pair: dict[Name, Sampler], slices: int) -> dict[Name, float]:
    """Take a sample of each, slice by slice in alternating order: A B, B A, A B, …"""
    taken: dict[Name, list[float]] = {name: [] for name in pair}
    for number in range(slices):
        for name in reversed(pair) if number % 2 else pair:
            taken[name].append(pair[name].slice())
    return {name: statistics.mean(costs) for name, costs in taken.items()}


class Sampler:
    """A contender in a process of its own.

    In one process they disturb each other, as nothing does in an application: there, a contender
    cost up to a tenth more beside the others than alone.
    """

    def __init__(self, url: str, side: Side, plan: Plan, concurrency: int, name: Name) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        arguments = (theirs, url, side, plan, concurrency, name)
        self._process = spawn.Process(target=serve_slices, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def slice(self) -> float:
        """Do a slice of the work; return the CPU of a unit, in microseconds."""
        self._pipe.send(None)
        cost: float = self._pipe.recv()
        return cost

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def serve_slices(
    pipe: Connection[float, None],
    url: str,
    side: Side,
    plan: Plan,
    concurrency: int,
    name: Name,
) -> None:
    """Do a slice of work whenever one is asked for, until nobody is there to ask.

    The garbage collector does not strike in the middle, where it would hit one slice by chance. It
    runs once at the end of each, over nothing but what was made since the start: who leaves cycles
    behind pays for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with contender(name, url, side) as one, suppress(EOFError):
        one.do("get", plan.warm_up, concurrency)
        gc.collect()
        gc.freeze()
        gc.disable()
        while True:
            pipe.recv()
            one.do("get", 10, concurrency)  # connections that rested are asked whether they live
            start = time.process_time_ns()
            one.do("get", plan.units, concurrency)
            gc.collect()
            pipe.send((time.process_time_ns() - start) / 1_000 / plan.units)


# --- Telling. -------------------------------------------------------------------------------------


def circumstances(server: PostgresServer) -> dict[str, Any]:
    """Describe when, where and on what this was measured."""
    packages = "engineroom", "sqlalchemy", "greenlet", "asyncpg", "psycopg", "uvloop"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            "postgresql": server.execute("SHOW server_version")[0][0],
            **{package: version(package) for package in packages},
        },
    }


def version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def tell(results: dict[str, Any]) -> Iterator[Table | str]:
    """Lay the results out for people, in Markdown."""
    machine = results["machine"]
    yield (
        f"Measured {results['date']} on {machine['system']} {machine['architecture']}, "
        f"{machine['cores']} cores; "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    )
    for name, title in COUNTED.items():
        if name in results:
            yield pivot(title, results[name], ("side", "driver", "work"), count)
    if "cpu" in results:
        where = "side", "driver", "concurrency"
        yield pivot(
            "Client CPU of a get, in µs: median (least) of the samples",
            results["cpu"],
            where,
            microseconds,
        )
        title = f"The same as a ratio to {BASELINE}: median and quartiles of the pairs"
        yield pivot(title, results["cpu"], where, ratio)


def pivot(
    title: str,
    records: list[dict[str, Any]],
    where: tuple[str, ...],
    cell: Callable[[dict[str, Any]], str],
) -> Table:
    """Lay records out with a row for each place and a column for each contender."""
    names = dict.fromkeys(record["contender"] for record in records)
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for record in records:
        row = rows.setdefault(tuple(str(record[field]) for field in where), {})
        row[record["contender"]] = cell(record)
    table = Table(*where, title=title, title_justify="left", box=box.MARKDOWN)
    for name in names:
        table.add_column(name, justify="right")
    for place, cells in rows.items():
        table.add_row(*place, *(cells.get(name, "") for name in names))
    return table


def count(record: dict[str, Any]) -> str:
    """Write a count as a cell."""
    return f"{record['per_unit']:g}"


def microseconds(record: dict[str, Any]) -> str:
    """Write a cost as a cell."""
    return f"{record['microseconds']:.0f} ({record['least']:.0f})"


def ratio(record: dict[str, Any]) -> str:
    """Write a cost as a cell, beside the baseline's."""
    if record["contender"] == BASELINE:
        return "1"
    lower, upper = record["quartiles"]
    return f"{record['ratio']:.3f} ({lower:.3f} to {upper:.3f})"


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a sample: few pairs, small, not kept")
    parser.add_argument("--pairs", type=int, help=f"of CPU samples (default {FULL.pairs})")
    parser.add_argument("--only", choices=[*COUNTED, "cpu"], help="one kind of measurement")
    parser.add_argument(
        "--output", type=Path, help=f"JSON (default, of a whole run: {LATEST.name})"
    )
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    if arguments.pairs is not None:
        if arguments.pairs < 2:
            parser.error("--pairs: a median needs two at least")
        plan = replace(plan, pairs=arguments.pairs)
    output = arguments.output or (None if arguments.quick or arguments.only else LATEST)

    with postgres(version=18) as server:
        fill(server.url(driver="psycopg"))
        measurements: dict[str, Callable[[], Iterator[Count | Cost]]] = {
            "round_trips": lambda: round_trips(server, plan),
            "python_calls": lambda: python_calls(server, plan),
            "cpu": lambda: cpu(server, plan),
        }
        results = circumstances(server)
        for name, measure in measurements.items():
            if arguments.only in (None, name):
                results[name] = [asdict(record) for record in measure()]

    console = Console(width=max(Console().width, 130), highlight=False)
    for part in tell(results):
        console.print(part)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2) + "\n")
        console.print(f"Kept in {output}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
