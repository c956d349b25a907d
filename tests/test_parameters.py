"""libpq's parameters mean the same on each driver, wherever they come from.

The table in `docs/urls.md` is what these trials found: a cell that is not true fails here.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg.pq
import psycopg2
import pytest
from looking import CANNOT_CONNECT, DRIVERS, look
from sqlalchemy import Connection
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from tls import Certificates, TLSProxy

from engineroom import Database, DatabaseSessionManager, urls
from engineroom.backends import Role, Side, postgresql
from engineroom.backends.postgresql import PostgreSQL, translation
from engineroom.backends.postgresql.parameters import KNOWN
from engineroom.backends.postgresql.sources import find_password, resolve
from engineroom.backends.postgresql.tls import FILES
from engineroom.errors import InvalidURL, UnsupportedByDriver
from engineroom.testing import PostgresServer
from engineroom.urls import read_url

DOCS = Path(__file__).parent.parent / "docs" / "urls.md"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and none of the variables."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PGSYSCONFDIR", str(tmp_path))
    for known in KNOWN.values():
        monkeypatch.delenv(known.variable or "PG", raising=False)
    return tmp_path


# --- the table: parameter × driver ----------------------------------------------------------------


@dataclass
class Place:
    """Where a trial takes place."""

    server: PostgresServer
    tls: TLSProxy
    certificates: Certificates
    folder: Path
    driver: str

    def look(
        self, query: str, see: Callable[[Connection], Any] | str = "SELECT 1", **kw: Any
    ) -> Any:
        return look(f"{self.server.url()}?{query}", self.driver, see, **kw)

    def look_by_tls(self, query: str, see: str = "SELECT 1") -> Any:
        self.tls.seen.clear()
        return look(f"{self.tls.url(self.server.url())}?{query}", self.driver, see)

    def fails(self, attempt: Callable[[str], Any], query: str) -> None:
        with pytest.raises(CANNOT_CONNECT):
            attempt(query)


def options_of(connection: Connection) -> dict[str, int]:
    driver: Any = connection.connection.driver_connection
    descriptor = PostgreSQL(read_url("postgresql://")).descriptor(driver)
    assert descriptor is not None
    same = socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM)
    with same:
        return {
            "keepalives": same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            "keepalives_idle": same.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
            "keepalives_interval": same.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
            "keepalives_count": same.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
            "tcp_user_timeout": same.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
        }


def try_socket_option(name: str, value: int) -> Callable[[Place], None]:
    def attempt(place: Place) -> None:
        assert place.look("", options_of)[name] != value
        assert place.look(f"{name}={value}", options_of)[name] == value

    return attempt


def try_keepalives(place: Place) -> None:
    assert place.look("", options_of) == {
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
    }
    try_socket_option("keepalives", 0)(place)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "what", ["keepalives_idle=0", "keepalives_count=-1", "keepalives_interval=99999"]
)
def test_what_the_kernel_does_not_take_is_refused(
    what: str, driver: str, pg18: PostgresServer
) -> None:
    refusal = InvalidURL if driver == "asyncpg" else OperationalError
    name = pg18.create_database()
    with pytest.raises(refusal, match="keepalives|setsockopt") as caught:
        look(f"{pg18.url(name)}?{what}", driver)
    count = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'"
    end = time.monotonic() + 20
    while pg18.execute(count) != [["0"]] and time.monotonic() < end:
        time.sleep(0.05)
    assert pg18.execute(count) == [["0"]], f"still connected, with {caught.value!r}"
    pg18.drop_database(name)


def try_sslmode(place: Place) -> None:  # the six of them: test_tls.py
    place.look_by_tls("sslmode=require")
    assert place.tls.seen[0].tls
    place.look_by_tls("sslmode=disable")
    assert not place.tls.seen[0].tls
    place.fails(place.look, "sslmode=require")


def try_sslrootcert(place: Place) -> None:
    place.look_by_tls(f"sslmode=verify-full&sslrootcert={place.certificates.root}")
    other = place.certificates.other_root
    place.fails(place.look_by_tls, f"sslmode=verify-full&sslrootcert={other}")


def try_sslcert(place: Place) -> None:
    certificates, server = place.certificates, place.server
    locked = place.folder / "locked.key"
    certificates.encrypt_key(locked, "known")
    asks = certificates.authority
    with TLSProxy(server.host, server.port, certificates.server, asks=asks) as proxy:
        url = f"{proxy.url(server.url())}?sslmode=require&sslcert={certificates.cert}"
        look(f"{url}&sslkey={locked}&sslpassword=known", place.driver)
        assert proxy.seen[0].client == "client"


def try_channel_binding(place: Place) -> None:
    """The proxy offers none, for it cannot: to require it is to fail there."""
    place.look_by_tls("sslmode=require&channel_binding=prefer")
    place.fails(place.look_by_tls, "sslmode=require&channel_binding=require")


def try_gssencmode(place: Place) -> None:
    place.look("gssencmode=disable")
    place.fails(place.look, "gssencmode=require")


def try_require_auth(place: Place) -> None:
    place.look("require_auth=scram-sha-256")
    place.fails(place.look, "require_auth=none")


def try_connect_timeout(place: Place) -> None:
    """The second of two hosts is reached, since the first has its own time and no more."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        number = silent.getsockname()[1]
        url = place.server.url().replace(f"127.0.0.1:{place.server.port}", "{}")
        url = url.format(f"127.0.0.1:{number},127.0.0.1:{place.server.port}")
        started = time.monotonic()
        assert look(f"{url}?connect_timeout=2", place.driver, pool_timeout=60) == 1
        assert time.monotonic() - started < 20


def try_application_name(place: Place) -> None:
    assert place.look("application_name=shop 1", "SHOW application_name") == "shop 1"
    assert place.look("fallback_application_name=f", "SHOW application_name") == "f"


def try_options(place: Place) -> None:
    query = "options=-csearch_path%3Dtenant -c work_mem%3D77kB"
    assert place.look(query, "SELECT current_setting('search_path')") == "tenant"
    assert place.look(query, "SELECT current_setting('work_mem')") == "77kB"


def try_target(place: Place) -> None:
    for target in ("any", "primary", "read-write", "prefer-standby"):
        assert place.look(f"target_session_attrs={target}") == 1
    place.fails(place.look, "target_session_attrs=standby")
    place.fails(place.look, "target_session_attrs=read-only")


def try_hosts(place: Place) -> None:
    url = place.server.url().replace("@", "@127.0.0.1:1,")
    assert look(url, place.driver) == 1
    assert look(f"{url}?load_balance_hosts=random", place.driver) == 1


def try_socket(place: Place) -> None:
    folder, port = place.server.socket_directory, place.server.port
    url = f"postgresql://postgres:{place.server.password}@/postgres?host={folder}&port={port}"
    assert look(url, place.driver, "SELECT inet_client_addr() IS NULL") is True


@pytest.mark.parametrize("driver", DRIVERS)
def test_without_a_host_it_is_a_socket_and_no_other_place(
    driver: str, pg18: PostgresServer
) -> None:
    """As libpq has it: what listens at localhost may be another server."""
    account = f"postgres:{pg18.password}"
    url = f"postgresql://{account}@/postgres?port={pg18.port}"
    with pytest.raises(CANNOT_CONNECT):
        look(url, driver)
    if driver == "asyncpg":  # libpq has but one folder, and that may not be writable
        name = f".s.PGSQL.{pg18.port}"
        door = Path("/tmp", name)
        door.symlink_to(Path(pg18.socket_directory, name))
        try:
            assert look(url, driver, "SELECT inet_client_addr() IS NULL") is True
        finally:
            door.unlink()


def try_passfile(place: Place) -> None:
    file = place.folder / "passwords"
    file.write_text(f"# mine\n127.0.0.1:*:postgres:postgres:{place.server.password}\n")
    file.chmod(0o600)
    url = place.server.url().replace(f":{place.server.password}@", "@")
    assert look(f"{url}?passfile={file}", place.driver) == 1


def try_service(place: Place) -> None:
    url = make_url(place.server.url())
    (place.folder / ".pg_service.conf").write_text(
        f"[other]\nhost=nowhere\n[shop]\nhost={url.host}\nport={url.port}\nuser=postgres\n"
        f"password={url.password}\ndbname=postgres\napplication_name=by service\n"
    )
    url_alone = "postgresql://?service=shop"
    assert look(url_alone, place.driver, "SHOW application_name") == "by service"


TRIALS: dict[str, Callable[[Place], None]] = {
    "several hosts, `load_balance_hosts`": try_hosts,
    "a folder of sockets as `host`": try_socket,
    "`sslmode`": try_sslmode,
    "`sslrootcert`": try_sslrootcert,
    "`sslcert`, `sslkey`, `sslpassword`": try_sslcert,
    "`channel_binding=require`": try_channel_binding,
    "`gssencmode=require`": try_gssencmode,
    "`require_auth`": try_require_auth,
    "`connect_timeout`": try_connect_timeout,
    "`application_name`, `fallback_application_name`": try_application_name,
    "`options`": try_options,
    "`target_session_attrs`": try_target,
    "`keepalives`": try_keepalives,
    "`keepalives_idle`": try_socket_option("keepalives_idle", 71),
    "`keepalives_interval`": try_socket_option("keepalives_interval", 17),
    "`keepalives_count`": try_socket_option("keepalives_count", 7),
    "`tcp_user_timeout`": try_socket_option("tcp_user_timeout", 7100),
    "`passfile`": try_passfile,
    "`service`": try_service,
}


def table() -> dict[str, list[str]]:
    """Return the rows of the table in the docs, by their first column."""
    text = DOCS.read_text().partition("| parameter | ")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
    assert rows[0] == DRIVERS
    return {name: cells for name, *cells in rows[2:]}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("name", TRIALS)
def test_a_cell_of_the_table_says_what_was_found(
    name: str,
    driver: str,
    pg18: PostgresServer,
    tls: TLSProxy,
    certificates: Certificates,
    tmp_path: Path,
) -> None:
    place = Place(pg18, tls, certificates, tmp_path, driver)
    try:
        TRIALS[name](place)
        found = "yes"
    except UnsupportedByDriver:
        found = "refused"
    assert table()[name][DRIVERS.index(driver)] == found


def test_the_table_has_a_row_for_each_trial() -> None:
    assert list(table()) == list(TRIALS)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])  # psycopg2's libpq may be older
def test_tls_may_begin_at_once(driver: str, pg18: PostgresServer, tls: TLSProxy) -> None:
    url = tls.url(pg18.url()).replace(str(tls.port), str(tls.direct_port))
    assert look(f"{url}?sslmode=require&sslnegotiation=direct", driver) == 1


# --- where they come from -------------------------------------------------------------------------


def test_a_url_comes_before_a_service_and_a_service_before_the_environment(
    tmp_path: Path,
) -> None:
    (tmp_path / ".pg_service.conf").write_text("[a]\nhost=service\nuser=service\n# b=c\n")
    environment = {
        "PGSERVICE": "a",
        "PGHOST": "environment",
        "PGUSER": "environment",
        "PGDATABASE": "environment",
        "PGPORT": "77",
        "PGAPPNAME": "",
    }
    assert resolve(read_url("postgresql://url"), environment) == {
        "host": "url",
        "user": "service",
        "dbname": "environment",
        "port": "77",
        "application_name": "",
    }
    assert resolve(read_url("postgresql://"), environment)["host"] == "service"


def test_each_variable_of_libpq_is_read() -> None:
    there = {
        one.keyword.decode(): one.envvar.decode()
        for one in psycopg.pq.Conninfo.get_defaults()
        if one.envvar
    }
    ours = {name: known.variable for name, known in KNOWN.items() if known.variable}
    assert there.items() <= (ours | {"requiressl": "PGREQUIRESSL"}).items()


def test_each_parameter_of_libpq_is_known() -> None:
    there = {one.keyword.decode() for one in psycopg.pq.Conninfo.get_defaults()}
    assert there - KNOWN.keys() == set()


def test_a_service_file_is_found_where_the_variable_says(tmp_path: Path) -> None:
    file = tmp_path / "services"
    file.write_text("[a]\nhost=there\n")
    environment = {"PGSERVICEFILE": str(file)}
    assert resolve(read_url("postgresql://?service=a"), environment)["host"] == "there"
    file.rename(tmp_path / "pg_service.conf")  # the system's, in PGSYSCONFDIR
    environment["PGSYSCONFDIR"] = str(tmp_path)
    assert resolve(read_url("postgresql://?service=a"), environment)["host"] == "there"


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("other", ["billing", "missing"])
def test_a_urls_service_is_the_only_one_that_is_read(
    driver: str, other: str, pg18: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libpq would look for what `PGSERVICE` names, and fill in whatever is open."""
    url = make_url(pg18.url())
    (tmp_path / ".pg_service.conf").write_text(
        f"[shop]\nhost={url.host}\nport={url.port}\nuser=postgres\npassword={url.password}\n"
        "dbname=postgres\n[billing]\napplication_name=billing\noptions=-c work_mem=5MB\n"
    )
    monkeypatch.setenv("PGSERVICE", other)
    assert libpq_connects("service=shop")
    seen = "SELECT current_setting('application_name') || current_setting('work_mem')"
    assert look("postgresql://?service=shop", driver, seen).endswith("4MB")
    assert "billing" not in look("postgresql://?service=shop", driver, seen)


def test_a_service_that_is_missing_says_where_it_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "pg_service.conf").write_text("[a]\n[b]\n")
    with pytest.raises(InvalidURL) as caught:
        Database("postgresql://u:known@/d?service=shop")
    assert (
        f"there is no service 'shop'. It was looked for in {tmp_path}/.pg_service.conf "
        f"(No such file or directory) and {tmp_path}/pg_service.conf (which has a, b)."
    ) in str(caught.value)
    assert "known" not in str(caught.value)


def libpq_connects(conninfo: str) -> bool:
    try:
        psycopg.connect(conninfo).close()
    except psycopg.Error:
        return False
    return True


def connects(url: str, driver: str) -> bool:
    try:
        look(url, driver)
    except (*CANNOT_CONNECT, InvalidURL):
        return False
    return True


SERVICES = {  # what stands in a service beside the place, and whether libpq takes it
    "application_name=first\napplication_name=second": True,
    "application_name=first\n[a]\nsslmode=require": True,
    "# K\udcf6ln\napplication_name=first": True,
    "application_name=first\n# \x85sslmode=require\n# \u2028sslmode=require": True,
    "  application_name=first \r": True,
    "application_name=first\npassword: known": False,
    "application_name=first\nknown": False,
    "application_name = first": False,
    "application_name=first\nservice=b": False,
    "application_name=first\npasword=known": False,
    "application_name=first\nsslmode=": False,
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("text", SERVICES)
def test_a_service_file_is_read_as_libpq_reads_it(
    text: str, driver: str, pg18: PostgresServer, tmp_path: Path
) -> None:
    url = make_url(pg18.url())
    (tmp_path / ".pg_service.conf").write_text(
        f"known\n[a] # mine\nhost={url.host}\nport={url.port}\nuser=postgres\n"
        f"password={url.password}\n"
        f"dbname=postgres\n{text}\n",
        encoding="utf-8",
        errors="surrogateescape",
    )
    takes = libpq_connects("service=a")
    assert takes == SERVICES[text]
    if takes:
        assert look("postgresql://?service=a", driver, "SHOW application_name") == "first"
        return
    with pytest.raises(InvalidURL) as caught:
        look("postgresql://?service=a", driver)
    assert "pg_service.conf" in str(caught.value)
    assert "known" not in str(caught.value).replace("known with", "")
    assert str(url.password) not in str(caught.value)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("before", ["other:*:*:*:known\udce4", "# \u2028*:*:*:*:x\x85*:*:*:*:x"])
def test_a_password_file_of_another_encoding_serves(
    before: str, driver: str, pg18: PostgresServer, tmp_path: Path
) -> None:
    file = tmp_path / ".pgpass"
    lines = f"{before}\n*:*:*:*:{pg18.password}\r\n"
    file.write_bytes(lines.encode("utf-8", "surrogateescape"))
    file.chmod(0o600)
    assert look(pg18.url().replace(f":{pg18.password}@", "@"), driver) == 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_blank_password_is_none(driver: str, pg18: PostgresServer, tmp_path: Path) -> None:
    file = tmp_path / ".pgpass"
    file.write_text(f"*:*:*:*:{pg18.password}\n")
    file.chmod(0o600)
    url = f"{pg18.url().replace(f':{pg18.password}@', '@')}?password="
    assert libpq_connects(url)
    assert look(url, driver) == 1


def test_a_password_that_is_not_utf8_is_refused_without_being_printed(
    pg18: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".pgpass"
    file.write_bytes(b"*:*:*:*:known\xe4\n")
    file.chmod(0o600)
    url = pg18.url().replace(f":{pg18.password}@", "@")
    with pytest.raises(InvalidURL, match=r"in .*\.pgpass is not UTF-8") as caught:
        look(url, "asyncpg")
    assert "known" not in repr(caught.value) + repr(caught.value.__context__)
    for name, driver in (("PGPASSWORD", "postgresql"), ("DB_PASSWORD", "mysql+pymysql")):
        monkeypatch.setenv(name, "known\udce4")
        with pytest.raises(InvalidURL, match="is not UTF-8") as caught:
            Database(url.replace("postgresql", driver))
        assert "known" not in repr(caught.value) + repr(caught.value.__context__)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_zero_byte_is_refused_wherever_it_stands(
    driver: str, pg18: PostgresServer, tmp_path: Path
) -> None:
    """libpq would read up to it: nothing of sslmode, which stands behind."""
    url = f"{pg18.url()}?application_name="
    for part in ("known%00&sslmode=require", "known%00%20", "x&options=-c%20known%00"):
        with pytest.raises(InvalidURL, match="has a zero byte") as caught:
            look(url + part, driver)
        assert "known" not in str(caught.value)
    with pytest.raises(InvalidURL, match="has a zero byte"):
        look(pg18.url(), driver, password="known\0")
    (file := tmp_path / "services").write_bytes(b"[s]\napplication_name=known\0\n")
    with pytest.raises(InvalidURL, match="application_name of .* has a zero byte"):
        look(f"{pg18.url()}?service=s&servicefile={file}&sslmode=require", driver)
    if driver == "asyncpg":  # libpq reads this file for itself
        (file := tmp_path / ".pgpass").write_bytes(b"*:*:*:*:known\0\n")
        file.chmod(0o600)
        with pytest.raises(InvalidURL, match=r"in .*\.pgpass has a zero byte"):
            look(pg18.url().replace(f":{pg18.password}@", "@"), driver)


def test_a_zero_byte_is_refused_by_mysql_as_well() -> None:
    with pytest.raises(InvalidURL, match="has a zero byte"):
        Database("mysql://u@h/d?init_command=known%00")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(
    "name", sorted(KNOWN.keys() - {"host", "port", "user", "password", "service", "servicefile"})
)
def test_a_blank_is_refused_where_libpq_refuses_it(
    name: str, driver: str, pg18: PostgresServer
) -> None:
    url = f"{pg18.url()}?{name}="
    assert connects(url, driver) == libpq_connects(url)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("variable", "value", "query"),
    [
        ("PGREQUIRESSL", "1", ""),
        ("PGREQUIRESSL", "1", "?sslmode=prefer"),
        ("PGREQUIRESSL", "0", ""),
        ("PGSSLMODE", "", ""),
        ("PGSSLNEGOTIATION", "direct", "?sslmode=disable"),
        ("PGSSLNEGOTIATION", "direct", ""),
    ],
)
def test_the_wish_for_tls_is_kept_as_libpq_keeps_it(
    variable: str,
    value: str,
    query: str,
    driver: str,
    pg18: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a server without TLS, where whoever ignores it connects."""
    monkeypatch.setenv(variable, value)
    url = f"{pg18.url()}{query}"
    assert connects(url, driver) == libpq_connects(url)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("oldest", "newest"),
    [
        ("tlsv1.3", "TLSV1.3"),
        ("TLSv1.3", "TLSv1.2"),
        (None, "TLSv1.1"),  # the oldest is TLSv1.2
        ("", "TLSv1.1"),
        ("TLSv1", ""),
        ("TLSv1_2", None),
        ("1.2", None),
    ],
)
def test_limits_of_tls_are_read_as_libpq_reads_them(
    oldest: str | None, newest: str | None, driver: str, pg18: PostgresServer
) -> None:
    """On a server without TLS as well; what libpq refuses is refused when the manager opens."""
    limits = {"ssl_min_protocol_version": oldest, "ssl_max_protocol_version": newest}
    given = {name: value for name, value in limits.items() if value is not None}
    url = f"{pg18.url()}?{urlencode(given)}"
    if libpq_connects(url):
        assert look(url, driver) == 1
    else:
        with pytest.raises(InvalidURL) as caught:
            Database(url)
        assert all(f"{value}" in str(caught.value) for value in given.values())


PASSWORDS = r"""
# host:port:database:user:password
h:5432:d:u:exact
*:5433:*:*:by port
other\:host:*:*:*:a\:b\\c:d
localhost:*:*:*:socket
starred:*:*:\*:of a star
short:line
"""


@pytest.mark.parametrize(
    ("host", "port", "database", "user", "password"),
    [
        ("h", 5432, "d", "u", "exact"),
        ("h", 5433, "d", "u", "by port"),
        ("h", 5432, "e", "u", None),
        ("other:host", 1, "d", "u", r"a:b\c"),
        ("/tmp", 1, "d", "u", "socket"),
        ("", 1, "d", "u", "socket"),
        ("/elsewhere", 1, "d", "u", None),
        ("short", 1, "d", "u", None),
        ("starred", 1, "d", "*", "of a star"),
        ("starred", 1, "d", "u", None),
    ],
)
def test_the_password_file_is_read_as_libpq_reads_it(
    host: str, port: int, database: str, user: str, password: str | None, tmp_path: Path
) -> None:
    file = tmp_path / ".pgpass"
    file.write_text(PASSWORDS)
    file.chmod(0o600)
    assert find_password({"dbname": database}, host, port, user) == password


def test_a_password_file_that_others_may_read_is_ignored_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / ".pgpass"
    file.write_text("*:*:*:*:known\n")
    file.chmod(0o640)
    assert find_password({}, "h", 1, "u") is None
    assert "others may read it" in caplog.text
    assert "known" not in caplog.text


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_a_password_file_that_is_no_plain_file_is_ignored_and_said(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(os.devnull) if kind == "device" else tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    found: list[str | None] = []
    ask = threading.Thread(
        target=lambda: found.append(find_password({"passfile": str(path)}, "h", 1, "u")),
        daemon=True,
    )
    ask.start()
    ask.join(10)
    assert found == [None]
    assert caplog.messages == [f"{path} is ignored: it is not a plain file."]


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_changed_password_file_serves_the_next_connect(
    driver: str, pg18: PostgresServer, tmp_path: Path
) -> None:
    file = tmp_path / ".pgpass"
    url = pg18.url().replace(f":{pg18.password}@", "@")
    for password, works in (("wrong", False), (pg18.password, True)):
        file.write_text(f"*:*:*:*:{password}\n")
        file.chmod(0o600)
        if works:
            assert look(url, driver) == 1
        else:
            with pytest.raises(CANNOT_CONNECT):
                look(url, driver)


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_environment_says_what_the_url_leaves_open(
    driver: str, pg18: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_url(pg18.url())
    for name, value in {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(url.port),
        "PGUSER": "postgres",
        "PGPASSWORD": str(url.password),
        "PGDATABASE": "postgres",
        "PGAPPNAME": "from PGAPPNAME",
        "PGOPTIONS": "-c work_mem=77kB",
        "PGTZ": "Asia/Tokyo",
    }.items():
        monkeypatch.setenv(name, value)
    for setting, value in (
        ("application_name", "from PGAPPNAME"),
        ("work_mem", "77kB"),
        ("timezone", "Asia/Tokyo"),
    ):
        assert look("postgresql://", driver, f"SHOW {setting}") == value
    monkeypatch.setenv("PGTZ", "default")  # the server's own: libpq does not send that
    assert look("postgresql://", driver, "SHOW timezone") != "Asia/Tokyo"
    assert look("postgresql:///template1", driver, "SELECT current_database()") == "template1"


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_reader_keeps_what_the_url_asks_for(driver: str, pg18: PostgresServer) -> None:
    """And finds the primary where that is asked for, though its own sessions are read-only."""
    url = f"{pg18.url(driver=driver)}?options=-cwork_mem%3D77kB&target_session_attrs=read-write"
    ask = "SELECT current_setting('work_mem') || current_setting('transaction_read_only')"
    if driver == "psycopg":
        with Database(url) as door, door.reader() as reads:
            assert reads.connection().exec_driver_sql(ask).scalar() == "77kBon"
        return

    async def main() -> Any:
        async with DatabaseSessionManager().init(url) as manager, manager.reader() as reads:
            return (await (await reads.connection()).exec_driver_sql(ask)).scalar()

    assert asyncio.run(main()) == "77kBon"


# --- what is refused ------------------------------------------------------------------------------

REFUSED = {
    "ssl_mode=require": r"ssl_mode=, which libpq does not know\. Did you mean sslmode\?",
    "applicationname=x": r"Did you mean application_name\?",
    "zzz=1": r"zzz=, which libpq does not know\. Leave it out\.",
    "schema=tenant": r"Write options=-csearch_path%3Dtenant",
    "currentSchema=tenant": r"Write options=-csearch_path%3Dtenant",
    "connection_limit=5": r"DB_POOL_SIZE=5",
    "sslmode=no-verify": r"sslmode='no-verify', which has to be disable, allow, prefer, require",
    "ssl=maybe": r"ssl='maybe', which has to be",
    "channel_binding=on": r"channel_binding='on', which has to be disable, prefer, require",
    "target_session_attrs=master": r"which has to be any, read-write",
    "connect_timeout=5s": r"connect_timeout='5s', which has to be a whole number",
    "keepalives_idle=x": r"which has to be a whole number",
    "port=x": r"port=, which has to be a number from 1 to 65535 for each host",
    "port=0": r"port=, which has to be a number from 1",
    "port=65536": r"port=, which has to be a number from 1",
    "sslrootcert=system&sslmode=require": r"Write sslmode=verify-full",
    "foo=": r"foo=, which libpq does not know",
    "sslmode=": r"sslmode='', which has to be disable, allow",
    "sslnegotiation=direct": r"sslnegotiation=direct with sslmode=prefer",
    "ssl_min_protocol_version=TLSv1.4": r"TLSv1.4', which has to be TLSv1.3, TLSv1.2",
    "ssl_min_protocol_version=TLSv1.3&ssl_max_protocol_version=TLSv1.2": (
        r"min_protocol_version=TLSv1\.3 .*max_protocol_version=TLSv1\.2: no version lies between"
    ),
    "service=nowhere": r"there is no service 'nowhere'",
}


@pytest.mark.parametrize("query", REFUSED)
def test_what_cannot_be_meant_is_refused_when_the_manager_opens(query: str) -> None:
    for opens in (DatabaseSessionManager().init, Database):
        with pytest.raises(InvalidURL, match=REFUSED[query]) as caught:
            opens(f"postgresql://u:known@h/d?{query}")
        assert "known" not in str(caught.value)


def test_a_variable_that_cannot_be_meant_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "sometimes")
    with pytest.raises(InvalidURL, match=r"PGSSLMODE \(for postgresql://h/d\) has sslmode='som"):
        Database("postgresql://h/d")
    Database("postgresql://h/d?sslmode=disable").close()  # it is not asked


def test_others_names_are_read() -> None:
    url = read_url("postgresql://h/d?ssl=true&username=u&password=p&database=e")
    assert resolve(url, {}) == {
        "host": "h",
        "dbname": "e",
        "sslmode": "require",
        "user": "u",
        "password": "p",
    }


# --- the drivers ----------------------------------------------------------------------------------


def test_plain_postgresql_takes_the_driver_that_can(pg18: PostgresServer) -> None:
    """And asyncpg by name is an error, at the first use of its side."""
    url = "postgresql://u:known@h/d?channel_binding=require&application_name=x"
    url = f"{url}&scram_client_key=known"
    manager = DatabaseSessionManager().init(url)
    assert manager.engine.dialect.driver == "psycopg"
    manager = DatabaseSessionManager().init(url.replace("postgresql:", "postgresql+asyncpg:"))
    assert manager.sync.engine.dialect.driver == "psycopg"
    with pytest.raises(UnsupportedByDriver) as caught:
        assert manager.engine
    assert re.search(
        r"asks for: channel_binding=require, scram_client_key\. Write postgresql\+psycopg",
        str(caught.value),
    )
    assert "known" not in str(caught.value)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("name", sorted(KNOWN.keys() - FILES.keys() - {"service", "servicefile"}))
def test_what_the_drivers_own_libpq_does_not_know_is_refused(name: str, driver: str) -> None:
    """Which one it is linked with, only the driver knows; what that says would be its own error."""
    value = next(iter(KNOWN[name].values), "1")
    module: Any = psycopg2 if driver == "psycopg2" else psycopg
    with pytest.raises(module.Error) as own:
        module.connect(f"{name}={value} host=127.0.0.1 port=1")
    with Database(f"postgresql+{driver}://u:secret@/d?{name}={value}") as door:
        if "invalid connection option" in str(own.value):
            with pytest.raises(UnsupportedByDriver, match=f"does not know {name}"):
                assert door.engine
        else:
            assert door.engine


def test_asyncpg_looks_nothing_up_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would find differs from libpq: all that it could read is told or kept from it."""
    monkeypatch.setenv("PGSSLMODE", "disable")
    options = PostgreSQL(read_url("postgresql://h/d?sslmode=require")).engine_options(
        Side.ASYNC, Role.PRIMARY, {}
    )["connect_args"]
    assert options["ssl"] is not False
    assert {"host", "port", "ssl", "direct_tls", "async_creator_fn"} <= options.keys()


def test_a_url_is_worked_on_once_and_not_at_each_connect(
    pg18: PostgresServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither for the connections of its pool, nor for those of another event loop."""
    counts: dict[str, int] = {}

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counting(*args: Any, **kw: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kw)

        monkeypatch.setattr(module, name, counting)

    count(urls, "_read_parts")
    count(postgresql, "resolve")
    count(translation, "make_context")
    count(postgresql, "for_asyncpg")

    certificates = Certificates(tmp_path)
    with TLSProxy(pg18.host, pg18.port, certificates.server) as proxy:
        url = f"{proxy.url(pg18.url(driver='asyncpg'))}?sslmode=require"
        manager = DatabaseSessionManager().init(url, pool_size=3)

        async def use() -> None:
            async with manager.connect(), manager.connect(), manager.connect():
                pass

        asyncio.run(use())
        seen = dict(counts)
        assert seen["resolve"] == seen["for_asyncpg"] == seen["make_context"] == 1
        for _ in range(2):
            asyncio.run(use())
        assert len(proxy.seen) == 9
        assert counts == seen
        asyncio.run(manager.close())


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_user_that_the_process_runs_as_is_the_default(
    driver: str, pg18: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with libpq, whatever the environment says that it is."""
    monkeypatch.setenv("LOGNAME", "somebody")
    own = pwd.getpwuid(os.geteuid()).pw_name
    pg18.execute(f"CREATE ROLE \"{own}\" LOGIN PASSWORD 'its own'")
    try:
        place = make_url(pg18.url())
        url = f"postgresql://:its%20own@{place.host}:{place.port}/postgres"
        assert look(url, driver, "SELECT current_user") == own
    finally:
        pg18.execute(f'DROP ROLE "{own}"')


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("how", ["argument", "parameter", "variable"])
def test_a_password_without_a_user_serves_the_user_that_is_named_elsewhere(
    how: str, driver: str, pg18: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_url(pg18.url())
    url = f"postgresql://:{place.password}@{place.host}:{place.port}/postgres"
    if how == "variable":
        monkeypatch.setenv("PGUSER", "postgres")
    url, options = (
        (f"{url}?user=postgres", {})
        if how == "parameter"
        else (url, {"username": "postgres"} if how == "argument" else {})
    )
    assert look(url, driver, "SELECT current_user", **options) == "postgres"
