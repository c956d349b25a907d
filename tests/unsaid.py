"""What nothing may say that these tests print, log, raise or have a process of theirs print.

Each server's password is known here, and a value that each row of `scenario.Item` binds. They are
looked for in the output and the log of every test, whatever it tests, in the errors that it
expects, and in what the processes say that it starts.
"""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from engineroom.secrecy import chain

BOUND = "kn0wn-mark"
KNOWN = {BOUND: "a bound value"}
# Ours is heard from DEBUG on; not SQLAlchemy's of the pools, whose records keep the connections.
LEVELS = {"engineroom": "DEBUG", "engineroom.engines": "WARNING"}
QUOTING = ("psycopg2", "pymysql", "asyncmy")  # these write the values into the statement
OF_URL = re.compile(r"://[^:/@]*:([^:/@]{8,})@")


def learn(url: object) -> None:
    """Know the password of a URL from now on."""
    if isinstance(url, str) and (found := OF_URL.search(url)):
        KNOWN.setdefault(found[1], "the password of a server")


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


def look_through_errors() -> None:
    """Have `pytest.raises` look through what it catches, and all that this came of."""
    leave = pytest.RaisesExc.__exit__

    def look_and_leave(
        self: pytest.RaisesExc[Any], kind: Any, error: BaseException | None, traceback: Any
    ) -> bool:
        for each in chain(error):
            said = f"{each} {each.args!r} {getattr(each, '__notes__', '')}"
            if isinstance(orig := getattr(each, "orig", each), BaseException) and (
                type(orig).__module__.partition(".")[0] in QUOTING
            ):
                said = said.replace(BOUND, "")
            refuse(said)
        return leave(self, kind, error, traceback)

    # No hook of pytest is told of an error that a test expects.
    pytest.RaisesExc.__exit__ = look_and_leave  # type: ignore[method-assign]


look_through_errors()
