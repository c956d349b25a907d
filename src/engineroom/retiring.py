"""What has ended refuses use: a session or connection turns into a class whose every verb raises.

So one that lives pays nothing for the question whether it does.
"""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

from .errors import SessionClosed

ENDED = (
    "The session{opened} has ended, and what it would do now would never be committed. Do it "
    "before the end of its scope, or open a new session where it is done (in a streaming body or a "
    "background task: inside it)."
)

# What may still be called: it looks, or lets go, and sends nothing.
HARMLESS = frozenset(
    {
        "close",
        "close_all",
        "detach",
        "expire",
        "expire_all",
        "expunge",
        "expunge_all",
        "get_bind",
        "get_execution_options",
        "get_isolation_level",
        "get_nested_transaction",
        "get_transaction",
        "identity_key",
        "in_nested_transaction",
        "in_transaction",
        "invalidate",
        "is_modified",
        "object_session",
    }
)


def retire(resource: Any, why: str) -> None:
    """Make a session or connection refuse use from now on.

    Args:
        why: What the error says; "{opened}" in it becomes the line of the scope.
    """
    if not hasattr(resource, "_obituary"):
        living: Any = type(resource)
        resource._obituary = why
        resource.__class__ = vars(living).get("_retired") or retired(living)


def retired(living: Any) -> Any:
    """Make the class that a resource of this class becomes when it has ended.

    It is kept on that class, and goes with it: each `sessionmaker` makes one of its own.
    """
    verbs = [
        name
        for name in dir(living)
        if name not in HARMLESS
        and not name.startswith("_")
        and inspect.isfunction(inspect.getattr_static(living, name))
    ]
    living._retired = made = type(living.__name__, (living,), dict.fromkeys(verbs, refuse))
    return made


def refuse(resource: Any, *args: Any, **kw: Any) -> NoReturn:
    """Stand in for every verb of what has ended."""
    scope = getattr(resource, "_scope", None)
    opened = "" if scope is None else f" that was opened at {scope.where}"
    raise SessionClosed(resource._obituary.replace("{opened}", opened))
