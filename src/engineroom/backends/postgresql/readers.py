"""What a reader cannot do, since it has no transaction: its errors say what to take instead."""

from __future__ import annotations

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

from .sqlstates import sqlstate

INSTEAD = {
    "25P01": (  # there is no transaction
        "reader() has no transaction, in which a stream, a savepoint or LOCK TABLE would have to "
        "be. Take session(read_only=True)."
    ),
    "25006": (  # it is read-only
        "reader() writes nothing, temporary tables neither. Take session()."
    ),
}


def watch(engine: Engine) -> None:
    """Say so in a note."""
    event.listen(engine, "handle_error", _tell)


def _tell(context: ExceptionContext) -> None:
    error = context.original_exception
    if note := INSTEAD.get(sqlstate(error) or ""):
        (context.sqlalchemy_exception or error).add_note(note)
