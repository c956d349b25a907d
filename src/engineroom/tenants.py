"""What is kept for one of many databases: its engines, and what makes sessions on them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar, cast

from sqlalchemy import MetaData
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import Session, sessionmaker

from .backends import Role, Side
from .cap import Cap
from .engines import EngineRoom
from .errors import InvalidURL, UnknownOption
from .ledger import applications_line
from .pool import ThreadPool
from .scopes import mind_the_loop
from .sessions import guarded
from .settings import Options
from .urls import ACCOUNT, masked, read_url

V = TypeVar("V")

# What of `create_engine`'s arguments is a setting here. The others go to `create_engine`.
SETTINGS = {
    *("pool_size", "max_overflow", "pool_timeout", "pool_recycle", "pool_pre_ping"),
    *("pooler", "echo"),
    *ACCOUNT,
}

CURE = "Take `await async_session_factory(…)`, or move it to a thread: await asyncio.to_thread(…)"


class Masked(dict[str | URL, V]):
    """A dictionary by URL, whose text shows no secret of them."""

    def __repr__(self) -> str:
        shown = (f"{masked(url)!r}: {type(value).__name__}" for url, value in self.items())
        return f"{{{', '.join(shown)}}}"


def place_of(url: str | URL) -> URL | None:
    """Return what a URL is, however it is written and whatever the driver; None if it is none."""
    try:
        parsed = read_url(url)
    except InvalidURL:
        return None
    return parsed.set(drivername=parsed.get_backend_name())


class Tenant(EngineRoom):
    """What a manager keeps for one URL: the engines of both sides, made when they are needed."""

    def __init__(
        self, url: str | URL, arguments: dict[str, Any], cap: Cap | None, metadata: MetaData
    ) -> None:
        super().__init__(f"SessionManager's {masked(url)}", cap)
        self.url: str | URL = url
        self.place: URL | None = place_of(url)
        self.arguments: dict[str, Any] = arguments
        self.used: float = time.monotonic()
        self.callback: Callable[[Engine], object] | None = None
        self.has_warned: bool = False
        self._making = threading.RLock()
        options: Any = {name: arguments[name] for name in SETTINGS & arguments.keys()}
        options["engine_options"] = {
            name: value for name, value in arguments.items() if name not in SETTINGS
        }
        options["metadata"] = metadata
        self.open(url, None, cast(Options, options))

    def engine(self, side: Side, role: Role = Role.PRIMARY) -> Engine:
        """Return the engine of a side and role; threads that come at once get the same."""
        with self._making:
            return super().engine(side, role)

    def _make_engine(self, side: Side, role: Role, *, apart: float | None = None) -> Engine:
        try:
            engine = super()._make_engine(side, role, apart=apart)
        except TypeError as error:
            raise self._unknown(error) or error from None
        if apart is None and self.callback is not None:
            try:
                self.callback(engine)
            except BaseException:
                if isinstance(engine.pool, ThreadPool):
                    engine.pool.end()
                    for connection in engine.pool.lent():  # which the traceback may hold
                        connection.invalidate()
                raise
        return engine

    def _unknown(self, error: TypeError) -> UnknownOption | None:
        """Name what `create_engine` does not take; None if that was not what it complained of."""
        unknown = [name for name in self._engine_options if f"'{name}'" in str(error)]
        if not unknown:
            return None
        near = [match for name in unknown for match in get_close_matches(name, SETTINGS, 1)]
        hint = f"Did you mean {' and '.join(near)}?" if near else "Leave them out."
        return UnknownOption(
            f"create_engine() takes no {' and no '.join(unknown)} for {masked(self.settings.url)}. "
            f"{hint}"
        )

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses it: no scope is open, and no connection is lent."""
        lent = any(lender.slots.held for _, _, _, lender in self.lenders())
        return not lent and not self.ledger

    def let_go(self) -> None:
        """Close what is idle, and what is in use when it comes back; who holds it may go on."""
        for _, _, _, lender in list(self.lenders()):
            lender.let_go()

    def disown(self) -> None:
        """Start afresh in a forked child."""
        self._making = threading.RLock()
        super().disown()


class Factory(sessionmaker[Session]):
    """A `sessionmaker` whose sessions are known to what closes them: the manager, or a fork."""

    def __init__(self, room: EngineRoom | None, engine: Engine) -> None:
        super().__init__(bind=engine, class_=guarded(Session))
        self.room: EngineRoom | None = room

    def __call__(self, **local_kw: Any) -> Session:
        """Return a new session, which the caller commits and closes."""
        session = super().__call__(**local_kw)
        if self.room is not None:
            self.room.loose.add(session)
            if asyncio._get_running_loop() is not None:
                mind_the_loop(self.room, "session_factory", *applications_line(), CURE)
        return session
