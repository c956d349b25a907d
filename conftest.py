"""Examples in the docs and the README run as tests, and a skip that nobody expected fails CI.

The files that take longest begin first.
"""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import format_exception
from typing import Any

import pytest
from sqlalchemy import MetaData
from sqlalchemy.orm import registry
from sybil import Sybil
from sybil.integration.pytest import SybilFile, SybilItem
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from engineroom import Base

ROOT = Path(__file__).parent

# What may be skipped, by the start of the test's id, and why.
TOML = "Alembic reads pyproject.toml from 1.16 on"
EXPECTED_SKIPS: dict[str, str] = {
    "tests/test_alembic.py::test_the_command_line_reads_pyproject_toml": TOML,
    "tests/test_alembic.py::test_a_lifespan_and_check_read_pyproject_toml": TOML,
    "tests/test_plugin.py::test_the_projects_migrations_make_the_tables[pyproject.toml": TOML,
    "tests/test_tls.py::test_channels": "needs a PostgreSQL of the system: ours have no TLS",
}
if os.geteuid() != 0:
    ROOTS = "only root can be somebody else, or have hosts of its own in a namespace"
    EXPECTED_SKIPS |= {
        "tests/test_pool.py::test_the_deadline_is_one_for_all_addresses_of_a_name": ROOTS,
        "tests/test_tls.py::test_a_home_that_cannot_be_looked_into_is_none": ROOTS,
        "tests/test_tls.py::test_without_a_home_named_files_are_used": ROOTS,
    }

# They take longest. A worker has whole files, and one that came late would be waited for.
LONG_FIRST = [
    *("test_celery", "test_plugin", "test_close", "test_fork", "test_starters", "test_shop"),
    *("test_cap", "test_strikes", "test_pooler", "test_loops", "test_servers", "test_web_load"),
    *("test_preload", "test_docs", "test_clones", "test_bench", "test_memory", "test_sqlite"),
]

# Beside SQLAlchemy, their versions are told.
DRIVERS = ("aiosqlite", "asyncpg", "psycopg", "psycopg2-binary")
FRAMEWORKS = ("alembic", "celery", "fastapi", "starlette", "flask", "litestar", "pydantic")

_unexpected: list[str] = []
_collected: list[pytest.Item] = []


def _own_folder(namespace: dict[str, Any]) -> None:
    """Run a document in an empty folder, with no URL around and none of the tests' tables."""
    namespace["__name__"] = "builtins"  # a module that is there: Litestar looks into a function's
    folder = namespace["_folder"] = TemporaryDirectory()
    patch = namespace["_patch"] = pytest.MonkeyPatch()
    patch.chdir(folder.name)
    patch.syspath_prepend(ROOT / "tests" / "fakes")  # clients of secret stores: docs/credentials.md
    for name in ("DATABASE_URL", "DB_URL"):
        patch.delenv(name, raising=False)
    metadata = MetaData(naming_convention=Base.metadata.naming_convention)
    patch.setattr(Base, "metadata", metadata)
    models = registry(metadata=metadata)
    for name in (
        "registry",
        "_sa_registry",
    ):  # two names of one; declaring a model reads the latter
        patch.setattr(Base, name, models)


def _leave_folder(namespace: dict[str, Any]) -> None:
    namespace["_patch"].undo()
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["docs/*.md", "README.md"],
    setup=_own_folder,
    teardown=_leave_folder,
    path=str(ROOT),
).pytest()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Collect a document whole or not at all, as below."""
    report = yield
    leaves_out = collector.config.getoption("lf", default=False)
    if leaves_out and isinstance(collector, SybilFile) and report.result:
        collector.documents.clear()
        report.result = list(collector.collect())
    return report


def pytest_report_header() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("sqlalchemy", *DRIVERS, *FRAMEWORKS))


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist's: the files with most tests first
        config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """In a fresh checkout, have one worker compile all tests, and the others find that done."""
    with Path(__file__).open() as locked:
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(locked, fcntl.LOCK_SH)  # as soon as that one has collected
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    _collected[:] = items


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Run a document whole or not at all (`--last-failed`, `-k`): an example needs those before."""
    chosen = set(session.items)
    documents = {item.path for item in session.items if isinstance(item, SybilItem)}
    session.items[:] = [one for one in _collected if one in chosen or one.path in documents]
    gc.collect()
    gc.freeze()  # what was imported: a test that collects garbage need not go through all of it


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Print a group of exceptions, on which sybil's own way to print ends the whole worker.

    Pytest raises one where the garbage of earlier tests warns more than once.
    """
    error = None if call.excinfo is None else call.excinfo.value
    if isinstance(item, SybilItem) and isinstance(error, BaseExceptionGroup):
        printed = "".join(format_exception(error))
        item.repr_failure = lambda *_, **__: printed  # type: ignore[method-assign]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    expected = any(report.nodeid.startswith(start) for start in EXPECTED_SKIPS)
    if report.skipped and not hasattr(report, "wasxfail") and not expected:
        _unexpected.append(f"{report.nodeid}: {report.longrepr}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unexpected and os.environ.get("CI"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _unexpected:
        terminalreporter.section("unexpected skips (an error where CI is set)", red=True)
        for line in _unexpected:
            terminalreporter.write_line(line)
