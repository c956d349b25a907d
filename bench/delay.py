"""A proxy that lets every byte wait: half of a round trip on its way there, half on its way back.

    python bench/delay.py HOST PORT SECONDS

It prints its port, and ends when its standard input does. It has a process of its own, so that a
client's CPU is the client's. It delays and does not slow: any number of messages may be on their
way at once, as on a long wire.
"""

from __future__ import annotations

import ctypes
import select
import signal
import socket
import sys
import time
from collections import deque


def precise_timers() -> None:
    """Have the kernel wake us when we said, and not up to 50 µs later (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK, in ns


def serve(host: str, port: int, one_way: float) -> None:
    """Pass bytes on, each after its time; the delay is the same for all, so a queue keeps order."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(listener.getsockname()[1], flush=True)
    peers: dict[socket.socket, socket.socket] = {}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        timeout = max(0.0, waiting[0][0] - time.perf_counter()) if waiting else None
        for ready in select.select([sys.stdin, listener, *peers], [], [], timeout)[0]:
            if ready is sys.stdin:
                return
            if ready is listener:
                client, server = listener.accept()[0], socket.create_connection((host, port))
                for one, other in ((client, server), (server, client)):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                    peers[one] = other
                continue
            try:
                data = ready.recv(1 << 16)
            except OSError:
                data = b""
            waiting.append((time.perf_counter() + one_way, peers[ready], data))
            if not data:
                del peers[ready]
        while waiting and waiting[0][0] <= time.perf_counter():
            _, other, data = waiting.popleft()
            pass_on(other, data)


def pass_on(other: socket.socket, data: bytes) -> None:
    """Send what has waited; nothing is the end of it."""
    try:
        if data:
            other.sendall(data)
        else:
            other.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other end has gone


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    precise_timers()
    serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 2)
