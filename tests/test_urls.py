"""One URL gives both sides their drivers, and is never shown with its secrets."""

from __future__ import annotations

import importlib.util

import pytest
from sqlalchemy import make_url

from engineroom.backends import Side, find_backend
from engineroom.errors import InvalidURL
from engineroom.settings import DatabaseSettings
from engineroom.urls import masked, read_url

PAIRS = [  # a URL, and the driver that each side speaks to it: the table in the docs
    ("postgresql://h/d", "asyncpg", "psycopg"),
    ("postgres://h/d", "asyncpg", "psycopg"),
    ("postgresql+asyncpg://h/d", "asyncpg", "psycopg"),
    ("postgresql+psycopg://h/d", "psycopg", "psycopg"),
    ("postgres+psycopg://h/d", "psycopg", "psycopg"),
    ("postgresql+psycopg2://h/d", "asyncpg", "psycopg2"),
    ("sqlite:///file.db", "aiosqlite", "pysqlite"),
    ("sqlite://", "aiosqlite", "pysqlite"),
    ("sqlite+aiosqlite:///file.db", "aiosqlite", "pysqlite"),
    ("sqlite+pysqlite:///file.db", "aiosqlite", "pysqlite"),
]


@pytest.mark.parametrize(("url", "asynchronous", "synchronous"), PAIRS)
def test_a_url_gives_each_side_its_driver(url: str, asynchronous: str, synchronous: str) -> None:
    if synchronous == "psycopg2" and importlib.util.find_spec("psycopg2") is None:
        synchronous = ""
    backend = find_backend(read_url(url), DatabaseSettings())
    assert backend.engine_url(Side.ASYNC).get_driver_name() == asynchronous
    if synchronous:
        assert backend.engine_url(Side.SYNC).get_driver_name() == synchronous
    backend.dispose()


def test_everything_else_of_a_url_is_kept() -> None:
    url = "postgres://us%40er:p%40ss%2Fword@h:5433/d?application_name=x"
    backend = find_backend(read_url(url), DatabaseSettings())
    for side in Side:
        made = backend.engine_url(side)
        assert (made.username, made.password) == ("us@er", "p@ss/word")
        assert (made.host, made.port, made.database) == ("h", 5433, "d")
        assert made.query == {"application_name": "x"}


def test_a_url_is_read_with_what_surrounds_it_when_pasted() -> None:
    assert read_url("  postgres://h/d\n").drivername == "postgresql"


def test_a_url_object_is_read_too() -> None:
    given = make_url("postgres://u:secret@h/d")
    assert read_url(given).drivername == "postgresql"
    assert read_url(given).password == "secret"


@pytest.mark.parametrize("url", ["", "nonsense", "postgresql", "://", "/var/app.db", "http//x"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidURL):
        read_url(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgresql://h/d?password=secret&user=u", "postgresql://h/d?password=***&user=u"),
        ("postgresql://h/d?sslpassword=secret", "postgresql://h/d?sslpassword=***"),
        ("sqlite:///file.db", "sqlite:///file.db"),
    ],
)
def test_a_masked_url_shows_all_but_its_secrets(url: str, shown: str) -> None:
    assert masked(url).replace("%2A", "*") == shown
    assert masked(make_url(url)).replace("%2A", "*") == shown


@pytest.mark.parametrize(
    "url",
    [
        "user:secret@h/d",
        "postgresql:/user:secret@h/d",
        "postgresql://user:a@secret@h/d",
        "postgresql://user:a@b/secret@h/d",
        "postgresql://user:a/secret@h/d",
        "postgresql://user:secret@h:port/d",
        "host=h password=secret",
        "host=h password='a secret'",
        "jdbc:postgresql://h/d?password=secret",
        "",
    ],
)
def test_no_secret_is_shown_of_what_is_no_url_either(url: str) -> None:
    assert "secret" not in masked(url)
