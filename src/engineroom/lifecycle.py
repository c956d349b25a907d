"""The states of a manager, and what is legal in which."""

from __future__ import annotations

from enum import Enum

from .errors import AlreadyInitialized, ManagerClosed, NotInitialized, UsageError


class State(Enum):
    """Where a manager stands in its life."""

    NEW = "new"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


# What may be done in which state. Whatever is missing is refused with the error of `REFUSALS`.
LEGAL: dict[str, frozenset[State]] = {
    "init": frozenset({State.NEW, State.CLOSED}),
    "use": frozenset({State.OPEN}),
    "close": frozenset({State.OPEN}),  # in the other states it does nothing
}

REFUSALS: dict[State, type[UsageError]] = {
    State.NEW: NotInitialized,
    State.OPEN: AlreadyInitialized,
    State.CLOSING: ManagerClosed,
    State.CLOSED: ManagerClosed,
}

REASONS: dict[State, str] = {
    State.NEW: "was not initialized. Call init(url) first: in a web application in its lifespan, "
    "in a script at the start.",
    State.OPEN: "is already open. Call init() once, or close() before the next one.",
    State.CLOSING: "is closing and takes no new work. Finish what uses it before close().",
    State.CLOSED: "is closed. Call init(url) to open it again.",
}


class Life:
    """One manager's state; the table above is asked before every step."""

    __slots__ = ("is_usable", "name", "state")

    state: State
    is_usable: bool  # what `allows("use")` says: the one question that every scope asks

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.enter(State.NEW)

    def enter(self, state: State) -> None:
        """Go over to another state."""
        self.state = state
        self.is_usable = self.allows("use")

    def allows(self, action: str) -> bool:
        """Whether the state permits the action."""
        return self.state in LEGAL[action]

    def refusal(self, action: str, url: str | None = None) -> UsageError:
        """Build the error for an action that the state does not permit; a URL says on what."""
        error = REFUSALS[self.state]
        on = f" on {url}" if url else ""
        return error(f"{action}: {self.name}{on} {REASONS[self.state]}")
