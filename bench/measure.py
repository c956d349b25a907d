"""What is measured, of whom, and in which order: all of them in turns, so that they meet the same
machine; each in a process of its own, which is new in every round.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from contenders import AGAIN, BASELINE, BY_HAND, ENTRIES, READER, ROWS, SESSION, Entry, Group
from contenders.orm import Base, Item
from crew import Delay, Unable, Worker, environment, remark
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from engineroom.testing import PostgresServer, WireProxy

POOL = {"pool_size": 10, "max_overflow": 0, "pool_timeout": 30}
GROWING = {"pool_size": 5, "max_overflow": 45, "pool_timeout": 30}
HURRIED = {"pool_size": 10, "max_overflow": 0, "pool_timeout": 1}
COUNTED = ("empty", "get", "update", "insert", "list", "request")
CALLERS = 50  # of a burst
PACKAGES = ["sqlalchemy", "asyncpg", "psycopg", "fastapi", "starlette", "flask", "greenlet"]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    """Each with new processes: how Python lies in memory differs from one to the next, and costs
    or saves a tenth of the CPU.
    """
    turns: int
    """How often in a round each contender has its turn in a cell."""
    seconds: float
    """How long a turn is."""
    warm: dict[Group, int]
    """How often each connection is used before."""
    trips: tuple[float, ...]
    """Round-trip times, in seconds."""
    cells: tuple[tuple[str, int], ...]
    """Units of work, and how many tasks (or threads) do them at once."""
    pairs: int
    """Of CPU samples; in all their rounds together."""
    pair_rounds: int
    """Each in processes of its own, as those of the speed."""
    slices: int
    """Of a sample; those of a pair take turns."""
    places: tuple[tuple[Group, str, str, int], ...]
    """Where pairs are taken: group, event loop, unit, tasks."""
    bursts: int
    overload: float
    """Seconds of twice the capacity."""
    connections: int = 100
    """Over which the memory of one is taken."""
    managers: int = 50
    """The same."""
    weighed: int = 5
    """In how many rounds memory is taken."""
    names: tuple[str, ...] = ()
    """Of the contenders; without any, all of them."""
    groups: tuple[Group, ...] = ("asyncpg", "psycopg", "sync")

    def entries(self, group: Group) -> list[Entry]:
        """Return a group's contenders."""
        return [e for e in ENTRIES if e.group == group and (not self.names or e.name in self.names)]

    @property
    def steps_of_pairs(self) -> int:
        """How often `Bench.compare_cpu` says that it goes on."""
        return len(self.places) * self.pairs

    @property
    def steps(self) -> int:
        """How often `Bench.run` says that it goes on."""
        entries = sum(len(self.entries(group)) for group in self.groups)
        cells = len(self.cells) * len(self.trips) + 1
        alone = self.steps_of_pairs + 2 * (4 * self.bursts + 1)
        return entries * (self.rounds * (1 + cells) + 2) + alone


Rounds = dict[int, list[dict[str, Any]]]
"""What a contender's turns in a cell have shown, by the round."""

PAIRED = (BY_HAND, AGAIN, SESSION, READER, BASELINE)


def fill(server: PostgresServer) -> None:
    """Make the tables and the rows."""
    engine = create_engine(server.url(driver="psycopg"))
    Base.metadata.create_all(engine)
    with Session(engine) as db, db.begin():
        db.add_all(Item(id=key, name=f"item {key}", count=0) for key in range(1, ROWS + 1))
    engine.dispose()


class Bench:
    """One run: what it has seen so far, and who has dropped out."""

    def __init__(
        self, server: PostgresServer, plan: Plan, tell: Callable[[str], None] = lambda where: None
    ) -> None:
        self.server = server
        self.plan = plan
        self.tell = tell
        self.results: dict[str, Any] = defaultdict(list)
        self.versions: dict[str, dict[str, str]] = {}
        self.remarks: dict[tuple[Group, str, str], str] = {}
        self._samples: dict[tuple[Any, ...], Rounds] = defaultdict(lambda: defaultdict(list))
        self._cold: dict[tuple[Group, str], dict[str, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )

    def run(self) -> dict[str, Any]:
        """Measure everything."""
        self._prepare()
        for number in range(self.plan.rounds):
            for group in self.plan.groups:
                with self._crew(group, weigh=number < self.plan.weighed) as crew:
                    if number == 0:
                        self._count(crew)
                    self._rounds(crew, group, number)
        self._sum_up()
        self.compare_cpu()
        self._growth()
        self._overload()
        self.results["remarks"] = [
            {"group": group, "contender": name, "unit": unit, "remark": text}
            for (group, name, unit), text in self.remarks.items()
        ]
        self.results["versions"] = self.versions
        return dict(self.results)

    def compare_cpu(self) -> dict[str, Any]:
        """Measure the pairs alone."""
        for place in self.plan.places:
            self._pairs(*place)
        return dict(self.results)

    def url(self, group: Group) -> str:
        """Return the server's URL for the driver of a group."""
        return self.server.url(driver="asyncpg" if group == "asyncpg" else "psycopg")

    # --- Who takes part, and what it costs to begin. ----------------------------------------------

    def _prepare(self) -> None:
        """Make the environments, and start a process of each group before any is timed.

        What all have in common is then compiled, and read from the disk.
        """
        for group in self.plan.groups:
            for entry in self.plan.entries(group):
                self.tell(f"the environment of {entry.name}")
                try:
                    environment(entry)
                except Unable as reason:
                    self.remarks[group, entry.name, ""] = str(reason)
            Worker(self.plan.entries(group)[0]).ready().stop()

    @contextmanager
    def _crew(self, group: Group, weigh: bool) -> Iterator[list[Worker]]:
        """Start those of a group, one after another: each one's first query is measured alone."""
        crew: list[Worker] = []
        with ExitStack() as stack:
            for entry in self.plan.entries(group):
                self.tell(f"{entry.name} ({group}) starts")
                if (group, entry.name, "") in self.remarks:
                    continue
                try:
                    begun = time.perf_counter()
                    worker = stack.enter_context(Worker(entry)).ready()
                    self._open(worker, "get", self.url(group), warm=1)
                    self._cold[group, entry.name]["first"].append(time.perf_counter() - begun)
                    if weigh:
                        self._weigh(worker)
                except Unable as reason:
                    self.remarks[group, entry.name, ""] = str(reason)
                else:
                    crew.append(worker)
            yield crew

    def _weigh(self, worker: Worker) -> None:
        """Take the memory of a new process, and look what is installed for it."""
        entry, url = worker.entry, self.url(worker.entry.group)
        cold = self._cold[entry.group, entry.name]
        many = {**POOL, "pool_size": self.plan.connections}
        self._open(worker, "hold", url, pool=many)
        worker.ask("connection_memory", number=1)
        cold["connection"].append(worker.ask("connection_memory", number=self.plan.connections))
        worker.ask("close")
        if managed := worker.ask("manager_memory", url=url, pool=POOL, number=self.plan.managers):
            cold["manager"].append(managed)
        if text := remark(entry):
            self.remarks[entry.group, entry.name, "python"] = text.strip(" ()")
        self.versions[entry.file] = worker.ask("versions", packages=[*PACKAGES, entry.name])

    def _open(self, worker: Worker, unit: str, url: str, **options: Any) -> bool:
        given = {"pool": POOL, "warm": 0, "tasks": 1, **options}
        opened: bool = worker.ask("open", unit=unit, url=url, **given)
        return opened

    # --- Counting. --------------------------------------------------------------------------------

    def _count(self, crew: list[Worker]) -> None:
        """Count the round trips of each unit on the wire, and the instructions it executes."""
        units = 6
        for worker in crew:
            entry = worker.entry
            self.tell(f"{entry.name} ({entry.group}) is counted")
            for unit in COUNTED:
                with WireProxy(self.server.host, self.server.port) as proxy:
                    try:
                        if not self._open(worker, unit, proxy.url(self.url(entry.group)), warm=8):
                            continue
                        proxy.reset()
                        worker.ask("run", units=units - 1)  # and one before it begins
                        trips = proxy.round_trips / units
                        instructions = worker.ask("instructions", units=units // 3)
                        worker.ask("close")
                    except Unable as reason:
                        self.remarks[entry.group, entry.name, unit] = str(reason)
                        continue
                where = {"group": entry.group, "contender": entry.name, "unit": unit}
                counted = {**where, "trips": trips}
                if instructions is not None:
                    counted["instructions"] = round(instructions)
                self.results["counts"].append(counted)

    # --- Speed. -----------------------------------------------------------------------------------

    def _rounds(self, crew: list[Worker], group: Group, number: int) -> None:
        """Give everyone a turn in each cell, at each round-trip time."""
        for trip in self.plan.trips:
            with Delay(self.server.host, self.server.port, trip) as wire:
                self.results["rtt"].append({"asked": trip, "seen": self._seen(wire)})
                cells = [*self.plan.cells, ("manager", 1)] if not trip else self.plan.cells
                for place, (unit, tasks) in enumerate(cells):
                    able = [
                        worker
                        for worker in crew
                        if self._can(worker, unit, wire.url(self.url(group)), tasks)
                    ]
                    for turn in range(self.plan.turns):
                        shift = (number + place + turn) % max(1, len(able))
                        for worker in able[shift:] + able[:shift]:
                            self._turn(worker, number, trip, unit, tasks)
                    for worker in able:
                        self.tell(f"{unit} × {tasks} ({group}, {trip * 1000:g} ms, {number + 1})")
                        worker.ask("close")

    def _can(self, worker: Worker, unit: str, url: str, tasks: int) -> bool:
        """Open a unit for a contender; false where it has none of the kind, or fails."""
        entry = worker.entry
        try:
            warm = self.plan.warm[entry.group] * min(tasks, int(POOL["pool_size"]))
            return self._open(worker, unit, url, warm=warm, tasks=tasks)
        except Unable as reason:
            self.remarks[entry.group, entry.name, unit] = str(reason)
            return False

    def _turn(self, worker: Worker, number: int, trip: float, unit: str, tasks: int) -> None:
        entry = worker.entry
        try:
            seen = worker.ask("run", tasks=tasks, seconds=self.plan.seconds)
        except Unable as reason:
            self.remarks[entry.group, entry.name, unit] = str(reason)
        else:
            samples = self._samples[entry.group, trip, unit, tasks, entry.name]
            samples[number].append(seen)

    def _seen(self, wire: Delay) -> float:
        """Return the round-trip time that a bare client sees."""
        took = []
        with psycopg.connect(wire.url(self.server.url()), autocommit=True) as connection:
            for _ in range(20):
                begun = time.perf_counter()
                connection.execute("SELECT 1")
                took.append(time.perf_counter() - begun)
        return statistics.median(took)

    def _sum_up(self) -> None:
        """Turn what was sampled into medians and ratios."""
        for (group, trip, unit, tasks, name), rounds in self._samples.items():
            seen = [turn for turns in rounds.values() for turn in turns]
            took = sorted(second for each in seen for second in each["took"])
            self.results["speed"].append(
                {
                    "group": group,
                    "rtt": trip,
                    "unit": unit,
                    "tasks": tasks,
                    "contender": name,
                    "per_second": rate(seen),
                    "rounds": {number: rate(turns) for number, turns in rounds.items()},
                    "p50": took[len(took) // 2],
                    "p99": took[min(len(took) - 1, int(len(took) * 0.99))],
                    "cpu": sum(each["cpu"] for each in seen) / len(took),
                    "units": len(took),
                }
            )
        for (group, name), cold in self._cold.items():
            medians = {kind: statistics.median(values) for kind, values in cold.items()}
            self.results["cold"].append({"group": group, "contender": name, **medians})

    # --- CPU, in pairs. ---------------------------------------------------------------------------

    def _pairs(self, group: Group, loop: str, unit: str, tasks: int) -> None:
        """Compare CPU with SQLAlchemy tuned by hand: pairs of samples, each in alternating slices.

        The machine may be slow, hot or busy: both halves of a pair meet the same moment of it. And
        each round starts them in another order, for the system may treat the first in its own way.
        """
        theirs, servers = processors()
        own: dict[str, list[float]] = defaultdict(list)
        ratios: dict[str, list[float]] = defaultdict(list)
        entries = {entry.name: entry for entry in ENTRIES if entry.group == group}
        for number in range(self.plan.pair_rounds):
            first = number % len(PAIRED)
            with ExitStack() as stack:
                stack.enter_context(kept_on(self.server.pid, servers))
                crew = {
                    name: stack.enter_context(Worker(entries[name], loop)).ready()
                    for name in PAIRED[first:] + PAIRED[:first]
                }
                for worker in crew.values():
                    stack.enter_context(kept_on(worker.pid, theirs))
                    self._open(worker, unit, self.url(group), warm=200, tasks=tasks)
                for _ in range(share(self.plan.pairs, self.plan.pair_rounds, number)):
                    self.tell(f"CPU of {unit} × {tasks} ({group}, {loop})")
                    for challenger in PAIRED[1:]:
                        pair = {name: crew[name] for name in (BY_HAND, challenger)}
                        costs = sample_pair(pair, tasks, self.plan.slices)
                        for name, cost in costs.items():
                            own[name].append(cost)
                        ratios[challenger].append(costs[challenger] / costs[BY_HAND])
        for name, values in ratios.items():
            quartiles = statistics.quantiles(values, n=4, method="inclusive")
            self.results["pairs"].append(
                {
                    "group": group,
                    "loop": loop,
                    "unit": unit,
                    "tasks": tasks,
                    "contender": name,
                    "cpu": statistics.median(own[name]),
                    "by_hand": statistics.median(own[BY_HAND]),
                    "ratio": quartiles[1],
                    "quartiles": [quartiles[0], quartiles[2]],
                    "pairs": len(values),
                }
            )

    # --- Pools under load. ------------------------------------------------------------------------

    def _growth(self) -> None:
        """Let a burst of callers come: how many connections are opened, and how long it takes."""
        for name, worker in self._pools():
            for lasts in (0.002, 0.02, 0.1, 0.5):
                opened, walls = [], []
                for _ in range(self.plan.bursts):
                    self.tell(f"{CALLERS} callers at once, {lasts * 1000:g} ms each: {name}")
                    with WireProxy(self.server.host, self.server.port) as proxy:
                        self._open(worker, "sleep", proxy.url(self.url("asyncpg")), pool=GROWING)
                        seen = worker.ask("crowd", seconds=lasts, arrivals=[0.0] * CALLERS)
                        opened.append(proxy.connections)
                        walls.append(seen["wall"])
                        worker.ask("close")
                self.results["growth"].append(
                    {
                        "contender": name,
                        "lasts": lasts,
                        "connections": statistics.median(opened),
                        "seconds": statistics.median(walls),
                    }
                )

    def _overload(self) -> None:
        """Let twice as many callers come as can be served: how many are, and how long they wait."""
        for name, worker in self._pools():
            self.tell(f"twice the capacity: {name}")
            size, url = int(HURRIED["pool_size"]), self.url("asyncpg")
            self._open(worker, "nap", url, pool=HURRIED, warm=2 * size, tasks=size)
            best = worker.ask("run", tasks=size, seconds=max(0.5, self.plan.overload / 10))
            capacity = best["units"] / best["wall"]
            self._open(worker, "nap", url, pool=HURRIED, warm=2 * size, tasks=size)
            callers = int(2 * capacity * self.plan.overload)
            arrivals = [number / (2 * capacity) for number in range(callers)]
            seen = worker.ask("crowd", seconds=0.0, arrivals=arrivals)
            self.results["overload"].append(
                {
                    "contender": name,
                    "seconds": self.plan.overload,
                    "deadline": HURRIED["pool_timeout"],
                    "capacity": capacity,
                    "callers": callers,
                    "served": len(seen["served"]),
                    "goodput": len(seen["served"]) / seen["wall"],
                    "refused": len(seen["refused"]),
                    "errors": seen["errors"],
                    "slowest": max(seen["served"] + seen["refused"]),
                }
            )

    def _pools(self) -> Iterator[tuple[str, Worker]]:
        """Start engineroom, and SQLAlchemy with its own pool."""
        for name in (SESSION, BY_HAND):
            entry = next(e for e in ENTRIES if e.name == name and e.group == "asyncpg")
            with Worker(entry).ready() as worker:
                yield name, worker


def processors() -> tuple[list[int], list[int]]:
    """Return one processor for the clients, who take turns, and the others for the server.

    Where the system moves them around, the same program costs up to a tenth more or less from one
    process to the next. None where nobody can choose (Linux lets one), or there is but one.
    """
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (here[:1], here[1:]) if len(here) > 1 else ([], [])


@contextmanager
def kept_on(pid: int, processors: list[int]) -> Iterator[None]:
    """Have a process, and what it starts meanwhile, run on these processors alone, if any."""
    if not processors:
        yield
        return
    before = os.sched_getaffinity(pid)
    os.sched_setaffinity(pid, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(pid, before)


def rate(turns: list[dict[str, Any]]) -> float:
    """Return the units per second of several turns."""
    return sum(each["units"] for each in turns) / sum(each["wall"] for each in turns)


def share(whole: int, parts: int, number: int) -> int:
    """Return how many pairs belong to this round."""
    return whole // parts + (number < whole % parts)


def sample_pair(pair: dict[str, Worker], tasks: int, slices: int) -> dict[str, float]:
    """Take a sample of each, slice by slice in alternating order (A B, B A, …): CPU of a unit."""
    taken: dict[str, list[float]] = {name: [] for name in pair}
    for number in range(slices):
        for name in reversed(pair) if number % 2 else pair:
            seen = pair[name].ask("run", tasks=tasks, units=max(20, 5 * tasks), quiet=True)
            taken[name].append(seen["cpu"] / seen["units"])
    return {name: statistics.median(costs) for name, costs in taken.items()}
