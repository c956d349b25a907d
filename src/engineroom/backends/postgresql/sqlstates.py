"""What the server calls an error, on every driver."""

from __future__ import annotations

PROTOCOL_VIOLATION = "08P01"  # what PgBouncer says to all that it does not take


def sqlstate(error: BaseException | None) -> str | None:
    """Return the code that the server gave an error of a driver, or of SQLAlchemy's adapter."""
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
