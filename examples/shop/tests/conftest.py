"""The shop's tests: each has a shop of its own, in a sandbox."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from engineroom import DatabaseSessionManager
from examples.shop.service import app


@pytest.fixture
def shop(db_sandbox: DatabaseSessionManager) -> Iterator[TestClient]:
    """A client of the shop, which opens with full shelves."""
    with TestClient(app) as client:
        yield client
