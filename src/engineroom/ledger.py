"""Who holds which session and connection, since when, from which line of code."""

from __future__ import annotations

import asyncio
import gc
import operator
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from traceback import walk_stack
from types import CodeType, FrameType
from typing import Any, ClassVar, cast

from sqlalchemy.engine import Connection
from sqlalchemy.pool import PoolProxiedConnection

from .errors import AlreadyEntered, Holder

OPENER = "engineroom_opener"  # in the `info` of a connection: who asked for it
STATEMENT_LENGTH = 80  # characters of a statement that a report shows


class Request:
    """What a framework works on; its text names it: `GET /items`."""

    def __init__(self, name: str = "") -> None:
        self.name: str = name
        self.is_abandoned: bool = False  # its client has gone, and its work was cancelled

    def __str__(self) -> str:
        return self.name


REQUEST: ContextVar[Request | None] = ContextVar("engineroom_request", default=None)


class Entry:
    """One scope, from enter to exit: whose it is, which line opened it, since when.

    Scopes inherit from it: what the ledger must know costs no object of its own. What most never
    have stands on the class.
    """

    has_greenlets: ClassVar[bool] = False  # each call on what it gives runs in one of its own

    kind: str  # the verb that made it
    code: CodeType
    line: int
    since: float
    is_open: bool = False  # until its end begins
    _resource: Any = None  # what it gives, until its end is over
    obituary: str = ""  # why it was ended from outside, once it was
    is_overdue: bool = False  # whether `close()` has ended it, and nobody waits for it any more
    guards: dict[str, float] | None = None  # deadlines of the server that are its own
    streams: bool = False  # its rows may be fetched by whoever has them
    thread: int
    task: asyncio.Task[Any] | None
    request: Request | None  # what it serves, if a framework said so
    connection: weakref.ref[Any] | None = None  # what was lent to it, once a transaction began

    @property
    def where(self) -> str:
        """The caller's line, as `file:line in function`."""
        return place(self.code, self.line)

    def __str__(self) -> str:
        """Name it with its owner and its line, as errors and logs do."""
        return f"the {self.kind} of {self.owner}, opened at {self.where}"

    @property
    def holder(self) -> Any:
        """The task that entered the scope, or the identifier of the thread."""
        return self.task or self.thread

    @property
    def owner(self) -> str:
        """The holder, by name, and the request that it serves."""
        name, request = name_of(self.holder), self.request
        return name if request is None or request is self.holder else f"{name} ({request})"

    def move_here(self) -> None:
        """Note that another thread goes on with what the scope gave."""
        self.thread = threading.get_ident()
        self.task = current_task()

    def retire(self, why: str) -> None:
        """End the scope from outside: from now on, using what it gave raises."""
        raise NotImplementedError

    def begin_afresh(self) -> None:
        """Be entered again, after it was ended from outside."""
        self.obituary, self.is_overdue = "", False

    def hold(self, connection: PoolProxiedConnection) -> None:
        """Note which connection the scope uses; and to the pool, whose scope that is.

        From here on the scope is the owner, though a helper of it may have run the first statement;
        it is known weakly, so that a task that is dropped is not kept alive.
        """
        self.connection = weakref.ref(connection)
        if (permit := permit_of(connection)) is not None:
            permit.entry = permit.owner = weakref.ref(self)

    def guard(self, connection: Connection) -> None:
        """Set those deadlines for the transaction that has begun."""
        raise NotImplementedError

    @property
    def stands_alone(self) -> bool:
        """Whether each of its statements does, outside of a transaction."""
        return False

    def may_be_elsewhere(self) -> bool:
        """Whether its thread may have handed on what it gave, and do something else now."""
        return False

    def held(self) -> PoolProxiedConnection | None:
        """Return the connection that the scope holds, if it holds one now.

        An exception's traceback may keep alive what went back to the pool: such a one is empty.
        """
        connection = None if self.connection is None else self.connection()
        return connection if connection is not None and connection.is_valid else None

    def can_end(self) -> bool:
        """Whether somebody may still end the scope: a task whose loop is closed never will."""
        return not (self.is_overdue or has_ended(self.task))

    def belongs_here(self) -> bool:
        """Whether the running task (outside a loop: the running thread) entered the scope."""
        return self.thread == threading.get_ident() and self.task in (None, current_task())


# Against which permit each connection is lent, by its `id()`, until it goes back.
LENT: dict[int, Any] = {}


def permit_of(connection: PoolProxiedConnection) -> Any:
    """Return the permit against which a connection is lent; None if it is not."""
    return LENT.get(id(connection))


def berth_of(connection: PoolProxiedConnection) -> Any:
    """Return the berth of a connection, detached or not; None if it was given back."""
    known = connection.record_info
    return (connection.info if known is None else known).get("berth")


@dataclass(frozen=True, slots=True)
class ScopeInfo:
    """A scope that is open right now."""

    kind: str
    """The verb that opened it: `session`, `reader`, `connect`, `check` or `create_all`."""
    owner: str
    """The name of the task or thread that entered it."""
    where: str
    """The line that opened it: `file:line in function`."""
    seconds: float
    """How long it has been open."""
    connected: bool
    """Whether it holds a connection."""


class Ledger:
    """The open scopes of one manager.

    It holds them weakly: a scope that was dropped without an exit is the garbage collector's to
    clean up, and the ledger must not be what keeps it alive. Enter and leave are single operations
    on a dictionary, so no lock is taken, and a fork can find none held.
    """

    def __init__(self) -> None:
        self._entries: dict[int, weakref.ref[Entry]] = {}

    def enter(self, entry: Entry) -> asyncio.AbstractEventLoop | None:
        """Note that the running task or thread entered a scope; return the loop that runs, if any.

        Raises:
            AlreadyEntered: it is open, or just ending.
        """
        if entry.is_open or entry._resource is not None:
            raise AlreadyEntered(
                f"The {entry.kind} opened at {entry.where} was entered a second time, while "
                f"{entry.owner} is inside it. Call {entry.kind}() again for another one."
            )
        if entry.obituary:
            entry.begin_afresh()
        loop = asyncio._get_running_loop()
        entry.since = time.monotonic()
        entry.thread = threading.get_ident()
        entry.task = None if loop is None else asyncio.current_task(loop)
        entry.request = REQUEST.get()
        entry.is_open = True
        self._entries[id(entry)] = weakref.ref(entry)
        return loop

    def leave(self, entry: Entry) -> None:
        """Forget a scope."""
        entry.is_open = False
        self._entries.pop(id(entry), None)

    def __iter__(self) -> Iterator[Entry]:
        for key, reference in list(self._entries.items()):
            entry = reference()
            if entry is not None:
                yield entry
            elif self._entries.get(key) is reference:
                self._entries.pop(key, None)

    def __len__(self) -> int:
        """How many scopes are open; one that was dropped counts until somebody looks."""
        return len(self._entries)

    def __bool__(self) -> bool:
        """Whether there is a scope whose end may be waited for."""
        return any(entry.can_end() for entry in self)

    def clear(self) -> None:
        """Forget everything: in a forked child, nothing of it is ours."""
        for entry in self:
            self.leave(entry)

    def scopes(self, now: float) -> tuple[ScopeInfo, ...]:
        """Return the open scopes, oldest first."""
        return tuple(
            ScopeInfo(
                kind=entry.kind,
                owner=entry.owner,
                where=entry.where,
                seconds=now - entry.since,
                connected=entry.held() is not None,
            )
            for entry in sorted(self, key=lambda entry: entry.since)
            if not entry.is_overdue
        )


def current_task() -> asyncio.Task[Any] | None:
    """Return the running task; None outside an event loop."""
    # `_get_running_loop` is exported by asyncio for this: `get_running_loop` would raise.
    return None if asyncio._get_running_loop() is None else asyncio.current_task()


def current_owner() -> Any:
    """Return the running task, or the thread's identifier outside of tasks."""
    if asyncio._get_running_loop() is None:  # written out: every checkout asks
        return threading.get_ident()
    return asyncio.current_task() or threading.get_ident()


def has_ended(owner: Any) -> bool:
    """Whether it is a task of a loop that was closed, which never goes on."""
    return isinstance(owner, asyncio.Task) and owner.get_loop().is_closed()


def name_of(owner: Any) -> str:
    """Name a task, a thread by its identifier, or a request."""
    if isinstance(owner, asyncio.Task):
        return f"task {owner.get_name()}"
    if isinstance(owner, weakref.ref):
        return "a scope that was dropped"
    if not isinstance(owner, int):
        return str(owner)
    for candidate in threading.enumerate():
        if candidate.ident == owner:
            return f"thread {candidate.name}"
    return f"thread {owner}"


def line_of(owner: Any) -> str:
    """Return the application's innermost line at which a task is suspended, or a thread is."""
    if isinstance(owner, asyncio.Task):
        frames = list(suspended_frames(owner.get_coro()))[::-1]
    else:
        running = frames_of_threads().get(owner) if isinstance(owner, int) else None
        frames = [frame for frame, _ in walk_stack(running)] if running else []
    if not frames:
        return "an unknown line"
    line = next(filter(is_applications, frames), frames[0])
    return place(line.f_code, line.f_lineno)


def frames_of_threads() -> dict[int, FrameType]:
    """Return the frame that each thread runs.

    Where the garbage collector begins in the middle of that, Python before 3.12 stands still for
    ever: it holds a lock of the interpreter, and the next thread that wants it holds the GIL. So
    the collector is off meanwhile; `map` lets no other thread come between.
    """
    look = sys._current_frames
    if not gc.isenabled():
        return look()
    steps: tuple[Any, ...] = (gc.disable, look, gc.enable)
    found: dict[int, FrameType] = list(map(operator.call, steps))[1]
    return found


def place(code: CodeType, line: int) -> str:
    """Write down a line of code: `file:line in function`."""
    return f"{code.co_filename}:{line} in {code.co_name}"


def is_inside(thread: int, opened: object) -> bool:
    """Whether a thread is in the middle of a method of this session."""
    running = frames_of_threads().get(thread)
    frames = walk_stack(running) if running else ()
    return any(
        frame.f_code.co_varnames[:1] == ("self",) and frame.f_locals.get("self") is opened
        for frame, _ in frames
    )


def is_known_to_a_thread(opened: object, code: CodeType) -> bool:
    """Whether a thread runs this function with `opened` in a variable, or a method that has it.

    Call it from no such method.
    """
    return any(
        (frame.f_code is code or frame.f_code.co_varnames[:1] == ("self",)) and has(frame, opened)
        for running in frames_of_threads().values()
        for frame, _ in walk_stack(running)
    )


def has(frame: FrameType, opened: object) -> bool:
    """Whether `opened` is in a variable of this frame."""
    return any(map(operator.is_, frame.f_locals.values(), repeat(opened)))


def applications_line() -> tuple[CodeType, int]:
    """Return the application's innermost line that is being run here."""
    frames = [frame for frame, _ in walk_stack(sys._getframe(1))]
    line = next(filter(is_applications, frames), frames[0])
    return line.f_code, line.f_lineno


def suspended_frames(awaited: Any) -> Iterator[FrameType]:
    """Yield the frames of a suspended coroutine and of what it awaits, outermost first."""
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            yield frame
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)


def is_applications(frame: FrameType) -> bool:
    """Whether it is neither Python's own code, nor an installed library's, nor ours."""
    return not frame.f_code.co_filename.startswith(LIBRARIES)


LIBRARIES = (
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    str(Path(__file__).parent),
    "<sqlalchemy generated",  # the wrappers that it writes at run time
    "<string>",  # (as 2.0 calls them)
)


def describe_held(permits: Iterable[Any], now: float) -> tuple[Holder, ...]:
    """Say who holds these permits; one that comes back meanwhile is left out."""
    holders = [describe(permit, now) for permit in permits if permit.owner is not None]
    return tuple(holder for holder in holders if holder is not None)


def opener_of(permit: Any) -> Entry | None:
    """Return the scope that holds a permit's connection, or stands for a session without one."""
    if permit.entry is not None:
        return cast("Entry | None", permit.entry())
    connection = None if permit.connection is None else permit.connection()
    if connection is None or not connection.is_valid or OPENER not in connection.info:
        return None
    opener: Entry | None = connection.info[OPENER]()
    return opener if opener is not None and opener.held() is connection else None


def describe(permit: Any, now: float) -> Holder | None:
    """Say who holds a permit of `slots`, since when, from which line, and what it does."""
    owner, connection, statement = permit.owner, permit.connection, permit.statement
    since = permit.since or now  # (it changes hands at any moment)
    entry = opener_of(permit)
    if owner is None:
        return None
    seconds = max(0.0, now - (permit.statement_since if statement else since))
    if connection is None:  # (a permit that was reserved knows its scope before)
        doing = "connecting" if entry is None else "with nothing begun yet"
    elif permit.running:
        doing = f"running for {seconds:.1f} s: {shorten(statement)}"
    else:
        doing = "idle" if entry is None or entry.stands_alone else "idle in transaction"
        doing = f"{doing} for {seconds:.1f} s"
        if permit.options.get("stream_results"):  # (`yield_per` sets it as well)
            # Rows are fetched without a statement that could be noted.
            doing = f"in a stream, or {doing}: {shorten(statement)}"
    return Holder(
        owner=name_of(owner) if entry is None else entry.owner,
        kind="connection" if entry is None else entry.kind,
        where=line_of(owner) if entry is None else entry.where,
        seconds=max(0.0, now - since),
        doing=doing,
    )


def shorten(statement: str) -> str:
    """Write a statement into one line that is not too long for a report."""
    return " ".join(statement.split())[:STATEMENT_LENGTH]
