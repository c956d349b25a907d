"""The outer transaction of a sandbox: each transaction inside is a savepoint of it.

One connection serves all who ask, in turn. A transaction that has begun stands on a stack, as its
savepoint does, and only the top of it may be used. Whoever else comes goes on top if

- nothing stands there, or only what has written nothing: that is taken off, and set again at its
  next statement;
- the top is its own: it was begun in the same task, in one that started this task, or in the
  thread that did (a context variable knows);
- the top has been idle for a while (`GRACE`): its owner may well be waiting for this one.

Otherwise it waits until the top has ended. When that takes too long, an error names the top.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from sqlalchemy.engine import Engine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn

from ..backends.postgresql import sqlstate
from ..engines import EngineRoom
from ..errors import NotInSandbox, SandboxConflict, SandboxEnded
from ..ledger import current_owner, line_of

logger: logging.Logger = logging.getLogger("engineroom.sandbox")

T = TypeVar("T")

GRACE = 0.5  # seconds that the top may be idle before another one goes above it
LIMIT = 10.0  # seconds to wait for one's turn
CANCEL_EVERY = 0.02  # seconds

CURE = 'Give this test a database of its own: sandbox(manager, isolation="database").'

# What ends the outer transaction, or cannot run in one.
ESCAPES = re.compile(
    r"(?:^|;)\s*(?:COMMIT|END|ABORT|BEGIN|START\s+TRANSACTION|PREPARE\s+TRANSACTION"
    r"|ROLLBACK(?!\s+(?:WORK\s+|TRANSACTION\s+)?TO\b))\b",
    re.IGNORECASE,
)
FAILED = "25P02"  # the SQLSTATE of a transaction in which a statement has failed
REFUSED = {  # by SQLSTATE
    "25001": "it cannot run inside a transaction block",
    "2D000": "it ends a transaction",
}
# The name of a setting that lasts until the end of the transaction, which here is the sandbox's.
SET_LOCAL = re.compile(r"\bSET\s+LOCAL\s+(?!SESSION\b)([\w.\"]+)", re.IGNORECASE)
SET_CONFIG = re.compile(r"\bset_config\s*\(\s*(?:'([\w.]+)')?", re.IGNORECASE)
SETTING = re.compile(r"[a-z_]\w*(?:\.\w+)*", re.IGNORECASE)
DDL = re.compile(r"(?:^|;)\s*(?:CREATE|ALTER|DROP)\b", re.IGNORECASE)
QUOTED = re.compile(
    r"--[^\n]*|/\*|\bE'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'"
    r"|\"(?:[^\"]|\"\")*\"|\$(?P<tag>\w*)\$.*?\$(?P=tag)\$",
    re.DOTALL | re.IGNORECASE,
)
COMMENT = re.compile(r"/\*|\*/")

LINEAGE: ContextVar[tuple[Part, ...]] = ContextVar("engineroom_sandbox", default=())


class Part:
    """One transaction of those that the outer one serves, and the next ones after its end."""

    def __init__(self, room: EngineRoom, *, stands_alone: bool, reads: bool) -> None:
        """Remember who asks, and in what they stand.

        Args:
            stands_alone: Each statement is a transaction (AUTOCOMMIT).
            reads: The server refuses writes.
        """
        self.stands_alone: bool = stands_alone
        self.reads: bool = reads
        self.owner: Any = current_owner()
        self.savepoint: str = ""  # while it stands on the stack
        self.error: BaseException | None = None  # its last; what it gets when it was rolled back
        self.is_lost: bool = False  # rolled back in its absence
        self.is_stopped: bool = False  # its caller was cancelled
        self.idle_since: float = time.monotonic()
        self.settings: dict[str, str] = {}  # what SET LOCAL has changed, as it was before
        self.kept: dict[str, str] = {}  # the same as it is, while it is off the stack
        self.cursors: list[Any] = []  # those that stream; the server closes them at a COMMIT
        self.inside: list[str] = []  # who has committed on top of what it has written
        self.is_closed: bool = False
        self._room = room
        self.lineage: tuple[Part, ...] = tuple(p for p in LINEAGE.get() if not p.is_closed)
        LINEAGE.set((*self.lineage, self))

    def is_kin(self, other: Part) -> bool:
        """Whether one of both was begun inside the other."""
        return other in self.lineage or self in other.lineage

    def __str__(self) -> str:
        for entry in self._room.ledger:
            held = entry.held()
            if held is not None and getattr(held.dbapi_connection, "part", None) is self:
                return str(entry)
        return f"a connection taken at {line_of(self.owner)}"


class OuterTransaction:
    """One connection in one transaction, and the stack of those that run inside it.

    Everything here runs on the background loop, in turns: `_lock`.
    """

    def __init__(self, engine: Engine) -> None:
        self.dialect: Any = engine.dialect
        self._pool = engine.pool
        self.is_over: bool = False
        self._stack: list[Part] = []
        self.runs: Part | None = None  # whose statement is on the wire
        self._task: asyncio.Task[Any] | None = None  # in which it is
        self._waits: dict[Part, asyncio.Task[Any]] = {}  # for their turn
        self._lock = asyncio.Lock()
        self._ended = asyncio.Event()  # a part has; replaced by the next one each time
        # The constraints that can wait for COMMIT, and whether they do by themselves; None: not
        # looked up.
        self._deferrable: dict[str, bool] | None = None
        self._changes_schema: bool = False
        self._own: Any = None  # asyncpg's transaction: before 0.32 it streams in no other
        self._unlocks: bool = False  # advisory locks of the session may be left
        self.fairy: PoolProxiedConnection

    # -- its own life -------------------------------------------------------------------------

    async def begin(self) -> None:
        """Take a connection from the manager's own pool, and begin."""
        await greenlet_spawn(self._begin)

    def _begin(self) -> None:
        self.fairy = self._pool.connect()
        try:
            # The driver begins nothing by itself.
            self.dialect.set_isolation_level(self.adapted, "AUTOCOMMIT")
            driver = self.dialect.get_driver_connection(self.adapted)
            if hasattr(driver, "get_server_pid"):
                self._own = driver.transaction()
                await_only(self._own.start())
            begin = "" if self._own else "BEGIN; "
            self._control(f"{begin}SET LOCAL idle_in_transaction_session_timeout = 0")
        except BaseException:
            self.fairy.invalidate()
            raise

    async def end(self) -> None:
        """Roll everything back; give the connection back as it came."""
        self.is_over = True
        if self.runs is not None:
            await self.stop(self.runs)  # a thread that nobody waits for, say
        async with self._lock:
            self._lose(self._stack, SandboxEnded("The sandbox of this session has ended."))
            await greenlet_spawn(self._end)

    def _end(self) -> None:
        try:
            if self._own is not None:
                await_only(self._own.rollback())
            else:
                self._control("ROLLBACK")
            if self._unlocks:
                self._control("SELECT pg_advisory_unlock_all()")
            self.dialect.reset_isolation_level(self.adapted)
        except Exception as error:  # noqa: BLE001  # a test may have killed it
            logger.info("The sandbox's connection was lost: %r", error)
            self.fairy.invalidate()
        else:
            self.fairy.close()

    @property
    def adapted(self) -> Any:
        """The DBAPI connection."""
        return self.fairy.dbapi_connection

    def _control(self, statements: str) -> None:
        """Run statements of our own in one message, for which the driver has to be asked."""
        driver = self.dialect.get_driver_connection(self.adapted)
        try:
            if self.dialect.is_async:
                await_only(driver.execute(statements))
            elif hasattr(driver, "execute"):
                driver.execute(statements)
            else:  # psycopg2
                self._send(statements)
        except Exception as error:
            if sqlstate(error) == FAILED:
                raise
            raise SandboxEnded(
                "The sandbox lost its connection, and with it whatever was done inside. See the "
                "cause: a test may have killed it, or the server."
            ) from error

    def _send(self, statement: str) -> list[Any]:
        """Run a statement of our own; its errors are the application's."""
        cursor = self.adapted.cursor()
        try:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []
        finally:
            cursor.close()

    # -- what parts ask for -------------------------------------------------------------------

    async def run(
        self, part: Part, call: Callable[[], T], statement: str = "", parameters: Any = None
    ) -> T:
        """Run a statement of a part, when it is its turn."""
        text = code_of(statement)
        refuse_escape(text)
        await self._take_turn(part)
        try:
            if part.stands_alone:
                return await self._run_alone(part, call)
            await self._save(part)
            await self._remember_settings(part, text, statement, parameters)
            return await self._put_on_wire(part, call)
        except BaseException as error:
            part.error = error
            refuse_by_state(error)
            raise
        finally:
            part.idle_since = time.monotonic()
            if DDL.search(text):
                self._changes_schema, self._deferrable = True, None
            self._unlocks = self._unlocks or "advisory" in text.lower()
            self._lock.release()

    async def _run_alone(self, part: Part, call: Callable[[], T]) -> T:
        await self._save(part)
        try:
            result = await self._put_on_wire(part, call)
            await self._put_on_wire(part, self._check_deferred)
        except BaseException:
            await greenlet_spawn(self._roll_back, part)
            raise
        await greenlet_spawn(self._release, part)
        return result

    async def commit(self, part: Part) -> None:
        """Release the savepoint of a part; what a COMMIT checks is checked before."""
        part.kept.clear()
        if not part.savepoint and not part.is_lost:
            return
        await self._take_turn(part)
        try:
            if part.savepoint:
                await self._put_on_wire(part, self._check_deferred)
                await greenlet_spawn(self._release, part)
        except BaseException as error:
            if sqlstate(error) != FAILED:
                part.error = error
                raise
            await greenlet_spawn(self._roll_back, part)  # as the server takes such a COMMIT
        finally:
            self._lock.release()

    async def _put_on_wire(self, part: Part, call: Callable[[], T]) -> T:
        """Run what may take long, and can be stopped."""
        if part.is_stopped:
            raise asyncio.CancelledError
        self.runs, self._task = part, asyncio.current_task()
        try:
            if self.dialect.is_async:
                return await greenlet_spawn(call)
            return await asyncio.to_thread(call)  # others share the loop
        finally:
            self.runs = self._task = None

    async def stop(self, part: Part) -> None:
        """Stop what a part runs or waits for. The connection survives it.

        Nothing else is ever cancelled here: psycopg's connection would be closed by that.
        """
        part.is_stopped = True
        driver = self.dialect.get_driver_connection(self.adapted)
        if part in self._waits:
            self._waits[part].cancel()
        elif self.runs is part and not hasattr(driver, "cancel") and self._task is not None:
            self._task.cancel()  # asyncpg asks the server to cancel, and goes on afterwards
        else:
            while self.runs is part:  # a request may overtake its own statement
                driver.cancel()
                await asyncio.sleep(CANCEL_EVERY)

    async def rest(self, part: Part) -> None:
        """Return when nothing of a part is on the wire."""
        if self.runs is part:
            async with self._lock:
                pass

    async def roll_back(self, part: Part) -> None:
        """Roll back what a part has done. That never waits for a turn."""
        async with self._lock:
            if part.savepoint and not self.is_over:
                await greenlet_spawn(self._roll_back, part)
            part.is_lost, part.is_stopped, part.error = False, False, None
            part.kept.clear()
            part.settings.clear()

    # -- turns --------------------------------------------------------------------------------

    async def _take_turn(self, part: Part) -> None:
        """Wait until a part may go on, and keep the lock.

        Raises:
            SandboxConflict: it never may, or did not in time.
        """
        end = time.monotonic() + LIMIT
        while True:
            try:
                await self._wait(part, self._lock.acquire(), end - time.monotonic())
            except TimeoutError:
                raise self._too_long(part, "somebody whose statement still runs") from None
            try:
                patience = await self._stands_in_the_way(part)
            except BaseException:
                self._lock.release()
                raise
            if not patience:
                return
            top, ended = self._stack[-1], self._ended
            self._lock.release()
            if time.monotonic() > end:
                raise self._too_long(part, top)
            with suppress(TimeoutError):
                await self._wait(part, ended.wait(), min(patience, end - time.monotonic()))

    def _too_long(self, part: Part, holder: object) -> SandboxConflict:
        return SandboxConflict(
            f"{part} waited for {LIMIT:g} s for its turn in the sandbox, which is held by "
            f"{self.runs or holder}. A sandbox is one transaction, and serves those inside one "
            "after another. End that one before, or give them transactions of their own. "
            f"{CURE}"
        )

    async def _wait(
        self, part: Part, event: Coroutine[Any, Any, object], seconds: float | None = None
    ) -> None:
        """Wait for something, for so long; the part may be stopped meanwhile."""
        self._waits[part] = cast("asyncio.Task[Any]", asyncio.current_task())
        try:
            async with asyncio.timeout(seconds):
                await event
        finally:
            del self._waits[part]

    async def _stands_in_the_way(self, part: Part) -> float:
        """Return how many seconds another part is to be waited for; 0: it is this one's turn."""
        if self.is_over:
            raise SandboxEnded("The sandbox of this session has ended. Open sessions inside it.")
        if part.is_lost:
            raise part.error or SandboxEnded("What this session did was rolled back.")
        if not self._stack or self._stack[-1] is part:
            return 0.0
        await greenlet_spawn(self._take_off_what_is_clean, part)
        if not self._stack or self._stack[-1] is part:
            return 0.0
        top = self._stack[-1]
        if part.savepoint:  # and another one that has written stands above
            if part.is_kin(top):
                raise SandboxConflict(
                    f"{part} goes on while {top}, which was begun inside it, has written and not "
                    "ended. In a sandbox both are savepoints of one transaction, and a rollback of "
                    f"the first would take the other's rows along. End the inner one first. {CURE}"
                )
            return LIMIT
        if part.is_kin(top):
            return 0.0
        idle = time.monotonic() - top.idle_since
        if idle < GRACE:
            return GRACE - idle
        logger.warning(
            "%s goes on inside the transaction of %s, which has been idle for %.1f s in the "
            "sandbox: if that one rolls back, the rows of both are gone.",
            part,
            top,
            idle,
        )
        return 0.0

    def _take_off_what_is_clean(self, part: Part) -> None:
        """Release the savepoints, from the top, of those who have written nothing."""
        try:
            # Each that has written, and each that it stands in, holds a lock on its own number.
            ((locks,),) = self._send(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' "
                "AND pid = pg_backend_pid() AND mode = 'ExclusiveLock'"
            )
        except Exception:  # noqa: BLE001  # the top has failed
            top = self._stack[-1]
            if part.is_kin(top):
                self._roll_back(top)  # its owner can do no more than that
                top.is_lost = True
            return
        written = max(0, locks - 1)
        if self._stack[written:]:
            taken_off = self._stack[written:]
            settings: dict[str, str] = {}
            for clean in reversed(taken_off):  # the first to change one knows how it was
                settings |= clean.settings
                clean.kept = self._read(clean.settings)
            self._control(back(f"RELEASE SAVEPOINT {taken_off[0].savepoint}", settings))
            for clean in taken_off:
                clean.savepoint = ""
            del self._stack[written:]

    # -- savepoints ---------------------------------------------------------------------------

    async def _save(self, part: Part) -> None:
        if not part.savepoint:
            await greenlet_spawn(self._set_savepoint, part)

    def _set_savepoint(self, part: Part) -> None:
        name = f"engineroom_{len(self._stack)}"
        begin = f"SAVEPOINT {name}" + ("; SET TRANSACTION READ ONLY" if part.reads else "")
        self._control(back(begin, part.kept))
        part.kept.clear()
        part.savepoint = name
        self._stack.append(part)

    def _release(self, part: Part) -> None:
        self._close_cursors(part)
        self._control(back(f"RELEASE SAVEPOINT {part.savepoint}", part.settings))
        self._pop(part)
        if self._stack:
            self._stack[-1].inside += [str(part), *part.inside]
        part.inside.clear()
        part.settings.clear()

    def _roll_back(self, part: Part) -> None:
        above = self._stack[self._stack.index(part) + 1 :]
        if above:
            error = SandboxConflict(f"{part} was rolled back, and this session inside it. {CURE}")
            self._lose(above, error)
        if part.inside:
            logger.warning(
                "%s is rolled back, and with it what was committed inside it, in a sandbox: by %s. "
                "%s",
                part,
                "; ".join(part.inside),
                CURE,
            )
            part.inside.clear()
        self._close_cursors(part)
        name = part.savepoint
        self._control(f"ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}")
        part.settings.clear()
        self._pop(part)
        if self._changes_schema:
            self._deferrable = None

    def _close_cursors(self, part: Part) -> None:
        for cursor in part.cursors:
            with suppress(Exception):  # the server has closed it already, where a statement failed
                cursor.close()
        part.cursors.clear()

    def _lose(self, parts: Iterable[Part], error: Exception) -> None:
        for part in parts:
            part.savepoint, part.is_lost, part.error = "", True, error

    def _pop(self, part: Part) -> None:
        """Take a part off the stack, and whatever stands above it."""
        del self._stack[self._stack.index(part) :]
        part.savepoint = ""
        self._ended.set()
        self._ended = asyncio.Event()

    # -- what a COMMIT would do ---------------------------------------------------------------

    def _check_deferred(self) -> None:
        """Check the constraints that wait for COMMIT, and have them wait again."""
        if self._deferrable is None:
            self._deferrable = self._find_deferrable()
        if self._deferrable:
            self._send("SET CONSTRAINTS ALL IMMEDIATE")
            if waiting := sorted(name for name, waits in self._deferrable.items() if waits):
                self._send(f"SET CONSTRAINTS {', '.join(waiting)} DEFERRED")

    def _find_deferrable(self) -> dict[str, bool]:
        """Look up which constraints and triggers can wait for COMMIT; and which do."""
        found: dict[str, bool] = {}
        for name, waits in self._send(
            "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.conname), c.condeferred "
            "FROM pg_constraint c JOIN pg_namespace n ON n.oid = c.connamespace "
            "WHERE c.condeferrable"  # a constraint trigger has a row here as well
        ):
            found[name] = waits or found.get(name, False)  # tables may share a name
        return found

    async def _remember_settings(
        self, part: Part, text: str, statement: str, parameters: Any
    ) -> None:
        """Note how a setting is that a statement is about to change until COMMIT."""
        names = {name.replace('"', "") for name in SET_LOCAL.findall(statement)}
        if "set_config" in text.lower() and (found := SET_CONFIG.findall(statement)):
            given = parameters.values() if isinstance(parameters, dict) else parameters or ()
            names |= {*filter(None, found)}
            names |= {g for g in given if isinstance(g, str) and SETTING.fullmatch(g)}
        named = {"timezone" if name.upper() == "TIME" else name for name in names}
        if new := named - part.settings.keys():
            part.settings |= await greenlet_spawn(self._read, new)

    def _read(self, names: Iterable[str]) -> dict[str, str]:
        """Return the settings of these names, as far as there are such."""
        settings = {}
        for name in names:
            ((value,),) = self._send(f"SELECT current_setting('{name}', true)")
            if value is not None or "." in name:
                settings[name] = value or ""
        return settings


def back(statement: str, settings: dict[str, str]) -> str:
    """Add to a statement what gives settings their values."""
    statements = [statement]
    for name, value in settings.items():
        literal = value.replace("'", "''")
        statements.append(f"SELECT set_config('{name}', '{literal}', true)")
    return "; ".join(statements)


def code_of(statement: str) -> str:
    """Return a statement without what is in quotes and comments, which nest."""
    code, start = [], 0
    while found := QUOTED.search(statement, start):
        code += [statement[start : found.start()], " "]
        start = found.end()
        depth = 1 if found.group() == "/*" else 0
        while depth:
            mark = COMMENT.search(statement, start)
            if mark is None:
                return "".join(code)
            depth += 1 if mark.group() == "/*" else -1
            start = mark.end()
    return "".join([*code, statement[start:]])


def refuse_escape(text: str) -> None:
    """Refuse a statement that would end the outer transaction.

    Raises:
        NotInSandbox: it would.
    """
    if found := ESCAPES.search(text):
        verb = " ".join(found.group().strip("; \n").split()).upper()
        raise NotInSandbox(
            f"{verb} was sent as text, inside a sandbox: it would end the transaction that is to "
            f"be rolled back. Use the session's own commit() and rollback(). Or: {CURE}"
        )


def refuse_by_state(error: BaseException) -> None:
    """Say what an error of the server has to do with the sandbox.

    Raises:
        NotInSandbox: one transaction cannot serve the statement.
    """
    state = sqlstate(error)
    if state in REFUSED:
        raise NotInSandbox(
            f"The server refused a statement, for {REFUSED[state]}, and in a sandbox everything "
            f"runs in one. {CURE}"
        ) from error
