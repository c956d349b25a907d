"""A value that cannot be sent: the error that names it does so without, where values are hidden."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import date, time, timedelta
from enum import Enum
from numbers import Number
from traceback import walk_tb
from types import FrameType
from typing import Any
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from .secrecy import chain, is_ours

# As asyncpg writes it: the value, cut after forty characters, and why.
ASYNCPGS = re.compile(r"invalid input for query argument \$\d+(?: in element #\d+ of .*?)?: ")
VALUE_AND_WHY = re.compile(r".* \((?P<why>.*)\)\Z", re.DOTALL)
TELLING = 4  # characters of a text by which it is known where no quotes are around it
CUT = 38  # and after which some errors cut it
PLAIN = (str, bytes, bytearray, Number, date, time, timedelta, UUID, Enum)
HOLDERS = (dict, list, tuple, set, frozenset, deque)


def hide_what_cannot_be_sent(engine: Engine) -> None:
    """Have no error of an engine name such a value, where SQLAlchemy hides the parameters."""
    if engine.hide_parameters:
        event.listen(engine, "handle_error", _hide)


def _hide(context: ExceptionContext) -> None:
    original, raised = context.original_exception, context.sqlalchemy_exception
    is_types = raised is not None and not isinstance(raised, DBAPIError)
    is_pythons = type(original).__module__ == "builtins" and isinstance(original, Exception)
    is_drivers = ASYNCPGS.search(str(original)) is not None
    if isinstance(original, InvalidRequestError) or not (is_types or is_pythons or is_drivers):
        return
    frames = [frame for frame, _ in walk_tb(original.__traceback__)]
    errors = [*_of_statement(original, frames), *([raised] if raised else [])]
    texts = "\n".join(str(one) for error in errors for one in error.args)
    names = Names(_bound(context.parameters, frames, is_types=is_types), texts)
    for error in errors:
        shown = tuple(map(names.hide, error.args))
        if shown != error.args:
            with suppress(AttributeError):  # of a class that is frozen
                error.args = shown


def _of_statement(original: BaseException, frames: list[FrameType]) -> Iterator[BaseException]:
    """Yield what came of sending it: not what the application was handling before."""
    for error in chain(original):
        caught_in = error.__traceback__.tb_frame if error.__traceback__ else None
        if error is original or caught_in in frames or (caught_in and is_ours(caught_in)):
            yield error


def _bound(parameters: object, frames: list[FrameType], *, is_types: bool) -> Iterator[Any]:
    """Yield what was bound. What a statement came with itself, only frames that sent it have."""
    sending = [frame.f_locals.values() for frame in frames if is_ours(frame)]
    held = [one for variables in sending for one in variables if isinstance(one, dict)]
    yield from _flat([parameters, *held])
    if is_types and frames and is_ours(frames[-1]):  # of any kind: its text was asked for already
        for one in frames[-1].f_locals.values():
            if not type(one).__module__.startswith("sqlalchemy"):
                yield one


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what has a text of its own, out of whatever holds it."""
    waiting, seen = [*values], set[int]()
    while waiting:
        each = waiting.pop()
        if isinstance(each, PLAIN) and not isinstance(each, bool):
            yield each
        elif isinstance(each, HOLDERS) and id(each) not in seen:
            seen.add(id(each))
            waiting += each.values() if isinstance(each, dict) else each


class Names:
    """How errors name what was bound, as far as they do."""

    def __init__(self, values: Iterable[Any], texts: str) -> None:
        """Look for values in what the errors say: most are in none."""
        self._alone: set[str] = set()  # a whole text, as a KeyError's
        self._within: set[str] = set()
        for value in values:
            with suppress(Exception):  # (the text of a number with thousands of digits)
                if not isinstance(value, (str, bytes, bytearray)) or _may_be_in(value, texts):
                    self._note(value, texts)

    def _note(self, value: object, texts: str) -> None:
        bare = str(value)
        named = {repr(value), f"'{bare}'"}
        if len(bare) >= TELLING or not isinstance(value, str):
            named.add(bare)
        self._within |= {one for one in named if one[:CUT] in texts}
        if bare in texts:
            self._alone.add(bare)

    def hide(self, argument: Any) -> Any:
        """Return an argument of an error without them."""
        if not isinstance(argument, str):
            is_value = isinstance(argument, PLAIN) and str(argument) in self._alone
            return "***" if is_value and not isinstance(argument, bool) else argument
        if argument in self._alone:
            return "***"
        if (said := ASYNCPGS.search(argument)) is None:
            return self._hidden(argument)
        rest = self._hidden(argument[said.end() :])  # (the number before it may be a value, too)
        return argument[: said.end()] + VALUE_AND_WHY.sub(r"*** (\g<why>)", rest)

    def _hidden(self, text: str) -> str:
        for name in sorted(self._within, key=len, reverse=True):
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "***", text)
            if (start := name[:CUT]) in text and len(name) > CUT:  # it was cut
                text = re.sub(rf"{re.escape(start)}(?s:.*?\.\.\.|.*)", "***", text, count=1)
        return text


def _may_be_in(value: str | bytes | bytearray, texts: str) -> bool:
    """Whether the beginning of a text may be in others, as it is or as Python writes it."""
    start = value[:CUT]
    return (isinstance(start, str) and start in texts) or repr(start).strip("'\"b") in texts
