"""A load that keeps a ledger of its own: what each unit was told, against what is stored."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psycopg
from scenario import Item
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from engineroom import DatabaseSessionManager


def let_go(error: BaseException | None) -> None:
    """Have an error keep no frame: its locals are sessions and connections."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


@dataclass
class Accounts:
    """What the units were told."""

    done: set[int] = field(default_factory=set)
    failed: dict[int, BaseException] = field(default_factory=dict)
    unknown: dict[int, BaseException] = field(default_factory=dict)
    last_done: float = 0.0
    began: dict[int, float] = field(default_factory=dict)
    closed: Counter[str] = field(default_factory=Counter)  # how many were compared and forgotten

    def fail(self, number: int, error: Exception) -> None:
        """Note a failure; of a COMMIT that met a dead connection nobody knows the outcome."""
        is_commit = isinstance(error, DBAPIError) and error.statement is None
        let_go(error)
        (self.unknown if is_commit else self.failed)[number] = error

    def succeed(self, number: int) -> None:
        self.done.add(number)
        self.began.pop(number, None)
        self.last_done = time.monotonic()

    def compare(self, stored: set[int]) -> None:
        """Nothing that was told as done is lost; nothing that was told as failed is there."""
        assert self.done - stored == set()
        assert stored - self.done - set(self.unknown) == set()
        assert stored & set(self.failed) == set()

    def close(self, raw: psycopg.Connection[Any]) -> None:
        """Compare what was told so far, and forget it, so that a long run keeps no long ledger."""
        done, failed, unknown = set(self.done), set(self.failed), set(self.unknown)
        stored = {number for (number,) in raw.execute("SELECT id FROM item")}
        assert done - stored == set()
        assert failed & stored == set()
        raw.execute("DELETE FROM item WHERE id = ANY(%s)", [list(done | unknown)])
        self.done -= done
        for number in failed | unknown:
            self.failed.pop(number, None)
            self.unknown.pop(number, None)
            self.began.pop(number, None)
        self.closed.update(done=len(done), failed=len(failed), unknown=len(unknown))


class Load:
    """Units of work on one manager: from tasks, and from threads on its synchronous side."""

    def __init__(self, manager: DatabaseSessionManager) -> None:
        self.manager = manager
        self.accounts = Accounts()
        self.numbers = itertools.count(1)
        self.stop = threading.Event()

    async def task(self) -> None:
        while not self.stop.is_set():
            number = next(self.numbers)
            self.accounts.began[number] = time.monotonic()
            try:
                async with self.manager.session() as db:
                    await db.execute(insert(Item).values(id=number))
                    await db.execute(text("SELECT 1"))
            except Exception as error:
                self.accounts.fail(number, error)
            else:
                self.accounts.succeed(number)
            await asyncio.sleep(0.002)

    async def stored(self) -> set[int]:
        async with self.manager.session() as db:
            return set(await db.scalars(select(Item.id)))

    def thread(self, _: int = 0) -> None:
        while not self.stop.is_set():
            number = next(self.numbers)
            self.accounts.began[number] = time.monotonic()
            try:
                with self.manager.sync_session() as db:
                    db.execute(insert(Item).values(id=number))
                    db.execute(text("SELECT 1"))
            except Exception as error:
                self.accounts.fail(number, error)
            else:
                self.accounts.succeed(number)
            time.sleep(0.002)


class WatchedLoad(Load):
    """Notes of each unit that failed on which backend it was, and when it was lent that."""

    def __init__(self, manager: DatabaseSessionManager) -> None:
        super().__init__(manager)
        self.lent: dict[int, tuple[int, float]] = {}

    def unit(self, db: Session, number: int) -> None:
        """Insert a row, and ask once more."""
        began = time.monotonic()
        raw = db.connection().connection
        self.lent[number] = backend_of(raw.driver_connection), began
        db.execute(insert(Item).values(id=number))
        # It may be another one by now, if the first was dead before anything was done.
        self.lent[number] = backend_of(raw.driver_connection), began
        db.execute(text("SELECT 1"))

    async def task(self) -> None:
        while not self.stop.is_set():
            number = next(self.numbers)
            try:
                async with self.manager.session() as db:
                    await db.run_sync(self.unit, number)
            except Exception as error:
                self.accounts.fail(number, error)
            else:
                self.accounts.succeed(number)
            await asyncio.sleep(random.uniform(0, 0.1))

    def thread(self, _: int = 0) -> None:
        while not self.stop.is_set():
            number = next(self.numbers)
            try:
                with self.manager.sync_session() as db:
                    self.unit(db, number)
            except Exception as error:
                self.accounts.fail(number, error)
            else:
                self.accounts.succeed(number)
            time.sleep(random.uniform(0, 0.1))


def backend_of(driver: Any) -> int:
    if hasattr(driver, "get_server_pid"):  # asyncpg
        return int(driver.get_server_pid())
    return int(driver.info.backend_pid)
