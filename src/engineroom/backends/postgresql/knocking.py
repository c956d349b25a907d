"""Asks a server that lets nobody in why: as a stranger, or once more as libpq did."""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

from ...secrecy import unseen

PROTOCOL = 196608  # 3.0
STRANGER = b"user\0engineroom\0\0"  # it need not exist: a server that starts refuses everybody
HELLO = struct.pack("!II", len(STRANGER) + 8, PROTOCOL) + STRANGER
WISH_FOR_TLS = struct.pack("!II", 8, 80877103)
ANSWERS = (b"E", b"R", b"v")  # an error, who are you, and not this version
LONGEST = 10_000  # bytes of an error
STATE_OF_ERROR = re.compile(rb'\tErrorResponse\t S "[^"]*"(?: V "[^"]*")? C "(\w{5})"')


# What is left of them: psycopg leaves 4 kB behind with each. Nobody needs so many.
traces: Iterator[int] = iter(range(1000))


class NoPostgreSQL(Exception):
    """What answers there is something else."""


class NoTLS(Exception):
    """The server does not speak TLS."""


class Silent(TimeoutError):
    """Somebody listens there, and says nothing."""


def knock(host: str, port: int, seconds: float, *, needs_tls: bool) -> str | None:
    """Say hello as a stranger, and return the SQLSTATE of the refusal; None if there was none.

    Args:
        seconds: For all of it.
        needs_tls: Ask whether there is TLS, too.

    Raises:
        NoPostgreSQL: something else answers.
        NoTLS: there is none.
        OSError: there is no server, it is silent, or it hangs up.
    """
    end = time.monotonic() + seconds
    if needs_tls and _wish_for_tls(host, port, end) == b"N":
        raise NoTLS
    with _opened(host, port, end) as line:
        line.sendall(HELLO)
        kind = _read(line, 1, end)
        if kind not in ANSWERS:
            raise NoPostgreSQL
        length = int.from_bytes(_read(line, 4, end)) - 4
        if not 0 <= length <= LONGEST:
            raise NoPostgreSQL
        if kind != b"E":
            return None
        fields = _read(line, length, end).split(b"\0")
    return next(
        (field[1:].decode("ascii", "replace") for field in fields if field[:1] == b"C"), None
    )


def answers(host: str, port: int, seconds: float) -> bool:
    """Whether a server says anything in that time."""
    with suppress(OSError):
        return bool(_wish_for_tls(host, port, time.monotonic() + seconds))
    return False


def _wish_for_tls(host: str, port: int, end: float) -> bytes:
    """Return what the server says to that: every one does, in one byte."""
    with _opened(host, port, end) as line:
        line.sendall(WISH_FOR_TLS)
        return _read(line, 1, end)


def _opened(host: str, port: int, end: float) -> socket.socket:
    if not host.startswith("/"):
        return socket.create_connection((host, port), _left(end))
    opened = socket.socket(socket.AF_UNIX)
    try:
        opened.settimeout(_left(end))
        opened.connect(f"{host}/.s.PGSQL.{port}")
    except BaseException:
        opened.close()
        raise
    return opened


def _left(end: float) -> float:
    """Return the seconds that are left; a socket's own limit is for each call."""
    if (left := end - time.monotonic()) <= 0:
        raise TimeoutError("The server did not answer")
    return left


def _read(line: socket.socket, size: int, end: float) -> bytes:
    read = b""
    while len(read) < size:
        try:
            line.settimeout(_left(end))
            some = line.recv(size - len(read))
        except TimeoutError:
            raise Silent from None
        if not some:
            raise ConnectionResetError("The server hung up")
        read += some
    return read


@unseen
def ask_again(options: Mapping[str, str], seconds: float) -> str | None:
    """Connect once more as libpq did, and return the SQLSTATE that it keeps to itself.

    Its trace of what the server says has it. None where there is no trace (beside Linux, or after
    so many), no refusal, or no answer in time.
    """
    from psycopg import Error, pq
    from psycopg.conninfo import make_conninfo

    if not hasattr(os, "memfd_create") or next(traces, None) is None:
        return None
    end, state = time.monotonic() + seconds, pq.PollingStatus.WRITING
    events = {pq.PollingStatus.READING: select.POLLIN, pq.PollingStatus.WRITING: select.POLLOUT}
    with os.fdopen(os.memfd_create("engineroom"), "rb") as trace:  # (the password may be in it)
        pgconn = pq.PGconn.connect_start(make_conninfo(**options).encode())
        try:
            pgconn.trace(trace.fileno())
            while state in events:
                ready = select.poll()
                ready.register(pgconn.socket, events[state])
                ready.poll(_left(end) * 1000)
                state = pq.PollingStatus(pgconn.connect_poll())
            pgconn.untrace()
        except (Error, OSError):
            return None
        finally:
            pgconn.finish()
        trace.seek(0)
        states = STATE_OF_ERROR.findall(trace.read())
    return states[-1].decode() if states else None
