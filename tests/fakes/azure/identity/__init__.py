"""As much of Azure's client as docs/credentials.md uses, with its answers."""

from __future__ import annotations

from typing import NamedTuple

SECRET = "first"
CALLS: list[tuple[str, ...]] = []


class AccessToken(NamedTuple):
    token: str
    expires_on: int


class DefaultAzureCredential:
    def get_token(self, *scopes: str) -> AccessToken:
        CALLS.append(scopes)
        return AccessToken(SECRET, 0)
