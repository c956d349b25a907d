"""Every error, its code, and what to do about it.

    EngineroomError                what engineroom itself raises; `.code` is its heading in the docs
    ├── UsageError                 a mistake in the calling code (also a `RuntimeError`)
    │   ├── ConfigurationError     a setting, an option or a URL (also a `ValueError`)
    │   │   ├── NoDatabaseURL      no URL was given anywhere
    │   │   ├── InvalidURL         the URL is none, or names a database that is not supported
    │   │   ├── DriverNotInstalled the URL's driver is not there
    │   │   ├── UnknownOption      an option that does not exist
    │   │   ├── InvalidOption      an option or a variable with a value it cannot have
    │   │   └── InvalidPath        a SQLite file that cannot be opened or written
    │   ├── NotInitialized         used before `init()`
    │   ├── AlreadyInitialized     a second `init()` while open
    │   ├── ManagerClosed          used while or after `close()`
    │   ├── CloseInsideScope       `close()` inside a scope that it would wait for
    │   ├── NotEntered             a scope used without `with` (also an `AttributeError`)
    │   ├── WrongWith              `with` where `async with` belongs, or the other way
    │   ├── SessionClosed          a session used after its end
    │   ├── WrongThread            a session used from another thread than its own
    │   ├── SyncInAsync            a synchronous session inside a running event loop
    │   └── SelfDeadlock           a SQLite writer that would wait for itself
    └── PoolExhausted              no connection came free (also SQLAlchemy's `TimeoutError`)

Errors of SQLAlchemy and of the drivers pass through unchanged.
"""

from __future__ import annotations

from typing import ClassVar

from sqlalchemy.exc import TimeoutError as PoolTimeoutError


class EngineroomError(Exception):
    """Base of everything that engineroom itself raises.

    The message says what happened, why, and what to do, in that order, and ends with the code in
    brackets: the heading under which the docs explain it.
    """

    code: ClassVar[str] = "engineroom-error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class UsageError(EngineroomError, RuntimeError):
    """A mistake in the calling code: nothing was sent, nothing was changed."""

    code = "usage-error"


class ConfigurationError(UsageError, ValueError):
    """A setting, an option or a URL that cannot work."""

    code = "configuration-error"


class NoDatabaseURL(ConfigurationError):
    """No URL: not as an argument, not in the environment."""

    code = "no-database-url"


class InvalidURL(ConfigurationError):
    """The URL is none, or names a database that is not supported."""

    code = "invalid-url"


class DriverNotInstalled(ConfigurationError):
    """The URL's driver is not installed."""

    code = "driver-not-installed"


class UnknownOption(ConfigurationError):
    """An option that does not exist."""

    code = "unknown-option"


class InvalidOption(ConfigurationError):
    """An option, or an environment variable, with a value that it cannot have."""

    code = "invalid-option"


class InvalidPath(ConfigurationError):
    """A SQLite file that cannot be opened or written."""

    code = "invalid-path"


class NotInitialized(UsageError):
    """Used before `init()`."""

    code = "not-initialized"


class AlreadyInitialized(UsageError):
    """A second `init()` while open."""

    code = "already-initialized"


class ManagerClosed(UsageError):
    """Used while `close()` drains, or after it."""

    code = "closed"


class CloseInsideScope(UsageError):
    """`close()` was called inside a scope, and would wait for that scope to end."""

    code = "close-inside-scope"


class NotEntered(UsageError, AttributeError):
    """A scope was used without entering it."""

    code = "not-entered"


class WrongWith(UsageError):
    """`with` where `async with` belongs, or the other way round."""

    code = "wrong-with"


class SessionClosed(UsageError):
    """A session was used after its end, or was ended by `close()` or a fork."""

    code = "session-closed"


class WrongThread(UsageError):
    """A session was used from another thread than the one that opened it."""

    code = "wrong-thread"


class SyncInAsync(UsageError):
    """A synchronous session was opened inside a running event loop, which it would stop."""

    code = "sync-in-async"


class SelfDeadlock(UsageError):
    """A SQLite writer would wait for itself: inside another, or in the forked child of one."""

    code = "self-deadlock"


class PoolExhausted(EngineroomError, PoolTimeoutError):
    """No connection came free within `pool_timeout` seconds."""

    code = "pool-exhausted"  # type: ignore[misc]  # SQLAlchemy declares an instance's `code`


class SyncInAsyncWarning(RuntimeWarning):
    """A synchronous session stops the event loop that it is used in, once per line."""
