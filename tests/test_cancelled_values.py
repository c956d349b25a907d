"""What was loaded stays readable after a scope that was cancelled (guarantee 12).

The other ways in which a scope can end stand in `behaviour/test_loaded_values.py`, for both twins.
"""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import String, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from engineroom import Base, DatabaseSessionManager


class Note(Base):
    __tablename__ = "cancelled_note"

    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str] = mapped_column(String(200))


async def in_a_statement(db: AsyncSession) -> None:
    postgresql = db.get_bind().dialect.name == "postgresql"
    await (db.execute(text("SELECT pg_sleep(60)")) if postgresql else asyncio.sleep(60))


async def in_the_body(db: AsyncSession) -> None:
    await asyncio.sleep(60)


async def run_out(limit: asyncio.Timeout, loaded: asyncio.Event) -> None:
    """Let a time be over in the moment in which all is loaded."""
    await loaded.wait()
    limit.reschedule(asyncio.get_running_loop().time())


@pytest.mark.parametrize("strike", [in_a_statement, in_the_body])
@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_cancelled_scope_leaves_what_was_seen_readable(url: str, strike, how: str) -> None:  # type: ignore[no-untyped-def]
    """Loaded, changed and new objects alike; and nothing was stored."""
    seen: list[Note] = []

    async def use(manager: DatabaseSessionManager, loaded: asyncio.Event) -> None:
        async with manager.session() as db:
            seen.append((await db.scalars(select(Note))).one())
            seen[0].body = "changed"
            seen.append(Note(id=2, body="new"))
            db.add(seen[1])
            await db.flush()
            loaded.set()
            await strike(db)

    async def main() -> None:
        async with DatabaseSessionManager().init(url) as manager:
            await manager.create_all()
            async with manager.session() as db:
                db.add(Note(id=1, body="stored"))
            loaded = asyncio.Event()
            if how == "cancel":
                task = asyncio.create_task(use(manager, loaded))
                await loaded.wait()
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as tasks:
                        tasks.create_task(run_out(limit, loaded))
                        await use(manager, loaded)
            assert [(note.id, note.body) for note in seen] == [(1, "changed"), (2, "new")]
            async with manager.session() as db:
                assert [note.body for note in await db.scalars(select(Note))] == ["stored"]

    asyncio.run(main())
