"""Clones are like their template, apart from each other, and gone with the last who used it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from engineroom import Database
from engineroom.errors import InvalidURL, TemplateUnusable
from engineroom.testing import PostgresServer
from engineroom.testing.administration import Administrator
from engineroom.testing.clones import clones

Eventually = Callable[[Callable[[], object]], None]


def prepare(url: str) -> None:
    """Make a table with a row."""
    with Database(url) as database, database.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE item (id INTEGER PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO item VALUES (1)")


def add(url: str, *ids: int) -> list[int]:
    """Insert rows, and return all there are."""
    with Database(url) as database, database.connect() as connection:
        for each in ids:
            connection.exec_driver_sql(f"INSERT INTO item VALUES ({each})")
        return [row[0] for row in connection.exec_driver_sql("SELECT id FROM item ORDER BY id")]


@pytest.fixture
def made(pg18: PostgresServer) -> Callable[[], list[str]]:
    """Return the databases that were made beside the URL's."""

    def ask() -> list[str]:
        rows = pg18.execute("SELECT datname FROM pg_database WHERE datname LIKE 'engineroom%'")
        return [name for (name,) in rows]

    return ask


@pytest.fixture(autouse=True)
def nothing_is_left(made: Callable[[], list[str]]) -> Iterator[None]:
    yield
    assert made() == []


@pytest.mark.parametrize("kind", ["sqlite_url", "postgres_url"])
def test_clones_are_like_the_template_and_apart(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = request.getfixturevalue(kind)
    with clones(url, prepare, directory=tmp_path) as template:
        first, second = template.clone(), template.clone()
        assert add(first, 2) == [1, 2]
        assert add(second, 3) == [1, 3]
        template.discard(first)
        assert add(template.clone()) == [1]
        for stranger in (url, first):
            with pytest.raises(ValueError, match="no clone of this template"):
                template.discard(stranger)
    template.close()
    with pytest.raises(TemplateUnusable, match="use it inside of"):
        template.clone()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["sqlite_url", "postgres_url"])
def test_without_a_function_the_database_itself_is_the_template(
    kind: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(kind)
    prepare(url)
    with clones(url) as template:
        assert add(template.clone(), 2) == [1, 2]
    assert add(url) == [1]


def test_a_url_keeps_its_driver_its_password_and_its_parameters(
    pg18: PostgresServer, database: str
) -> None:
    url = pg18.url(database, "asyncpg") + "?ssl=disable"
    with clones(url, lambda url: None) as template:
        clone = make_url(template.clone())
    assert clone.set(database=database).render_as_string(hide_password=False) == url


def test_the_next_one_is_made_ahead(
    postgres_url: str, made: Callable[[], list[str]], eventually: Eventually
) -> None:
    with clones(postgres_url, prepare) as template:
        eventually(lambda: len(made()) == 2)  # the template, and the next one
        ahead = set(made())
        assert make_url(template.clone()).database in ahead
        eventually(lambda: len(made()) == 3)


def test_a_discarded_clone_is_dropped_with_its_connections(
    postgres_url: str, made: Callable[[], list[str]], eventually: Eventually
) -> None:
    with clones(postgres_url, prepare) as template:
        url = template.clone()
        with psycopg.connect(url) as connection:
            template.discard(url)
            eventually(lambda: make_url(url).database not in made())
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")


def test_a_file_that_is_written_to_can_be_cloned(sqlite_url: str) -> None:
    prepare(sqlite_url)
    with Database(sqlite_url) as database, database.connect() as connection:
        connection.exec_driver_sql("INSERT INTO item VALUES (2)")
        with clones(sqlite_url) as template:
            assert add(template.clone()) == [1]  # of what is committed


def test_a_discarded_file_takes_along_what_lies_beside_it(sqlite_url: str, tmp_path: Path) -> None:
    with clones(sqlite_url, prepare, directory=tmp_path) as template:
        url = template.clone()
        beside = sqlite3.connect(str(make_url(url).database))
        beside.execute("PRAGMA journal_mode=WAL")
        beside.execute("INSERT INTO item VALUES (2)")
        folder = Path(str(make_url(url).database)).parent
        before = {path.name for path in folder.iterdir()}
        template.discard(url)
        left = {path.name for path in folder.iterdir()}
        beside.close()
    assert before - left >= {Path(url).name, Path(url).name + "-wal"}


@pytest.mark.parametrize(
    ("fsync", "strategy"), [("off", "STRATEGY file_copy"), ("on", "STRATEGY wal_log")]
)
def test_the_strategy_is_the_faster_one(
    fsync: str, strategy: str, pg18: PostgresServer, postgres_url: str
) -> None:
    pg18.execute(f"ALTER SYSTEM SET fsync = {fsync}")
    pg18.execute("ALTER SYSTEM SET log_min_duration_statement = 0")
    pg18.execute("SELECT pg_reload_conf()")
    admin = Administrator(make_url(postgres_url))
    try:
        assert admin.execute("SHOW fsync") == [(fsync,)]
        assert admin._strategy.strip() == strategy
        admin.create("copied")
        admin.drop("copied")
    finally:
        admin.close()
        pg18.execute("ALTER SYSTEM RESET ALL")
        pg18.execute("SELECT pg_reload_conf()")


def test_asyncpg_alone_will_do(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, made: Callable[[], list[str]]
) -> None:
    from engineroom import backends

    there = backends.find_spec
    monkeypatch.setattr(
        backends, "find_spec", lambda name: None if "psycopg" in name else there(name)
    )
    with clones(postgres_url, lambda url: None) as template:
        url = template.clone()
        assert make_url(url).database in made()
        template.discard(url)


# -- what cannot be ------------------------------------------------------------------------------


def test_a_connection_that_prepare_left_open_is_named(postgres_url: str) -> None:
    left = []

    def careless(url: str) -> None:
        left.append(psycopg.connect(url, application_name="a careless one"))

    with pytest.raises(TemplateUnusable, match=r"backend \d+ postgres a careless one"):
        clones(postgres_url, careless).__enter__()
    left[0].close()


def test_a_database_in_use_is_no_template(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, application_name="somebody"), clones(postgres_url) as other:
        with pytest.raises(TemplateUnusable, match=r"somebody\. Close the engine or manager"):
            other.clone()


def test_the_missing_right_is_named(pg18: PostgresServer, postgres_url: str) -> None:
    pg18.execute("CREATE ROLE humble LOGIN PASSWORD 'humble'")
    there = make_url(postgres_url).set(username="humble", password="humble")
    url = there.render_as_string(hide_password=False)
    try:
        with pytest.raises(TemplateUnusable, match='ALTER ROLE "humble" CREATEDB') as caught:
            clones(url, prepare).__enter__()
        assert caught.value.code == "template-unusable"
        pg18.execute("ALTER ROLE humble CREATEDB")
        with clones(url, prepare) as template:
            assert add(template.clone()) == [1]
    finally:
        pg18.execute("DROP ROLE humble")


@pytest.mark.parametrize("kind", ["sqlite_url", "postgres_url"])
def test_what_prepare_raises_leaves_nothing(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    def fail(url: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        clones(request.getfixturevalue(kind), fail, directory=tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_be_given_as_sqlites_own_uri(sqlite_url: str, tmp_path: Path) -> None:
    prepare(sqlite_url)
    with clones(f"sqlite:///file:{tmp_path}/test.sqlite?uri=true") as template:
        assert add(template.clone()) == [1]


def test_other_databases_and_memory_are_refused(sqlite_url: str) -> None:
    with pytest.raises(TemplateUnusable, match=r"no SQLite file .*test\.sqlite"):
        clones(sqlite_url).__enter__()
    with pytest.raises(InvalidURL, match=r"oracle://me:\*\*\*@host/db: only postgresql://, my"):
        clones("oracle://me:secret@host/db")
    with pytest.raises(TemplateUnusable, match="URL of a file"):
        clones("sqlite://").__enter__()
    with clones("sqlite://", prepare) as template:
        assert add(template.clone()) == [1]


# -- many processes ------------------------------------------------------------------------------

WORKER = """
import os, sys
from engineroom.testing.clones import clones

def prepare(url):
    from engineroom import Database
    with Database(url) as database, database.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE item (id INTEGER PRIMARY KEY)")
    print("prepared", flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), 9)

with clones(sys.argv[1], prepare, name="run") as template:
    print(template.clone(), flush=True)
    sys.stdin.read()
"""


def start(url: str, what: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, url, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_share_a_template_and_the_last_one_drops_everything(
    postgres_url: str, made: Callable[[], list[str]], eventually: Eventually
) -> None:
    workers = [start(postgres_url) for _ in range(4)]
    said: list[str] = []
    try:
        for worker in workers:
            assert worker.stdout is not None
            while not said or "postgresql" not in said[-1] or len(said) == len(set(said)):
                said.append(worker.stdout.readline().strip())
                if "postgresql" in said[-1]:
                    break
        assert said.count("prepared") == 1
        assert len({url for url in said if url != "prepared"}) == 4
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait()
        for worker in workers[1:3]:
            worker.communicate("")
        assert any(name.endswith("_template") for name in made())
        workers[3].communicate("")
        assert made() == []
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()


def test_what_killed_processes_left_the_next_run_drops(
    postgres_url: str, made: Callable[[], list[str]], eventually: Eventually
) -> None:
    worker = start(postgres_url, "die")
    worker.communicate()
    assert len(made()) == 1
    with clones(postgres_url, prepare, name="another run") as template:
        assert add(template.clone()) == [1]
        eventually(lambda: len(made()) == 3)


def test_a_half_made_template_is_made_again(
    postgres_url: str, made: Callable[[], list[str]]
) -> None:
    start(postgres_url, "die").communicate()
    with clones(postgres_url, prepare, name="run") as template:
        assert add(template.clone()) == [1]


@pytest.mark.parametrize("kind", ["sqlite_url", "postgres_url"])
def test_a_forked_child_leaves_the_template_alone(
    request: pytest.FixtureRequest, kind: str
) -> None:
    with clones(request.getfixturevalue(kind), prepare) as template:
        url = template.clone()
        child = os.fork()
        if child == 0:
            template.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert add(url) == add(template.clone()) == [1]
