"""A value that cannot be sent: the error that names it does so without, where values are hidden."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
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
ENOUGH = 8  # characters of a value by which it is recognized in the reason
TELLING = 4  # and by which it is where no quotes are around it
PLAIN = (str, bytes, Number, date, time, timedelta, UUID, Enum)


def hide_what_cannot_be_sent(engine: Engine) -> None:
    """Have no error of an engine name such a value, where SQLAlchemy hides the parameters."""
    if engine.hide_parameters:
        event.listen(engine, "handle_error", _hide)


def _hide(context: ExceptionContext) -> None:
    original, raised = context.original_exception, context.sqlalchemy_exception
    said = SAID.search(str(original))
    if said is not None:
        mask = _as_asyncpg_says(said)
    elif raised is not None and not isinstance(raised, DBAPIError):
        mask = _as_a_type_says(original)
    else:
        return
    for error in (*chain(original), *([raised] if raised else [])):
        error.args = tuple(mask(one) if isinstance(one, str) else one for one in error.args)


def _as_asyncpg_says(said: re.Match[str]) -> Callable[[str], str]:
    """Return what hides the value in its text, and in the reason if that has it, too."""
    start = said["value"].removesuffix("...").strip("'\"")[:ENOUGH]
    why = "it is hidden, and the reason with it" if start and start in said["why"] else said["why"]
    shown = f"{said['which']}: *** ({why})"

    def mask(text: str) -> str:
        return "***" if text == said["why"] != why else SAID.sub(lambda _: shown, text)

    return mask


def _as_a_type_says(error: BaseException) -> Callable[[str], str]:
    """Return what hides the values that were bound when a column's type refused one of them.

    No attribute has those that a statement came with itself, only the frames that sent it.
    """
    alone: set[str] = set()
    within: set[str] = set()
    for frame, _ in walk_tb(error.__traceback__):
        for value in _flat(each for each in frame.f_locals.values() if isinstance(each, dict)):
            alone.add(bare := str(value))
            within |= {repr(value), f"'{bare}'"} | ({bare} if is_telling(value) else set())
    longest_first = sorted(map(re.escape, within), key=len, reverse=True)
    named = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first) or '(?!)'})(?!\w)")
    return lambda text: "***" if text in alone else named.sub("***", text)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values that have a text of their own, out of whatever holds them."""
    waiting, seen = list(values), set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, PLAIN) and not isinstance(each, bool):
            yield each
        elif isinstance(each, (dict, list, tuple, set, frozenset)) and id(each) not in seen:
            seen.add(id(each))
            waiting += each.values() if isinstance(each, dict) else each


def is_telling(value: object) -> bool:
    """Whether a text that has it, with nothing around it, hardly has it by chance."""
    return not isinstance(value, str) or len(value) >= TELLING
