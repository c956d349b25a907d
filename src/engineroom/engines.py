"""One engine per role and side, made at first use, in the room that watches and closes them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import MetaData, create_engine, event
from sqlalchemy.engine import URL, Connection, Engine, ExceptionContext
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn

from .backends import Backend, Role, Side, find_backend
from .cancellation import for_one_cancellation, settle, to_its_end
from .cap import CAPS, Cap, CapInfo, limit_process, note_closings, process_cap, release_process
from .connecting import watch_connects
from .credentials import Credentials
from .deadlines import WATCH
from .departures import DEPARTURES
from .errors import Holder, InvalidOption, SelfDeadlock
from .forks import let_threads_end, make_immortal, part_event_loops
from .ledger import (
    REQUEST,
    Entry,
    Ledger,
    ScopeInfo,
    current_owner,
    describe,
    describe_held,
    line_of,
    name_of,
    opener_of,
    permit_of,
)
from .lending import ROLLING_BACK, Lender
from .lifecycle import Life, State
from .models import Base
from .pool import LoopPool, Shelf, ThreadPool
from .retiring import retire
from .secrecy import Sealed, unseen
from .sessions import Guarded, guarded
from .settings import DatabaseSettings, Options, read_settings
from .slots import WAITING
from .statements import note_statements
from .unsendable import hide_what_cannot_be_sent
from .urls import masked

logger: logging.Logger = logging.getLogger("engineroom")

MEANING = {
    "idle_in_transaction_timeout": "it was idle in a transaction",
    "statement_timeout": "the statement ran",
    "lock_timeout": "it waited for a lock",
}
END_LIMIT = 3.0  # seconds to connect, for ending what runs on connections that nobody serves


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """One pool as it is right now."""

    side: str
    """`sync` or `async`."""
    role: str
    """`primary` or `reader`."""
    loop: str | None
    """The event loop whose connections these are; None on the sync side, which threads share."""
    size: int
    """The connections that it keeps: `pool_size`."""
    overflow: int
    """The connections that it may open beyond those: `max_overflow`."""
    lent: int
    """Connections in use, and those being opened."""
    idle: int
    """Connections that wait to be lent."""
    waiting: int
    """Callers that wait for a connection."""
    holders: tuple[Holder, ...]
    """Who has the connections in use."""
    url: str
    """Where they lead to, with its secrets masked."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What a manager holds right now."""

    state: str
    """`new`, `open`, `closing` or `closed`."""
    scopes: tuple[ScopeInfo, ...]
    """The open scopes, oldest first."""
    pools: tuple[PoolInfo, ...]
    """One per role on the sync side, one per role and event loop on the async side."""
    caps: tuple[CapInfo, ...] = ()
    """The limits over several pools: `DB_MAX_CONNECTIONS`, and that of a group."""


class EngineRoom:
    """What both front doors of one database share: its state, its ledger and its engines."""

    backend: Backend
    credentials: Credentials
    settings: DatabaseSettings
    metadata: MetaData = Base.metadata
    new_session: Callable[[Engine], Guarded]
    new_async_session: Callable[[AsyncEngine], AsyncSession]
    thread_pool: type[ThreadPool] = ThreadPool

    def __init__(self, name: str, cap: Cap | None = None) -> None:
        """Make it.

        Args:
            cap: A limit over this and other rooms, beside that of the process.
        """
        self.life: Life = Life(name)
        self.cap: Cap | None = cap
        self.ledger: Ledger = Ledger()
        self.loose: weakref.WeakSet[Session] = weakref.WeakSet()  # sessions that no scope ends
        self._engines: dict[tuple[Side, Role], Engine] = {}
        self.binds: dict[tuple[Side, Role, bool, str | None], Any] = {}
        self.derived: weakref.WeakSet[Engine] = weakref.WeakSet()  # by `execution_options()`
        # Pools that are no engine's any more: it was disposed of, or their event loop ended.
        self._parted: weakref.WeakKeyDictionary[Lender, tuple[Side, Role]] = (
            weakref.WeakKeyDictionary()
        )
        self.given: Sealed[tuple[str | URL | None, Options]] = Sealed((None, {}))  # at `open`
        self.sandbox: Any = None  # what a test has put around the engines: testing.sandbox
        ROOMS.add(self)

    # -- opening ------------------------------------------------------------------------------

    def open(self, database_url: str | URL | None, url: str | URL | None, options: Options) -> None:
        """Read the settings and find the backend; no connection is made.

        Without any argument, one that was closed is opened again with those that it had.

        Raises:
            AlreadyInitialized: it is open.
            ConfigurationError: a setting, an option or the URL cannot work.
        """
        if self.sandbox is not None:
            return  # the application that is tested opens and closes as it does elsewhere
        if not self.life.allows("init"):
            raise self.life.refusal("init()", masked(self.settings.url))
        if database_url is not None and url is not None:
            raise InvalidOption("The URL was given twice, as database_url= and as url=. Give one.")
        where = url if database_url is None else database_url
        if where is None and not options and self.life.state is State.CLOSED:
            where, options = self.given.reveal()
        self.given = Sealed((where, options))
        self.settings = read_settings(where, **options)
        self.backend = find_backend(self.settings.url, self.settings)
        self.credentials = Credentials(self.settings.username, self.settings.password)
        self.metadata = options.get("metadata", Base.metadata)
        self._engine_options = options.get("engine_options", {})
        async_session_class = options.get("async_session_class", AsyncSession)
        session_class: Any = options.get("session_class", async_session_class.sync_session_class)
        sessions: dict[str, Any] = {
            "expire_on_commit": self.settings.expire_on_commit,
            "autoflush": self.settings.autoflush,
        }
        self.new_session = partial(guarded(session_class), **sessions)
        self.new_async_session = partial(
            async_session_class,
            sync_session_class=guarded(session_class),
            **sessions,
        )
        if self.settings.max_connections is not None:
            limit_process(self, self.settings.max_connections)
        if self.settings.dump_signal:
            dump_on(signal.Signals[self.settings.dump_signal])
        self.life.enter(State.OPEN)

    def engine(self, side: Side, role: Role = Role.PRIMARY) -> Engine:
        """Return the engine of a side and role; it is made at first use.

        Raises:
            NotInitialized: before `init()`.
            ManagerClosed: while `close()` drains, or after it.
            DriverNotInstalled: the driver of that side is not there.
        """
        try:
            return self._engines[side, role]
        except KeyError:
            if not self.life.allows("use"):
                raise self.life.refusal("engine") from None
        # Two threads may both come here: one engine is kept, the other has no connection yet.
        engine = self._make_engine(side, role)
        if self.sandbox is not None:  # before anybody finds it, or what they do would stay
            self.sandbox.take_in(engine, role)
        return self._engines.setdefault((side, role), engine)

    def bind(
        self, side: Side, role: Role, read_only: bool = False, isolation_level: str | None = None
    ) -> Any:
        """Return what a session binds to: the engine, or it with options; the pool is the same.

        Raises:
            InvalidOption: the database has no such isolation level.
        """
        key = (side, role, read_only, isolation_level)
        bind = self.binds.get(key)
        if bind is None:
            engine = self.engine(side, role)
            options = self.backend.read_only_options() if read_only else {}
            if isolation_level is not None:
                mind_isolation_level(engine, isolation_level)
                options["isolation_level"] = isolation_level
            if options:
                engine = engine.execution_options(**options)
            bind = self.binds[key] = AsyncEngine(engine) if side is Side.ASYNC else engine
        return bind

    @unseen
    def _make_engine(self, side: Side, role: Role, *, apart: float | None = None) -> Engine:
        """Make an engine; one apart has a pool of one connection, and so long to open it."""
        settings = self.settings
        options: dict[str, Any] = {
            "echo": settings.shows_statements,
            "hide_parameters": not settings.shows_statements,
            "pool_recycle": settings.pool_recycle,
        }
        theirs = dict(self._engine_options)
        arguments = theirs.pop("connect_args", {})
        chosen = dict(theirs.pop("execution_options", None) or {})
        options |= theirs | self.backend.engine_options(side, role, arguments)
        url = self.backend.engine_url(side)
        knows: dict[str, Any] = {
            "backend": self.backend,
            "caps": staticmethod(self.caps),
            "cleans_always": settings.pool_clean_always,
            "name": f"{side} {role} of {masked(self.settings.url)}",
            "note_parted": staticmethod(partial(self._note_parted, side, role)),
            "parted": self._parted,
            "end_apart": staticmethod(partial(self.end_apart, role)),
            "recycle": settings.pool_recycle,
            "least": settings.pool_min if role is Role.PRIMARY and apart is None else 0,
            "spare": settings.max_overflow if apart is None else 0,
            "slow_after": settings.slow_after,
            "answer_within": settings.response_timeout if self.backend.has_server else 0.0,
            "statement_within": settings.statement_timeout,
            "ping_after": 0.0 if settings.pool_pre_ping else settings.pool_ping_after,
        }
        # What a pool must know and `recreate()` does not pass on stands on a class of its own.
        if side is Side.SYNC:
            self.credentials.refuse_coroutines()
        if side is Side.ASYNC:
            lender: type[Lender] = type("Shelf", (Shelf,), knows)
            shelves = type("LoopPool", (LoopPool,), {"shelf_class": lender})
            poolclass: Any = shelves if apart is None else lender
        else:
            lender = poolclass = type("ThreadPool", (self.thread_pool,), knows)
        engine = create(
            side,
            url,
            poolclass=poolclass,
            pool_size=settings.pool_size if apart is None else 1,
            max_overflow=-1,  # the permits are the limit
            pool_timeout=settings.pool_timeout if apart is None else apart,
            pool_use_lifo=True,  # the connection used last is the surest to live
            **options,
        )
        lender.engine = engine
        lender.is_at_rest = staticmethod(self.backend.tells_rest(engine.dialect.driver))
        self._note_derived(engine)
        return_what_fails(engine.dialect)
        dialect: Any = engine.dialect
        if role is Role.READER:  # what it is, they do not change
            for name in {*chosen} & {*dialect.connection_characteristics}:
                del chosen[name]
        engine.update_execution_options(**chosen)
        note_statements(engine.dialect)
        note_closings(engine.dialect)
        watch_connects(engine, side, self.backend, self.credentials)
        hide_what_cannot_be_sent(engine)
        self.backend.attach(engine, role, self._refuse_self_deadlock)
        if side is Side.ASYNC:
            dialect.do_terminate = for_one_cancellation(dialect.do_terminate)
            dialect.do_close = to_its_end(dialect.do_close, dialect.do_terminate)
            event.listen(engine, "handle_error", weakly(self._break_off_cancelled))
        event.listen(engine, "handle_error", weakly(self._explain_guard))
        event.listen(engine, "handle_error", pass_notes_on)
        return engine

    def _note_parted(self, side: Side, role: Role, lender: Lender) -> None:
        self._parted[lender] = side, role

    def _note_derived(self, engine: Any) -> None:
        """Remember the engines that are made of this one with options: a sandbox takes them in.

        Around its verb, for SQLAlchemy's event of that would make every statement slower.
        """
        derive, derived = engine.execution_options, self.derived

        def execution_options(**options: Any) -> Any:
            made = derive(**options)
            derived.add(made)
            self._note_derived(made)
            return made

        engine.execution_options = execution_options

    def _break_off_cancelled(self, context: ExceptionContext) -> None:
        """End on the server what a cancelled call began there; its connection is lost anyway."""
        connection, error = context.connection, context.original_exception
        if (
            isinstance(error, asyncio.CancelledError)
            and connection is not None
            and not connection.invalidated
        ):
            call = context.execution_context
            losing = self._lose(connection.connection, None if call is None else call.cursor)
            with suppress(asyncio.CancelledError, Exception):
                await_only(settle(losing))

    def _explain_guard(self, context: ExceptionContext) -> None:
        """Say in a note which guard of the server an error came from; and in the log, who held."""
        connection, error = context.connection, context.original_exception
        if connection is None or (permit := permit_of_open(connection)) is None:
            return
        since = permit.statement_since  # of a ROLLBACK, nothing is noted
        idle, ran = permit.marks.failed_after or (time.monotonic() - since if since else 0.0, 0.0)
        permit.mark().failed_after = None
        entry = permit.scope
        own = {} if entry is None else entry.guards or {}
        struck = self.backend.struck(error, own, idle, ran, context.is_disconnect)
        if struck is None:
            return
        name, seconds = struck
        whose = (
            f"{name}={seconds:g} of this session"
            if name in own
            else f"DB_{name.upper()}={seconds:g}"
        )
        note = f"The server ended this for a guard: {MEANING[name]} for {seconds:g} s ({whose})."
        shown = context.sqlalchemy_exception or error
        shown.add_note(note)
        if name == "idle_in_transaction_timeout":
            logger.warning(
                "The server ended a connection that was idle in a transaction for %.1f s (%s), "
                "held by %s. Do slow work outside of the scope, or raise the limit.",
                idle,
                whose,
                opener_of(permit) or name_of(permit.owner),
            )

    async def _lose(self, connection: PoolProxiedConnection, cursor: DBAPICursor | None) -> None:
        """Break off what a connection does, and part with it.

        SQLAlchemy would do the second half next, but where another cancellation interrupts it: the
        pool would be a connection short, and another error, without the note, would go on.
        """
        try:
            await self.backend.break_off(connection.driver_connection)
        finally:
            await greenlet_spawn(discard, connection, cursor)

    def _refuse_self_deadlock(self, connection: Connection) -> None:
        """Refuse to wait for a writer that waits for us."""
        owner, request, now = current_owner(), REQUEST.get(), time.monotonic()
        for _, _, _, lender in self.lenders():
            for permit in lender.slots.held:
                entry = permit.scope
                held = None if permit.connection is None else permit.connection()
                holder = permit.owner if entry is None else entry.holder
                if (
                    (holder == owner or (holder is request and request is not None))
                    and held is not None
                    and held is not connection.connection
                    and self.backend.holds_write_lock(held)
                    and not (entry is not None and entry.may_be_elsewhere())
                ):
                    raise SelfDeadlock(
                        f"{name_of(owner)} opens a second writer while its first holds the lock of "
                        f"the SQLite file, and would wait for itself. The first is "
                        f"{describe(permit, now)}. Use that one, end it before, or open the second "
                        "with session(read_only=True)."
                    )

    def caps(self) -> tuple[Cap, ...]:
        """Return the limits over several pools under which a connection is opened now."""
        return tuple(cap for cap in (self.cap, process_cap()) if cap is not None)

    # -- watching -----------------------------------------------------------------------------

    def lenders(self) -> Iterator[tuple[Side, Role, asyncio.AbstractEventLoop | None, Lender]]:
        """Yield every pool, with the event loop that its connections belong to.

        Of those that are no engine's any more, yield what has connections still.
        """
        told: set[Lender] = set()  # (`dispose()` may just be at work, and its engine have it yet)
        for known in self._parted.keyrefs():  # in one step: other threads add theirs meanwhile
            lender = known()
            place = None if lender is None else self._parted.get(lender)
            if lender is not None and place and (lender.slots.held or lender.idle):
                told.add(lender)
                yield *place, lender.home.loop if isinstance(lender, Shelf) else None, lender
        for (side, role), engine in list(self._engines.items()):
            pool = getattr(engine.pool, "behind", engine.pool)  # a sandbox stands in front of it
            if isinstance(pool, LoopPool):
                for loop, shelf in list(pool.shelves.items()):
                    if shelf not in told:
                        yield side, role, loop, shelf
            elif isinstance(pool, Lender) and pool not in told:
                yield side, role, None, pool

    def stats(self, at: float | None = None) -> Stats:
        """Take a snapshot of the ledger and the pools; several are compared at one time."""
        now = time.monotonic() if at is None else at
        return Stats(
            state=self.life.state.value,
            scopes=self.ledger.scopes(now),
            pools=tuple(
                PoolInfo(
                    side=side.value,
                    role=role.value,
                    loop=None if loop is None else repr(loop),
                    size=lender.slots.size,
                    overflow=lender.slots.overflow,
                    lent=len(lender.slots.held),
                    idle=lender.idle,
                    waiting=lender.slots.waiting,
                    holders=describe_held(lender.slots.permits, now),
                    url=masked(self.settings.url),
                )
                for side, role, loop, lender in self.lenders()
            ),
            caps=tuple(cap.info() for cap in self.caps()),
        )

    def report(self) -> str:
        """Write down who holds a connection and who waits for one: since when, from which line."""
        now = time.monotonic()
        lines = [f"{self.life.name} (engineroom) is {self.life.state.value}"]
        lines += [f"  {cap.info()}" for cap in self.caps()]
        for side, role, _, lender in self.lenders():
            slots = lender.slots
            lines.append(
                f"  {side} {role} pool: {len(slots.held)} of {slots.size} + {slots.overflow} lent, "
                f"{lender.idle} idle, {slots.waiting} waiting"
            )
            lines += [f"    held by {holder}" for holder in describe_held(slots.permits, now)]
            lines += [
                f"    {name_of(ticket.owner)} has waited for {now - ticket.since:.1f} s, at "
                f"{line_of(ticket.owner)}"
                for ticket in slots.waiters
            ]
        return "\n".join(lines)

    def retire_loose(self, why: str) -> None:
        """Have the sessions that no scope ends refuse use from now on."""
        for session in list(self.loose):
            retire(session, why)

    def end_apart(
        self,
        role: Role,
        connections: Sequence[PoolProxiedConnection],
        *,
        is_abandoned: bool = False,
    ) -> None:
        """End what runs on connections over another one, from any loop or thread.

        Whoever does so may be cancelled meanwhile: nobody else knows of them.

        Args:
            is_abandoned: Their loop has ended: nothing of theirs can be awaited.
        """
        side = Side.SYNC if asyncio._get_running_loop() is None else Side.ASYNC
        apart = partial(self.work_apart, side, role, seconds=END_LIMIT)
        end = partial(self.backend.end, connections, apart, is_abandoned=is_abandoned)

        async def settled() -> None:
            await settle(greenlet_spawn(end), None)

        if side is Side.SYNC:
            end()
        else:
            await_only(settled())

    def interrupt(self, entry: Entry) -> None:
        """Stop what a thread runs or waits for in a scope, from another thread."""
        if (ticket := WAITING.get(entry.request)) is not None:
            ticket.dismiss()
        connection = entry.held()
        permit = None if connection is None else permit_of(connection)
        if connection is not None and permit is not None and permit.running:
            permit.mark().is_interrupted = True
            with suppress(Exception):  # it was closed just now
                self.backend.interrupt(connection.driver_connection)

    def must_wait(self, side: Side, role: Role) -> bool:
        """Whether the pool that serves this thread or event loop has nothing to lend."""
        here = asyncio._get_running_loop() if side is Side.ASYNC else None
        pools = {(kind, use, loop): lender for kind, use, loop, lender in self.lenders()}
        pool = pools.get((side, role, here))
        return pool is not None and not pool.slots.may_lend

    def work_apart(
        self,
        side: Side,
        role: Role,
        work: Callable[[Connection], object],
        *,
        seconds: float | None = None,
    ) -> None:
        """Work on a connection of its own, which no other caller is lent.

        A limit over several pools holds for it as well.

        Args:
            seconds: To wait and connect; the setting `pool_timeout` without it.
        """
        limit = self.settings.pool_timeout if seconds is None else seconds
        engine = self._make_engine(side, role, apart=limit)
        pool: Any = engine.pool
        pool.ended = True  # what comes back is closed
        pool.seen.is_patient = False
        with engine.connect() as connection:
            work(connection)

    def clear(self) -> None:
        """Forget the engines, whose pools have been ended, and what the backend made."""
        self._engines.clear()
        self._parted.clear()
        self.binds.clear()
        self.backend.dispose()
        release_process(self)
        self.life.enter(State.CLOSED)

    def disown(self) -> None:
        """Start afresh in a forked child: what was inherited is the parent's, and dead here."""
        for entry in self.ledger:
            entry.retire(
                f"The {entry.kind} opened at {entry.where} belongs to the parent of this forked "
                "process. Open one of your own here."
            )
            make_immortal(entry)
            if entry.is_open:  # where it is left, nothing is done here: it may be entered again
                make_immortal(entry._resource)
                entry._resource = None
        for session in list(self.loose):
            retire(session, "The session belongs to the parent of this forked process.")
            make_immortal(session)
        self.ledger.clear()
        if self.life.state is State.CLOSING:  # that is another thread of the parent's
            self.life.enter(State.OPEN)
        with ExitStack() as then:
            for engine in self._engines.values():
                pool: Any = engine.pool
                pool.is_disposed = True
                then.callback(engine.dispose, close=False)
            if self.sandbox is not None:
                then.callback(self.sandbox.disown)
            then.callback(self._parted.clear)
            for _, _, _, lender in self.lenders():
                then.callback(lender.disown)


ROOMS: weakref.WeakSet[EngineRoom] = weakref.WeakSet()


def pass_notes_on(context: ExceptionContext) -> None:
    """Have the error that is caught say what was noted on the driver's, behind it."""
    raised = context.sqlalchemy_exception
    if raised is not None:
        known = getattr(raised, "__notes__", ())
        for note in getattr(context.original_exception, "__notes__", ()):
            if note not in known:
                raised.add_note(note)


def _before_fork() -> None:
    if ROOMS:
        WATCH.pause()
        let_threads_end()


def _after_fork_in_child() -> None:
    rooms = list(ROOMS)
    WAITING.clear()
    ROLLING_BACK.clear()
    WATCH.disown()
    if loops := {loop for room in rooms for _, _, loop, _ in room.lenders() if loop is not None}:
        part_event_loops(loops)
    DEPARTURES.disown()
    with ExitStack() as each:  # comes to its turn, whatever another raises
        for room in reversed(rooms):
            each.callback(room.disown)
        for cap in CAPS:
            each.callback(cap.disown)


def dump_on(number: signal.Signals) -> None:
    """Have a signal print the report of every manager, to the standard error stream."""
    if signal.getsignal(number) is _dump:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, _dump)
    else:
        logger.warning("DB_DUMP_SIGNAL has no effect: init() was not called in the main thread")


def _dump(number: int, frame: object) -> None:
    # What this raised would strike the application in any of its lines. The stream may be closed,
    # or None, or without a reader, or in the middle of another write.
    with suppress(Exception):
        for room in list(ROOMS):
            sys.stderr.write(f"{room.report()}\n")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=WATCH.resume,
        after_in_child=_after_fork_in_child,
    )


def return_what_fails(dialect: Any) -> None:
    """Have an engine's options take no connection away that they cannot be set on.

    SQLAlchemy sets them in the middle of `connect()`: what is raised there, as by a cancellation,
    would leave the connection to the garbage collector. And it sets those of an engine after those
    of the one that was derived from it, which were to come instead.
    """

    def set_engine_execution_options(engine: Engine, options: Mapping[str, Any]) -> None:
        names = {*dialect.connection_characteristics} & {*options}
        chosen = {name: options[name] for name in names}

        def set_on(connection: Connection) -> None:
            wanted = connection.get_execution_options()
            mine = {name: one for name, one in chosen.items() if wanted.get(name, one) is one}
            try:
                dialect.set_connection_execution_options(connection, mine)
            except BaseException as error:
                if not isinstance(error, Exception):
                    connection.invalidate()
                connection.close()
                raise

        if chosen:
            event.listen(engine, "engine_connect", set_on)

    dialect.set_engine_execution_options = set_engine_execution_options


def mind_isolation_level(engine: Engine, name: str) -> None:
    """Refuse an isolation level that the database does not have, before a connection is taken.

    Raises:
        InvalidOption: it has others.
    """
    known = engine.dialect.get_isolation_level_values(None)  # type: ignore[arg-type]  # ours ask none
    if str(name).replace("_", " ") not in known:
        raise InvalidOption(
            f"isolation_level={name!r} cannot be used: {engine.dialect.name} has "
            f"{', '.join(sorted(known))}. Write one of these."
        )


def weakly(method: Callable[[ExceptionContext], None]) -> Callable[[ExceptionContext], None]:
    """Listen with a method, and do not keep its object.

    It is the dialect that has such listeners, and mappers remember dialects.
    """
    reference = weakref.WeakMethod(method)

    def listener(context: ExceptionContext) -> None:
        if (known := reference()) is not None:
            known(context)

    return listener


def permit_of_open(connection: Connection) -> Any:
    """Return the permit of a connection of SQLAlchemy, if it has one of the pool's."""
    return None if connection.closed or connection.invalidated else permit_of(connection.connection)


def discard(connection: PoolProxiedConnection, cursor: DBAPICursor | None) -> None:
    """Close a connection, and first the cursor of its last call: psycopg warns of one left open."""
    try:
        if cursor is not None:
            with suppress(Exception):
                cursor.close()
    finally:
        connection.invalidate()


def create(side: Side, url: URL, **options: Any) -> Engine:
    """Create the engine of a side; an asynchronous one is known here by its synchronous core."""
    if side is Side.ASYNC:
        return create_async_engine(url, **options).sync_engine
    return create_engine(url, **options)
