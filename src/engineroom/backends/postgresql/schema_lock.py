"""The advisory lock under which one of many starters changes the schema, and who holds it."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from sqlalchemy.engine import Connection

from ...errors import InvalidOption
from .sqlstates import sqlstate

LEVEL = "READ COMMITTED"  # of who changes the schema


class AdvisoryLock:
    """An advisory lock: one for all that changes the schema of a database, whatever its tables."""

    # A database has advisory locks of its own, so the key need not say which one it is. Any other
    # tool can take it as well: it stands in docs/migrations.md.
    KEY: ClassVar[int] = int.from_bytes(b"engnroom", "big")
    longest_pause: float = 0.2
    # While one migrates the lock is the session's: it outlasts a transaction.
    autocommit_block: Callable[[], AbstractContextManager[None]] | None = None

    def __init__(self) -> None:
        self._before: dict[str, str] = {}  # what the guards of the session were
        self._stood_alone = False
        self._is_held = False

    def options(self) -> dict[str, Any]:
        """See what others have committed while one waited, though the snapshot would be older."""
        return {"isolation_level": LEVEL}

    def look_options(self) -> dict[str, Any]:
        """Begin a transaction in which the server refuses writes, on an AUTOCOMMIT engine too."""
        return {"postgresql_readonly": True, "isolation_level": LEVEL}

    def begin(self, connection: Connection, *, writes: bool) -> None:
        """Begin at the level that is needed, which is what most connections begin at anyhow."""
        if stands_alone(connection) or (writes and connection.get_isolation_level() != LEVEL):
            connection.execution_options(**self.options())
        connection.begin()
        if not writes:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")

    def looking(self, connection: Connection) -> AbstractContextManager[None]:
        """The transaction is read-only."""
        return nullcontext()

    def is_refusal(self, error: BaseException | None) -> bool:
        """Ask for "read_only_sql_transaction"."""
        return sqlstate(error) == "25006"

    def set_guards(self, connection: Connection, *, whole_session: bool) -> None:
        """Put those at 0 that this server has.

        A step that works elsewhere (in Python, on another connection) leaves this one idle, and a
        server that ended it for that would let a second starter begin.
        """
        if whole_session and stands_alone(connection):
            self._stood_alone = True
            connection.execution_options(**self.options())
        guards = connection.exec_driver_sql(
            f"SELECT name, setting, set_config(name, '0', {not whole_session}) "  # noqa: S608
            "FROM pg_catalog.pg_settings WHERE name IN ('idle_in_transaction_session_timeout', "
            "'idle_session_timeout', 'statement_timeout', 'transaction_timeout')"
        )
        self._before = {name: setting for name, setting, _ in guards}

    def try_take(self, connection: Connection, *, whole_session: bool) -> bool:
        """Ask, and do not wait: a statement that waits has a snapshot.

        CREATE INDEX CONCURRENTLY, of who holds the lock, would wait for that snapshot to end.
        """
        if not whole_session and stands_alone(connection):
            raise InvalidOption(
                "The lock under which the schema is changed cannot be taken: the connection is in "
                "AUTOCOMMIT, and would lose it with the statement that takes it. Give one in a "
                'transaction (isolation_level="READ COMMITTED"); to Alembic, one that nothing has '
                "begun on: engine.connect()."
            )
        verb = "pg_try_advisory_lock" if whole_session else "pg_try_advisory_xact_lock"
        taken = bool(connection.exec_driver_sql(f"SELECT {verb}({self.KEY})").scalar_one())
        if whole_session:
            connection.commit()
            self._is_held = taken
        return taken

    def rest(self, connection: Connection) -> None:
        """A transaction that waits holds nothing that others need."""

    def minding_drops(self, connection: Connection) -> AbstractContextManager[None]:
        """The server itself refuses to drop what is referred to."""
        return nullcontext()

    def finish(self, connection: Connection) -> None:
        """Alembic has committed what it did; what it only asked ends here."""
        connection.rollback()

    def release(self, connection: Connection) -> None:
        """Unlock, and have the guards as the session had them."""
        calls = [f"set_config('{name}', '{was}', false)" for name, was in self._before.items()]
        if self._is_held:
            calls.append(f"pg_advisory_unlock({self.KEY})")
        connection.exec_driver_sql(f"SELECT {', '.join(calls)}")
        connection.commit()
        if self._stood_alone:
            connection.execution_options(isolation_level="AUTOCOMMIT")

    def holder(self, connection: Connection) -> str:
        """Ask the server; of another role's backends it tells but the half to most."""
        connection.exec_driver_sql("SELECT pg_stat_clear_snapshot()")  # it may have answered before
        row = connection.exec_driver_sql(WHO_HOLDS.format(key=self.KEY)).mappings().first()
        if row is None:
            return "whoever held it has just let go of it"
        place = f"from {row['client']}" if row["client"] else "from a local socket"
        begun = f", in a transaction since {row['begun']}" if row["begun"] else ""
        doing = "is doing what only its own role and superusers may see"
        if row["state"] == "active":
            doing = f"has run for {row['seconds']} s: {without_literals(row['query'])}"
        elif row["state"]:
            doing = (
                f"is {row['state']} for {row['seconds']} s, after {without_literals(row['query'])}"
            )
        return (
            f"backend {row['pid']} (application_name {row['application']!r}, role {row['role']}, "
            f"{place}, connected since {row['since']}{begun}), which {doing}"
        )

    def cure(self) -> str:
        """Say how a backend is ended."""
        return "end it (SELECT pg_terminate_backend(…) with that number)"


def stands_alone(connection: Connection) -> bool:
    """Whether each of its statements does, whatever has been begun (AUTOCOMMIT)."""
    lent: Any = connection.connection.dbapi_connection
    return connection.dialect.detect_autocommit_setting(lent)


WHO_HOLDS = """
SELECT a.pid, a.application_name AS application, a.usename AS role, host(a.client_addr) AS client,
    to_char(a.backend_start, 'YYYY-MM-DD HH24:MI:SS TZ') AS since,
    to_char(a.xact_start, 'YYYY-MM-DD HH24:MI:SS TZ') AS begun,
    a.state, a.query,
    round(extract(epoch FROM clock_timestamp() - coalesce(
        CASE WHEN a.state = 'active' THEN a.query_start END, a.state_change)))::bigint AS seconds
FROM pg_catalog.pg_locks AS l JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
    AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
    AND (l.classid::bigint << 32) + l.objid::bigint = {key}
"""
SHOWN = 200  # characters of a statement
LITERAL = re.compile(r"'(?:[^']|'')*'?|(\$\w*\$).*?(?:\1|$)", re.DOTALL)


def without_literals(statement: str) -> str:
    """Return the beginning of a statement that the server shows, on one line, without values."""
    text = " ".join(LITERAL.sub("'…'", statement).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
