"""The outer transaction of a sandbox: each transaction inside is a savepoint of it.

One connection serves all who ask, in turn. A transaction that has begun stands on a stack, as its
savepoint does, and only the top of it may be used. Whoever else comes goes on top if

- nothing stands there, or only what has written nothing: that is taken off, and set again at its
  next statement;
- the top is its own: it was begun in the same task, in one that started this task, or in the
  thread that did (a context variable knows);
- the top has been idle for a while (`GRACE`): its owner may well be waiting for this one.

Otherwise it waits until the top has ended. When that takes too long, an error names the top.

What was committed on top of something that has written goes along when that rolls back, as it never
would outside: from then on every statement in the sandbox is an error that names both.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar, cast

from sqlalchemy.engine import Engine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn

from ..backends.postgresql import sqlstate
from ..engines import EngineRoom
from ..errors import NotInSandbox, SandboxConflict, SandboxEnded, SandboxError
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
DDL = re.compile(r"(?:^|;)\s*(?:CREATE|ALTER|DROP|DO|CALL)\b", re.IGNORECASE)
# A savepoint of the application's own.
POINT = re.compile(
    r"\s*(SAVEPOINT|RELEASE|ROLLBACK)\b(?:\s+(?:WORK|TRANSACTION))?(?:\s+TO)?(?:\s+SAVEPOINT)?"
    r"\s+(\"[^\"]+\"|\w+)\s*;?\s*$",
    re.IGNORECASE,
)
LOST = ("08", "57P", "25P03", "25P04")  # how the SQLSTATEs of lost connections begin
IDLE = 0  # libpq's transaction status

CHECK = "SET CONSTRAINTS ALL IMMEDIATE"
WAIT = "SET CONSTRAINTS ALL DEFERRED"
# How many rows the last statement of a message has found, all drivers tell for nothing.
DEFERRABLE = "SELECT 1 FROM pg_catalog.pg_constraint WHERE condeferrable"
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
        self.points: list[str] = []  # its own savepoints
        self.standing: int = 0  # how many of them are set: none, while it is off the stack
        self.has_failed: bool = False  # and its last savepoint was rolled back for another one
        # Who has committed on top of what it has written; and under how many of its savepoints.
        self.inside: list[tuple[int, str]] = []
        self.check: str = CHECK  # what its COMMIT checks
        self.violates: list[str] = []  # but not these, which those below violate for the moment
        self.is_closed: bool = False
        self._room = room
        self.lineage: tuple[Part, ...] = tuple(p for p in LINEAGE.get() if not p.is_closed)
        LINEAGE.set((*self.lineage, self))

    def is_kin(self, other: Part) -> bool:
        """Whether one of both was begun inside the other."""
        return other in self.lineage or self in other.lineage

    def note_point(self, verb: str, name: str) -> int:
        """Note what it has done with a savepoint of its own.

        Returns:
            Under how many of its savepoints a row must stand to be still there.
        """
        depth = len(self.points)
        if verb == "SAVEPOINT":
            self.points.append(name)
        elif name in self.points:
            depth -= 1 + self.points[::-1].index(name)
            del self.points[depth + (verb == "ROLLBACK") :]
            self.has_failed = False
            if verb == "RELEASE":
                self.inside = [(min(under, depth), who) for under, who in self.inside]
        self.standing = len(self.points)
        return depth

    def forget(self) -> None:
        """Forget a transaction that has ended."""
        self.is_lost = self.is_stopped = self.has_failed = False
        self.error, self.check, self.violates = None, CHECK, []
        self.standing = 0
        for each in (self.points, self.inside, self.kept, self.settings):
            each.clear()

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
        self.conflict: SandboxError | None = None  # why nothing in it is true any more
        self._stack: list[Part] = []
        self.runs: Part | None = None  # whose statement is on the wire
        self._task: asyncio.Task[Any] | None = None  # in which it is
        self._waits: dict[Part, asyncio.Task[Any]] = {}  # for their turn
        self._lock = asyncio.Lock()
        self._ended = asyncio.Event()  # a part has; replaced by the next one each time
        # How many constraints can wait for COMMIT; None: not known. Those of them that do not wait
        # by themselves.
        self._deferrable: int | None = None
        self._immediate: list[str] = []
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
            driver = self.driver
            if hasattr(driver, "get_server_pid"):
                self._own = driver.transaction()
                await_only(self._own.start())
            guards = ["idle_in_transaction_session_timeout"]
            if self.dialect.server_version_info >= (17,):
                guards.append("transaction_timeout")
            statements = [] if self._own else ["BEGIN"]
            statements += [f"SET LOCAL {guard} = 0" for guard in guards]
            if not self._control("; ".join([*statements, DEFERRABLE])):
                self._deferrable = 0
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
            if self._own is not None and self._changes_schema:
                self.fairy.invalidate()  # what it has prepared fits tables that are no more
        except Exception as error:  # noqa: BLE001  # a test may have killed it
            logger.info("The sandbox's connection was lost: %r", error)
            self.fairy.invalidate()
        else:
            self.fairy.close()

    @property
    def adapted(self) -> Any:
        """The DBAPI connection."""
        return self.fairy.dbapi_connection

    @property
    def driver(self) -> Any:
        """The driver's own connection."""
        return self.dialect.get_driver_connection(self.adapted)

    def _control(self, statements: str) -> int:
        """Run statements of our own in one message, for which the driver has to be asked.

        Returns:
            The number of rows that the last one has found.
        """
        driver = self.driver
        try:
            if not hasattr(driver, "execute"):  # psycopg2
                return len(self._send(statements))
            done = driver.execute(statements)
            done = await_only(done) if self.dialect.is_async else done
            if isinstance(done, str):  # asyncpg's is "SELECT 1", say
                return int(done.split()[-1]) if done[-1:].isdigit() else 0
            while done.nextset():
                pass
            return int(done.rowcount)
        except Exception as error:
            state = sqlstate(error)
            if state is not None and not state.startswith(LOST):
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
        point = POINT.match(statement)
        verb = point.group(1).upper() if point else ""
        await self._take_turn(part)
        try:
            if part.stands_alone:
                result = await self._run_alone(part, call)
            else:
                if part.has_failed and verb != "ROLLBACK" and part.error is not None:
                    raise part.error
                await self._save(part)
                await self._remember_settings(part, text, statement, parameters)
                result = await self._put_on_wire(part, call)
                if point:
                    self._count_losses(part, part.note_point(verb, point.group(2)))
                    if self.conflict is not None:
                        raise self.conflict
            self._refuse_escaped()
            return result
        except BaseException as error:
            part.error = error
            refuse_by_state(error)
            raise
        finally:
            part.idle_since = time.monotonic()
            if DDL.search(text):
                self._changes_schema = True
                self._deferrable, self._immediate = None, []
            self._unlocks = self._unlocks or "advisory" in text.lower()
            self._lock.release()

    async def _run_alone(self, part: Part, call: Callable[[], T]) -> T:
        await self._save(part)
        try:
            result = await self._put_on_wire(part, call)
            await self._commit(part)
        except BaseException:
            await greenlet_spawn(self._roll_back, part)
            raise
        return result

    async def commit(self, part: Part) -> None:
        """Release the savepoint of a part; what a COMMIT checks is checked before."""
        part.kept.clear()
        if part.is_lost and part.error is not None and not isinstance(part.error, SandboxError):
            part.forget()  # it had failed: the server takes such a COMMIT for a ROLLBACK
        if not part.savepoint and not part.is_lost:
            part.forget()
            return
        await self._take_turn(part)
        try:
            if part.has_failed:
                await greenlet_spawn(self._roll_back, part)
            elif part.savepoint:
                await self._commit(part)
        except BaseException as error:
            if sqlstate(error) != FAILED:
                part.error = error
                raise
            await greenlet_spawn(self._roll_back, part)  # as the server takes such a COMMIT
        finally:
            self._lock.release()

    async def _commit(self, part: Part) -> None:
        if self._deferrable != 0:
            await self._put_on_wire(part, partial(self._send, part.check))
        await greenlet_spawn(self._release, part)

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
            before = self.conflict
            if part.savepoint and not self.is_over:
                await greenlet_spawn(self._roll_back, part)
            part.forget()
            if self.conflict is not before and self.conflict is not None:
                raise self.conflict

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
        if self.conflict is not None:
            raise self.conflict
        if part.is_lost:
            raise part.error or SandboxEnded("What this session did was rolled back.")
        if not self._stack or self._stack[-1] is part:
            return 0.0
        await greenlet_spawn(self._take_off_what_is_clean)
        if self.conflict is not None:
            raise self.conflict
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
            "sandbox: if that one rolls back, the rows of both are gone, and the sandbox is over.",
            part,
            top,
            idle,
        )
        return 0.0

    def _take_off_what_is_clean(self) -> None:
        """Release the savepoints, from the top, in which nothing was written."""
        try:
            written = self._count_written()
        except Exception as error:
            if sqlstate(error) != FAILED:
                raise
            self._undo_failed(self._stack[-1])
            self._take_off_what_is_clean()
            return
        levels = [(part, point) for part in self._stack for point in range(-1, part.standing)]
        if not levels[written:]:
            return
        lowest, point = levels[written]
        first = self._stack.index(lowest) + (point >= 0)
        taken_off = self._stack[first:]
        settings: dict[str, str] = {}
        for clean in reversed(taken_off):  # the first to change one knows how it was
            settings |= clean.settings
            clean.kept = self._read(clean.settings)
        releases = [part.savepoint for part in taken_off[:1]]
        if point >= 0:
            releases += reversed(lowest.points[point : lowest.standing])
            lowest.standing = point
        self._control(joined((f"RELEASE SAVEPOINT {name}" for name in releases), settings))
        for clean in taken_off:
            clean.savepoint, clean.standing = "", 0
        del self._stack[first:]

    def _count_written(self) -> int:
        """Count the savepoints, from the bottom, in which something was written."""
        # Each has a lock on a number of its own then, and so has each that it stands in.
        ((locks,),) = self._send(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' "
            "AND pid = pg_backend_pid() AND mode = 'ExclusiveLock'"
        )
        return max(0, int(locks) - 1)

    def _undo_failed(self, top: Part) -> None:
        """Roll back what has failed, for somebody else: its owner can do no more than that."""
        if top.standing:
            name = top.points[top.standing - 1]
            self._control(f"ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}")
            top.standing -= 1
            top.has_failed = True
            self._count_losses(top, top.standing)
        else:
            self._roll_back(top)
            top.is_lost = True

    # -- savepoints ---------------------------------------------------------------------------

    async def _save(self, part: Part) -> None:
        if not part.savepoint or part.standing < len(part.points):
            await greenlet_spawn(self._set_savepoint, part)

    def _set_savepoint(self, part: Part) -> None:
        statements = []
        if not part.savepoint:
            name = f"engineroom_{len(self._stack)}"
            statements.append(f"SAVEPOINT {name}")
            if part.reads:
                statements.append("SET TRANSACTION READ ONLY")
            if self._stack:  # what those below have set is not for it, nor what they violate
                if not part.reads:
                    self._excuse(part)
                below: dict[str, str] = {}
                for other in reversed(self._stack):
                    below |= other.settings
                part.kept = below | part.kept
                part.settings = self._read(below) | part.settings
        points = [f"SAVEPOINT {point}" for point in part.points[part.standing :]]
        self._control(joined(statements, part.kept, points))
        part.kept.clear()
        part.standing = len(part.points)
        if not part.savepoint:
            part.savepoint = name
            self._stack.append(part)

    def _release(self, part: Part) -> None:
        self._close_cursors(part)
        below = self._stack[: self._stack.index(part)]
        levels = sum(1 + other.standing for other in below)
        wrote = bool(below and not part.reads and self._count_written() > levels)
        if self._immediate:
            self._immediate = self._find_immediate()
        end = [self._defer(part), f"RELEASE SAVEPOINT {part.savepoint}"]
        if self._deferrable == 0:  # as far as is known: then the check costs no message of its own
            end = ["SAVEPOINT engineroom_check", part.check, *end]
        try:
            found = self._control(joined(end, part.settings, [DEFERRABLE]))
        except Exception as error:
            if self._deferrable == 0 and sqlstate(error) != FAILED:
                self._control("ROLLBACK TO SAVEPOINT engineroom_check")
                self._send(part.check)  # the same as an error for the application
            raise
        self._pop(part)
        if found != self._deferrable:
            self._deferrable, self._immediate = found, self._find_immediate() if found else []
            self._control(self._defer(part))
        if wrote:
            top = below[-1]
            inside = [str(part), *(who for _, who in part.inside)]
            top.inside += [(top.standing, who) for who in inside]
        part.forget()

    def _roll_back(self, part: Part) -> None:
        above = self._stack[self._stack.index(part) + 1 :]
        if above:
            error = SandboxConflict(f"{part} was rolled back, and this session inside it. {CURE}")
            self._lose(above, error)
        self._close_cursors(part)
        name = part.savepoint
        self._control(f"ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}")
        part.settings.clear()
        part.points.clear()
        part.standing = 0
        self._count_losses(part, -1)
        self._pop(part)
        if self._changes_schema:
            self._deferrable, self._immediate = None, []

    def _count_losses(self, part: Part, depth: int) -> None:
        """See whether what a part has rolled back took along what others had committed."""
        lost = [who for under, who in part.inside if under > depth]
        if lost and self.conflict is None:
            self.conflict = SandboxConflict(
                f"{part} was rolled back in a sandbox, and with it what had been committed inside "
                f"it: by {'; '.join(lost)}. In production that would have stayed; a sandbox is one "
                f"transaction, and has lost it. {CURE}"
            )
        part.inside = [(under, who) for under, who in part.inside if under <= depth]

    def _refuse_escaped(self) -> None:
        """See that the outer transaction is still there: the driver knows without asking.

        Raises:
            NotInSandbox: the statement has ended it.
        """
        driver = self.driver
        if hasattr(driver, "is_in_transaction"):  # asyncpg
            escaped = not (driver.is_closed() or driver.is_in_transaction())
        else:
            escaped = not driver.closed and driver.info.transaction_status == IDLE
        if escaped:
            self.conflict = NotInSandbox(
                "A statement has ended the transaction of the sandbox, which could not be seen "
                f"before it was sent. What was done inside is in the database for good, or gone. {CURE}"
            )
            self._lose(self._stack, self.conflict)
            self._stack.clear()
            raise self.conflict

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

    def _defer(self, part: Part) -> str:
        """Return what has them wait again, as they do by themselves."""
        names = [name for name in self._immediate if name not in part.violates]
        return f"{WAIT}; SET CONSTRAINTS {', '.join(names)} IMMEDIATE" if names else WAIT

    def _excuse(self, part: Part) -> None:
        """Have the COMMIT of a part not check what those below it violate for the moment."""
        part.check, part.violates = CHECK, []
        if self._deferrable != 0 and not self._holds("ALL"):
            names = [name for name, _ in self._find_deferrable()]
            part.violates = [name for name in names if not self._holds(name)]
            good = [name for name in names if name not in part.violates]
            part.check = f"SET CONSTRAINTS {', '.join(good)} IMMEDIATE" if good else "SELECT 1"

    def _holds(self, name: str) -> bool:
        self._control("SAVEPOINT engineroom_check")
        try:
            self._send(f"SET CONSTRAINTS {name} IMMEDIATE")
        except Exception as error:
            if sqlstate(error) is None:
                raise
            return False
        else:
            return True
        finally:
            self._control(
                "ROLLBACK TO SAVEPOINT engineroom_check; RELEASE SAVEPOINT engineroom_check"
            )

    def _find_deferrable(self) -> list[tuple[str, bool]]:
        """Look up which constraints and triggers can wait for COMMIT; and which do."""
        return [
            (name, waits)
            for name, waits in self._send(
                # A constraint trigger has a row there as well. Tables may share a name.
                "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.conname) AS name, "
                "bool_or(c.condeferred) FROM pg_constraint c "
                "JOIN pg_namespace n ON n.oid = c.connamespace "
                "WHERE c.condeferrable GROUP BY name ORDER BY name"
            )
        ]

    def _find_immediate(self) -> list[str]:
        return [name for name, waits in self._find_deferrable() if not waits]

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


def joined(
    before: Iterable[str], settings: dict[str, str], after: Iterable[str] = ()
) -> str:
    """Make one message of statements, and between them of what gives settings their values."""
    sets = []
    for name, value in settings.items():
        literal = value.replace("'", "''")
        sets.append(f"SELECT set_config('{name}', '{literal}', true)")
    return "; ".join([*before, *sets, *after])


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
