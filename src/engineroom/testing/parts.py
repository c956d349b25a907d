"""One transaction inside a sandbox: whose it is, and how it stands on the stack."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any

from ..engines import EngineRoom
from ..ledger import current_owner, line_of

CHECK = "SET CONSTRAINTS ALL IMMEDIATE"

LINEAGE: ContextVar[tuple[Part, ...]] = ContextVar("engineroom_sandbox", default=())


class Part:
    """One transaction of those that the outer one serves, and the next ones after its end."""

    def __init__(self, room: EngineRoom, *, stands_alone: bool, reads: bool) -> None:
        """Remember who asks, and in what they stand.

        Args:
            stands_alone: Each statement is a transaction (AUTOCOMMIT).
            reads: The server refuses writes.
        """
        self.stands_alone: bool = stands_alone
        self.reads: bool = reads
        self.owner: Any = current_owner()
        self.savepoint: str = ""  # while it stands on the stack
        self.error: BaseException | None = None  # its last; what it gets when it was rolled back
        self.is_lost: bool = False  # rolled back in its absence
        self.is_stopped: bool = False  # its caller was cancelled
        self.idle_since: float = time.monotonic()
        self.settings: dict[str, str] = {}  # what SET LOCAL has changed, as it was before
        self.kept: dict[str, str] = {}  # the same as it is, while it is off the stack
        self.cursors: list[Any] = []  # those that stream; the server closes them at a COMMIT
        self.points: list[str] = []  # its own savepoints
        self.standing: int = 0  # how many of them are set: none, while it is off the stack
        self.has_failed: bool = False  # and its last savepoint was rolled back for another one
        # Who has committed on top of what it has written; and under how many of its savepoints.
        self.inside: list[tuple[int, str]] = []
        self.check: str = CHECK  # what its COMMIT checks
        self.violates: list[str] = []  # but not these, which those below violate for the moment
        self.is_closed: bool = False
        self._room = room
        self.lineage: tuple[Part, ...] = tuple(p for p in LINEAGE.get() if not p.is_closed)
        LINEAGE.set((*self.lineage, self))

    def is_kin(self, other: Part) -> bool:
        """Whether one of both was begun inside the other."""
        return other in self.lineage or self in other.lineage

    def note_point(self, verb: str, name: str) -> int:
        """Note what it has done with a savepoint of its own.

        Returns:
            Under how many of its savepoints a row must stand to be still there.
        """
        depth = len(self.points)
        if verb == "SAVEPOINT":
            self.points.append(name)
        elif name in self.points:
            depth -= 1 + self.points[::-1].index(name)
            del self.points[depth + (verb == "ROLLBACK") :]
            self.has_failed = False
            if verb == "RELEASE":
                self.inside = [(min(under, depth), who) for under, who in self.inside]
        self.standing = len(self.points)
        return depth

    def forget(self) -> None:
        """Forget a transaction that has ended."""
        self.is_lost = self.is_stopped = self.has_failed = False
        self.error, self.check, self.violates = None, CHECK, []
        self.standing = 0
        for each in (self.points, self.inside, self.kept, self.settings):
            each.clear()

    def __str__(self) -> str:
        for entry in self._room.ledger:
            held = entry.held()
            if held is not None and getattr(held.dbapi_connection, "part", None) is self:
                return str(entry)
        return f"a connection taken at {line_of(self.owner)}"
