"""The pytest plugin: its fixtures under every way to run tests, and nothing left of any run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pgbouncer import PgBouncer
from scenario import sample
from starting import reads_toml

from engineroom.testing import PostgresServer
from engineroom.testing.plugin import find_manager

pytest_plugins = "pytester"

APP = """
    from sqlalchemy.orm import Mapped, mapped_column
    from engineroom import Base, DatabaseSessionManager

    session_manager = DatabaseSessionManager()

    class Item(Base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
"""
SYNC_TEST = """
    import os
    import pytest
    from sqlalchemy import select
    from app import Item, session_manager

    @pytest.mark.parametrize("time", range(3))
    def test_nothing_is_left(db_session, time):
        assert db_session.scalars(select(Item.id)).all() == []
        db_session.add(Item(id=1))
        db_session.commit()
        assert db_session.scalars(select(Item.id)).all() == [1]

    def test_of_the_sandbox(db_sandbox):
        assert db_sandbox is session_manager
        with session_manager.sync_session() as db:
            assert db.scalars(select(Item.id)).all() == []
            db.add(Item(id=1))

    def test_of_a_clone(db_clone, db_url):
        with db_clone.sync_session() as db:
            assert db.scalars(select(Item.id)).all() == []
            db.add(Item(id=1))

    def test_the_environment_agrees(db_url):
        assert os.environ["DATABASE_URL"] == db_url
"""
INI = """
    [pytest]
    pythonpath = .
    engineroom_manager = app:session_manager
"""

# Plugins that happen to be here, and take half of a second to load in each process.
LEAN = [f"-pno:{name}" for name in ("cacheprovider", "faker", "hypothesispytest")]
WARNINGS = (
    *("-W", "error"),
    # pytest-asyncio's own, about an option that concerns asynchronous fixtures.
    *("-W", "ignore:The configuration option:pytest.PytestDeprecationWarning"),
)

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest on files in a process of its own, where each warning is an error."""
    # Where CI is set, pytest prints each error whole once more in its summary.
    for name in ("DATABASE_URL", "DB_URL", "PYTEST_ADDOPTS", "CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)

    def run(
        *options: str, url: str = "", ini: str = INI, more: str = "", **files: str
    ) -> pytest.RunResult:
        if url:
            monkeypatch.setenv("DATABASE_URL", url)
        pytester.makeini(ini.rstrip() + "\n" + (more and f"    {more}\n"))
        pytester.makepyfile(**{"app": APP, **files})
        return pytester.runpytest_subprocess(*LEAN, *WARNINGS, *options)

    return run


@pytest.fixture
def server_url(pg18: PostgresServer) -> Iterator[str]:
    """The URL of a server that has nothing more afterwards than before."""
    yield pg18.url()
    assert databases(pg18) == []


def databases(server: PostgresServer) -> list[str]:
    rows = server.execute("SELECT datname FROM pg_database WHERE datname LIKE 'engineroom%'")
    return [name for (name,) in rows]


NOTE = """
    from pathlib import Path
    from sqlalchemy import text

    def test_where_it_is(db_session):
        folder = db_session.scalar(text("SHOW data_directory"))
        Path("folder.txt").write_text(folder)
        assert Path(folder).exists()
"""


# -- where the database is -----------------------------------------------------------------------


def test_on_a_throwaway_server(run: Run) -> None:
    look = """
        from sqlalchemy import text

        def test_version(db_session):
            print("version", db_session.scalar(text("SHOW server_version_num")))
    """
    version_line = "engineroom_postgres = 16"
    done = run("-s", more=version_line, test_it=SYNC_TEST, test_look=look, test_where=NOTE)
    done.assert_outcomes(passed=8)
    done.stdout.fnmatch_lines(["*version 16*"])
    assert not Path(Path("folder.txt").read_text()).exists()


def test_behind_a_pooler_it_asks_for_the_servers_own_address(
    run: Run, server_url: str, pgbouncer: PgBouncer
) -> None:
    done = run(url=pgbouncer.through(server_url), test_where=NOTE)
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*NotBehindPooler*server's own address*as the DATABASE_URL*"])


# -- asynchronous tests --------------------------------------------------------------------------

ASYNC_TEST = """
    import pytest
    from sqlalchemy import select
    from app import Item, session_manager

    MARKS

    @pytest.mark.parametrize("time", range(3))
    async def test_nothing_is_left(async_db_session, time):
        assert (await async_db_session.scalars(select(Item.id))).all() == []
        async_db_session.add(Item(id=1))
        await async_db_session.commit()
        with pytest.raises(ZeroDivisionError):
            async with session_manager.session() as db:
                assert (await db.scalars(select(Item.id))).all() == [1]
                raise ZeroDivisionError
        async_db_session.add(Item(id=2))
        await async_db_session.flush()  # and is in a transaction when the test ends

    async def test_of_the_sandbox(db_sandbox):
        async with db_sandbox.session() as db:
            assert (await db.scalars(select(Item.id))).all() == []
            db.add(Item(id=1))
"""
CASES = """
    import pytest
    from unittest import IsolatedAsyncioTestCase
    from sqlalchemy import select
    from app import Item

    class Tests(IsolatedAsyncioTestCase):
        @pytest.fixture(autouse=True)
        def _database(self, async_db_session):
            self.db = async_db_session

        async def test_one(self):
            assert (await self.db.scalars(select(Item.id))).all() == []
            self.db.add(Item(id=1))
            await self.db.commit()
            self.db.add(Item(id=2))
            await self.db.flush()

        async def test_two(self):
            await self.test_one()
"""
SCOPES = ("function", "class", "module", "session")
MODES = {  # the options, and what marks the tests of each file
    "anyio": (["-p", "no:asyncio"], ["pytestmark = pytest.mark.anyio"]),
    "auto": (["--asyncio-mode=auto"], [""]),
    "strict": (  # one loop after another, and beside another
        ["--asyncio-mode=strict"],
        [f"pytestmark = pytest.mark.asyncio(loop_scope={scope!r})" for scope in SCOPES],
    ),
    "auto-session": (
        ["--asyncio-mode=auto", "-o", "asyncio_default_test_loop_scope=session"],
        [""],
    ),
}
BACKEND = """
    import pytest

    @pytest.fixture
    def anyio_backend():
        return "asyncio"
"""


@sample(
    "kind, mode",
    [(None, "anyio"), ("asyncpg", "auto"), ("psycopg", "strict"), ("sqlite", "auto-session")],
    ["asyncpg", "psycopg", "sqlite"],
    [*MODES],
)
def test_the_sessions_fit_any_loop_on_any_database(
    kind: str | None, mode: str, run: Run, pg18: PostgresServer, tmp_path: Path
) -> None:
    """Those of synchronous tests, too, in the same run; of the URL's own nothing is touched."""
    options, marks = MODES[mode]
    file = tmp_path / "app.db"
    url = f"sqlite:///{file}" if kind == "sqlite" else pg18.url(driver=kind)
    files = {f"test_{i}": ASYNC_TEST.replace("MARKS", mark) for i, mark in enumerate(marks)}
    done = run(*options, url=url, conftest=BACKEND, test_sync=SYNC_TEST, test_cases=CASES, **files)
    done.assert_outcomes(passed=6 + 2 + 4 * len(marks))
    assert databases(pg18) == []
    assert not file.exists()


# -- what a test left open -----------------------------------------------------------------------

OPEN = """
    import asyncio
    import pytest
    from app import session_manager

    kept = []

    def test_open(db_sandbox):
        kept.append(session_manager.sync_session())
        kept[-1].__enter__()

    def test_its_task(db_sandbox):
        async def main():
            async def hold():
                async with session_manager.session() as db:
                    await asyncio.sleep(1000)
            kept.append(asyncio.ensure_future(hold()))
            await asyncio.sleep(0)

        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())

    def test_that_fails_by_itself(db_sandbox):
        kept.append(session_manager.sync_session())
        kept[-1].__enter__()
        assert False

    @pytest.fixture
    def careless(db_sandbox):
        kept.append(session_manager.sync_session())
        kept[-1].__enter__()

    @pytest.fixture
    def careful(db_sandbox):
        with session_manager.sync_session() as db:
            yield db

    def test_with_a_careless_fixture(careless):
        pass

    def test_with_a_careful_fixture(careful, db_session):
        pass

    def test_that_comes_after(db_session):
        for each in kept:
            if isinstance(each, asyncio.Task):
                each.cancel()
                loop = each.get_loop()
                loop.run_until_complete(asyncio.wait([each]))
                loop.close()
"""


def test_a_session_left_open_fails_its_test_with_its_line(run: Run, server_url: str) -> None:
    done = run(url=server_url, test_open=OPEN)
    done.assert_outcomes(passed=3, failed=3, errors=1)
    found = re.findall(r"  the session of .*, opened at .*:(\d+) in (\w+)", done.stdout.str())
    assert found == [
        ("29", "careless"),  # errors come first
        ("8", "test_open"),
        ("14", "hold"),
    ]


# -- the schema ----------------------------------------------------------------------------------

ALEMBIC = """
[alembic]
script_location = migrations
sqlalchemy.url = postgresql+psycopg://nobody@nowhere/nothing

[loggers]
keys = root
[handlers]
keys =
[formatters]
keys =
[logger_root]
level = WARN
handlers =
"""
ENV = """
import os
from logging.config import fileConfig
from alembic import context
from sqlalchemy import create_engine, pool
from sqlalchemy.engine import make_url

fileConfig(context.config.config_file_name)
URL = context.config.get_main_option("sqlalchemy.url")
with create_engine(URL, poolclass=pool.NullPool).connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""
REVISION = """
from alembic import op
import sqlalchemy as sa
revision, down_revision = "1", None

def upgrade():
    op.create_table("item", sa.Column("id", sa.Integer, primary_key=True, autoincrement=False))
"""
MIGRATED = """
    import logging
    from sqlalchemy import text

    early = logging.getLogger("early")

    def test_who_made_the_tables(db_session, caplog):
        assert db_session.scalar(text("SELECT version_num FROM alembic_version")) == "1"
        early.warning("heard")
        assert caplog.messages == ["heard"]
"""


@pytest.fixture
def migrations(pytester: pytest.Pytester) -> Path:
    """A project with migrations."""
    folder = pytester.mkdir("migrations")
    (folder / "versions").mkdir()
    (folder / "env.py").write_text(ENV)
    (folder / "versions" / "1_item.py").write_text(REVISION)
    (pytester.path / "alembic.ini").write_text(ALEMBIC)
    return folder


@pytest.mark.parametrize(
    "source",
    ["sqlalchemy.url", "environment", "manager", pytest.param("pyproject.toml", marks=reads_toml)],
)
def test_the_projects_migrations_make_the_tables(
    source: str, run: Run, migrations: Path, server_url: str
) -> None:
    env = ENV
    if source == "environment":
        env = env.replace(
            'context.config.get_main_option("sqlalchemy.url")',
            'make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg")',
        )
    elif source == "manager":  # left open, as in a process that ends there
        env = env.replace(
            "create_engine(URL, poolclass=pool.NullPool)", "session_manager.init().sync_engine"
        )
        env = f"from app import session_manager\n{env}"
    elif source == "pyproject.toml":  # which says nothing of logging
        (migrations.parent / "alembic.ini").unlink()
        toml = migrations.parent / "pyproject.toml"
        toml.write_text('[tool.alembic]\nscript_location = "migrations"\n')
        env = env.replace("fileConfig(context.config.config_file_name)", "")
    (migrations / "env.py").write_text(env)
    run(url=server_url, test_it=MIGRATED, test_too=SYNC_TEST).assert_outcomes(passed=7)


def test_tables_that_the_migrations_lack_are_named(
    run: Run, migrations: Path, server_url: str
) -> None:
    more = """
    class Part(Base):
        __tablename__ = "part"
        id: Mapped[int] = mapped_column(primary_key=True)
    """
    done = run(url=server_url, app=APP + more, test_it="def test_it(db_session): pass")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*did not make these tables of the models: part. Add the missing*"])


def test_migrations_that_went_elsewhere_are_noticed(
    run: Run, migrations: Path, server_url: str, tmp_path: Path
) -> None:
    elsewhere = ENV.replace(
        'context.config.get_main_option("sqlalchemy.url")', f'"sqlite:///{tmp_path}/other.db"'
    )
    (migrations / "env.py").write_text(elsewhere)
    done = run(url=server_url, test_it="def test_it(db_session): pass")
    done.stdout.fnmatch_lines(["*tables of the models: item. Have env.py take its URL from*"])


def test_no_tables_at_all_is_an_error(run: Run, server_url: str) -> None:
    empty = (
        "from engineroom import DatabaseSessionManager\nsession_manager = DatabaseSessionManager()"
    )
    done = run(url=server_url, app=empty, test_it="def test_it(db_session): pass")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*no tables to create for the tests: no model's module was import*"])


def test_options_and_preparation_can_be_the_projects_own(run: Run, server_url: str) -> None:
    app = """
        from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
        from engineroom import DatabaseSessionManager

        class Base(DeclarativeBase): ...
        class Own(Session): ...

        class Item(Base):
            __tablename__ = "item"
            id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)

        session_manager = DatabaseSessionManager()
    """
    conftest = """
        import pytest
        from app import Base, Item, Own
        from engineroom import Database

        @pytest.fixture(scope="session")
        def db_options():
            return {"metadata": Base.metadata, "session_class": Own}

        @pytest.fixture(scope="session")
        def db_prepare(db_prepare):
            def prepare(url):
                db_prepare(url)
                with Database(url) as database, database.session() as db:
                    db.add(Item(id=7))
            return prepare
    """
    test = """
        import pytest
        from app import Item, Own

        @pytest.mark.parametrize("time", range(2))
        def test_it(db_session, time):
            assert isinstance(db_session, Own)
            db_session.delete(db_session.get(Item, 7))
            db_session.commit()
    """
    done = run(url=server_url, app=app, conftest=conftest, test_it=test)
    done.assert_outcomes(passed=2)


# -- the manager ---------------------------------------------------------------------------------

SYNCHRONOUS = APP.replace("DatabaseSessionManager()", "Database(pool_size=3)").replace(
    "Base, DatabaseSessionManager", "Base, Database"
)


def test_a_manager_that_is_open_is_put_back(run: Run, server_url: str) -> None:
    conftest = """
        import pytest
        from app import session_manager

        @pytest.fixture(scope="session", autouse=True)
        def look():
            before = session_manager._room.settings
            yield
            after = session_manager._room.settings
            print("put back", session_manager._room.life.state, after.url == before.url)
    """
    test = """
        from app import session_manager

        def test_it(db_session):
            assert session_manager._room.settings.pool_size == 3
            assert session_manager.engine.url.database != "postgres"

        def test_asynchronously(async_db_session):
            pass
    """
    done = run("-s", url=server_url, app=SYNCHRONOUS, conftest=conftest, test_it=test)
    done.assert_outcomes(passed=1, errors=1)
    done.stdout.fnmatch_lines(
        ["*put back State.OPEN True*", "*is a Database, which is synchronous*"]
    )


def test_a_database_finds_a_url_when_it_is_imported(run: Run) -> None:
    test = "def test_it(db_session):\n    from app import Item\n    db_session.add(Item(id=1))"
    run(app=SYNCHRONOUS, test_it=test).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("json", "Write package.module:name"),
        ("apps:session_manager", "there is no module apps. Correct the name"),
        ("json:manager", "module 'json' has no attribute 'manager'"),
        ("json:JSONDecoder", "is of type type. Name a"),
    ],
)
def test_a_manager_that_is_none_is_an_error(name: str, says: str) -> None:
    with pytest.raises(pytest.UsageError, match=says):
        find_manager(name)


def test_the_run_says_so(run: Run) -> None:
    ini = INI.replace("app:session_manager", "app:Item")
    done = run(url="sqlite://", ini=ini, test_it="def test_it(db_session): pass")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*is of type DeclarativeAttributeIntercept*Name a*"])


# -- the how-to ----------------------------------------------------------------------------------


def test_the_how_to_works_and_changes_few_lines(
    run: Run, server_url: str, pytester: pytest.Pytester
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()
    blocks = re.findall(r"^```(?:python|ini)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    files = dict(re.match(r"(?:# (\S+)\n)?((?s:.*))", block).groups() for block in blocks)
    ini = next(block for block in blocks if block.startswith("[pytest]"))
    (before,) = (block for block in blocks if block.startswith("# before: conftest.py"))
    after = [*files["conftest.py"].splitlines(), *ini.splitlines()[2:]]
    assert len([line for line in after if line and line not in before.splitlines()]) < 10
    names = ("app", "conftest", "test_items")
    (cases,) = (block for block in blocks if "IsolatedAsyncioTestCase" in block)
    done = run(
        *("-W", "ignore::DeprecationWarning:starlette"),
        *("-W", "ignore:The anyio.abc.BlockingPortal alias:DeprecationWarning"),
        url=server_url,
        ini=ini,
        **{name: files[f"{name}.py"] for name in names},
        test_cases=f"from app import Item\nfrom sqlalchemy import select\n{cases}",
    )
    done.assert_outcomes(passed=4)


# -- projects that do not use it -----------------------------------------------------------------

UNUSED = """
    import sys

    def test_it(pytestconfig):
        there = {name.partition(".")[0] for name in sys.modules}
        print("imported", there & {"sqlalchemy", "engineroom", "pydantic", "psycopg"})
        print("fixtures", pytestconfig.pluginmanager.has_plugin("engineroom-fixtures"))
"""


@pytest.mark.parametrize("options", [[], ["-p", "no:engineroom"]])
def test_unused_it_imports_nothing_and_can_be_left_out(options: list[str], run: Run) -> None:
    done = run("-s", "--strict-config", *options, ini="[pytest]", test_it=UNUSED)
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["*imported set()*", "*fixtures False*"])


def test_a_conftest_may_name_the_plugin_as_well(run: Run, server_url: str) -> None:
    conftest = 'pytest_plugins = ["engineroom.testing.plugin"]'
    run(url=server_url, conftest=conftest, test_it=SYNC_TEST).assert_outcomes(passed=6)


# -- xdist ---------------------------------------------------------------------------------------

MANY = """
    import os, signal
    import pytest
    from sqlalchemy import select
    from app import Item

    @pytest.mark.parametrize("number", range(COUNT))
    def test_many(db_session, db_url, number, pytestconfig):
        assert db_session.scalars(select(Item.id)).all() == []
        db_session.add(Item(id=number))
        db_session.commit()
        if number == COUNT // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def test_clone(db_clone):
        with db_clone.sync_session() as db:
            db.add(Item(id=1))
"""


@pytest.mark.timeout(300)  # it starts nine processes, on whatever machine this is
@pytest.mark.parametrize(
    ("where", "workers"),
    [
        ("throwaway", 3),
        pytest.param("environment", 3, marks=pytest.mark.soak),
        pytest.param("throwaway", 8, marks=pytest.mark.soak),
    ],
)
def test_of_a_killed_worker_nothing_is_left(
    where: str, workers: int, run: Run, pg18: PostgresServer, eventually: Callable[..., None]
) -> None:
    count = 40
    done = run(
        *("-p", "xdist", "-n", str(workers)),
        url=pg18.url() if where == "environment" else "",
        test_many=MANY.replace("COUNT", str(count)),
        test_where=NOTE,
    )
    done.assert_outcomes(passed=count + 1, failed=1)
    done.stdout.fnmatch_lines(["*crashed while running*"])
    folder = Path(Path("folder.txt").read_text())
    eventually(lambda: folder.exists() is (where == "environment"), 10.0)
    eventually(lambda: not databases(pg18), 10.0)


def test_no_server_is_started_where_nobody_asks(run: Run) -> None:
    conftest = """
        from engineroom.testing import sharing

        def refuse(version):
            raise AssertionError("it was started")

        sharing.start_server = refuse
    """
    test = "import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_it(n): pass"
    asks = "def test_it(db_session): pass"
    done = run("-p", "xdist", "-n", "2", conftest=conftest, test_it=test, test_that_asks=asks)
    done.assert_outcomes(passed=4, errors=1)
    done.stdout.fnmatch_lines(["*RuntimeError: it was started*"])
