"""check(): what is reached and how, what is wrong with that, and what to do about it."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.engine import Connection

from .backends import ASK_FOR, Diagnosis
from .engines import EngineRoom, PoolInfo
from .errors import ConnectTimeout, CredentialsFailed, InvalidOption
from .schema import mind_schema, revisions_of
from .urls import masked

logger: logging.Logger = logging.getLogger("engineroom")

LARGEST_SKEW = 1.0  # seconds between two clocks that nobody minds
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0  # seconds between two tries; each is half as long again
TELL_EVERY = 5.0  # seconds
LEAST = 0.5  # seconds for the last try to connect
FIRST_TRY = 5.0  # seconds: a proxy may keep it silent for ever

NO_CONNECT = Diagnosis(
    True,
    "no connection was made in time",
    "See that host and port are right, and that no firewall is between.",
)
NO_CREDENTIALS = Diagnosis(
    True,
    "username= or password= did not answer in time",
    "See that what they ask can be reached from here.",
)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A database that answers: what it is, how it was reached, and what is wrong with that.

    >>> with Database("sqlite://") as db:
    ...     db.check().problems
    ()
    """

    url: str
    """Where it was reached, with its secrets masked."""
    server: str
    """Its name and version."""
    role: str
    """`primary` or `standby`."""
    driver: str
    """SQLAlchemy's name of it."""
    address: str | None
    """The address at the other end, a proxy's or pooler's perhaps; None on this machine's own."""
    tls: str | None
    """The version of TLS; `TLS` where psycopg does not tell it, and None without."""
    pooler: str | None
    """`transaction` or `session` as it was declared, `undeclared`, or None."""
    seconds: float
    """How long all of it took: the pool, the connect where one was needed, and the answer."""
    latency: float
    """How long the answer took (seconds)."""
    skew: float | None
    """How far the database's clock is ahead of ours (seconds), by half of `latency` at most wrong;
    None where there is one clock."""
    pools: tuple[PoolInfo, ...]
    """The pools of this process that lead there."""
    problems: tuple[str, ...]
    """What is wrong though it answers, each with what to do."""

    def __str__(self) -> str:
        """Write it down for a person."""
        way = ", ".join(
            part
            for part in (
                self.driver,
                f"to {self.address}" if self.address else "on this machine",
                self.tls or ("without TLS" if self.address else ""),
                f"through a pooler ({self.pooler})" if self.pooler else "",
            )
            if part
        )
        lines = [
            f"{self.url} answers in {self.latency * 1000:.1f} ms",
            f"  server   {self.server}, {self.role}",
            f"  way      {way}",
        ]
        if self.skew is not None:
            lines.append(f"  clock    {self.skew:+.2f} s beside this machine's")
        lines += [
            f"  pool     {pool.side} {pool.role}: {pool.lent} of {pool.size} + {pool.overflow} "
            f"lent, {pool.idle} idle, {pool.waiting} waiting"
            for pool in self.pools
        ]
        lines += [f"  problem  {problem}" for problem in self.problems]
        return "\n".join(lines)


class Check:
    """One check, from its question to its result."""

    def __init__(self, room: EngineRoom, *, schema: bool) -> None:
        if not room.life.is_usable:  # no scope has asked yet, and there are no settings before
            raise room.life.refusal("check()")
        self._room = room
        self._schema = schema
        self._revisions = revisions_of(room.settings) if schema else None
        self._started = time.perf_counter()

    def begin(self) -> None:
        """Count the time from here on."""
        self._started = time.perf_counter()

    def ask(self, connection: Connection) -> None:
        """Ask the database what it is, and whether it stands where the code needs it."""
        settings = self._room.settings
        self._driver = connection.dialect.driver
        sees = self._room.sandbox is None
        driver = connection.connection.driver_connection if sees else None
        self._reached = self._room.backend.look(
            connection, driver, settings.pool_size + settings.max_overflow
        )
        if self._schema:
            mind_schema(connection, self._room.metadata, self._revisions)

    def result(self) -> CheckResult:
        """Say what was found, once it has answered."""
        found, problems = self._reached, list(self._reached.problems)
        if found.skew is not None and abs(found.skew) > LARGEST_SKEW + found.latency / 2:
            problems.append(
                f"The database's clock and this machine's are {abs(found.skew):.1f} s apart, so "
                "what one writes is in the other's past or future. Have both ask a time server."
            )
        return CheckResult(
            url=masked(self._room.settings.url),
            server=found.server,
            role=found.role,
            driver=self._driver,
            address=found.address,
            tls=found.tls,
            pooler=found.pooler,
            seconds=time.perf_counter() - self._started,
            latency=found.latency,
            skew=found.skew,
            pools=self._room.stats().pools,
            problems=tuple(problems),
        )


class Wait:
    """How long to wait for a database that does not answer, and what is said meanwhile.

    Raises:
        InvalidOption: `seconds` is no such number.
    """

    def __init__(self, room: EngineRoom, seconds: float | None) -> None:
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if seconds is not None and not (is_number and math.isfinite(seconds) and seconds >= 0):
            raise InvalidOption(
                f"check(wait={seconds!r}) cannot be: it is a number of seconds, such as 30, or is "
                "left out."
            )
        self._room = room
        self.is_asked: bool = seconds is not None and room.sandbox is None
        self._seconds = seconds or 0.0
        self._started = time.monotonic()
        self._pause = FIRST_PAUSE
        self._tries = 0
        self._doubts = 0  # how often in turn it did not look as if it would pass
        self._told: tuple[str, float] = ("", -math.inf)
        self._known = NO_CONNECT  # what was found last: a try that is cut off finds nothing new

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._seconds - (time.monotonic() - self._started)

    @property
    def limit(self) -> float | None:
        """Seconds for the next try to connect; None where nobody waits, and the settings say."""
        if not self.is_asked:
            return None
        waited = self._seconds - self.left  # a later try has as long: the server may be slow
        return round(max(min(self.left, max(FIRST_TRY, waited)), LEAST), 2)

    def pause_after(self, error: Exception) -> float:
        """Return for how many seconds to wait before the next try.

        Raises:
            Exception: the error, with a note of why and what to do, where there is no next one.
        """
        self._tries += 1
        why = self._diagnose(error)
        if why is None:
            raise error
        self._doubts = 0 if why.passes else self._doubts + 1
        passes = why.passes or (not why.is_certain and self._doubts < 2)
        if not passes or self.left <= 0:
            told = "".join(getattr(error, "__notes__", ()))
            if why.cure not in told:  # (the pool has told, where nobody waits)
                error.add_note(
                    f"{masked(self._room.settings.url)}: {why.what}. {why.cure}{self._tried()}"
                )
            raise error
        self._tell(why)
        pause = min(self._pause, self.left)
        self._pause = min(self._pause * 1.5, LONGEST_PAUSE)
        return max(pause, 0.0)

    def _tried(self) -> str:
        if not self._seconds:
            return ""
        tries = "1 try" if self._tries == 1 else f"{self._tries} tries"
        waited = time.monotonic() - self._started
        return f" (check(wait={self._seconds:g}): {tries} in {waited:.1f} s.)"

    def _diagnose(self, error: Exception) -> Diagnosis | None:
        if isinstance(error, ConnectTimeout):
            return self._known
        if isinstance(error, CredentialsFailed) and isinstance(error.__cause__, TimeoutError):
            return NO_CREDENTIALS if self.is_asked else None
        whole = self._seconds if self.is_asked else self._room.settings.pool_timeout
        left = max(whole - (time.monotonic() - self._started), LEAST)
        why = self._room.backend.diagnose(getattr(error, "orig", None) or error, min(left, ASK_FOR))
        self._known = why or NO_CONNECT
        return why

    def _tell(self, why: Diagnosis) -> None:
        """Say why one waits: at once, when that changes, and now and then."""
        what, at = self._told
        if why.what == what and time.monotonic() - at < TELL_EVERY:
            return
        self._told = why.what, time.monotonic()
        line = (
            f"Waiting for {masked(self._room.settings.url)}, up to {max(self.left, 0):.0f} s more: "
            f"{why.what}"
        )
        logger.info(line)
        shows = logger.hasHandlers() and logger.isEnabledFor(logging.INFO)
        if not shows and sys.stderr is not None and sys.stderr.isatty():
            print(line, file=sys.stderr, flush=True)  # noqa: T201


def said(error: BaseException) -> str:
    """Return an error with what was noted beside it, for a log."""
    notes: Sequence[str] = getattr(error, "__notes__", ())
    return "\n".join([repr(error), *notes])
