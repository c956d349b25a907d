"""The recipes of docs/credentials.md connect, with a fake of each provider's client."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from looking import DRIVERS, look

from engineroom.testing import PostgresServer

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "credentials.md").read_text()
FAKES = ("boto3", "hvac", "azure", "azure.identity", "azure.identity.aio")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(ROOT / "tests" / "fakes")
    yield
    for name in FAKES:
        sys.modules.pop(name, None)


@pytest.fixture
def role(pg18: PostgresServer) -> Iterator[str]:
    pg18.execute("CREATE ROLE app LOGIN PASSWORD 'first'")
    yield "app"
    pg18.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename='app'")
    pg18.execute("DROP ROLE app")


def recipe(heading: str) -> dict[str, Any]:
    """Run the examples under a heading, and return what they define."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [one for one in section if one.startswith(heading)]
    defined: dict[str, Any] = {"__name__": "recipe"}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, heading, "exec", dont_inherit=True), defined)
    return defined


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.usefixtures("fakes")
def test_the_recipes_connect(driver: str, pg18: PostgresServer, role: str) -> None:
    place = f"{pg18.host}:{pg18.port}/postgres"
    amazon = recipe("Amazon RDS")
    assert look(f"postgresql://{role}@{place}", driver, password=amazon["token"]) == 1
    assert amazon["boto3"].CALLS[-1] == ("db.example", 5432, "app")

    azure = recipe("Azure")
    assert look(f"postgresql://{role}@{place}", driver, password=azure["entra_token"]) == 1
    if driver == "asyncpg":
        given = azure["entra_token_async"]
        assert look(f"postgresql://{role}@{place}", driver, password=given) == 1

    vault = recipe("Vault")
    lease = vault["lease"]
    for _ in range(2):
        user = look(
            f"postgresql://{place}",
            driver,
            "SELECT current_user",
            username=lease.username,
            password=lease.password,
        )
        assert user == role
    assert vault["hvac"].CALLS == ["app"]  # one lease
    reused_for = lease._until - time.monotonic()
    oldest = vault["database"]._room.settings.pool_recycle
    assert 0 < reused_for + oldest < 3600  # no connection outlives its user
