"""Who looks after threads that wait for a silent server: one thread, for as long as any may."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from contextlib import suppress
from typing import Protocol

logger: logging.Logger = logging.getLogger("engineroom.pool")

LOOK_EVERY = 0.25  # seconds between two looks at what runs
LINGER = 1.0  # seconds that the thread stays though nothing is lent
GRACE = 0.5  # seconds that the server has to keep its own `statement_timeout` before we do


class Watched(Protocol):
    """A pool whose connections are looked at while any of them is lent."""

    def look(self, now: float) -> bool:
        """End what has waited for too long; whether anything is lent."""

    def part(self) -> bool:
        """Ask at the next checkout to be watched again; whether anything was lent meanwhile."""


class Watch:
    """Looks at the pools of all threads; an event loop looks by timers of its own.

    There is no lock that a fork may find taken: each step is one of a dictionary.
    """

    def __init__(self) -> None:
        self.disown()

    def disown(self) -> None:
        """Start afresh, in a forked child as well: the thread is the parent's."""
        # And when something of it was last seen lent. (Who drops a manager drops its pools.)
        self._pools: weakref.WeakKeyDictionary[Watched, float] = weakref.WeakKeyDictionary()
        self._failed: weakref.WeakSet[Watched] = weakref.WeakSet()  # of which the log has heard
        self._on_duty: dict[str, threading.Thread] = {}
        self._pausing = threading.Event()

    def look_after(self, pool: Watched) -> None:
        """Look at a pool from now on, until nothing of it was lent for a while."""
        self._pools[pool] = time.monotonic()
        self._resume()

    def pause(self) -> None:
        """End the thread before a fork, which would have Python warn of it."""
        thread = self._on_duty.get("thread")
        if thread is not None and thread is not threading.current_thread():
            self._pausing.set()
            thread.join(LOOK_EVERY)

    def resume(self) -> None:
        """Go on after a fork, in the parent, if anything is lent."""
        if self._pausing.is_set():
            self._pausing = threading.Event()
            for known in self._pools.keyrefs():
                if (pool := known()) is not None:
                    self._part(pool)
            self._resume()

    def _resume(self) -> None:
        if self._pools and "thread" not in self._on_duty:
            thread = threading.Thread(target=self._run, name="engineroom-deadlines", daemon=True)
            if self._on_duty.setdefault("thread", thread) is thread:
                try:
                    thread.start()
                except RuntimeError:  # the interpreter is at its end
                    self._on_duty.clear()

    def _run(self) -> None:
        """Look until nothing is lent any more, at what came after the last look as well."""
        me = threading.current_thread()
        try:
            self._stay(me)
        except BaseException:
            self._on_duty.pop("thread", None)  # the next checkout has another one watch
            raise

    def _stay(self, me: threading.Thread) -> None:
        while self._on_duty.setdefault("thread", me) is me:
            pausing = self._pausing
            while self._pools and not pausing.wait(LOOK_EVERY):
                self._look()
            self._on_duty.pop("thread", None)
            if not self._pools or (pausing.is_set() and self._pausing is pausing):
                return

    def _look(self) -> None:
        now = time.monotonic()
        for known in self._pools.keyrefs():  # in one step: other threads add theirs meanwhile
            if (pool := known()) is None:
                continue
            if self._looks(pool, now):
                self._pools[pool] = now
            elif now - self._pools.get(pool, now) > LINGER:
                self._part(pool)

    def _looks(self, pool: Watched, now: float) -> bool:
        """Look at one pool; whatever that raises, the others are looked after."""
        try:
            return pool.look(now)
        except Exception:
            if pool not in self._failed:
                self._failed.add(pool)
                with suppress(Exception):  # of the application's own handler, or its filter
                    logger.exception("A pool could not be looked after")
            return True

    def _part(self, pool: Watched) -> None:
        """Look at a pool no more, unless something of it is lent: its next checkout will say so."""
        self._pools.pop(pool, None)
        if pool.part():
            self._pools[pool] = time.monotonic()


WATCH: Watch = Watch()
