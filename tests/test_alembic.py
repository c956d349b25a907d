"""`engineroom.alembic`: a ready `env.py`, whose migrations run once (guarantee 13)."""

from __future__ import annotations

import asyncio
import io
import logging
import sqlite3
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import alembic as alembic_package
import httpx
import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.config import main as command_line
from scenario import is_postgres, run
from sqlalchemy import create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from starting import (
    FIRST,
    SECOND,
    Starter,
    alembic,
    connect_apart,
    models,
    project,
    reads_toml,
    starters,
    together,
    write_migrations,
)

import engineroom.alembic
from engineroom import Database, DatabaseSessionManager
from engineroom.alembic import upgrade as migrate
from engineroom.asgi import Readiness, lifespan
from engineroom.errors import (
    BrokenReferences,
    InvalidOption,
    NoDatabaseURL,
    NoMigrations,
    SchemaLocked,
    SchemaMismatch,
)
from engineroom.testing import PostgresServer, sandbox


@pytest.fixture(params=["pg16", "pg18", "sqlite"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a fresh database, on each that the guarantee names."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_url")
        return
    server: PostgresServer = request.getfixturevalue(request.param)
    name = server.create_database()
    yield server.url(name)
    server.drop_database(name)


def steps(url: str) -> list[str]:
    """Return what the migrations did, by its side effects."""
    with Database(url) as database, database.connect() as connection:
        return list(connection.scalars(text("SELECT step FROM ran ORDER BY step")))


MEANWHILE = "time.sleep(0.5)"  # in which the others come, on a machine that is busy


def all_upgrade(url: str, ini: Path, count: int = 16) -> None:
    ends = together(count, alembic, str(ini), "-x", f"url={url}", "upgrade", "head")
    assert [(code, err) for code, _, err in ends if code] == []
    assert steps(url) == ["first", "second"]


def test_sixteen_upgrade_at_once_and_each_migration_runs_once(place: str, tmp_path: Path) -> None:
    all_upgrade(place, project(tmp_path, f"{MEANWHILE}\n    {FIRST}", SECOND))


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("again", range(10))
def test_sixteen_upgrade_at_once_again_and_again(again: int, place: str, tmp_path: Path) -> None:
    all_upgrade(place, project(tmp_path, f"{MEANWHILE}\n    {FIRST}", SECOND))


# -- a holder that is killed, or hangs, or takes its time -----------------------------------------

HANG = """op.execute("INSERT INTO ran VALUES ('hangs')")
    print("hangs", flush=True)
    time.sleep(1000)"""


@contextmanager
def hanging(url: str, ini: Path) -> Iterator[Starter]:
    """Have a process stand in the middle of its second migration."""
    where = f"url={url}?application_name=hanging" if is_postgres(url) else f"url={url}"
    with starters(1, alembic, str(ini), "-x", where, "upgrade", "head") as (holder,):
        holder.begin()
        holder.says("hangs")
        yield holder


def test_one_is_killed_in_a_migration_and_the_others_go_on(place: str, tmp_path: Path) -> None:
    with hanging(place, project(tmp_path / "old", FIRST, HANG)) as holder:
        ini = project(tmp_path / "new")
        with starters(4, alembic, str(ini), "-x", f"url={place}", "upgrade", "head") as crowd:
            for starter in crowd:
                starter.begin()
            time.sleep(0.5)
            assert [starter.process.poll() for starter in crowd] == [None] * 4
            holder.kill()
            ends = [starter.ended() for starter in crowd]
    assert [(code, err) for code, _, err in ends if code] == []
    assert steps(place) == ["first", "second"]


def test_a_migration_that_hangs_is_named(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_SCHEMA_TIMEOUT", "500ms")
    ini = project(tmp_path, FIRST, HANG)
    with hanging(place, ini):
        with pytest.raises(SchemaLocked) as caught:
            upgrade(ini, place)
    message = caught.value.message
    assert message.startswith("alembic has waited for 0.")
    assert ("(application_name 'hanging', role " in message) is is_postgres(place)


def test_a_step_longer_than_the_servers_guards_runs_once(place: str, tmp_path: Path) -> None:
    """Idle in its transaction, and idle between two of them, while it works elsewhere."""
    slow = connect_apart(place)
    last = f"""with op.get_context().autocommit_block():
        pass
    {slow}
    {SECOND}"""
    if is_postgres(place):
        name = make_url(place).database
        with psycopg.connect(place, autocommit=True) as raw:
            for guard in ("idle_in_transaction_session_timeout", "idle_session_timeout"):
                raw.execute(f"ALTER DATABASE {name} SET {guard} = '1s'")
    all_upgrade(place, project(tmp_path, f"{slow}\n    {FIRST}", last), count=3)


def test_an_index_is_built_concurrently_while_others_wait(
    pg18: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    """One who waits with a snapshot would be waited for, and that is a deadlock."""
    build = """with op.get_context().autocommit_block():
        time.sleep(1)
        op.create_index("by_step", "ran", ["step"], postgresql_concurrently=True)
    op.execute("INSERT INTO ran VALUES ('second')")"""
    all_upgrade(postgres_url, project(tmp_path, FIRST, build), count=4)


# -- in one process ---------------------------------------------------------------------------


def config(ini: Path, *arguments: str) -> Config:
    """Return what the command line would make of `-x`."""
    made = Config(str(ini))
    made.cmd_opts = Namespace(x=list(arguments))
    return made


def upgrade(ini: Path, url: str) -> None:
    command.upgrade(config(ini, f"url={url}"), "heads")


def autogenerated(ini: Path, url: str) -> list[Any]:
    """Return the operations that autogenerate would write."""
    seen: list[Any] = []

    def note(context: Any, revision: Any, directives: list[Any]) -> None:
        seen.extend(directives[0].upgrade_ops.as_diffs())
        directives.clear()

    command.revision(config(ini, f"url={url}"), autogenerate=True, process_revision_directives=note)
    return seen


def test_autogenerate_finds_no_difference_after_create_all(place: str, tmp_path: Path) -> None:
    """With keys, constraints, an index, a type, and a schema by its name; nor what is not ours."""
    schema = "sales" if is_postgres(place) else None
    ini = project(tmp_path, schema=schema)
    (ini.parent / "migrations" / "script.py.mako").write_text("")
    for old in (ini.parent / "migrations" / "versions").glob("*.py"):
        old.unlink()
    with Database(place) as database:
        with database.connect() as connection:
            for name in ("sales", "others") if schema else ():
                connection.execute(text(f"CREATE SCHEMA {name}"))
            if schema:
                connection.execute(text("CREATE TABLE others.theirs (id int)"))
        database.create_all(models(schema))
        assert autogenerated(ini, place) == []
        with database.connect() as connection:
            customer = "sales.customer" if schema else "customer"
            connection.execute(text(f"ALTER TABLE {customer} ADD COLUMN extra INTEGER"))
        (found,) = autogenerated(ini, place)
        assert found[0] == "remove_column"


def test_a_batch_on_sqlite_keeps_the_rows_that_refer_to_its_table(
    sqlite_url: str, tmp_path: Path
) -> None:
    """SQLite empties a table that is dropped, and follows ON DELETE CASCADE."""
    made = """op.create_table("parent", sa.Column("id", sa.Integer, primary_key=True))
    parent = sa.ForeignKey("parent.id", ondelete="CASCADE")
    op.create_table("child", sa.Column("parent_id", sa.Integer, parent))
    op.execute("INSERT INTO parent VALUES (1)")
    op.execute("INSERT INTO child VALUES (1)")"""
    batch = """with op.batch_alter_table("parent", recreate="always") as table:
        table.add_column(sa.Column("name", sa.String(20)))"""
    upgrade(project(tmp_path, made, batch), sqlite_url)
    with Database(sqlite_url) as database, database.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM child")) == 1


@pytest.mark.parametrize("own_engine", [False, True])
def test_a_batch_in_a_given_transaction_deletes_no_row_that_refers_to_its_table(
    own_engine: bool, sqlite_url: str, tmp_path: Path
) -> None:
    """There SQLite enforces foreign keys: without rows it goes, with rows it is refused."""
    made = """op.create_table("parent", sa.Column("id", sa.Integer, primary_key=True))
    parent = sa.ForeignKey("parent.id", ondelete="CASCADE")
    op.create_table("child", sa.Column("parent_id", sa.Integer, parent))"""
    batch = """with op.batch_alter_table("parent", recreate="always") as table:
        table.add_column(sa.Column("name", sa.String(20)))"""
    given = config(project(tmp_path, made, batch))
    rows = "INSERT INTO parent VALUES (1, 'a'); INSERT INTO child VALUES (1)"
    with Database(sqlite_url) as database:
        engine = create_engine(sqlite_url) if own_engine else database.engine
        if own_engine:
            event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA foreign_keys=ON"))
        with engine.begin() as given.attributes["connection"]:
            command.upgrade(given, "heads")
        again = config(project(tmp_path, made, batch, batch.replace("name", "title")))
        with database.connect() as connection:
            for statement in rows.split(";"):
                connection.execute(text(statement))
        with pytest.raises(BrokenReferences, match="rows of child refer to it"):
            with engine.begin() as again.attributes["connection"]:
                command.upgrade(again, "heads")
        with database.engine.connect() as again.attributes["connection"]:
            command.upgrade(again, "heads")
        with database.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM child")) == 1
            assert "title" in {each["name"] for each in inspect(connection).get_columns("parent")}
        engine.dispose()


def test_a_migration_that_breaks_a_reference_on_sqlite_is_rolled_back(
    sqlite_url: str, tmp_path: Path
) -> None:
    made = """op.create_table("parent", sa.Column("id", sa.Integer, primary_key=True))
    op.create_table("child", sa.Column("parent_id", sa.Integer, sa.ForeignKey("parent.id")))
    op.execute("INSERT INTO child VALUES (1)")"""
    with pytest.raises(BrokenReferences, match=r"1: child → parent"):
        upgrade(project(tmp_path, made), sqlite_url)
    with Database(sqlite_url) as database, database.connect() as connection:
        assert inspect(connection).get_table_names() == []


def test_a_file_with_broken_references_starts_where_there_is_nothing_to_migrate(
    sqlite_url: str, tmp_path: Path
) -> None:
    """They were there before, and to look for them takes long on a large file."""
    made = """op.create_table("parent", sa.Column("id", sa.Integer, primary_key=True))
    op.create_table("child", sa.Column("parent_id", sa.Integer, sa.ForeignKey("parent.id")))"""
    ini = project(tmp_path, made)
    upgrade(ini, sqlite_url)
    with sqlite3.connect(str(make_url(sqlite_url).database)) as file:
        file.execute("INSERT INTO child VALUES (1)")
    file.close()
    upgrade(ini, sqlite_url)


# -- where the database is ----------------------------------------------------------------------


def test_the_command_line_comes_first(sqlite_url: str, tmp_path: Path) -> None:
    upgrade(
        project(tmp_path, ini="sqlalchemy.url = postgresql://nobody@nowhere.invalid/x"), sqlite_url
    )
    assert steps(sqlite_url) == ["first", "second"]


def test_a_given_connection_is_used_and_its_transaction_is_its_owners(
    url: str, tmp_path: Path
) -> None:
    ini = project(tmp_path, ini="sqlalchemy.url = postgresql://nobody@nowhere.invalid/x")
    given = config(ini)
    with Database(url) as database:
        with pytest.raises(LookupError):
            with database.connect() as connection:
                given.attributes["connection"] = connection
                command.upgrade(given, "heads")
                raise LookupError
        with database.connect() as connection:
            assert inspect(connection).get_table_names() == []
            given.attributes["connection"] = connection
            command.upgrade(given, "heads")
        with database.engine.connect() as connection:  # not in a transaction
            given.attributes["connection"] = connection
            command.upgrade(given, "heads")
            if is_postgres(url):
                locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
                assert connection.scalar(text(locks)) == 0
                shown = connection.scalar(text("SHOW statement_timeout"))
                assert shown == "0"
            else:
                assert connection.scalar(text("PRAGMA foreign_keys")) == 1
                driver: Any = connection.connection.driver_connection
                assert driver.in_transaction  # as a writer's of ours is, from its beginning on
    assert steps(url) == ["first", "second"]


FAILING = "raise LookupError('failed')"
GUARDS = {"statement_timeout": "77s", "idle_in_transaction_session_timeout": "88s"}


@pytest.mark.parametrize("last", [SECOND, FAILING], ids=["done", "failed"])
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "AUTOCOMMIT"])
def test_a_given_connection_of_a_server_keeps_its_settings(
    level: str, last: str, postgres_url: str, tmp_path: Path
) -> None:
    given = config(project(tmp_path, FIRST, last))
    engine = create_engine(postgres_url.replace("postgresql:", "postgresql+psycopg:"))

    def settings() -> list[Any]:
        seen = [connection.scalar(text(f"SHOW {name}")) for name in GUARDS]
        connection.rollback()
        return [*seen, connection.get_isolation_level()]

    with engine.connect().execution_options(isolation_level=level) as connection:
        driver: Any = connection.connection.driver_connection
        for name, value in GUARDS.items():
            connection.execute(text(f"SET {name} = '{value}'"))
        connection.commit()
        before = settings()
        assert before[0] == "77s"
        given.attributes["connection"] = connection
        if last == FAILING:
            with pytest.raises(LookupError):
                command.upgrade(given, "heads")
        else:
            command.upgrade(given, "heads")
        assert settings() == before
        assert driver.autocommit is (level == "AUTOCOMMIT")
        assert driver is connection.connection.driver_connection
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        assert connection.scalar(text(locks)) == 0
    engine.dispose()


@pytest.mark.parametrize("last", [SECOND, FAILING], ids=["done", "failed"])
@pytest.mark.parametrize("enforced", [0, 1])
def test_a_given_connection_of_a_file_keeps_its_foreign_keys(
    enforced: int, last: str, sqlite_url: str, tmp_path: Path
) -> None:
    given = config(project(tmp_path, FIRST, last))
    engine = create_engine(sqlite_url)
    with engine.connect() as connection:
        connection.execute(text(f"PRAGMA foreign_keys={enforced}"))
        connection.rollback()
        given.attributes["connection"] = connection
        if last == FAILING:
            with pytest.raises(LookupError):
                command.upgrade(given, "heads")
        else:
            command.upgrade(given, "heads")
        assert connection.scalar(text("PRAGMA foreign_keys")) == enforced
    engine.dispose()


def test_a_given_transaction_in_autocommit_is_refused_for_no_lock_would_last(
    postgres_url: str, tmp_path: Path
) -> None:
    given = config(project(tmp_path))
    engine = create_engine(
        postgres_url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT"
    )
    with engine.begin() as given.attributes["connection"]:
        with pytest.raises(InvalidOption, match="is in AUTOCOMMIT"):
            command.upgrade(given, "heads")
        assert inspect(given.attributes["connection"]).get_table_names() == []
    engine.dispose()


def test_the_ini_file_comes_before_the_environment(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@nowhere.invalid/x")
    command.upgrade(Config(str(project(tmp_path, ini=f"sqlalchemy.url = {sqlite_url}"))), "heads")
    assert steps(sqlite_url) == ["first", "second"]


@pytest.mark.parametrize("written", ["", "sqlalchemy.url = driver://user:pass@localhost/dbname"])
def test_the_environment_comes_last_and_what_alembic_init_writes_is_none(
    written: str, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", sqlite_url)
    command.upgrade(Config(str(project(tmp_path, ini=written))), "heads")
    assert steps(sqlite_url) == ["first", "second"]


@pytest.mark.parametrize("sql", [False, True])
def test_where_no_url_is_given_the_ways_of_alembic_are_told(
    sql: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATABASE_URL", "DB_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NoDatabaseURL, match=r"alembic -x url=… upgrade head.*sqlalchemy\.url in"):
        command.upgrade(config(project(tmp_path)), "heads", sql=sql)


@pytest.mark.parametrize("doubled", [True, False])
def test_a_percent_sign_in_a_password_need_not_be_doubled(
    doubled: bool, pg18: PostgresServer, database: str, tmp_path: Path
) -> None:
    role = f"role_{database}"
    pg18.execute(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD 'p%4x@:/'")
    where = make_url(pg18.url(database)).set(username=role, password="p%4x@:/")
    text = where.render_as_string(hide_password=False)
    assert "%25" in text
    written = text.replace("%", "%%") if doubled else text
    try:
        ini = project(tmp_path, ini=f"sqlalchemy.url = {written}")
        command.upgrade(Config(str(ini)), "heads")
        with Database(text) as opened:  # and the manager's, in whichever env.py
            migrate(opened, ini)
        assert steps(pg18.url(database)) == ["first", "second"]
    finally:
        pg18.execute(f"DROP OWNED BY {role}", database)
        pg18.execute(f"DROP ROLE {role}")


def upgrade_with_asyncpg_alone(url: str, ini: str, inside_a_loop: bool) -> None:
    sys.modules["psycopg"] = sys.modules["psycopg2"] = None  # type: ignore[assignment]
    sys.path.insert(0, str(Path(__file__).parent))

    async def main() -> None:
        upgrade(Path(ini), url)

    if inside_a_loop:
        asyncio.run(main())
    else:
        upgrade(Path(ini), url)


@pytest.mark.parametrize("driver", ["postgresql", "postgresql+asyncpg"])
@pytest.mark.parametrize("inside_a_loop", [False, True])
def test_a_project_that_has_only_asyncpg_needs_no_second_driver(
    driver: str, inside_a_loop: bool, postgres_url: str, tmp_path: Path
) -> None:
    url = postgres_url.replace("postgresql", driver)
    run(upgrade_with_asyncpg_alone, url, str(project(tmp_path)), inside_a_loop)
    assert steps(postgres_url) == ["first", "second"]


def test_statements_are_written_instead_of_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(project(tmp_path), "url=postgresql://nobody@nowhere.invalid/x")
    command.upgrade(made, "heads", sql=True)
    assert "INSERT INTO ran VALUES ('second');" in capsys.readouterr().out


def test_current_waits_for_nobody(place: str, tmp_path: Path) -> None:
    """Where a migration hangs, one wants to see how far it has come."""
    ini = project(tmp_path, FIRST, HANG)
    with hanging(place, ini):
        command.current(config(ini, f"url={place}"))


# -- what configures Alembic -----------------------------------------------------------------------

TOML = "pyproject.toml"


def toml_project(folder: Path, *, keeps_ini: bool) -> None:
    """Have Alembic write what it writes for who wants it in pyproject.toml, and add migrations."""
    (folder / TOML).write_text('[project]\nname = "shop"\nversion = "1"\n')
    ini = folder / "alembic.ini"
    made = Config(str(ini), toml_file=folder / TOML, stdout=io.StringIO())
    command.init(made, str(folder / "migrations"), template="pyproject")
    write_migrations(folder / "migrations")
    if not keeps_ini:
        ini.unlink()


@reads_toml
@pytest.mark.parametrize("keeps_ini", [True, False])
def test_the_command_line_reads_pyproject_toml(
    keeps_ini: bool, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml_project(tmp_path, keeps_ini=keeps_ini)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", sqlite_url)
    with engineroom.alembic.same_logging():
        command_line(argv=["upgrade", "head"])
        command_line(argv=["current", "--check-heads"])
    assert steps(sqlite_url) == ["first", "second"]


@reads_toml
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("keeps_ini", "named"),
    [(True, ""), (True, "alembic.ini"), (True, TOML), (False, ""), (False, TOML)],
)
async def test_a_lifespan_and_check_read_pyproject_toml(
    keeps_ini: bool, named: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found in the working directory; or named, from any other."""
    toml_project(tmp_path, keeps_ini=keeps_ini)
    with (tmp_path / TOML).open("a") as file:
        file.write('version_table = "versions"\n')
    options: Any = {"alembic_ini": str(tmp_path / named)} if named else {}
    if not named:
        monkeypatch.chdir(tmp_path)
    async with DatabaseSessionManager().init(url, **options) as manager:
        with pytest.raises(SchemaMismatch, match="nothing was ever migrated there"):
            await manager.check(schema=True)
    async with lifespan(manager, url=url, migrate=True, **options)(None):
        await manager.check(schema=True)
        async with manager.connect() as connection:
            found = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    assert sorted(found) == ["ran", "versions"]


def test_a_pyproject_toml_that_says_nothing_of_alembic_is_none(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / TOML).write_text('[project]\nname = "shop"\n[tool.ruff]\nline-length = 100\n')
    monkeypatch.chdir(tmp_path)
    with Database(sqlite_url) as database:
        with pytest.raises(NoMigrations, match="no alembic.ini"):
            migrate(database)


def test_an_alembic_that_does_not_read_pyproject_toml_is_told(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / TOML).write_text('[tool.alembic]\nscript_location = "migrations"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(Config, "get_alembic_option", raising=False)  # as before 1.16
    with Database(sqlite_url) as database:
        with pytest.raises(InvalidOption, match="Alembic reads pyproject.toml from 1.16 on"):
            database.check(schema=True)


def test_the_scripts_are_found_in_a_folder_with_a_percent_sign(
    sqlite_url: str, tmp_path: Path
) -> None:
    """Where the ini file names them as they were named before Alembic knew of `%(here)s`."""
    ini = project(tmp_path / "100%")
    ini.write_text("[alembic]\nscript_location = migrations\n")
    with Database(sqlite_url, alembic_ini=str(ini)) as database:
        migrate(database)
        database.check(schema=True)
    assert steps(sqlite_url) == ["first", "second"]


# -- what is passed on, and what is refused --------------------------------------------------------


def test_options_are_passed_on(sqlite_url: str, tmp_path: Path) -> None:
    seen = """, version_table="elsewhere", on_version_apply=lambda **kw: print(kw["step"])"""
    upgrade(project(tmp_path, options=seen), sqlite_url)
    with Database(sqlite_url) as database, database.connect() as connection:
        assert sorted(inspect(connection).get_table_names()) == ["elsewhere", "ran"]


@pytest.mark.parametrize("name", ["connection", "url", "target_metadata"])
def test_what_run_sets_itself_is_refused(name: str, sqlite_url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=f"alembic.run\\(\\) sets {name} of"):
        upgrade(project(tmp_path, options=f", {name}=None"), sqlite_url)


def test_a_revision_that_the_code_does_not_know_is_told(url: str, tmp_path: Path) -> None:
    upgrade(project(tmp_path / "new"), url)
    old = project(tmp_path / "old", FIRST)
    with pytest.raises(SchemaMismatch, match="is at revision r2, which this code does not know"):
        upgrade(old, url)
    assert steps(url) == ["first", "second"]


def test_the_log_tells_of_each_migration_and_of_one_that_takes_long(
    sqlite_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(engineroom.alembic, "TELL_EVERY", 0.05)
    caplog.set_level(logging.INFO, "engineroom")
    upgrade(project(tmp_path, FIRST, f"time.sleep(0.5)\n    {SECOND}"), sqlite_url)
    said = [record.getMessage() for record in caplog.records if record.name == "engineroom"]
    assert any(line.startswith("Migrated r1 in ") for line in said)
    assert any(line.endswith("; the last one finished was r1") for line in said)


def test_what_a_migration_sets_on_its_connection_goes_with_it(
    postgres_url: str, tmp_path: Path
) -> None:
    ini = project(tmp_path, FIRST, """op.execute("SET work_mem = '123MB'")""")
    with Database(postgres_url, alembic_ini=str(ini), pool_size=1, max_overflow=0) as database:
        migrate(database)
        with database.connect() as connection:
            assert connection.scalar(text("SHOW work_mem")) == "4MB"
            locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
            assert connection.scalar(text(locks)) == 0


# -- where it stands: check(schema=True) ----------------------------------------------------------


async def check(door: str, url: str, **options: Any) -> None:
    if door == "sync":

        def check_there() -> None:
            with Database(url, **options) as database:
                database.check(schema=True)

        await asyncio.to_thread(check_there)
    else:
        async with DatabaseSessionManager().init(url, **options) as manager:
            await manager.check(schema=True)


@pytest.mark.anyio
@pytest.mark.parametrize("door", ["sync", "async"])
async def test_check_tells_how_far_the_database_is_from_head(
    door: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ini = project(tmp_path, FIRST, SECOND, "pass")
    with pytest.raises(SchemaMismatch, match="nothing was ever migrated there") as caught:
        await check(door, url, alembic_ini=str(ini))
    assert (caught.value.current, caught.value.head) == ((), ("r3",))
    assert caught.value.missing == ("r1", "r2", "r3")
    await asyncio.to_thread(command.upgrade, config(ini, f"url={url}"), "r1")
    monkeypatch.chdir(tmp_path)  # there it is found
    with pytest.raises(SchemaMismatch, match=r"it is at r1, and .* 2 migrations further") as caught:
        await check(door, url)
    assert caught.value.missing == ("r2", "r3")
    await asyncio.to_thread(upgrade, ini, url)
    await check(door, url)


@pytest.mark.anyio
@pytest.mark.parametrize("door", ["sync", "async"])
async def test_check_tells_of_a_database_that_newer_code_has_migrated(
    door: str, url: str, tmp_path: Path
) -> None:
    await asyncio.to_thread(upgrade, project(tmp_path / "new"), url)
    with pytest.raises(SchemaMismatch, match="newer code has migrated it") as caught:
        await check(door, url, alembic_ini=str(project(tmp_path / "old", FIRST)))
    assert (caught.value.current, caught.value.unknown) == (("r2",), ("r2",))


def test_check_reads_the_version_table_where_the_ini_file_says(
    postgres_url: str, tmp_path: Path
) -> None:
    ini = project(tmp_path, ini="version_table = versions\nversion_table_schema = ops")
    with Database(postgres_url, alembic_ini=str(ini)) as database:
        with database.connect() as connection:
            connection.execute(text("CREATE SCHEMA ops"))
        migrate(database)
        database.check(schema=True)
        with database.connect() as connection:
            assert connection.scalar(text("SELECT version_num FROM ops.versions")) == "r2"


def test_branches_and_merges_are_followed(sqlite_url: str, tmp_path: Path) -> None:
    ini = project(tmp_path, FIRST, SECOND, "pass")
    versions = ini.parent / "migrations" / "versions"
    third = (versions / "r3.py").read_text()
    (versions / "r3.py").write_text(third.replace("down_revision = 'r2'", "down_revision = 'r1'"))
    with Database(sqlite_url, alembic_ini=str(ini)) as database:
        command.upgrade(config(ini, f"url={sqlite_url}"), "r3")
        with pytest.raises(SchemaMismatch) as caught:
            database.check(schema=True)
        assert (caught.value.head, caught.value.missing) == (("r2", "r3"), ("r2",))
        migrate(database)
        database.check(schema=True)


def test_an_ini_file_that_is_not_there_is_refused(sqlite_url: str) -> None:
    with Database(sqlite_url, alembic_ini="nowhere.ini") as database:
        with pytest.raises(InvalidOption, match="DB_ALEMBIC_INI='nowhere.ini' cannot be used"):
            database.check(schema=True)


# -- lifespan(migrate=True) and readiness ----------------------------------------------------------


@pytest.mark.anyio
async def test_a_lifespan_migrates_before_it_serves_and_does_not_stop_the_loop(
    url: str, tmp_path: Path
) -> None:
    ini = project(tmp_path, FIRST, f"time.sleep(0.5)\n    {SECOND}")
    manager, ticks = DatabaseSessionManager(), 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    ticking = asyncio.create_task(tick())
    async with lifespan(manager, url=url, migrate=True, alembic_ini=str(ini))(None):
        before = ticks
        assert await manager.check(schema=True)
        async with manager.reader() as db:
            assert len((await db.scalars(text("SELECT step FROM ran"))).all()) == 2
    ticking.cancel()
    assert before > 10  # in half a second, by a loop that a machine may hold up


@pytest.mark.anyio
async def test_a_lifespan_without_migrations_says_what_to_do(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manager = DatabaseSessionManager()
    with pytest.raises(NoMigrations, match="There are no migrations to run: no alembic.ini in"):
        async with lifespan(manager, url=sqlite_url, migrate=True)(None):
            pass
    assert manager.stats().state == "closed"


@pytest.mark.anyio
async def test_a_worker_of_older_code_does_not_start_on_a_newer_database(
    url: str, tmp_path: Path
) -> None:
    await asyncio.to_thread(upgrade, project(tmp_path / "new"), url)
    old = str(project(tmp_path / "old", FIRST))
    with pytest.raises(SchemaMismatch, match="which this code does not know"):
        async with lifespan(DatabaseSessionManager(), url=url, migrate=True, alembic_ini=old)(None):
            pass


@pytest.mark.anyio
async def test_a_lifespan_migrates_nothing_in_a_sandbox(postgres_url: str, tmp_path: Path) -> None:
    async with DatabaseSessionManager().init(postgres_url) as manager:
        async with sandbox(manager):
            async with lifespan(manager, migrate=True)(None):  # there are none, and no error
                pass


@pytest.mark.anyio
async def test_readiness_is_503_behind_head_and_200_at_it_and_for_older_code(
    url: str, tmp_path: Path
) -> None:
    old, new = project(tmp_path / "old", FIRST), project(tmp_path / "new")

    async def answer(ini: Path) -> tuple[int, Any]:
        async with DatabaseSessionManager().init(url, alembic_ini=str(ini)) as manager:
            transport = httpx.ASGITransport(Readiness(manager, timeout=20, schema=True))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                said = await client.get("/")
                return said.status_code, said.json()

    await asyncio.to_thread(upgrade, old, url)
    assert await answer(new) == (503, {"database": "ok", "schema": "behind"})
    await asyncio.to_thread(upgrade, new, url)
    assert (await answer(new))[0] == 200
    assert await answer(old) == (200, {"database": "ok", "schema": "newer"})


@pytest.mark.anyio
async def test_an_env_py_of_another_kind_is_migrated_too_and_told_to_have_no_lock(
    sqlite_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ini = project(tmp_path)
    generic = Path(alembic_package.__file__).parent / "templates" / "generic" / "env.py"
    env = generic.read_text().replace("fileConfig(config.config_file_name)", "pass")
    (tmp_path / "migrations" / "env.py").write_text(env)
    async with lifespan(
        DatabaseSessionManager(), url=sqlite_url, migrate=True, alembic_ini=str(ini)
    )(None):
        pass
    assert await asyncio.to_thread(steps, sqlite_url) == ["first", "second"]
    assert "ran without the lock of the schema" in caplog.text
