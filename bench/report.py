"""Makes the tables and the pictures of the docs from the results, so that no figure is typed.

python bench/report.py FOLDER    # again, from its results.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from contenders import AGAIN, AUTOCOMMIT, BASELINE, BY_HAND, ENTRIES, PIPELINED, READER, SESSION

Results = dict[str, Any]
Cell = tuple[str, str, int, float]  # group, unit, tasks, round-trip time
GROUPS = {
    "asyncpg": "asynchronous, asyncpg",
    "psycopg": "asynchronous, psycopg",
    "sync": "synchronous, psycopg",
}
UNITS = {
    "empty": "a session without a statement",
    "get": "one `get`",
    "update": "one UPDATE",
    "insert": "ten rows inserted",
    "list": "a list of 1,000 rows",
    "request": "a request",
    "manager": "a manager opened and closed",
}
LIMITS = {"raw asyncpg", "raw psycopg"}
OURS = {SESSION, READER}
MANY = 100  # units; of fewer, the slowest says nothing of p99
AIMS = (
    (READER, "get", BASELINE, 0.0, 1.5),
    (READER, "get", "advanced-alchemy", 0.0, 1.7),
    (READER, "get", BASELINE, 0.0005, 4.0),
    (SESSION, "update", BASELINE, 0.0, 1.2),
    (SESSION, "update", BASELINE, 0.0005, 1.7),
)


def files(results: Results) -> dict[str, str]:
    """Return the files of a report: their names and contents."""
    made = {"results.md": "\n".join(page(results)) + "\n"}
    for unit in "get", "update":
        made[f"{unit}.svg"] = picture(results, unit)
    return made


# --- Tables. --------------------------------------------------------------------------------------


def page(results: Results) -> Iterator[str]:
    """Lay everything out in Markdown."""
    yield "<!-- Made by bench/report.py from results.json: change nothing here. -->"
    yield ""
    yield from circumstances(results)
    yield from section("The marks", marks(results))
    yield from section("Round trips", counts(results, "trips"))
    for group, title in GROUPS.items():
        for unit, tasks in cells(results, group):
            yield from section(
                f"{UNITS[unit]}: {title}, {at_once(tasks, group)}",
                speed(results, group, unit, tasks),
            )
    yield from section("Client CPU beside SQLAlchemy tuned by hand", pairs(results))
    yield from section("Python's instructions executed by a unit", counts(results, "instructions"))
    yield from section("A process's first query, and memory", cold(results))
    yield from section("How a pool grows", growth(results))
    yield from section("Twice the capacity", overload(results))
    yield from section("Who was measured", versions(results))


def summary(results: Results) -> Iterator[str]:
    """Say the first of it, and who is missing: for a terminal."""
    yield from circumstances(results)
    title = f"{UNITS['get']}: {GROUPS['asyncpg']}, {at_once(1, 'asyncpg')}"
    yield from section(title, speed(results, "asyncpg", "get", 1))
    yield from remarks(results)


def section(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Put a heading before what there is to say, if there is anything."""
    said = list(lines)
    if said:
        yield from (f"### {title[0].upper()}{title[1:]}", "", *said, "")


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Lay rows out; all columns but the first are numbers."""
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def circumstances(results: Results) -> Iterator[str]:
    """Say when and where."""
    machine = results["machine"]
    commit = f", engineroom at commit {found}" if (found := results.get("commit")) else ""
    yield (
        f"Measured {results['date'][:10]}{commit}, on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['kernel']}; Python {machine['python']}, PostgreSQL {machine['postgresql']} on "
        f"the same machine, whose load average was {machine['load']} before the run and "
        f"{machine['load_after']} after it."
    )
    seen: dict[float, list[float]] = {}
    for each in results["rtt"]:
        seen.setdefault(each["asked"], []).append(each["seen"] * 1000)
    waits = (f"{asked * 1000:g} ms: {median(values):.2f}" for asked, values in seen.items())
    yield ""
    yield f"What a bare client saw a `SELECT 1` take, in ms, at {', at '.join(waits)}."
    if results["kind"] != "full":
        yield ""
        yield "This is a short run, for a look: its figures are rough."
    yield ""


def marks(results: Results) -> Iterator[str]:
    """Compare what was aimed at with what was seen."""
    found = []
    rows = speeds(results)
    for ours, unit, other, trip, aim in AIMS:
        for tasks in 1, 10:
            seen = beside(rows.get(("asyncpg", unit, tasks, trip), {}), ours, other)
            if seen is not None:
                what = f"{UNITS[unit]}, {at_once(tasks, 'asyncpg')}, {trip * 1000:g} ms: "
                what += f"`{ours}` beside {other}"
                met = "yes" if seen >= aim else "**no**"
                found.append([what, f"{aim:g} ×", f"{seen:.2f} ×", met])
    for each in results.get("pairs", ()):
        aim = {SESSION: 1.03, READER: 1.0}.get(each["contender"])
        if aim and each["unit"] == "get":
            where = f"{each['group']}, {each['loop']}, {each['tasks']} at once"
            what = f"client CPU of a `get` ({where}): "
            what += f"`{each['contender']}` beside {BY_HAND}"
            met = "yes" if each["ratio"] <= aim else "**no**"
            found.append([what, f"≤ {aim:g}", f"{each['ratio']:.3f}", met])
    for each in results.get("overload", ()):
        if each["contender"] == SESSION:
            seen = each["goodput"] / each["capacity"]
            met = "yes" if seen >= 0.95 else "**no**"
            found.append(["goodput at twice the capacity", "95 %", f"{seen:.0%}", met])
    yield from table(["mark", "aim", "seen", "reached"], found)
    if results["kind"] != "full":
        return  # a short run cannot tell a few percent
    yield ""
    yield noise(results)
    first = list(behind(results, OURS))
    others = [each for each in behind(results, {SESSION}) if each not in first]
    for whom, ahead in (
        (f"`{READER}` and `{SESSION}`", first),
        (f"`{SESSION}` alone, which begins and commits as they do,", others),
    ):
        yield ""
        yield f"A peer does more units per second than {whom} by more than 5 % here:"
        yield ""
        yield from (f"- {each}" for each in ahead or ["nowhere"])


def speeds(results: Results) -> dict[Cell, dict[str, Any]]:
    """Return what was measured in each cell, by the contender's name."""
    found: dict[Cell, dict[str, Any]] = {}
    for each in results["speed"]:
        cell = each["group"], each["unit"], each["tasks"], each["rtt"]
        found.setdefault(cell, {})[each["contender"]] = each
    return found


def beside(row: dict[str, Any], one: str, other: str) -> float | None:
    """Return how many times another's units per second one does: the median of the rounds."""
    if one not in row or other not in row:
        return None
    ours, theirs = row[one]["rounds"], row[other]["rounds"]
    ratios = [rate / theirs[number] for number, rate in ours.items() if number in theirs]
    return median(ratios) if ratios else None


def noise(results: Results) -> str:
    """Say how far apart the same contender is from itself."""
    seen = [beside(row, AGAIN, BY_HAND) for row in speeds(results).values()]
    apart = sorted(max(each, 1 / each) - 1 for each in seen if each)
    deciles = quantiles(apart, n=10, method="inclusive")
    return (
        f"How much of a difference is chance: {BY_HAND} was measured twice in each of "
        f"{len(apart)} cells, in processes of its own. The two are apart by {deciles[4]:.0%} or "
        f"less in half of the cells, by {deciles[8]:.0%} or less in nine of ten, and by "
        f"{apart[-1]:.0%} at most."
    )


def behind(results: Results, ours: set[str]) -> Iterator[str]:
    """Name the cells in which a peer is faster than the best of these of ours, by 5 %."""
    no_peers = {*OURS, AGAIN, PIPELINED, *LIMITS}
    if READER not in ours:  # whose peer alone it is
        no_peers.add(AUTOCOMMIT)
    for (group, unit, tasks, trip), row in speeds(results).items():
        able = [name for name in ours if name in row]
        best = max(able, key=lambda name: beside(row, name, BASELINE) or 0.0, default="")
        seen = {name: beside(row, name, best) or 0.0 for name in row if name not in no_peers}
        ahead = [f"{name} {value:.2f} ×" for name, value in seen.items() if value > 1.05]
        if ahead:
            place = f"{UNITS[unit]} × {tasks}, {GROUPS[group]}, {trip * 1000:g} ms"
            yield f"{place}: {', '.join(ahead)}"


def counts(results: Results, what: str) -> Iterator[str]:
    """Lay a count out: a row for each contender, a column for each unit."""
    counted = [each for each in results["counts"] if what in each]
    if not counted:
        return  # Python before 3.12 tells nobody
    units = list(dict.fromkeys(each["unit"] for each in counted))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for each in counted:
        row = rows.setdefault((each["group"], each["contender"]), {})
        row[each["unit"]] = f"{each[what]:g}"
    yield from table(
        ["", *(UNITS[unit] for unit in units)],
        (
            [f"{name} ({GROUPS[group]})", *(row.get(unit, "") for unit in units)]
            for (group, name), row in rows.items()
        ),
    )


def cells(results: Results, group: str) -> list[tuple[str, int]]:
    """Return the cells of a group."""
    seen = (each for each in results["speed"] if each["group"] == group)
    return list(dict.fromkeys((each["unit"], each["tasks"]) for each in seen))


def at_once(tasks: int, group: str) -> str:
    """Say how many tasks there are."""
    kind = "thread" if group == "sync" else "task"
    return f"{tasks} {kind}{'s' if tasks > 1 else ''}"


def speed(results: Results, group: str, unit: str, tasks: int) -> Iterator[str]:
    """Lay one cell out: a row for each contender, columns for each round-trip time."""
    here = {
        trip: row
        for (*place, trip), row in sorted(speeds(results).items(), key=lambda cell: cell[0][-1])
        if place == [group, unit, tasks]
    }
    head = [""]
    for trip in here:
        at = f"{trip * 1000:g} ms"
        head += [f"{at}: units/s", "× recipe", "p50, p99 in ms", "CPU, µs"]
    rows = []
    for entry in ENTRIES:
        if entry.group == group and any(entry.name in row for row in here.values()):
            found = (speed_cell(row, entry.name) for row in here.values())
            rows.append([entry.name, *(each for cell in found for each in cell)])
    yield from table(head, rows)


def speed_cell(row: dict[str, Any], name: str) -> list[str]:
    """Write one contender's figures."""
    if name not in row:
        return [""] * 4
    each, ratio = row[name], beside(row, name, BASELINE)
    slowest = f"{each['p99'] * 1e3:.2f}" if each["units"] >= MANY else "–"
    return [
        f"{each['per_second']:,.0f}",
        "–" if ratio is None else f"{ratio:.2f}",
        f"{each['p50'] * 1e3:.2f}, {slowest}",
        f"{each['cpu'] * 1e6:,.0f}",
    ]


def pairs(results: Results) -> Iterator[str]:
    """Lay the pairs out."""
    if not results["pairs"]:
        return
    yield f"Ratios to {BY_HAND}, median and quartiles of {results['pairs'][0]['pairs']} pairs."
    yield ""
    yield from table(
        ["", "unit", "event loop", "at once", "CPU, µs", "by hand, µs", "ratio", "quartiles"],
        (
            [
                f"{each['contender']} ({each['group']})",
                each["unit"],
                each["loop"] if each["group"] != "sync" else "",
                str(each["tasks"]),
                f"{each['cpu'] * 1e6:.0f}",
                f"{each['by_hand'] * 1e6:.0f}",
                f"{each['ratio']:.3f}",
                "{:.3f} to {:.3f}".format(*each["quartiles"]),
            ]
            for each in results["pairs"]
        ),
    )


def cold(results: Results) -> Iterator[str]:
    """Lay out what a process pays once."""
    kb = 1024
    yield from table(
        ["", "start of a process to its first row, s", "KiB an idle connection", "KiB a manager"],
        (
            [
                f"{each['contender']} ({GROUPS[each['group']]})",
                f"{each['first']:.2f}",
                f"{each['connection'] / kb:.0f}",
                f"{each['manager'] / kb:.1f}" if "manager" in each else "one a process",
            ]
            for each in results["cold"]
        ),
    )


def growth(results: Results) -> Iterator[str]:
    """Lay the bursts out."""
    yield from table(
        ["50 callers at once, a unit of", "pool", "connections opened", "all served after, ms"],
        (
            [
                f"{each['lasts'] * 1000:g} ms",
                each["contender"],
                f"{each['connections']:g}",
                f"{each['seconds'] * 1000:.0f}",
            ]
            for each in sorted(results["growth"], key=lambda each: each["lasts"])
        ),
    )


def overload(results: Results) -> Iterator[str]:
    """Lay the overload out."""
    for each in results["overload"][:1]:
        yield (
            f"Callers come for {each['seconds']:g} s, twice as many as can be served; each gives up"
            f" after {each['deadline']:g} s (`pool_timeout`)."
        )
        yield ""
    yield from table(
        ["", "capacity, units/s", "served, units/s", "of the capacity", "refused", "longest, s"],
        (
            [
                each["contender"],
                f"{each['capacity']:.0f}",
                f"{each['goodput']:.0f}",
                f"{each['goodput'] / each['capacity']:.0%}",
                f"{each['refused']:,}",
                f"{each['slowest']:.2f}",
            ]
            for each in results["overload"]
        ),
    )


def versions(results: Results) -> Iterator[str]:
    """Say what was installed for whom, and who could not be measured."""
    yield from table(
        ["", "in its environment"],
        (
            [file, ", ".join(f"{name} {number}" for name, number in found.items())]
            for file, found in results["versions"].items()
        ),
    )
    yield ""
    yield from remarks(results)


def remarks(results: Results) -> Iterator[str]:
    """Say who could not be measured, and why."""
    for each in results["remarks"]:
        what = "" if each["unit"] in ("", "python") else f" ({each['unit']})"
        yield f"- {each['contender']}, {GROUPS[each['group']]}{what}: {each['remark']}"


# --- Pictures. ------------------------------------------------------------------------------------

BAR, GAP, LEFT, WIDTH = 14, 6, 190, 720
COLORS = {"ours": "#1a7f5a", "peer": "#8a93a3", "limit": "#c9ced6"}


def picture(results: Results, unit: str) -> str:
    """Draw a unit's speed beside the recipe's: bars, one panel for each round-trip time.

    On a ground of its own: it is to be read on a light page and on a dark one.
    """
    parts: list[str] = []
    y = 44
    for (*place, trip), row in sorted(speeds(results).items(), key=lambda cell: cell[0][-1]):
        if place != ["asyncpg", unit, 10]:
            continue
        ratios = {name: beside(row, name, BASELINE) or 0.0 for name in row if name != AGAIN}
        longest = max(ratio for name, ratio in ratios.items() if name not in LIMITS)
        parts.append(text(16, y + 4, f"{trip * 1000:g} ms of round-trip time", weight=600))
        y += 14
        for name, ratio in sorted(ratios.items(), key=lambda item: -item[1]):
            parts += bar(name, ratio, y, longest)
            y += BAR + GAP
        y += 24
    title = f"{UNITS[unit]}, 10 tasks: units per second, × the recipe".replace("`", "")
    title = title[0].upper() + title[1:]
    parts.insert(0, text(16, 24, title, size=14, weight=600))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img"'
        f' aria-label="{escape(title)}" font-family="system-ui, sans-serif">\n'
        f'<rect width="{WIDTH}" height="{y}" rx="8" fill="#ffffff" stroke="#d5d9e0"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def bar(name: str, value: float, y: int, longest: float) -> list[str]:
    """Draw one contender's bar; a limit's is cut where it would leave the picture."""
    kind = "ours" if name in OURS else "limit" if name in LIMITS else "peer"
    room = WIDTH - LEFT - 70
    width = max(1.0, room * min(1.0, value / longest))
    label = f"{value:.2f}" + (" →" if value > longest else "")
    drawn = f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"'
    return [
        text(LEFT - 8, y + BAR - 3, name, anchor="end", weight=600 if kind == "ours" else 400),
        f'{drawn} fill="{COLORS[kind]}"/>',
        text(LEFT + width + 6, y + BAR - 3, label),
    ]


def text(
    x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, weight: int = 400
) -> str:
    """Write words."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}"'
        f' text-anchor="{anchor}" fill="#1d2330">{escape(words)}</text>'
    )


def main() -> None:
    """Make the files again."""
    folder = Path(sys.argv[1])
    for name, content in files(json.loads((folder / "results.json").read_text())).items():
        (folder / name).write_text(content)


if __name__ == "__main__":
    main()
