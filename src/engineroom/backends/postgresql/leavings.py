"""What a session leaves on its connection: how that is noticed, and how it is cleaned off.

Each driver's own verbs are watched, for whatever a session, an event or raw use of the driver sends
passes there. A text is read once; from then on it costs one look into a dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from inspect import iscoroutinefunction
from typing import Any

from sqlalchemy.util import await_only

from .. import Leaving, Sent

KEPT = 5000  # texts; some have their values in them, and are never seen again
LONGEST = 20_000  # characters of a text that is kept

# Where a statement begins: at a text's begin, after a comment, or in the body of a block.
START = r"(?:^|;|\*/|\$|--[^\n]*\n|\b(?:begin|then|else|loop|atomic)\b)\s*"
GAP = r"(?:\s|--[^\n]*\n|/\*.*?\*/)+"
FLAGS = re.IGNORECASE | re.VERBOSE | re.DOTALL
STATE = re.compile(
    rf"""
    {START} (?:set (?!{GAP}(?:local|transaction|constraints)\b) | reset | listen | unlisten | do
        | call | discard | deallocate | prepare (?!{GAP}transaction\b) | execute) \b
    | \bset_config \s* \( (?! (?:[^()]|\([^()]*\))* , \s* true \s* \))
    | \bpg_(?:try_)?advisory_lock | \bwith {GAP} hold \b
    | ^(?!\s*insert\b) .* \b(?:nextval|setval) \s* \(
    """,
    FLAGS,
)
# What drivers have prepared refers to relations by number, and outlives them.
RELATIONS = re.compile(
    rf"""
    \bcreate {GAP} (?:or {GAP} replace {GAP})? (?:(?:local|global) {GAP})? temp(?:orary)? \b
    | \binto {GAP} (?:(?:local|global) {GAP})? temp(?:orary)? \b
    | \bpg_temp\b | {START} load \b
    """,
    FLAGS,
)
CALLED = re.compile(r"^\s*select\s+(?!pg_catalog\.)[\w.\"]+\s*\([^;]*\)\s*;?\s*$", FLAGS)


def read(text: str) -> Leaving:
    """Read what a text may leave; what it may, it counts as having left."""
    if RELATIONS.search(text):
        return Leaving.RELATIONS
    if STATE.search(text):
        return Leaving.STATE
    return Leaving.CALLED if CALLED.match(text) else Leaving.NOTHING


class Readings(dict[Any, Leaving]):
    """What each text leaves that was sent once."""

    def __missing__(self, query: Any) -> Leaving:
        """Read a text."""
        leaving = read(query)
        if len(query) <= LONGEST:
            if len(self) >= KEPT:
                self.clear()
            self[query] = leaving
        return leaving


READINGS = Readings()

# -- watching -----------------------------------------------------------------------------------

PSYCOPG_VERBS = ("execute", "executemany", "stream")
PSYCOPG2_VERBS = ("execute", "executemany")
ASYNCPG_VERBS = ("executemany", "fetch", "fetchval", "fetchrow", "fetchmany", "cursor")


def watching(driver: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which a driver's connections tell what passes them.

    Args:
        arguments: The user's, whose classes are the bases of ours.
    """
    if driver == "asyncpg":
        from asyncpg import Connection

        base = arguments.get("connection_class", Connection)
        return {"connection_class": watching_connection(base)}
    if driver == "psycopg2":
        from psycopg2 import extensions

        connection = arguments.get("connection_factory") or extensions.connection
        cursor = arguments.get("cursor_factory") or extensions.cursor
        return {
            "connection_factory": noted(connection),
            "cursor_factory": watching_cursor(cursor, PSYCOPG2_VERBS),
        }
    return {}


def watch(driver: Any, note: Callable[[Leaving, Sent], None]) -> None:
    """Have a connection, opened with those arguments, tell what passes it.

    One that a function of the user's has opened in another way has no room for that: it is cleaned
    where each is.
    """
    with suppress(AttributeError):
        driver.note = note
    if hasattr(driver, "server_cursor_factory"):  # psycopg
        driver.cursor_factory = watching_cursor(driver.cursor_factory, PSYCOPG_VERBS)
        driver.server_cursor_factory = watching_cursor(driver.server_cursor_factory, ("execute",))


@cache
def noted(base: Any) -> Any:
    """Make a class whose objects have room for whom to tell."""
    return type(base.__name__, (base,), {"note": None})


@cache
def watching_cursor(base: Any, verbs: tuple[str, ...]) -> Any:
    """Make a class of cursors that tell what passes them, of psycopg or psycopg2."""

    def watched(verb: str) -> Callable[..., Any]:
        send = getattr(base, verb)

        def tell(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
            text = query if query.__class__ is str else text_of(query, self)
            if READINGS[text]:
                tell_of(self.connection, READINGS[text], (verb, (query, *arguments)))
            return send(self, query, *arguments, **options)

        return tell

    verbs_of_it: dict[str, Any] = {"__slots__": (), **{verb: watched(verb) for verb in verbs}}
    if hasattr(base, "callproc"):  # psycopg2

        def callproc(self: Any, name: Any, *arguments: Any) -> Any:
            tell_of(self.connection, Leaving.STATE, ("callproc", (name, *arguments)))
            return base.callproc(self, name, *arguments)

        verbs_of_it["callproc"] = callproc
    return type(base.__name__, (base,), verbs_of_it)


def text_of(query: Any, cursor: Any) -> str:
    """Return the text of a query that is bytes, or composed by the driver's `sql` module."""
    if hasattr(query, "as_string"):
        return str(query.as_string(cursor))
    return query.decode(errors="replace") if isinstance(query, bytes) else str(query)


def tell_of(driver: Any, leaving: Leaving, sent: Sent) -> None:
    """Tell the pool, if it lends this connection."""
    if driver.note is not None:
        driver.note(leaving, sent)


@cache
def watching_connection(base: Any) -> Any:
    """Make a class of asyncpg's connections that tell what passes them."""

    def watched(verb: str) -> Callable[..., Any]:
        send = getattr(base, verb)

        def tell(self: Any, query: str, *arguments: Any, **options: Any) -> Any:
            if READINGS[query]:
                tell_of(self, READINGS[query], (verb, (query, *arguments)))
            return send(self, query, *arguments, **options)

        return tell

    def execute(self: Any, query: str, *arguments: Any, **options: Any) -> Any:
        if READINGS[query]:  # (not by way of `watched`: each BEGIN and COMMIT comes here)
            tell_of(self, READINGS[query], ("execute", (query, *arguments)))
        if self.with_begin:
            if query.startswith("BEGIN"):
                query = f"{query} {self.with_begin}"
            self.with_begin = ""
        return base.execute(self, query, *arguments, **options)

    async def prepare(self: Any, query: str, **options: Any) -> Any:
        statement = await base.prepare(self, query, **options)
        return WatchedStatement(statement, self, query) if READINGS[query] else statement

    async def add_listener(self: Any, channel: str, callback: Any) -> None:
        # It would be called in other sessions, too, and no LISTEN be sent for theirs.
        tell_of(self, Leaving.RELATIONS, ("add_listener", (channel, callback)))
        await base.add_listener(self, channel, callback)

    verbs = {verb: watched(verb) for verb in ASYNCPG_VERBS if hasattr(base, verb)}
    own = {
        "note": None,
        "with_begin": "",
        "execute": execute,
        "prepare": prepare,
        "add_listener": add_listener,
    }
    return type(base.__name__, (base,), verbs | own)


class WatchedStatement:
    """A statement that asyncpg has prepared, and that tells each time when it is used."""

    def __init__(self, statement: Any, driver: Any, query: str) -> None:
        self._statement = statement
        self._driver = driver
        self._query = query

    def fetch(self, *arguments: Any, **options: Any) -> Any:
        """Run it: the verb by which SQLAlchemy does."""
        tell_of(self._driver, READINGS[self._query], ("fetch", (self._query, *arguments)))
        return self._statement.fetch(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        tell_of(self._driver, READINGS[self._query], ("execute", (self._query,)))
        return getattr(self._statement, name)


# -- cleaning -----------------------------------------------------------------------------------

# In one message, outside of a transaction. `DISCARD ALL` would take from the drivers what they have
# prepared, and cannot be sent together with anything.
CLEAN = """
CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; UNLISTEN *;
SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES;
DO LANGUAGE plpgsql $$
DECLARE prepared text;
BEGIN
    FOR prepared IN SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql LOOP
        EXECUTE pg_catalog.format('DEALLOCATE %I', prepared);
    END LOOP;
END $$
"""


def clean(driver: Any, hooks: Iterable[Sent]) -> None:
    """Clean a connection that is in no transaction; send again what its connect hooks had sent."""
    if hasattr(driver, "get_server_pid"):  # asyncpg
        await_only(clean_asyncpg(driver, hooks))
    elif iscoroutinefunction(driver.rollback):  # psycopg
        await_only(clean_on_loop(driver, hooks))
    else:
        clean_by_cursor(driver, hooks)


async def clean_asyncpg(driver: Any, hooks: Iterable[Sent]) -> None:
    """Clean a connection of asyncpg."""
    await driver.execute(CLEAN)
    for verb, arguments in hooks:
        await getattr(driver, verb)(*arguments)


def clean_by_cursor(driver: Any, hooks: Iterable[Sent]) -> None:
    """Clean a synchronous connection."""
    before, driver.autocommit = driver.autocommit, True
    with driver.cursor() as cursor:
        cursor.execute(CLEAN)
        for verb, arguments in hooks:
            getattr(cursor, verb)(*arguments)
    driver.autocommit = before


async def clean_on_loop(driver: Any, hooks: Iterable[Sent]) -> None:
    """Clean a connection of psycopg's asynchronous side."""
    before = driver.autocommit
    await driver.set_autocommit(True)
    async with driver.cursor() as cursor:
        await cursor.execute(CLEAN)
        for verb, arguments in hooks:
            await getattr(cursor, verb)(*arguments)
    await driver.set_autocommit(before)
