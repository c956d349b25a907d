"""The shop's own suite, which uses the pytest plugin and nothing else: on a server and a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engineroom.testing import PostgresServer

CHECKOUT = Path(__file__).parent.parent
SUITE = "tests/shop"


@pytest.mark.parametrize("kind", ["postgresql", pytest.param("sqlite", marks=pytest.mark.soak)])
def test_the_shops_own_suite(kind: str, pg18: PostgresServer) -> None:
    url = "sqlite://" if kind == "sqlite" else pg18.url()
    warnings = (
        *("-W", "error"),
        # pytest-asyncio's, and Starlette's about its test client.
        *("-W", "ignore:The configuration option:pytest.PytestDeprecationWarning"),
        *("-W", "ignore:The anyio.abc.BlockingPortal alias:DeprecationWarning"),
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *warnings),
            *("-c", f"{SUITE}/pytest.ini", SUITE),
        ],
        cwd=CHECKOUT,
        env=os.environ | {"DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "11 passed" in done.stdout, done.stdout + done.stderr
    left = pg18.execute("SELECT datname FROM pg_database WHERE datname LIKE 'engineroom%'")
    assert left == []
