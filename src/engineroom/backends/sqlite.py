"""SQLite, made to keep its word: foreign keys, real transactions, WAL, one shared `:memory:`."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Dialect, Engine, ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.schema import DropTable
from sqlalchemy.util import await_only

from ..cancellation import settle
from ..errors import BrokenReferences, InvalidOption, InvalidPath, InvalidURL, SelfDeadlock
from ..ledger import berth_of
from ..secrecy import NAMES_ONLY
from ..urls import masked
from . import (
    Diagnosis,
    Leaving,
    Reached,
    Role,
    Sent,
    Side,
    choose_driver,
    refuse_unknown_driver,
)

DRIVERS = {Side.ASYNC: {"aiosqlite": "aiosqlite"}, Side.SYNC: {"pysqlite": "sqlite3"}}

READ_ONLY = "engineroom_read_only"
QUERY_ONLY = "engineroom_query_only"
READ_ONLY_SAID = "attempt to write a readonly database"
WAITS_HERE = "engineroom_waits_here"  # for the lock: SQLite itself does not
BEGINS_LATER = "engineroom_begins_later"

# What a session leaves on its connection. (Pragmas that only ask take parentheses, too.)
LEAVES = re.compile(
    r"\bpragma\s+(?:\w+\.)?\w+\s*=|\bpragma\s+(?:\w+\.)?(?!\w*(?:_x?info|_list|_check)\b)\w+\s*\("
    r"|\b(?:attach|detach)\b|\bcreate\s+temp(?:orary)?\b|\bcreate\s[^;]*?\btemp\s*\.",
    re.IGNORECASE,
)
OURS = " -- engineroom"  # stands in pragmas that are our own
KEPT = 5000  # texts; some have their values in them, and are never seen again

BEGIN_WRITE = "BEGIN IMMEDIATE"
REFERRING = """
SELECT t.name, f."from" FROM sqlite_master AS t JOIN pragma_foreign_key_list(t.name) AS f
WHERE t.type = 'table' AND lower(f."table") = lower(?) AND lower(t.name) <> lower(?)
"""

SQLITE_BUSY, SQLITE_READONLY = 5, 8  # of SQLite's result codes
SQLITE_BUSY_SNAPSHOT = SQLITE_BUSY | 2 << 8  # an extended one: others have written meanwhile
# Seconds between two tries for a lock, the last for all that follow. SQLite's own begin like this,
# but go on to 0.1, with which a caller who waits through an event loop would come too late.
PAUSES = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025)
INTERRUPT_EVERY = 0.02  # seconds
ROLLBACKS = 3
LET_GO_LIMIT = 1.0  # seconds for a thread to leave the statement that was interrupted


class Readings(dict[str, bool]):
    """Whether each text leaves something that was sent once."""

    def __missing__(self, text: str) -> bool:
        """Read a text."""
        if len(self) >= KEPT:
            self.clear()
        self[text] = leaves = not text.endswith(OURS) and LEAVES.search(text) is not None
        return leaves


READINGS = Readings()


class SQLite:
    """One SQLite file; `:memory:` is a private temporary one that both sides share."""

    has_server = False
    keeps_time = True

    def __init__(self, url: URL, busy_timeout: float) -> None:
        refuse_unknown_driver(url, DRIVERS)
        if url.host:
            raise InvalidURL(
                f"{masked(url)}: a SQLite file has no host. Write three slashes for a file in this "
                f"folder, sqlite:///{url.host}, and four for an absolute path: sqlite:////srv/app.db."
            )
        self._url = url
        self._busy_timeout = busy_timeout
        self._in_memory = url.database in (None, "", ":memory:")
        self._private: dict[str, tuple[str, weakref.finalize[Any, Any]]] = {}  # at most one
        self._records: weakref.WeakSet[Any] = weakref.WeakSet()  # SQLAlchemy's, one a connection
        self._inherited_transaction = False

    def engine_url(self, side: Side) -> URL:
        """Return the URL of the file, which is made sure to be one that can be written.

        Raises:
            InvalidPath: its folder does not exist, or it cannot be written.
        """
        url = self._url
        if self._in_memory:
            url = url.set(database=self._make_private_file())
        elif self._url.query.get("uri") != "true":
            _check_path(Path(self._url.database or ""))
        return choose_driver(url, DRIVERS[side], "sqlite")

    def engine_options(
        self, side: Side, role: Role, connect_args: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the options of a role: a reader's statements stand alone."""
        self._busy_timeout = connect_args.get("timeout", self._busy_timeout)  # theirs comes first
        arguments: dict[str, Any] = {"timeout": self._busy_timeout} | connect_args
        if side is Side.ASYNC:
            arguments.setdefault("async_creator_fn", _open)
        options: dict[str, Any] = {"connect_args": arguments}
        if role is Role.READER:
            options["isolation_level"] = "AUTOCOMMIT"
        return options

    def read_only_options(self) -> dict[str, Any]:
        """Return the option that `_begin` reads."""
        return {READ_ONLY: True}

    def attach(
        self, engine: Engine, role: Role, before_write: Callable[[Connection], None]
    ) -> None:
        """Attach what SQLite needs at each connect and at each BEGIN."""

        def connect(connection: Any, record: Any) -> None:
            self._records.add(record)
            cursor = connection.cursor()
            self._use_wal(connection, cursor, engine.dialect)
            cursor.close()
            pragmas = ["PRAGMA foreign_keys=ON"]
            if self._in_memory:
                pragmas.append("PRAGMA synchronous=OFF")  # nobody reads it after the process
            if role is Role.READER:
                pragmas.append("PRAGMA query_only=ON")
            _run_script(connection, "; ".join(pragmas))  # in one turn of aiosqlite's thread

        if engine.dialect.is_async:
            event.listen(engine, "connect", _steady, insert=True)
            if engine.hide_parameters:
                logging.getLogger("aiosqlite").addFilter(NAMES_ONLY)  # (the same one: once)
        event.listen(engine, "connect", connect)
        event.listen(engine, "handle_error", partial(_tell_who_may_write, role))
        if role is Role.PRIMARY:
            event.listen(engine, "begin", partial(self._begin, before_write))
            self._wait_for_the_lock_here(engine.dialect)
        _note_what_is_left(engine.dialect)

    def _begin(self, before_write: Callable[[Connection], None], connection: Connection) -> None:
        """Begin as the session asks for: to read, to write, or not at all."""
        options, info = connection.get_execution_options(), connection.info
        reads = bool(options.get(READ_ONLY))
        if reads is not info.get(QUERY_ONLY, False):
            connection.exec_driver_sql(f"PRAGMA query_only={'ON' if reads else 'OFF'}{OURS}")
            info[QUERY_ONLY] = reads
        stands_alone = options.get("isolation_level") == "AUTOCOMMIT"
        if stands_alone is not info.get(WAITS_HERE, False):
            pragma = self._busy_pragma(0 if stands_alone else self._busy_timeout)
            connection.exec_driver_sql(f"{pragma}{OURS}")
            info[WAITS_HERE] = stands_alone
        if stands_alone:
            return
        if reads:
            connection.exec_driver_sql("BEGIN")
        else:
            # A plain BEGIN fails at its first write if another wrote in between, and waiting
            # cannot help it any more: IMMEDIATE waits where waiting helps.
            before_write(connection)
            self._refuse_inherited()
            if not options.get(BEGINS_LATER):
                connection.exec_driver_sql(BEGIN_WRITE)

    def _wait_for_the_lock_here(self, dialect: Any) -> None:
        """Wait for the lock in SQLite's place: its waiting ends for no cancellation, nor Ctrl-C.

        Mappers remember dialects: what is put on this one must not keep its engine for as long.
        """
        execute, busy = dialect.do_execute, dialect.loaded_dbapi.OperationalError

        def waiting(cursor: Any, error: Any, context: Any) -> Any:
            """Return a cursor that waits, if this one met a lock where each statement is alone."""
            lent = context.root_connection.connection
            if _code(error) != SQLITE_BUSY or not lent.info.get(WAITS_HERE):
                raise error
            insist = partial(self._insist, lent.dbapi_connection, dialect)
            return SimpleNamespace(
                execute=lambda *what: insist(partial(cursor.execute, *what)),
                executemany=lambda *what: insist(partial(cursor.executemany, *what)),
            )

        def execute_here(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
            if statement == BEGIN_WRITE:
                lent = context.root_connection.connection
                if not lent.driver_connection.in_transaction:  # else SQLite refuses it at once
                    begin = partial(self._begin_write, lent.dbapi_connection, dialect)
                    cursor = SimpleNamespace(execute=begin)
            try:
                execute(cursor, statement, parameters, context)
            except busy as error:
                execute(waiting(cursor, error, context), statement, parameters, context)

        def patient(execute: Callable[..., None]) -> Callable[..., None]:
            """Wrap one of its siblings, whose last argument is the context, too."""

            def execute_here(cursor: Any, *what: Any) -> None:
                try:
                    execute(cursor, *what)
                except busy as error:
                    execute(waiting(cursor, error, what[-1]), *what)

            return execute_here

        dialect.do_execute = execute_here
        dialect.do_executemany = patient(dialect.do_executemany)
        dialect.do_execute_no_params = patient(dialect.do_execute_no_params)

    def _begin_write(self, connection: Any, dialect: Any, *_: object) -> None:
        """Take the lock in one call: each would cost the asynchronous side a turn of the loop."""
        usual = self._busy_pragma(self._busy_timeout)
        script = f"PRAGMA busy_timeout=0; {BEGIN_WRITE}; {usual}"
        try:
            self._insist(connection, dialect, partial(_run_script, connection, script))
        except Exception:  # (after any other SQLAlchemy parts with the connection)
            with suppress(Exception):
                _run_script(connection, usual)
            raise

    def _use_wal(self, connection: Any, cursor: Any, dialect: Any) -> None:
        """Switch the file to WAL; the switch ignores the busy timeout, so the wait is here."""

        def switch() -> None:
            cursor.execute("PRAGMA journal_mode")
            if cursor.fetchone()[0] != "wal":
                cursor.execute("PRAGMA journal_mode=WAL")

        try:
            self._insist(connection, dialect, switch)
        except dialect.loaded_dbapi.OperationalError as error:
            if _code(error) != SQLITE_READONLY:  # somebody opened it so, and reads
                raise

    def _busy_pragma(self, seconds: float) -> str:
        return f"PRAGMA busy_timeout={int(seconds * 1000)}"

    def _insist(self, connection: Any, dialect: Any, attempt: Callable[[], None]) -> None:
        """Try until nobody holds the lock, or the busy timeout is over."""
        deadline = time.monotonic() + self._busy_timeout
        for pause in chain(PAUSES, repeat(PAUSES[-1])):
            try:
                return attempt()
            except dialect.loaded_dbapi.OperationalError as error:
                left = deadline - time.monotonic()
                if _code(error) != SQLITE_BUSY or left <= 0:
                    raise
            _sleep(connection, min(pause, left))
        return None

    def _refuse_inherited(self) -> None:
        """Refuse to wait for a lock that this process inherited, and nobody in it will release."""
        if self._inherited_transaction:
            raise SelfDeadlock(
                f"The SQLite database {self._url.database or ':memory:'} was in a transaction when "
                "this process was forked, and SQLite counts its lock as held here for ever. Fork "
                "outside of transactions, start the child with the spawn method, or only read in "
                "it: session(read_only=True)."
            )

    def way_to_connect(self, dialect: Dialect) -> Callable[..., Any]:
        """Leave it to SQLAlchemy."""
        return dialect.connect

    def limit_connect(self, arguments: dict[str, Any], seconds: float) -> None:
        """Opening a file does not wait."""

    def limit_each_host(self, arguments: dict[str, Any], seconds: float) -> None:
        """There is one at most."""

    def may_be_refused(self, error: Exception) -> bool:
        """A file has no users."""
        return False

    def look(self, connection: Connection, driver: Any, wanted: int) -> Reached:
        """Ask the library for its version, and have it read the file."""
        started = time.perf_counter()
        version = connection.exec_driver_sql(
            "SELECT sqlite_version(), (SELECT count(*) FROM sqlite_master)"
        ).one()[0]
        return Reached(
            server=f"SQLite {version}",
            role="primary",
            address=None,
            tls=None,
            pooler=None,
            latency=time.perf_counter() - started,
            skew=None,
        )

    def diagnose(self, error: BaseException, seconds: float = 0.0) -> Diagnosis | None:
        """What SQLite says of a file says all; a lock that another one holds passes."""
        cure = "Wait, or raise DB_BUSY_TIMEOUT."
        is_busy = _code(error) == SQLITE_BUSY
        return Diagnosis(True, "another process holds the lock", cure) if is_busy else None

    def descriptor(self, driver: Any) -> int | None:
        """A file has no socket."""
        return None

    def is_closed(self, driver: Any) -> bool:
        """A file has no socket to be closed."""
        return False

    def tells_rest(self, driver: str) -> Callable[[Any], bool]:
        """It rests: SQLAlchemy rolls back whatever is open before it returns a connection."""
        return lambda opened: True

    def ping(self, connection: PoolProxiedConnection, engine: Engine) -> None:
        """A file has no server that could have gone."""

    def awaits_begin(self, connection: PoolProxiedConnection, cursor: Any) -> bool:
        """Nobody is waited for."""
        return False

    def begins_with(self, driver: Any) -> bool:
        """None does."""
        return False

    def watch(self, driver: Any, note: Callable[[Leaving, Sent], None]) -> None:
        """Its dialect tells, to its berth: a connection has no room for more."""

    def clean(self, connection: ConnectionPoolEntry, hooks: Sequence[Sent]) -> None:
        """Close it: opening a file costs less than asking what there is to clean."""
        connection.close()

    def guard(self, connection: Connection, guards: Mapping[str, float]) -> None:
        """Refuse them: a file has no server that could keep a deadline."""
        if not guards:
            return
        raise InvalidOption(
            f"{', '.join(guards)} cannot be set for a session of SQLite, which has no server that "
            "would keep them. Leave them out here."
        )

    def struck(
        self, error: BaseException, own: Mapping[str, float], idle: float, ran: float, is_lost: bool
    ) -> tuple[str, float] | None:
        """There are none."""
        return None

    def holds_write_lock(self, connection: PoolProxiedConnection) -> bool:
        """Whether the connection is in a transaction that may write."""
        driver: Any = connection.driver_connection
        return (
            driver is not None
            and bool(driver.in_transaction)
            and not connection.info.get(QUERY_ONLY, False)
        )

    def end(
        self,
        connections: Sequence[PoolProxiedConnection],
        apart: Callable[[Callable[[Connection], object]], None],
        *,
        is_abandoned: bool = False,
    ) -> None:
        """Interrupt what runs and roll it back: the lock on the file must go."""
        if any(hasattr(each.dbapi_connection, "run_async") for each in connections):
            ending = self._end_all([each.driver_connection for each in connections], is_abandoned)
            if asyncio._get_running_loop() is None:  # theirs stands still: any loop will do
                asyncio.run(ending)
            else:
                await_only(ending)
            return
        for connection in connections:
            adapted: Any = connection.dbapi_connection
            limit = time.monotonic() + LET_GO_LIMIT
            with suppress(_errors()):  # its thread has closed it
                adapted.interrupt()
                while adapted.in_transaction and time.monotonic() < limit:
                    with suppress(_errors()):  # the interrupt may hit this as well
                        adapted.rollback()
                    time.sleep(PAUSES[0])

    def interrupt(self, driver: Any) -> None:
        """Interrupt what runs; its thread rolls back."""
        driver.interrupt()

    async def break_off(self, driver: Any) -> None:
        """Stop the statement and roll back: whatever is left of it would lock the file.

        An interrupt that comes late hits the ROLLBACK instead, which is then asked for again.
        """
        await _interrupting(driver, driver.cursor())
        for _ in range(ROLLBACKS):
            with suppress(_errors()):
                await _interrupting(driver, driver.rollback())
                break

    async def _end(self, driver: Any) -> None:
        """Break off, and close: the task that uses it may be about to send its next statement."""
        await self.break_off(driver)
        await _interrupting(driver, driver.close())

    async def _end_all(self, drivers: Iterable[Any], is_abandoned: bool) -> None:
        """Do so side by side; the thread of one that a closed loop has left may answer no more."""
        limit = LET_GO_LIMIT if is_abandoned else None
        ending = [asyncio.wait_for(self._end(driver), limit) for driver in drivers]
        await asyncio.gather(*ending, return_exceptions=is_abandoned)

    def say_farewell(self, driver: Any) -> None:
        """None does."""

    def cut(self, driver: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Stop the thread of an aiosqlite connection; it closes the file at its end.

        Asked in a thread without an event loop, aiosqlite promises no loop to report to. Where its
        thread could not tell a closed loop of an error, it has ended, and holds the lock still.
        """
        if not _thread_of(driver).is_alive():
            with suppress(ValueError, _errors()):  # it is closed
                raw = _sqlite3_connection(driver)
                raw.rollback()
                raw.close()
            return
        stopper = threading.Thread(target=driver.stop)
        stopper.start()
        stopper.join()

    def disown(self, drivers: Iterable[Any]) -> None:
        """Close the parent's connections here, so that SQLite forgets the parent's locks.

        SQLite notes the locks of its process in the process, and the child's would count as held
        while they are not. One in use cannot be closed, for its rollback would reach into the
        parent's transaction: it stays, and with it the note that its lock is held.
        """
        for record in list(self._records):
            driver: Any = record.driver_connection
            if driver is None:
                continue
            if not record.in_use:
                _sqlite3_connection(driver).close()
            elif driver.in_transaction:
                self._inherited_transaction = True
        self._records.clear()

    def dispose(self) -> None:
        """Remove the private file."""
        if self._private:
            _, remove = self._private.pop("folder")
            remove()

    def _make_private_file(self) -> str:
        """Return the private file; threads that come at once get the same one."""
        if not self._private:
            folder = tempfile.mkdtemp(prefix="engineroom-")
            remove = weakref.finalize(self, _remove_folder, folder, os.getpid())
            self._private.setdefault("folder", (folder, remove))
            if self._private["folder"][0] != folder:
                remove()  # another thread was faster
        return str(Path(self._private["folder"][0], "memory.db"))


class FileLock:
    """The lock that each writer of a SQLite file holds, from BEGIN IMMEDIATE to its end."""

    longest_pause: float = PAUSES[-1]  # every writer asks for it: one who comes less often loses
    # All that SQLite's DDL does is transactional. A block outside of the transaction would let go
    # of the lock, in the middle of a step that another starter then begins again.
    autocommit_block: Callable[[], AbstractContextManager[None]] | None = nullcontext

    def __init__(self) -> None:
        self._changes = 0
        self._before: tuple[bool, int] = (False, 0)  # whether it begins later, and foreign keys

    def options(self) -> dict[str, Any]:
        """Have engineroom's own connections not begin by themselves, nor wait in their own way."""
        return {BEGINS_LATER: True}

    def look_options(self) -> dict[str, Any]:
        """Have engineroom's own begin as readers."""
        return {READ_ONLY: True}

    def begin(self, connection: Connection, *, writes: bool) -> None:
        """Begin, where engineroom's own connections do: for a look now, for the lock later."""
        connection.execution_options(**{READ_ONLY: not writes, BEGINS_LATER: writes})
        connection.begin()

    @contextmanager
    def looking(self, connection: Connection) -> Generator[None]:
        """Have SQLite refuse writes: a connection that engineroom did not make knows no option."""
        before = connection.exec_driver_sql("PRAGMA query_only").scalar_one()
        connection.exec_driver_sql(f"PRAGMA query_only=ON{OURS}")
        try:
            yield
        finally:
            connection.exec_driver_sql(f"PRAGMA query_only={before}{OURS}")

    def is_refusal(self, error: BaseException | None) -> bool:
        """Ask for SQLITE_READONLY."""
        return _code(error) == SQLITE_READONLY

    def set_guards(self, connection: Connection, *, whole_session: bool) -> None:
        """SQLite has no deadlines, but foreign keys, which would empty what refers to a table.

        Alembic's batches drop a table and put a new one in its place. Inside of a transaction
        SQLite ignores this: here none has begun.
        """
        if whole_session:
            begins_later = bool(connection.get_execution_options().get(BEGINS_LATER))
            connection.execution_options(**self.options())
            self._before = (begins_later, _run_apart(connection, "PRAGMA foreign_keys")[0])
            _run_apart(connection, "PRAGMA foreign_keys=OFF")
            self._changes = _changes(connection)

    def try_take(self, connection: Connection, *, whole_session: bool) -> bool:
        """Begin as a writer, or become one where somebody has begun already; without waiting."""
        if not connection.in_transaction():
            connection.begin()
        lent: Any = connection.connection
        has_begun = lent.driver_connection.in_transaction
        cursor = lent.dbapi_connection.cursor()
        try:
            cursor.execute("PRAGMA busy_timeout")
            (usual,) = cursor.fetchone()
            cursor.execute("PRAGMA busy_timeout=0")
            try:
                if has_begun:
                    _write_nothing(cursor)
                else:
                    cursor.execute(BEGIN_WRITE)
            except connection.dialect.loaded_dbapi.OperationalError as error:
                is_stale = getattr(error, "sqlite_errorcode", 0) == SQLITE_BUSY_SNAPSHOT
                if is_stale or _code(error) != SQLITE_BUSY:  # waiting makes no snapshot newer
                    raise
                return False
            finally:
                cursor.execute(f"PRAGMA busy_timeout={usual}")
        finally:
            cursor.close()
        return True

    def rest(self, connection: Connection) -> None:
        """What has not begun as a writer holds nothing."""

    @contextmanager
    def minding_drops(self, connection: Connection) -> Generator[None]:
        """Refuse to drop a table that rows refer to: their foreign keys are enforced.

        SQLite empties the table first, and ON DELETE CASCADE takes the rows of others along.
        Inside of a transaction nobody can tell it not to.
        """
        if not connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one():
            yield
            return

        def mind(connection: Connection, clause: Any, *_: Any) -> None:
            if isinstance(clause, DropTable):
                _refuse_if_referred_to(connection, clause.element.name)

        event.listen(connection, "before_execute", mind)
        try:
            yield
        finally:
            event.remove(connection, "before_execute", mind)

    def finish(self, connection: Connection) -> None:
        """Commit, if no row refers to one that is not there; that is a look at all of them."""
        changed = _changes(connection) > self._changes  # each migration notes that it was run
        check = "PRAGMA foreign_key_check"
        if changed and (broken := connection.exec_driver_sql(check).fetchall()):
            tables = sorted({f"{table} → {parent}" for table, _, parent, _ in broken})
            raise BrokenReferences(
                f"The migrations of {connection.engine.url.database} were rolled back: rows would "
                f"refer to rows that are not there ({len(broken)}: {', '.join(tables)}). SQLite "
                "does not ask while tables are rebuilt, so this was asked at their end (PRAGMA "
                "foreign_key_check). Have a migration delete or mend those rows."
            )
        connection.commit()

    def release(self, connection: Connection) -> None:
        """The lock has gone with the transaction; foreign keys are enforced as they were."""
        begins_later, enforced = self._before
        connection.execution_options(**{BEGINS_LATER: begins_later})
        _run_apart(connection, f"PRAGMA foreign_keys={enforced}")

    def holder(self, connection: Connection) -> str:
        """Name the file: SQLite does not know its holder."""
        return f"another writer of the file {connection.engine.url.database}"

    def cure(self) -> str:
        """Say how the processes are found."""
        return "find and end its process (fuser names those that have the file open)"


def _refuse_if_referred_to(connection: Connection, table: str) -> None:
    """Refuse to drop a table that rows of another one refer to.

    Raises:
        BrokenReferences: they do.
    """
    referring = connection.exec_driver_sql(REFERRING, (table, table)).all()
    quote = connection.dialect.identifier_preparer.quote_identifier
    for other, column in referring:
        rows = f"SELECT 1 FROM {quote(other)} WHERE {quote(column)} IS NOT NULL LIMIT 1"  # noqa: S608
        if connection.exec_driver_sql(rows).first():
            raise BrokenReferences(
                f"The table {table} of {connection.engine.url.database} was not dropped, alone or "
                f"to be rebuilt: rows of {other} refer to it, and would be deleted or refused with "
                "it. The migrations run in a transaction that had begun before, in which SQLite "
                "enforces foreign keys. Give them a connection that is in none: engine.connect()."
            )


def _write_nothing(cursor: Any) -> None:
    """Have a transaction that has begun, as a reader perhaps, be a writer's."""
    cursor.execute("SAVEPOINT engineroom")
    try:
        cursor.execute("CREATE TABLE engineroom_writes (one)")
    finally:
        cursor.execute("ROLLBACK TO engineroom")
        cursor.execute("RELEASE engineroom")


def _changes(connection: Connection) -> int:
    """Return how many rows the connection has ever changed."""
    driver: Any = connection.connection.driver_connection
    return int(driver.total_changes)


def _tell_who_may_write(role: Role, context: ExceptionContext) -> None:
    """Say what to take instead where nobody may write: SQLite would have it be the file."""
    options = context.connection.get_execution_options() if context.connection else {}
    is_reader = role is Role.READER
    if READ_ONLY_SAID in str(context.original_exception) and (is_reader or options.get(READ_ONLY)):
        which = "reader()" if is_reader else "session(read_only=True)"
        error = context.sqlalchemy_exception or context.original_exception
        error.add_note(f"{which} writes nothing. Take session().")


def _run_apart(connection: Connection, statement: str) -> Any:
    """Run a statement without the transaction that SQLAlchemy would begin; return its first row."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement)
        return cursor.fetchone()
    finally:
        cursor.close()


@cache
def _errors() -> type[Exception]:
    """Return what sqlite3 raises: it is not imported for who has another database."""
    import sqlite3

    return sqlite3.Error


def _code(error: Any) -> int:
    """Return SQLite's result code; 0 if the error is the driver's own."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _run_script(connection: Any, script: str) -> None:
    if hasattr(connection, "run_async"):
        connection.run_async(lambda driver: driver.run_script(script))
    else:
        connection.executescript(script)


def _sleep(connection: Any, seconds: float) -> None:
    if hasattr(connection, "run_async"):
        connection.run_async(lambda driver: asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


async def _interrupting(driver: Any, call: Coroutine[Any, Any, object]) -> None:
    """Await a call of aiosqlite's thread; interrupt what still runs in front of it there."""
    turn = asyncio.ensure_future(call)
    while not (await asyncio.wait((turn,), timeout=INTERRUPT_EVERY))[0]:
        with suppress(ValueError, _errors()):  # closed, if the call was `close()`
            await driver.interrupt()
    await turn


async def _open(*args: Any, **kw: Any) -> Any:
    """Open a connection of aiosqlite; one that is cancelled is closed as soon as it is open.

    aiosqlite would drop it, and the garbage collector would find the file open, whenever it comes.
    """
    from aiosqlite import connect

    connection = connect(*args, **kw)
    _thread_of(connection).daemon = True  # as SQLAlchemy has it: it keeps no process from its end
    opening = asyncio.ensure_future(connection)
    try:
        await asyncio.wait((opening,))
    except asyncio.CancelledError:
        with suppress(Exception):  # it was not opened, or not in time
            await settle(_close_opened(opening))
        raise
    return opening.result()


async def _close_opened(opening: asyncio.Future[Any]) -> None:
    await (await opening).close()


def _thread_of(connection: Any) -> threading.Thread:
    """Return the thread of aiosqlite's connection.

    No public name leads to it. `tests/test_private_names.py` fails when it goes.
    """
    thread: threading.Thread = connection._thread
    return thread


def _steady(connection: Any, record: Any) -> None:
    """Make a new connection one of the class below, before anything can interrupt it."""
    connection.driver_connection.__class__ = _steady_connection()


@cache
def _steady_connection() -> Any:
    """Make aiosqlite's connection a class that can be cancelled at the end of a scope."""
    from aiosqlite import Connection, OperationalError

    class SteadyConnection(Connection):
        closing = False
        stopped = False

        async def rollback(self) -> None:
            """Roll back what there is: the pool asks at each return, where a cancellation that
            strikes meanwhile would reach a caller whose work is committed.
            """
            if not self.closing and self.in_transaction:
                await super().rollback()

        async def close(self) -> None:
            """Close; from here on there is nothing to roll back."""
            self.closing = True
            await super().close()

        async def run_script(self, script: str) -> None:
            """Run statements in one call; a connection that was closed is the driver's error."""
            try:
                await self.executescript(script)
            except ValueError as error:
                raise OperationalError(str(error)) from error

        def stop(self) -> Any:
            """Stop once: a second time, `close()` would wait for a thread that has ended."""
            if self.stopped:
                return None
            self.stopped = True
            return super().stop()

    return SteadyConnection


def _sqlite3_connection(driver: Any) -> Any:
    """Return the connection inside aiosqlite's, whose thread a forked child does not have.

    No public name leads to it. `tests/test_private_names.py` fails when it goes.
    """
    return getattr(driver, "_conn", driver)


def _note_what_is_left(dialect: Any) -> None:
    """Have a dialect note on a connection what a text leaves on it."""

    def watching(execute: Callable[..., None]) -> Callable[..., None]:
        def watched(cursor: Any, statement: str, *rest: Any) -> None:
            if READINGS[statement]:
                berth = berth_of(rest[-1].root_connection.connection)
                if berth is not None:
                    berth.note(Leaving.STATE, ("execute", (statement,)))
            execute(cursor, statement, *rest)

        return watched

    for verb in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, verb, watching(getattr(dialect, verb)))


def _remove_folder(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child shares its parent's database
        shutil.rmtree(folder, ignore_errors=True)


def _check_path(path: Path) -> None:
    folder = path.absolute().parent
    try:
        there, is_folder = folder.is_dir(), path.is_dir()
    except PermissionError:
        raise InvalidPath(
            f"The SQLite file {path} cannot be opened: this user may not enter {folder}. Give the "
            "user the right to, or choose another place."
        ) from None
    if not there:
        raise InvalidPath(
            f"The SQLite file {path} cannot be opened: its folder {folder} does not exist. Create "
            "the folder, or correct the path (an absolute one has four slashes: "
            "sqlite:////srv/app.db)."
        )
    if is_folder:
        raise InvalidPath(f"{path} is a folder, not a SQLite file. Name a file in it.")
    for place in (folder, path):
        if place.exists() and not os.access(place, os.W_OK):
            raise InvalidPath(
                f"The SQLite file {path} cannot be written: {place} is read-only for this user. "
                "Give the user the right to write there: SQLite keeps its journal beside the file."
            )
