"""One URL gives both sides their drivers, and is never shown with its secrets."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
from sqlalchemy import URL, make_url

from engineroom import Database, DatabaseSessionManager
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
    """It tells the database apart from others; the driver is told in its own words."""
    url = "postgres://us%40er:p%40ss%2Fword@h:5433/d?application_name=x&sslpassword=no"
    with Database(url) as door:
        for made in (door.engine.url, DatabaseSessionManager().init(url).engine.url):
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


PARTS: dict[str, tuple[Any, ...]] = {  # user, password, host, port, database, parameters
    "postgresql://u:p@h:5/d": ("u", "p", "h", 5, "d", {}),
    "postgresql://u@h": ("u", None, "h", None, None, {}),
    "postgresql://u:@h": ("u", "", "h", None, None, {}),
    "postgresql://h:/d": (None, None, "h", None, "d", {}),
    "postgresql://": (None, None, None, None, None, {}),
    "postgresql:///d": (None, None, None, None, "d", {}),
    "postgresql://h?sslmode=require": (None, None, "h", None, None, {"sslmode": "require"}),
    # what a password may hold unencoded, and encoded
    "postgresql://u:p@ss@h/d": ("u", "p@ss", "h", None, "d", {}),
    "postgresql://u:p:a%ss&=+,;[x]!$*()~é@h/d": (
        *("u", "p:a%ss&=+,;[x]!$*()~é", "h", None, "d", {}),
    ),
    "postgresql://u%40e:%2F%3F%23%40%3A%25%20%C3%A9@h/d%2Fe": (
        *("u@e", "/?#@:% é", "h", None, "d/e", {}),
    ),
    # hosts
    "postgresql://u@[::1]:5/d": ("u", None, "::1", 5, "d", {}),
    "postgresql://u@[::1]/d": ("u", None, "::1", None, "d", {}),
    "postgresql://[fe80::1%25eth0]/d": (None, None, None, None, "d", {"host": "fe80::1%eth0"}),
    "postgresql://a:1,b:2/d": (None, None, None, None, "d", {"host": "a,b", "port": "1,2"}),
    "postgresql://u:p@a,b,[::1]:3/d": (
        *("u", "p", None, None, "d", {"host": "a,b,::1", "port": ",,3"}),
    ),
    "postgresql://a,b/d": (None, None, None, None, "d", {"host": "a,b"}),
    "postgresql://%2Fvar%2Frun/d": (None, None, None, None, "d", {"host": "/var/run"}),
    "postgresql:///d?host=/var/run": (None, None, None, None, "d", {"host": "/var/run"}),
    "postgresql:///d?host=a:1&host=b:2": (
        *(None, None, None, None, "d", {"host": ("a:1", "b:2")}),
    ),
    # parameters
    "postgresql://h/d?a=b+c%2B&d=&e=%26": (
        *(None, None, "h", None, "d", {"a": "b c+", "d": "", "e": "&"}),
    ),
    "mysql+asyncmy://u:p@h:3306/d": ("u", "p", "h", 3306, "d", {}),
}


@pytest.mark.parametrize("url", PARTS)
def test_a_url_is_read_part_by_part(url: str) -> None:
    read = read_url(url)
    parts = (read.username, read.password, read.host, read.port, read.database, read.query)
    assert parts == PARTS[url]
    assert read_url(read) == read
    assert read_url(read.render_as_string(hide_password=False)) == read


@pytest.mark.parametrize("character", "/?#")
@pytest.mark.parametrize(
    "url", ["postgresql://u:known{}secret@h/d", "postgresql://u:known@1{}s=secret@h:5/d?a=b"]
)
def test_a_character_that_has_to_be_encoded_is_refused_without_printing_the_password(
    url: str, character: str
) -> None:
    url = url.format(character)
    with pytest.raises(InvalidURL, match="write / as %2F, \\? as %3F and # as %23") as caught:
        read_url(url)
    for text in (str(caught.value), masked(url)):
        assert "known" not in text
        assert "secret" not in text


@pytest.mark.parametrize("port", ["port", "0", "65536", "-1", "5432x", "５"])
@pytest.mark.parametrize("account", ["", "user:secret@", "user:se@cret:x@"])
def test_a_port_that_is_none_is_refused_without_what_stands_before_the_at(
    account: str, port: str
) -> None:
    with pytest.raises(InvalidURL, match="is not a number from 1 to 65535") as caught:
        read_url(f"postgresql://{account}h:{port}/d")
    text = str(caught.value)
    assert not {"user", "secret", "cret"} & set(re.findall(r"\w+", text.partition("Write")[0]))
    assert (f"h:{port}" in text) == bool(account)  # without an @, it may be the password


def test_an_address_without_its_brackets_is_refused() -> None:
    for url in ("postgresql://u@::1/d", "postgresql://u@[::1/d", "postgresql://u@[::1]5/d"):
        with pytest.raises(InvalidURL, match="stands in brackets"):
            read_url(url)


def test_a_parameter_that_is_given_twice_is_refused() -> None:
    with pytest.raises(InvalidURL, match="gives sslmode twice"):
        read_url("postgresql://h/d?sslmode=require&sslmode=disable")


def test_a_parameter_without_a_value_is_refused_without_being_printed() -> None:
    with pytest.raises(InvalidURL, match="Write name=value") as caught:
        read_url("postgresql://h/d?sslmode=require&known")
    assert "known" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:known%E4@h/d",  # Latin-1, where UTF-8 is %C3%A4
        "postgresql://u:known\udce4@h/d",  # as the environment has such bytes
        "postgresql://u@h/d?password=known%E4",
        "mysql://known%E4@h/d",
        "postgresql://u:known%cent@h/d",  # a % that is meant as one
        URL.create("postgresql", "u", "known\udce4", "h"),
    ],
)
def test_what_is_not_utf8_is_refused_without_being_printed(url: str | URL) -> None:
    with pytest.raises(InvalidURL, match="is not UTF-8") as caught:
        read_url(url)
    assert "a % itself as %25" in str(caught.value)
    assert "known" not in repr(caught.value) + repr(caught.value.__context__)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgresql://h/d?password=secret&user=u", "postgresql://h/d?password=***&user=u"),
        ("postgresql://h/d?sslpassword=secret", "postgresql://h/d?sslpassword=***"),
        ("postgresql://h/d?pasword=secret&pwd=x", "postgresql://h/d?pasword=***&pwd=***"),
        ("postgresql://h/d?scram_client_key=secret", "postgresql://h/d?scram_client_key=***"),
        ("mysql://h/d?ssl_key_password=x&charset=y", "mysql://h/d?charset=y&ssl_key_password=***"),
        (
            "postgresql://h/d?sslmode=prefer&options=x",
            "postgresql://h/d?options=***&sslmode=prefer",
        ),
        ("sqlite:///file.db", "sqlite:///file.db"),
        ("sqlite:///file.db?password=secret", "sqlite:///file.db?password=***"),
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
