"""A sandbox: what the manager hands out inside is undone at the end, whoever opened it."""

from __future__ import annotations

import asyncio
import copy
import weakref
from types import TracebackType
from typing import Any, Literal, Self

from sqlalchemy.engine import Engine

from ..backends import Role, Side
from ..cancellation import settle
from ..database import Database
from ..engines import EngineRoom
from ..errors import SandboxError
from ..manager import DatabaseSessionManager
from . import background
from .facade import RawDriver, Stage
from .outer import OuterTransaction

Isolation = Literal["transaction", "database"]

BEGIN_LIMIT = 60.0  # seconds; a pool has its own, shorter one


def sandbox(
    manager: DatabaseSessionManager | Database, *, isolation: Isolation = "transaction"
) -> Sandbox:
    """Undo at the end what everything that the manager hands out inside has done.

    Sessions, readers and connections of both sides, in other tasks, threads and event loops: all
    of them run inside one transaction, in which `commit()` releases a savepoint, and which is
    rolled back. Engines that were taken from the manager before are covered as well. `init()` and
    `close()` of the manager change nothing inside.

    Args:
        manager: It must be open, with no session open yet.
        isolation: "transaction"; or "database", a clone of the database for this sandbox alone,
            for what one transaction cannot serve. On SQLite it is always a clone of the file.

    Raises:
        SandboxError: on entering, if the manager cannot have one now; on leaving, if a session was
            left open inside.
    """
    return Sandbox(manager, isolation)


class Sandbox:
    """What `sandbox()` returns: to be entered by `with` or `async with`, once."""

    def __init__(self, manager: DatabaseSessionManager | Database, isolation: Isolation) -> None:
        self._room: EngineRoom = manager._room
        self._side = Side.ASYNC if isinstance(manager, DatabaseSessionManager) else Side.SYNC
        self._isolation = isolation
        self._before: dict[Engine, tuple[Any, Any]] = {}  # pool and dialect, as they were
        self._outer: OuterTransaction

    def __enter__(self) -> Self:
        """Begin."""
        self._check()
        background.submit(self._begin()).result()
        return self

    async def __aenter__(self) -> Self:
        """Begin."""
        self._check()
        try:
            await settle(background.wait(self._begin()), BEGIN_LIMIT)
        except asyncio.CancelledError:
            if self._room.sandbox is self:
                await settle(background.wait(self._end()))
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Roll back."""
        left = self._retire_open()
        background.submit(self._end()).result()
        self._refuse_open(left, error)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Roll back."""
        left = self._retire_open()
        await settle(background.wait(self._end()), BEGIN_LIMIT)
        self._refuse_open(left, error)

    def take_in(self, engine: Engine, role: Role) -> None:
        """Have an engine work inside; one that is made meanwhile as well."""
        if engine not in self._before:
            self._before[engine] = (engine.pool, engine.dialect)
            engine.dialect = twin(self._outer.dialect, engine)
            engine.pool = Stage(engine, self._room, role, self._outer)

    def _check(self) -> None:
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

    async def _begin(self) -> None:
        room = self._room
        self._outer = OuterTransaction(room.engine(self._side))
        await self._outer.begin()
        room.sandbox = self
        for (_, role), engine in list(room._engines.items()):
            self.take_in(engine, role)
        room.binds.clear()

    async def _end(self) -> None:
        room = self._room
        try:
            await self._outer.end()
        finally:
            for engine, (pool, dialect) in self._before.items():
                engine.pool, engine.dialect = pool, dialect
            self._before.clear()
            room.binds.clear()
            room.sandbox = None

    def _retire_open(self) -> list[str]:
        """End what was left open inside; return where it was opened."""
        left = []
        for entry in self._room.ledger:
            left.append(f"the {entry.kind} of {entry.owner}, opened at {entry.where}")
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


# Kept from sandbox to sandbox: SQLAlchemy's compiled statements are remembered by dialect.
_twins: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Any]]
_twins = weakref.WeakKeyDictionary()


def twin(dialect: Any, engine: Engine) -> Any:
    """Return a copy of the dialect of the one connection, for an engine of either side.

    What is noted around its verbs elsewhere has no meaning here: those are as its class has them.
    """
    twins = _twins.setdefault(engine.dialect, weakref.WeakKeyDictionary())
    if dialect not in twins:
        twins[dialect] = made = copy.copy(dialect)
        for name in [name for name in vars(made) if name.startswith("do_") or name == "connect"]:
            delattr(made, name)
        made.is_async = engine.dialect.is_async
        made.get_driver_connection = lambda connection: RawDriver()
    return twins[dialect]
