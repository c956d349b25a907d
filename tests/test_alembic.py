"""`engineroom.alembic`: a ready `env.py`, whose migrations run once (guarantee 13)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from starting import alembic, project, starters

from engineroom import Database
from engineroom.testing import PostgresServer


@pytest.fixture(params=["pg16", "pg18", "sqlite"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a fresh database, on each that the guarantee names."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_url")
        return
    server: PostgresServer = request.getfixturevalue(request.param)
    name = server.create_database()
    yield server.url(name)
    server.drop_database(name)


def steps(url: str) -> list[str]:
    """Return what the migrations did, by its side effects."""
    with Database(url) as database, database.connect() as connection:
        return list(connection.scalars(text("SELECT step FROM ran ORDER BY step")))


def all_upgrade(url: str, ini: Path, count: int = 16) -> None:
    with starters(count, alembic, str(ini), "-x", f"url={url}", "upgrade", "head") as crowd:
        for starter in crowd:
            starter.begin()
        ends = [starter.ended() for starter in crowd]
    assert [(code, err) for code, _, err in ends if code] == []
    assert steps(url) == ["first", "second"]


def test_sixteen_upgrade_at_once_and_each_migration_runs_once(place: str, tmp_path: Path) -> None:
    all_upgrade(place, project(tmp_path))


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("again", range(10))
def test_sixteen_upgrade_at_once_again_and_again(again: int, place: str, tmp_path: Path) -> None:
    all_upgrade(place, project(tmp_path))
