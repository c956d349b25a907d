"""What a COMMIT does beside keeping rows: it checks constraints, and ends settings."""

from __future__ import annotations

from collections.abc import Iterable

from ..backends.postgresql import sqlstate
from .connection import DEFERRABLE, HeldConnection, joined
from .parts import CHECK, Part

WAIT = "SET CONSTRAINTS ALL DEFERRED"
FAILED = "25P02"  # the SQLSTATE of a transaction in which a statement has failed


class Commits:
    """What is known of the constraints that can wait for COMMIT, and how they are checked."""

    def __init__(self, connection: HeldConnection) -> None:
        self._connection = connection
        self._count: int | None = None  # None: not known
        self._immediate: list[str] = []  # those of them that do not wait by themselves

    def begin(self) -> None:
        """Begin, on the connection."""
        self._count = 0 if self._connection.begin() == 0 else None

    @property
    def may_take_long(self) -> bool:
        """Whether there is something to be checked, as far as is known."""
        return self._count != 0

    def doubt(self) -> None:
        """Note that the schema may have changed."""
        self._count, self._immediate = None, []

    def check(self, part: Part) -> None:
        """Check what waits for COMMIT; errors are the application's."""
        self._connection.send(part.check)

    def release(self, part: Part) -> None:
        """Have all wait again as they do by themselves, and release the savepoint of a part."""
        if self._immediate:
            self._immediate = self._find_immediate()
        control = self._connection.control
        end = [self._defer(part), f"RELEASE SAVEPOINT {part.savepoint}"]
        if not self.may_take_long:  # then the check costs no message of its own
            end = ["SAVEPOINT engineroom_check", part.check, *end]
        try:
            count = control(joined(end, part.settings, [DEFERRABLE]))
        except Exception as error:
            if not self.may_take_long and sqlstate(error) != FAILED:
                control("ROLLBACK TO SAVEPOINT engineroom_check")
                self.check(part)  # the same as an error for the application
            raise
        if count != self._count:  # a function may have made some: no text says so
            self._count, self._immediate = count, self._find_immediate() if count else []
            control(self._defer(part))

    def excuse(self, part: Part) -> None:
        """Have the COMMIT of a part not check what those below it violate for the moment."""
        part.check, part.violates = CHECK, []
        if self.may_take_long and not self._holds("ALL"):
            names = [name for name, _ in self._find_deferrable()]
            part.violates = [name for name in names if not self._holds(name)]
            good = [name for name in names if name not in part.violates]
            part.check = f"SET CONSTRAINTS {', '.join(good)} IMMEDIATE" if good else "SELECT 1"

    def _holds(self, name: str) -> bool:
        self._connection.control("SAVEPOINT engineroom_check")
        try:
            self._connection.send(f"SET CONSTRAINTS {name} IMMEDIATE")
        except Exception as error:
            if sqlstate(error) is None:
                raise
            return False
        else:
            return True
        finally:
            self._connection.control(
                "ROLLBACK TO SAVEPOINT engineroom_check; RELEASE SAVEPOINT engineroom_check"
            )

    def _find_deferrable(self) -> list[tuple[str, bool]]:
        """Look up which constraints and triggers can wait for COMMIT; and which do."""
        return [
            (name, waits)
            for name, waits in self._connection.send(
                # A constraint trigger has a row there as well. Tables may share a name.
                "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.conname) AS name, "
                "bool_or(c.condeferred) FROM pg_constraint c "
                "JOIN pg_namespace n ON n.oid = c.connamespace "
                "WHERE c.condeferrable GROUP BY name ORDER BY name"
            )
        ]

    def _find_immediate(self) -> list[str]:
        return [name for name, waits in self._find_deferrable() if not waits]

    def _defer(self, part: Part) -> str:
        """Return what has them wait again, as they do by themselves."""
        names = [name for name in self._immediate if name not in part.violates]
        return f"{WAIT}; SET CONSTRAINTS {', '.join(names)} IMMEDIATE" if names else WAIT

    def settings(self, names: Iterable[str]) -> dict[str, str]:
        """Return the settings of these names, as far as there are such."""
        settings = {}
        for name in names:
            ((value,),) = self._connection.send(f"SELECT current_setting('{name}', true)")
            if value is not None or "." in name:
                settings[name] = value or ""
        return settings
