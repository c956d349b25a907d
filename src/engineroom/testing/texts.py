"""What the text of a statement says before it is sent: whether it ends what it must not end."""

from __future__ import annotations

import re
from typing import Any

from ..backends.postgresql import sqlstate
from ..errors import NotInSandbox

CURE = 'Give this test a database of its own: sandbox(manager, isolation="database").'

# What ends the outer transaction, or cannot run in one.
ESCAPES = re.compile(
    r"(?:^|;)\s*(?:COMMIT|END|ABORT|BEGIN|START\s+TRANSACTION|PREPARE\s+TRANSACTION"
    r"|ROLLBACK(?!\s+(?:WORK\s+|TRANSACTION\s+)?TO\b))\b",
    re.IGNORECASE,
)
REFUSED = {  # by SQLSTATE
    "25001": "it cannot run inside a transaction block",
    "2D000": "it ends a transaction",
}
# The name of a setting that lasts until the end of the transaction, which here is the sandbox's.
SET_LOCAL = re.compile(r"\bSET\s+LOCAL\s+(?!SESSION\b)([\w.\"]+)", re.IGNORECASE)
SET_CONFIG = re.compile(r"\bset_config\s*\(\s*(?:'([\w.]+)')?", re.IGNORECASE)
SETTING = re.compile(r"[a-z_]\w*(?:\.\w+)*", re.IGNORECASE)
CHANGES_SCHEMA = re.compile(r"(?:^|;)\s*(?:CREATE|ALTER|DROP|DO|CALL)\b", re.IGNORECASE)
# A savepoint of the application's own.
POINT = re.compile(
    r"\s*(SAVEPOINT|RELEASE|ROLLBACK)\b(?:\s+(?:WORK|TRANSACTION))?(?:\s+TO)?(?:\s+SAVEPOINT)?"
    r"\s+(\"[^\"]+\"|\w+)\s*;?\s*$",
    re.IGNORECASE,
)
QUOTED = re.compile(
    r"--[^\n]*|/\*|\bE'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'"
    r"|\"(?:[^\"]|\"\")*\"|\$(?P<tag>\w*)\$.*?\$(?P=tag)\$",
    re.DOTALL | re.IGNORECASE,
)
COMMENT = re.compile(r"/\*|\*/")


def code_of(statement: str) -> str:
    """Return a statement without what is in quotes and comments, which nest."""
    code, start = [], 0
    while found := QUOTED.search(statement, start):
        code += [statement[start : found.start()], " "]
        start = found.end()
        depth = 1 if found.group() == "/*" else 0
        while depth:
            mark = COMMENT.search(statement, start)
            if mark is None:
                return "".join(code)
            depth += 1 if mark.group() == "/*" else -1
            start = mark.end()
    return "".join([*code, statement[start:]])


def refuse_escape(text: str) -> None:
    """Refuse a statement that would end the outer transaction.

    Raises:
        NotInSandbox: it would.
    """
    if found := ESCAPES.search(text):
        verb = " ".join(found.group().strip("; \n").split()).upper()
        raise NotInSandbox(
            f"{verb} was sent as text, inside a sandbox: it would end the transaction that is to "
            f"be rolled back. Use the session's own commit() and rollback(). Or: {CURE}"
        )


def refuse_by_state(error: BaseException) -> None:
    """Say what an error of the server has to do with the sandbox.

    Raises:
        NotInSandbox: one transaction cannot serve the statement.
    """
    state = sqlstate(error)
    if state in REFUSED:
        raise NotInSandbox(
            f"The server refused a statement, for {REFUSED[state]}, and in a sandbox everything "
            f"runs in one. {CURE}"
        ) from error


def own_savepoint(statement: str) -> tuple[str, str]:
    """Return what a statement does with a savepoint, and with which; or nothing, twice."""
    found = POINT.match(statement)
    return (found.group(1).upper(), found.group(2)) if found else ("", "")


def local_settings(text: str, statement: str, parameters: Any) -> set[str]:
    """Return the names of the settings that a statement changes until COMMIT.

    Args:
        text: The statement without what is in quotes.
    """
    names = {name.replace('"', "") for name in SET_LOCAL.findall(statement)}
    if "set_config" in text.lower() and (found := SET_CONFIG.findall(statement)):
        given = parameters.values() if isinstance(parameters, dict) else parameters or ()
        names |= {*filter(None, found)}
        names |= {g for g in given if isinstance(g, str) and SETTING.fullmatch(g)}
    return {"timezone" if name.upper() == "TIME" else name for name in names}
