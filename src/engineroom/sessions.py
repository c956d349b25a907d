"""The Session class under both twins: it belongs to a scope, and its end is final."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

from greenlet import getcurrent
from sqlalchemy import event, inspect
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.attributes import set_committed_value

from .errors import SessionInUse, WrongThread
from .ledger import Entry, current_owner, is_inside, name_of
from .retiring import ENDED, retire

logger: logging.Logger = logging.getLogger("engineroom")


class Guarded(Session):
    """What engineroom adds to a session class: it belongs to a scope, and its end is final."""

    _scope: Entry | None = None
    _hooks: Any = None  # what `on_commit` and its kin registered (hooks.Hooks)
    _ending = False  # its scope is being left
    _last_seen: dict[int, tuple[object, dict[str, Any]]] | None = None  # what a rollback emptied
    _greenlet: Any = None  # of the call that runs, or ran last: SQLAlchemy makes one for each
    _task: asyncio.Task[Any] | None = None  # whose call that is

    def get_bind(self, *args: Any, **kw: Any) -> Engine | Connection:
        """Return the engine for a statement; every one passes here, before anything is sent."""
        scope = self._scope
        if scope is not None and (scope.has_greenlets or scope.thread != threading.get_ident()):
            self._check_caller(scope)
        return super().get_bind(*args, **kw)

    def _check_caller(self, scope: Entry) -> None:
        """Refuse a call in the middle of another, and an event loop that is not the session's."""
        if scope.thread != threading.get_ident():
            self._move_here(scope)
        # Only where there are greenlets: once asked, the library keeps a state for the thread. The
        # thread's end takes a lock, and a fork at that moment would leave it locked in the child.
        if not scope.has_greenlets:
            return
        here, last = getcurrent(), self._greenlet
        if here is not last and here.parent is not None:  # (a thread's own has no parent)
            if last is not None and not last.dead:
                self._refuse_overlap()
            self._greenlet, self._task = here, asyncio.current_task()

    def _move_here(self, scope: Entry) -> None:
        """Let another thread go on with a synchronous session: frameworks hand them around."""
        if scope.has_greenlets:
            raise WrongThread(
                f"The {scope.kind} that {scope.owner} opened at {scope.where} was used in thread "
                f"{threading.current_thread().name}. An asynchronous session belongs to its event "
                "loop: open another one here, and hand over identifiers instead of sessions."
            )
        if is_inside(scope.thread, self):
            raise used_by_another_thread(scope)
        scope.move_here()

    def _check_thread(self) -> None:
        """Refuse to close under another thread; from which one an asynchronous session may be
        closed, SQLAlchemy knows.
        """
        if (scope := self._scope) is not None and not scope.has_greenlets:
            self._check_caller(scope)

    def _call_in_flight(self) -> asyncio.Task[Any] | None:
        """Return the task whose call on this session has not returned yet."""
        return None if self._greenlet is None or self._greenlet.dead else self._task

    def _refuse_overlap(self) -> None:
        other, scope = self._call_in_flight(), self._scope
        if other is not None and scope is not None and self._greenlet is not getcurrent():
            raise in_use(scope, other)

    def _check(self) -> None:
        if self._scope is not None:
            self._check_caller(self._scope)

    def _mind_unsent(self) -> None:
        """Say what its user loses who closes a session before its scope would have committed."""
        scope, unsent = self._scope, len(self.new) + len(self.dirty) + len(self.deleted)
        if unsent and scope is not None and scope.is_open:
            logger.warning(
                "The %s opened at %s was closed with %d changed objects that it had not sent: "
                "they are not stored. Do not close it: its scope commits at the end.",
                scope.kind,
                scope.where,
                unsent,
            )

    def _tell_hooks(self) -> None:
        if self._hooks is not None:
            self._hooks.roll_back(self)

    def begin(self, nested: bool = False) -> SessionTransaction:
        """Begin a transaction, or a savepoint."""
        self._check()
        return super().begin(nested)

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Send pending changes."""
        self._check()
        super().flush(objects)

    def commit(self) -> None:
        """Send pending changes and commit."""
        if (scope := self._scope) is not None:  # `_check()`, written out for every session's end
            self._check_caller(scope)
        try:
            super().commit()
        except BaseException as error:
            if self._hooks is not None:
                self._hooks.doubt(error)
            raise

    def rollback(self) -> None:
        """Roll back."""
        self._check()
        super().rollback()
        self._tell_hooks()

    def reset(self) -> None:
        """Roll back, and forget every object."""
        self._check()
        super().reset()
        self._tell_hooks()

    def invalidate(self) -> None:
        """Close the session, and its connections with it."""
        self._check_thread()
        self._refuse_overlap()
        super().invalidate()
        self._tell_hooks()

    def close(self) -> None:
        """Close the session for good: it refuses further use."""
        self._check_thread()
        if self._greenlet is not None:
            self._refuse_overlap()
        if not self._ending:
            self._mind_unsent()
        was_ending, self._ending = self._ending, True
        try:
            super().close()
        finally:
            retire(self, ENDED)
            self._ending = was_ending
            self._tell_hooks()


def in_use(scope: Entry, other: asyncio.Task[Any] | None) -> SessionInUse:
    """Build the error for a call in the middle of another, of a task that may not be known."""
    whose = "another task" if other is None else name_of(other)
    return SessionInUse(
        f"The {scope.kind} opened at {scope.where} was used by {name_of(current_owner())} in the "
        f"middle of a call by {whose}. A session does one thing after another. Open one "
        "in each task: async def one(…): async with manager.session() as db: …, and then "
        "asyncio.gather(one(…), one(…))."
    )


def used_by_another_thread(scope: Entry) -> SessionInUse:
    """Build the error for a thread that comes, or ends the scope, in the middle of a call."""
    return SessionInUse(
        f"The {scope.kind} opened at {scope.where} was used by thread "
        f"{threading.current_thread().name} in the middle of a call by {scope.owner}. A session "
        "does one thing after another: open one in each thread."
    )


def is_open(session: Any) -> bool:
    """Whether the scope of a session, of either side, has not ended yet."""
    scope: Entry | None = getattr(getattr(session, "sync_session", session), "_scope", None)
    return scope is not None and scope.is_open


@cache
def guarded(session_class: Any) -> type[Guarded]:
    """Return the session class with `Guarded` in front."""
    made = cast(type[Guarded], type(session_class.__name__, (Guarded, session_class), {}))
    event.listen(made, "after_begin", _note_connection)
    event.listen(made, "after_rollback", _keep_what_was_loaded)
    event.listen(made, "deleted_to_persistent", _keep_what_was_deleted)
    return made


def _note_connection(
    session: Guarded, transaction: SessionTransaction, connection: Connection
) -> None:
    if (scope := session._scope) is not None:
        scope.hold(connection.connection)
        if scope.guards is not None and not transaction.nested:
            scope.guard(connection)


# What was loaded stays readable after the scope: as it was last seen, which after a rollback is not
# what is stored. A rollback empties every object that its session knows, so:


def _keep_what_was_loaded(session: Guarded) -> None:
    """Let the objects of an ending session go before its rollback; remember those of another."""
    if session._ending:
        session.expunge_all()
    else:
        for item in session.identity_map.values():
            _remember(session, item)


def _keep_what_was_deleted(session: Guarded, item: object) -> None:
    """Do the same for an object whose deletion is being rolled back."""
    if session._ending:
        session.expunge(item)
    else:
        _remember(session, item)


def _remember(session: Guarded, item: object) -> None:
    if session._last_seen is None:
        session._last_seen = {}
    _, before = session._last_seen.get(id(item), (item, {}))
    session._last_seen[id(item)] = (item, before | vars(item))


def recall(session: Guarded) -> None:
    """Give objects that a rollback inside the scope emptied what they were last seen with."""
    for item, values in (session._last_seen or {}).values():
        known, mapped = vars(item), inspect(item).mapper.attrs
        for name, value in values.items():
            if name not in known and name in mapped:  # (another is the application's own)
                set_committed_value(item, name, value)
