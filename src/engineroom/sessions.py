"""The Session class under both twins: it belongs to a scope, and its end is final."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.attributes import set_committed_value

from .errors import WrongThread
from .ledger import Entry
from .retiring import ENDED, retire


class Guarded(Session):
    """What engineroom adds to a session class: it belongs to a scope, and its end is final."""

    scope: Entry | None = None
    ending = False  # its scope is being left
    last_seen: dict[int, tuple[object, dict[str, Any]]] | None = None  # what a rollback emptied

    def get_bind(self, *args: Any, **kw: Any) -> Engine | Connection:
        """Return the engine for a statement; every one passes here, before anything is sent."""
        scope = self.scope
        if scope is not None and scope.thread != threading.get_ident():
            self._check_thread()
        return super().get_bind(*args, **kw)

    def _check_thread(self) -> None:
        scope = self.scope
        if scope is not None and scope.thread != threading.get_ident():
            raise WrongThread(
                f"The {scope.kind} that {scope.owner} opened at {scope.where} was used in thread "
                f"{threading.current_thread().name}. A session belongs to the thread that opened "
                "it: open another one here, and hand over identifiers instead of sessions."
            )

    def begin(self, nested: bool = False) -> SessionTransaction:
        """Begin a transaction, or a savepoint."""
        self._check_thread()
        return super().begin(nested)

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Send pending changes."""
        self._check_thread()
        super().flush(objects)

    def commit(self) -> None:
        """Send pending changes and commit."""
        self._check_thread()
        super().commit()

    def rollback(self) -> None:
        """Roll back."""
        self._check_thread()
        super().rollback()

    def close(self) -> None:
        """Close the session for good: it refuses further use."""
        super().close()
        retire(self, ENDED)


@cache
def guarded(session_class: Any) -> type[Guarded]:
    """Return the session class with `Guarded` in front."""
    made = cast(type[Guarded], type(session_class.__name__, (Guarded, session_class), {}))
    event.listen(made, "after_begin", _note_connection)
    event.listen(made, "after_rollback", _keep_what_was_loaded)
    event.listen(made, "deleted_to_persistent", _keep_what_was_deleted)
    return made


def _note_connection(session: Guarded, transaction: object, connection: Connection) -> None:
    if session.scope is not None:
        session.scope.connection = weakref.ref(connection.connection)


# What was loaded stays readable after the scope: as it was last seen, which after a rollback is not
# what is stored. A rollback empties every object that its session knows, so:


def _keep_what_was_loaded(session: Guarded) -> None:
    """Let the objects of an ending session go before its rollback; remember those of another."""
    if session.ending:
        session.expunge_all()
    else:
        for item in session.identity_map.values():
            _remember(session, item)


def _keep_what_was_deleted(session: Guarded, item: object) -> None:
    """Do the same for an object whose deletion is being rolled back."""
    if session.ending:
        session.expunge(item)
    else:
        _remember(session, item)


def _remember(session: Guarded, item: object) -> None:
    if session.last_seen is None:
        session.last_seen = {}
    _, before = session.last_seen.get(id(item), (item, {}))
    session.last_seen[id(item)] = (item, before | vars(item))


def recall(session: Guarded) -> None:
    """Give objects that a rollback inside the scope emptied what they were last seen with."""
    for item, values in (session.last_seen or {}).values():
        known = vars(item)
        for name, value in values.items():
            if name not in known:
                set_committed_value(item, name, value)
