"""SessionManager: many databases by URL, in one process that may fork at any moment."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from sqlalchemy import MetaData
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import await_only, greenlet_spawn

from . import drain, schema
from .backends import Role, Side
from .cap import Cap, process_cap
from .database import Database
from .engines import EngineRoom, Stats
from .errors import InvalidOption, ManagerClosed
from .ledger import applications_line
from .lifecycle import State
from .manager import DatabaseSessionManager
from .models import Base
from .pool import PassingPool
from .secrecy import unseen
from .tenants import Factory, Masked, Tenant, place_of
from .urls import masked

MAX_ENGINES = 256
RETRIES = 10  # of `prepare_models`, where somebody without our lock creates the same tables
LONGEST_PAUSE = 1.0  # seconds between two of them; the first is a hundredth of it


class SessionManager:
    """Many databases by URL: for workers, tenants and result backends.

    It has the verbs of the class of this name in Celery, and may take its place. Until the process
    forks, each call gets an engine of its own, which keeps no connection; in a forked child, or
    where `forked = True` is set, there is one engine with a pool for each URL.

    >>> from sqlalchemy import text
    >>> with SessionManager() as manager:
    ...     session = manager.session_factory("sqlite://")
    ...     session.scalar(text("SELECT 40 + 2"))
    ...     session.close()
    42
    """

    forked: bool
    """Whether engines are kept: set in a forked child by itself, and anywhere by hand."""
    engine_callback: Callable[[Engine], object] | None
    """Called with every new engine, before its tables are made."""
    metadata: MetaData
    """Whose tables `prepare_models` creates."""

    def __init__(
        self,
        engine_callback: Callable[[Engine], object] | None = None,
        metadata: MetaData = Base.metadata,
        *,
        max_engines: int = MAX_ENGINES,
        max_connections: int | None = None,
    ) -> None:
        """Make a manager that knows no database yet.

        Args:
            engine_callback: Called with every new engine, before its tables are made. It attaches
                events; what it raises goes to the caller, and the engine is not kept.
            metadata: Whose tables `prepare_models` creates.
            max_engines: How many URLs are kept. Beyond, the one that was used longest ago, and that
                nobody uses now, gives way: its connections are closed.
            max_connections: How many connections there may be over all URLs, in each process.

        Raises:
            InvalidOption: a limit is below 1.
        """
        for name, limit in (("max_engines", max_engines), ("max_connections", max_connections)):
            if limit is not None and limit < 1:
                raise InvalidOption(f"{name}={limit} cannot be used: it has to be 1 or more.")
        self.forked = False
        self.engine_callback = engine_callback
        self.metadata = metadata
        self.max_engines: int = max_engines
        self._engines: Masked[Engine] = Masked()
        self._sessions: Masked[Factory] = Masked()
        self._tenants: Masked[Tenant] = Masked()  # which of both sides' engines are kept
        self._rooms: weakref.WeakSet[Tenant] = weakref.WeakSet()  # and all that are alive
        self._owners: weakref.WeakKeyDictionary[Engine, weakref.ref[Tenant]] = (
            weakref.WeakKeyDictionary()
        )
        # What is prepared, oldest first, and which place that is.
        self._prepared: dict[tuple[URL, MetaData], URL | None] = {}
        self._has_prepared = False
        self._is_closed = False
        self._lock = threading.RLock()
        self._cap = (
            None
            if max_connections is None
            else Cap(max_connections, "the max_connections of a SessionManager")
        )
        MANAGERS.add(self)

    # -- the contract --------------------------------------------------------------------------

    @property
    def prepared(self) -> bool:
        """Whether tables were prepared, anywhere; which these were is remembered for each URL."""
        return self._has_prepared

    @unseen
    def get_engine(self, dburi: str | URL, **kwargs: Any) -> Engine:
        """Return the engine of a URL.

        In a forked process it is kept: there is one for each URL, as it is written, and other
        `kwargs` do not make another. Elsewhere each call makes one, which keeps no connection.

        Args:
            kwargs: `create_engine`'s. Those of a pool say nothing where there is none.

        Raises:
            ConfigurationError: the URL or one of `kwargs` cannot work.
            ManagerClosed: after `close()`.
        """
        if not self.forked:
            return self._make_passing(dburi, kwargs)
        engine = self._engines.get(dburi)
        if engine is not None:
            if (tenant := self._tenants.get(dburi)) is not None:
                self._use(tenant, kwargs)
            return engine
        return self._keep(dburi, kwargs, Side.SYNC)

    @unseen
    def create_session(
        self, dburi: str | URL, short_lived_sessions: bool = False, **kwargs: Any
    ) -> tuple[Engine, sessionmaker[Session]]:
        """Return the engine of a URL, and what makes sessions on it.

        Args:
            short_lived_sessions: Make it for this call alone.
            kwargs: As `get_engine` takes them.
        """
        engine = self.get_engine(dburi, **kwargs)
        if short_lived_sessions or not self.forked:
            return engine, Factory(self._owner(engine), engine)
        factory = self._sessions.get(dburi)
        if factory is None:
            factory = self._sessions.setdefault(dburi, Factory(self._owner(engine), engine))
        return engine, factory

    @unseen
    def session_factory(self, dburi: str | URL, **kwargs: Any) -> Session:
        """Return a new session on a URL whose tables exist; the caller commits and closes it.

        Args:
            kwargs: As `create_session` takes them.

        Raises:
            SchemaLocked: another one who creates tables there was not ready in time.
        """
        engine, make_session = self.create_session(dburi, **kwargs)
        self.prepare_models(engine)
        return make_session()

    @unseen
    def prepare_models(self, engine: Engine) -> None:
        """Create the tables that are not there yet, once for each URL.

        Raises:
            SchemaLocked: another one who does so was not ready in time.
        """
        key = (engine.url, self.metadata)
        if key in self._prepared:
            return
        for pause in pauses():
            try:
                self._prepare(engine)
                break
            except DatabaseError:  # somebody without our lock creates the same
                if pause is None:
                    raise
            if engine.dialect.is_async:
                await_only(asyncio.sleep(pause))
            else:
                time.sleep(pause)
        owner = self._owner(engine)
        with self._lock:
            self._has_prepared = True
            if not self._is_closed:
                self._prepared[key] = place_of(engine.url) if owner is None else owner.place
                while len(self._prepared) > self.max_engines:
                    del self._prepared[next(iter(self._prepared))]

    def _prepare(self, engine: Engine) -> None:
        """Create what is missing."""
        owner = self._owner(engine)
        timeout = schema.TIMEOUT if owner is None else owner.settings.schema_timeout
        schema.create_all(engine, self.metadata, timeout)

    def invalidate(self, dburi: str | URL) -> None:
        """Forget a URL, and close its connections: those in use as soon as they come back.

        However it is written: other spellings of it, and other drivers, are forgotten as well.
        """
        with self._lock:
            place, known = self._place_of(dburi), {*self._tenants, *self._engines}
            spellings = [url for url in known if place is not None and self._place_of(url) == place]
            forgotten = [self._forget(url) for url in {dburi, *spellings}]
        for tenant, engine in forgotten:
            if tenant is not None:
                tenant.let_go()
            if engine is not None and self._owner(engine) is None:  # it was put there by others
                engine.dispose()

    # -- and beyond ----------------------------------------------------------------------------

    @unseen
    def database(self, dburi: str | URL, **kwargs: Any) -> DatabaseSessionManager:
        """Return the database of a URL, with all verbs of both sides: ask for it at each use.

        Its engines are kept, forked or not, and count among `max_engines`.

        Args:
            kwargs: As `get_engine` takes them.

        Raises:
            ConfigurationError: the URL or one of `kwargs` cannot work.
            ManagerClosed: after `close()`.
        """
        tenant = self._tenant(dburi, kwargs)
        manager = DatabaseSessionManager.__new__(DatabaseSessionManager)
        manager.sync = Database.__new__(Database)
        manager._room = manager.sync._room = tenant
        return manager

    def stats(self) -> Stats:
        """Take a snapshot of the ledgers and the pools of every URL; each pool names its own."""
        now = time.monotonic()
        each = [tenant.stats(now) for tenant in list(self._rooms)]
        scopes = [scope for one in each for scope in one.scopes]
        return Stats(
            state=(State.CLOSED if self._is_closed else State.OPEN).value,
            scopes=tuple(sorted(scopes, key=lambda scope: -scope.seconds)),
            pools=tuple(pool for one in each for pool in one.pools),
            caps=tuple(cap.info() for cap in (self._cap, process_cap()) if cap is not None),
        )

    @unseen
    async def async_session_factory(self, dburi: str | URL, **kwargs: Any) -> AsyncSession:
        """Return a new session on a URL whose tables exist; the caller commits and closes it.

        Args:
            kwargs: As `get_engine` takes them.

        Raises:
            SchemaLocked: another one who creates tables there was not ready in time.
        """
        tenant = self._tenant(dburi, kwargs)
        bind: AsyncEngine = tenant.bind(Side.ASYNC, Role.PRIMARY)
        self._owners[bind.sync_engine] = weakref.ref(tenant)
        await greenlet_spawn(self.prepare_models, bind.sync_engine)
        session = tenant.new_async_session(bind)
        tenant.loose.add(session.sync_session)
        return session

    def close(self, timeout: float | None = None) -> None:
        """Take no new work, let what runs end, and leave no connection behind; as `Database.close`.

        Args:
            timeout: Seconds for running scopes to end; the setting `close_timeout` without it.

        Raises:
            CloseInsideScope: it was called inside a scope that it would wait for.
        """
        tenants = self._start_closing(drain.refuse_in_loop)
        deadline = drain.latest(tenants, timeout)
        for tenant in tenants:
            drain.close(tenant, max(0.0, deadline - time.monotonic()))

    async def aclose(self, timeout: float | None = None) -> None:
        """Take no new work, let what runs end, and leave no connection behind; on an event loop.

        Args:
            timeout: Seconds for running scopes to end; the setting `close_timeout` without it.

        Raises:
            CloseInsideScope: it was called inside a scope that it would wait for.
        """
        tenants = self._start_closing()
        deadline = drain.latest(tenants, timeout)
        left = max(0.0, deadline - time.monotonic())
        await asyncio.gather(*(drain.aclose(tenant, left) for tenant in tenants))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.aclose()

    # -- what is kept --------------------------------------------------------------------------

    def _keep(self, url: str | URL, arguments: dict[str, Any], side: Side) -> Engine:
        """Make the engine of a URL, and keep it."""
        tenant = self._tenant(url, arguments)
        try:
            engine = tenant.engine(side)
        except BaseException:
            with self._lock:
                if not tenant._engines:  # the callback, or `create_engine`, refused the first
                    self._forget(url)
            raise
        with self._lock:
            self._owners[engine] = weakref.ref(tenant)
            if self._tenants.get(url) is tenant:  # or it was invalidated meanwhile
                engine = self._engines.setdefault(url, engine)
        return engine

    def _tenant(self, url: str | URL, arguments: dict[str, Any]) -> Tenant:
        """Return what is kept for a URL; beyond `max_engines` others give way."""
        tenant = self._tenants.get(url)
        if tenant is None or not tenant.life.is_usable:  # (its own door was closed)
            with self._lock:
                tenant = self._tenants.get(url)
                if tenant is None or not tenant.life.is_usable:
                    tenant, evicted = self._new_tenant(url, arguments), self._evict()
                    self._forget(url)
                    self._tenants[url] = tenant
                    for other in evicted:
                        other.let_go()
        self._use(tenant, arguments)
        return tenant

    def _new_tenant(self, url: str | URL, arguments: dict[str, Any]) -> Tenant:
        if self._is_closed:
            raise ManagerClosed("The SessionManager is closed. Make another one: SessionManager().")
        tenant = Tenant(url, arguments, self._cap, self.metadata)
        tenant.callback = self.engine_callback
        self._rooms.add(tenant)
        return tenant

    def _make_passing(self, url: str | URL, arguments: dict[str, Any]) -> Engine:
        """Make an engine that keeps no connection, and is kept by nobody but the caller."""
        ours = {
            name: value
            for name, value in arguments.items()
            if name == "pooler"
            or (not name.startswith("pool") and name not in {"max_overflow", "echo_pool"})
        }
        with self._lock:
            tenant = self._new_tenant(url, ours)
        tenant.thread_pool = PassingPool
        engine = tenant.engine(Side.SYNC)
        self._owners[engine] = weakref.ref(tenant)
        return engine

    def _use(self, tenant: Tenant, arguments: dict[str, Any]) -> None:
        """Note that it is used; say once that other arguments make no other engine."""
        tenant.used = time.monotonic()
        if arguments and arguments != tenant.arguments and not tenant.has_warned:
            tenant.has_warned = True
            code, line = applications_line()
            given = sorted({*arguments, *tenant.arguments})
            other = [
                name
                for name in given
                if name not in arguments
                or name not in tenant.arguments
                or arguments[name] != tenant.arguments[name]
            ]
            warnings.warn_explicit(
                f"The engine of {masked(tenant.url)} was made with other arguments "
                f"({', '.join(other)}), and is used as it is. Ask with the same ones everywhere, "
                "or call invalidate() before.",
                RuntimeWarning,
                code.co_filename,
                line,
            )

    def _owner(self, engine: Engine) -> Tenant | None:
        """Return what an engine belongs to; None if it is not one of ours."""
        reference = self._owners.get(engine)
        return None if reference is None else reference()

    def _evict(self) -> list[Tenant]:
        """Forget those used longest ago that nobody uses, until there is room for one more."""
        evicted = []
        excess = len(self._tenants) - self.max_engines + 1
        if excess > 0:
            idle = [(tenant.used, url) for url, tenant in self._tenants.items() if tenant.is_idle]
            for _, url in sorted(idle, key=lambda pair: pair[0])[:excess]:
                tenant, _ = self._forget(url)
                evicted += [tenant] if tenant is not None else []
        return evicted

    def _place_of(self, url: str | URL) -> URL | None:
        tenant = self._tenants.get(url)
        return place_of(url) if tenant is None else tenant.place

    def _forget(self, url: str | URL) -> tuple[Tenant | None, Engine | None]:
        self._sessions.pop(url, None)
        place = self._place_of(url)
        for key in [key for key, where in self._prepared.items() if where == place]:
            del self._prepared[key]
        return self._tenants.pop(url, None), self._engines.pop(url, None)

    def _start_closing(
        self, refuse: Callable[[EngineRoom], None] = lambda room: None
    ) -> list[Tenant]:
        """Refuse new work, and forget everything."""
        with self._lock:
            tenants = [tenant for tenant in self._rooms if tenant.life.is_usable]
            for tenant in tenants:
                refuse(tenant)
                drain.refuse_inside(tenant)
            self._is_closed = True
            for kept in (self._engines, self._sessions, self._tenants, self._prepared):
                kept.clear()
        return tenants

    def _after_fork(self) -> None:
        """Begin afresh in a forked child; its engines, which parted from the parent's, stay."""
        self._lock = threading.RLock()
        self.forked = True


MANAGERS: weakref.WeakSet[SessionManager] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for manager in list(MANAGERS):
        manager._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def pauses() -> Iterator[float | None]:
    """Yield how long to wait before each repetition, in seconds; None once there is none left."""
    for retry in range(RETRIES):
        yield random.uniform(0, min(LONGEST_PAUSE, LONGEST_PAUSE / 100 * 2**retry))  # noqa: S311
    yield None
