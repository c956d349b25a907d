"""What tests of database code need: sandboxes, throwaway servers, a proxy that counts round trips.

Nothing in the rest of engineroom imports this package.
"""

from engineroom.testing.proxy import WireProxy
from engineroom.testing.sandbox import Sandbox, sandbox
from engineroom.testing.servers import PostgresServer, postgres

__all__ = ["PostgresServer", "Sandbox", "WireProxy", "postgres", "sandbox"]
