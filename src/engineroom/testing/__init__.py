"""What tests of database code need: throwaway servers and a proxy that counts round trips.

Nothing in the rest of engineroom imports this package.
"""

from engineroom.testing.proxy import WireProxy
from engineroom.testing.servers import PostgresServer, postgres

__all__ = ["PostgresServer", "WireProxy", "postgres"]
