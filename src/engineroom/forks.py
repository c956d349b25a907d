"""What a fork leaves in the child, and how the child parts with it."""

from __future__ import annotations

import ctypes
import os
import select
from pathlib import Path


def part_event_loops() -> None:
    """Give the event loops that a forked child inherited an epoll set of their own.

    A fork shares the set itself: a child that leaves its inherited loop, by returning through
    `asyncio.run`, would take out of it what the parent's loop waits for.
    """
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():  # no Linux, no epoll: a kqueue is not inherited
        return
    for descriptor in list(descriptors.iterdir()):
        try:
            if str(descriptor.readlink()) == "anon_inode:[eventpoll]":
                with select.epoll() as empty:
                    os.dup2(empty.fileno(), int(descriptor.name), inheritable=False)
        except OSError:  # the descriptor of the listing itself is gone by now
            continue


def make_immortal(forgotten: object) -> None:
    """Keep an object from ever being destroyed, the interpreter's own end included."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(forgotten))
