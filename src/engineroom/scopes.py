"""Scopes: one `session()`, `reader()` or `connect()` from enter to exit, and who commits there."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from traceback import walk_stack
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, TypeVar

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import greenlet_spawn

from .backends import Role, Side
from .cancellation import settle
from .engines import EngineRoom
from .errors import (
    NotEntered,
    SessionClosed,
    SessionInUse,
    SyncInAsync,
    SyncInAsyncWarning,
    WrongWith,
)
from .hooks import Hooks
from .ledger import (
    OPENER,
    REQUEST,
    Entry,
    Request,
    applications_line,
    frames_of_threads,
    has,
    is_inside,
    is_known_to_a_thread,
    permit_of,
    place,
)
from .lending import forfeit
from .retiring import ENDED, retire
from .secrecy import hide_values
from .sessions import Guarded, in_use, recall, used_by_another_thread
from .settings import Guards, read_guards

logger: logging.Logger = logging.getLogger("engineroom")

R = TypeVar("R")  # what a scope gives: a session or a connection


class Scope(Entry):
    """What both twins' scopes are: an entry in the ledger that owns a session or a connection.

    A class and not a generator: an event loop that shuts down closes all its generators at once, in
    any order.
    """

    side: ClassVar[Side]
    keyword: ClassVar[str]  # what it is entered with

    hooks: Hooks | None = None  # what is called after its end
    is_rollback_only: bool = False

    def __init__(
        self,
        room: EngineRoom,
        kind: str,
        role: Role = Role.PRIMARY,
        read_only: bool = False,
        isolation_level: str | None = None,
        *,
        guards: Guards | None = None,
    ) -> None:
        caller = sys._getframe(2)  # whoever called the verb that makes this scope
        self.kind: str = kind
        self.code: CodeType = caller.f_code
        self.line: int = caller.f_lineno
        self._room = room
        self._target = (self.side, role, read_only, isolation_level)
        if guards:
            self.guards: dict[str, float] | None = read_guards(guards)

    def stand_at(self, function: Any) -> None:
        """Take the first line of this function for the caller's: a framework calls for it."""
        code = None if hasattr(function, "__wrapped__") else getattr(function, "__code__", None)
        if code is None:  # (a plain function, as most are, is spared the search at each request)
            function = inspect.unwrap(function)
            while isinstance(function, partial):
                function = inspect.unwrap(function.func)
            code = getattr(function, "__code__", None)
        if code is None:  # an object that is called
            code = getattr(type(function).__call__, "__code__", None)
        # A class that is an endpoint shows no line: the one that asks is in it.
        self.code, self.line = applications_line() if code is None else (code, code.co_firstlineno)

    def retire(self, why: str) -> None:
        """End the scope from outside: from now on, using its session raises."""
        self.is_rollback_only = True
        self.obituary: str = why
        opened = self._resource
        if isinstance(opened, AsyncSession):
            retire(opened.sync_session, why)
        elif isinstance(opened, AsyncConnection):
            retire(opened.sync_connection, why)
        elif opened is not None:
            retire(opened, why)

    def begin_afresh(self) -> None:
        """Be entered again, after it was ended from outside."""
        super().begin_afresh()
        self.is_rollback_only = False

    def guard(self, connection: Connection) -> None:
        """Set the server's deadlines for the transaction that has begun."""
        guards = self.guards or {}
        if (permit := permit_of(connection.connection)) is not None:
            permit.mark().statement_within = guards.get("statement_timeout")
        self._room.backend.guard(connection, guards)

    @property
    def stands_alone(self) -> bool:
        """Whether each of its statements does, outside of a transaction."""
        _, role, _, isolation_level = self._target
        return role is Role.READER or isolation_level == "AUTOCOMMIT"

    def _bind(self) -> Any:
        """Return what the session or connection binds to, if the manager is open."""
        room = self._room
        if not room.life.is_usable:
            raise room.life.refusal(f"{self.kind}()")
        return room.binds.get(self._target) or room.bind(*self._target)

    def _must_fail(self, error: BaseException | None) -> bool:
        """Whether it is to be rolled back; or was, where the error came from its own end."""
        if error is None:
            return self.is_rollback_only
        if self.hooks is not None:
            self.hooks.doubt(error)
        return True

    def _hide_values(self) -> None:
        """Empty the frames that have the values of a statement, unless echo is on.

        Those of a cancellation or Ctrl-C as well, which struck while it ran.
        """
        error = sys.exception()
        if error is not None and not self._room.settings.shows_statements:
            hide_values(error)

    def _take_hooks(self) -> Any:
        """Take what is called after its end: entered again, it begins afresh."""
        hooks, self.hooks, self.is_rollback_only = self.hooks, None, False
        return hooks

    def _leave(self) -> None:
        """Forget the scope."""
        self._room.ledger.leave(self)
        self._resource = None

    def __getattr__(self, name: str) -> NoReturn:
        raise NotEntered(
            f"{self.kind}() was not entered, so there is no {name!r} yet. Enter it first: "
            f"{self.keyword} ….{self.kind}() as db: … db.{name} …"
        )

    def _wrong_with(self) -> WrongWith:
        other = "with" if self.keyword == "async with" else "async with"
        return WrongWith(
            f"{self.kind}() of the {self.side.value} side was entered with {other!r}. Write "
            f"{self.keyword!r}, or take {self.kind}() of the other side."
        )


class SyncScope(Scope, Generic[R]):
    """A scope of the synchronous side: `with`."""

    side = Side.SYNC
    keyword = "with"

    def _open(self, engine: Engine) -> R:
        raise NotImplementedError

    def __enter__(self) -> R:
        """Open what the scope gives."""
        # Before the question whether the manager is open: it may just be closing, and waits for
        # all who stand there.
        loop = self._room.ledger.enter(self)
        try:
            if loop is not None:
                self.mind_the_loop()
            if self.request is not None and self.request.is_abandoned:
                raise SessionClosed(
                    f"{self.kind}() was called for {self.request}, whose client has gone: what a "
                    "thread does for it ends here. There is nothing to do about it."
                )
            self._resource = opened = self._open(self._bind())
        except BaseException:
            self._leave()
            raise
        return opened

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit, or roll back on any exception; then close for good."""
        if self.is_open:
            self.is_open: bool = False  # at once: nobody else ends it now
            failed = True
            overlap: SessionInUse | None = None
            try:
                if self.thread != threading.get_ident():
                    overlap = self._cut_off_thread()
                failed = self._must_fail(error)
                finish(self._resource, self, failed)
            except BaseException as struck:
                failed = self._must_fail(struck)
                if (held := self.held()) is not None:
                    forfeit(held)  # a signal's exception, at the end or in the middle of it
                retire(self._resource, ENDED)
                raise
            finally:
                self._leave()
                if failed:
                    self._hide_values()
                obituary = self.obituary  # a hook may enter the scope again
                if self.hooks is not None:
                    self._take_hooks().run(failed)
            if failed and obituary and error is None:  # it must not pass for a success
                raise overlap or SessionClosed(obituary)

    def _cut_off_thread(self) -> SessionInUse | None:
        """Have another thread that is in the middle of a call leave it; it cannot go on."""
        session = self._resource
        if not is_inside(self.thread, session):
            return None
        overlap = used_by_another_thread(self)
        self.retire(str(overlap))
        while is_inside(self.thread, session):
            self._room.interrupt(self)
            time.sleep(0.01)
        return overlap

    def is_in_use(self) -> bool:
        """Whether a thread is in the function that opened it, or in the middle of a call on it."""
        return is_known_to_a_thread(self._resource, self.code)  # (no variable of this method)

    def abandon(self) -> None:
        """Roll back what was retired, and what nobody is left to end."""
        gone = SessionClosed(self.obituary)
        self.__exit__(SessionClosed, gone, None)

    def may_be_elsewhere(self) -> bool:
        """Whether its thread has left the function that opened it, and may serve another by now."""
        if self.task is not None:
            return False
        running = frames_of_threads().get(self.thread)
        stack = walk_stack(running) if running else ()
        entered = [frame for frame, _ in stack if frame.f_code is self.code]
        if any(has(frame, self._resource) for frame in entered):
            return False
        # Of several that the same line opened in the thread, the newest are those that it is in.
        newer = sum(
            (entry.thread, entry.code, entry.line) == (self.thread, self.code, self.line)
            and entry.since > self.since
            for entry in self._room.ledger
        )
        return len(entered) <= newer

    def mind_the_loop(self) -> None:
        """Say that it is about to stop the event loop it is opened in."""
        mind_the_loop(self._room, self.kind, self.code, self.line)

    if not TYPE_CHECKING:  # a type checker finds this mistake by itself

        async def __aenter__(self) -> NoReturn:
            raise self._wrong_with()

        async def __aexit__(self, *args: object) -> None: ...


class AsyncScope(Scope, Generic[R]):
    """A scope of the asynchronous side: `async with`."""

    side = Side.ASYNC
    has_greenlets = True
    keyword = "async with"

    async def _open(self, engine: AsyncEngine) -> R:
        raise NotImplementedError

    async def __aenter__(self) -> R:
        """Open what the scope gives."""
        self._room.ledger.enter(self)
        try:
            self._resource = opened = await self._open(self._bind())
        except BaseException:
            self._leave()
            raise
        return opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit, or roll back on any exception, cancellation included; then close for good.

        A call that another task has not finished is cut off before.
        """
        if self.is_open:
            self.is_open: bool = False  # at once: nobody else ends it now
            task = self.task_inside()
            is_used = task is not None or (self.streams and self._held_at_work() is not None)
            overlap = in_use(self, task) if is_used else None
            failed = self._must_fail(error or overlap)
            try:
                await (self._finish_over(task) if is_used else self._finish(failed))
            except BaseException as struck:
                failed = self._must_fail(struck)
                raise
            finally:
                self._leave()
                if failed:
                    self._hide_values()
                obituary = self.obituary  # as above
                if self.hooks is not None:
                    await self._take_hooks().run_async(failed)
            if failed and error is None and (overlap or obituary):  # as above
                raise overlap or SessionClosed(obituary)

    def task_inside(self) -> asyncio.Task[Any] | None:
        """Return the task whose call on what it gave has not returned yet."""
        return None

    def _finish(self, failed: bool) -> Coroutine[Any, Any, None]:
        finishing = self._resource.run_sync(finish, self, failed)
        return settle_quietly(finishing) if failed else finishing

    async def _finish_over(self, task: asyncio.Task[Any] | None) -> None:
        """Cancel the task that is inside, wait for the end of its call, and roll back.

        Where it is not known, what it runs is ended on the server.
        """
        try:
            if task is not None:
                task.cancel("its session came to the end of its scope")
                await settle(self._left())
            elif (held := self._held_at_work()) is not None:
                permit_of(held).mark().is_interrupted = True  # nobody else gets it
                await settle_quietly(greenlet_spawn(self._room.end_apart, self._target[1], [held]))
        finally:
            await self._finish(failed=True)

    def _held_at_work(self) -> PoolProxiedConnection | None:
        """Return its connection, if another task runs a statement or fetches rows there."""
        held = self.held()
        permit = None if held is None else permit_of(held)
        return held if permit is not None and permit.running else None

    async def _left(self) -> None:
        """Wait until no task is inside."""
        while self.task_inside() is not None:  # noqa: ASYNC110  # nothing announces it
            await asyncio.sleep(0.001)

    if not TYPE_CHECKING:

        def __enter__(self) -> NoReturn:
            raise self._wrong_with()

        def __exit__(self, *args: object) -> None: ...


class SessionScope(SyncScope[Session]):
    """A session and its transaction. Nothing is sent before its first statement."""

    def _open(self, engine: Engine) -> Session:
        session = self._room.new_session(engine)
        session._scope = self
        return session


class LooseScope(SessionScope):
    """Stands for a session that its caller ends: whose it is, and which line asked for it."""

    def open(self) -> Session:
        """Open the session; the ledger does not know it."""
        engine = self._bind()
        if asyncio._get_running_loop() is not None:
            self.mind_the_loop()
        session = self._open(engine)
        self.request: Request | None = REQUEST.get()
        self.move_here()
        self._room.loose.add(session)
        return session

    def hold(self, connection: PoolProxiedConnection) -> None:
        """Leave the connection its thread's, for nobody is inside of this scope; but say whose."""
        self.connection: weakref.ref[Any] | None = weakref.ref(connection)
        connection.info[OPENER] = weakref.ref(self)


class AsyncSessionScope(AsyncScope[AsyncSession]):
    """A session and its transaction. Nothing is sent before its first statement."""

    def open(self) -> AsyncSession:
        """Open the session, for which nothing has to be awaited."""
        self._room.ledger.enter(self)
        try:
            bind = self._bind()
            self._resource = session = self._room.new_async_session(bind)
            session.sync_session._scope = self  # type: ignore[attr-defined]  # Guarded
        except BaseException:
            self._leave()
            raise
        return session

    async def __aenter__(self) -> AsyncSession:
        """Open the session; where others are open, the tasks that are ready go on first.

        They mostly do the same, and find it in the processor's caches where one does it right after
        another.
        """
        session = self.open()
        if len(self._room.ledger) > 1:
            try:
                await asyncio.sleep(0)
            except BaseException:  # nobody has it yet: it has no connection, and nothing to await
                session.sync_session.close()
                self._leave()
                raise
        return session

    def task_inside(self) -> asyncio.Task[Any] | None:
        """Return the task whose call on the session has not returned yet."""
        session: Any = self._resource.sync_session
        task: asyncio.Task[Any] | None = session._call_in_flight()
        return task


def triple(
    error: BaseException | None,
) -> tuple[type[BaseException] | None, BaseException | None, TracebackType | None]:
    """Return what an exit is called with."""
    return (None, None, None) if error is None else (type(error), error, error.__traceback__)


class ConnectScope(SyncScope[Connection]):
    """A connection in a transaction, without the ORM."""

    begins: ClassVar[bool] = True

    def _open(self, engine: Engine) -> Connection:
        return begin(engine.connect(), self)


class AsyncConnectScope(AsyncScope[AsyncConnection]):
    """A connection in a transaction, without the ORM."""

    begins: ClassVar[bool] = True
    streams = True

    async def _open(self, engine: AsyncEngine) -> AsyncConnection:
        connection = await engine.connect()
        await connection.run_sync(begin, self)
        return connection


def begin(connection: Connection, scope: ConnectScope | AsyncConnectScope) -> Connection:
    """Begin on a new connection, and tell the scope which one it is."""
    try:
        if scope.begins:
            connection.begin()
        scope.hold(connection.connection)
    except BaseException:
        connection.close()
        raise
    return connection


def finish(resource: Guarded | Connection, scope: Scope, failed: bool) -> None:
    """Commit, or roll back, and close: the end of every scope, in one call for both twins.

    A session that its user closed is not in a transaction any more: nothing is left to do.
    """
    session = resource if isinstance(resource, Guarded) else None
    ending: Any = resource
    store = ending.commit
    if session is not None:
        session._ending = True
        ending = super(Guarded, session)  # nobody else is in it: its guards are not asked
        # Of a reader's COMMIT nobody wants to hear, unless a hook is to be called.
        only_reads = scope._target[1] is Role.READER and scope.hooks is None
        store = ending.flush if only_reads else ending.commit  # refused, if there is anything
    try:
        if resource.in_transaction():
            if failed:
                roll_back(resource)
            else:
                try:
                    store()
                except BaseException:
                    failed = True
                    roll_back(resource)  # SQLite is still in its transaction, and locks the file
                    raise
    finally:
        try:
            ending.close()
        except Exception as error:
            if not failed:
                raise
            logger.debug("A failed scope could not be closed: %r", error)
            with suppress(ResourceClosedError):  # SQLAlchemy may have closed it all the same
                resource.invalidate()
        finally:
            if session is not None:
                retire(session, ENDED)
            if (held := scope.held()) is not None:
                forfeit(held)
            if session is not None and session._last_seen is not None:
                recall(session)


async def settle_quietly(finishing: Coroutine[Any, Any, None]) -> None:
    """Settle the end of a failed scope: a server that is silent must not have the last word."""
    try:
        await settle(finishing)
    except TimeoutError as error:
        logger.warning("The end of a failed scope was not waited for: %s", error)


def roll_back(resource: Guarded | Connection) -> None:
    """Roll back, whatever happens: the body's exception is on its way, and says more."""
    try:
        resource.rollback()
    except Exception as error:  # noqa: BLE001
        logger.debug("The rollback of a failed scope failed as well: %r", error)


_warned: set[tuple[str, int]] = set()


def mind_the_loop(
    room: EngineRoom,
    kind: str,
    code: CodeType,
    line: int,
    cure: str = "Use the asynchronous side, or move it to a thread: await asyncio.to_thread(…)",
) -> None:
    """Say that a synchronous session is about to stop the event loop it is opened or used in.

    Args:
        code: Where that is.
        cure: What to do instead.

    Raises:
        SyncInAsync: if the setting `sync_in_async` says so; by default it warns, once per line.
    """
    if not room.life.is_usable or room.settings.sync_in_async == "allow":
        return
    message = (
        f"The synchronous {kind}() at {place(code, line)} runs inside an event loop, and stops "
        f"every other task until each of its statements has returned. {cure}."
    )
    if room.settings.sync_in_async == "error":
        raise SyncInAsync(f"{message} (DB_SYNC_IN_ASYNC=warn or allow would let it pass.)")
    where = (code.co_filename, line)
    if where not in _warned:
        _warned.add(where)
        warnings.warn_explicit(message, SyncInAsyncWarning, *where)
