"""A sandbox: what the manager hands out inside is undone at the end, whoever opened it."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Literal, Self

from sqlalchemy.engine import Engine

from ..backends import MYSQL, Role, Side
from ..cancellation import settle
from ..database import Database
from ..engines import EngineRoom
from ..errors import SandboxError
from ..ledger import describe_held
from ..manager import DatabaseSessionManager
from .alone import Alone
from .clones import Template
from .shared import Shared
from .templates import not_behind_pooler

Isolation = Literal["transaction", "database"]

BEGIN_LIMIT = 60.0  # seconds; a pool has its own, shorter one


def sandbox(
    manager: DatabaseSessionManager | Database,
    *,
    isolation: Isolation = "transaction",
    template: Template | None = None,
) -> Sandbox:
    """Undo at the end what everything that the manager hands out inside has done.

    Sessions, readers and connections of both sides, in other tasks, threads and event loops: all
    of them run inside one transaction, in which `commit()` releases a savepoint, and which is
    rolled back. Engines that were taken from the manager before are covered as well. `init()` and
    `close()` of the manager change nothing inside.

    Args:
        manager: It must be open, with no session open yet.
        isolation: "transaction"; or "database", a clone of the database for this sandbox alone,
            for what one transaction cannot serve. On SQLite it is always a clone of the file; on
            MySQL there is only the latter.
        template: What the clone is made of, by `clones()`; without it, the manager's own database,
            to which nobody else may be connected then (PostgreSQL).

    Raises:
        SandboxError: on entering, if the manager cannot have one now; on leaving, if a session was
            left open inside.
        NotBehindPooler: on entering, if it is to clone the database behind a pooler.
    """
    return Sandbox(manager, isolation, template)


class Sandbox:
    """What `sandbox()` returns: to be entered by `with` or `async with`, once."""

    def __init__(
        self,
        manager: DatabaseSessionManager | Database,
        isolation: Isolation,
        template: Template | None,
    ) -> None:
        self._room: EngineRoom = manager._room
        self._side = Side.ASYNC if isinstance(manager, DatabaseSessionManager) else Side.SYNC
        self._isolation = isolation
        self._template = template
        self._inside: Shared | Alone

    def __enter__(self) -> Self:
        """Begin."""
        self._choose()
        self._inside.begin()
        self._take_in_all()
        return self

    async def __aenter__(self) -> Self:
        """Begin."""
        self._choose()
        try:
            await settle(self._inside.abegin(), BEGIN_LIMIT)
        except asyncio.CancelledError:
            if self._inside.has_begun:
                await settle(self._inside.aend(), BEGIN_LIMIT)
            raise
        self._take_in_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Roll back."""
        left = self._retire_open()
        try:
            self._inside.end()
        finally:
            self._forget()
        self._refuse_open(left, error)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Roll back."""
        left = self._retire_open()
        try:
            await settle(self._inside.aend(), BEGIN_LIMIT)
        finally:
            self._forget()
        self._refuse_open(left, error)

    def disown(self) -> None:
        """Go on in a forked child, as far as what is undone can be shared with it."""
        self._inside.disown()

    def take_in(self, engine: Engine, role: Role) -> None:
        """Have an engine work inside: the manager makes one at its first use."""
        self._inside.take_in(engine, role)

    def _choose(self) -> None:
        room = self._room
        if not room.life.is_usable:
            raise room.life.refusal("sandbox()")
        if room.sandbox is not None:
            raise SandboxError(
                f"{room.life.name} has a sandbox already, and a second one inside it would undo "
                "nothing more. Leave it out; a savepoint inside is session.begin_nested()."
            )
        if open_ones := [f"the {entry.kind} opened at {entry.where}" for entry in room.ledger]:
            raise SandboxError(
                f"A sandbox cannot take in what was opened before it: {'; '.join(open_ones)}. "
                "End that first, or open it inside."
            )
        now = time.monotonic()
        lent = [describe_held(lender.slots.held, now) for _, _, _, lender in room.lenders()]
        if held := [str(holder) for holders in lent for holder in holders]:
            raise SandboxError(
                f"A sandbox cannot take in what holds a connection already: {'; '.join(held)}. "
                "End that first, or open it inside."
            )
        engine = room.engine(self._side)
        if self._isolation == "transaction" and engine.dialect.name in MYSQL:
            raise SandboxError(
                f"A sandbox in one transaction cannot be had on {engine.dialect.name}: any DDL "
                "commits it, and its rows would stay. Take a database of its own: sandbox(manager, "
                'isolation="database").'
            )
        pooler = room.settings.pooler if engine.dialect.name == "postgresql" else None
        if self._isolation == "database" and self._template is None and pooler is not None:
            raise not_behind_pooler(
                'sandbox(isolation="database")',
                f"pooler={pooler!r}",
                "open the manager on it, without pooler= (DB_POOLER), or give the sandbox a "
                "template= that clones() makes there",
            )
        if self._isolation == "database" or engine.dialect.name == "sqlite":
            self._inside = Alone(room, engine, self._template)
        else:
            self._inside = Shared(room, engine)

    def _take_in_all(self) -> None:
        room = self._room
        room.sandbox = self
        for (_, role), engine in list(room._engines.items()):
            self.take_in(engine, role)

    def _forget(self) -> None:
        self._room.sandbox = None

    def _retire_open(self) -> list[str]:
        """End what was left open inside; return where it was opened."""
        left = []
        for entry in self._room.ledger:
            left.append(str(entry))
            entry.retire(
                f"The sandbox ended before this {entry.kind}, which was opened at {entry.where}. "
                "End it inside."
            )
        return left

    def _refuse_open(self, left: list[str], error: BaseException | None) -> None:
        if left and error is None:
            raise SandboxError(
                f"At the end of the sandbox there was still open: {'; '.join(left)}. It was rolled "
                "back with everything. End it inside, as the application must, too."
            )
