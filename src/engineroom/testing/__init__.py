"""What tests of database code need: throwaway servers, faults on demand, and counted round trips.

Nothing in the rest of engineroom imports this package.
"""

from engineroom.testing.counting import assert_round_trips, record_statements
from engineroom.testing.faults import WireProxy
from engineroom.testing.servers import PostgresServer, postgres

__all__ = [
    "PostgresServer",
    "WireProxy",
    "assert_round_trips",
    "postgres",
    "record_statements",
]
