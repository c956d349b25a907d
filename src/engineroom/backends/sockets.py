"""What is asked and done of a socket, whichever driver it belongs to."""

from __future__ import annotations

import ipaddress
import os
import socket
from asyncio import AbstractEventLoop, BaseEventLoop, Future
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

# Seconds after which the kernel asks a peer that is silent whether it is there, between two times
# that it asks, and how often; and those after which what it sent has to have arrived. A wire that
# was cut without a word is noticed in a minute, not in hours; a server that works is not, however
# long it does, for its kernel answers.
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 30, 10, 3
ARRIVES_WITHIN = 60


def keep_alive(descriptor: int | None) -> None:
    """Have the kernel find out in time that the peer of a TCP connection is gone."""
    if descriptor is None:
        return
    with duplicate(descriptor) as same:
        if same.family == socket.AF_UNIX:
            return
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, number in (
            ("TCP_KEEPIDLE", KEEPALIVE_IDLE),
            ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
            ("TCP_KEEPCNT", KEEPALIVE_COUNT),
            ("TCP_USER_TIMEOUT", ARRIVES_WITHIN * 1000),
        ):
            if hasattr(socket, name):  # not every system has each
                same.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), number)


def duplicate(descriptor: int) -> socket.socket:
    """Return the same socket under another descriptor, which the caller closes."""
    return socket.socket(fileno=os.dup(descriptor))


def shut(descriptor: int, how: int = socket.SHUT_RDWR) -> None:
    """Shut the socket, whoever else has it open."""
    with duplicate(descriptor) as same:
        same.shutdown(how)


def cut(descriptor: int | None, close: Callable[[], object], loop: AbstractEventLoop) -> None:
    """Close a connection of a loop that does not run; the server ends it when it sees that.

    A loop that was not closed may go on, even meanwhile, in its own thread: it closes it itself.

    Args:
        close: The driver's way to close it, without awaiting anything.
    """
    if descriptor is not None and descriptor >= 0:
        # Not for reading: whoever waits for the server to let go would see our own end.
        with suppress(OSError):  # the server was faster, or it was shut before
            shut(descriptor, socket.SHUT_WR)
    closing = Closing(close, loop)
    if loop.is_closed():
        closing.end()
    else:
        with suppress(RuntimeError):  # it is closed by now: nobody has the closing any more
            loop.call_soon_threadsafe(closing)


class Closing:
    """Has a loop close a connection; if nobody has the closing any more, the loop never will."""

    def __init__(self, close: Callable[[], object], loop: AbstractEventLoop) -> None:
        self._close: Callable[[], object] | None = close
        self._loop = loop

    def __call__(self) -> None:
        """Close it in its loop, which runs."""
        close, self._close = self._close, None
        if close is not None:
            close()

    def end(self) -> None:
        """Close it without its loop."""
        close, self._close = self._close, None
        if close is None:
            return
        loop = self._loop
        if isinstance(loop, BaseEventLoop):
            # asyncio closes its socket in a callback that this loop will never run: run it here.
            loop.call_soon = _run_unless_it_resumes_a_task  # type: ignore[method-assign,assignment]
            try:
                close()
            finally:
                vars(loop).pop("call_soon", None)  # (another thread may cut, too)
        else:  # uvloop's have closed their sockets themselves
            with suppress(RuntimeError):
                close()

    def __del__(self) -> None:
        self.end()  # a loop that is closed forgets what it was still asked for


def _run_unless_it_resumes_a_task(callback: Any, *args: Any, context: object = None) -> None:
    """Stand in for the `call_soon` of a loop that has ended: no task of it may go on in another."""
    if not isinstance(getattr(callback, "__self__", None), Future):
        callback(*args)


def disown(inherited: Iterable[tuple[int | None, Any]]) -> None:
    """Put the null device in the place of sockets that are the parent's, after a fork.

    It takes no descriptor more than there are: the process may have none left.

    Args:
        inherited: Descriptors, each with its transport of an event loop, or None without a loop.
    """
    opened = [
        (descriptor, transport) for descriptor, transport in inherited if descriptor is not None
    ]
    for descriptor, _ in opened:
        if descriptor >= 0:  # uvloop closes them with its loop
            with suppress(OSError):  # it is closed already
                os.close(descriptor)
                nothing = os.open(os.devnull, os.O_RDWR)
                if nothing != descriptor:
                    os.dup2(nothing, descriptor, inheritable=False)
                    os.close(nothing)
    for _, transport in opened:
        if transport is not None:
            # The inherited loop, if it runs in this child, would miss it at its end.
            with suppress(RuntimeError):  # it is closed, or was another thread's: it does not run
                transport.abort()


def address_of(descriptor: int | None) -> str | None:
    """Return who is at the other end; None where that is a socket of this machine."""
    if descriptor is None:
        return None
    with duplicate(descriptor) as same:
        return None if same.family == socket.AF_UNIX else str(same.getpeername()[0])


def port_of(descriptor: int | None) -> int:
    """Return the port at our end, by which the server knows a client; 0 where there is none.

    Or where it is not known: uvloop closes the sockets with the loop.
    """
    if descriptor is None or descriptor < 0:
        return 0
    with duplicate(descriptor) as same:
        return 0 if same.family == socket.AF_UNIX else int(same.getsockname()[1])


def is_one_place(host: str) -> bool:
    """Whether it is an address or a folder of sockets, and no name, which may have several."""
    if not host or host.startswith(("/", "@")):
        return True
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def is_far(address: str) -> bool:
    """Whether what is said to it leaves this machine."""
    return not ipaddress.ip_address(address.partition("%")[0]).is_loopback
