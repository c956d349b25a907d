"""A connection that was lost while nobody waited: asyncpg's error reads like use by two at once."""

from __future__ import annotations

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

LOST = (
    "The connection was lost in the middle of its work: the server has ended it, or something "
    "between. That is the other operation which asyncpg means; nobody else uses the connection. "
    "What failed here was not sent."
)


def watch(engine: Engine) -> None:
    """Say so in a note."""
    event.listen(engine, "handle_error", _tell)


def _tell(context: ExceptionContext) -> None:
    from asyncpg import InternalClientError

    # asyncpg has the server's farewell, and raises this before it sends anything.
    if context.is_disconnect and isinstance(
        context.original_exception.__cause__, InternalClientError
    ):
        (context.sqlalchemy_exception or context.original_exception).add_note(LOST)
