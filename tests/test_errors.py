"""Every error has a class, a code and a line in the tree."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from engineroom import errors
from engineroom.errors import (
    ConfigurationError,
    CredentialsFailed,
    EngineroomError,
    PoolTimeout,
    SchemaError,
    UsageError,
)

ALL = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if kind.__module__ == errors.__name__
]
ERRORS = [kind for kind in ALL if issubclass(kind, EngineroomError)]


def test_every_error_stands_in_the_modules_tree() -> None:
    """In its place: under its base, one level deeper."""
    assert errors.__doc__ is not None
    path: list[tuple[int, str]] = []
    tree: dict[str, str | None] = {}
    for line in errors.__doc__.splitlines():
        entry = re.match(r"^([ │├└─]*)([A-Z]\w+) {2,}\S|^([ │├└─]*)([A-Z]\w+) [a-z]\w+ ", line)
        if entry is None or not line.startswith("    "):
            continue
        indent, name = len(entry[1] or entry[3] or ""), entry[2] or entry[4]
        path = [step for step in path if step[0] < indent]
        tree[name] = path[-1][1] if path else None
        path.append((indent, name))
    for kind in ERRORS:
        assert kind.__name__ in tree, f"{kind.__name__} is not in the tree"
        base = tree[kind.__name__]
        assert (base is None) == (kind is EngineroomError)
        if base is not None:
            assert kind.__bases__[0] is getattr(errors, base)


def test_codes_are_slugs_and_each_is_one_errors() -> None:
    codes = [kind.__dict__["code"] for kind in ERRORS]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_says_its_message_and_ends_with_its_code(kind: type[EngineroomError]) -> None:
    error = kind("What happened, {why}, and 100 % what to do.")
    assert str(error) == f"What happened, {{why}}, and 100 % what to do. [{kind.code}]"
    assert error.message == "What happened, {why}, and 100 % what to do."


@pytest.mark.parametrize("kind", ALL)
def test_every_class_is_explained(kind: type) -> None:
    assert kind.__doc__


def test_the_two_branches() -> None:
    """Misuse is a `RuntimeError` too, configuration a `ValueError`, exhaustion SQLAlchemy's own.

    What goes wrong at run time is one of three: no connection, nobody who may connect, or tables
    that are not right.
    """
    assert issubclass(UsageError, RuntimeError)
    assert issubclass(ConfigurationError, UsageError)
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(PoolTimeout, PoolTimeoutError)
    assert not issubclass(PoolTimeout, UsageError)
    assert all(
        issubclass(kind, (UsageError, PoolTimeout, CredentialsFailed, SchemaError))
        for kind in ERRORS
        if kind is not EngineroomError
    )


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_can_be_pickled(kind: type[EngineroomError]) -> None:
    """Task queues send errors from process to process."""
    error = kind("a message")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert str(twin) == str(error)
