"""A value that asyncpg cannot send: its error names it, and may do so without."""

from __future__ import annotations

import re

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

from ...secrecy import chain

# As asyncpg writes it: the value, cut after forty characters, and why.
SAID = re.compile(
    r"(?P<which>invalid input for query argument \$\d+(?: in element #\d+ of .*?)?): "
    r"(?P<value>.*) \((?P<why>.*)\)\Z",
    re.DOTALL,
)
ENOUGH = 8  # characters of a value by which it is recognized in the reason


def watch(engine: Engine) -> None:
    """Hide such values where SQLAlchemy hides the parameters."""
    if engine.hide_parameters:
        event.listen(engine, "handle_error", _hide)


def _hide(context: ExceptionContext) -> None:
    said = SAID.search(str(context.original_exception))
    if said is None:
        return
    start = said["value"].removesuffix("...").strip("'\"")[:ENOUGH]
    why = "it is hidden, and the reason with it" if start and start in said["why"] else said["why"]
    shown = f"{said['which']}: *** ({why})"
    raised = context.sqlalchemy_exception
    for error in (*chain(context.original_exception), *([raised] if raised else [])):
        if not error.args or not isinstance(text := error.args[0], str):
            continue
        if SAID.search(text):
            error.args = (SAID.sub(lambda _: shown, text), *error.args[1:])
        elif text == said["why"] != why:
            error.args = ("***",)
