"""Guarantee 2: wherever and however often a cancellation strikes, it leaves nothing behind."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from scenario import ASYNC_DRIVERS, LOOPS, is_postgres, run, run_on
from strikes import KINDS, LOADS, POOLS, fight

from engineroom.testing import PostgresServer


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh database for a driver."""
    if request.param == "aiosqlite":
        value: str = request.getfixturevalue("sqlite_url")
        return value.replace("sqlite:", "sqlite+aiosqlite:")
    server: PostgresServer = request.getfixturevalue("pg18")
    return server.url(request.getfixturevalue("database"), request.param)


def struck(
    url: str, loop: str, ground: str, plan: list[tuple[str, str, str]], stride: int
) -> list[dict[str, Any]]:
    return run_on(loop, fight(ground, url, plan, stride))
