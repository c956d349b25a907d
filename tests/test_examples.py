"""The examples run as they stand, on a real server; the README's first lines are one of them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import served
from sqlalchemy import MetaData
from sqlalchemy.orm import registry

from engineroom import Base

CHECKOUT = Path(__file__).parent.parent
EXAMPLES = ["fastapi_items.py", "starlette_items.py"]  # Flask's and Litestar's: in their tests


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to run in, and a `Base` without the tables of other tests."""
    monkeypatch.chdir(tmp_path)
    models = registry(metadata=MetaData(naming_convention=Base.metadata.naming_convention))
    monkeypatch.setattr(Base, "metadata", models.metadata)
    monkeypatch.setattr(Base, "registry", models)
    monkeypatch.setattr(Base, "_sa_registry", models)
    return tmp_path


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_stores_items_and_lists_them(example: str, empty: Path) -> None:
    app: Any = runpy.run_path(str(CHECKOUT / "examples" / example))["app"]
    with served(app) as base, httpx.Client(base_url=base) as client:
        answer = client.post("/items", params={"name": "anvil"})
        assert (answer.status_code, answer.json()) == (201, 1)
        assert client.get("/items").json() == ["anvil"]
    assert [path.name for path in empty.iterdir()] == ["items.db"]


def test_the_first_lines_of_the_readme_are_the_example() -> None:
    _, _, code = (CHECKOUT / "examples" / "fastapi_items.py").read_text().partition('"""\n\n')
    assert f"```python\n{code}```" in (CHECKOUT / "README.md").read_text()
