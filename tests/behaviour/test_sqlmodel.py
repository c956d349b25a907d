"""SQLModel's models and both of its session classes work, `exec` included."""

from __future__ import annotations

from typing import Any

import pytest
from sqlmodel import Field, SQLModel, select
from sqlmodel import Session as ModelSession
from sqlmodel.ext.asyncio.session import AsyncSession as AsyncModelSession

from engineroom import SessionClosed


class Hero(SQLModel, table=True):
    __tablename__ = "behaviour_hero"

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(max_length=50)


@pytest.fixture
def heroes(open_door: Any, twin: str) -> Any:
    """A door with SQLModel's session classes; its tables are made by the first test's line."""
    return open_door(async_session_class=AsyncModelSession, metadata=SQLModel.metadata)


def test_sqlmodels_session_classes_exec(heroes: Any, plain: Any, twin: str) -> None:
    heroes.create_all()
    with heroes.session() as db:
        assert isinstance(plain(db), ModelSession if twin == "sync" else AsyncModelSession)
        db.add(Hero(name="Ada"))
    with heroes.session() as db:
        assert [hero.name for hero in db.exec(select(Hero))] == ["Ada"]
    with heroes.reader() as db:
        hero = db.exec(select(Hero)).one()
    assert hero.name == "Ada"


def test_sqlmodels_exec_is_refused_after_the_scope(heroes: Any) -> None:
    with heroes.session() as db:
        pass
    with pytest.raises(SessionClosed):
        db.exec(select(Hero))


def test_sqlmodels_synchronous_class_alone_is_enough(open_door: Any, plain: Any) -> None:
    door = open_door(session_class=ModelSession, metadata=SQLModel.metadata)
    door.create_all()
    with door.session() as db:
        assert isinstance(getattr(plain(db), "sync_session", plain(db)), ModelSession)
        db.add(Hero(name="Ada"))
    with door.session() as db:
        assert [hero.name for hero in db.scalars(select(Hero))] == ["Ada"]


def test_sqlmodels_check_gives_no_deprecation(heroes: Any) -> None:
    """`check()` uses the session class of the user without a warning of it."""
    assert heroes.check().seconds > 0


def test_sqlmodels_objects_stay_readable_after_a_rollback(heroes: Any) -> None:
    heroes.create_all()
    with pytest.raises(ValueError, match="mine"), heroes.session() as db:
        hero = Hero(name="Ada")
        db.add(hero)
        db.flush()
        raise ValueError("mine")
    assert hero.name == "Ada"
    assert hero.id is not None
