"""As much of Vault's client as docs/credentials.md uses, with its answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

ACCOUNT = {"username": "app", "password": "first"}
CALLS: list[str] = []


class Client:
    def __init__(self, url: str) -> None:
        self.secrets = SimpleNamespace(database=self)

    def generate_credentials(self, name: str) -> dict[str, Any]:
        CALLS.append(name)
        return {"lease_duration": 3600, "data": dict(ACCOUNT)}
