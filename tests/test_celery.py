"""A real worker on a broker of files: results right, whoever dies; jobs that find their rows."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import celery_jobs
import psycopg
import pytest
from celery import Celery, group, states
from celery.backends.database import DatabaseBackend as CelerysBackend
from celery.backends.database.models import Task
from celery.backends.database.session import ResultModelBase
from scenario import Item, in_threads, on_a_server, on_all_three, settled
from sqlalchemy import event, inspect, text
from sqlalchemy.engine import Engine, make_url

from engineroom import Database, DatabaseSessionManager, SessionClosed, UsageError
from engineroom.celery import DatabaseBackend, ResultSessionManager, delay_on_commit
from engineroom.errors import SchemaMismatch

HERE = Path(__file__).parent
WORKER = "engineroom-worker"  # the application_name of its connections
EACH = 2  # DB_MAX_CONNECTIONS of each of its processes
CHILDREN = 4


class Watch:
    """Counts the worker's backends, all the time, from outside."""

    def __init__(self, url: str) -> None:
        self.most = 0
        self._over = threading.Event()
        self._url = make_url(url).set(drivername="postgresql", database="postgres", query={})

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with psycopg.connect(
            self._url.render_as_string(hide_password=False), autocommit=True
        ) as raw:
            while not self._over.wait(0.01):
                row = raw.execute(
                    f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{WORKER}'"
                ).fetchone()
                assert row is not None
                self.most = max(self.most, row[0])


@contextmanager
def worker(folder: Path, url: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `celery worker` on a folder; its log is a file there."""
    theirs = f"{url}?application_name={WORKER}" if url.startswith("postgresql") else url
    env = os.environ | {
        celery_jobs.FOLDER: str(folder),
        celery_jobs.RESULTS: f"engineroom+{theirs}",
        celery_jobs.DATABASE: theirs,
        "DB_MAX_CONNECTIONS": str(EACH),
        "C_FORCE_ROOT": "1",
        "PYTHONPATH": str(HERE),
    }
    command = [sys.executable, "-m", "celery", "-A", "celery_jobs", "worker"]
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--loglevel", "INFO", "--without-mingle", "--without-gossip", *options],
            cwd=folder,
            env=env,
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the broker."""
    made = tmp_path / "jobs"
    made.mkdir()
    return made


@pytest.fixture
def app(folder: Path, url: str) -> Iterator[Celery]:
    """The application as whoever queues has it, with the database that its results are in."""
    made = celery_jobs.make_app(folder, f"engineroom+{url}")
    yield made
    made.backend.session_manager.close()


def results_of(app: Celery, jobs: list[Any]) -> list[Any]:
    return [job.get(timeout=60, interval=0.05) for job in jobs]


@on_a_server
@pytest.mark.parametrize(
    "count", [60, pytest.param(1_000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
def test_a_worker_with_four_children_one_of_which_is_killed(
    app: Celery, folder: Path, url: str, count: int
) -> None:
    with Database(url) as database:
        database.create_all(Item.metadata)
    sent = [app.send_task("double", [number]) for number in range(count // 2)]
    killed = app.send_task("die_once", [str(folder / "died")])
    sent += [app.send_task("double", [number]) for number in range(count // 2, count)]
    failed = app.send_task("fail", [7])
    watch = Watch(url) if url.startswith("postgresql") else None
    with worker(folder, url, "--pool", "prefork", "--concurrency", str(CHILDREN)):
        if watch is not None:
            watch.__enter__()
        try:
            seen = results_of(app, sent)
            assert killed.get(timeout=60) == "survived"
            with pytest.raises(LookupError, match="7"):
                failed.get(timeout=60)
        finally:
            if watch is not None:
                watch.__exit__()
    assert [value for value, _ in seen] == [2 * number for number in range(count)]
    children = {pid for _, pid in seen}
    log = (folder / "worker.log").read_text()
    assert "signal 9 (SIGKILL)" in log
    assert len(children) >= CHILDREN - 1
    for trouble in ("Traceback", "ResourceWarning", "too many"):
        assert trouble not in log.replace("LookupError", "").split("fail[")[0], log
    print(f"{count} jobs in {len(children)} children", watch and f"most backends {watch.most}")
    if watch is not None:
        assert 0 < watch.most <= EACH * (CHILDREN + 1)
        app.backend.session_manager.invalidate(url)
        assert settled(url) == []


@on_a_server
@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_other_pools(app: Celery, folder: Path, url: str, pool: str) -> None:
    watch = Watch(url) if url.startswith("postgresql") else None
    with worker(folder, url, "--pool", pool, "--concurrency", "8"):
        if watch is not None:
            watch.__enter__()
        try:
            seen = results_of(app, [app.send_task("double", [number]) for number in range(40)])
        finally:
            if watch is not None:
                watch.__exit__()
    assert [value for value, _ in seen] == [2 * number for number in range(40)]
    assert len({pid for _, pid in seen}) == 1
    if watch is not None:
        assert 0 < watch.most <= EACH


def test_a_worker_that_forks_keeps_its_results_in_mysql(folder: Path, mysql_url: str) -> None:
    app = celery_jobs.make_app(folder, f"engineroom+{mysql_url}")
    sent = [app.send_task("double", [number]) for number in range(20)]
    with worker(folder, mysql_url, "--pool", "prefork", "--concurrency", "2"):
        seen = results_of(app, sent)
    assert [value for value, _ in seen] == [2 * number for number in range(20)]
    assert len({pid for _, pid in seen}) == 2
    app.backend.session_manager.close()


# -- jobs and their rows -------------------------------------------------------------------------


@on_a_server
@pytest.mark.anyio
async def test_no_job_misses_its_row(app: Celery, folder: Path, url: str) -> None:
    find = app.signature("find")
    jobs: list[Any] = []

    class Keeping:
        """A task whose results are kept: callbacks return nothing."""

        def delay(self, *args: Any, **kwargs: Any) -> None:
            assert threading.current_thread() is not threading.main_thread()  # where the loop is
            jobs.append(find.delay(*args, **kwargs))

    async with DatabaseSessionManager().init(url) as manager:
        await manager.create_all(Item.metadata)

        async def add(number: int) -> None:
            async with manager.session() as db:
                db.add(Item(id=number, value=number * 3))
                delay_on_commit(db, Keeping(), number)
                await db.flush()
                await asyncio.sleep(0.02)  # the worker would have come, and missed it

        def add_in_thread(number: int) -> None:
            with manager.sync_session() as db:
                db.add(Item(id=number, value=number * 3))
                delay_on_commit(db, Keeping(), number=number)
                db.flush()

        with worker(folder, url, "--pool", "threads", "--concurrency", "2"):
            await asyncio.gather(*map(add, range(30)))
            for number in range(30, 60):
                await asyncio.to_thread(add_in_thread, number)
            with pytest.raises(LookupError):
                async with manager.session() as db:
                    delay_on_commit(db, Keeping(), 99)
                    raise LookupError
            found = await asyncio.to_thread(results_of, app, jobs)
    assert sorted(found) == [number * 3 for number in range(60)]


def test_a_signature_carries_options(app: Celery, url: str) -> None:
    with Database(url) as database:
        with database.session() as session:
            soon = app.signature("find").set(countdown=3600, queue="later")
            delay_on_commit(session, soon, 5)
            delay_on_commit(session, group(app.signature("find", [1]), app.signature("find", [2])))
            assert queued(app) == []
    assert queued(app) == ["celery", "celery", "later"]


def queued(app: Celery) -> list[str]:
    """Return the queues of the jobs that lie in the broker's folder."""
    folder = Path(app.conf.broker_transport_options["data_folder_in"])
    messages = [json.loads(file.read_text()) for file in folder.iterdir()]
    return sorted(message["properties"]["delivery_info"]["routing_key"] for message in messages)


def test_a_broker_that_is_away_is_logged_with_the_callers_line(
    app: Celery, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Down:
        def delay(self, *args: Any) -> None:
            raise ConnectionError("the broker is away")

    with Database(url) as database:
        database.create_all(Item.metadata)
        with caplog.at_level(logging.ERROR, "engineroom"), database.session() as session:
            session.add(Item(id=1))
            delay_on_commit(session, Down(), 1)
        with database.session() as session:
            assert session.get(Item, 1) is not None
            gone = session
    assert "test_celery.py" in caplog.text
    assert "the broker is away" in caplog.text
    with pytest.raises(SessionClosed):
        delay_on_commit(gone, Down())
    with pytest.raises(UsageError):
        delay_on_commit(object(), Down())  # type: ignore[arg-type]


# -- the result backend --------------------------------------------------------------------------


@on_all_three
def test_it_is_celerys_backend_with_our_engines(app: Celery, url: str) -> None:
    backend = app.backend
    assert isinstance(backend, DatabaseBackend)
    assert isinstance(backend, CelerysBackend)
    assert isinstance(backend.session_manager, ResultSessionManager)
    assert backend.url == url
    backend.store_result("one", {"fizz": "buzz"}, states.SUCCESS)
    assert backend.get_result("one") == {"fizz": "buzz"}
    assert backend.task_result_exists("one")
    backend.save_group("group", app.GroupResult("group", [app.AsyncResult("one")]))
    assert [result.id for result in backend.restore_group("group").results] == ["one"]
    backend.delete_group("group")
    backend.forget("one")
    backend.cleanup()
    assert backend.get_state("one") == states.PENDING


def test_all_threads_of_an_application_share_its_engines(app: Celery, postgres_url: str) -> None:
    app.conf.result_backend = f"engineroom+{postgres_url}"
    seen: list[Any] = []

    def ask(number: int) -> None:
        app.backend.store_result(str(number), number, states.SUCCESS)
        seen.append((app.backend, app.backend.session_manager))

    in_threads(6, ask)
    assert len({id(backend) for backend, _ in seen}) == 6
    assert len({id(manager) for _, manager in seen}) == 1


def test_a_callback_of_the_configuration_meets_the_engine(folder: Path, sqlite_url: str) -> None:
    met: list[Any] = []
    app = celery_jobs.make_app(folder, f"engineroom+{sqlite_url}")
    app.conf.database_engine_callback = met.append
    app.backend.store_result("one", 1, states.SUCCESS)
    assert len(met) == 1
    app.backend.session_manager.close()


OLD = """
CREATE TABLE celery_taskmeta (
    id INTEGER PRIMARY KEY, task_id VARCHAR(155) UNIQUE, status VARCHAR(50),
    result {bytes}, date_done TIMESTAMP, traceback TEXT
)
"""


def an_old_table(url: str) -> None:
    """Make the table as an older Celery has it, with a row."""
    with Database(url) as database, database.connect() as connection:
        kind = "BYTEA" if url.startswith("postgresql") else "BLOB"
        if not url.startswith("sqlite"):
            connection.execute(text("CREATE SEQUENCE task_id_sequence"))
        connection.execute(text(OLD.format(bytes=kind)))
        connection.execute(
            text("INSERT INTO celery_taskmeta (id, task_id, status) VALUES (-1, 'old', 'SUCCESS')")
        )


def columns(url: str) -> set[str]:
    with Database(url) as database:
        return {each["name"] for each in inspect(database.engine).get_columns("celery_taskmeta")}


@on_all_three
def test_an_old_table_keeps_working_and_gains_its_columns_once(app: Celery, url: str) -> None:
    an_old_table(url)
    start = threading.Barrier(8)
    managers = [ResultSessionManager() for _ in range(8)]

    def prepare(number: int) -> None:
        start.wait()
        managers[number].session_factory(url).close()

    in_threads(8, prepare)  # each would fail on a column that another had added
    for manager in managers:
        manager.close()
    assert {column.name for column in Task.__table__.columns} <= columns(url)
    backend = app.backend
    assert backend.get_state("old") == states.SUCCESS
    backend.store_result("new", [1], states.SUCCESS)
    assert backend.get_result("new") == [1]


def test_an_older_worker_meets_a_newer_table(app: Celery, url: str) -> None:
    app.backend.store_result("one", 1, states.SUCCESS)
    with Database(url) as database, database.connect() as connection:
        connection.execute(text("ALTER TABLE celery_taskmeta ADD COLUMN invented VARCHAR(9)"))
    app.backend.session_manager.invalidate(url)
    app.backend.store_result("two", 2, states.SUCCESS)
    assert (app.backend.get_result("one"), app.backend.get_result("two")) == (1, 2)
    assert "invented" in columns(url)


def test_who_may_not_add_columns_is_told_who_must_and_how(folder: Path, postgres_url: str) -> None:
    """By the first who needs the tables, which is the worker at its start, and not by every job."""
    an_old_table(postgres_url)
    owner = make_url(postgres_url)
    with Database(postgres_url) as database, database.connect() as connection:
        ResultModelBase.metadata.tables["celery_tasksetmeta"].create(connection)
        connection.execute(text(f"CREATE ROLE clerk_{owner.database} LOGIN PASSWORD 'hunter2'"))
        for kind in ("TABLES", "SEQUENCES"):
            connection.execute(
                text(f"GRANT ALL ON ALL {kind} IN SCHEMA public TO clerk_{owner.database}")
            )
    clerk = owner.set(username=f"clerk_{owner.database}", password="hunter2")
    url = clerk.render_as_string(hide_password=False)
    try:
        with worker(folder, url, "--pool", "solo") as process:
            assert process.wait(30) != 0
        log = (folder / "worker.log").read_text()
        app = celery_jobs.make_app(folder, f"engineroom+{url}")
        with pytest.raises(SchemaMismatch) as caught:
            app.backend.store_result("one", 1, states.SUCCESS)
        told = str(caught.value)
        assert told.partition(" are of an older")[2] in log  # (its URL has one parameter more)
        assert "hunter2" not in log
        assert "they lack celery_taskmeta.children, " in told
        assert "must be owner of table" in told
        assert caught.value.missing[0] == "celery_taskmeta.children"
        cure = told.partition("Have their owner run: ")[2].removesuffix(" [schema-mismatch]")
        with Database(postgres_url) as database, database.connect() as connection:
            connection.exec_driver_sql(cure)
        app.backend.store_result("one", 1, states.SUCCESS)
        assert app.backend.get_result("one") == 1
        app.backend.session_manager.close()
    finally:
        with Database(postgres_url) as database, database.connect() as connection:
            connection.execute(text(f"DROP OWNED BY clerk_{owner.database}"))
            connection.execute(text(f"DROP ROLE clerk_{owner.database}"))


def test_of_a_file_that_may_not_be_changed_results_are_read(
    folder: Path, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    an_old_table(sqlite_url)
    with Database(sqlite_url) as database, database.connect() as connection:
        ResultModelBase.metadata.tables["celery_tasksetmeta"].create(connection)

    def deny(action: int, *_: object) -> int:
        return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_ALTER_TABLE else sqlite3.SQLITE_OK

    def frozen(engine: Engine) -> None:
        event.listen(engine, "connect", lambda raw, _: raw.set_authorizer(deny))

    app = celery_jobs.make_app(folder, f"engineroom+{sqlite_url}")
    app.conf.update(database_engine_callback=frozen, result_extended=False)
    with caplog.at_level(logging.WARNING, "engineroom"):
        assert app.backend.get_state("old") == states.SUCCESS
    assert "they lack celery_taskmeta.children, " in caplog.text
    assert "ADD COLUMN children" in caplog.text
    app.backend.session_manager.close()


def test_a_new_users_path_is_what_the_page_says(tmp_path: Path) -> None:
    told = (HERE.parent / "docs" / "celery.md").read_text()
    (tmp_path / "app.py").write_text(re.findall(r"```python\n(.*?)```", told, re.DOTALL)[0])
    order = re.findall(r"```{code-block} python\n:caption: order.py\n(.*?)```", told, re.DOTALL)[0]
    (tmp_path / "order.py").write_text(order)
    start, *calls = re.findall(r"```sh\n(.*?)```", told, re.DOTALL)[0].splitlines()
    env = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}
    command = [sys.executable, "-m", *start.split(), "--concurrency", "2"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=env | {"C_FORCE_ROOT": "1"}, stderr=subprocess.DEVNULL
    ) as running:
        try:
            for call in calls * 2:  # and once more the next day
                assert call == "python order.py"
                said = subprocess.run(
                    [sys.executable, "order.py"],
                    cwd=tmp_path,
                    env=env,
                    capture_output=True,
                    text=True,
                    timeout=90,
                    check=False,
                )
                assert (said.stdout, said.stderr) == ("valve delivered\n", "")
        finally:
            running.terminate()
