"""What nothing may say that these tests print, log or have a process of theirs print.

Each server's password is known here, as the values are that many tests bind: `conftest` looks for
them in the output and the log of every test, whatever it tests, and in those of the processes that
it starts.
"""

from __future__ import annotations

import subprocess
from typing import Any

BOUND = "kn0wn-mark"
KNOWN = {BOUND: "a bound value"}
# Ours is heard from DEBUG on; not SQLAlchemy's of the pools, whose records keep the connections.
LEVELS = {"engineroom": "DEBUG", "engineroom.engines": "WARNING"}


def refuse(text: str) -> None:
    """Fail if a text has any of it."""
    for secret, what in KNOWN.items():
        if secret in text:
            line = next(line for line in text.splitlines() if secret in line)
            raise AssertionError(f"{what} is shown: {line.replace(secret, '***')}")


class Listening(subprocess.Popen[Any]):
    """A process whose output is looked through where it is read as a whole."""

    def communicate(self, *args: Any, **kw: Any) -> tuple[Any, Any]:
        said = super().communicate(*args, **kw)
        for one in said:
            refuse(one.decode(errors="replace") if isinstance(one, bytes) else one or "")
        return said
