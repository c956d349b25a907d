"""What is asked and done of a socket, whichever driver it belongs to."""

from __future__ import annotations

import ipaddress
import os
import socket


def duplicate(descriptor: int) -> socket.socket:
    """Return the same socket under another descriptor, which the caller closes."""
    return socket.socket(fileno=os.dup(descriptor))


def shut(descriptor: int, how: int = socket.SHUT_RDWR) -> None:
    """Shut the socket, whoever else has it open."""
    with duplicate(descriptor) as same:
        same.shutdown(how)


def address_of(descriptor: int | None) -> str | None:
    """Return who is at the other end; None where that is a socket of this machine."""
    if descriptor is None:
        return None
    with duplicate(descriptor) as same:
        return None if same.family == socket.AF_UNIX else str(same.getpeername()[0])


def is_far(address: str) -> bool:
    """Whether what is said to it leaves this machine."""
    return not ipaddress.ip_address(address.partition("%")[0]).is_loopback
