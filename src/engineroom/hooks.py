"""What is called once a transaction has ended: after its commit, or after its rollback."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from .cancellation import SETTLE_LIMIT, settle
from .errors import AsyncCallback, RollbackOnly, SessionClosed, UsageError
from .ledger import place
from .sessions import Guarded
from .statements import UNKNOWN_OUTCOME

logger: logging.Logger = logging.getLogger("engineroom")

Callback = Callable[[], Awaitable[object] | object]


def on_commit(session: AsyncSession | Session, callback: Callback) -> None:
    """Call this once the session's transaction has committed, with its connection already back.

    Callbacks run in the order in which they were registered. One that raises is logged with its
    line; the others run all the same, and whoever left the scope does not hear of it. What was
    registered inside a savepoint is forgotten when that is rolled back. Where the outcome of a
    COMMIT is unknown, nothing is called.

    Args:
        callback: Takes no argument (use `functools.partial`). It may be a coroutine function where
            the session is asynchronous. It holds no connection, and may open a session of its own.

    Raises:
        AsyncCallback: a coroutine function, for a synchronous session.
        SessionClosed: the session has ended.
        UsageError: it is no session of engineroom, or the callback cannot be called.
    """
    register(session, "commit", callback)


def on_rollback(session: AsyncSession | Session, callback: Callback) -> None:
    """Call this once what the session did was rolled back: `on_commit`'s counterpart.

    What was registered inside a savepoint is called when that was rolled back, too: at the end of
    the whole transaction, whatever becomes of it.

    Args:
        callback: As `on_commit` takes it.

    Raises:
        AsyncCallback: a coroutine function, for a synchronous session.
        SessionClosed: the session has ended.
        UsageError: it is no session of engineroom, or the callback cannot be called.
    """
    register(session, "rollback", callback)


def rollback_only(session: AsyncSession | Session) -> None:
    """Roll back at the end of the session's scope, without an exception.

    From here on the session refuses `commit()`; savepoints may still be released.

    Raises:
        SessionClosed: the session has ended.
        UsageError: no scope will end it.
    """
    guarded = _guarded(session)
    scope: Any = guarded._scope
    if guarded._ending:
        raise RollbackOnly(
            "rollback_only() was called while the end of its scope commits, and this error has all "
            "rolled back. Call it in the body of the scope, and no error is raised."
        )
    if not scope.is_open:
        raise UsageError(
            "rollback_only() got a session of get_session(), which has no scope at whose end it "
            "could be rolled back. Call rollback() on it, or take session()."
        )
    if not scope.is_rollback_only:
        _hooks_of(guarded)  # what ends the scope then looks here, and nowhere else
        scope.is_rollback_only = True
        event.listen(guarded, "before_commit", partial(_refuse_commit, _line(2)))


def _refuse_commit(where: str, session: Session) -> None:
    if not _is_release(session):
        raise RollbackOnly(
            f"commit() was called on a session that rollback_only() at {where} had marked: it can "
            "only be rolled back. Leave the scope, and open another session for what is to stay."
        )


def _is_release(session: Session) -> bool:
    """Whether what is about to be committed is a savepoint, and not the whole with one inside.

    SQLAlchemy tells of both alike; `behaviour/test_after_commit` fails when its private name goes.
    """
    outermost: Any = session.get_transaction()
    return session.in_nested_transaction() and outermost._next_state.name != "CHANGE_IN_PROGRESS"


@dataclass(slots=True)
class Hook:
    """One callback: what for, from which line, and which transaction it shares its fate with."""

    number: int  # in the order of registration
    kind: Literal["commit", "rollback"]
    callback: Callback
    where: str
    transaction: SessionTransaction | None  # a savepoint's; None: the outermost one's

    @property
    def name(self) -> str:
        """What it is called in the log."""
        return f"The on_{self.kind} callback registered at {self.where}"


class Hooks:
    """The callbacks of one session, made with the first of them: other sessions pay nothing."""

    def __init__(self, session: Guarded) -> None:
        self.is_async: bool = session._scope is not None and session._scope.has_greenlets
        self.waiting: list[Hook] = []
        self.due: list[Hook] = []  # their fate is known, and they were not called yet
        self._committed: SessionTransaction | None = None  # the last that was, and still closes
        self._tries: bool = False  # to commit the whole: from there on an error may leave it open
        self._number = itertools.count()
        self._process = os.getpid()  # a forked child has no part in what its parent began
        event.listen(session, "before_commit", self._note_try)
        event.listen(session, "after_commit", self._note_commit)
        event.listen(session, "after_transaction_end", self._note_end)

    def add(
        self,
        kind: Literal["commit", "rollback"],
        callback: Callback,
        where: str,
        savepoint: SessionTransaction | None,
    ) -> None:
        """Add a callback."""
        self.waiting.append(Hook(next(self._number), kind, callback, where, savepoint))

    def decide(self, committed: bool) -> None:
        """Settle the fate of all that wait: the outermost transaction has ended."""
        kind = "commit" if committed else "rollback"
        due = self.due + [hook for hook in self.waiting if hook.kind == kind]
        due.sort(key=lambda hook: hook.number)
        # At once: where a signal's handler raised between the two, they would be called twice.
        self.due, self.waiting = due, []
        if self._process != os.getpid():
            self.due = []

    def doubt(self, error: BaseException | None) -> None:
        """Forget everything, if the error leaves open whether a COMMIT has succeeded."""
        if not self._tries:  # the error came from elsewhere
            return
        lost = (
            isinstance(error, DBAPIError)
            and error.connection_invalidated
            and error.statement is None  # COMMIT is none of its own
        )
        if lost or UNKNOWN_OUTCOME in getattr(error, "__notes__", ()):
            self.waiting, self.due = [], []

    def roll_back(self, session: Guarded) -> None:
        """Settle what was registered before a transaction had begun: no event tells of its end."""
        self.decide(committed=False)
        self._call_here(session)

    def run(self, failed: bool) -> None:
        """Call what is due at the end of a synchronous scope."""
        self.decide(not failed)
        self._call_all()

    async def run_async(self, failed: bool) -> None:
        """Call what is due at the end of an asynchronous scope.

        Each is called, however often that is cancelled: the work is committed already.
        """
        self.decide(not failed)
        await self._await_all()

    def _note_try(self, session: Session) -> None:
        self._tries = self._tries or not _is_release(session)

    def _note_commit(self, session: Session) -> None:
        self._committed = session.get_nested_transaction()
        if self._committed is None:
            self._committed = session.get_transaction()
            self.decide(committed=True)  # now: closing the connection may be cancelled

    def _note_end(self, session: Guarded, transaction: SessionTransaction) -> None:
        """Follow the fate of a savepoint or of the outermost transaction; its connection is back.

        Savepoints that were released leave theirs to what is around them.
        """
        committed = self._committed is transaction
        if committed:
            self._committed = None  # it knows the session: no cycle
        if transaction.nested:
            self._end_savepoint(transaction, committed)
        elif transaction.parent is None:
            if not committed:
                self.doubt(sys.exception())  # `with session.begin()` rolls back by itself
            self._tries = False
            self.decide(committed)
            self._call_here(session)

    def _call_here(self, session: Guarded) -> None:
        """Call what is due in the middle of a scope; where it ends, that is not here."""
        if not session._ending:
            if self.is_async:
                await_only(self._await_all())
            else:
                self._call_all()

    def _end_savepoint(self, savepoint: SessionTransaction, released: bool) -> None:
        around = savepoint.parent
        while around is not None and not around.nested:  # a flush's own, or the outermost
            around = around.parent
        for hook in [hook for hook in self.waiting if hook.transaction is savepoint]:
            if released:
                hook.transaction = around
            else:
                self.waiting.remove(hook)
                self.due += [hook] if hook.kind == "rollback" else []

    def _call_all(self) -> None:
        while self.due:
            hook = self.due.pop(0)
            try:
                result = _call(hook)
            except BaseException as error:  # SystemExit, Ctrl-C: not before the others have run
                _note_outcome(error, hook)
                self._call_all()
                raise
            if inspect.iscoroutine(result):
                result.close()
                logger.error("%s returned a coroutine, which nobody awaits here", hook.name)

    async def _await_all(self) -> None:
        cancelled: asyncio.CancelledError | None = None
        while self.due:
            hook = self.due.pop(0)
            try:
                result = _call(hook)
            except BaseException as error:
                _note_outcome(error, hook)
                await self._await_all()
                raise
            if inspect.isawaitable(result):
                try:
                    await settle(_finish(hook, result), SETTLE_LIMIT if cancelled else None)
                except asyncio.CancelledError as error:
                    cancelled = error
                    _note_outcome(error, hook)
        if cancelled is not None:
            raise cancelled


def _note_outcome(error: BaseException, hook: Hook) -> None:
    if hook.kind == "commit":
        error.add_note(
            f"It struck while {hook.name} ran, after COMMIT: what was committed stays committed."
        )


def _call(hook: Hook) -> object:
    try:
        return hook.callback()
    except (Exception, asyncio.CancelledError):  # of something that it asked
        logger.exception("%s failed", hook.name)
        return None


async def _finish(hook: Hook, result: Awaitable[object]) -> None:
    try:
        await result
    except (Exception, asyncio.CancelledError):  # its own, or its time was over
        logger.exception("%s failed", hook.name)


def register(
    session: AsyncSession | Session, kind: Literal["commit", "rollback"], callback: Callback
) -> None:
    """Register a callback for whoever called the function that this is called in."""
    guarded = _guarded(session)
    where = _line(3)
    if not callable(callback):
        raise UsageError(
            f"on_{kind}() at {where} got {type(callback).__name__}, which cannot be called. Give "
            "it the function and not its result: functools.partial(send, row.id)."
        )
    hooks = _hooks_of(guarded)
    if not hooks.is_async and is_coroutine_function(callback):
        raise AsyncCallback(
            f"on_{kind}() at {where} got a coroutine function for a synchronous session, which "
            "cannot await it. Register a plain function there, or use the asynchronous side."
        )
    hooks.add(kind, callback, where, guarded.get_nested_transaction())


def _hooks_of(session: Guarded) -> Hooks:
    hooks: Hooks | None = session._hooks
    if hooks is None:
        hooks = session._hooks = Hooks(session)
        scope: Any = session._scope
        if scope is not None:
            scope.hooks = hooks
    return hooks


def _guarded(session: object) -> Guarded:
    inner = getattr(session, "sync_session", session)
    if not isinstance(inner, Guarded):
        raise UsageError(
            f"A session of engineroom was expected here, and not {type(session).__name__}. Take "
            "what session() gives, or the dependency of a framework."
        )
    if hasattr(inner, "_obituary"):
        raise SessionClosed(
            "The session has ended: nothing can be planned for its commit or rollback any more. Do "
            "it before the end of its scope."
        )
    return inner


def _line(depth: int) -> str:
    frame = sys._getframe(depth)
    return place(frame.f_code, frame.f_lineno)


def is_coroutine_function(function: Any) -> bool:
    """Whether calling it gives a coroutine: a function, a method, an object, a partial of them."""
    while isinstance(function, partial):
        function = function.func
    is_plain = inspect.isroutine(function) or isinstance(function, type)
    return inspect.iscoroutinefunction(function if is_plain else type(function).__call__)
