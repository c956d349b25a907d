"""A pooler that nobody has declared: noticed where looking costs nothing, and told what to set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

from ...urls import masked
from .sqlstates import PROTOCOL_VIOLATION, sqlstate

logger: logging.Logger = logging.getLogger("engineroom")

LARGEST_PID = 2**22  # of a process, as Linux counts; elsewhere they are smaller. PgBouncer's are
# made up, of 32 bits: one in a thousand passes for true.
# psycopg and psycopg2 know no SQLSTATE of a connection that was refused. PgBouncer's words are the
# same in every language.
SAID = "unsupported startup parameter"
ELSEWHERE = {"26000", "42P05"}  # a prepared statement is not there, or there already

DECLARE = (
    "Say so: pooler='transaction' (DB_POOLER=transaction), or 'session' where its pool_mode is "
    "session. See docs/pgbouncer.md."
)
UNDECLARED = f"A pooler such as PgBouncer stands before the server, and is not declared. {DECLARE}"


def is_made_up(pid: int) -> bool:
    """Whether no process of a server can have this number."""
    return not 0 < pid <= LARGEST_PID


def watch(engine: Engine, pid_of: Callable[[Any], int]) -> None:
    """Notice a pooler by what it says and refuses.

    Args:
        pid_of: Returns the server's process id, as a driver's connection has been told.
    """
    dialect: Any = engine.dialect
    connect = dialect.connect

    def connect_or_explain(*args: Any, **kw: Any) -> Any:
        try:
            return connect(*args, **kw)
        except Exception as error:
            if sqlstate(error) == PROTOCOL_VIOLATION or SAID in str(error):
                error.add_note(
                    "A pooler such as PgBouncer says this, which stands before the server and "
                    f"takes few startup parameters. {DECLARE}"
                )
            raise

    def look(opened: Any, record: object) -> None:
        pid = pid_of(dialect.get_driver_connection(opened))
        if is_made_up(pid):
            logger.warning(
                "A pooler stands before the server of %s: %d is no process id. %s",
                masked(engine.url),
                pid,
                DECLARE,
            )

    dialect.connect = connect_or_explain
    event.listen(engine, "connect", look, once=True)
    event.listen(engine, "handle_error", _explain)


def _explain(context: ExceptionContext) -> None:
    error = context.original_exception
    if sqlstate(error) in ELSEWHERE:
        error.add_note(
            "Behind a pooler in transaction mode, a statement that was prepared in one session of "
            f"the server is looked for in another. {DECLARE}"
        )
