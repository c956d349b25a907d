"""TLS is what the URL says, on each driver, with real certificates."""

from __future__ import annotations

import encodings.idna  # noqa: F401  # who is a stranger for a while may not read it
import os
import shutil
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode

import pytest
from looking import CANNOT_CONNECT, look
from tls import Certificates, Seen, TLSProxy

from engineroom import Database
from engineroom.errors import InvalidCertificate, UnsupportedByDriver
from engineroom.testing import PostgresServer, postgres

DRIVERS = ["asyncpg", "psycopg", "psycopg (async)", "psycopg2"]
pytestmark = pytest.mark.parametrize("driver", DRIVERS)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without certificates."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def url(tls: TLSProxy, pg18: PostgresServer) -> str:
    tls.seen.clear()
    return tls.url(pg18.url())


def fails(url: str, driver: str, says: str | None = None) -> None:
    with pytest.raises(CANNOT_CONNECT, match=says):  # the driver's own
        look(url, driver)


@pytest.mark.parametrize("mode", ["allow", "prefer"])
def test_allow_and_prefer_do_without_tls(driver: str, mode: str, pg18: PostgresServer) -> None:
    assert look(f"{pg18.url()}?sslmode={mode}", driver) == 1


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_a_server_without_tls_is_refused(
    driver: str, mode: str, pg18: PostgresServer, certificates: Certificates
) -> None:
    fails(f"{pg18.url()}?sslmode={mode}&sslrootcert={certificates.root}", driver, "SSL")


@pytest.mark.parametrize(
    ("mode", "is_encrypted"),
    [("disable", False), ("allow", False), ("prefer", True), ("require", True)],
)
def test_each_mode_encrypts_where_it_says(
    driver: str, mode: str, is_encrypted: bool, url: str, tls: TLSProxy
) -> None:
    assert look(f"{url}?sslmode={mode}", driver) == 1
    assert tls.seen[0].tls == is_encrypted


@pytest.mark.parametrize("mode", ["allow", "prefer", "require"])
def test_a_server_that_insists_on_tls_gets_it(
    driver: str, mode: str, pg18: PostgresServer, certificates: Certificates
) -> None:
    with TLSProxy(pg18.host, pg18.port, certificates.server, refuses_plain=True) as proxy:
        assert look(f"{proxy.url(pg18.url())}?sslmode={mode}", driver) == 1
        assert [one.tls for one in proxy.seen] == ([False, True] if mode == "allow" else [True])
        fails(f"{proxy.url(pg18.url())}?sslmode=disable", driver)


def logins(proxy: TLSProxy) -> list[Seen]:
    """Return who tried to log in; a stranger only asks whether the server is just starting."""
    return [one for one in proxy.seen if one.startup != {"user": "engineroom"}]


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_a_certificate_of_another_authority_is_refused(
    driver: str, mode: str, url: str, certificates: Certificates, tls: TLSProxy
) -> None:
    """With `require`, too, where a root is given: so it is in libpq."""
    assert look(f"{url}?sslmode={mode}&sslrootcert={certificates.root}", driver) == 1
    tls.seen.clear()
    fails(f"{url}?sslmode={mode}&sslrootcert={certificates.other_root}", driver)
    assert logins(tls) == []


@pytest.mark.parametrize("mode", ["allow", "prefer"])
def test_a_root_that_does_not_fit_is_taken_as_the_docs_say(
    driver: str,
    mode: str,
    url: str,
    certificates: Certificates,
    tls: TLSProxy,
    pg18: PostgresServer,
) -> None:
    """By modes that protect from nobody: libpq gives TLS up, and asyncpg goes on unverified."""
    query = f"?sslmode={mode}&sslrootcert={certificates.other_root}"
    assert look(url + query, driver) == 1
    assert tls.seen[-1].tls == (driver == "asyncpg" and mode == "prefer")
    with TLSProxy(pg18.host, pg18.port, certificates.server, refuses_plain=True) as proxy:
        if driver == "asyncpg":
            assert look(proxy.url(pg18.url()) + query, driver) == 1
        else:
            fails(proxy.url(pg18.url()) + query, driver)


@pytest.mark.parametrize("version", ["tlsv1.2", "TLSv1.3"])
def test_a_version_of_tls_may_be_asked_for(
    driver: str, version: str, url: str, tls: TLSProxy
) -> None:
    limits = f"ssl_min_protocol_version={version}&ssl_max_protocol_version={version}"
    for mode in ("prefer", "require"):
        assert look(f"{url}?sslmode={mode}&{limits}", driver) == 1
        assert tls.seen[-1].version.lower() == version.lower()


def test_a_host_without_tls_is_passed_over_as_the_docs_say(
    driver: str, tls: TLSProxy, pg18: PostgresServer
) -> None:
    place = f"127.0.0.1:{pg18.port}"
    hosts = pg18.url().replace(place, f"{place},127.0.0.1:{tls.port}")
    if driver == "psycopg2":
        fails(f"{hosts}?sslmode=require", driver)
    else:
        assert look(f"{hosts}?sslmode=require", driver) == 1


def test_the_name_is_verified_by_verify_full_alone(
    driver: str, pg18: PostgresServer, certificates: Certificates
) -> None:
    with TLSProxy(pg18.host, pg18.port, certificates.elsewhere) as proxy:
        url = f"{proxy.url(pg18.url())}?sslrootcert={certificates.root}"
        assert look(f"{url}&sslmode=verify-ca", driver) == 1
        proxy.seen.clear()
        fails(f"{url}&sslmode=verify-full", driver)
        assert logins(proxy) == []


def test_the_authorities_of_the_machine_do_not_know_ours(
    driver: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(f"{url}?sslrootcert=system", driver)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    fails(f"{url}?sslrootcert=system", driver)


@pytest.mark.parametrize("place", ["environment", "file", "folder"])
def test_an_authority_that_the_machine_trusts_is_trusted(
    driver: str,
    place: str,
    url: str,
    pg18: PostgresServer,
    certificates: Certificates,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By libpq of a wheel as well, whose OpenSSL would look in a folder of whoever built it.

    Where the machine keeps them only its owner can change: what Python says of that is replaced.
    """
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    if driver == "asyncpg" or place == "environment":  # Python's own OpenSSL is told so
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.root))
    else:
        roots = certificates.root
        if place == "folder":
            roots = tmp_path / "ca-certificates.crt"
            shutil.copyfile(certificates.root, roots)
        real = ssl.get_default_verify_paths()
        paths = real._replace(
            cafile=str(roots) if place == "file" else None, capath=str(roots.parent)
        )
        monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths)
    assert look(f"{url}?sslrootcert=system", driver) == 1
    with TLSProxy(pg18.host, pg18.port, certificates.elsewhere) as proxy:
        fails(f"{proxy.url(pg18.url())}?sslrootcert=system", driver)  # by its name
        assert logins(proxy) == []


def test_a_client_shows_its_certificate(
    driver: str,
    pg18: PostgresServer,
    certificates: Certificates,
    home: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    locked = home / "locked.key"
    certificates.encrypt_key(locked, "known")
    asks = certificates.authority
    with TLSProxy(pg18.host, pg18.port, certificates.server, asks=asks) as proxy:
        url = f"{proxy.url(pg18.url())}?sslmode=require"
        fails(url, driver)
        assert "asked again" not in caplog.text  # who is not let in without one will not be later
        for extra in (f"sslkey={certificates.key}", f"sslkey={locked}&sslpassword=known"):
            proxy.seen.clear()
            assert look(f"{url}&sslcert={certificates.cert}&{extra}", driver) == 1
            assert [one.client for one in proxy.seen] == ["client"]
        proxy.seen.clear()
        url = url.replace("require", "prefer")
        assert look(f"{url}&sslcert={certificates.cert}&sslkey={certificates.key}", driver) == 1
        assert [(one.client, one.tls) for one in proxy.seen] == [("client", True)]


def test_certificates_in_the_home_are_found(
    driver: str, pg18: PostgresServer, certificates: Certificates, home: Path
) -> None:
    folder = home / ".postgresql"
    folder.mkdir()
    for name, source in (
        ("postgresql.crt", certificates.cert),
        ("postgresql.key", certificates.key),
    ):
        (folder / name).write_bytes(source.read_bytes())
        (folder / name).chmod(0o600)
    (folder / "root.crt").write_bytes(certificates.root.read_bytes())
    asks = certificates.authority
    with TLSProxy(pg18.host, pg18.port, certificates.server, asks=asks) as proxy:
        assert look(f"{proxy.url(pg18.url())}?sslmode=verify-full", driver) == 1
        assert [one.client for one in proxy.seen] == ["client"]


def broken(what: str, certificates: Certificates, folder: Path) -> dict[str, Any]:
    garbage = folder / "garbage"
    garbage.write_text("no certificate")
    open_key = folder / "open.key"
    open_key.write_bytes(certificates.key.read_bytes())
    open_key.chmod(0o644)
    if what == "missing":
        return {"sslrootcert": folder / "none.crt"}
    if what == "garbage":
        return {"sslrootcert": garbage}
    if what == "folder":
        return {"sslcert": folder, "sslkey": certificates.key}
    if what == "open key":
        return {"sslcert": certificates.cert, "sslkey": open_key}
    return {"sslcert": certificates.cert, "sslkey": garbage}


@pytest.mark.parametrize("what", ["missing", "garbage", "folder", "open key", "no key"])
def test_a_file_that_cannot_be_used_is_one_clear_error_before_anything_is_sent(
    driver: str, what: str, certificates: Certificates, home: Path
) -> None:
    given = broken(what, certificates, home)
    url = f"postgresql://u:known@h/d?sslmode=verify-full&{urlencode(given)}"
    with pytest.raises(InvalidCertificate) as caught:
        Database(url)
    assert any(f"{name}={path}" in str(caught.value) for name, path in given.items())
    assert "known" not in str(caught.value)
    assert driver


def test_nothing_to_verify_with_is_refused(driver: str, url: str) -> None:
    with pytest.raises(InvalidCertificate, match=r"root\.crt does not exist"):
        look(f"{url}?sslmode=verify-full", driver)


# --- a server that speaks TLS itself --------------------------------------------------------------

SYSTEM = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


@pytest.fixture(scope="module")
def secure(certificates: Certificates) -> Iterator[PostgresServer]:
    """The system's PostgreSQL, with TLS; the binaries of the throwaway ones have none."""
    if not SYSTEM:
        pytest.skip("PostgreSQL is not installed in /usr/lib/postgresql")
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        files = {"ssl_cert_file": folder / "server.crt", "ssl_key_file": folder / "server.key"}
        certificates.server.cert_chain_pems[0].write_to_path(str(files["ssl_cert_file"]))
        certificates.server.private_key_pem.write_to_path(str(files["ssl_key_file"]))
        files["ssl_key_file"].chmod(0o600)
        if os.geteuid() == 0:  # for root, the server runs as nobody
            shutil.chown(files["ssl_key_file"], "nobody")
        settings = {"ssl": True, **{name: str(path) for name, path in files.items()}}
        with postgres(bindir=SYSTEM[-1].parent, settings=settings) as server:
            yield server


def test_channels_are_bound_where_that_is_required(
    driver: str, secure: PostgresServer, certificates: Certificates
) -> None:
    url = secure.url().replace("127.0.0.1", "localhost")
    url = f"{url}?sslmode=verify-full&sslrootcert={certificates.root}"
    ask = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    assert look(url, driver, ask) is True
    if driver == "asyncpg":
        with pytest.raises(UnsupportedByDriver):
            look(f"{url}&channel_binding=require", driver)
    else:
        assert look(f"{url}&channel_binding=require", driver, ask) is True


# -- a home that is not ours -----------------------------------------------------------------------


@contextmanager
def stranger() -> Iterator[None]:
    """Be a user whom the system does not know, as in many a container."""
    os.setresuid(54321, 54321, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a while")
@pytest.mark.parametrize("has_home", [True, False])
@pytest.mark.parametrize("mode", ["", "?sslmode=allow", "?sslmode=prefer", "?sslmode=require"])
def test_a_home_that_cannot_be_looked_into_is_none(
    driver: str,
    mode: str,
    has_home: bool,
    url: str,
    tls: TLSProxy,
    pg18: PostgresServer,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home.chmod(0o700)
    if not has_home:
        monkeypatch.delenv("HOME")
    plain = pg18.url()
    assert look(url, driver) == look(plain, driver) == 1  # what is imported is there now
    tls.seen.clear()
    with stranger():
        if mode != "?sslmode=require":
            assert look(plain + mode, driver) == 1
        fails(plain.replace(pg18.password, "wrong") + mode, driver)
        assert look(url + mode, driver) == 1
        assert tls.seen[-1].tls == (mode != "?sslmode=allow")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a while")
def test_without_a_home_named_files_are_used(
    driver: str,
    url: str,
    certificates: Certificates,
    pg18: PostgresServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HOME")
    roots = Path("/tmp", f"{tmp_path.name}-root.crt")  # which everybody may read
    shutil.copyfile(certificates.root, roots)
    roots.chmod(0o644)
    passwordless = url.replace(f":{pg18.password}@", "@")
    try:
        with stranger():
            verified = f"?sslmode=verify-full&sslrootcert={roots}"
            assert look(url + verified, driver) == 1
            fails(passwordless + verified, driver)  # the server's word, and not Python's
    finally:
        roots.unlink()
