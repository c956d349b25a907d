"""A connection that comes out of the pool is like a new one, whatever the session before left."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import psycopg2.extensions
import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from engineroom import Database, DatabaseSessionManager, lending, pool
from engineroom.backends import Leaving
from engineroom.backends.postgresql import leavings
from engineroom.testing import PostgresServer, WireProxy

Way = Callable[[Connection], object]
DRIVERS = ["asyncpg", "psycopg (async)", "psycopg", "psycopg2"]
every_driver = pytest.mark.parametrize("driver", DRIVERS)

# All that one can see of a session of the server.
SEEN = """
SELECT (SELECT json_object_agg(name, setting) FROM pg_settings
        WHERE left(name, 8) <> 'plpgsql.')::text,  -- of a library that was loaded by now
    current_user, session_user, current_setting('role'),
    coalesce(current_setting('app.tenant', true), ''),  -- once set, it is '' for ever, not NULL
    (SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema()),
    (SELECT count(*) FROM pg_proc WHERE pronamespace = pg_my_temp_schema()),
    (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'),
    (SELECT count(*) FROM pg_listening_channels()),
    (SELECT count(*) FROM pg_prepared_statements WHERE from_sql),
    (SELECT count(*) FROM pg_cursors WHERE is_holdable),
    (SELECT count(*) FROM pg_replication_slots WHERE active_pid = pg_backend_pid())
"""


def say(statement: str) -> Way:
    return lambda connection: connection.exec_driver_sql(statement)


def by_text(connection: Connection) -> None:
    connection.execute(text("SELECT set_config('app.tenant', :tenant, false)"), {"tenant": "acme"})


def by_executemany(connection: Connection) -> None:
    # A statement with parameters, run for several rows, whose text sets something.
    connection.execute(
        text("INSERT INTO notes SELECT set_config('app.tenant', :tenant, false)"),
        [{"tenant": "acme"}, {"tenant": "evil"}],
    )


def by_raw_cursor(connection: Connection) -> None:
    cursor = connection.connection.cursor()
    cursor.execute("SET app.tenant = 'acme'")
    cursor.close()


def by_raw_driver(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    if connection.dialect.is_async:
        await_only(driver.execute("SET app.tenant = 'acme'"))
    elif hasattr(driver, "execute"):
        driver.execute("SET app.tenant = 'acme'")
    else:
        driver.cursor().execute(b"SET app.tenant = 'acme'")


def by_multiple(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    several = "SELECT 1; /* and */ SET app.tenant = 'acme'"
    if connection.dialect.is_async:
        await_only(driver.execute(several))
    else:
        driver.cursor().execute(several)


WAYS: dict[str, Way] = {
    "SET": say("SET work_mem = '5MB'"),
    "SET SESSION": say("SET SESSION app.tenant = 'acme'"),
    "set_config": say("SELECT set_config('app.tenant', 'acme', false)"),
    "set_config with parameters": by_text,
    "SET ROLE": say("SET ROLE visitor"),
    "SET SESSION AUTHORIZATION": say("SET SESSION AUTHORIZATION visitor"),
    "SET TIME ZONE": say("SET TIME ZONE 'Asia/Tokyo'"),
    "SET SESSION CHARACTERISTICS": say(
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE"
    ),
    "search_path": say("set search_path to tenant_a, public"),
    "temporary table": say("CREATE TEMP TABLE basket (item text)"),
    "temporary table, by SELECT INTO": say("SELECT 1 AS one INTO TEMPORARY basket"),
    "temporary view": say("CREATE OR REPLACE TEMPORARY VIEW basket AS SELECT 1"),
    "temporary sequence": say("create temporary sequence counter"),
    "temporary function": say(
        "CREATE FUNCTION pg_temp.one() RETURNS int LANGUAGE sql AS 'SELECT 1'"
    ),
    "advisory lock": say("SELECT pg_advisory_lock(42)"),
    "advisory lock, tried": say("SELECT pg_try_advisory_lock_shared(42)"),
    "LISTEN": say("LISTEN news"),
    "PREPARE": say("PREPARE one AS SELECT 1"),
    "WITH HOLD": say("DECLARE rows CURSOR WITH HOLD FOR SELECT 1"),
    "a comment before": say("-- mind the gap\n  /* and /* this */ one */ sEt app.tenant = 'acme'"),
    "DO": say("DO $$ BEGIN SET app.tenant = 'acme'; END $$"),
    "executemany": by_executemany,
    "raw cursor": by_raw_cursor,
    "raw driver": by_raw_driver,
    "several in one text": by_multiple,
    "idle timeout": say("SET idle_in_transaction_session_timeout = '1h'"),
    "a comment that a carriage return ends": say("-- mind the gap\rSET app.tenant = 'acme'"),
    "a comment before the bracket": say("SELECT set_config/*c*/('app.tenant', 'acme', false)"),
    "a name in quotes": say("""SELECT "set_config"('app.tenant', 'acme', false)"""),
    "a name in other letters": say(r"""SELECT U&"set\005fconfig"('app.tenant', 'acme', false)"""),
    "a value that looks like an end": say("SELECT set_config('app.tenant', 'a, true)', false)"),
    "UPDATE pg_settings": say("UPDATE pg_settings SET setting = '5MB' WHERE name = 'work_mem'"),
    "COPY": say("COPY (SELECT set_config('app.tenant', 'acme', false)) TO '/dev/null'"),
    "a text that runs a text": say(
        "SELECT * FROM ts_stat('SELECT to_tsvector(set_config(''app.tenant'', ''acme'', false))')"
    ),
    "slot": say("SELECT pg_create_physical_replication_slot('temporary', true, true)"),
    "DEALLOCATE ALL": say("DEALLOCATE ALL"),
    "DISCARD PLANS": say("DISCARD PLANS"),
    "temporary view, by DO": say(
        "DO $$ BEGIN EXECUTE 'CREATE TE' || 'MP VIEW v AS SELECT 1'; END $$"
    ),
    "temporary function, by DO": say(
        "DO $$ BEGIN EXECUTE 'CREATE FUNCTION pg_te' || "
        "'mp.one() RETURNS int LANGUAGE sql RETURN 1'; END $$"
    ),
    "temporary table, by DO": say(
        "DO $$ BEGIN EXECUTE 'CREATE TE' || 'MP TABLE basket (item text)'; END $$"
    ),
}


@pytest.fixture(scope="module")
def shop(pg18: PostgresServer) -> Iterator[str]:
    """A database with a role to become, and a schema of a tenant."""
    name = pg18.create_database()
    pg18.execute("CREATE ROLE visitor", name)
    for statement in ("CREATE TABLE notes (note text)", "CREATE SCHEMA tenant_a"):
        pg18.execute(statement, name)
    pg18.execute("GRANT ALL ON notes TO visitor", name)
    yield name
    pg18.drop_database(name)
    pg18.execute("DROP ROLE visitor")


class Door:
    """One connection, of either side: what runs on it is given as a function of it."""

    def __init__(self, server: PostgresServer, name: str, driver: str, **options: Any) -> None:
        name, _, query = name.partition("?")
        url = server.url(name, driver.removesuffix(" (async)"))
        url += f"{'&' if '?' in url else '?'}{query}" if query else ""
        if (through := options.pop("through", None)) is not None:
            url = through.url(url)
        self._open(url, driver in ("psycopg", "psycopg2"), **options)

    @classmethod
    def to(cls, url: str, synchronous: bool, **options: Any) -> Door:
        door = cls.__new__(cls)
        door._open(url, synchronous, **options)
        return door

    def _open(self, url: str, synchronous: bool, **options: Any) -> None:
        options = {"pool_size": 1, "max_overflow": 0} | options
        self.door: Any = None
        if synchronous:
            self.door = Database(url, **options)
            self.engine = self.door.engine
        else:
            self.runner = asyncio.Runner()
            self.manager = DatabaseSessionManager().init(url, **options)
            self.engine = self.manager.engine.sync_engine

    def run(self, way: Way, fail: bool = False, scope: str = "session", **options: Any) -> Any:
        """Run in a session of its own, which commits, or is rolled back."""

        class Fail(Exception):
            pass

        def work(session: Any) -> Any:
            return way(session.connection())

        async def main() -> Any:
            async with getattr(self.manager, scope)(**options) as db:
                result = await db.run_sync(work)
                if fail:
                    raise Fail
                return result

        try:
            if self.door is None:
                return self.runner.run(main())
            with getattr(self.door, scope)(**options) as db:
                result = work(db)
                if fail:
                    raise Fail
                return result
        except Fail:
            return None

    def see(self, what: str = SEEN, scope: str = "session") -> Any:
        return self.run(lambda c: tuple(c.exec_driver_sql(what).one()), scope=scope)

    def pid(self) -> int:
        return int(self.see("SELECT pg_backend_pid()")[0])

    def close(self) -> None:
        if self.door is not None:
            self.door.close()
        else:
            self.runner.run(self.manager.close())
            self.runner.close()


@pytest.fixture
def opened(pg18: PostgresServer, shop: str, driver: str) -> Iterator[Callable[..., Door]]:
    doors: list[Door] = []

    def open_door(**options: Any) -> Door:
        doors.append(Door(pg18, shop, driver, **options))
        return doors[-1]

    yield open_door
    for door in doors:
        door.close()


def differences(new: Any, after: Any) -> list[Any]:
    found: list[Any] = [pair for pair in zip(new[1:], after[1:], strict=True) if pair[0] != pair[1]]
    settings = json.loads(new[0]), json.loads(after[0])
    for name in settings[0].keys() | settings[1].keys():
        pair = [one.get(name) for one in settings]
        if pair[0] != pair[1]:
            found.append((name, *pair))
    return found


@every_driver
def test_the_next_session_sees_nothing_of_the_one_before(opened: Callable[..., Door]) -> None:
    door = opened()
    new, seen = door.see(), {}
    for name, way in WAYS.items():
        for ending in ("commit", "rollback"):
            door.run(way, fail=ending == "rollback")
            if different := differences(new, door.see()):
                seen[name, ending] = different
    assert seen == {}


# -- what it costs -----------------------------------------------------------------------------


# How often these look at a socket depends on how fast the server answers.
LOOPS = ("asyncio", "psycopg", "selectors")


def calls_of(door: Door, count: int) -> int:
    """Return how many Python functions are called for so many sessions."""
    calls = 0

    def note(frame: Any, event: str, argument: object) -> None:
        nonlocal calls
        module = frame.f_globals["__name__"].partition(".")[0]
        calls += event == "call" and module not in LOOPS

    def unit() -> None:
        for _ in range(count):
            door.see("SELECT 1")

    door.see("SELECT 1")
    sys.setprofile(note)
    try:
        unit()
    finally:
        sys.setprofile(None)
    return calls


@every_driver
def test_who_left_nothing_pays_at_most_two_calls(
    opened: Callable[..., Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = opened()
    with monkeypatch.context() as patch:  # engines without what notices it
        patch.setattr(leavings, "watching", lambda driver, arguments: {})
        patch.setattr(leavings, "watch", lambda driver, note: None)
        unwatched = opened()
        unwatched.see("SELECT 1")
    calls = [min(calls_of(door, 1) for _ in range(60)) for door in (watched, unwatched)]
    assert calls[0] - calls[1] <= 2


HARMLESS = [
    "SELECT 1",
    "UPDATE notes SET note = 'x'",
    "INSERT INTO notes VALUES ('x') ON CONFLICT DO NOTHING",
    "SET LOCAL app.tenant = 'acme'",
    "SELECT set_config('app.tenant', 'acme', true)",
    "SET TRANSACTION READ ONLY",
    "SET CONSTRAINTS ALL IMMEDIATE",
    "SELECT pg_advisory_xact_lock(42)",
    "UPDATE notes -- all of them\n SET note = 'x'",
    "UPDATE notes /* all of them */ SET note = 'x; set it'",
    "CREATE TEMP TABLE batch (LIKE notes) ON COMMIT DROP",
]


@every_driver
@pytest.mark.parametrize("statement", HARMLESS)
def test_who_left_nothing_pays_no_round_trip(
    pg18: PostgresServer, shop: str, driver: str, statement: str, proxy: WireProxy
) -> None:
    door, connected = Door(pg18, shop, driver, through=proxy), []
    event.listen(door.engine, "connect", lambda *what: connected.append(what))
    try:
        door.run(say(statement))
        proxy.reset()
        door.run(say(statement))
        assert len(connected) == 1
        assert proxy.round_trips <= 3  # BEGIN, the statement, COMMIT
        assert not any("RESET ALL" in sent for sent in proxy.statements)
    finally:
        door.close()


@every_driver
def test_with_the_setting_each_connection_is_cleaned(opened: Callable[..., Door]) -> None:
    server_side = "SELECT count(*) FROM leave_tenant()"
    door = opened()
    door.run(
        say(
            "CREATE OR REPLACE FUNCTION leave_tenant() RETURNS text LANGUAGE plpgsql AS "
            "$$ BEGIN RETURN set_config('app.tenant', 'acme', false); END $$"
        )
    )
    tenant = "SELECT coalesce(current_setting('app.tenant', true), '')"
    door.run(say(server_side))
    assert door.see(tenant) == ("acme",)  # what no client can see, as the docs say
    always = opened(pool_clean_always=True)
    always.run(say(server_side))
    assert always.see(tenant) == ("",)


@every_driver
def test_a_driver_whose_statements_were_discarded_is_not_lent_again(
    opened: Callable[..., Door],
) -> None:
    door = opened()
    for statement in ("DISCARD ALL", "DEALLOCATE ALL"):
        for _ in range(6):  # psycopg prepares at the fifth time
            door.see("SELECT 1")
        door.run(say(statement), isolation_level="AUTOCOMMIT")
        assert door.see("SELECT 1") == (1,)


@every_driver
@pytest.mark.parametrize("statement", ["SELECT setseed(0.5)", "SET seed = 0.5"])
def test_nobody_knows_the_next_sessions_random_numbers(
    opened: Callable[..., Door], statement: str
) -> None:
    door, drawn = opened(), []
    for _ in range(2):
        door.run(say(statement))
        drawn.append(door.see("SELECT random()"))
    assert drawn[0] != drawn[1]


@every_driver
@pytest.mark.parametrize("call", ["SELECT fill_basket('{}')", "DO $$ BEGIN PERFORM 1; {}; END $$"])
def test_a_temporary_table_of_a_functions_is_not_referred_to_later(
    opened: Callable[..., Door], call: str
) -> None:
    door = opened()
    door.run(
        say(
            "CREATE OR REPLACE FUNCTION fill_basket(type text) RETURNS void LANGUAGE plpgsql AS "
            "$$ BEGIN EXECUTE 'CREATE TE' || 'MP TABLE basket (item ' || type || ')'; END $$"
        )
    )
    door = opened(pool_clean_always=True)
    for kind in ["int"] * 6 + ["text"]:
        what = call.format(kind if "(" in call else f"PERFORM fill_basket('{kind}')")

        def fill(connection: Connection, what: str = what) -> Any:
            connection.exec_driver_sql(what)
            return connection.exec_driver_sql("SELECT * FROM basket").all()

        assert door.run(fill) == []


@every_driver
def test_what_a_function_has_dropped_costs_no_connection(opened: Callable[..., Door]) -> None:
    door = opened()
    pid = door.pid()
    batch = "EXECUTE 'CREATE TE' || 'MP TABLE batch (item text) ON COMMIT DROP'"
    door.run(say(f"DO $$ BEGIN {batch}; END $$"))
    assert door.pid() == pid


@every_driver
def test_cleaning_costs_one_round_trip(
    pg18: PostgresServer, shop: str, driver: str, proxy: WireProxy
) -> None:
    door = Door(pg18, shop, driver, through=proxy)
    try:
        set_it = say("SET app.tenant = 'acme'")
        door.run(set_it)
        proxy.reset()
        door.run(set_it)
        # BEGIN, SET, COMMIT; and what SQLAlchemy had asked at its first connect is not asked again.
        assert proxy.round_trips == 4
    finally:
        door.close()


# -- what was there before ---------------------------------------------------------------------


def listen(door: Door, send: Callable[[Any], object], moment: str = "connect") -> None:
    @event.listens_for(door.engine, moment)
    def hook(connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        send(cursor)
        cursor.close()
        connection.commit()


@every_driver
def test_what_a_connect_hook_had_set_is_set_again(opened: Callable[..., Door]) -> None:
    door = opened()

    def send(cursor: Any) -> None:
        cursor.execute("SET search_path = tenant_a")
        cursor.execute("SET app.tenant = 'of the hook'")
        cursor.execute("SET ROLE visitor")

    listen(door, send)
    what = "SELECT current_setting('search_path'), current_setting('app.tenant'), current_user"
    new, pid = door.see(what), door.pid()
    assert new == ("tenant_a", "of the hook", "visitor")
    for left in ("SET search_path = public", "RESET ALL", "RESET ROLE", "SET app.tenant = ''"):
        door.run(say(left))
        assert door.see(what) == new
    assert door.pid() == pid


@every_driver
def test_a_hook_that_makes_a_temporary_table_does_so_on_a_new_connection(
    opened: Callable[..., Door],
) -> None:
    door = opened()
    listen(door, lambda cursor: cursor.execute("CREATE TEMP TABLE basket (item text)"))
    pid = door.pid()
    for left in ("SET app.tenant = 'acme'", "DISCARD TEMP"):
        door.run(say(left))
        assert door.see("SELECT count(*) FROM basket") == (0,)
    assert door.pid() != pid


@every_driver
def test_what_a_checkout_hook_had_set_once_is_not_kept(opened: Callable[..., Door]) -> None:
    door, tenants = opened(), ["acme"]
    listen(door, lambda cursor: cursor.execute("SET work_mem = '5MB'"))
    listen(
        door,
        lambda cursor: tenants and cursor.execute(f"SET app.tenant = '{tenants.pop()}'"),
        "checkout",
    )
    what = "SELECT current_setting('work_mem'), coalesce(current_setting('app.tenant', true), '')"
    assert door.see(what) == ("5MB", "acme")
    assert door.see(what) == ("5MB", "")


@every_driver
def test_a_reader_stays_one(opened: Callable[..., Door]) -> None:
    door = opened()
    for _ in range(2):
        door.run(say("SET default_transaction_read_only = off"), scope="reader")
        assert door.see("SHOW default_transaction_read_only", scope="reader") == ("on",)
        with pytest.raises(DBAPIError, match="read-only transaction"):
            door.run(say("INSERT INTO notes VALUES ('x')"), scope="reader")


# -- when cleaning fails -----------------------------------------------------------------------


@every_driver
def test_what_cannot_be_cleaned_is_closed(
    pg18: PostgresServer, shop: str, driver: str, proxy: WireProxy
) -> None:
    door = Door(pg18, shop, driver, through=proxy)
    try:
        pid = door.pid()
        fault = proxy.cut_before("RESET ALL")
        door.run(say("SET app.tenant = 'acme'"))  # its own end is none the worse for it
        assert fault.happened
        assert door.see("SELECT coalesce(current_setting('app.tenant', true), '')") == ("",)
        assert door.pid() != pid
    finally:
        door.close()


@every_driver
def test_a_hook_that_cannot_be_run_again_has_a_new_connection(opened: Callable[..., Door]) -> None:
    door = opened()
    door.run(say("CREATE TABLE IF NOT EXISTS begun (pid int PRIMARY KEY)"))
    door = opened()
    once = "DO $$ BEGIN INSERT INTO begun VALUES (pg_backend_pid()); END $$"
    listen(door, lambda cursor: cursor.execute(once))
    pid = door.pid()
    door.run(say("SET app.tenant = 'acme'"))
    assert door.pid() != pid


@every_driver
def test_a_server_that_does_not_answer_is_not_waited_for(
    pg18: PostgresServer,
    shop: str,
    driver: str,
    proxy: WireProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (lending, pool):
        monkeypatch.setattr(module, "CLEAN_LIMIT", 0.2)
    door = Door(pg18, shop, driver, through=proxy)
    try:
        pid = door.pid()
        fault = proxy.freeze_after("RESET ALL")
        door.run(say("SET app.tenant = 'acme'"))
        assert fault.happened
        proxy.thaw()
        assert door.pid() != pid
    finally:
        proxy.thaw()
        door.close()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_cancelled_cleaning_closes_the_connection(
    pg18: PostgresServer, shop: str, driver: str, proxy: WireProxy
) -> None:
    async def main() -> None:
        url = proxy.url(pg18.url(shop, driver))
        async with DatabaseSessionManager().init(url, pool_size=1, max_overflow=0) as manager:

            async def leave() -> None:
                async with manager.session() as db:
                    await db.execute(text("SET app.tenant = 'acme'"))

            await leave()
            fault = proxy.freeze_before("RESET ALL")
            task = asyncio.create_task(leave())
            await asyncio.to_thread(fault.wait)
            task.cancel()
            await asyncio.sleep(0)
            proxy.thaw()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with manager.session() as db:
                seen = text("SELECT coalesce(current_setting('app.tenant', true), '')")
                assert await db.scalar(seen) == ""
            assert manager.stats().pools[0].lent == 0

    asyncio.run(main())


# -- SQLite ------------------------------------------------------------------------------------

SQLITE_WAYS = [
    "PRAGMA foreign_keys=OFF",
    "pragma foreign_keys(0)",
    "PRAGMA query_only=ON",
    "PRAGMA case_sensitive_like = 1",
    "PRAGMA busy_timeout=1",
    "CREATE TEMP TABLE basket (item)",
    "create table temp.basket (item)",
    "ATTACH ':memory:' AS other",
]
SQLITE_SEEN = """
SELECT (SELECT group_concat(name) FROM pragma_database_list WHERE name <> 'main'),
    (SELECT foreign_keys FROM pragma_foreign_keys), (SELECT query_only FROM pragma_query_only),
    (SELECT timeout FROM pragma_busy_timeout),
    (SELECT count(*) FROM sqlite_temp_master), 'a' LIKE 'A'
"""


@pytest.mark.parametrize("side", ["sync", "async"])
@pytest.mark.parametrize("statement", SQLITE_WAYS)
def test_on_sqlite_the_next_session_sees_nothing_either(
    statement: str, side: str, sqlite_url: str
) -> None:
    door = Door.to(sqlite_url, side == "sync")
    try:
        for scope in ("session", "reader"):
            new = door.see(SQLITE_SEEN, scope=scope)
            for fail in (False, True):
                with suppress(OperationalError):  # ATTACH in a transaction, CREATE in a reader
                    door.run(say(statement), fail=fail, scope=scope)
                assert door.see(SQLITE_SEEN, scope=scope) == new
    finally:
        door.close()


def test_on_sqlite_who_left_nothing_keeps_the_connection(sqlite_url: str) -> None:
    door = Door.to(sqlite_url, synchronous=True, pool_size=1)
    opened = []
    event.listen(door.engine, "connect", lambda *what: opened.append(what))
    try:
        for statement in ("SELECT 1", "PRAGMA table_info(item)", "PRAGMA foreign_keys"):
            door.run(say(statement))
        assert len(opened) == 1
        door.run(say("PRAGMA foreign_keys=OFF"))
        door.run(say("SELECT 1"))
        assert len(opened) == 2
    finally:
        door.close()


# -- texts -------------------------------------------------------------------------------------

TEXTS = {
    "SELECT set_config('app.tenant', %(tenant)s::VARCHAR, true)": Leaving.CALLED,
    "SET local.tenant = 'acme'": Leaving.STATE,  # a setting whose prefix is that
    "DO 'x'; SET transaction . id = 7": Leaving.STATE,
    "SET LOCAL local.tenant = 'acme'": Leaving.NOTHING,
    "SELECT set_config($1::VARCHAR, $2::VARCHAR, $3::BOOLEAN)": Leaving.STATE,
    "SELECT set_config('a', (SELECT 'x'), true), set_config('b', 'y', false)": Leaving.STATE,
    "WITH one AS (SELECT 1) SELECT set_config('a', 'b', FALSE) FROM one": Leaving.STATE,
    "UPDATE items\n   SET name = 'x' WHERE id = 1": Leaving.NOTHING,
    "UPDATE items -- all of them\n SET name = 'x'": Leaving.NOTHING,
    "UPDATE items SET name = 'then; set x' WHERE \"do; it\" = 1;": Leaving.NOTHING,
    "UPDATE items SET name = $$;$$": Leaving.STATE,  # who can tell what is in it? So it pays
    r"UPDATE items SET name = E'it\'s'": Leaving.NOTHING,  # it is one statement
    r"UPDATE items SET name = E'it\'s;'": Leaving.STATE,
    "UPDATE items SET name = ''; SET /* a /* b */ c */ a.b = 'c'": Leaving.STATE,
    "/* it's /* one */ ' */ SET a.b = 'c'": Leaving.STATE,
    "SELECT set_config('a', '(, true)', true)": Leaving.CALLED,
    "SELECT set_config('a', '(, true)', false), $$x$$": Leaving.STATE,
    "SELECT set_config('a', lower(concat('x', 'y')), true) FROM items": Leaving.NOTHING,
    "SELECT set_config('a', 'b', not true)": Leaving.STATE,
    "SELECT name FROM pg_settings": Leaving.NOTHING,
    "SELECT 1; INSERT INTO items VALUES (1); SELECT nextval('items_id_seq')": Leaving.STATE,
    "SELECT pg_advisory_unlock(1)": Leaving.STATE,  # of a connect hook
    "EXPLAIN ANALYZE EXECUTE one": Leaving.STATE,
    "CREATE TABLE copies AS EXECUTE one": Leaving.STATE,
    "CREATE TRIGGER t BEFORE INSERT ON items EXECUTE FUNCTION f()": Leaving.NOTHING,
    "INSERT INTO temp VALUES (1)": Leaving.NOTHING,
    "SELECT 1 INTO/**/TEMP t": Leaving.RELATIONS,
    "CREATE /* /* */ */ TEMP TABLE t (id int)": Leaving.RELATIONS,
    "CREATE TEMP TABLE t (id int) ON COMMIT DROP": Leaving.NOTHING,
    "CREATE TEMP TABLE t (id int); SELECT 'x' ON COMMIT DROP": Leaving.RELATIONS,
    "CREATE TEMP TABLE t AS SELECT 'on commit drop'": Leaving.RELATIONS,
    "DEALLOCATE one": Leaving.STATE,
    'DEALLOCATE PREPARE "__asyncpg_stmt_1__"': Leaving.RELATIONS,
    "deallocate all": Leaving.RELATIONS,
    "SELECT 1; DISCARD ALL": Leaving.RELATIONS,
    "SELECT dblink_connect('other', 'dbname=other')": Leaving.RELATIONS,
    "select current_schema()": Leaving.NOTHING,
    "INSERT INTO items VALUES (nextval('items_id_seq'), 'x')": Leaving.NOTHING,
    "select nextval('items_id_seq')": Leaving.STATE,
    "SELECT temp, prepare, hold FROM weather": Leaving.NOTHING,
    "INSERT INTO items VALUES (1) ON CONFLICT (id) DO UPDATE SET name = 'x'": Leaving.NOTHING,
    "MERGE INTO a USING b ON a.id = b.id WHEN MATCHED THEN UPDATE SET n = 1": Leaving.NOTHING,
    "PREPARE TRANSACTION 'one'": Leaving.NOTHING,
    "BEGIN; SET LOCAL a.b = 'c'": Leaving.NOTHING,
    "BEGIN; SET a.b = 'c'": Leaving.STATE,
    "BEGIN READ ONLY;": Leaving.NOTHING,
    "SELECT 1;set role visitor": Leaving.STATE,
    "SET /* not LOCAL */ a.b = 'c'": Leaving.STATE,
    "SELECT pg_advisory_xact_lock(1)": Leaving.CALLED,
    "SELECT pg_try_advisory_lock(1) FROM items": Leaving.STATE,
    "SELECT setup_session('x')": Leaving.CALLED,
    "select pg_catalog.version()": Leaving.NOTHING,
    "CREATE UNLOGGED TABLE temperatures (id int)": Leaving.NOTHING,
    "CREATE GLOBAL TEMPORARY TABLE t (id int)": Leaving.RELATIONS,
    "CREATE TABLE pg_temp.t (id int)": Leaving.RELATIONS,
    "SELECT 1 FROM pg_namespace WHERE nspname !~ '^pg_temp_'": Leaving.NOTHING,
    "SET LOCAL search_path = pg_temp": Leaving.RELATIONS,
    "LOAD 'auto_explain'": Leaving.RELATIONS,
}


@pytest.mark.parametrize("statement", TEXTS)
def test_what_a_text_may_leave(statement: str) -> None:
    assert leavings.read(statement) is TEXTS[statement]


LONG = {
    "values": "INSERT INTO items VALUES " + "(1, 'one; and', $1::VARCHAR), " * 40_000,
    "comments": "CREATE " + "/* a */ " * 24 + "TABLE items (id int)",
    "dashes": "-" * 100_000,
    "brackets": "SELECT f(" + ")" * 40_000 + " FROM items",
    "spaces": "SELECT f()" + " " * 40_000 + "x",
    "opened": "/*" * 100_000,
    "names": "SELECT " + "set_config(" * 20_000,
    "temporary": "create temp table on commit " * 20_000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_text_is_read_in_a_time_that_grows_as_it_does(name: str) -> None:
    began = time.thread_time()
    leavings.read(LONG[name])
    assert time.thread_time() - began < 0.5  # it takes a hundredth of that, or many seconds


def test_texts_with_their_values_in_them_are_not_kept_for_ever() -> None:
    for n in range(2 * leavings.KEPT):
        assert not leavings.READINGS[f"SELECT {n} AS unique_to_this_test"]
    assert len(leavings.READINGS) <= leavings.KEPT


@every_driver
def test_a_number_that_was_drawn_is_forgotten(opened: Callable[..., Door]) -> None:
    door = opened()
    door.run(say("CREATE SEQUENCE IF NOT EXISTS numbers"))
    door.run(say("SELECT nextval('numbers')"))
    with pytest.raises(DBAPIError, match="lastval is not yet defined"):
        door.see("SELECT lastval()")


@pytest.mark.parametrize("driver", ["asyncpg"])
def test_a_listener_of_asyncpgs_is_gone(opened: Callable[..., Door]) -> None:
    door, heard = opened(), []

    def listen_by_driver(connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        await_only(driver.add_listener("news", lambda *what: heard.append(what)))

    door.run(listen_by_driver)
    door.run(say("NOTIFY news"))
    door.run(say("SELECT 1"))
    assert not heard
    assert door.see("SELECT count(*) FROM pg_listening_channels()") == (0,)


@every_driver
def test_a_query_that_the_driver_composes_is_read(opened: Callable[..., Door], driver: str) -> None:
    door = opened()

    def compose(connection: Connection) -> None:
        raw: Any = connection.connection.driver_connection
        if driver == "psycopg2":
            from psycopg2 import sql

            query = sql.SQL("SET app.tenant = {}").format(sql.Literal("acme"))
            raw.cursor().execute(query)
        elif driver != "asyncpg":
            from psycopg import sql as sql3

            done = raw.execute(sql3.SQL("SET app.tenant = {}").format(sql3.Literal("acme")))
            if connection.dialect.is_async:
                await_only(done)
        else:
            await_only(raw.fetchval("SELECT set_config($1, $2, false)", "app.tenant", "acme"))

    door.run(compose)
    assert door.see("SELECT coalesce(current_setting('app.tenant', true), '')") == ("",)


SETTING = "SELECT set_config('app.tenant', 'acme', false)"
RAW: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("psycopg", "copy", lambda raw: consume(raw.cursor().copy(f"COPY ({SETTING}) TO STDOUT"))),
    (
        "psycopg",
        "a cursor with hold",
        lambda raw: raw.cursor("rows", withhold=True).execute("SELECT 1"),
    ),
    (
        "psycopg (async)",
        "a cursor with hold",
        lambda raw: raw.cursor("rows", withhold=True).execute("SELECT 1"),
    ),
    (
        "psycopg2",
        "a cursor with hold",
        lambda raw: raw.cursor("rows", withhold=True).execute("SELECT 1"),
    ),
    (
        "psycopg2",
        "a cursor with hold, in short",
        lambda raw: raw.cursor("rows", None, True).execute("SELECT 1"),
    ),
    (
        "psycopg2",
        "a cursor of another class",
        lambda raw: raw.cursor(cursor_factory=dict_cursor()).execute("SET app.tenant = 'acme'"),
    ),
    (
        "psycopg2",
        "copy_expert",
        lambda raw: raw.cursor().copy_expert(f"COPY ({SETTING}) TO STDOUT", io.StringIO()),
    ),
    ("psycopg2", "set_session", lambda raw: raw.rollback() or raw.set_session(readonly=True)),
    (
        "psycopg2",
        "set_client_encoding",
        lambda raw: raw.rollback() or raw.set_client_encoding("LATIN1"),
    ),
    (
        "psycopg",
        "copy, by name",
        lambda raw: consume(raw.cursor().copy(statement=f"COPY ({SETTING}) TO STDOUT")),
    ),
    (
        "psycopg2",
        "copy_expert, by name",
        lambda raw: raw.cursor().copy_expert(sql=f"COPY ({SETTING}) TO STDOUT", file=io.StringIO()),
    ),
    (
        "asyncpg",
        "executemany, by name",
        lambda raw: raw.executemany(
            command="INSERT INTO notes SELECT set_config('app.tenant', $1, false)", args=[("acme",)]
        ),
    ),
    ("asyncpg", "copy", lambda raw: raw.copy_from_query(SETTING, output=io.BytesIO())),
    ("asyncpg", "cursor", lambda raw: iterate(raw.cursor(SETTING))),
]


def consume(copying: Any) -> None:
    with copying as rows:
        list(rows)


async def iterate(cursor: Any) -> None:
    async for _ in cursor:
        pass


def dict_cursor() -> Any:
    from psycopg2.extras import DictCursor

    return DictCursor


@pytest.mark.filterwarnings("ignore:.*ServerCursor:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("driver", "name", "use"), RAW, ids=[" ".join(raw[:2]) for raw in RAW])
def test_what_the_driver_itself_can_do_is_noticed(
    opened: Callable[..., Door], name: str, use: Callable[[Any], Any]
) -> None:
    door = opened()
    new = door.see()

    def work(connection: Connection) -> None:
        connection.exec_driver_sql("SELECT 1")
        done = use(connection.connection.driver_connection)
        if connection.dialect.is_async:
            await_only(done)

    door.run(work)
    assert differences(new, door.see()) == []


@pytest.mark.parametrize("driver", ["asyncpg"])
def test_who_listens_to_asyncpgs_own_log_does_so_in_one_session(
    opened: Callable[..., Door],
) -> None:
    door, heard = opened(), []

    def listen_to_log(connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        driver.add_log_listener(lambda *what: heard.append(what))

    door.run(listen_to_log)
    door.run(say("DO $$ BEGIN RAISE NOTICE 'somebody else'; END $$"))
    door.run(say("SELECT 1"))
    assert not heard


@pytest.mark.parametrize("driver", ["psycopg2"])
def test_the_encoding_that_a_hook_has_asked_for_stays(opened: Callable[..., Door]) -> None:
    door = opened()
    event.listen(door.engine, "connect", lambda driver, _: driver.set_client_encoding("LATIN1"))
    pid = door.pid()
    door.run(say("SET app.tenant = 'acme'"))
    assert door.see("SHOW client_encoding") == ("LATIN1",)
    assert door.pid() == pid


@every_driver
def test_a_function_that_a_connect_hook_called_is_called_again(opened: Callable[..., Door]) -> None:
    door = opened()
    door.run(
        say(
            "CREATE OR REPLACE FUNCTION begin_work(name text) RETURNS text LANGUAGE plpgsql AS "
            "$$ BEGIN RETURN set_config('app.tenant', name, false); END $$"
        )
    )
    door = opened()
    listen(door, lambda cursor: cursor.execute("SELECT begin_work('hooked')"))
    tenant = "SELECT current_setting('app.tenant')"
    assert door.see(tenant) == ("hooked",)
    door.run(say("SET app.tenant = 'acme'"))
    assert door.see(tenant) == ("hooked",)


@pytest.mark.parametrize(
    ("side", "driver"), [("sync", "psycopg"), ("sync", "psycopg2"), ("async", "psycopg")]
)
def test_cursors_that_a_connect_hook_has_set_are_watched_too(
    pg18: PostgresServer, database: str, side: str, driver: str
) -> None:
    manager = DatabaseSessionManager().init(pg18.url(database, driver), pool_size=1, max_overflow=0)
    engine = manager.sync_engine if side == "sync" else manager.engine.sync_engine

    @event.listens_for(engine, "connect")
    def set_factory(connection: Any, record: object) -> None:
        raw = getattr(connection, "driver_connection", connection)
        if driver == "psycopg2":
            plain: Any = psycopg2.extensions.cursor
        else:
            plain = psycopg.Cursor if side == "sync" else psycopg.AsyncCursor
        raw.cursor_factory = type("Mine", (plain,), {})

    def leave(db: Session) -> None:
        db.execute(text("SET app.tenant = 'acme'"))

    def look(db: Session) -> object:
        return db.scalar(text("SELECT current_setting('app.tenant', true)"))

    async def on_loop() -> object:
        async with manager:
            async with manager.session() as db:
                await db.run_sync(leave)
            async with manager.session() as db:
                return await db.run_sync(look)

    if side == "async":
        seen = asyncio.run(on_loop())
    else:
        with manager.sync_session() as db:
            leave(db)
        with manager.sync_session() as db:
            seen = look(db)
        manager.sync.close()
    assert seen in (None, "")
