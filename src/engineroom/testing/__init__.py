"""What tests of database code need: sandboxes, clones, servers, faults, counted round trips.

Nothing in the rest of engineroom imports this package.
"""

from engineroom.testing.clones import Template, clones
from engineroom.testing.counting import Recording, Statement, assert_round_trips, record_statements
from engineroom.testing.faults import Fault, Message, WireProxy, kill_backends
from engineroom.testing.sandbox import Sandbox, sandbox
from engineroom.testing.servers import PostgresServer, postgres

__all__ = [
    "Fault",
    "Message",
    "PostgresServer",
    "Recording",
    "Sandbox",
    "Statement",
    "Template",
    "WireProxy",
    "assert_round_trips",
    "clones",
    "kill_backends",
    "postgres",
    "record_statements",
    "sandbox",
]
