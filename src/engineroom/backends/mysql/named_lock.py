"""The lock that one of many starters holds while it changes the schema of a MySQL database."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, ClassVar

from sqlalchemy import event
from sqlalchemy.engine import Connection

from .errnos import READ_ONLY_TRANSACTION, errno

# The server's own deadlines, and what stands for "none" in each.
GUARDS = {
    "wait_timeout": 31536000,
    "idle_transaction_timeout": 0,
    "idle_readonly_transaction_timeout": 0,
    "idle_write_transaction_timeout": 0,
    "max_statement_time": 0,
    "max_execution_time": 0,
}

WHO_HOLDS = """
SELECT id, user, host, db, command, time AS seconds
FROM information_schema.processlist WHERE id = IS_USED_LOCK({name})
"""


class NamedLock:
    """A lock of GET_LOCK: one for all that changes the schema of a database, whatever its tables.

    It belongs to the connection, and not to a transaction: each CREATE TABLE commits, and would end
    that. So where it should go with the transaction, it is given back as that ends.
    """

    # A server has one list of such locks for all its databases, and a name has 64 characters. Any
    # other tool can take it as well: it stands in docs/migrations.md.
    NAME: ClassVar[str] = "CONCAT('engineroom:', SHA1(DATABASE()))"
    longest_pause: float = 0.2
    autocommit_block: Callable[[], AbstractContextManager[None]] | None = None

    def __init__(self) -> None:
        self._guards: dict[str, Any] = {}  # as they were

    def options(self) -> dict[str, Any]:
        """See what others have committed while one waited, though the snapshot would be older."""
        return {"isolation_level": "READ COMMITTED"}

    def look_options(self) -> dict[str, Any]:
        """Return none: `looking` is enough."""
        return {}

    def begin(self, connection: Connection, *, writes: bool) -> None:
        """Begin; GET_LOCK reads no table, so there is no snapshot from before."""
        connection.begin()

    @contextmanager
    def looking(self, connection: Connection) -> Generator[None]:
        """Have the server refuse writes: a connection that engineroom did not make knows no option.

        It does so in the middle of a transaction, too: a CREATE TABLE commits that first.
        """
        names = "'tx_read_only', 'transaction_read_only'"  # MariaDB's, and MySQL's
        shown = connection.exec_driver_sql(f"SHOW VARIABLES WHERE Variable_name IN ({names})")
        before = shown.all()[0][1]
        connection.exec_driver_sql("SET SESSION TRANSACTION READ ONLY")
        try:
            yield
        finally:
            if before == "OFF":
                connection.exec_driver_sql("SET SESSION TRANSACTION READ WRITE")

    def is_refusal(self, error: BaseException | None) -> bool:
        """Ask for "cannot execute statement in a READ ONLY transaction"."""
        return errno(error) == READ_ONLY_TRANSACTION

    def set_guards(self, connection: Connection, *, whole_session: bool) -> None:
        """Look which this server has; they are set with the lock, for nothing else sets them back.

        A step that works elsewhere (in Python, on another connection) leaves this one idle, and a
        server that ended it for that would let a second starter begin.
        """
        names = ", ".join(f"'{name}'" for name in GUARDS)
        shown = connection.exec_driver_sql(f"SHOW VARIABLES WHERE Variable_name IN ({names})")
        self._guards = {name: value for name, value in shown.all() if float(value)}

    def try_take(self, connection: Connection, *, whole_session: bool) -> bool:
        """Ask, and do not wait: who waits in a statement of the server's can be told nothing."""
        asked = connection.exec_driver_sql(f"SELECT GET_LOCK({self.NAME}, 0)")
        taken = bool(asked.scalar_one())
        if taken:
            self._set({name: GUARDS[name] for name in self._guards}, connection)
        if whole_session:
            connection.commit()
        elif taken:
            self._give_back_with_the_transaction(connection)
        return taken

    def _give_back_with_the_transaction(self, connection: Connection) -> None:
        """Give it back just before the transaction ends; what is in it is mostly committed."""
        held = [True]

        def give_back(connection: Connection) -> None:
            if held:
                held.clear()
                with suppress(Exception):  # the connection may be lost, and the lock with it
                    self._give_back(connection)

        for name in ("commit", "rollback"):
            event.listen(connection, name, give_back, once=True)

    def _give_back(self, connection: Connection) -> None:
        connection.exec_driver_sql(f"SELECT RELEASE_LOCK({self.NAME})")
        self._set(self._guards, connection)

    def _set(self, guards: dict[str, Any], connection: Connection) -> None:
        if guards:
            values = ", ".join(f"{name} = {value}" for name, value in guards.items())
            connection.exec_driver_sql(f"SET SESSION {values}")

    def rest(self, connection: Connection) -> None:
        """Nothing is held while one waits."""

    def minding_drops(self, connection: Connection) -> AbstractContextManager[None]:
        """The server itself refuses to drop what is referred to."""
        return nullcontext()

    def finish(self, connection: Connection) -> None:
        """Alembic has committed what it did; what it only asked ends here."""
        connection.rollback()

    def release(self, connection: Connection) -> None:
        """Unlock, and have the guards as they were."""
        self._give_back(connection)
        connection.commit()

    def holder(self, connection: Connection) -> str:
        """Ask the server; of other users' connections it tells nothing to most."""
        row = connection.exec_driver_sql(WHO_HOLDS.format(name=self.NAME)).mappings().first()
        if row is not None:
            return (
                f"connection {row['id']} (user {row['user']}, from {row['host']}, database "
                f"{row['db']}), which does {row['command']} for {row['seconds']} s"
            )
        number = connection.exec_driver_sql(f"SELECT IS_USED_LOCK({self.NAME})").scalar_one()
        if number is None:
            return "whoever held it has just let go of it"
        return f"connection {number}, of which the server tells this user nothing"

    def cure(self) -> str:
        """Say how a connection is ended."""
        return "end it (KILL with that number)"
