"""Why a server lets nobody in, and whether it will before long.

libpq keeps the SQLSTATE of a connect to itself, and its words depend on the server's language. So a
server that has refused is asked once more, by hand: it says so before it asks who is there.
"""

from __future__ import annotations

import getpass
import socket
import struct
from collections.abc import Mapping

from .parameters import DEFAULT_PORT

# cannot_connect_now: it starts, stops or recovers; too_many_connections; admin_shutdown
PASSING = ("57P03", "53300", "57P01")
AWAY = "it refuses connections"
PROTOCOL = 196608  # 3.0
LIMIT = 1.0  # seconds


def ask_why(parameters: Mapping[str, str], user: str | None, database: str | None) -> str:
    """Return why the hosts refuse, if that may pass; "" where one of them would talk to us."""
    hosts = parameters.get("host", "").split(",")
    ports = parameters.get("port", "").split(",")
    whys = []
    for number, host in enumerate(hosts):
        port = ports[number] if len(ports) == len(hosts) else ports[0]
        name = user or getpass.getuser()
        whys.append(_ask(host or "localhost", int(port or DEFAULT_PORT), name, database or name))
    return next((why for why in whys if why != AWAY), AWAY)


def _ask(host: str, port: int, user: str, database: str) -> str:
    try:
        if host.startswith("/"):
            asked = socket.socket(socket.AF_UNIX)
            asked.settimeout(LIMIT)
            asked.connect(f"{host}/.s.PGSQL.{port}")
        else:
            asked = socket.create_connection((host, port), LIMIT)
    except (ConnectionError, FileNotFoundError):
        return AWAY
    except OSError:  # no such host, or silence
        return ""
    with asked:
        words = f"user\0{user}\0database\0{database}\0\0".encode()
        try:
            asked.sendall(struct.pack("!ii", len(words) + 8, PROTOCOL) + words)
            answer = asked.recv(4096)
        except ConnectionError:
            return AWAY
        except OSError:
            return ""
    if not answer:
        return AWAY
    fields = answer[5:].split(b"\0") if answer[:1] == b"E" else []
    state = next((field[1:].decode() for field in fields if field[:1] == b"C"), "")
    return state if state in PASSING else ""
