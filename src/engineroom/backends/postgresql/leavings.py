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

# Names that few texts have that leave nothing, wherever they stand: some functions run what is in a
# literal. What the first leave, only a new connection is free of.
LASTING = (
    "logical_replication_slot",
    "physical_replication_slot",
    "origin_session",
    "backup_start",
    "start_backup",
    "dblink_connect",
)
SETTING = ("advisory_lock", "advisory_unlock", "setseed", "set_limit", 'u&"')
DRAWING = ("nextval", "setval")  # an INSERT may
TELLING = (*LASTING, *SETTING, *DRAWING, "set_config", "pg_settings", "temp", ";")
IN_TEMPORARY = re.compile(r"pg_temp(?!_)")  # (who asks for all schemas writes pg_temp_)
# What begins like this, is one statement and has none of those leaves nothing: most texts are read
# so, and those with values in them are long, and read each time.
PLAIN = re.compile(r"\s*+(?:select|insert|update|delete|with|begin|commit|rollback)\b")

# The others are read without their comments and what is in quotes. No expression looks at a
# character more than a few times, whatever the text. `(?>(?:…)*)` stands for `(?:…)*+`, which
# Python before 3.11.5 gets wrong.
QUOTED = re.compile(
    r"""
    '[^']*+' | "[^"]*+" | --[^\r\n]*+ | /\*[^*/]*+ (?> (?: (?:\*(?!/)|/(?!\*)) [^*/]*+ )* ) \*/
    """,
    re.VERBOSE,
)
UNCLEAR = re.compile(r"\\'|\$(?:[^\W\d]\w*+)?\$")  # where quotes may end elsewhere
TEMPORARY = r"(?:(?:local|global)\s++)? temp(?:orary)?\b"
MAKES_TEMPORARY = re.compile(
    rf"\bcreate\s++ (?:or\s++replace\s++)? {TEMPORARY}"
    rf"| (?<!insert\s)(?<!merge\s)\binto\s++ {TEMPORARY}",
    re.VERBOSE,
)
DROPS_AT_COMMIT = re.compile(
    rf"\s*+ create\s++ {TEMPORARY} \s++table\b"
    r" [^o]*+ (?> (?:o(?!n\s++commit\s++drop\b)[^o]*+)* ) o",
    re.VERBOSE,
)
# What drivers have prepared is gone then, and some do not know; or a library is there.
LASTS = re.compile(
    r"""
    \s*+ (?: load\b | discard\s++all\b
        | deallocate\b (?:\s++prepare\b)? \s*+ (?!(?!all\b)[a-z]) )
    """,
    re.VERBOSE,
)
SETS = re.compile(
    r"""
    \s*+ (?: set\b (?!\s++(?:local|transaction|constraints)\b(?!\s*+\.))
        | prepare\b (?!\s++transaction\b)
        | (?:reset|listen|unlisten|do|call|discard|deallocate|close)\b )
    """,
    re.VERBOSE,
)
SETS_WITHIN = re.compile(
    r"\bwith\s++hold\b | \bexecute\b (?!\s++(?:function|procedure|on)\b)", re.VERBOSE
)
SETS_LOCALLY = re.compile(
    r"""
    set_config \s*+ \(
    (?: (?> (?: [^(),] | \((?>(?:[^()]|\([^()]*+\))*)\) )* ) , ){2} \s*+ true \s*+ \)
    """,
    re.VERBOSE,
)
DRAWS_FOR_ITSELF = re.compile(r"\s*+insert\b[^;]*+;?\s*+$")

# Words by which a text of which nobody knows where its quotes end may leave something.
MAY_LAST = re.compile(r"\b(?:temp(?:orary)?|load|deallocate|discard)\b")
MAY_SET = re.compile(
    r"""
    \bset\b (?!\s++(?:local|transaction|constraints)\b(?!\s*+\.))
    | \b(?:reset|listen|unlisten|do|call|prepare|execute|close|hold)\b
    """,
    re.VERBOSE,
)

# (Not what SQLAlchemy itself asks at connect.)
CALLED = re.compile(
    r"""
    \s*+ select\s++ (?! pg_catalog\. | current_(?:schemas?|database|setting)\s*+\( )
    [\w."]++ \s*+ \( [^;]* \) \s*+ ;? \s*+ $
    """,
    re.VERBOSE,
)


def read(text: str) -> Leaving:
    """Read what a text may leave; what it may, it counts as having left."""
    lower = text.lower()
    told = [word for word in TELLING if word in lower]
    leaving = Leaving.NOTHING if not told and PLAIN.match(lower) else read_closely(lower, told)
    return leaving or (Leaving.CALLED if CALLED.match(lower) else Leaving.NOTHING)


def read_closely(lower: str, told: list[str]) -> Leaving:
    """Read a text that is none of the many.

    Args:
        told: The names in it.
    """
    clear = "" if UNCLEAR.search(lower) else QUOTED.sub(" ", lower)
    if "/*" in clear:  # of comments in comments, only the inner ones are out
        clear = ""
    statements = clear.split(";")
    if any(word in LASTING for word in told) or any(map(LASTS.match, statements)):
        return Leaving.RELATIONS
    if any(
        MAKES_TEMPORARY.search(each) and not DROPS_AT_COMMIT.match(each)
        for each in statements
        if "temp" in each
    ):
        return Leaving.RELATIONS
    if IN_TEMPORARY.search(lower) or (not clear and MAY_LAST.search(lower)):
        return Leaving.RELATIONS
    sets = (
        any(may_set(word, lower, clear) for word in told)
        or any(map(SETS.match, statements))
        or any(SETS_WITHIN.search(each) for each in statements if not PLAIN.match(each))
        or (not clear and MAY_SET.search(lower))
    )
    return Leaving.STATE if sets else Leaving.NOTHING


def may_set(name: str, lower: str, clear: str) -> bool:
    """Whether a text with one of those names in it may set something for the session."""
    if name == "set_config":
        return lower.count(name) > len(SETS_LOCALLY.findall(clear))
    if name == "pg_settings":
        return "update" in lower
    if name in DRAWING:
        return not DRAWS_FOR_ITSELF.match(clear)
    return name in SETTING


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

PSYCOPG_VERBS = ("execute", "executemany", "stream", "copy")
PSYCOPG2_VERBS = ("execute", "executemany", "copy_expert")
ASYNCPG_VERBS = (
    *("executemany", "fetch", "fetchval", "fetchrow", "fetchmany", "cursor", "copy_from_query"),
)
# How they call the text that comes first, if not `query`.
CALLS_IT = {"copy": "statement", "copy_expert": "sql"}
ASYNCPG_CALLS_IT = {"executemany": "command"}
# What they change of the driver's own object, no statement undoes; nor has a hook to do it again.
PSYCOPG2_CHANGES = ("reset", "set_session")
ASYNCPG_CHANGES = ("add_log_listener", "add_query_logger", "add_termination_listener")


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
            "connection_factory": watching_connection_of_psycopg2(connection),
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
        driver.server_cursor_factory = watching_server_cursor(driver.server_cursor_factory)
    elif getattr(driver, "cursor_factory", None) is not None:  # psycopg2
        driver.cursor_factory = watching_cursor(driver.cursor_factory, PSYCOPG2_VERBS)


@cache
def watching_connection_of_psycopg2(base: Any) -> Any:
    """Make a class of psycopg2's connections that tell what passes them."""

    def cursor(self: Any, *arguments: Any, **options: Any) -> Any:
        if options or len(arguments) > 1:
            factory = options.get("cursor_factory")
            if isinstance(factory, type):
                options["cursor_factory"] = watching_cursor(factory, PSYCOPG2_VERBS)
            if options.get("withhold") or len(arguments) > 1:
                tell_of(self, Leaving.STATE, ("cursor", arguments))
        return base.cursor(self, *arguments, **options)

    def set_client_encoding(self: Any, encoding: str) -> None:
        # (Called again it would do nothing: it compares with what it was called with before.)
        said = f"SET client_encoding TO '{encoding}'"
        tell_of(self, Leaving.RELATIONS, ("execute", (said,)))
        base.set_client_encoding(self, encoding)

    def named(self: Any) -> str:
        """Leave out its DSN, of which psycopg2 masks the password alone: a pool logs this."""
        return f"<connection of psycopg2 at {id(self):#x}; closed: {self.closed}>"

    own = {
        "note": None,
        "cursor": cursor,
        "set_client_encoding": set_client_encoding,
        "__repr__": named,
        "__str__": named,
    }
    return type(base.__name__, (base,), own | changes(base, PSYCOPG2_CHANGES))


def changes(base: Any, verbs: tuple[str, ...]) -> dict[str, Any]:
    """Make the methods of a connection that tell that they change the driver's own object."""

    def telling(verb: str) -> Callable[..., Any]:
        change = getattr(base, verb)

        def tell(self: Any, *arguments: Any, **options: Any) -> Any:
            tell_of(self, Leaving.RELATIONS, (verb, arguments))
            return change(self, *arguments, **options)

        return tell

    return {verb: telling(verb) for verb in verbs}


@cache
def watching_server_cursor(base: Any) -> Any:
    """Make a class of psycopg's cursors of the server, which may outlive their transaction."""
    if getattr(base, "is_watching", False):
        return base
    watched = watching_cursor(base, ("execute",))

    def execute(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        if self.withhold:
            tell_of(self.connection, Leaving.STATE, ("execute", (query, *arguments)))
        return watched.execute(self, query, *arguments, **options)

    return type(base.__name__, (watched,), {"__slots__": (), "execute": execute})


@cache
def watching_cursor(base: Any, verbs: tuple[str, ...]) -> Any:
    """Make a class of cursors that tell what passes them, of psycopg or psycopg2."""
    if getattr(base, "is_watching", False):
        return base

    def watched(verb: str) -> Callable[..., Any]:
        send = getattr(base, verb)

        def tell(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
            text = query if query.__class__ is str else text_of(query, self)
            if leaving := READINGS[text]:
                tell_of(self.connection, leaving, (verb, (query, *arguments)))
            return send(self, query, *arguments, **options)

        return tell

    telling = {verb: by_name(watched(verb), CALLS_IT.get(verb)) for verb in verbs}
    verbs_of_it: dict[str, Any] = {"__slots__": (), "is_watching": True, **telling}
    if hasattr(base, "callproc"):  # psycopg2

        def callproc(self: Any, name: Any, *arguments: Any) -> Any:
            tell_of(self.connection, Leaving.STATE, ("callproc", (name, *arguments)))
            return base.callproc(self, name, *arguments)

        verbs_of_it["callproc"] = callproc
    return type(base.__name__, (base,), verbs_of_it)


def by_name(tell: Callable[..., Any], name: str | None) -> Callable[..., Any]:
    """Have a verb take its text by the driver's own name for it."""
    if name is None:
        return tell

    def called(self: Any, *arguments: Any, **options: Any) -> Any:
        if name in options:
            arguments = (options.pop(name), *arguments)
        return tell(self, *arguments, **options)

    return called


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
            if leaving := READINGS[query]:
                tell_of(self, leaving, (verb, (query, *arguments)))
            return send(self, query, *arguments, **options)

        return tell

    def execute(self: Any, query: str, *arguments: Any, **options: Any) -> Any:
        if leaving := READINGS[query]:  # (not by `watched`: each BEGIN and COMMIT comes here)
            tell_of(self, leaving, ("execute", (query, *arguments)))
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

    verbs = {
        verb: by_name(watched(verb), ASYNCPG_CALLS_IT.get(verb))
        for verb in ASYNCPG_VERBS
        if hasattr(base, verb)
    }
    own = {
        "note": None,
        "with_begin": "",
        "execute": execute,
        "prepare": prepare,
        "add_listener": add_listener,
    }
    return type(base.__name__, (base,), verbs | own | changes(base, ASYNCPG_CHANGES))


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
# prepared, and cannot be sent together with anything. `random()` begins again where nobody knows;
# and the last one counts what is temporary.
CLEAN = """
CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; UNLISTEN *;
SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD SEQUENCES;
DO LANGUAGE plpgsql $$
DECLARE prepared text;
BEGIN
    FOR prepared IN SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql LOOP
        EXECUTE pg_catalog.format('DEALLOCATE %I', prepared);
    END LOOP;
END $$;
SELECT pg_catalog.setseed(
    pg_catalog.hashtextextended(pg_catalog.gen_random_uuid()::text, 0) / 9223372036854775808.0
);
SELECT FROM pg_catalog.pg_depend WHERE refobjid = pg_catalog.pg_my_temp_schema()
AND refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass
"""
NOTHING_TEMPORARY = "SELECT 0"


def clean(driver: Any, hooks: Iterable[Sent]) -> None:
    """Clean a connection that is in no transaction; send again what its connect hooks had sent.

    Raises:
        RuntimeError: that cannot be done.
    """
    if hasattr(driver, "get_server_pid"):  # asyncpg
        await_only(clean_asyncpg(driver, hooks))
    elif iscoroutinefunction(driver.rollback):  # psycopg
        await_only(clean_on_loop(driver, hooks))
    else:
        clean_by_cursor(driver, hooks)


def refuse_temporary(status: str | None) -> None:
    """Refuse a connection on which something temporary is, which a function has made.

    What drivers have prepared refers to that, as it does where the text of a session tells.
    """
    if status != NOTHING_TEMPORARY:
        raise RuntimeError("something temporary was made on it, such as a table")


async def clean_asyncpg(driver: Any, hooks: Iterable[Sent]) -> None:
    """Clean a connection of asyncpg."""
    refuse_temporary(await driver.execute(CLEAN))
    for verb, arguments in hooks:
        if verb not in ASYNCPG_CHANGES:
            await getattr(driver, verb)(*arguments)


def clean_by_cursor(driver: Any, hooks: Iterable[Sent]) -> None:
    """Clean a synchronous connection."""
    before, driver.autocommit = driver.autocommit, True
    with driver.cursor() as cursor:
        cursor.execute(CLEAN)
        while hasattr(driver, "pgconn") and cursor.nextset():  # psycopg2 has the last one only
            pass
        refuse_temporary(cursor.statusmessage)
        for verb, arguments in hooks:
            if hasattr(cursor, verb):
                getattr(cursor, verb)(*arguments)
    driver.autocommit = before


async def clean_on_loop(driver: Any, hooks: Iterable[Sent]) -> None:
    """Clean a connection of psycopg's asynchronous side."""
    before = driver.autocommit
    await driver.set_autocommit(True)
    async with driver.cursor() as cursor:
        await cursor.execute(CLEAN)
        while cursor.nextset():
            pass
        refuse_temporary(cursor.statusmessage)
        for verb, arguments in hooks:
            await getattr(cursor, verb)(*arguments)
    await driver.set_autocommit(before)
