"""Each mistake gets one clear error: the thing, its value without secrets, and the remedy."""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import inspect
import os
import pickle
import re
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from scenario import HIDE, in_threads
from sqlalchemy import Column, Integer, MetaData, String, Table, event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, Session, mapped_column
from sqlalchemy.util import await_only

from engineroom import (
    Base,
    Database,
    DatabaseSessionManager,
    EngineroomError,
    PoolExhausted,
    SessionClosed,
    SyncInAsyncWarning,
    UsageError,
    errors,
    scopes,
)

SECRET = "hunter2"


class Thing(Base):
    __tablename__ = "misused_thing"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


def everything_said(error: BaseException) -> str:
    """Return all that an error, and the errors behind it, would ever show."""
    said = "".join(traceback.format_exception(error))
    behind: BaseException | None = error
    seen: list[BaseException] = []
    while behind is not None and behind not in seen:
        seen.append(behind)
        said += f"{behind}\n{behind!r}\n"
        behind = behind.__cause__ or behind.__context__
    # The lines of this file that a traceback quotes are not ours to mask.
    return "\n".join(line for line in said.splitlines() if "leak" not in line)


def assert_teaches(error: BaseException, kind: type[EngineroomError], *words: str) -> None:
    """Assert the class, the code, that each word is named, and that no secret is."""
    assert type(error) is kind
    assert f"[{kind.code}]" in str(error)
    for word in words:
        assert word in str(error)
    assert SECRET not in everything_said(error)


@pytest.fixture(params=[Database, lambda *a, **k: DatabaseSessionManager().init(*a, **k)])
def opens(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Open a door: either of them takes the same and refuses the same."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DB_") or name in {"DATABASE_URL", "DEBUG"}:
            monkeypatch.delenv(name)


# --- what a door is opened with -------------------------------------------------------------------


def test_no_url_anywhere_names_both_variables(opens: Any) -> None:
    with pytest.raises(UsageError) as caught:
        opens()
    assert_teaches(caught.value, errors.NoDatabaseURL, "DATABASE_URL", "DB_URL", "sqlite:///")


LEAKS = [  # what people paste; the secret must not come back out
    f"not a url, with {SECRET}@ in it",
    f"user:{SECRET}@db.example/app",
    f"postgresql:/user:{SECRET}@db.example/app",
    f"postgresql//user:{SECRET}@db.example/app",
    f"postgresql://user:{SECRET}@db.example:port/app",
    f"host=db.example user=user password={SECRET} dbname=app",
    f"jdbc:postgresql://db.example/app?user=user&password={SECRET}",
    f"postgresql+:{SECRET}@db.example/app",
    f"postgresql://user:p@x/{SECRET}@db.example/app",
]


@pytest.mark.parametrize("number", range(len(LEAKS)))
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_url_that_is_none_is_refused_without_its_secrets(
    opens: Any, number: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as caught:
        if way == "argument":
            opens(LEAKS[number])
        else:
            monkeypatch.setenv("DATABASE_URL", LEAKS[number])
            opens()
    assert_teaches(caught.value, errors.InvalidURL, "postgresql://", "percent-encoded")


@pytest.mark.parametrize("wrong", [7, b"sqlite://", Path("app.db"), ["sqlite://"]])
def test_a_url_of_another_type_is_refused(opens: Any, wrong: Any) -> None:
    with pytest.raises(UsageError) as caught:
        opens(wrong)
    assert_teaches(caught.value, errors.InvalidURL, type(wrong).__name__, "postgresql://")


def test_an_empty_url_is_no_url(opens: Any) -> None:
    with pytest.raises(UsageError) as caught:
        opens("")
    assert type(caught.value) in {errors.NoDatabaseURL, errors.InvalidURL}


UNSUPPORTED = [
    f"oracle://user:{SECRET}@db.example/app",
    f"oracle+oracledb://user:{SECRET}@db.example/app",
    f"nonsense://user:{SECRET}@db.example/app?password={SECRET}",
    f"oracle://user:p@{SECRET}@db.example/app",
]


@pytest.mark.parametrize("number", range(len(UNSUPPORTED)))
def test_an_unsupported_database_is_named_with_the_supported_ones(opens: Any, number: int) -> None:
    with pytest.raises(UsageError) as caught:
        opens(UNSUPPORTED[number])
    name = re.match(r"\w+", UNSUPPORTED[number])
    assert name is not None
    assert_teaches(caught.value, errors.InvalidURL, name[0], "postgresql://", "sqlite://")


OPEN = """
import asyncio
from engineroom import Database, DatabaseSessionManager
async def ask(url):
    async with DatabaseSessionManager().init(url).session() as db:
        pass
try:
    if sys.argv[3] == "sync":
        with Database(sys.argv[2]).session():
            pass
    else:
        asyncio.run(ask(sys.argv[2]))
except Exception as error:
    print(type(error).__name__, error)
else:
    print("opened")
"""


def without(hidden: str, url: str, side: str) -> str:
    """Open a session in an interpreter that lacks some modules, and return what it said."""
    return subprocess.run(
        [sys.executable, "-c", HIDE + OPEN, hidden, url, side],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize(
    ("hidden", "url", "side", "words"),
    [
        (
            "asyncpg,psycopg",
            "postgresql://u:{}@h/d",
            "async",
            ["asyncpg or psycopg", '"engineroom[postgresql]"'],
        ),
        (
            "psycopg,psycopg2",
            "postgresql://u:{}@h/d",
            "sync",
            ["psycopg or psycopg2", '"engineroom[postgresql]"'],
        ),
        (
            "asyncpg",
            "postgresql+asyncpg://u:{}@h/d",
            "async",
            ["asyncpg", '"engineroom[postgresql]"'],
        ),
        ("psycopg2", "postgresql+psycopg2://u:{}@h/d", "sync", ["psycopg2", "psycopg2-binary"]),
        ("aiosqlite", "sqlite://", "async", ["aiosqlite", '"engineroom[sqlite]"']),
    ],
)
def test_a_driver_that_is_not_installed_is_named_with_its_extra(
    hidden: str, url: str, side: str, words: list[str]
) -> None:
    said = without(hidden, url.format(SECRET), side)
    assert said.startswith("DriverNotInstalled ")
    assert f"pip install {words[-1]}." in said
    assert "[driver-not-installed]" in said
    assert all(word in said for word in words)
    assert SECRET not in said


@pytest.mark.parametrize(
    ("hidden", "url", "side"),
    [
        ("psycopg,psycopg2", "postgresql://u@h/d", "async"),
        ("asyncpg", "postgresql://u@h/d", "sync"),
        ("asyncpg", "postgresql://u@h/d", "async"),
        ("psycopg", "postgresql://u@h/d", "sync"),
        ("aiosqlite", "sqlite://", "sync"),
    ],
)
def test_one_driver_is_enough_for_one_side(hidden: str, url: str, side: str) -> None:
    if hidden == "psycopg" and importlib.util.find_spec("psycopg2") is None:
        assert without(hidden, url, side).startswith("DriverNotInstalled ")
        return
    assert without(hidden, url, side) == "opened\n"


@pytest.mark.parametrize(
    ("url", "driver", "known"),
    [
        (
            f"postgresql+pg8000://user:{SECRET}@db.example/app",
            "pg8000",
            "asyncpg, psycopg, psycopg2",
        ),
        (f"postgres+psycopgg://user:{SECRET}@db.example/app", "psycopgg", "postgresql://"),
        ("sqlite+aiosqlit:///app.db", "aiosqlit", "aiosqlite, pysqlite"),
        ("sqlite+asyncpg:///app.db", "asyncpg", "aiosqlite, pysqlite"),
    ],
)
def test_an_unknown_driver_is_refused_at_once(
    opens: Any, url: str, driver: str, known: str
) -> None:
    with pytest.raises(UsageError) as caught:
        opens(url)
    assert_teaches(caught.value, errors.InvalidURL, repr(driver), known)


@pytest.mark.parametrize("url", ["sqlite://app.db", "sqlite://app.db/more", "sqlite+aiosqlite://x"])
def test_a_sqlite_file_with_two_slashes_is_refused_with_three(opens: Any, url: str) -> None:
    with pytest.raises(UsageError) as caught:
        opens(url)
    host = url.partition("//")[2].partition("/")[0]
    assert_teaches(caught.value, errors.InvalidURL, "three slashes", f"sqlite:///{host}")


@pytest.mark.parametrize("other", ["sqlite://", "postgresql://db.example/app"])
def test_a_url_is_given_once(opens: Any, other: str) -> None:
    with pytest.raises(UsageError) as caught:
        opens(url="sqlite://", database_url=other)
    assert_teaches(caught.value, errors.InvalidOption, "database_url=", "url=")
    with pytest.raises(UsageError) as caught:
        opens("sqlite://", url=other)
    assert_teaches(caught.value, errors.InvalidOption, "database_url=", "url=")


@pytest.mark.parametrize("name", ["password", "PASSWORD", "token", "access_token", "sslpassword"])
@pytest.mark.parametrize("scheme", ["oracle", "postgresql+pg8000"])
def test_a_secret_in_a_urls_query_is_masked(opens: Any, scheme: str, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        opens(f"{scheme}://user@db.example/app?{name}={SECRET}&sslmode=require")
    assert_teaches(caught.value, errors.InvalidURL, name, "sslmode=require")


@pytest.mark.parametrize(
    ("scheme", "meant"),
    [("postgressql", "postgresql"), ("postgre", "postgresql"), ("sqlite3", "sqlite"), ("my", "")],
)
def test_a_misspelt_database_is_named_with_its_name(opens: Any, scheme: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        opens(f"{scheme}://user:{SECRET}@db.example/app")
    hint = f"{scheme!r}. Did you mean {meant}://? Supp" if meant else f"{scheme!r}. Supported are"
    assert_teaches(caught.value, errors.InvalidURL, hint, "mariadb:// and sqlite://.")


@pytest.mark.parametrize("misspelt", ["databse_url", "databaseurl", "ur", "urls"])
def test_a_misspelt_url_is_named_with_its_name(opens: Any, misspelt: str) -> None:
    with pytest.raises(UsageError) as caught:
        opens(**{misspelt: f"postgresql://user:{SECRET}@db.example/app"})
    right = "database_url?" if "data" in misspelt else "url?"
    assert_teaches(caught.value, errors.UnknownOption, misspelt, f"Did you mean {right}")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("engine_options", [("echo", True)], "a dict, not list"),
        ("engine_options", None, "a dict, not NoneType"),
        ("session_class", AsyncSession, "a subclass of Session, not AsyncSession"),
        ("session_class", "Session", "a subclass of Session, not str"),
        ("session_class", Session(), "a subclass of Session, not Session"),
        ("async_session_class", Session, "a subclass of AsyncSession, not Session"),
        ("async_session_class", None, "a subclass of AsyncSession, not NoneType"),
        ("metadata", Base, "a MetaData, not Base"),
        ("metadata", None, "a MetaData, not NoneType"),
    ],
)
def test_an_option_of_another_type_is_refused(
    opens: Any, name: str, value: Any, wanted: str
) -> None:
    with pytest.raises(UsageError) as caught:
        opens("sqlite://", **{name: value})
    assert_teaches(caught.value, errors.InvalidOption, f"{name}=", wanted)


def test_an_unknown_option_is_named_with_the_nearest_known_one(opens: Any) -> None:
    with pytest.raises(UsageError) as caught:
        opens("sqlite://", pool_sise=5)
    assert_teaches(caught.value, errors.UnknownOption, "pool_sise", "pool_size?")


def test_an_unknown_option_like_no_other_is_answered_with_all(opens: Any) -> None:
    with pytest.raises(UsageError) as caught:
        opens("sqlite://", xyzzy=5)
    assert_teaches(caught.value, errors.UnknownOption, "xyzzy", "pool_size", "engine_options")


@pytest.mark.parametrize("value", ["ten", "0", "-1", "1.5"])
def test_a_variable_with_a_value_it_cannot_have_is_named(
    opens: Any, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_POOL_SIZE", value)
    with pytest.raises(UsageError) as caught:
        opens(f"postgresql://user:{SECRET}@db.example/app")
    assert_teaches(caught.value, errors.InvalidOption, f"DB_POOL_SIZE='{value}'", "default is 5")


@pytest.mark.parametrize("value", ["ten", 0, -1, None])
def test_an_option_with_a_value_it_cannot_have_is_named(opens: Any, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        opens(f"postgresql://user:{SECRET}@db.example/app", pool_size=value)
    assert_teaches(caught.value, errors.InvalidOption, f"pool_size={value!r}", "default is 5")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DB_MAX_OVERFLOW", "-1"),
        ("DB_POOL_TIMEOUT", "0"),
        ("DB_POOL_RECYCLE", "-2"),
        ("DB_POOL_PRE_PING", "perhaps"),
        ("DB_ECHO", "loud"),
        ("DB_SYNC_IN_ASYNC", "maybe"),
        ("DB_CLOSE_TIMEOUT", "-0.1"),
        ("DB_BUSY_TIMEOUT", "none"),
        ("DB_POOL_PING_AFTER", "-1"),
    ],
)
def test_every_variable_is_checked(
    opens: Any, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError) as caught:
        opens("sqlite://")
    assert_teaches(caught.value, errors.InvalidOption, f"{variable}='{value}'", "default is")


# --- SQLite's file --------------------------------------------------------------------------------


def without_privileges(function: Callable[[], Any]) -> Any:
    """Run in a thread that has no capabilities: there even root is told the truth about rights."""
    outcome: list[Any] = []

    def run() -> None:
        if sys.platform == "linux":  # capabilities are a thread's own there
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


def enter(door: Any) -> None:
    if isinstance(door, Database):
        with door.session() as db:
            db.execute(text("CREATE TABLE t (n)"))
        return

    async def use() -> None:
        async with door.session() as db:
            await db.execute(text("CREATE TABLE t (n)"))

    asyncio.run(use())


def test_a_sqlite_file_in_no_folder_is_named_with_the_folder(opens: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        enter(opens(f"sqlite:///{tmp_path}/nowhere/app.db"))
    assert_teaches(
        caught.value, errors.InvalidPath, f"{tmp_path}/nowhere", "does not exist", "sqlite:////"
    )


def test_a_sqlite_file_in_a_read_only_folder_is_named(opens: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        error = without_privileges(lambda: enter(opens(f"sqlite:///{tmp_path}/app.db")))
    finally:
        tmp_path.chmod(0o700)
    assert_teaches(error, errors.InvalidPath, f"{tmp_path}/app.db", "read-only", "right to write")


def test_a_sqlite_file_that_is_read_only_is_named(opens: Any, tmp_path: Path) -> None:
    file = tmp_path / "app.db"
    file.touch()
    file.chmod(0o400)
    error = without_privileges(lambda: enter(opens(f"sqlite:///{file}")))
    assert_teaches(error, errors.InvalidPath, f"{file} is read-only", "right to write")


def test_a_sqlite_file_opened_read_only_is_read(opens: Any, tmp_path: Path) -> None:
    """At once: that it cannot be switched to WAL is nothing to wait for."""
    file = tmp_path / "app.db"
    with sqlite3.connect(file) as maker:  # no WAL
        maker.execute("CREATE TABLE t (n)")
        maker.execute("INSERT INTO t VALUES (42)")
    maker.close()
    door = opens(f"sqlite:///file:{file}?mode=ro&uri=true", busy_timeout=50)
    started = time.monotonic()

    async def read(manager: DatabaseSessionManager) -> None:
        async with manager.reader() as db:
            assert await db.scalar(text("SELECT n FROM t")) == 42
        async with manager.session(read_only=True) as db:
            assert await db.scalar(text("SELECT n FROM t")) == 42
        with pytest.raises(DBAPIError, match="readonly"):
            async with manager.session() as db:
                await db.execute(text("INSERT INTO t VALUES (43)"))
        await manager.close()

    if isinstance(door, DatabaseSessionManager):
        asyncio.run(read(door))
    else:
        with door, door.reader() as db:
            assert db.scalar(text("SELECT n FROM t")) == 42
        with door, door.session(read_only=True) as db:
            assert db.scalar(text("SELECT n FROM t")) == 42
    assert time.monotonic() - started < 25  # half of what it would wait for a lock


def test_a_sqlite_file_in_a_closed_folder_is_named(opens: Any, tmp_path: Path) -> None:
    """A folder that may not even be looked into."""
    folder = tmp_path / "closed" / "inner"
    folder.mkdir(parents=True)
    folder.parent.chmod(0)
    try:
        error = without_privileges(lambda: enter(opens(f"sqlite:///{folder}/app.db")))
    finally:
        folder.parent.chmod(0o700)
    assert_teaches(error, errors.InvalidPath, f"{folder}/app.db")


def test_a_folder_where_a_sqlite_file_belongs_is_named(opens: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        enter(opens(f"sqlite:///{tmp_path}"))
    assert_teaches(caught.value, errors.InvalidPath, str(tmp_path))


# --- scopes ---------------------------------------------------------------------------------------

VERBS = ["session", "reader", "connect"]


@pytest.fixture
def manager(sqlite_url: str) -> Iterator[DatabaseSessionManager]:
    made = DatabaseSessionManager().init(sqlite_url, busy_timeout=1.0)
    made.sync.create_all()
    yield made
    asyncio.run(made.close(timeout=0))


@pytest.mark.parametrize("verb", VERBS)
def test_with_where_async_with_belongs(manager: Any, verb: str) -> None:
    with pytest.raises(UsageError) as caught, getattr(manager, verb)():
        pass
    assert_teaches(caught.value, errors.WrongWith, f"{verb}()", "async side", "'async with'")
    assert manager.stats().scopes == ()


@pytest.mark.parametrize("verb", VERBS)
def test_async_with_where_with_belongs(manager: Any, verb: str) -> None:
    async def main() -> None:
        async with getattr(manager.sync, verb)():
            pass

    with pytest.raises(UsageError) as caught:
        asyncio.run(main())
    assert_teaches(caught.value, errors.WrongWith, f"{verb}()", "sync side", "'with'")
    assert manager.stats().scopes == ()


def test_the_wrong_with_for_what_opens_and_closes(sqlite_url: str) -> None:
    database: Any = Database(sqlite_url)
    manager: Any = DatabaseSessionManager().init(sqlite_url)

    async def main() -> None:
        async with database:
            pass

    with pytest.raises(UsageError) as caught, manager:
        pass
    assert_teaches(caught.value, errors.WrongWith, "DatabaseSessionManager", "'async with'")
    with pytest.raises(UsageError) as caught:
        asyncio.run(main())
    assert_teaches(caught.value, errors.WrongWith, "Database", "'with'")


@pytest.mark.parametrize("use", ["execute", "add", "begin", "scalar", "commit"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_scope_that_was_not_entered_says_how(manager: Any, verb: str, use: str) -> None:
    for door, keyword in [(manager, "async with"), (manager.sync, "with")]:
        with pytest.raises(UsageError) as caught:
            getattr(getattr(door, verb)(), use)(text("SELECT 1"))
        words = (f"{verb}()", use, "Enter it first", f"{keyword} …")
        assert_teaches(caught.value, errors.NotEntered, *words)


async def use_async(manager: DatabaseSessionManager, verb: str) -> None:
    if verb in VERBS:
        async with getattr(manager, verb)():
            pass
    elif verb == "engine":
        assert manager.engine
    else:
        await getattr(manager, verb)()


def use_sync(door: Database, verb: str) -> None:
    if verb in VERBS:
        with getattr(door, verb)():
            pass
    elif verb == "engine":
        assert door.engine
    else:
        getattr(door, verb)()


ASYNC_VERBS = [*VERBS, "engine", "check", "create_all"]
SYNC_VERBS = [*ASYNC_VERBS, "get_session", "get_engine"]


@pytest.mark.parametrize("verb", ASYNC_VERBS)
def test_use_before_init(verb: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        asyncio.run(use_async(DatabaseSessionManager(), verb))
    assert_teaches(caught.value, errors.NotInitialized, "DatabaseSessionManager", "init(url)")


@pytest.mark.parametrize("verb", SYNC_VERBS)
def test_use_of_the_sync_side_before_init(verb: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        use_sync(DatabaseSessionManager().sync, verb)
    assert_teaches(caught.value, errors.NotInitialized, "init(url)")


def test_the_schema_is_checked_only_of_what_is_open(sqlite_url: str) -> None:
    manager = DatabaseSessionManager()
    kinds: list[type[Exception]] = [errors.NotInitialized, errors.ManagerClosed]
    for kind in kinds:
        with pytest.raises(kind, match=r"check\(\)"):
            manager.sync.check(schema=True)
        with pytest.raises(kind, match=r"check\(\)"):
            asyncio.run(manager.check(schema=True))
        manager.init(sqlite_url)
        asyncio.run(manager.close())


@pytest.mark.parametrize("verb", ASYNC_VERBS)
def test_use_after_close(sqlite_url: str, verb: str) -> None:
    async def main() -> None:
        manager = DatabaseSessionManager().init(sqlite_url)
        await use_async(manager, verb)
        await manager.close()
        await use_async(manager, verb)

    with pytest.raises(RuntimeError) as caught:
        asyncio.run(main())
    assert_teaches(
        caught.value, errors.ManagerClosed, "DatabaseSessionManager is closed", "init(url)"
    )


@pytest.mark.parametrize("verb", SYNC_VERBS)
def test_use_of_a_database_after_close(sqlite_url: str, verb: str) -> None:
    door = Database(sqlite_url)
    use_sync(door, verb)
    door.close()
    with pytest.raises(RuntimeError) as caught:
        use_sync(door, verb)
    assert_teaches(caught.value, errors.ManagerClosed, "Database is closed", "init(url)")


def test_a_second_init(manager: Any, sqlite_url: str) -> None:
    for door in (manager, manager.sync):
        with pytest.raises(RuntimeError) as caught:
            door.init("sqlite://")
        assert_teaches(
            caught.value, errors.AlreadyInitialized, f"{sqlite_url} is already open", "close()"
        )


# --- a session after its end ----------------------------------------------------------------------

# Every public verb of a session that would look into the database or change what a commit would
# store, and what to call it with.
CALLS: dict[str, tuple[Any, ...]] = {
    "add": (Thing(id=2, name="b"),),
    "add_all": ([Thing(id=2, name="b")],),
    "begin": (),
    "begin_nested": (),
    "bulk_insert_mappings": (Thing, []),
    "bulk_save_objects": ([],),
    "bulk_update_mappings": (Thing, []),
    "commit": (),
    "connection": (),
    "delete": (Thing(id=1, name="a"),),
    "delete_all": ([Thing(id=1, name="a")],),
    "enable_relationship_loading": (Thing(id=1, name="a"),),
    "exec": (select(Thing),),
    "execute": (select(Thing),),
    "flush": (),
    "get": (Thing, 1),
    "get_one": (Thing, 1),
    "merge": (Thing(id=1, name="c"),),
    "merge_all": ([Thing(id=1, name="c")],),
    "prepare": (),
    "query": (Thing,),
    "refresh": (Thing(id=1, name="a"),),
    "reset": (),
    "rollback": (),
    "run_sync": (lambda session: session.execute(select(Thing)),),
    "scalar": (select(Thing),),
    "scalars": (select(Thing),),
    "stream": (select(Thing),),
    "stream_scalars": (select(Thing),),
}
# What may be called: it looks at the session, and sends nothing.
LOOKS = {
    "aclose",
    "bind_mapper",
    "bind_table",
    "close",
    "close_all",
    "expire",
    "expire_all",
    "expunge",
    "expunge_all",
    "get_async_bind",
    "get_bind",
    "get_nested_transaction",
    "get_transaction",
    "identity_key",
    "in_nested_transaction",
    "in_transaction",
    "invalidate",
    "is_modified",
    "object_session",
    "refuse",  # Guarded's own
}


def verbs(kind: type) -> list[str]:
    """Return the names of a session's public methods."""
    return [
        name
        for name in dir(kind)
        if not name.startswith("_")
        and callable(inspect.getattr_static(kind, name, None) or getattr(kind, name))
        and not inspect.isclass(getattr(kind, name))
    ]


def session_classes() -> list[tuple[type[Session], type[AsyncSession]]]:
    from sqlmodel import Session as ModelSession
    from sqlmodel.ext.asyncio.session import AsyncSession as AsyncModelSession

    return [(Session, AsyncSession), (ModelSession, AsyncModelSession)]


@pytest.mark.parametrize("classes", session_classes(), ids=["sqlalchemy", "sqlmodel"])
def test_every_verb_of_a_session_is_known_to_this_test(classes: Any) -> None:
    """A verb that a new SQLAlchemy brings has to be put on one of the two lists."""
    for kind in classes:
        assert set(verbs(kind)) <= CALLS.keys() | LOOKS


def ended_sync(door: Database, how: str) -> Session:
    try:
        with door.session() as db:
            db.add(Thing(id=1, name="a"))
            db.flush()
            if how == "failure":
                raise ZeroDivisionError
            if how == "close":
                db.close()
    except ZeroDivisionError:
        pass
    return db


@pytest.mark.filterwarnings(r"ignore:[\s\S]*You probably want to use:DeprecationWarning")
@pytest.mark.parametrize("how", ["scope", "close", "failure"])
@pytest.mark.parametrize("classes", session_classes(), ids=["sqlalchemy", "sqlmodel"])
def test_every_verb_is_refused_after_the_end_of_a_sync_session(
    sqlite_url: str, classes: Any, how: str
) -> None:
    with Database(sqlite_url, session_class=classes[0]) as door:
        door.create_all()
        ended = ended_sync(door, how)
        for verb in sorted(set(verbs(type(ended))) - LOOKS):
            with pytest.raises(SessionClosed) as caught:
                getattr(ended, verb)(*CALLS[verb])
            assert_teaches(
                caught.value, SessionClosed, "test_misuse.py", "has ended", "open a new session"
            )
        assert not ended.in_transaction()
        assert door.stats().pools[0].lent == 0
        door.close()


@pytest.mark.filterwarnings(r"ignore:[\s\S]*You probably want to use:DeprecationWarning")
@pytest.mark.parametrize("how", ["scope", "close", "failure"])
@pytest.mark.parametrize("classes", session_classes(), ids=["sqlalchemy", "sqlmodel"])
def test_every_verb_is_refused_after_the_end_of_an_async_session(
    sqlite_url: str, classes: Any, how: str
) -> None:
    async def main() -> None:
        async with DatabaseSessionManager().init(
            sqlite_url, async_session_class=classes[1]
        ) as door:
            await door.create_all()
            try:
                async with door.session() as ended:
                    ended.add(Thing(id=1, name="a"))
                    await ended.flush()
                    if how == "failure":
                        raise ZeroDivisionError
                    if how == "close":
                        await ended.close()
            except ZeroDivisionError:
                pass
            for verb in sorted(set(verbs(type(ended))) - LOOKS):
                with pytest.raises(SessionClosed) as caught:
                    result = getattr(ended, verb)(*CALLS[verb])
                    if inspect.isawaitable(result):  # `begin()` is refused when it is entered
                        await result
                words = ("test_misuse.py", "has ended", "open a new session")
                assert_teaches(caught.value, SessionClosed, *words)
            assert not ended.in_transaction()
            assert door.stats().pools[0].lent == 0

    asyncio.run(main())


def test_a_session_that_its_user_closed_exits_quietly_and_has_stored_nothing(manager: Any) -> None:
    with manager.sync.session() as db:
        db.add(Thing(id=1, name="a"))
        db.flush()
        db.close()
    with manager.sync.session() as db:
        assert db.get(Thing, 1) is None
        db.add(Thing(id=1, name="a"))
        db.commit()
        db.close()

    async def main() -> None:
        async with manager.session() as db:
            assert (await db.get(Thing, 1)).name == "a"
            await db.close()

    asyncio.run(main())
    assert manager.stats().scopes == ()


def test_a_path_with_braces_does_not_spoil_the_message(sqlite_url: str, tmp_path: Path) -> None:
    """The line that opened the session may lie anywhere, in a template's `{{folder}}` too."""
    namespace: dict[str, Any] = {}
    source = "def use(door):\n with door.session() as db: pass\n return db\n"
    exec(compile(source, str(tmp_path / "{app}" / "app.py"), "exec"), namespace)
    with Database(sqlite_url) as door:
        ended = namespace["use"](door)
        with pytest.raises(SessionClosed, match=r"\{app\}"):
            ended.execute(text("SELECT 1"))


# --- another thread, another process --------------------------------------------------------------

THREAD_USES: dict[str, Callable[[Any], Any]] = {
    "execute": lambda db: db.execute(text("SELECT 1")),
    "scalar": lambda db: db.scalar(select(Thing.name)),
    "get": lambda db: db.get(Thing, 2),
    "flush": lambda db: db.flush(),
    "commit": lambda db: db.commit(),
    "rollback": lambda db: db.rollback(),
    "refresh": lambda db: db.refresh(db.info["thing"]),
    "merge": lambda db: db.merge(Thing(id=3, name="c")),
    "begin_nested": lambda db: db.begin_nested(),
    "connection": lambda db: db.connection(),
}


@pytest.mark.parametrize("use", THREAD_USES)
def test_another_thread_goes_on_with_a_session(manager: Any, use: str) -> None:
    """A framework enters, uses and leaves a scope in a thread each."""
    with manager.sync.session() as db:
        db.info["thing"] = Thing(id=1, name="a")
        db.add(db.info["thing"])
        db.flush()
        db.add(Thing(id=2, name="b"))
        in_threads(1, lambda _: THREAD_USES[use](db))
        entry = db._scope
        assert entry.thread != threading.get_ident()
        db.execute(text("SELECT 1"))  # and back
        assert entry.thread == threading.get_ident()


@pytest.mark.parametrize("use", THREAD_USES)
def test_a_session_used_in_the_middle_of_another_threads_call(manager: Any, use: str) -> None:
    """The error names both threads, and the one that was there first can go on."""
    caught: list[BaseException] = []
    inside, go_on = threading.Event(), threading.Event()

    def intrude(db: Session) -> None:
        inside.wait()
        try:
            THREAD_USES[use](db)
        except BaseException as error:
            caught.append(error)
        go_on.set()

    def pause() -> int:
        inside.set()
        go_on.wait(20)
        return 7

    with manager.sync.session() as db:
        db.info["thing"] = Thing(id=1, name="a")
        db.add(db.info["thing"])
        db.flush()
        db.connection().connection.driver_connection.create_function("pause", 0, pause)
        thread = threading.Thread(target=intrude, args=(db,), name="intruder")
        thread.start()
        assert db.scalar(text("SELECT pause()")) == 7
        thread.join()
        assert caught, f"{use} was let through"
        words = ("intruder", "thread MainThread", "test_misuse.py", "open one in each thread")
        assert_teaches(caught[0], errors.SessionInUse, *words)
        db.add(Thing(id=2, name="b"))
    with manager.sync.session(read_only=True) as db:
        assert sorted(db.scalars(select(Thing.name))) == ["a", "b"]


def test_a_session_of_get_session_in_the_middle_of_another_threads_call(manager: Any) -> None:
    """Its caller ends it, and it is one thread's at a time all the same."""
    caught: list[BaseException] = []

    def intrude() -> int:
        thread = threading.Thread(target=use, name="intruder")
        thread.start()
        thread.join()
        return 7

    def use() -> None:
        try:
            db.execute(text("SELECT 1"))
        except BaseException as error:
            caught.append(error)

    with manager.sync.get_session() as db:
        line = sys._getframe().f_lineno - 1
        db.connection().connection.driver_connection.create_function("intrude", 0, intrude)
        assert db.scalar(text("SELECT intrude()")) == 7
        words = ("intruder", "thread MainThread", f"test_misuse.py:{line}", "open one in each")
        assert_teaches(caught[0], errors.SessionInUse, *words)
        use()
        in_threads(1, lambda _: use())  # one after another is fine
        db.commit()
    assert len(caught) == 1
    with pytest.raises(errors.SessionClosed, match=f"opened at .*test_misuse.py:{line}"):
        db.execute(text("SELECT 1"))


def test_an_async_session_used_in_another_threads_loop(manager: Any) -> None:
    async def use(db: AsyncSession) -> None:
        await db.execute(text("SELECT 1"))

    async def main() -> None:
        async with manager.session() as db:
            await use(db)
            with pytest.raises(UsageError) as caught:
                await asyncio.to_thread(asyncio.run, use(db))
            assert_teaches(caught.value, errors.WrongThread, "task Task-", "test_misuse.py")

    asyncio.run(main())


def in_child(function: Callable[[], object]) -> Any:
    """Run in a forked child, and return what it returned or raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                outcome: Any = ("returned", function())
            except BaseException as error:
                outcome = ("raised", type(error).__name__, str(error))
            os.write(write, pickle.dumps(outcome))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        outcome = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    return outcome


FORK = """
import os, sys
from test_misuse import Database, Thing, in_child, select, text
with Database(sys.argv[1]) as door:
    door.create_all()
    with door.session() as db, door.reader() as reader:
        db.add(Thing(id=1, name="a"))
        db.flush()
        reader.execute(text("SELECT 1"))
        print(in_child(lambda: db.execute(text("SELECT 1"))))
        print(in_child(lambda: db.commit()))
        print(in_child(lambda: reader.execute(text("SELECT 1"))))
        def fresh():
            with door.reader() as mine:
                return mine.scalars(select(Thing.name)).all()
        print(in_child(fresh))
    print(fresh())
"""


def test_a_session_used_in_a_forked_child(url: str) -> None:
    """It is dead there and says so; the child opens its own; the parent never notices."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, url],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    for line in lines[:3]:
        assert line.startswith("('raised', 'SessionClosed'")
        assert "belongs to the parent of this forked process" in line
        assert "Open one of your own here" in line
    assert lines[3:] == ["('returned', [])", "['a']"]


# --- a scope entered twice ------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_scope_that_another_task_or_thread_has_entered(manager: Any, verb: str) -> None:
    async def main() -> None:
        scope = getattr(manager, verb)()

        async def enter() -> None:
            async with scope:
                pass

        async with scope as db:
            with pytest.raises(UsageError) as caught:
                await asyncio.create_task(enter())
            words = (f"{verb} opened at", "test_misuse.py", "is inside it", f"{verb}() again")
            assert_teaches(caught.value, errors.AlreadyEntered, *words)
            with pytest.raises(errors.AlreadyEntered):
                await asyncio.to_thread(asyncio.run, enter())
            assert len(manager.stats().scopes) == 1
            await db.execute(text("SELECT 1"))
        await asyncio.create_task(enter())
        assert manager.stats().scopes == ()

    asyncio.run(main())


@pytest.mark.parametrize("verb", VERBS)
def test_a_scope_that_another_thread_has_entered(manager: Any, verb: str) -> None:
    scope = getattr(manager.sync, verb)()

    def enter() -> None:
        with scope:
            pass

    with ThreadPoolExecutor() as threads:
        with scope as db:
            with pytest.raises(UsageError) as caught:
                threads.submit(enter).result()
            assert_teaches(caught.value, errors.AlreadyEntered, "thread MainThread is inside it")
            db.execute(text("SELECT 1"))
        threads.submit(enter).result()
    assert manager.stats().scopes == ()


@pytest.mark.parametrize("verb", ["session", "connect"])
def test_a_scope_that_is_just_ending_is_not_entered(manager: Any, verb: str) -> None:
    """Its COMMIT is under way: who entered it would lose what the next one does, or its own."""
    scope = getattr(manager, verb)()

    async def enter() -> None:
        async with scope as db:
            await db.execute(text("SELECT 2"))

    async def main() -> None:
        entered: list[BaseException | None] = []

        def slowly(connection: Any) -> None:
            (outcome,) = await_only(asyncio.gather(enter(), return_exceptions=True))
            entered.append(outcome)

        event.listen(manager.engine.sync_engine, "commit", slowly)
        async with scope as db:
            await db.execute(text("SELECT 1"))
        event.remove(manager.engine.sync_engine, "commit", slowly)
        assert [type(outcome) for outcome in entered] == [errors.AlreadyEntered]
        await enter()
        assert sum(pool.lent for pool in manager.stats().pools) == 0

    asyncio.run(main())


@pytest.mark.parametrize("verb", ["session", "connect"])
def test_a_scope_that_is_just_ending_is_entered_by_no_thread(manager: Any, verb: str) -> None:
    scope = getattr(manager.sync, verb)()
    entered: list[BaseException | None] = []

    def enter() -> None:
        with scope as db:
            db.execute(text("SELECT 2"))

    def slowly(connection: Any) -> None:
        with ThreadPoolExecutor(1) as thread:
            entered.append(thread.submit(enter).exception())

    event.listen(manager.sync_engine, "commit", slowly)
    with scope as db:
        db.execute(text("SELECT 1"))
    event.remove(manager.sync_engine, "commit", slowly)
    assert [type(outcome) for outcome in entered] == [errors.AlreadyEntered]
    enter()
    assert sum(pool.lent for pool in manager.stats().pools) == 0


# --- SQLite's one writer --------------------------------------------------------------------------


def assert_is_told_at_once(error: BaseException) -> None:
    words = ("second writer", "test_misuse.py", "read_only=True")
    assert_teaches(error, errors.SelfDeadlock, *words)


@pytest.mark.parametrize("second", ["session", "connect", "get_session", "create_all"])
@pytest.mark.parametrize("first", ["session", "connect"])
def test_a_second_sync_writer_inside_the_first(manager: Any, first: str, second: str) -> None:
    with getattr(manager.sync, first)() as outer:
        outer.execute(text("INSERT INTO misused_thing VALUES (1, 'a')"))
        with pytest.raises(UsageError) as caught:
            if second == "get_session":
                with manager.sync.get_session() as loose:
                    loose.execute(text("SELECT 1"))
            elif second == "create_all":
                missing = MetaData()
                Table("not_there_yet", missing, Column("id", Integer, primary_key=True))
                manager.sync.create_all(missing)
            else:
                with getattr(manager.sync, second)() as inner:
                    inner.execute(text("SELECT 1"))
        assert_is_told_at_once(caught.value)
        outer.execute(text("INSERT INTO misused_thing VALUES (2, 'b')"))
    with manager.sync.reader() as db:
        assert db.scalar(text("SELECT count(*) FROM misused_thing")) == 2
    assert [pool.lent for pool in manager.stats().pools if pool.role == "primary"] == [0]


def test_a_second_sync_writer_that_the_same_line_opened(manager: Any) -> None:
    with manager.sync.session() as first, manager.sync.session() as second:
        first.execute(text("INSERT INTO misused_thing VALUES (1, 'a')"))
        with pytest.raises(UsageError) as caught:
            second.execute(text("SELECT 1"))
        assert_is_told_at_once(caught.value)


@pytest.mark.parametrize("second", ["session", "connect", "get_session", "engine"])
@pytest.mark.parametrize("first", ["get_session", "engine"])
def test_a_second_sync_writer_inside_one_without_a_scope(
    manager: Any, first: str, second: str
) -> None:
    def begin(verb: str) -> Any:
        return manager.sync_engine.begin() if verb == "engine" else getattr(manager.sync, verb)()

    with begin(first) as outer:
        outer.execute(text("INSERT INTO misused_thing VALUES (1, 'a')"))
        with pytest.raises(UsageError) as caught, begin(second) as inner:
            inner.execute(text("SELECT 1"))
        assert_is_told_at_once(caught.value)
        outer.execute(text("INSERT INTO misused_thing VALUES (2, 'b')"))
        outer.commit()
    with manager.sync.reader() as db:
        assert db.scalar(text("SELECT count(*) FROM misused_thing")) == 2
    assert [pool.lent for pool in manager.stats().pools if pool.role == "primary"] == [0]


@pytest.mark.parametrize("second", ["session", "connect", "engine"])
def test_a_second_async_writer_inside_one_of_the_engine(manager: Any, second: str) -> None:
    def begin(verb: str) -> Any:
        return manager.engine.begin() if verb == "engine" else getattr(manager, verb)()

    async def main() -> None:
        async with manager.engine.begin() as outer:
            await outer.execute(text("INSERT INTO misused_thing VALUES (1, 'a')"))
            with pytest.raises(UsageError) as caught:
                async with begin(second) as inner:
                    await inner.execute(text("SELECT 1"))
            assert_is_told_at_once(caught.value)
            await outer.execute(text("INSERT INTO misused_thing VALUES (2, 'b')"))
        async with begin(second) as after:
            await after.execute(text("INSERT INTO misused_thing VALUES (3, 'c')"))

    asyncio.run(main())
    with manager.sync.reader() as db:
        assert db.scalar(text("SELECT count(*) FROM misused_thing")) == 3


@pytest.mark.parametrize("second", ["session", "connect"])
@pytest.mark.parametrize("first", ["session", "connect"])
def test_a_second_async_writer_inside_the_first(manager: Any, first: str, second: str) -> None:
    async def main() -> None:
        async with getattr(manager, first)() as outer:
            await outer.execute(text("INSERT INTO misused_thing VALUES (1, 'a')"))
            with pytest.raises(UsageError) as caught:
                async with getattr(manager, second)() as inner:
                    await inner.execute(text("SELECT 1"))
            assert_is_told_at_once(caught.value)
            await outer.execute(text("INSERT INTO misused_thing VALUES (2, 'b')"))

    asyncio.run(main())
    with manager.sync.reader() as db:
        assert db.scalar(text("SELECT count(*) FROM misused_thing")) == 2


@pytest.mark.filterwarnings("ignore::engineroom.SyncInAsyncWarning")
def test_a_sync_writer_inside_an_async_one(manager: Any) -> None:
    async def main() -> None:
        async with manager.session() as outer:
            await outer.execute(text("INSERT INTO misused_thing VALUES (1, 'a')"))
            with pytest.raises(UsageError) as caught, manager.sync_session() as inner:
                inner.execute(text("SELECT 1"))
            assert_is_told_at_once(caught.value)

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::engineroom.SyncInAsyncWarning")
def test_an_async_writer_inside_a_sync_one(manager: Any) -> None:
    async def main() -> None:
        with manager.sync_session() as outer:
            outer.execute(text("INSERT INTO misused_thing VALUES (1, 'a')"))
            with pytest.raises(UsageError) as caught:
                async with manager.session() as inner:
                    await inner.execute(text("SELECT 1"))
            assert_is_told_at_once(caught.value)

    asyncio.run(main())


def test_readers_inside_a_writer_are_fine(manager: Any) -> None:
    with manager.sync.session() as outer:
        outer.execute(text("INSERT INTO misused_thing VALUES (1, 'a')"))
        with manager.sync.reader() as db:
            assert db.scalar(text("SELECT count(*) FROM misused_thing")) == 0
        with manager.sync.session(read_only=True) as db:
            assert db.scalar(text("SELECT count(*) FROM misused_thing")) == 0
        assert manager.sync.check().seconds > 0

    async def main() -> None:
        async with manager.session() as outer:
            await outer.execute(text("INSERT INTO misused_thing VALUES (2, 'b')"))
            async with manager.reader() as db:
                assert await db.scalar(text("SELECT count(*) FROM misused_thing")) == 1
            async with manager.session(read_only=True) as db:
                assert await db.scalar(text("SELECT count(*) FROM misused_thing")) == 1
            assert (await manager.check()).seconds > 0

    asyncio.run(main())


def test_a_writer_inside_a_reader_or_an_idle_session_is_fine(manager: Any) -> None:
    with manager.sync.session() as idle, manager.sync.session(read_only=True) as reader:
        reader.execute(text("SELECT 1"))
        with manager.sync.session() as writer:
            writer.add(Thing(id=1, name="a"))
        assert idle.get(Thing, 1) is not None


def test_writers_of_other_tasks_and_threads_just_wait(manager: Any) -> None:
    async def write(number: int) -> None:
        async with manager.session() as db:
            db.add(Thing(id=number, name="x"))
            await db.flush()
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(write(number) for number in range(1, 9)))

    asyncio.run(main())
    with manager.sync.reader() as db:
        assert db.scalar(text("SELECT count(*) FROM misused_thing")) == 8


# --- the pool -------------------------------------------------------------------------------------


def read_one(door: Database) -> None:
    """Wait behind the pool, which `check` does not."""
    with door.reader() as db:
        db.execute(text("SELECT 1"))


async def read_one_async(door: DatabaseSessionManager) -> None:
    async with door.reader() as db:
        await db.execute(text("SELECT 1"))


def test_an_exhausted_sync_pool_names_its_holders(url: str) -> None:
    with Database(url, pool_size=1, max_overflow=0, pool_timeout=0.2) as door:
        with door.reader() as holder:
            holder.execute(text("SELECT 1"))
            with ThreadPoolExecutor() as threads, pytest.raises(PoolExhausted) as caught:
                threads.submit(read_one, door).result()
            words = (
                "0.2 s",
                "all 1 are lent",
                "pool_size 1",
                "thread MainThread",
                "test_misuse.py",
                "raise pool_size",
            )
            assert_teaches(caught.value, PoolExhausted, *words)
        for _ in range(3):  # the waiter that gave up has cost no permit
            assert door.check().seconds > 0


def test_an_exhausted_async_pool_names_its_holders(url: str) -> None:
    async def main() -> None:
        options: Any = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 2}
        async with DatabaseSessionManager().init(url, **options) as door:

            async def ask() -> None:
                async with door.reader() as db:
                    await db.execute(text("SELECT 1"))

            asyncio.current_task().set_name("the-holder")  # type: ignore[union-attr]
            async with door.reader() as holder:
                await holder.execute(text("SELECT 1"))
                waiters = [asyncio.create_task(ask()) for _ in range(3)]
                failures = await asyncio.gather(*waiters, return_exceptions=True)
                for failure in failures:
                    words = (
                        "2 s",
                        "all 1 are lent",
                        "task the-holder",
                        "test_misuse.py",
                        "raise pool_size",
                    )
                    assert_teaches(failure, PoolExhausted, *words)  # type: ignore[arg-type]
            for _ in range(3):
                assert (await door.check()).seconds > 0

    asyncio.run(main())


def test_who_gave_up_is_not_counted_as_waiting(sqlite_url: str) -> None:
    with Database(sqlite_url, pool_size=1, max_overflow=0, pool_timeout=0.05) as door:
        with door.reader() as holder:
            holder.execute(text("SELECT 1"))
            for _ in range(3):
                with ThreadPoolExecutor() as threads, pytest.raises(PoolExhausted):
                    threads.submit(read_one, door).result()
            assert door.stats().pools[0].waiting == 0


def test_a_waiter_that_is_cancelled_costs_no_permit(url: str) -> None:
    async def main() -> None:
        async with DatabaseSessionManager().init(url, pool_size=1, max_overflow=0) as door:
            async with door.reader() as holder:
                await holder.execute(text("SELECT 1"))
                waiters = [asyncio.create_task(read_one_async(door)) for _ in range(5)]
                while door.stats().pools[0].waiting < 5:
                    await asyncio.sleep(0)
                for waiter in waiters[:-1]:
                    waiter.cancel()
            await waiters[-1]
            for _ in range(3):
                assert (await door.check()).seconds > 0

    asyncio.run(main())


# --- a synchronous session in an event loop (guarantee 18) ----------------------------------------


def test_a_sync_session_in_a_loop_warns_once_per_line(manager: Any) -> None:
    async def main() -> None:
        for _ in range(3):
            with manager.sync_session(read_only=True) as db:
                db.execute(text("SELECT 1"))
        for _ in range(3):
            with manager.sync.reader() as db:
                db.execute(text("SELECT 1"))

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        asyncio.run(main())
    heard = [warning for warning in heard if warning.category is SyncInAsyncWarning]
    assert [warning.filename for warning in heard] == [__file__, __file__]
    lines = [inspect.getsourcelines(main)[1] + offset for offset in (2, 5)]
    for warning, line in zip(heard, lines, strict=True):
        assert warning.lineno == line
        assert f"test_misuse.py:{line} in main" in str(warning.message)
        assert "asyncio.to_thread" in str(warning.message)


@pytest.mark.parametrize("verb", ["check", "create_all"])
def test_a_sync_verb_in_a_loop_warns_with_the_callers_line(manager: Any, verb: str) -> None:
    async def main() -> None:
        getattr(manager.sync, verb)()

    scopes._warned.clear()  # both verbs share the line above
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        asyncio.run(main())
    heard = [warning for warning in heard if warning.category is SyncInAsyncWarning]
    assert [warning.filename for warning in heard] == [__file__]


@pytest.mark.parametrize("verb", ["session", "reader", "connect"])
def test_a_sync_session_in_a_loop_is_an_error_on_request(sqlite_url: str, verb: str) -> None:
    async def main(door: Database) -> None:
        with pytest.raises(UsageError) as caught, getattr(door, verb)():
            pass
        words = (f"{verb}()", "test_misuse.py", "asyncio.to_thread", "DB_SYNC_IN_ASYNC")
        assert_teaches(caught.value, errors.SyncInAsync, *words)
        assert door.stats().scopes == ()

    with Database(sqlite_url, sync_in_async="error") as door:
        asyncio.run(main(door))
        assert door.check().seconds > 0  # outside a loop


def test_a_sync_session_in_a_thread_or_with_allow_is_silent(sqlite_url: str) -> None:
    def use(door: Database) -> Any:
        with door.session() as db:
            return db.scalar(text("SELECT 42"))

    async def main() -> None:
        with Database(sqlite_url, sync_in_async="error") as door:
            assert await asyncio.to_thread(use, door) == 42
        with Database(sqlite_url, sync_in_async="warn") as door:
            assert await asyncio.to_thread(use, door) == 42
        with Database(sqlite_url, sync_in_async="allow") as door:
            assert use(door) == 42

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        asyncio.run(main())
    assert [w for w in heard if w.category is SyncInAsyncWarning] == []
