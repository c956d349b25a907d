"""What is MySQL's own: round trips, dead connections, deadlines, the lock, its limits."""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymysql
import pytest
from mariadb_server import MariaServer
from mysql_wire import CommandCounter
from scenario import LOOPS, Item, Model, backends, in_threads, mysql_server, run, run_on, until
from sqlalchemy import event, insert, inspect, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from starting import FIRST, SECOND, alembic, project, say, starters, together

from engineroom import Database, DatabaseSessionManager, schema
from engineroom.backends.mysql import MySQL
from engineroom.errors import (
    ConnectTimeout,
    InvalidURL,
    SandboxError,
    SchemaLocked,
    TemplateUnusable,
)
from engineroom.testing import clones, sandbox

SIDES = ["sync", "async"]
ONE, FORTY_TWO = "SELECT 1", "SELECT value FROM item"


# -- URLs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "sync", "asynchronous"),
    [
        ("mysql://", "mysql+pymysql", "mysql+asyncmy"),
        ("mariadb://", "mariadb+pymysql", "mariadb+asyncmy"),
        ("mysql+pymysql://", "mysql+pymysql", "mysql+asyncmy"),
        ("mariadb+asyncmy://", "mariadb+pymysql", "mariadb+asyncmy"),
    ],
)
def test_a_url_gives_a_pair_of_drivers(url: str, sync: str, asynchronous: str) -> None:
    manager = DatabaseSessionManager().init(f"{url}shop:secret@db.example/shop")
    assert manager.sync_engine.url.drivername == sync
    assert manager.engine.url.drivername == asynchronous
    manager.sync.close()


@pytest.mark.parametrize("driver", ["aiomysql", "mysqldb", "mysqlconnector"])
def test_another_driver_is_refused_and_those_that_work_are_named(driver: str) -> None:
    with pytest.raises(InvalidURL, match="asyncmy, pymysql"):
        Database(f"mysql+{driver}://shop:secret@db.example/shop")


@pytest.mark.parametrize("side", SIDES)
def test_a_mariadb_url_speaks_mariadbs_dialect(
    mariadb: MariaServer, mysql_database: str, side: str
) -> None:
    work = Work(mariadb.url(mysql_database, name="mariadb"), side)
    assert work.room.engine.dialect.name == "mariadb"
    assert work.unit(ONE) == 1
    work.close()


@pytest.mark.parametrize("side", SIDES)
def test_a_socket_is_a_parameter(mariadb: MariaServer, mysql_database: str, side: str) -> None:
    place = mariadb.folder / "socket"
    account = f"root:{mariadb.password}"
    work = Work(f"mysql://{account}@/{mysql_database}?unix_socket={place}", side, pool_ping_after=0)
    for _ in range(2):
        assert work.unit(ONE) == 1
    work.close()


# -- round trips -------------------------------------------------------------------------------


class Work:
    """Units of work on one side, in a loop that lives on."""

    def __init__(self, url: str, side: str, **options: Any) -> None:
        self.side = side
        self.manager = DatabaseSessionManager().init(url, metadata=Model.metadata, **options)
        self.room = self.manager.sync if side == "sync" else self.manager
        self.runner = asyncio.Runner()

    def unit(self, statement: str, verb: str = "session", **options: Any) -> Any:
        """Run a statement in a scope of its own, and return the scalar."""
        if self.side == "sync":
            with getattr(self.room, verb)(**options) as db:
                result = db.execute(text(statement))
                return result.scalar() if result.returns_rows else None

        async def unit() -> Any:
            async with getattr(self.manager, verb)(**options) as db:
                result = await db.execute(text(statement))
                return result.scalar() if result.returns_rows else None

        return self.runner.run(unit())

    def fails(self, *statements: str, verb: str = "session") -> None:
        """Run statements in one scope, and leave it by an exception."""
        if self.side == "sync":
            with pytest.raises(ZeroDivisionError), getattr(self.room, verb)() as db:
                for statement in statements:
                    try:
                        db.execute(text(statement))
                    except DBAPIError:
                        pass
                raise ZeroDivisionError
            return

        async def unit() -> None:
            with pytest.raises(ZeroDivisionError):
                async with getattr(self.manager, verb)() as db:
                    for statement in statements:
                        try:
                            await db.execute(text(statement))
                        except DBAPIError:
                            pass
                    raise ZeroDivisionError

        self.runner.run(unit())

    def close(self) -> None:
        self.runner.run(self.manager.close())
        self.runner.close()


@pytest.fixture(params=SIDES)
def wired(
    request: pytest.FixtureRequest, mariadb: MariaServer, mysql_database: str
) -> Iterator[tuple[Work, CommandCounter]]:
    """Work through a counter, on a table with one row."""
    mariadb.execute("CREATE TABLE item (id int PRIMARY KEY, value int NOT NULL)", mysql_database)
    mariadb.execute("INSERT INTO item VALUES (1, 42)", mysql_database)
    with CommandCounter(mariadb.host, mariadb.port) as wire:
        url = make_url(mariadb.url(mysql_database)).set(port=wire.port)
        work = Work(
            url.render_as_string(hide_password=False),
            request.param,
            pool_ping_after=60,
            pool_size=1,
            max_overflow=0,
        )
        for verb in ("session", "reader"):
            work.unit(FORTY_TWO, verb)
        wire.commands.clear()
        yield work, wire
        work.close()


def test_the_kernel_asks_for_a_server_that_is_silent(wired: Any) -> None:
    """A wire that was cut without a word is noticed in a minute, not in hours."""
    work, _ = wired
    seen: list[int] = []

    def look(connection: Any) -> None:
        driver = connection.connection.driver_connection
        descriptor = MySQL(make_url("mysql://")).descriptor(driver)
        assert descriptor is not None
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as same:
            seen.append(same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            options = (
                socket.TCP_KEEPIDLE,
                socket.TCP_KEEPINTVL,
                socket.TCP_KEEPCNT,
                socket.TCP_USER_TIMEOUT,
            )
            seen.extend(same.getsockopt(socket.IPPROTO_TCP, option) for option in options)

    if work.side == "sync":
        with work.room.connect() as connection:
            look(connection)
    else:

        async def main() -> None:
            async with work.manager.connect() as connection:
                await connection.run_sync(look)

        work.runner.run(main())
    assert seen == [1, 30, 10, 3, 60_000]


def test_a_session_sends_its_statements_and_commit(wired: Any) -> None:
    """The server begins by itself, and no ROLLBACK follows a COMMIT."""
    work, wire = wired
    for _ in range(3):
        assert work.unit(FORTY_TWO) == 42
    assert wire.commands == [FORTY_TWO, "COMMIT"] * 3


def test_a_reader_sends_its_statements_alone(wired: Any) -> None:
    work, wire = wired
    for _ in range(3):
        assert work.unit(FORTY_TWO, "reader") == 42
    assert wire.commands == [FORTY_TWO] * 3


def test_a_session_that_fails_is_rolled_back_once(wired: Any) -> None:
    work, wire = wired
    work.fails("UPDATE item SET value = 7")
    assert wire.commands == ["UPDATE item SET value = 7", "ROLLBACK"]
    assert work.unit(FORTY_TWO) == 42


def test_a_session_whose_only_statement_failed_is_rolled_back(wired: Any) -> None:
    """An error says nothing about the transaction: the statement may have begun one."""
    work, wire = wired
    work.fails("INSERT INTO item VALUES (1, 43)")
    assert wire.commands == ["INSERT INTO item VALUES (1, 43)", "ROLLBACK"]


def test_a_snapshot_that_a_select_began_ends_with_its_session(
    wired: Any, mariadb: MariaServer, mysql_database: str
) -> None:
    """PyMySQL does not look at what the server says of the transaction behind rows."""
    work, wire = wired
    work.fails(FORTY_TWO)
    assert wire.commands == [FORTY_TWO, "ROLLBACK"]
    mariadb.execute("UPDATE item SET value = 43", mysql_database)
    assert work.unit(FORTY_TWO) == 43


def test_what_a_reader_began_by_hand_is_rolled_back(wired: Any) -> None:
    work, wire = wired
    work.fails("START TRANSACTION", FORTY_TWO, verb="reader")
    assert wire.commands == ["START TRANSACTION", FORTY_TWO, "ROLLBACK"]


def test_read_only_sessions_in_a_row_tell_the_server_once(wired: Any) -> None:
    """And the first that writes tells it once as well."""
    work, wire = wired
    for _ in range(3):
        assert work.unit(FORTY_TWO, read_only=True) == 42
    told = "SET SESSION TRANSACTION READ"
    assert wire.commands == [f"{told} ONLY", *[FORTY_TWO, "COMMIT"] * 3]
    wire.commands.clear()
    for _ in range(2):
        work.unit("UPDATE item SET value = value + 1")
    update = "UPDATE item SET value = value + 1"
    assert wire.commands == [f"{told} WRITE", *[update, "COMMIT"] * 2]


def test_a_statement_with_a_warning_costs_no_question(wired: Any) -> None:
    work, wire = wired
    work.unit("DROP TABLE IF EXISTS nothing")
    assert wire.commands == ["DROP TABLE IF EXISTS nothing", "COMMIT"]


def test_an_isolation_level_is_set_and_set_back_in_two_commands_each(wired: Any) -> None:
    work, wire = wired
    work.unit(FORTY_TWO, isolation_level="SERIALIZABLE")
    level = "SET SESSION TRANSACTION ISOLATION LEVEL"
    assert wire.commands == [
        *(f"{level} SERIALIZABLE", "COMMIT", FORTY_TWO, "COMMIT"),
        *(f"{level} REPEATABLE READ", "COMMIT"),
    ]
    assert work.unit(FORTY_TWO) == 42
    assert wire.commands[6:] == [FORTY_TWO, "COMMIT"]  # the connection is still the same


def test_pool_pre_ping_costs_one_command(mariadb: MariaServer, mysql_database: str) -> None:
    with CommandCounter(mariadb.host, mariadb.port) as wire:
        url = make_url(mariadb.url(mysql_database)).set(port=wire.port)
        for side in SIDES:
            where = url.render_as_string(hide_password=False)
            work = Work(where, side, pool_pre_ping=True, pool_size=1)
            work.unit(ONE)
            wire.commands.clear()
            work.unit(ONE)
            assert wire.commands == ["command 14", ONE, "COMMIT"]
            work.close()


# -- dead and frozen ---------------------------------------------------------------------------


def kill(url: str) -> int:
    """End every connection to the database, and come back when all are gone."""
    numbers = backends(url)
    with mysql_server(url) as cursor:
        for number in numbers:
            cursor.execute(f"KILL {number}")
    until(lambda: backends(url), lambda left: not left)
    time.sleep(0.01)
    return len(numbers)


def killed(url: str, loop: str) -> None:
    manager = DatabaseSessionManager().init(url, pool_size=5, max_overflow=0)

    async def unit(together: asyncio.Barrier | None = None) -> None:
        async with manager.session() as db:
            assert await db.scalar(text("SELECT 1")) == 1
            if together is not None:
                await together.wait()

    async def main() -> None:
        for number in range(6):
            together = asyncio.Barrier(5)
            await asyncio.gather(*(unit(together) for _ in range(5)))
            assert kill(url) == 5  # in the loop's own thread, which has seen nothing of it
            if number % 2:
                await asyncio.gather(*(unit() for _ in range(20)))
            else:
                for _ in range(20):
                    await unit()
        await manager.close()

    run_on(loop, main())


@pytest.mark.parametrize("loop", LOOPS)
def test_killed_connections_cost_no_unit_an_error(mysql_url: str, loop: str) -> None:
    run(killed, mysql_url, loop)


def killed_sync(url: str) -> None:
    database = Database(url, pool_size=5, max_overflow=0)
    for _ in range(4):
        together = threading.Barrier(5)

        def warm(_: int, together: threading.Barrier = together) -> None:
            with database.session() as db:
                db.execute(text("SELECT 1"))
                together.wait()

        in_threads(5, warm)
        assert kill(url) == 5
        for _ in range(20):
            with database.session() as db:
                assert db.scalar(text("SELECT 1")) == 1
    database.close()


def test_killed_connections_cost_no_unit_an_error_in_threads(mysql_url: str) -> None:
    run(killed_sync, mysql_url)


@pytest.fixture
def frozen(mariadb: MariaServer) -> Iterator[Any]:
    """Freeze the server from a call on."""
    yield mariadb.freeze
    mariadb.thaw()


@pytest.mark.parametrize("side", SIDES)
def test_connecting_to_a_frozen_server_has_a_deadline(
    mysql_url: str, frozen: Any, side: str
) -> None:
    """It takes the connection, and says nothing: the drivers' own deadline has passed by then."""
    work = Work(mysql_url, side, pool_timeout=1)
    frozen()
    began = time.monotonic()
    with pytest.raises((DBAPIError, TimeoutError, Exception), match="(?i)timed out|did not answer"):
        work.unit(ONE)
    assert time.monotonic() - began < 10
    work.close()


def test_a_statement_may_take_longer_than_connecting(mysql_url: str) -> None:
    """PyMySQL counts the deadline for connecting in reads, and must forget it."""
    with Database(mysql_url, pool_timeout=0.5) as database, database.session() as db:
        assert db.scalar(text("SELECT sleep(1.2)")) == 0


def test_an_idle_connection_of_a_frozen_server_is_not_asked_for_ever(
    mysql_url: str, frozen: Any
) -> None:
    work = Work(mysql_url, "sync", pool_timeout=1, pool_pre_ping=True)
    work.unit(ONE)
    frozen()
    began = time.monotonic()
    with pytest.raises((DBAPIError, ConnectTimeout)):
        work.unit(ONE)
    assert time.monotonic() - began < 10
    work.close()


@pytest.mark.parametrize("side", SIDES)
def test_close_ends_what_runs(mysql_url: str, side: str) -> None:
    work = Work(mysql_url, side)
    work.unit(ONE)
    ended: list[BaseException] = []

    def sleep() -> None:
        try:
            with work.manager.sync_session() as db:
                db.execute(text("SELECT sleep(60)"))
        except BaseException as error:
            ended.append(error)

    def is_asleep(_: Any = None) -> bool:
        with mysql_server(mysql_url) as cursor:
            cursor.execute("SHOW PROCESSLIST")
            return any(str(row[7]).endswith("sleep(60)") for row in cursor.fetchall())

    thread = threading.Thread(target=sleep)
    thread.start()
    until(is_asleep, bool)
    if side == "sync":
        work.manager.sync.close(timeout=0)
    else:
        work.runner.run(work.manager.close(timeout=0))
    thread.join(15)
    assert not thread.is_alive()
    assert len(ended) == 1
    until(lambda: backends(mysql_url), lambda left: not left)
    work.runner.close()


# -- the schema --------------------------------------------------------------------------------


def create(number: int, url: str) -> None:
    """Create all, on one side or the other, and say what was created here."""
    table = Item.metadata.tables["item"]
    event.listen(table, "after_create", lambda *_, **__: say("created"))
    event.listen(table, "before_create", lambda *_, **__: time.sleep(0.2))
    if number % 2:
        with Database(url, metadata=Item.metadata) as database:
            database.create_all()
        return

    async def main() -> None:
        async with DatabaseSessionManager().init(url, metadata=Item.metadata) as manager:
            await manager.create_all()

    asyncio.run(main())


def create_and_hang(number: int, url: str) -> None:
    def hang(*_: Any, **__: Any) -> None:
        say("hangs")
        time.sleep(1000)

    event.listen(Item.metadata.tables["item"], "before_create", hang)
    with Database(url, metadata=Item.metadata) as database:
        database.create_all()


@pytest.mark.parametrize("count", [6, pytest.param(16, marks=pytest.mark.soak)])
def test_many_start_at_once_and_the_table_is_created_once(mysql_url: str, count: int) -> None:
    with starters(count, create, mysql_url) as crowd:
        for starter in crowd:
            starter.begin()
        ends = [starter.ended() for starter in crowd]
    assert [(code, err) for code, _, err in ends if code] == []
    assert sum(out.count("created") for _, out, _ in ends) == 1


def test_a_holder_is_named_and_when_it_is_killed_the_next_goes_on(mysql_url: str) -> None:
    with starters(1, create_and_hang, mysql_url) as (holder,):
        holder.begin()
        holder.says("hangs")
        with Database(mysql_url, metadata=Item.metadata, schema_timeout=0.3) as database:
            with pytest.raises(SchemaLocked) as caught:
                database.create_all()
        (number,) = backends(mysql_url)
        assert f"held by connection {number} (user root, from 127.0.0.1" in caught.value.message
        holder.kill()
        create(1, mysql_url)
    with Database(mysql_url) as database:
        assert "item" in inspect(database.engine).get_table_names()


def name_in_docs(url: str) -> str:
    """Return the lock's name as the docs have it."""
    docs = (Path(__file__).parent.parent / "docs" / "migrations.md").read_text()
    assert re.search(r"GET_LOCK\(CONCAT\('engineroom:', SHA1\(DATABASE\(\)\)\)", docs)
    return "engineroom:" + hashlib.sha1(str(make_url(url).database).encode()).hexdigest()


@pytest.mark.parametrize("side", [*SIDES, "foreign"])
def test_another_tool_can_take_the_lock_and_where_nothing_is_missing_nobody_waits(
    mysql_url: str, side: str
) -> None:
    def create_items() -> None:
        if side == "foreign":
            from sqlalchemy import create_engine

            engine = create_engine(mysql_url.replace("mysql:", "mysql+pymysql:"))
            schema.create_all(engine, Item.metadata, 0.2)
            engine.dispose()
        elif side == "sync":
            with Database(mysql_url, metadata=Item.metadata, schema_timeout=0.2) as database:
                database.create_all()
        else:

            async def main() -> None:
                manager = DatabaseSessionManager()
                async with manager.init(mysql_url, metadata=Item.metadata, schema_timeout=0.2):
                    await manager.create_all()

            asyncio.run(main())

    with mysql_server(mysql_url) as cursor:
        cursor.execute("SELECT GET_LOCK(%s, 0)", [name_in_docs(mysql_url)])
        assert cursor.fetchone() == (1,)
        with pytest.raises(SchemaLocked):
            create_items()
        cursor.execute("DO RELEASE_LOCK(%s)", [name_in_docs(mysql_url)])
        create_items()
        cursor.execute("DO GET_LOCK(%s, 0)", [name_in_docs(mysql_url)])
        create_items()


@pytest.mark.parametrize("side", SIDES)
def test_create_all_leaves_no_lock_and_the_servers_guards_as_they_were(
    mysql_url: str, side: str
) -> None:
    work = Work(mysql_url, side, pool_size=1, max_overflow=0)
    guards = "SELECT CONCAT(@@wait_timeout, ' ', @@tx_read_only, ' ', @@tx_isolation)"
    before = work.unit(guards)
    for _ in range(2):
        work.room.create_all() if side == "sync" else work.runner.run(work.manager.create_all())
        assert work.unit(guards) == before
        name = name_in_docs(mysql_url)
        assert work.unit(f"SELECT COALESCE(IS_USED_LOCK('{name}'), 0)") == 0
    work.close()


def test_creating_outlasts_the_servers_guards(mariadb: MariaServer, mysql_url: str) -> None:
    """A server that ends who is idle would let a second starter begin."""

    def dawdle(*_: Any, **__: Any) -> None:
        time.sleep(2.5)

    table = Item.metadata.tables["item"]
    event.listen(table, "before_create", dawdle)
    mariadb.execute("SET GLOBAL wait_timeout = 1, GLOBAL idle_transaction_timeout = 1")
    try:
        with Database(mysql_url, metadata=Item.metadata) as database:
            database.create_all()
    finally:
        mariadb.execute("SET GLOBAL wait_timeout = 28800, GLOBAL idle_transaction_timeout = 0")
        event.remove(table, "before_create", dawdle)


def test_who_waits_in_vain_leaves_the_guards_as_they_were(mysql_url: str) -> None:
    with mysql_server(mysql_url) as cursor:
        cursor.execute("DO GET_LOCK(%s, 0)", [name_in_docs(mysql_url)])
        options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "schema_timeout": 0.1}
        with Database(mysql_url, metadata=Item.metadata, **options) as database:
            with pytest.raises(SchemaLocked):
                database.create_all()
            with database.session() as db:
                assert db.scalar(text("SELECT @@wait_timeout")) == 28800


def test_a_create_all_that_fails_gives_the_lock_back(mysql_url: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    name = name_in_docs(mysql_url)
    event.listen(Item.metadata.tables["item"], "before_create", fail)
    try:
        with Database(mysql_url, metadata=Item.metadata, pool_size=1) as database:
            with pytest.raises(ZeroDivisionError):
                database.create_all()
            with database.session() as db:
                assert db.scalar(text(f"SELECT IS_USED_LOCK('{name}')")) is None
    finally:
        event.remove(Item.metadata.tables["item"], "before_create", fail)


def steps(url: str) -> list[str]:
    """Return what the migrations did, by their side effects."""
    with Database(url) as database, database.connect() as connection:
        return list(connection.scalars(text("SELECT step FROM ran ORDER BY step")))


@pytest.mark.parametrize(
    ("driver", "count"),
    [("pymysql", 6), ("asyncmy", 3)]
    + [pytest.param(driver, 16, marks=pytest.mark.soak) for driver in ("pymysql", "asyncmy")],
)
def test_many_upgrade_at_once_and_each_migration_runs_once(
    mariadb: MariaServer, mysql_database: str, tmp_path: Path, driver: str, count: int
) -> None:
    url = mariadb.url(mysql_database, driver)
    ini = project(tmp_path, f"time.sleep(0.5)\n    {FIRST}", SECOND)
    ends = together(count, alembic, str(ini), "-x", f"url={url}", "upgrade", "head")
    assert [(code, err) for code, _, err in ends if code] == []
    assert steps(url) == ["first", "second"]


def test_one_is_killed_in_a_migration_and_the_others_go_on(mysql_url: str, tmp_path: Path) -> None:
    hang = """op.execute("INSERT INTO ran VALUES ('hangs')")
    print("hangs", flush=True)
    time.sleep(1000)"""
    where = ("-x", f"url={mysql_url}", "upgrade", "head")
    with starters(1, alembic, str(project(tmp_path / "old", FIRST, hang)), *where) as (holder,):
        holder.begin()
        holder.says("hangs")
        with starters(3, alembic, str(project(tmp_path / "new")), *where) as crowd:
            for starter in crowd:
                starter.begin()
            time.sleep(0.5)
            assert all(starter.process.is_alive() for starter in crowd)
            holder.kill()
            ends = [starter.ended() for starter in crowd]
    assert [(code, err) for code, _, err in ends if code] == []
    assert steps(mysql_url) == ["first", "second"]


# -- what it cannot do -------------------------------------------------------------------------


def test_ddl_commits_what_was_before_it(mysql_url: str) -> None:
    """As docs/databases.md says: no error tells of it, and no rollback undoes it."""
    with Database(mysql_url, metadata=Model.metadata) as database:
        database.create_all()
        with pytest.raises(ZeroDivisionError), database.session() as db:
            db.execute(insert(Item).values(id=1))
            db.execute(text("CREATE TABLE other (n int)"))
            db.execute(insert(Item).values(id=2))
            raise ZeroDivisionError
        with database.session() as db:
            assert db.scalars(select(Item.id)).all() == [1]
            assert db.scalar(text("SELECT count(*) FROM other")) == 0


def test_a_transaction_is_no_sandbox(mysql_url: str) -> None:
    with Database(mysql_url) as database:
        with pytest.raises(SandboxError, match="DDL"), sandbox(database):
            pass


SHOP = """
CREATE TABLE shelf (id int PRIMARY KEY AUTO_INCREMENT, name varchar(20) DEFAULT '50%');
CREATE TABLE book (
    id int PRIMARY KEY, shelf_id int NOT NULL REFERENCES shelf (id), price int,
    double_price int AS (price * 2)
);
INSERT INTO shelf VALUES (7, 'low');
INSERT INTO book (id, shelf_id, price) VALUES (1, 7, 21)
"""


def make_shop(url: str) -> None:
    with Database(url) as database, database.connect() as connection:
        for statement in SHOP.split(";"):
            connection.execute(text(statement))


def test_a_clone_has_the_tables_and_their_rows_and_goes(
    mariadb: MariaServer, mysql_url: str
) -> None:
    with clones(mysql_url, make_shop) as template:
        one, two = template.clone(), template.clone()
        with Database(one) as database:
            with database.session() as db:
                assert db.scalar(text("SELECT double_price FROM book")) == 42
                db.execute(text("INSERT INTO shelf (id) VALUES (NULL)"))
                shelves = db.execute(text("SELECT id, name FROM shelf ORDER BY id")).all()
                assert shelves == [(7, "low"), (8, "50%")]
            with pytest.raises(DBAPIError, match="foreign key"), database.session() as db:
                db.execute(text("INSERT INTO book (id, shelf_id) VALUES (2, 99)"))
            template.discard(one)  # though somebody is connected
        with Database(two) as database, database.session() as db:
            assert db.scalar(text("SELECT count(*) FROM shelf")) == 1
        with pytest.raises(ValueError, match="no clone"):
            template.discard(one)
        with pytest.raises(ValueError, match="no clone"):
            template.discard(mysql_url)
    assert mariadb.execute("SHOW DATABASES LIKE 'engineroom%'") == ()


def test_what_a_clone_would_lack_is_refused(mariadb: MariaServer, mysql_url: str) -> None:
    name = str(make_url(mysql_url).database)
    mariadb.execute("CREATE TABLE plain (n int)", name)
    mariadb.execute("CREATE VIEW seen AS SELECT n FROM plain", name)
    mariadb.execute("CREATE TRIGGER t BEFORE INSERT ON plain FOR EACH ROW SET NEW.n = 1", name)
    with pytest.raises(TemplateUnusable, match="VIEW seen, TRIGGER t"), clones(mysql_url):
        pass


@pytest.mark.parametrize("side", SIDES)
def test_a_sandbox_is_a_database_of_its_own(
    mariadb: MariaServer, mysql_url: str, side: str
) -> None:
    """What it commits, tables included, goes with it; on both sides."""
    work = Work(mysql_url, side)
    work.manager.sync.create_all()
    work.unit("INSERT INTO item (id, value) VALUES (1, 1)")
    for _ in range(2):
        with sandbox(work.manager, isolation="database"):
            work.unit("INSERT INTO item (id, value) VALUES (2, 2)")
            work.unit("CREATE TABLE more (n int)")
            engine = work.manager.sync_engine  # whose dialect knows its database by name
            assert {"item", "more"} <= set(inspect(engine).get_table_names())
            assert work.unit("SELECT count(*) FROM item", "reader") == 2
            with work.manager.sync_session() as db:
                assert db.scalar(text("SELECT count(*) FROM item")) == 2
        assert work.unit("SELECT count(*) FROM item") == 1
    assert "more" not in inspect(work.manager.sync_engine).get_table_names()
    assert mariadb.execute("SHOW DATABASES LIKE 'engineroom%'") == ()
    work.close()


def test_a_server_at_its_limit_says_so_in_its_own_words(
    mariadb: MariaServer, mysql_url: str
) -> None:
    mariadb.execute("SET GLOBAL max_connections = 10")
    kept: list[Any] = []
    try:
        with pytest.raises(pymysql.OperationalError, match="1040"):
            while True:
                kept.append(one_more(mysql_url))  # they are to be closed
        for side in SIDES:
            work = Work(mysql_url, side, pool_timeout=2)
            with pytest.raises(OperationalError) as caught:
                work.unit(ONE)
            assert caught.value.orig is not None
            assert caught.value.orig.args[0] == 1040
            work.close()
    finally:
        for connection in kept:
            connection.close()
        until(lambda: backends(mysql_url), lambda left: not left)
        mariadb.execute("SET GLOBAL max_connections = 200")


def one_more(url: str) -> Any:
    place = make_url(url)
    return pymysql.connect(
        host=place.host,
        port=place.port or 0,
        user=place.username,
        password=place.password,
        database=place.database,
        ssl_disabled=True,
    )


@pytest.mark.parametrize("side", SIDES)
def test_a_reader_streams(mysql_url: str, side: str) -> None:
    """And what was not read is read when the stream is closed: the connection is whole after it."""
    work = Work(mysql_url, side, pool_size=1, max_overflow=0)
    numbers = text("SELECT seq FROM seq_1_to_5000")
    if side == "sync":
        with work.manager.sync.reader() as db:
            rows = db.execute(numbers, execution_options={"yield_per": 10})
            assert [row.seq for row, _ in zip(rows, range(25), strict=False)] == [*range(1, 26)]
            rows.close()
            assert db.scalar(text(ONE)) == 1
    else:

        async def main() -> None:
            async with work.manager.reader() as db:
                rows = await db.stream(numbers, execution_options={"yield_per": 10})
                assert [(await rows.fetchone()).seq for _ in range(25)] == [*range(1, 26)]
                await rows.close()
                assert await db.scalar(text(ONE)) == 1

        work.runner.run(main())
    assert len(backends(mysql_url)) == 1
    work.close()


LONG = "SELECT a.seq FROM seq_1_to_60000 AS a, seq_1_to_60000 AS b"  # nobody reads that to its end


@pytest.mark.filterwarnings("ignore:Previous unbuffered")  # what asyncmy says to an application
@pytest.mark.parametrize("verb", ["session", "reader", "connect"])
def test_a_cancelled_stream_is_not_read_to_its_end(mysql_url: str, verb: str) -> None:
    work = Work(mysql_url, "async", pool_size=1, max_overflow=0)

    async def read(begun: asyncio.Event) -> None:
        async with getattr(work.manager, verb)() as db:
            async for _ in await db.stream(text(LONG)):
                begun.set()
                await asyncio.sleep(0.001)

    async def main() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(read(begun))
        await begun.wait()
        task.cancel()
        await asyncio.wait((task,), timeout=4)  # one is promised; a clean-up is given up after 5
        assert task.done()
        assert task.cancelled()

    work.runner.run(main())
    until(lambda: [row for row in busy(mysql_url) if LONG in str(row)], lambda left: not left)
    assert work.unit(ONE) == 1
    assert work.unit(ONE, "reader") == 1
    work.close()


def busy(url: str) -> Any:
    with mysql_server(url) as cursor:
        cursor.execute("SELECT info FROM information_schema.processlist WHERE info IS NOT NULL")
        return cursor.fetchall()


# -- the server's deadlines --------------------------------------------------------------------

SHOW = "SELECT CONCAT_WS(' ', @@idle_transaction_timeout, @@max_statement_time)"


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


@pytest.mark.parametrize("side", SIDES)
def test_the_server_keeps_deadlines(mariadb: MariaServer, mysql_database: str, side: str) -> None:
    work = Work(mariadb.url(mysql_database), side, lock_timeout=7)
    assert work.unit(SHOW) == "60 0.000000"
    assert work.unit("SELECT @@innodb_lock_wait_timeout") == 7
    with pytest.raises(DBAPIError) as caught:
        work.unit("SELECT SLEEP(20) FROM information_schema.tables", statement_timeout=0.2)
    assert "the statement ran for 0.2 s (statement_timeout=0.2 of this session)" in notes_of(
        caught.value
    )
    assert work.unit(SHOW) == "60 0.000000"
    work.close()


def test_who_is_idle_in_a_transaction_for_too_long_is_ended(
    mariadb: MariaServer, mysql_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    mariadb.execute("CREATE TABLE item (value int)", mysql_database)
    with Database(mariadb.url(mysql_database), idle_in_transaction_timeout=1) as database:
        with pytest.raises(DBAPIError) as caught, database.session() as db:
            db.execute(text(FORTY_TWO))
            time.sleep(2.5)
            db.execute(text(ONE))
        assert "DB_IDLE_IN_TRANSACTION_TIMEOUT=1" in notes_of(caught.value)
        assert "held by the session of thread MainThread" in caplog.text
        with database.session() as db:
            assert db.scalar(text(ONE)) == 1
