"""Keeps secrets out of sight: values without a readable text, frames without their variables."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR, iscoroutinefunction
from opcode import opmap
from traceback import walk_tb
from types import FrameType, TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

WAITS = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR
YIELD = opmap["YIELD_VALUE"]  # the instruction at which it does


class Sealed(Generic[T]):
    """A secret on its way: neither its text nor a traceback with locals shows it."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def reveal(self) -> T:
        """Return the secret; use it at once, and keep it in no variable that outlives an error."""
        return self._value

    def __repr__(self) -> str:
        return "***"


class NamesOnly(logging.Filter):
    """Has a log of calls name what is called, and not with what: there are the values."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, its partial functions as their names."""
        if isinstance(record.args, tuple):
            record.args = tuple(
                getattr(one.func, "__qualname__", type(one.func)) if type(one) is partial else one
                for one in record.args
            )
        return True


NAMES_ONLY = NamesOnly()


class Unseen:
    """Empties the frames that an error has come through: it keeps its lines, not their variables.

    Drivers have the password there in plain text, and tools that print a traceback with locals
    (rich, pytest, error trackers) would show it.
    """

    def __enter__(self) -> None:
        # What is being handled is not ours, though what we raise has it as its context.
        self._handled = sys.exception()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each in chain(error, self._handled):
            frames = [frame for frame, _ in walk_tb(each.__traceback__)]
            # Where that is handled still, it may be the application's own.
            is_handled = each is not error and frames and not emptied(frames[0])
            for frame in frames:
                if not is_handled or is_ours(frame):
                    emptied(frame)


def unseen(verb: Callable[P, R]) -> Callable[P, R]:
    """Empty, when a verb raises, its own frame as well: its arguments may be secret."""
    if iscoroutinefunction(verb):

        @wraps(verb)
        async def call_async(*args: Any, **kw: Any) -> Any:
            try:
                with Unseen():
                    return await verb(*args, **kw)
            except BaseException:
                del args, kw
                raise

        return cast(Callable[P, R], call_async)

    @wraps(verb)
    def call(*args: P.args, **kw: P.kwargs) -> R:
        try:
            with Unseen():
                return verb(*args, **kw)
        except BaseException:
            del args, kw
            raise

    return call


# In whose frames the values lie that are bound to a statement: of libraries, and of what they call.
BINDING = (
    *("sqlalchemy", "asyncpg", "psycopg", "psycopg2", "aiosqlite", "asyncmy", "pymysql"),
    *("json", "uuid", "ipaddress", "decimal"),
    "engineroom",
)


def hide_values(error: BaseException) -> None:
    """Empty the frames through which an error's statement has gone, and leave the application's."""
    for each in chain(error):
        for frame, _ in walk_tb(each.__traceback__):
            if is_ours(frame):
                emptied(frame)


def is_ours(frame: FrameType) -> bool:
    """Whether it is of a library that has to do with a statement, and not the application's."""
    return frame.f_globals.get("__name__", "").partition(".")[0] in BINDING


def emptied(frame: FrameType) -> bool:
    """Empty a frame that has ended; one that runs or waits goes on, whatever error it has met.

    Before Python 3.13 `clear()` would end a coroutine that waits, as its task were cancelled.
    """
    code = frame.f_code
    if code.co_flags & WAITS and code.co_code[frame.f_lasti] == YIELD:
        return False
    try:
        frame.clear()
    except RuntimeError:
        return False
    return True


def chain(error: BaseException | None, end: BaseException | None = None) -> Iterator[BaseException]:
    """Yield an error, and all that it came of or consists of, up to one that was there before."""
    seen = {id(end)}
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions
