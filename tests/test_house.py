"""What the house promises of itself: few names, cheap to import, twins that stay alike."""

from __future__ import annotations

import inspect
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from scenario import HIDE

import engineroom
from engineroom.database import Database
from engineroom.manager import DatabaseSessionManager

BESIDES = "import sqlalchemy.ext.asyncio, pydantic_settings"
FOREIGN = {
    *("aiosqlite", "asyncpg", "psycopg", "psycopg2", "sqlite3"),
    *("alembic", "celery", "fastapi", "flask", "litestar", "starlette", "sqlmodel", "pytest"),
}
# Modules that importing engineroom adds to SQLAlchemy's and pydantic-settings': its own, which are
# one for each floor and its package, and what they need of the standard library.
OWN_MODULES = 32
OTHER_MODULES = 5


def modules_after(statement: str) -> set[str]:
    """Return what is imported in a new process after a statement."""
    code = f"{statement}\nimport json, sys; print(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


def test_sqlalchemy_is_of_the_column_that_is_tested() -> None:
    """Of the newest, but where nox says otherwise."""
    assert f"{version('sqlalchemy')}.".startswith(os.environ.get("SQLALCHEMY", "2.1") + ".")


def test_no_expression_is_one_that_python_before_3_11_5_gets_wrong() -> None:
    """`(…)*+` matches less there than it should (gh-106052): Debian 12 has 3.11.2."""
    sources = Path(engineroom.__file__).parent.rglob("*.py")
    possessive = re.compile(r"(?<!\\)\)[*?+]\+")
    found = [
        f"{source.name}:{number}: {line.strip()}"
        for source in sources
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if possessive.search(line) and not line.lstrip().startswith("#")
    ]
    assert found == []


def test_exported_names_are_few_sorted_and_there() -> None:
    names = engineroom.__all__
    assert names == sorted(names)
    assert len(names) == len(set(names)) < 25
    assert [name for name in names if not hasattr(engineroom, name)] == []


def test_no_name_is_public_by_accident() -> None:
    loose = {
        name
        for name, value in vars(engineroom).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert loose == set(engineroom.__all__)


def test_importing_brings_no_driver_and_no_framework() -> None:
    everything = modules_after(
        "import engineroom, engineroom.backends.postgresql, engineroom.backends.sqlite"
    )
    assert {name.partition(".")[0] for name in everything} & FOREIGN == set()


def test_importing_brings_little_beside_its_dependencies() -> None:
    more = modules_after(f"{BESIDES}; import engineroom") - modules_after(BESIDES)
    own = {name for name in more if name.partition(".")[0] == "engineroom"}
    assert 1 < len(own) <= OWN_MODULES
    assert len(more - own) <= OTHER_MODULES, sorted(more - own)
    assert "engineroom.testing" not in own


@pytest.mark.parametrize("extra", ["alembic", "celery", "fastapi", "flask", "litestar"])
def test_who_imports_an_integration_without_its_framework_is_told_the_extra(extra: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{HIDE}import engineroom.{extra}", extra],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: engineroom.{extra} is imported, but {extra} is not installed: pip "
        f'install "engineroom[{extra}]".'
    )


def seconds(statement: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


@pytest.mark.parametrize("pairs", [1, pytest.param(5, marks=pytest.mark.soak)])
def test_import_cost_is_reported(
    pairs: int, record_property: Callable[[str, object], None]
) -> None:
    """Interleaved pairs, so that a busy machine slows both; asserted are the counts above."""
    seconds(f"{BESIDES}; import engineroom")  # the first import writes bytecode
    ratios = [seconds(f"{BESIDES}; import engineroom") / seconds(BESIDES) for _ in range(pairs)]
    ratio = round(statistics.median(ratios), 3)
    record_property("import_cost_ratio", ratio)
    print(f"importing engineroom costs {ratio} × its dependencies (promised: 1.2)")


# --- the twins ----------------------------------------------------------------------------------

# What one twin has and the other has not, or has differently, and why.
DIFFERENCES = {
    "Base": "contract 2: code in the world says `Database.Base`",
    "get_base": "contract 2",
    "get_engine": "contract 2",
    "get_session": "contract 2: a session that its caller closes",
    "sync": "the asynchronous side carries its twin",
    "sync_engine": "contract 1: short for `.sync.engine`",
    "sync_session": "contract 1: short for `.sync.session()`",
    "__init__": "contract 2: Database() opens; contract 1: DatabaseSessionManager() does not yet",
}
PAIRS = {"__aenter__": "__enter__", "__aexit__": "__exit__"}
DOORS = {"__init__", "__enter__", "__exit__"}


def verbs(door: type) -> dict[str, Any]:
    """Return a door's public members, by the name of the synchronous twin."""
    members = {PAIRS.get(name, name): member for name, member in vars(door).items()}
    named = {*members, *vars(door).get("__annotations__", {})}
    return {name: members.get(name) for name in named if not name.startswith("_") or name in DOORS}


def function(member: Any) -> Callable[..., Any]:
    return member.fget if isinstance(member, property) else member


def parameters(member: Any) -> list[tuple[str, object, object]]:
    found = inspect.signature(function(member)).parameters.values()
    return [(each.name, each.kind, each.default) for each in found]


def documentation(member: Any) -> str:
    return re.sub(r"\basync(hronous)?\b|\bawait\b", "", inspect.getdoc(member) or "")


def test_twins_have_the_same_verbs() -> None:
    sync, asynchronous = verbs(Database), verbs(DatabaseSessionManager)
    alone = sync.keys() ^ asynchronous.keys()
    assert alone - DIFFERENCES.keys() == set()


def test_twins_take_and_say_the_same() -> None:
    sync, asynchronous = verbs(Database), verbs(DatabaseSessionManager)
    common = (sync.keys() & asynchronous.keys()) - DIFFERENCES.keys()
    assert len(common) >= 10
    for name in sorted(common):
        one, other = sync[name], asynchronous[name]
        assert isinstance(one, property) is isinstance(other, property), name
        assert parameters(one) == parameters(other), name
        assert documentation(one) == documentation(other) != "", name


def test_every_listed_difference_is_one() -> None:
    sync, asynchronous = verbs(Database), verbs(DatabaseSessionManager)
    for name in DIFFERENCES:
        if name in sync and name in asynchronous:
            assert (parameters(sync[name]), documentation(sync[name])) != (
                parameters(asynchronous[name]),
                documentation(asynchronous[name]),
            ), name
        else:
            assert name in sync or name in asynchronous, name
