"""DatabaseSettings: what can be set, its environment name, its default."""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
from collections.abc import Awaitable, Callable, Iterable
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Literal, Self, TypedDict, Unpack

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import MetaData
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .errors import InvalidOption, InvalidURL, NoDatabaseURL, UnknownOption
from .secrecy import unseen
from .urls import ACCOUNT, has_account, in_full, read_url, replace_account

logger: logging.Logger = logging.getLogger("engineroom")

ALMOST = 0.905  # of difflib's ratio: DB_POLL_SIZE and DB_PASSWORT are, DB_PASSWD is not
TRUE = {"1", "true", "t", "yes", "y", "on"}


def read_seconds(value: object) -> object:
    """Read a time: a number of seconds, one with a unit, or a `timedelta`."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value), re.IGNORECASE)
    if match is None or match[2].lower() not in UNITS:
        raise ValueError("write seconds, or a number with its unit: 30, 500ms, 30s, 5min, 1h")
    return float(match[1]) * UNITS[match[2].lower()]


UNITS: dict[str, float] = {"": 1, "ms": 0.001, "s": 1, "sec": 1, "min": 60, "h": 3600}
# As many milliseconds as a C int counts, in which SQLite and libpq wait; 24 days, and portable.
LONGEST = 2_147_483
Seconds = Annotated[float, BeforeValidator(read_seconds), Field(allow_inf_nan=False, le=LONGEST)]


class DatabaseSettings(BaseSettings):
    """Everything that can be set; each field is read from `DB_<FIELD>` unless it says otherwise.

    Times are in seconds, or have a unit: "500ms", "30s", "5min", "1h". An argument of `init` comes
    before the environment, the environment before the default.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix="DB_", env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    # Essential
    database_url: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("DATABASE_URL", "DB_URL")
    )
    """Where the database is: from `DATABASE_URL` or `DB_URL`."""
    pool_size: int = Field(default=5, ge=1)
    """Connections kept open, per pool: one per role for the sync side and for each running loop."""
    max_overflow: int = Field(default=10, ge=0)
    """Connections opened beyond `pool_size` under load, and closed when they come back."""
    max_connections: int | None = Field(default=None, ge=1)
    """Connections that the process may have open, over all managers, pools, loops and roles."""

    # Frequent
    username: str | Callable[[], Any] | None = Field(default=None, exclude=True)
    """Who connects; as an argument it comes before the URL's, from `DB_USERNAME` after it."""
    password: SecretStr | Callable[[], Any] | None = Field(default=None, exclude=True)
    """Likewise (`DB_PASSWORD`); a function is asked at each physical connect."""
    pool_timeout: Seconds = Field(default=30.0, gt=0)
    """How long a caller waits for a connection, connecting included, before `PoolTimeout`."""
    response_timeout: Seconds = Field(default=30.0, gt=0)
    """How long the server may take to answer BEGIN and COMMIT; the connection is cut then."""
    pool_recycle: int = Field(default=3600, ge=-1)
    """The age at which a connection is replaced; -1: never."""
    pool_pre_ping: bool = False
    """Ask the server at every checkout; otherwise only when the socket speaks or was idle."""
    pooler: Literal["transaction", "session"] | None = None
    """PostgreSQL: the `pool_mode` of the pooler before the server (PgBouncer), if there is one."""
    pipeline: Literal["auto", "on", "off"] = "auto"
    """psycopg: whether BEGIN travels with the first statement; "auto": where the server is far."""
    pool_clean_always: bool = False
    """Clean every connection that comes back; otherwise only after what left something on it."""
    idle_in_transaction_timeout: Seconds = Field(default=60.0, ge=0)
    """PostgreSQL ends a connection that is idle in a transaction for so long; 0: never."""
    echo: bool = False
    """Log every statement with its parameters; `DEBUG=true` does so too."""
    debug: str = Field(default="", validation_alias=AliasChoices("DEBUG"))
    """Other programs' `DEBUG`: echo when it is plainly true, ignored when it is anything else."""
    expire_on_commit: bool = False
    """Forget what was loaded at each commit."""
    autoflush: bool = False
    """Send pending changes before each query."""

    # Infrequent
    pool_min: int = Field(default=0, ge=0)
    """Connections opened at the first use, beside it, and kept open; at most `pool_size`."""
    slow_checkout: Seconds = Field(default=30.0, gt=0)
    """A connection held for longer is reported in the log, once; at most `pool_timeout`."""
    statement_timeout: Seconds = Field(default=0.0, ge=0)
    """How long a statement may run before the server cancels it; 0: for any time."""
    lock_timeout: Seconds = Field(default=0.0, ge=0)
    """PostgreSQL cancels a statement that waits for a lock for so long; 0: none."""
    pool_ping_after: Seconds = Field(default=0.5, ge=0)
    """A connection idle for longer than this is asked whether it lives, in one round trip."""
    close_timeout: Seconds = Field(default=10.0, ge=0)
    """How long `close()` lets running scopes end before it rolls them back."""
    sync_in_async: Literal["warn", "error", "allow"] = "warn"
    """What a synchronous session inside a running event loop does."""
    busy_timeout: Seconds = Field(default=30.0, gt=0)
    """SQLite: how long a writer waits for another."""
    schema_timeout: Seconds = Field(default=300.0, ge=0)
    """How long one who creates or migrates tables waits for another who does."""
    alembic_ini: str = "alembic.ini"
    """Alembic's file, if there is one, for `check(schema=True)` and `lifespan(migrate=True)`."""
    dump_signal: str = ""
    """A signal ("SIGUSR1") that prints who holds and who waits, as `dump()` does."""

    _given: frozenset[str] = frozenset()

    @field_validator("pooler", mode="before")
    @classmethod
    def _is_a_mode(cls, mode: object) -> object:
        if mode == "statement":
            raise ValueError(
                "in statement mode a transaction has one statement, and a session needs more. Set "
                "the pooler's pool_mode to transaction, and this as well"
            )
        if mode not in {None, "transaction", "session"}:
            nearest = difflib.get_close_matches(str(mode), ["transaction", "session"], 1)
            hint = f"did you mean {nearest[0]}?" if nearest else "it is transaction or session."
            raise ValueError(f"{hint} Leave it out where no pooler stands before the server")
        return mode

    @field_validator("dump_signal")
    @classmethod
    def _is_a_signal(cls, name: str) -> str:
        if name and name not in signal.Signals.__members__:
            raise ValueError("it is not the name of a signal here (SIGUSR1 is a common one)")
        if name in {"SIGKILL", "SIGSTOP"}:
            raise ValueError("no process can handle this signal (SIGUSR1 is a common one)")
        return name

    @model_validator(mode="after")
    def _least_is_not_more(self) -> Self:
        if self.pool_min > self.pool_size:
            raise ValueError(
                f"DB_POOL_MIN={self.pool_min} is above DB_POOL_SIZE={self.pool_size}, the number "
                "of connections that are kept. Lower it, or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _least_is_allowed(self) -> Self:
        if self.max_connections is not None and self.pool_min > self.max_connections:
            raise ValueError(
                f"DB_POOL_MIN={self.pool_min} is above DB_MAX_CONNECTIONS={self.max_connections}, "
                "the number of connections that the process may have. Lower it, or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _slow_comes_before_exhausted(self) -> Self:
        if self.slow_checkout > self.pool_timeout and "slow_checkout" in self.model_fields_set:
            raise ValueError(
                f"DB_SLOW_CHECKOUT={self.slow_checkout:g} is above "
                f"DB_POOL_TIMEOUT={self.pool_timeout:g}: callers would give up before the log says "
                "who holds the pool. Set it to the timeout, or lower"
            )
        return self

    @property
    def slow_after(self) -> float:
        """The age at which a checkout is slow: no later than when others give up waiting for it."""
        return min(self.slow_checkout, self.pool_timeout)

    @property
    @unseen
    def url(self) -> URL:
        """The URL, read.

        Raises:
            NoDatabaseURL: there is none.
            InvalidURL: it is none.
        """
        if self.database_url is None:
            raise NoDatabaseURL(
                "There is no database URL: none was passed, and neither DATABASE_URL nor DB_URL is "
                'set. Pass one, init("postgresql://user:password@host/database"), or set '
                'DATABASE_URL; for a local file, init("sqlite:///app.db").'
            )
        try:
            url = read_url(self.database_url.get_secret_value())
        except InvalidURL as error:
            raise InvalidURL(f"{error.message} (It comes from DATABASE_URL or DB_URL.)") from None
        if url.get_backend_name() == "sqlite":
            return url
        for part in ACCOUNT:
            value = getattr(self, part)
            if value is not None and (part in self._given or not has_account(url, part)):
                url = replace_account(url, part, None if callable(value) else plain(value))
        return url

    @property
    def given(self) -> frozenset[str]:
        """The fields that were given as arguments."""
        return self._given

    @property
    def guards(self) -> dict[str, float]:
        """The server's deadlines that are set; one that is off, but not asked for, is its own."""
        return {
            name: getattr(self, name)
            for name in Guards.__annotations__
            if getattr(self, name) or name in self.model_fields_set
        }

    @property
    def shows_statements(self) -> bool:
        """Whether statements and their parameters are logged."""
        if "echo" in self.model_fields_set:
            return self.echo
        return self.debug.strip().lower() in TRUE


class Guards(TypedDict, total=False):
    """The deadlines of the server that a session may have of its own: seconds, and 0 for none."""

    idle_in_transaction_timeout: float | str | timedelta
    statement_timeout: float | str | timedelta
    lock_timeout: float | str | timedelta


def read_guards(guards: Guards) -> dict[str, float]:
    """Read the deadlines of a session.

    Raises:
        InvalidOption: one is not a time.
        TypeError: there is none of that name.
    """
    read: dict[str, float] = {}
    for name, value in guards.items():
        if name not in Guards.__annotations__:
            raise TypeError(f"session() got an unexpected keyword argument {name!r}")
        try:
            seconds = read_seconds(value)
            if not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST:
                raise ValueError(f"it has to be from 0 (none) to {LONGEST} seconds")
        except ValueError as error:
            raise InvalidOption(f"{name}={value!r} cannot be used: {error}.") from None
        read[name] = float(seconds)
    return read


class Options(TypedDict, total=False):
    """What `init` and `Database` take beside the URL: settings, and what no variable can say."""

    pool_size: int
    max_overflow: int
    max_connections: int
    pool_timeout: float | str | timedelta
    response_timeout: float | str | timedelta
    pool_recycle: int
    pool_pre_ping: bool
    pooler: Literal["transaction", "session"] | None
    pipeline: Literal["auto", "on", "off"]
    pool_clean_always: bool
    idle_in_transaction_timeout: float | str | timedelta
    statement_timeout: float | str | timedelta
    lock_timeout: float | str | timedelta
    username: str | Callable[[], str | Awaitable[str]]
    password: str | SecretStr | Callable[[], str | Awaitable[str]]
    echo: bool
    expire_on_commit: bool
    autoflush: bool
    pool_min: int
    slow_checkout: float | str | timedelta
    pool_ping_after: float | str | timedelta
    close_timeout: float | str | timedelta
    sync_in_async: Literal["warn", "error", "allow"]
    busy_timeout: float | str | timedelta
    schema_timeout: float | str | timedelta
    alembic_ini: str
    dump_signal: str

    session_class: type[Session]
    async_session_class: type[AsyncSession]
    metadata: MetaData
    engine_options: dict[str, Any]


# The options that are objects, which no environment variable can name.
OBJECTS: dict[str, type] = {
    "session_class": Session,
    "async_session_class": AsyncSession,
    "metadata": MetaData,
    "engine_options": dict,
}
# What engineroom itself decides about an engine, and how it is said instead.
RESERVED = {
    "poolclass": "the pool is engineroom's own",
    "pool": "the pool is engineroom's own",
    "creator": "use connect_args",
    "async_creator": "use connect_args",
    "pool_size": "init(pool_size=…)",
    "max_overflow": "init(max_overflow=…)",
    "pool_timeout": "init(pool_timeout=…)",
    "pool_use_lifo": "the pool is engineroom's own",
    "hide_parameters": "init(echo=…) shows them",
    "pool_recycle": "init(pool_recycle=…)",
    "pool_pre_ping": "init(pool_pre_ping=…)",
    "echo": "init(echo=…)",
}


def read_settings(
    database_url: str | URL | None = None, **options: Unpack[Options]
) -> DatabaseSettings:
    """Read the settings: arguments first, then the environment, then the defaults.

    Raises:
        UnknownOption: an option does not exist; the nearest one that does is named.
        InvalidOption: an option or a variable has a value that it cannot have.
    """
    check_names(options)
    mind_variables(os.environ)
    for name, kind in OBJECTS.items():
        if name in options:
            _check_object(name, options[name], kind)  # type: ignore[literal-required]
    for name in ACCOUNT:
        if name in options:
            _check_account(name, options[name])  # type: ignore[literal-required]
    for name in options.get("engine_options", {}):
        if name in RESERVED:
            raise InvalidOption(
                f"engine_options cannot carry {name!r}, which engineroom sets: {RESERVED[name]}."
            )
    given: dict[str, Any] = {name: value for name, value in options.items() if name not in OBJECTS}
    if database_url is not None:
        # By its variable's name: older versions of pydantic-settings would prefer the variable.
        given["DATABASE_URL"] = in_full(read_url(database_url))
    try:
        settings = DatabaseSettings(**given)
        settings._given = frozenset(given)
        return settings
    except ValidationError as error:
        raise _invalid(error, given) from None  # pydantic's own text would show the value


URLS = ("database_url", "url")


def check_names(options: Iterable[str]) -> None:
    """Refuse options that do not exist.

    Raises:
        UnknownOption: the nearest one that does is named.
    """
    for name in options:
        if name not in Options.__annotations__:
            nearest = difflib.get_close_matches(name, [*Options.__annotations__, *URLS], 1)
            hint = f"Did you mean {nearest[0]}?" if nearest else _known()
            raise UnknownOption(f"There is no option {name}. {hint}")


def mind_variables(names: Iterable[str]) -> None:
    """Log which variable has almost the name of one that is read: it may be somebody else's."""
    known = ["DB_URL", *(f"DB_{field}".upper() for field in DatabaseSettings.model_fields)]
    for name in names:
        if (spelt := name.upper()).startswith("DB_") and spelt not in known:
            for nearest in difflib.get_close_matches(spelt, known, 1, ALMOST):
                logger.warning("%s is set, and nothing reads it. Did you mean %s?", name, nearest)


def _known() -> str:
    return "The options are: " + ", ".join([*URLS, *Options.__annotations__]) + "."


def _check_object(name: str, value: object, kind: type) -> None:
    """Refuse what is not what an option takes: a class for a class, else an instance."""
    wants_class = name.endswith("_class")
    if wants_class and isinstance(value, type) and issubclass(value, kind):
        return
    if not wants_class and isinstance(value, kind):
        return
    wanted = f"a subclass of {kind.__name__}" if wants_class else f"a {kind.__name__}"
    shown = value.__name__ if isinstance(value, type) else type(value).__name__
    raise InvalidOption(f"{name}= takes {wanted}, not {shown}. Leave it out for the default.")


def _check_account(name: str, value: object) -> None:
    """Refuse what is no text, and no function that may return one; it is never shown."""
    if not isinstance(value, str | SecretStr) and not callable(value):
        raise InvalidOption(
            f"{name}= takes a text or a function that returns one, not {type(value).__name__}."
        )


def plain(value: str | SecretStr) -> str:
    """Return the text of a setting that may be masked."""
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _invalid(error: ValidationError, given: dict[str, Any]) -> InvalidOption:
    problem = error.errors(include_url=False)[0]
    if not problem["loc"]:  # two fields that do not go together: the message names both
        return InvalidOption(f"{problem['ctx']['error']!s}.")
    field, why = str(problem["loc"][0]), problem["msg"].removeprefix("Value error, ")
    name = f"{field}=" if field in given else field if field.isupper() else f"DB_{field.upper()}"
    shown = given.get(field, os.environ.get(name, problem["input"]))  # as it was written
    return InvalidOption(
        f"{name}{'' if name.endswith('=') else '='}{shown!r} cannot be used: "
        f"{why[0].lower()}{why[1:]}. The default is "
        f"{DatabaseSettings.model_fields[field].default!r}."
        if field in DatabaseSettings.model_fields
        else f"{name} cannot be used: {why}."
    )
