"""The same, asynchronous."""

from __future__ import annotations

from . import CALLS, SECRET, AccessToken


class DefaultAzureCredential:
    async def get_token(self, *scopes: str) -> AccessToken:
        CALLS.append(scopes)
        return AccessToken(SECRET, 0)
