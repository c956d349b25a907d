"""What tests of database code need: throwaway servers, faults on demand, and counted round trips.

Nothing in the rest of engineroom imports this package.
"""

from engineroom.testing.counting import Recording, Statement, assert_round_trips, record_statements
from engineroom.testing.faults import Fault, Message, WireProxy, kill_backends
from engineroom.testing.servers import PostgresServer, postgres

__all__ = [
    "Fault",
    "Message",
    "PostgresServer",
    "Recording",
    "Statement",
    "WireProxy",
    "assert_round_trips",
    "kill_backends",
    "postgres",
    "record_statements",
]
