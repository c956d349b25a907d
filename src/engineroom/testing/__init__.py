"""What tests of database code need: throwaway servers, clones, and a proxy that counts round trips.

Nothing in the rest of engineroom imports this package.
"""

from engineroom.testing.clones import Template, clones
from engineroom.testing.proxy import WireProxy
from engineroom.testing.servers import PostgresServer, postgres

__all__ = ["PostgresServer", "Template", "WireProxy", "clones", "postgres"]
