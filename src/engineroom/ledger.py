"""Who holds which session and connection, since when, from which line of code."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any


class Entry:
    """One scope, from enter to exit: whose it is, which line opened it, since when.

    Scopes inherit from it: what the ledger must know costs no object of its own.
    """

    __slots__ = (
        "__weakref__",
        "code",
        "connection",
        "is_open",
        "kind",
        "line",
        "since",
        "task",
        "thread",
    )

    kind: str  # the verb that made it
    code: CodeType
    line: int
    since: float
    is_open: bool  # whether it stands in the ledger
    thread: int
    task: asyncio.Task[Any] | None
    connection: weakref.ref[Any] | None  # what the pool lent to it, once a transaction began

    @property
    def where(self) -> str:
        """The caller's line, as `file:line in function`."""
        return f"{self.code.co_filename}:{self.line} in {self.code.co_name}"

    @property
    def owner(self) -> str:
        """The task or the thread that entered the scope, by name."""
        return owner_name(self.thread, self.task)

    def retire(self, why: str) -> None:
        """End the scope from outside: from now on, using what it gave raises."""
        raise NotImplementedError

    def belongs_here(self) -> bool:
        """Whether the running task (outside a loop: the running thread) entered the scope."""
        return self.thread == threading.get_ident() and self.task in (None, current_task())


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

    def enter(self, entry: Entry) -> None:
        """Note that the running task or thread entered a scope."""
        entry.since = time.monotonic()
        entry.thread = threading.get_ident()
        entry.task = None if asyncio._get_running_loop() is None else asyncio.current_task()
        entry.connection = None
        entry.is_open = True
        self._entries[id(entry)] = weakref.ref(entry)

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

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def clear(self) -> None:
        """Forget everything: in a forked child, nothing of it is ours."""
        for entry in self:
            self.leave(entry)

    def scopes(self) -> tuple[ScopeInfo, ...]:
        """Return the open scopes, oldest first."""
        now = time.monotonic()
        return tuple(
            ScopeInfo(
                kind=entry.kind,
                owner=entry.owner,
                where=entry.where,
                seconds=now - entry.since,
                connected=entry.connection is not None and entry.connection() is not None,
            )
            for entry in sorted(self, key=lambda entry: entry.since)
        )


def current_task() -> asyncio.Task[Any] | None:
    """Return the running task; None outside an event loop."""
    # `_get_running_loop` is exported by asyncio for this: `get_running_loop` would raise.
    return asyncio.current_task() if asyncio._get_running_loop() is not None else None


def owner_name(thread: int, task: asyncio.Task[Any] | None) -> str:
    """Name a task, or a thread by its identifier."""
    if task is not None:
        return f"task {task.get_name()}"
    for candidate in threading.enumerate():
        if candidate.ident == thread:
            return f"thread {candidate.name}"
    return f"thread {thread}"
