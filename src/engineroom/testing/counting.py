"""What a block of code sent to the database: its statements, its round trips, and whose lines.

It listens to the events of SQLAlchemy's engines and needs no proxy. `tests/test_counting.py`
compares it with the proxy's own count for every driver.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from traceback import walk_stack
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from greenlet import getcurrent
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from engineroom.backends import Role
from engineroom.database import Database
from engineroom.engines import EngineRoom
from engineroom.ledger import is_applications, place
from engineroom.manager import DatabaseSessionManager, session_manager

__all__ = ["Recording", "Statement", "assert_round_trips", "record_statements"]

# What engineroom itself sends on SQLite, where a connection changes between reading and writing.
_OURS = "PRAGMA query_only="


@dataclass(frozen=True, slots=True)
class Statement:
    """What was sent at once, and which line of the application sent it."""

    sql: str
    """As the driver got it, with placeholders where values belong; or BEGIN, COMMIT, ROLLBACK."""
    where: str
    """The application's innermost line: `file:line in function`."""
    round_trips: int = 1
    """How often the client waited for it."""


@dataclass(eq=False)
class Recording:
    """What has been sent since the block began; complete when it has ended."""

    statements: list[Statement] = field(default_factory=list)
    """In the order in which they were sent."""

    @property
    def round_trips(self) -> int:
        """How often the client waited for the database."""
        return sum(statement.round_trips for statement in self.statements)

    def __str__(self) -> str:
        """List the statements with their lines; equal ones of one line stand together."""
        times = Counter((each.sql, each.where) for each in self.statements)
        return "\n".join(
            f"{number:>5} × {' '.join(sql.split())}\n          at {where}"
            for (sql, where), number in times.items()
        )


@contextmanager
def record_statements(
    manager: DatabaseSessionManager | Database = session_manager,
) -> Generator[Recording]:
    """Record what is sent to a manager's database while the block runs.

    A plain `with`, in asynchronous code too. It hears every session, reader and connection of both
    sides, in whichever task, thread or event loop; not what is given to the driver itself::

        with record_statements(manager) as recording:
            ...
        assert len(recording.statements) == 3

    BEGIN, COMMIT and ROLLBACK are recorded where they are sent: not without a statement between
    them, and not by a `reader()`. One execution is one trip, with these exceptions: psycopg2 makes
    one for each row of an `executemany`. What happens once in a connection's life, or now and then,
    is left out, so that the same code always counts the same: logins, pings, and the preparing of a
    statement (asyncpg: at its first execution on a connection, psycopg: at its sixth). So are the
    batches in which a streamed result is fetched.

    Args:
        manager: The one to listen to; without it, `engineroom.session_manager`.

    Raises:
        NotInitialized, ManagerClosed: It is not open.
    """
    room = manager._room
    if not room.life.allows("use"):
        raise room.life.refusal("record_statements()")
    recorder = _Recorder(room)
    _ears.add(recorder)
    try:
        yield recorder.recording
    finally:
        _ears.remove(recorder)


@contextmanager
def assert_round_trips(
    expected: int, manager: DatabaseSessionManager | Database = session_manager
) -> Generator[Recording]:
    """Fail unless the block makes exactly so many round trips to a manager's database.

    A plain `with`, in asynchronous code too; what counts is what `record_statements()` records.

        with assert_round_trips(3, manager):  # BEGIN, SELECT, COMMIT
            ...

    Args:
        expected: How many; for one session with one statement 3, for a `reader()` 1.
        manager: The one to listen to; without it, `engineroom.session_manager`.

    Raises:
        AssertionError: They were more or fewer; the message lists the statements with the lines
            that sent them. An exception of the block itself passes unchanged.
        NotInitialized, ManagerClosed: The manager is not open.
    """
    with record_statements(manager) as recording:
        yield recording
    if recording.round_trips != expected:
        raise AssertionError(
            f"{recording.round_trips} round trips were made where {expected} were expected:\n"
            f"{str(recording) or 'nothing was sent'}"
        )


class _Recorder:
    """Turns the events of one manager's engines into what was sent."""

    def __init__(self, room: EngineRoom) -> None:
        self.recording = Recording()
        self._room = room
        # Whether BEGIN has been sent. A transaction that is not here was begun before the block.
        self._has_begun: WeakKeyDictionary[Connection, bool] = WeakKeyDictionary()

    def begin(self, connection: Connection) -> None:
        """Note that a transaction begins, which the drivers of PostgreSQL put off."""
        # SQLite's BEGIN is a statement like others, and is heard as one.
        self._has_begun[connection] = connection.dialect.name == "sqlite"

    def execute(
        self, connection: Connection, statement: str, parameters: Any, *, is_many: bool
    ) -> None:
        """Note a statement, and the BEGIN that the driver sends before the first one."""
        role = self._role(connection)
        if role is None or statement.startswith(_OURS):
            return
        where = _where()
        if not self._has_begun.get(connection, True) and not self._is_autocommit(connection, role):
            self._note("BEGIN", where)
        self._has_begun[connection] = True
        is_row_by_row = is_many and connection.dialect.driver == "psycopg2"
        # (SQLAlchemy's own INSERT of many rows is one statement with one set of parameters.)
        rows = len(parameters) if is_row_by_row and not isinstance(parameters, dict) else 1
        self._note(statement, where, rows)

    def end(self, connection: Connection, how: str) -> None:
        """Note COMMIT or ROLLBACK, unless there is nothing to end."""
        role = self._role(connection)
        if (
            role is not None
            and self._has_begun.get(connection, True)
            and not connection.invalidated
            and not self._is_autocommit(connection, role)
        ):
            self._note(how, _where())

    def _role(self, connection: Connection) -> Role | None:
        """Return the role of a connection's engine; None if it is no engine of the manager."""
        engines = list(self._room._engines.items())
        return next(
            (role for (_, role), engine in engines if engine.dialect is connection.dialect), None
        )

    def _is_autocommit(self, connection: Connection, role: Role) -> bool:
        default = (
            "AUTOCOMMIT"
            if role is Role.READER
            else self._room._engine_options.get("isolation_level")
        )
        level = connection.get_execution_options().get("isolation_level", default)
        return bool(level == "AUTOCOMMIT")

    def _note(self, sql: str, where: str, round_trips: int = 1) -> None:
        self.recording.statements.append(Statement(sql, where, round_trips))


class _Ears:
    """Hands the events of all engines to those who record.

    It listens on the class, so that engines are heard that are made inside the block; from the
    first recording on and for good, for SQLAlchemy forbids to add or remove a listener while
    another thread is in the event. What a recording leaves behind is an empty loop.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recorders: tuple[_Recorder, ...] = ()
        self._listens = False

    def add(self, recorder: _Recorder) -> None:
        """Hand the events to one more."""
        with self._lock:
            self._recorders += (recorder,)
            if not self._listens:
                self._listens = True
                event.listen(Engine, "begin", self._begin)
                event.listen(Engine, "before_cursor_execute", self._execute)
                event.listen(Engine, "commit", self._commit)
                event.listen(Engine, "rollback", self._roll_back)

    def remove(self, recorder: _Recorder) -> None:
        """Hand them to it no more."""
        with self._lock:
            self._recorders = tuple(each for each in self._recorders if each is not recorder)

    def _begin(self, connection: Connection) -> None:
        for each in self._recorders:
            each.begin(connection)

    def _execute(self, connection: Connection, *rest: Any) -> None:
        _, statement, parameters, _, is_many = rest  # cursor and context are not needed
        for each in self._recorders:
            each.execute(connection, statement, parameters, is_many=is_many)

    def _commit(self, connection: Connection) -> None:
        for each in self._recorders:
            each.end(connection, "COMMIT")

    def _roll_back(self, connection: Connection) -> None:
        for each in self._recorders:
            each.end(connection, "ROLLBACK")


_ears = _Ears()


def _where() -> str:
    """Return the application's innermost line of the running call."""
    for frame in _frames():
        if is_applications(frame):
            return place(frame.f_code, frame.f_lineno)
    return "no line of the application"


def _frames() -> Iterator[FrameType]:
    """Yield the frames of the running call, innermost first.

    On the asynchronous side SQLAlchemy runs in a greenlet, whose frames end there: the caller's are
    those of its parent, which waits.
    """
    yield from (frame for frame, _ in walk_stack(sys._getframe()))
    parent = getcurrent().parent
    while parent is not None:
        if parent.gr_frame is not None:
            yield from (frame for frame, _ in walk_stack(parent.gr_frame))
        parent = parent.parent
