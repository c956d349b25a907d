"""Every error, its code, and what to do about it.

::

    EngineroomError                what engineroom itself raises; `.code` is its heading in the docs
    ├── UsageError                 a mistake in the calling code (also a `RuntimeError`)
    │   ├── ConfigurationError     a setting, an option or a URL (also a `ValueError`)
    │   │   ├── NoDatabaseURL      no URL was given anywhere
    │   │   ├── InvalidURL         the URL is none, or names a database that is not supported
    │   │   ├── InvalidCertificate its file cannot be read, or is none
    │   │   ├── DriverNotInstalled the URL's driver is not there
    │   │   ├── UnsupportedByDriver the URL asks for what its driver cannot do
    │   │   ├── UnknownOption      an option that does not exist
    │   │   ├── InvalidOption      an option or a variable with a value it cannot have
    │   │   ├── InvalidPath        a SQLite file that cannot be opened or written
    │   │   ├── NoMigrations       migrations were to run, and there are none
    │   │   └── TemplateUnusable   tests cannot clone their database
    │   ├── NotInitialized         used before `init()`
    │   ├── AlreadyInitialized     a second `init()` while open
    │   ├── ManagerClosed          used while or after `close()`
    │   ├── CloseInsideScope       `close()` inside a scope that it would wait for
    │   ├── NotEntered             a scope used without `with` (also an `AttributeError`)
    │   ├── AlreadyEntered         a scope entered again while it is open
    │   ├── WrongWith              `with` where `async with` belongs, or the other way
    │   ├── SessionClosed          a session used after its end
    │   ├── SessionInUse           a session used in the middle of another call of it
    │   ├── WrongThread            an asynchronous session used outside of its event loop
    │   ├── OutsideRequest         a framework's dependency called outside of a request
    │   ├── RollbackOnly           `commit()` after `rollback_only()`
    │   ├── AsyncCallback          a coroutine function where nobody can await it
    │   ├── SyncInAsync            a synchronous session inside a running event loop
    │   ├── SelfDeadlock           a SQLite writer that would wait for itself
    │   └── SandboxError           misuse of a sandbox
    │       ├── NotInSandbox       what one transaction cannot serve
    │       ├── SandboxConflict    sessions that cannot be served in turn
    │       └── SandboxEnded       a session used after the end of its sandbox
    ├── PoolTimeout                no connection in time (also SQLAlchemy's `TimeoutError`)
    │   ├── ConnectTimeout         none was opened
    │   └── PoolExhausted          none came free
    │       └── PoolDeadlock       none ever would: every holder waits for another one
    ├── CredentialsFailed          `username=` or `password=` gave none
    └── SchemaError                the tables of the database, and who makes them
        ├── SchemaLocked           another starter has not finished with them in time
        ├── BrokenReferences       rows would refer to nothing after a migration (SQLite)
        └── SchemaMismatch         they are not what this code knows

Errors of SQLAlchemy and of the drivers pass through unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


class InvalidCertificate(ConfigurationError):
    """A certificate or a key of TLS that is missing, cannot be read, or is none."""

    code = "invalid-certificate"


class UnsupportedByDriver(ConfigurationError):
    """The URL asks for what its driver cannot do; to do less would be to lower the guard."""

    code = "unsupported-by-driver"


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


class NoMigrations(ConfigurationError):
    """Migrations were to run, and no `alembic.ini` says where they are."""

    code = "no-migrations"


class TemplateUnusable(ConfigurationError):
    """The databases of tests cannot be cloned: no right to, or no template that can be."""

    code = "template-unusable"


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


class AlreadyEntered(UsageError):
    """A scope was entered again before its end."""

    code = "already-entered"


class WrongWith(UsageError):
    """`with` where `async with` belongs, or the other way round."""

    code = "wrong-with"


class SessionClosed(UsageError):
    """A session was used after its end, or was ended by `close()` or a fork."""

    code = "session-closed"


class SessionInUse(UsageError):
    """A session was used by one task or thread in the middle of another one's call."""

    code = "session-in-use"


class WrongThread(UsageError):
    """An asynchronous session was used in another thread than its event loop's."""

    code = "wrong-thread"


class OutsideRequest(UsageError):
    """A framework's dependency or session was asked for where it serves no request."""

    code = "outside-request"


class RollbackOnly(UsageError):
    """`commit()` was called on a session that `rollback_only()` had marked."""

    code = "rollback-only"


class AsyncCallback(UsageError):
    """`on_commit()` or `on_rollback()` of a synchronous session got a coroutine function."""

    code = "async-callback"


class SyncInAsync(UsageError):
    """A synchronous session was opened inside a running event loop, which it would stop."""

    code = "sync-in-async"


class SelfDeadlock(UsageError):
    """A SQLite writer would wait for itself: inside another, or in the forked child of one."""

    code = "self-deadlock"


class SandboxError(UsageError):
    """A sandbox where none can be: the manager is not open, is in use, or has one already."""

    code = "sandbox"


class NotInSandbox(SandboxError, AttributeError):
    """What one transaction cannot serve: it needs a database of its own."""

    code = "not-in-sandbox"


class SandboxConflict(SandboxError):
    """Sessions that cannot be served one after another in one transaction."""

    code = "sandbox-conflict"


class SandboxEnded(SandboxError):
    """A session used after the end of the sandbox that it was opened in."""

    code = "sandbox-ended"


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a connection in use."""

    owner: str
    """The task or thread, by name."""
    kind: str
    """The verb that opened its scope; `connection` where the engine itself was asked for one."""
    where: str
    """The line that opened the scope: `file:line in function`; without a scope, where it is now."""
    seconds: float
    """How long it has held it."""
    doing: str
    """`connecting`, `running for …: <statement>`, `idle in transaction for …` or `idle for …`."""
    pool: str = ""
    """Which pool lent it, where the limit is over several: side, role and the masked URL."""

    def __str__(self) -> str:
        at = "at" if self.kind == "connection" else "opened at"
        return (
            f"the {self.kind} of {self.owner}, {at} {self.where}, held for {self.seconds:.1f} s, "
            f"{self.doing}{self.pool and f' ({self.pool})'}"
        )


class PoolTimeout(EngineroomError, PoolTimeoutError):
    """No connection within `pool_timeout` seconds, waiting and connecting taken together."""

    code = "pool-timeout"  # type: ignore[misc]  # SQLAlchemy declares an instance's `code`


class ConnectTimeout(PoolTimeout):
    """No connection was opened in time: the server did not answer."""

    code = "connect-timeout"  # type: ignore[misc]


class PoolExhausted(PoolTimeout):
    """No connection came free in time: all are lent."""

    code = "pool-exhausted"  # type: ignore[misc]

    size: int
    """The connections that the pool keeps: `pool_size`."""
    overflow: int
    """The connections that it may open beyond those: `max_overflow`."""
    waiting: int
    """How many more callers wait."""
    holders: tuple[Holder, ...]
    """Who has the connections: since when, from which line, doing what."""

    def __init__(
        self,
        message: str,
        size: int = 0,
        overflow: int = 0,
        waiting: int = 0,
        holders: Sequence[Holder] = (),
    ) -> None:
        super().__init__(message)
        self.size = size
        self.overflow = overflow
        self.waiting = waiting
        self.holders = tuple(holders)


class PoolDeadlock(PoolExhausted):
    """No connection would ever come free: every holder waits for another one."""

    code = "pool-deadlock"  # type: ignore[misc]


class CredentialsFailed(EngineroomError):
    """A function that was asked who connects raised, did not answer in time, or gave no text."""

    code = "credentials-failed"


class SchemaError(EngineroomError):
    """The schema of the database: it cannot be changed now, or is not what the code needs."""

    code = "schema-error"


class SchemaLocked(SchemaError):
    """Another starter holds the lock of the schema, and did not give it back in time."""

    code = "schema-locked"


class BrokenReferences(SchemaError):
    """In a migration of a SQLite file, rows would lose the rows that they refer to."""

    code = "broken-references"


class SchemaMismatch(SchemaError):
    """The database does not stand where the code needs it."""

    code = "schema-mismatch"

    current: tuple[str, ...]
    """The revisions at which the database stands; none where nothing was ever migrated."""
    head: tuple[str, ...]
    """The revisions at which this code needs it; none without migrations."""
    missing: tuple[str, ...]
    """The revisions that were not run yet; without migrations, the tables that are not there."""
    unknown: tuple[str, ...]
    """Those of `current` that this code does not know: the database is ahead of it."""

    def __init__(
        self,
        message: str,
        current: Sequence[str] = (),
        head: Sequence[str] = (),
        missing: Sequence[str] = (),
        unknown: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.current = tuple(current)
        self.head = tuple(head)
        self.missing = tuple(missing)
        self.unknown = tuple(unknown)


class SyncInAsyncWarning(RuntimeWarning):
    """A synchronous session stops the event loop that it is used in, once per line."""
