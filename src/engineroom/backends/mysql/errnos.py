"""What the server says by number: SQLSTATEs of MySQL are too coarse to tell its errors apart."""

from __future__ import annotations

NO_RIGHT = 1044
REFUSED = (1045, 1698)  # of the user or the password; MariaDB has its own where none was given
NO_DATABASE = (1049,)
FULL = (1040, 1203, 1226)  # of the server, and of this user (MariaDB has a second number for that)
BLOCKED = (1129, 1130)  # this host: after too many errors, and by nobody's GRANT
NO_TLS = 2026  # by PyMySQL, of a server that speaks none
SHUTTING_DOWN = (1053,)
UNREACHED = (2002, 2003, 2005, 2006, 2013)  # by the drivers, which number theirs as well
NO_SUCH_THREAD = 1094
READ_ONLY_TRANSACTION = 1792


def errno(error: BaseException | None) -> int | None:
    """Return the number that the server gave an error of a driver, or of SQLAlchemy around it."""
    original = getattr(error, "orig", None) or error
    first = original.args[0] if original is not None and original.args else None
    return first if isinstance(first, int) else None
