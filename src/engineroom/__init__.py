"""engineroom: the database session manager for SQLAlchemy."""

from .cap import CapInfo
from .checking import CheckResult
from .database import Database
from .engines import PoolInfo, Stats
from .errors import (
    ConfigurationError,
    EngineroomError,
    PoolExhausted,
    SessionClosed,
    SyncInAsyncWarning,
    UsageError,
)
from .hooks import on_commit, on_rollback, rollback_only
from .ledger import ScopeInfo
from .manager import DatabaseSessionManager, session_manager
from .models import Base
from .settings import DatabaseSettings

__all__ = [
    "Base",
    "CapInfo",
    "CheckResult",
    "ConfigurationError",
    "Database",
    "DatabaseSessionManager",
    "DatabaseSettings",
    "EngineroomError",
    "PoolExhausted",
    "PoolInfo",
    "ScopeInfo",
    "SessionClosed",
    "Stats",
    "SyncInAsyncWarning",
    "UsageError",
    "on_commit",
    "on_rollback",
    "rollback_only",
    "session_manager",
]
