"""Which combinations of a test's parameters every run takes; the others are for the long runs.

A test that is written once for both twins, three databases and two event loops has twelve cells,
and most of what can break in it breaks in a row or a column of them. So a run takes each value of
each parameter at least once, and each test pairs them in another way: between them they meet all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from zlib import crc32

import pytest

FEW = 3  # cells that are not worth choosing from


def leave_to_the_long_runs(items: Iterable[pytest.Item]) -> None:
    """Mark as `soak` what lies outside the cover of its test."""
    tests: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        test, has_cells, _ = item.nodeid.partition("[")
        if isinstance(item, pytest.Function) and has_cells and not item.get_closest_marker("soak"):
            tests[test].append(item)
    for cells in tests.values():
        if len(cells) > FEW:
            chosen = cover(cells)
            for cell in cells:
                if cell not in chosen:
                    cell.add_marker(pytest.mark.soak)


def cover(cells: list[pytest.Function]) -> list[pytest.Function]:
    """Choose few cells in which each value of each parameter is found, the same ones every time."""
    values = {cell: set(values_of(cell)) for cell in cells}
    left = set().union(*values.values())
    by_name = sorted(cells, key=lambda cell: crc32(cell.nodeid.encode()))
    chosen = []
    while left:
        best = max(by_name, key=lambda cell: len(values[cell] & left))
        chosen.append(best)
        left -= values[best]
    return chosen


def values_of(cell: pytest.Function) -> Iterator[tuple[tuple[str, int], ...]]:
    """Tell a cell's values; what one `parametrize` names together is one of them.

    The cells of a test share their values' objects, so that nothing need be compared.
    """
    params = {name: id(value) for name, value in cell.callspec.params.items()}
    for mark in cell.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = re.findall(r"\w+", names) if isinstance(names, str) else names
        yield tuple((name, params.pop(name)) for name in names if name in params)
    for name, value in params.items():  # of fixtures
        yield ((name, value),)
