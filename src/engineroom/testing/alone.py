"""A database for one sandbox alone: the engines connect to a clone until its end."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy.engine import URL, Engine, make_url

from .. import drain
from ..backends import MYSQL, Role
from ..engines import EngineRoom
from ..lending import Lender
from ..pool import LoopPool
from .clones import CARELESS, Template, clones


class Alone:
    """A clone for all, until the end."""

    def __init__(self, room: EngineRoom, engine: Engine, template: Template | None) -> None:
        self.has_begun: bool = False
        self._room = room
        self._url = engine.url
        self._template = template
        # Where the database itself is the template, nobody may be connected to it.
        self._needs_quiet = template is None and engine.dialect.name != "sqlite"
        self._stack = ExitStack()
        self._before: dict[Engine, tuple[Any, Any]] = {}  # pool, and the dialect's own `connect`
        self._database: str | None = None

    def begin(self) -> None:
        """Make the clone, from a thread."""
        if self._needs_quiet:
            self._end_pools()
        self._clone()

    async def abegin(self) -> None:
        """Make the clone, from an event loop."""
        if self._needs_quiet:
            await drain.end_pools(self._room)
        await asyncio.to_thread(self._clone)

    def _clone(self) -> None:
        template = self._template
        if template is None:
            url = self._url.set(drivername=self._url.get_backend_name())
            if self._needs_quiet:
                template = self._stack.enter_context(clones(url))
            else:
                template = kept_template(self._room, url)
        url_of_clone = template.clone()
        self._stack.callback(template.discard, url_of_clone)
        self._database = make_url(url_of_clone).database
        self.has_begun = True

    def end(self) -> None:
        """Close what is connected to the clone, and leave it to be dropped; from a thread."""
        try:
            self._end_pools()
        finally:
            self.restore()
            self._stack.close()

    async def aend(self) -> None:
        """Do the same from an event loop."""
        try:
            await drain.end_pools(self._room)
        finally:
            self.restore()
            await asyncio.to_thread(self._stack.close)

    def _end_pools(self) -> None:
        here = asyncio._get_running_loop()
        for side, role, loop, lender in list(self._room.lenders()):
            if loop is not None and loop is here:  # `with` in a coroutine: nothing can be awaited
                lender.reap(loop)
            else:
                drain.end_now(self._room, side, role, loop, lender)

    def take_in(self, engine: Engine, role: Role) -> None:
        """Have an engine connect to the clone from now on."""
        if engine in self._before:
            return
        dialect: Any = engine.dialect
        connect = dialect.connect
        self._before[engine] = (engine.pool, vars(dialect).get("connect"))
        there = engine.url.set(database=self._database)
        if dialect.name != "sqlite":  # what it is told beside is in its arguments already
            there = there.set(query={})
        (path, options) = dialect.create_connect_args(there)
        name = {key: options[key] for key in ("database", "dbname", "db") if key in options}

        def connect_there(*_: Any, **given: Any) -> Any:
            connection = connect(*path, **given | name)
            if dialect.name == "sqlite":
                if hasattr(connection, "run_async"):  # in one turn of aiosqlite's thread
                    connection.run_async(lambda driver: driver.executescript(CARELESS))
                else:
                    connection.executescript(CARELESS)
            return connection

        dialect.connect = connect_there
        if dialect.name in MYSQL:  # where a schema is a database, whose name the dialect keeps
            dialect.default_schema_name = self._database
        pool: Any = engine.pool
        engine.pool = pool.renew()

    def disown(self) -> None:
        """Go on in a forked child: the clone is the parent's to drop, and it serves both."""
        self._stack.pop_all()
        for engine, (pool, connect) in self._before.items():
            behind = pool.shelves.values() if isinstance(pool, LoopPool) else [pool]
            for lender in behind:
                if isinstance(lender, Lender):
                    lender.disown()
            self._before[engine] = pool.renew(), connect

    def restore(self) -> None:
        """Have the engines connect to their own database again."""
        for engine, (pool, connect) in self._before.items():
            dialect: Any = engine.dialect
            del dialect.connect
            if dialect.name in MYSQL:
                dialect.default_schema_name = engine.url.database
            if connect is not None:
                dialect.connect = connect
            engine.pool = pool.renew() if self._needs_quiet else pool  # that one has ended
        self._before.clear()


class Kept(NamedTuple):
    """A manager's own file as a template."""

    process: int
    url: URL
    template: Template
    close: Callable[[], object]


# To make a folder for each copy, and to remove it, would cost a test as much as the copy itself.
_kept: WeakKeyDictionary[EngineRoom, Kept] = WeakKeyDictionary()


def kept_template(room: EngineRoom, url: URL) -> Template:
    """Return the manager's own file as a template, which goes with the manager or the process."""
    process, kept = os.getpid(), _kept.get(room)
    if kept is not None and (kept.process, kept.url) == (process, url):
        return kept.template
    if kept is not None:
        kept.close()
    template = clones(url).__enter__()
    _kept[room] = Kept(process, url, template, weakref.finalize(room, template.close))
    return template
