"""The docs say what the code says: a heading for each error code, a line for each setting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engineroom import DatabaseSettings, errors

DOCS = Path(__file__).parent.parent / "docs"


def headings(page: str) -> set[str]:
    """Return the headings of a page that are code, such as error codes."""
    return set(re.findall(r"^#+ `([^`]+)`", (DOCS / page).read_text(), re.MULTILINE))


def error_classes() -> list[type[errors.EngineroomError]]:
    classes = [errors.EngineroomError]
    for each in classes:
        classes += each.__subclasses__()
    return [each for each in classes if each.__module__ == errors.__name__]


# The branches of the tree: they are caught, never raised.
ABSTRACT = {"engineroom-error", "usage-error", "configuration-error"}


def test_each_error_code_has_a_heading_and_each_heading_a_code() -> None:
    codes = {each.code for each in error_classes()} - ABSTRACT
    assert len(codes) > 10
    assert headings("errors.md") == codes


def test_error_codes_are_slugs_and_unique() -> None:
    codes = [each.code for each in error_classes()]
    assert len(codes) == len(set(codes))
    assert [code for code in codes if not re.fullmatch(r"[a-z]+(-[a-z]+)*", code)] == []


def test_the_exception_tree_in_the_docstring_is_the_tree() -> None:
    drawn = set(re.findall(r"(?:[├└]── |^    )(\w+)", errors.__doc__ or "", re.MULTILINE))
    assert drawn == {each.__name__ for each in error_classes()}


@pytest.mark.parametrize("name", sorted(DatabaseSettings.model_fields))
def test_each_setting_is_in_the_docs_with_its_variable_and_default(name: str) -> None:
    field = DatabaseSettings.model_fields[name]
    choices = getattr(field.validation_alias, "choices", [f"DB_{name.upper()}"])
    rows = (DOCS / "settings.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{choices[0]}`")]
    default = "|" if field.default in (None, "") else f"`{str(field.default).lower()}` |"
    assert row.rpartition(" | " if default != "|" else " ")[2] == default
