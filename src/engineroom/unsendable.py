"""A value that cannot be sent: the error that names it does so without, where values are hidden."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import date, time, timedelta
from enum import Enum
from numbers import Number
from traceback import walk_tb
from typing import Any
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.exc import DBAPIError

from .secrecy import chain

# As asyncpg writes it: the value, cut after forty characters, and why.
SAID = re.compile(
    r"(?P<which>invalid input for query argument \$\d+(?: in element #\d+ of .*?)?): "
    r"(?P<value>.*) \((?P<why>.*)\)\Z",
    re.DOTALL,
)
TELLING = 4  # characters of a value by which it is known where no quotes are around it
CUT = 38  # and after which some texts cut it
PLAIN = (str, bytes, bytearray, Number, date, time, timedelta, UUID, Enum)


def hide_what_cannot_be_sent(engine: Engine) -> None:
    """Have no error of an engine name such a value, where SQLAlchemy hides the parameters."""
    if engine.hide_parameters:
        event.listen(engine, "handle_error", _hide)


def _hide(context: ExceptionContext) -> None:
    original, raised = context.original_exception, context.sqlalchemy_exception
    is_types = raised is not None and not isinstance(raised, DBAPIError)
    is_pythons = type(original).__module__ == "builtins" and isinstance(original, Exception)
    if is_types or is_pythons or SAID.search(str(original)):
        values = Values(original, context.parameters, is_types=is_types)
        for error in (*chain(original), *([raised] if raised else [])):
            error.args = tuple(values.mask(one) for one in error.args)


class Values:
    """What was bound when a column's type or a driver refused one of it, and how it is named."""

    def __init__(self, error: BaseException, parameters: object, *, is_types: bool) -> None:
        """Find it: what a statement came with itself, no attribute has, but frames that sent it."""
        self._alone: set[str] = set()
        self._within: set[str] = set()
        variables = [frame.f_locals for frame, _ in walk_tb(error.__traceback__)]
        held = [one for each in variables for one in each.values() if isinstance(one, dict)]
        # Where a type raised it, the value may be of any kind: its text was asked for already.
        refused = filter(has_text_of_its_own, variables[-1].values() if is_types else ())
        for value in (*_flat([parameters, *held]), *refused):
            with suppress(Exception):  # (the text of a number with thousands of digits)
                self._note(value)

    def _note(self, value: object) -> None:
        bare = str(value)
        self._alone.add(bare)
        self._within |= {repr(value), f"'{bare}'"}
        if len(bare) >= TELLING or not isinstance(value, str):
            self._within.add(bare)

    def mask(self, text: Any) -> Any:
        """Return an argument of an error without them, if it is a text."""
        if not isinstance(text, str):
            return text
        if text in self._alone:
            return "***"
        text = SAID.sub(r"\g<which>: *** (\g<why>)", text)
        for name in sorted((one for one in self._within if one in text), key=len, reverse=True):
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "***", text)
        for name in self._within:
            if len(name) > CUT and name[:CUT] in text:
                text = text.partition(name[:CUT])[0] + "***"
        return text


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what has a text of its own, out of whatever holds it."""
    waiting, seen = list(values), set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, PLAIN) and not isinstance(each, bool):
            yield each
        elif isinstance(each, (dict, list, tuple, set, frozenset)) and id(each) not in seen:
            seen.add(id(each))
            waiting += each.values() if isinstance(each, dict) else each


def has_text_of_its_own(value: object) -> bool:
    """Whether it may be a value: no error, nothing of SQLAlchemy's, and no object that is mapped,
    whose text might ask the database.
    """
    kind = type(value)
    is_mapped = hasattr(kind, "__mapper__") or kind.__module__.startswith("sqlalchemy")
    return not isinstance(value, BaseException) and not is_mapped
