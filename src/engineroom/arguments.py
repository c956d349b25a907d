"""Refuses what cannot work where it is given, and not in a request that comes later."""

from __future__ import annotations

from typing import Any

from .errors import InvalidOption
from .hooks import is_coroutine_function


def mind_manager(what: str, given: Any, *kinds: type) -> None:
    """Refuse what gives no sessions.

    Args:
        what: What it was given to.
        kinds: What it may be.

    Raises:
        InvalidOption: it is none of them.
    """
    if not isinstance(given, kinds):
        wanted = " or a ".join(kind.__name__ for kind in kinds)
        raise InvalidOption(
            f"{what}() got {type(given).__name__}, where it takes a {wanted}. A URL is given by "
            "its name: url=…"
        )


def mind_policy(commit_on: Any) -> None:
    """Refuse what cannot say whether a status commits.

    Raises:
        InvalidOption: it cannot be called, or gives a coroutine, which is always true.
    """
    if not callable(commit_on) or is_coroutine_function(commit_on):
        raise InvalidOption(
            f"commit_on= got {commit_on!r}. It takes a plain function of the status that says "
            "whether it commits: commit_on=lambda status: status < 400."
        )
