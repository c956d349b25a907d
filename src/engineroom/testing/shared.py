"""One transaction for all who are in a sandbox: the engines lend facades of its one connection."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from sqlalchemy.engine import Engine

from ..backends import Role
from ..engines import EngineRoom
from ..errors import NotInSandbox
from . import background
from .facade import RawDriver, Stage
from .outer import OuterTransaction


class Shared:
    """One transaction for all."""

    def __init__(self, room: EngineRoom, engine: Engine) -> None:
        self.has_begun: bool = False
        self._room = room
        self._outer = OuterTransaction(engine)
        self._before: dict[Engine, tuple[Any, Any]] = {}  # pool and dialect, as they were
        self._is_parents = False

    def begin(self) -> None:
        """Begin, from a thread."""
        background.submit(self._begin()).result()

    async def abegin(self) -> None:
        """Begin, from an event loop."""
        await background.wait(self._begin())

    async def _begin(self) -> None:
        await self._outer.begin()
        self.has_begun = True

    def end(self) -> None:
        """Roll back, from a thread."""
        if self._is_parents:
            return
        try:
            background.submit(self._outer.end()).result()
        finally:
            self.restore()

    async def aend(self) -> None:
        """Roll back, from an event loop."""
        if self._is_parents:
            return
        try:
            await background.wait(self._outer.end())
        finally:
            self.restore()

    def take_in(self, engine: Engine, role: Role) -> None:
        """Have an engine's connections be facades of the one."""
        if self._is_parents:
            dialect: Any = engine.dialect
            dialect.connect = _refuse
        elif engine not in self._before:
            self._before[engine] = (engine.pool, engine.dialect)
            self._replace(engine, twin(self._outer.connection.dialect, engine))
            engine.pool = Stage(engine, self._room, role, self._outer)

    def disown(self) -> None:
        """Serve nobody in a forked child: what another connection did would stay."""
        inside = list(self._before)
        self.restore()
        self._is_parents = True
        for engine in inside:
            self.take_in(engine, Role.PRIMARY)

    def restore(self) -> None:
        """Have the engines work as they did before."""
        for engine, (pool, dialect) in self._before.items():
            self._replace(engine, dialect)
            engine.pool = pool
        self._before.clear()

    def _replace(self, engine: Engine, dialect: Any) -> None:
        """Give an engine another dialect, and those that were made of it with options.

        Those ask it for its pool, but each has a dialect of its own.
        """
        for one in [engine, *self._room.derived]:
            if one.pool is engine.pool:
                one.dialect = dialect


# Kept from sandbox to sandbox: SQLAlchemy's compiled statements are remembered by dialect.
_twins: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Any]]
_twins = weakref.WeakKeyDictionary()


def _refuse(*_: object, **__: object) -> Any:
    raise NotInSandbox(
        "This process was forked inside of a sandbox, whose one transaction it cannot share: what "
        "it did would stay. Give the sandbox a database of its own, sandbox(manager, "
        'isolation="database") or the fixture db_clone, which a child shares; or open a manager of '
        "its own in the child, for what is to stay."
    )


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
        made.get_driver_connection = RawDriver
    return twins[dialect]
