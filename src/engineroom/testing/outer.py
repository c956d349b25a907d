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
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, cast

from sqlalchemy.engine import Engine
from sqlalchemy.util import greenlet_spawn

from ..backends.postgresql import sqlstate
from ..errors import NotInSandbox, SandboxConflict, SandboxEnded, SandboxError
from .commits import FAILED, Commits
from .connection import HeldConnection, joined
from .parts import Part
from .texts import (
    CHANGES_SCHEMA,
    CURE,
    code_of,
    local_settings,
    own_savepoint,
    refuse_by_state,
    refuse_escape,
)

logger: logging.Logger = logging.getLogger("engineroom.sandbox")

T = TypeVar("T")

GRACE = 0.5  # seconds that the top may be idle before another one goes above it
LIMIT = 10.0  # seconds to wait for one's turn
CANCEL_EVERY = 0.02  # seconds


class OuterTransaction:
    """One connection in one transaction, and the stack of those that run inside it.

    Everything here runs on the background loop, in turns: `_lock`.
    """

    def __init__(self, engine: Engine) -> None:
        self.connection: HeldConnection = HeldConnection(engine)
        self._commits = Commits(self.connection)
        self.is_over: bool = False
        self.conflict: SandboxError | None = None  # why nothing in it is true any more
        self._stack: list[Part] = []
        self.runs: Part | None = None  # whose statement is on the wire
        self._task: asyncio.Task[Any] | None = None  # in which it is
        self._waits: dict[Part, asyncio.Task[Any]] = {}  # for their turn
        self._lock = asyncio.Lock()
        self._ended = asyncio.Event()  # a part has; replaced by the next one each time

    # -- its own life -------------------------------------------------------------------------

    async def begin(self) -> None:
        """Take a connection from the manager's own pool, and begin."""
        await greenlet_spawn(self._commits.begin)

    async def end(self) -> None:
        """Roll everything back; give the connection back as it came."""
        self.is_over = True
        if self.runs is not None:
            await self.stop(self.runs)  # a thread that nobody waits for, say
        async with self._lock:
            self._lose(self._stack, SandboxEnded("The sandbox of this session has ended."))
            await greenlet_spawn(self.connection.end)

    # -- what parts ask for -------------------------------------------------------------------

    async def run(
        self, part: Part, call: Callable[[], T], statement: str = "", parameters: Any = None
    ) -> T:
        """Run a statement of a part, when it is its turn."""
        text = code_of(statement)
        refuse_escape(text)
        verb, point = own_savepoint(statement)
        await self._take_turn(part)
        try:
            if part.stands_alone:
                result = await self._run_alone(part, call)
            else:
                if part.has_failed and verb != "ROLLBACK" and part.error is not None:
                    raise part.error
                await self._save(part)
                await self._remember(part, local_settings(text, statement, parameters))
                result = await self._put_on_wire(part, call)
                if point:
                    self._count_losses(part, part.note_point(verb, point))
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
            if CHANGES_SCHEMA.search(text):
                self.connection.changes_schema = True
                self._commits.doubt()
            if "advisory" in text.lower():
                self.connection.takes_locks = True
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
        if self._commits.may_take_long:
            await self._put_on_wire(part, partial(self._commits.check, part))
        await greenlet_spawn(self._release, part)

    async def _put_on_wire(self, part: Part, call: Callable[[], T]) -> T:
        """Run what may take long, and can be stopped."""
        if part.is_stopped:
            raise asyncio.CancelledError
        self.runs, self._task = part, asyncio.current_task()
        try:
            if self.connection.dialect.is_async:
                return await greenlet_spawn(call)
            return await asyncio.to_thread(call)  # others share the loop
        finally:
            self.runs = self._task = None

    async def stop(self, part: Part) -> None:
        """Stop what a part runs or waits for. The connection survives it.

        Nothing else is ever cancelled here: psycopg's connection would be closed by that.
        """
        part.is_stopped = True
        driver = self.connection.driver
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
        self._refuse_what_is_over(part)
        if not self._stack or self._stack[-1] is part:
            return 0.0
        await greenlet_spawn(self._take_off_what_is_clean)
        self._refuse_what_is_over(part)
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

    def _refuse_what_is_over(self, part: Part) -> None:
        if self.is_over:
            raise SandboxEnded("The sandbox of this session has ended. Open sessions inside it.")
        if self.conflict is not None:
            raise self.conflict
        if part.is_lost:
            raise part.error or SandboxEnded("What this session did was rolled back.")

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
            clean.kept = self._commits.settings(clean.settings)
        releases = [part.savepoint for part in taken_off[:1]]
        if point >= 0:
            releases += reversed(lowest.points[point : lowest.standing])
            lowest.standing = point
        self.connection.control(
            joined((f"RELEASE SAVEPOINT {name}" for name in releases), settings)
        )
        for clean in taken_off:
            clean.savepoint, clean.standing = "", 0
        del self._stack[first:]

    def _count_written(self) -> int:
        """Count the savepoints, from the bottom, in which something was written."""
        # Each has a lock on a number of its own then, and so has each that it stands in.
        ((locks,),) = self.connection.send(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' "
            "AND pid = pg_backend_pid() AND mode = 'ExclusiveLock'"
        )
        return max(0, int(locks) - 1)

    def _undo_failed(self, top: Part) -> None:
        """Roll back what has failed, for somebody else: its owner can do no more than that."""
        if top.standing:
            name = top.points[top.standing - 1]
            self.connection.control(f"ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}")
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
                    self._commits.excuse(part)
                below: dict[str, str] = {}
                for other in reversed(self._stack):
                    below |= other.settings
                part.kept = below | part.kept
                part.settings = self._commits.settings(below) | part.settings
        points = [f"SAVEPOINT {point}" for point in part.points[part.standing :]]
        self.connection.control(joined(statements, part.kept, points))
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
        self._commits.release(part)
        self._pop(part)
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
        self.connection.control(f"ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}")
        part.settings.clear()
        part.points.clear()
        part.standing = 0
        self._count_losses(part, -1)
        self._pop(part)
        if self.connection.changes_schema:
            self._commits.doubt()

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
        if not self.connection.is_in_transaction:
            self.conflict = NotInSandbox(
                "A statement has ended the transaction of the sandbox, which could not be seen "
                "before it was sent. What was done inside is in the database for good, or gone. "
                f"{CURE}"
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

    async def _remember(self, part: Part, names: set[str]) -> None:
        """Note how settings are that a statement is about to change until COMMIT."""
        if new := names - part.settings.keys():
            part.settings |= await greenlet_spawn(self._commits.settings, new)
