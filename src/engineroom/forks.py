"""What a fork leaves in the child, and how the child parts with it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

TASKS = Path("/proc/self/task")  # the threads of this process, as Linux counts them
LEAVE_WITHIN = 0.25  # seconds that a thread has to go, once Python has done with it
STRANGERS = {"seen": 0}  # threads that are not Python's: nobody waits for them a second time


def let_threads_end() -> None:
    """Wait, before a fork, for threads that have ended and yet are there.

    `Thread.join()` returns when Python has done with a thread; what C libraries do at its end comes
    after that. OpenSSL, which libpq uses, takes a lock there: a fork at that moment would leave it
    locked in the child, whose first connect would wait for it for ever.
    """
    deadline = time.monotonic() + LEAVE_WITHIN
    while threads := known_to_linux():
        more = threads - threading.active_count()
        if time.monotonic() > deadline:
            STRANGERS["seen"] = more
        if more <= STRANGERS["seen"]:
            return
        time.sleep(0.001)


def known_to_linux() -> int:
    """Count the threads of this process as its system does; 0 where that cannot be asked."""
    try:
        return len(list(TASKS.iterdir()))
    except OSError:  # no Linux, or no descriptor left
        return 0


def part_event_loops(inherited: Iterable[asyncio.AbstractEventLoop]) -> None:
    """Give the event loops that a forked child inherited an epoll set of their own.

    A fork shares the set itself: a child that leaves its inherited loop, by returning through
    `asyncio.run`, would take out of it what the parent's loop waits for.
    """
    try:
        descriptors = list(Path("/proc/self/fd").iterdir())
    except OSError:  # no Linux, no epoll: a kqueue is not inherited; or no descriptor left
        return
    for descriptor in descriptors:
        try:
            if str(descriptor.readlink()) == "anon_inode:[eventpoll]":
                with select.epoll() as empty:
                    os.dup2(empty.fileno(), int(descriptor.name), inheritable=False)
        except OSError:  # the descriptor of the listing itself is gone by now
            continue
    uvloop = sys.modules.get("uvloop.loop")
    for loop in inherited:
        if uvloop is not None and isinstance(loop, uvloop.Loop) and not loop.is_closed():
            with suppress(AttributeError):  # a build that hides libuv's names
                part_uvloop(loop, uvloop)


def part_uvloop(loop: asyncio.AbstractEventLoop, uvloop: Any) -> None:
    """Have libuv make anew what an inherited loop shares with the parent.

    Besides the epoll set that is a ring of io_uring, in memory that both would write to: the next
    one to do so would be aborted. libuv asks for this call after every fork; uvloop makes it
    only for the processes that it starts itself, but lends the loop's address to who will.
    """
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    libuv = ctypes.CDLL(uvloop.__file__)
    libuv.uv_loop_fork(ctypes.c_void_p(address(uvloop.libuv_get_loop_t_ptr(loop), None)))


def make_immortal(forgotten: object) -> None:
    """Keep an object from ever being destroyed, the interpreter's own end included."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(forgotten))
