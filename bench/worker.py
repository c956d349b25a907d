"""The process of one contender, in an environment of its own: it does what a line of JSON asks for.

    python bench/worker.py FILE ATTRIBUTE LOOP

Orders come on standard input and answers go to standard output, each a line of JSON; `Worker` in
`crew.py` is the other end. It needs nothing but Python, so that it runs beside every contender's
own dependencies, and what it measures is this process alone.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from contenders import ROWS, Contender, Units


class Stop:
    """When a run is over: after so many units, or so many seconds."""

    def __init__(self, units: int, seconds: float) -> None:
        self.numbers = itertools.count()
        self.units = units or sys.maxsize
        self.end = time.perf_counter() + (seconds or 1e9)

    def next(self) -> int:
        """Return the key of the next unit's row, or 0 if there is none."""
        number = next(self.numbers)
        if number >= self.units or time.perf_counter() >= self.end:
            return 0
        return number % ROWS + 1


class AsyncSide:
    """Runs units that are coroutines."""

    def __init__(self, contender: Contender, loop: str) -> None:
        self.contender = contender
        factory: Any = None
        if loop == "uvloop":
            import uvloop

            factory = uvloop.new_event_loop
        self.runner = asyncio.Runner(loop_factory=factory)

    def enter(self, manager: Any) -> Units:
        return self.runner.run(_awaited(manager.__aenter__()))

    def leave(self, manager: Any) -> None:
        self.runner.run(_awaited(manager.__aexit__(None, None, None)))

    def work(self, unit: Callable[[int], Any], tasks: int, stop: Stop) -> list[float]:
        return self.runner.run(self._work(unit, tasks, stop))

    async def _work(self, unit: Callable[[int], Any], tasks: int, stop: Stop) -> list[float]:
        took: list[float] = []

        async def task() -> None:
            while key := stop.next():
                begun = time.perf_counter()
                await unit(key)
                took.append(time.perf_counter() - begun)

        if tasks == 1:
            await task()
        else:
            await asyncio.gather(*(task() for _ in range(tasks)))
        return took

    def hold(self, unit: Callable[[Any], Any], number: int) -> None:
        """Have so many units in the middle of their sessions at once."""

        async def all_of_them() -> None:
            barrier = asyncio.Barrier(number)
            await asyncio.gather(*(unit(barrier.wait) for _ in range(number)))

        self.runner.run(all_of_them())

    def crowd(self, unit: Callable[[float], Any], seconds: float, arrivals: list[float]) -> Any:
        """Have callers arrive at these moments; each does a unit that lasts so many seconds."""
        return self.runner.run(self._crowd(unit, seconds, arrivals))

    async def _crowd(self, unit: Callable[[float], Any], seconds: float, arrivals: Any) -> Any:
        served: list[float] = []
        refused: list[float] = []
        errors: Counter[str] = Counter()
        loop = asyncio.get_running_loop()

        async def caller() -> None:
            begun = loop.time()
            try:
                await unit(seconds)
            except Exception as error:  # noqa: BLE001 - each pool has one of its own for it
                errors[type(error).__name__] += 1
                refused.append(loop.time() - begun)
            else:
                served.append(loop.time() - begun)

        started = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for moment in arrivals:
                if (ahead := started + moment - loop.time()) > 0:
                    await asyncio.sleep(ahead)
                tasks.create_task(caller())
        wall = loop.time() - started
        return {"served": served, "refused": refused, "errors": errors, "wall": wall}


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


class SyncSide:
    """Runs units that are functions, in threads."""

    def __init__(self, contender: Contender, loop: str) -> None:
        self.contender = contender

    def enter(self, manager: Any) -> Units:
        units: Units = manager.__enter__()
        return units

    def leave(self, manager: Any) -> None:
        manager.__exit__(None, None, None)

    def work(self, unit: Callable[[int], Any], tasks: int, stop: Stop) -> list[float]:
        took: list[float] = []

        def task() -> None:
            while key := stop.next():
                begun = time.perf_counter()
                unit(key)
                took.append(time.perf_counter() - begun)

        _threads(task, tasks)
        return took

    def hold(self, unit: Callable[[Any], Any], number: int) -> None:
        """Have so many units in the middle of their sessions at once."""
        barrier = threading.Barrier(number)
        _threads(lambda: unit(barrier.wait), number)


def _threads(work: Callable[[], None], number: int) -> None:
    """Run a function in so many threads; alone, in this one."""
    if number == 1:
        work()
        return
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that asked
            errors.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Job:
    """The orders: each method is one, with what it is given and what it answers."""

    def __init__(self, file: str, attribute: str, loop: str) -> None:
        contender: Contender = getattr(importlib.import_module(f"contenders.{file}"), attribute)
        self.contender = contender
        self.side: Any = (AsyncSide if contender.side == "async" else SyncSide)(contender, loop)
        self.manager: Any = None
        self.unit: Callable[..., Any] | None = None

    def versions(self, packages: list[str]) -> dict[str, str]:
        """Tell which of these packages are installed here, and in which version."""
        found = {"python": ".".join(map(str, sys.version_info[:3]))}
        for package in packages:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return found

    def open(self, unit: str, url: str, pool: dict[str, Any], warm: int, tasks: int) -> bool:
        """Open a manager for a unit of work and use it so often; false if it has no such unit."""
        self.close()
        if unit == "manager":
            self.unit = self._manager(url, pool)
        else:
            make = self.contender.application if unit == "request" else self.contender.opened
            if make is None:
                return False
            manager = make(url, pool)
            units = self.side.enter(manager)
            self.manager = manager
            if unit not in units:
                self.close()
                return False
            self.unit = units[unit]
        if warm:
            self.side.work(self.unit, tasks, Stop(warm, 0))
        return True

    def run(
        self, tasks: int = 1, units: int = 0, seconds: float = 0, quiet: bool = False
    ) -> dict[str, Any]:
        """Do units of work, and tell how long each took and the CPU that this process used.

        Where it is `quiet` the garbage collector does not strike in the middle, where it would hit
        one contender by chance. It runs once at the end, over nothing but what was made since the
        start: who leaves cycles behind pays for them.
        """
        self.side.work(
            self.unit, tasks, Stop(tasks, 0)
        )  # who has rested may ask whether connections live
        if quiet:
            gc.collect()
            gc.freeze()
            gc.disable()
        begun, cpu = time.perf_counter(), time.process_time()
        took = self.side.work(self.unit, tasks, Stop(units, seconds))
        if quiet:
            gc.collect()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - begun
        gc.enable()
        return {"units": len(took), "wall": wall, "cpu": cpu, "took": [round(t, 7) for t in took]}

    def instructions(self, units: int) -> float | None:
        """Count the instructions of Python that a unit executes; None before Python 3.12.

        Unlike the CPU that they take, they are as many in each run of the same Python: of this
        thread, for what others do beside it is more the longer the counting takes.
        """
        if sys.version_info < (3, 12):
            return None
        seen, monitoring, here = 0, sys.monitoring, threading.get_ident()

        def note(code: object, offset: int) -> None:
            nonlocal seen
            seen += threading.get_ident() == here

        tool, instruction = monitoring.PROFILER_ID, monitoring.events.INSTRUCTION
        monitoring.use_tool_id(tool, "bench")
        monitoring.register_callback(tool, instruction, note)
        counts = []
        try:
            for number in units, 2 * units:
                seen = 0
                monitoring.set_events(tool, instruction)
                self.side.work(self.unit, 1, Stop(number, 0))
                monitoring.set_events(tool, 0)
                counts.append(seen)
        finally:
            monitoring.set_events(tool, 0)
            monitoring.free_tool_id(tool)
        return (counts[1] - counts[0]) / units  # without what it costs to begin and to end

    def connection_memory(self, number: int) -> float:
        """Use so many connections at once; return what each costs while it is idle, in bytes."""
        gc.collect()
        before = _resident()
        self.side.hold(self.unit, number)
        gc.collect()
        return (_resident() - before) / number

    def manager_memory(self, url: str, pool: dict[str, Any], number: int) -> float | None:
        """Open so many managers; return what each costs, in bytes; None if there can be but one."""
        if not self.contender.several:
            return None
        opened: list[Any] = []

        def more() -> None:
            manager = self.contender.opened(url, pool)
            self.side.enter(manager)
            opened.append(manager)

        more()  # what is imported and made once
        gc.collect()
        tracemalloc.start()
        for _ in range(number):
            more()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        for manager in opened:
            self.side.leave(manager)
        return grown / number

    def crowd(self, seconds: float, arrivals: list[float]) -> Any:
        """Have callers arrive at these moments, each with a unit that lasts so many seconds."""
        return self.side.crowd(self.unit, seconds, arrivals)

    def close(self) -> None:
        """Close what is open."""
        if self.manager is not None:
            manager, self.manager = self.manager, None
            self.side.leave(manager)

    def _manager(self, url: str, pool: dict[str, Any]) -> Callable[[int], Any]:
        """Return a unit of work that opens a manager and closes it."""

        async def asynchronous(key: int) -> None:
            async with self.contender.opened(url, pool):
                pass

        def synchronous(key: int) -> None:
            with self.contender.opened(url, pool):
                pass

        return asynchronous if self.contender.side == "async" else synchronous


def _resident() -> int:
    """Return the bytes that this process has in memory (Linux)."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Answer until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a contender prints is no answer

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        job = Job(*sys.argv[1:])
    except BaseException as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise
    answer(value="ready")
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer(value=getattr(job, order.pop("do"))(**order))
        except Exception as error:  # noqa: BLE001 - it is told, and stands in the table
            answer(error=f"{type(error).__name__}: {error}")
    job.close()


if __name__ == "__main__":
    main()
