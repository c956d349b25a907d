"""What a statement of MySQL leaves on its connection, as far as its text tells.

Of what it knows to leave nothing it is sure; whatever else there is, it counts as having left. A
mistake to that side costs a connect, to the other one a tenant's data.
"""

from __future__ import annotations

import re

FLAGS = re.IGNORECASE | re.VERBOSE | re.DOTALL

# Statements that leave nothing, where none of the signs below is in them.
PLAIN = re.compile(r"(?:select|insert|update|delete)\s", FLAGS)
SIGNS = (
    *(";", "@", ":=", "/*", "--", "#"),
    *("get_lock", "last_insert_id", "next", "setval"),
)

# Strings and comments, but for those that are carried out (/*! … */); names keep what they say.
UNSPOKEN = re.compile(
    r"""
    '(?>(?:[^'\\]++|\\.|'')*)' | "(?>(?:[^"\\]++|\\.|"")*)" | (`[^`]*+`)
    | /\*(?!M?!).*?\*/ | \#[^\n]* | --(?=[\x00-\x20]|\Z)[^\n]*
    """,
    FLAGS,
)
HARMLESS = r"""
    (?: select | insert | update | delete | replace | with | values | table | truncate
        | begin (?:\s+work)? \s* (?=;|\Z) | start \s+ transaction | commit | rollback
        | savepoint | release | show | desc | describe | explain | analyze
        | create (?!\s+ (?:or\s+replace\s+)? temporary\b) | drop (?!\s+ (?:database|schema)\b)
        | alter | rename | grant | revoke | check | checksum | optimize | repair | kill
        | set \s+ statement \s [\w\s=.,]*? \s for \s+ (?:select|insert|update|delete)
    ) (?!\w)
"""
LEAVES = re.compile(
    rf"""
    ^ [\s(]*+ (?! ;|\Z|{HARMLESS} )
    | ; [\s;]*+ (?!\Z)  # several statements: who knows of which one was answered last
    | := | \binto\s*@ | /\* | \bget_lock\b
    """,
    FLAGS,
)
# An INSERT leaves such a number in any case.
NUMBERS = re.compile(
    r"\b(?: nextval | setval | next\s+value\s+for | last_insert_id`?\s*\((?!\s*\)) )", FLAGS
)
INSERT = re.compile(r"\s*insert\b", FLAGS)


def leaves(text: str, *, has_escapes: bool = True) -> bool:
    """Whether a text may leave something.

    Args:
        has_escapes: Whether a backslash in a string escapes what follows it (sql_mode).
    """
    if PLAIN.match(text):
        lowered = text.lower()
        for sign in SIGNS:
            if sign in lowered:
                break
        else:
            return False
    if not has_escapes and "\\" in text:
        return True
    spoken = UNSPOKEN.sub(r"\1 ", text)
    if LEAVES.search(spoken):
        return True
    return NUMBERS.search(spoken) is not None and not INSERT.match(spoken)
