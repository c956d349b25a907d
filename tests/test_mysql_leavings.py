"""Whatever a session leaves on a connection of MySQL, the next one does not see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mariadb_server import MariaServer
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only, greenlet_spawn

from engineroom import DatabaseSessionManager

Way = Callable[[Connection], object]
SIDES = ["sync", "async"]
MULTI_STATEMENTS = 65536  # asyncmy asks for it always

TABLES = """
CREATE TABLE item (id int PRIMARY KEY AUTO_INCREMENT, value varchar(100));
CREATE TABLE other (id int);
INSERT INTO item VALUES (1, 'is here');
CREATE SEQUENCE numbers;
CREATE PROCEDURE leave_it() SET @tenant = 'A'
"""
# All that one can see of a session, but for what it prepared and opened.
SEEN = [
    "UPDATE other SET id = 7",
    "SELECT value FROM item",
    "SELECT @tenant, DATABASE(), LAST_INSERT_ID(), LASTVAL(numbers)",
    "SELECT COALESCE(IS_USED_LOCK('left') = CONNECTION_ID(), 0)",  # (the old one's may end later)
    """SELECT SUM(CRC32(CONCAT(variable_name, variable_value)))
    FROM information_schema.session_variables
    WHERE variable_name NOT IN ('timestamp', 'pseudo_thread_id', 'warning_count', 'error_count',
        'rand_seed1', 'rand_seed2', 'last_insert_id', 'identity')""",
]
FAILS = ["EXECUTE prepared", "HANDLER item READ FIRST"]


def driver_of(connection: Connection) -> Any:
    return connection.connection.driver_connection


def by_driver(verb: str, *arguments: Any) -> Way:
    def call(connection: Connection) -> None:
        called = getattr(driver_of(connection), verb)(*arguments)
        if connection.dialect.is_async:
            await_only(called)

    return call


def by_charset(connection: Connection) -> None:
    if connection.dialect.is_async:  # asyncmy 0.2.18 has the verb, and it always raises
        connection.exec_driver_sql("SET NAMES latin1")
    else:
        driver_of(connection).set_character_set("latin1")


def by_cursor(connection: Connection) -> None:
    connection.connection.cursor().execute(b"SET @tenant = 'A'")


def by_executemany(connection: Connection) -> None:
    statement = text("UPDATE item SET id = 1 WHERE (@tenant := :tenant) = ''")
    connection.execute(statement, [{"tenant": "A"}, {"tenant": "B"}])


def by_a_prepared_statement(connection: Connection) -> None:
    if not connection.dialect.is_async:  # PyMySQL has none
        by_cursor(connection)
        return
    statement = await_only(driver_of(connection).prepare("SET @tenant = ?"))
    await_only(statement.execute(("A",)))


WAYS: list[str | Way] = [
    "SET @tenant = 'A'",
    "set/**/@tenant='A'",
    "SET\n\t@x = 1, @tenant = 'A'",
    "/* c */ SET @tenant = 'A'",
    "-- it's\nSET @tenant = 'A'",
    "# it's\nSET @tenant = 'A'",
    "/*!40101 SET @tenant = 'A' */",
    "/*M! SET @tenant = 'A' */",
    "SELECT 'A' INTO @tenant",
    "SELECT 'A' INTO/**/@`tenant`",
    "SELECT 'it''s \\' INTO', 'A' INTO @x, @tenant",
    f"SELECT 'A' /* {'far ' * 2000} */ INTO @tenant",
    "WITH x AS (SELECT 'A' AS a) SELECT a FROM x INTO @tenant",
    "SELECT @tenant := 'A'",
    "UPDATE item SET value = (@tenant := 'is here')",
    "GET DIAGNOSTICS @tenant = ROW_COUNT",
    "EXECUTE IMMEDIATE 'SET @tenant = 1'",
    "PREPARE prepared FROM 'SELECT 1'",
    "BEGIN NOT ATOMIC SET @tenant = 'A'; END",
    "IF TRUE THEN SET @tenant = 'A'; END IF",
    "SET STATEMENT max_statement_time = 9 FOR SET @tenant = 'A'",
    "SET STATEMENT sql_mode = '\\' for select ' FOR SET @tenant = 'A'",
    "SELECT 1; SET @tenant = 'A'",
    "SELECT ';'; SELECT 'A' INTO @tenant",
    "CALL leave_it()",
    "SET @@session.wait_timeout = 77",
    "SET SESSION sort_buffer_size = 65536",
    "SET @x = 1, SESSION wait_timeout = 77",
    "SET NAMES latin1",
    "set/**/names latin1",
    "SET time_zone = '+05:00'",
    "SET sql_mode = 'ANSI_QUOTES'",
    "SET autocommit = 1",
    "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SET SESSION TRANSACTION READ ONLY",
    "SET TRANSACTION READ ONLY",
    "SELECT get_lock('left', 0)",
    "SELECT get_lock/**/('left', 0)",
    "SELECT `get_lock`('left', 0)",
    "DO get_lock('left', 0)",
    "USE mysql",
    "HANDLER item OPEN",
    "LOCK TABLES item READ",
    "LOCK TABLE item WRITE",
    "FLUSH TABLES WITH READ LOCK",
    "CREATE TEMPORARY TABLE item SELECT 'is temporary' AS value",
    "CREATE/**/OR REPLACE TEMPORARY TABLE item SELECT 'is temporary' AS value",
    "SELECT LAST_INSERT_ID(77)",
    "UPDATE item SET id = LAST_INSERT_ID(id)",
    "SELECT NEXTVAL(numbers)",
    "SELECT NEXT\nVALUE  FOR numbers",
    by_driver("autocommit", True),
    by_driver("select_db", "mysql"),
    by_charset,
    by_driver("begin"),
    by_cursor,
    by_executemany,
    by_a_prepared_statement,
]
NOTHING = [
    "SELECT 1;",
    "/* c */ SELECT 1 -- ; SET @x = 1",
    "(SELECT 1) UNION (SELECT 2)",
    "WITH x AS (SELECT 1 AS a) SELECT a FROM x",
    "VALUES (1)",
    "SELECT 'SET @x = 1; SET @y := ''2'' /*! */ INTO @x get_lock(\\'', \"; USE it\", 1 AS `it's`",
    "SELECT @@version, @tenant, LAST_INSERT_ID()",
    "SELECT * FROM item WHERE value = 'a@b.example; or so' FOR UPDATE",
    "INSERT INTO other VALUES (8); ",
    "INSERT INTO item VALUES (1, '') ON DUPLICATE KEY UPDATE id = LAST_INSERT_ID(id)",
    "DELETE FROM other",
    "SHOW TABLES",
    "DESCRIBE item",
    "CREATE TABLE third (id int)",
    "ALTER TABLE third ADD COLUMN n int",
    "TRUNCATE third",
    "DROP TABLE third",
    "SAVEPOINT a",
    "BEGIN",
    "START TRANSACTION",
    "SET STATEMENT max_statement_time = 9, lock_wait_timeout = 3 FOR SELECT 1",
]


def connection_of(scope: Any) -> Connection:
    return scope if isinstance(scope, Connection) else scope.connection()


class Room:
    """Sessions on one connection, of either side."""

    def __init__(self, url: str, side: str) -> None:
        self.side = side
        self.manager = DatabaseSessionManager().init(url, pool_size=1, max_overflow=0)
        self.runner = asyncio.Runner()

    def unit(self, work: Way, *, verb: str = "session", fails: bool = False, **options: Any) -> Any:
        """Work on the connection of one session, which ends well or not."""
        if self.side == "sync":
            with getattr(self.manager.sync, verb)(**options) as db:
                result = work(connection_of(db))
                if fails:
                    raise ZeroDivisionError
            return result

        async def unit() -> Any:
            async with getattr(self.manager, verb)(**options) as db:
                result = await db.run_sync(lambda one: work(connection_of(one)))
                if fails:
                    raise ZeroDivisionError
            return result

        return self.runner.run(unit())

    def leave(self, way: str | Way, **options: Any) -> None:
        """Leave something, if the server has it so."""
        work = way if callable(way) else (lambda connection: connection.exec_driver_sql(way))
        try:
            self.unit(work, **options)
        except (ZeroDivisionError, DBAPIError):
            pass

    def number(self) -> int:
        return int(self.unit(lambda connection: connection.scalar(text("SELECT CONNECTION_ID()"))))

    def close(self) -> None:
        self.runner.run(self.manager.close())
        self.runner.close()


def see(connection: Connection) -> list[Any]:
    """See all that there is, and that nothing else can be used."""
    for statement in FAILS:
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql(statement)
    seen: list[Any] = []
    for statement in SEEN:
        result = connection.exec_driver_sql(statement)
        seen += result.all() if result.returns_rows else []
    return seen


def prepared_insert(connection: Connection) -> None:
    connection.execute(text("INSERT INTO other VALUES (:id)"), {"id": 8})


@pytest.fixture(params=SIDES)
def room(
    request: pytest.FixtureRequest, mariadb: MariaServer, mysql_database: str
) -> Iterator[Room]:
    for statement in TABLES.split(";"):
        mariadb.execute(statement, mysql_database)
    query = f"client_flag={MULTI_STATEMENTS}&ssl_mode=DISABLED"
    room = Room(f"{mariadb.url(mysql_database)}?{query}", request.param)
    yield room
    room.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"fails": True}, {"isolation_level": "AUTOCOMMIT"}],
    ids=["commit", "rollback", "alone"],
)
def test_the_next_session_sees_nothing_of_what_one_left(
    room: Room, options: dict[str, Any]
) -> None:
    new = room.unit(see)
    wrong = {}
    for way in WAYS:
        room.leave(way, **options)
        try:
            seen = room.unit(see)
        except DBAPIError as error:
            seen = [str(error.orig)]
        if seen != new:
            wrong[str(way)] = set(seen) ^ set(new)
            room.leave("KILL CONNECTION_ID()")
    assert wrong == {}


@pytest.mark.parametrize("verb", ["reader", "connect"])
def test_nor_does_a_reader_or_a_connection(room: Room, verb: str) -> None:
    for statement in (
        "SET @tenant = 'A'",
        "SELECT 'A' INTO @tenant",
        "CREATE TEMPORARY TABLE t (n int)",
    ):
        room.leave(statement, verb=verb)
        assert room.unit(lambda one: one.scalar(text("SELECT @tenant")), verb=verb) is None
    with pytest.raises(DBAPIError, match="1146"):
        room.unit(lambda one: one.scalar(text("SELECT n FROM t")), verb=verb)


@pytest.mark.parametrize("side", SIDES)
def test_a_backslash_that_escapes_nothing_hides_nothing(mysql_url: str, side: str) -> None:
    room = Room(f"{mysql_url}?sql_mode=NO_BACKSLASH_ESCAPES", side)
    room.unit(lambda one: one.exec_driver_sql("SELECT '\\', 'A' INTO @x, @tenant -- '"))
    assert room.unit(lambda one: one.scalar(text("SELECT @tenant"))) is None
    room.close()


def test_who_left_nothing_keeps_the_connection(room: Room) -> None:
    first = room.number()
    for statement in NOTHING:
        room.leave(statement)
        assert room.number() == first, statement
    for options in ({"isolation_level": "SERIALIZABLE"}, {"read_only": True}, {}):
        room.leave("SELECT 1", **options)
    assert room.number() == first


def test_what_asyncmy_runs_prepared_is_committed(mariadb: MariaServer, mysql_url: str) -> None:
    """Its statements with values go another way, with `stmt_cache_size`."""
    name = str(make_url(mysql_url).database)
    mariadb.execute("CREATE TABLE other (id int)", name)
    room = Room(f"{mysql_url}?stmt_cache_size=10", "async")
    for number in range(2):
        room.unit(prepared_insert)
        assert len(mariadb.execute("SELECT id FROM other", name)) == number + 1
        with pytest.raises(DBAPIError, match="1792"):
            room.unit(prepared_insert, read_only=True)
    room.close()


def test_a_raw_connection_writes_after_a_session_that_only_read(room: Room) -> None:
    first = room.number()
    room.unit(lambda connection: connection.scalar(text("SELECT 1")), read_only=True)

    engine = room.manager.engine.sync_engine if room.side == "async" else room.manager.sync_engine

    def write() -> None:
        raw = engine.raw_connection()
        cursor = raw.cursor()
        cursor.execute("UPDATE other SET id = 7")
        raw.commit()
        raw.close()

    room.runner.run(greenlet_spawn(write)) if room.side == "async" else write()
    assert room.number() == first
