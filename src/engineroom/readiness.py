"""Tells whether the database answers: in time, and without waiting behind the pool."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from .checking import CheckResult, said
from .errors import SchemaMismatch
from .manager import DatabaseSessionManager, session_manager
from .requests import ASGIScope, Receive, Send

logger: logging.Logger = logging.getLogger("engineroom")


class Readiness:
    """An application for one path: 200 if the database answers in time, else 503.

        app.routes.append(Route("/ready", Readiness()))

    It does not wait behind the pool: where that has no connection to lend, it opens one. Probes
    that come while one is under way share its answer.

    Args:
        manager: Whose database.
        timeout: Seconds for the answer.
        schema: Also ask whether it stands where this code needs it; one that newer code has
            migrated does, for this worker serves on until it is replaced.
    """

    def __init__(
        self,
        manager: DatabaseSessionManager = session_manager,
        timeout: float = 2.0,
        *,
        schema: bool = False,
    ) -> None:
        self.manager: DatabaseSessionManager = manager
        self.timeout: float = timeout
        self.schema: bool = schema
        self._probe: asyncio.Task[CheckResult] | None = None

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Answer one probe."""
        said = await self._ask()
        status = 503 if {"unavailable", "behind"} & {*said.values()} else 200
        body = json.dumps(said).encode()
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _ask(self) -> dict[str, Any]:
        probe = self._probe
        here = asyncio.get_running_loop()
        if probe is None or probe.done() or probe.get_loop() is not here:
            probe = self._probe = asyncio.ensure_future(self.manager.check(schema=self.schema))
        # Not `wait_for`: a server that is silent would have its connection's end awaited, too.
        await asyncio.wait((probe,), timeout=self.timeout)
        if not probe.done():
            probe.cancel()
            logger.warning("The database did not answer a probe within %g s", self.timeout)
        elif probe.cancelled():  # by one that had shared it, and said so
            pass
        elif isinstance(error := probe.exception(), SchemaMismatch):
            logger.warning("The schema is not what a probe asked for: %s", error)
            return {"database": "ok", "schema": "newer" if error.unknown else "behind"}
        elif error is not None:
            logger.warning("The database did not answer a probe: %s", said(error))
        else:
            return {"database": "ok", "seconds": round(probe.result().seconds, 4)}
        return {"database": "unavailable"}
