"""A MySQL URL's parameters mean the same to both drivers: what it says of TLS, first of all."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from traceback import walk_tb
from typing import Any
from urllib.parse import quote, urlencode

import pymysql
import pytest
from mariadb_server import MariaServer, find_mariadbd
from sqlalchemy import Connection, event, make_url, text
from sqlalchemy.exc import DBAPIError
from tls import Certificates

from engineroom import Database, DatabaseSessionManager
from engineroom.backends import Role, Side
from engineroom.backends.mysql import MySQL
from engineroom.errors import (
    ConnectTimeout,
    InvalidCertificate,
    InvalidURL,
    ManagerClosed,
    UnsupportedByDriver,
)

DRIVERS = ["pymysql", "asyncmy"]
each_driver = pytest.mark.parametrize("driver", DRIVERS)
CIPHER = "SELECT variable_value FROM information_schema.session_status WHERE variable_name = '{}'"


def look(url: str, driver: str, see: str | Callable[[Connection], Any], **options: Any) -> Any:
    """Connect by a driver, and return what is seen: by a function, or a query's first value."""

    def seen(connection: Connection) -> Any:
        return connection.scalar(text(see)) if isinstance(see, str) else see(connection)

    if driver == "pymysql":
        with Database(url, **options) as door, door.connect() as connection:
            return seen(connection)

    async def main() -> Any:
        async with DatabaseSessionManager().init(url, **options) as manager:
            async with manager.connect() as connection:
                return await connection.run_sync(seen)

    return asyncio.run(main())


def cipher(url: str, driver: str, **options: Any) -> str:
    """Return what encrypts a connection, as the server knows it; "" where nothing does."""
    return str(look(url, driver, CIPHER.format("Ssl_cipher"), **options))


# --- parameters -----------------------------------------------------------------------------------


def test_an_unknown_parameter_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidURL, match=r"conect_timeout=.* Did you mean connect_timeout\?"):
        Database("mysql://shop:secret@db.example/shop?conect_timeout=3")


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("sslaccept=strict", "Write ssl_mode=VERIFY_IDENTITY"),
        ("connection_limit=9", "pool_size=9"),
        ("connect_timeout=soon", "a whole number"),
        ("connect_timeout=0", "connect_timeout='0'.* from 1 to 31536000"),
        ("read_timeout=0", "read_timeout='0'.* from 1 to"),
        ("write_timeout=31536001", "write_timeout=.* from 1 to"),
        (f"max_allowed_packet={'9' * 5000}", "max_allowed_packet=.* from 1 to"),
        ("port=70000", "port=.* from 1 to 65535"),
        ("ssl=true&ssl_cipher=foo", "ssl_cipher=foo.*no cipher"),
        ("ssl_cipher=foo", "ssl_cipher=foo.*no cipher"),
        ("read_default_file=/nowhere/my.cnf", "read_default_file=/nowhere/my.cnf.*No such file"),
        ("read_default_file=/etc", "read_default_file=/etc.*directory"),
        ("read_default_file=/dev/null", r"/dev/null has no group \[client\]"),
        ("local_infile=perhaps", "true or false"),
        ("ssl-mode=perhaps", "DISABLED, PREFERRED, REQUIRED, VERIFY_CA, VERIFY_IDENTITY"),
        ("ssl_mode=REQUIRED&ssl-mode=DISABLED", "ssl_mode twice"),
        ("autocommit=true", "AUTOCOMMIT"),
        ("qwertz=1", "Leave it out"),
    ],
)
def test_what_a_url_cannot_say_is_said_with_what_to_write(query: str, says: str) -> None:
    with pytest.raises(InvalidURL, match=says) as caught:
        Database(f"mysql://shop:s3cret@db.example/shop?{query}")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["ssl_ca", "ssl-mode", "ssl", "ssl_key", "charset", "connect_timeout"]
)
def test_a_parameter_without_a_value_is_no_wish_to_go_without(name: str) -> None:
    with pytest.raises(InvalidURL, match=f"{name}= without a value"):
        Database(f"mysql://db.example/shop?{name}=")


@each_driver
@pytest.mark.parametrize("charset", ["foo", "dec8"])
def test_a_charset_that_is_none_is_said_when_the_driver_is_asked(driver: str, charset: str) -> None:
    with pytest.raises(InvalidURL, match=f"charset={charset}, which {driver} does not know"):
        look(f"mysql://shop:s3cret@db.example/shop?charset={charset}", driver, "SELECT 1")


@each_driver
def test_a_charset_has_the_name_that_mysql_gives_it_today(mysql_url: str, driver: str) -> None:
    charset = look(f"{mysql_url}?charset=utf8mb3", driver, "SELECT @@character_set_client")
    assert charset == "utf8mb3"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("password = s3cret", "it is not made of groups"),
        ("[client]\npassword = s3cret\n\xff", "it is not made of groups"),
        ("[mysqld]\npassword = s3cret", r"no group \[client\]"),
        (
            "[client]\npassword = s3cret\nssl_mode = REQUIRED",
            "ssl-mode, which the drivers",
        ),
        ("[client]\npassword = s3cret\nssl", "ssl, which the drivers"),
        ("[client]\npassword = s3cret\nskip_ssl", "skip-ssl, which the drivers"),
        ("[client]\nloose-ssl-mode = REQUIRED", "loose-ssl-mode, which the drivers"),
        ("[client]\n!includedir /etc/my.d", "!includedir /etc/my.d, which the drivers"),
    ],
)
def test_a_file_of_options_that_would_be_passed_over_is_refused(
    tmp_path: Path, content: str, says: str
) -> None:
    (file := tmp_path / "my.cnf").write_bytes(content.encode("latin-1"))
    with pytest.raises(InvalidURL, match=says) as caught:
        Database(f"mysql://shop@db.example/shop?read_default_file={file}")
    assert "s3cret" not in f"{caught.value}{caught.value.__context__!r}"


@each_driver
def test_a_file_of_options_is_read(mariadb: MariaServer, tmp_path: Path, driver: str) -> None:
    """What it says of TLS is nothing where the URL says it."""
    account = f"user = root\npassword = {mariadb.password}\nport = {mariadb.port}"
    (file := tmp_path / "my.cnf").write_text(f"[till]\n{account}\nssl-mode = REQUIRED")
    query = f"read_default_file={file}&read_default_group=till&ssl_mode=DISABLED"
    assert look(f"mysql://{mariadb.host}/mysql?{query}", driver, "SELECT 1") == 1


@pytest.mark.parametrize(
    "url", ["mysql://u:p@a,b/shop", "mysql://u:p@a:1,b:2/shop", "mysql://u:p@/shop?host=a&host=b"]
)
def test_several_hosts_are_refused(url: str) -> None:
    with pytest.raises(InvalidURL, match="several hosts"):
        Database(url)


def test_account_and_place_may_be_parameters(mariadb: MariaServer, mysql_database: str) -> None:
    account = urlencode({"user": "root", "password": mariadb.password})
    place = f"host={mariadb.host}&port={mariadb.port}&database={mysql_database}"
    for driver in DRIVERS:
        assert look(f"mysql:///?{account}&{place}", driver, "SELECT DATABASE()") == mysql_database


@each_driver
def test_a_socket_may_stand_in_the_hosts_place(mariadb: MariaServer, driver: str) -> None:
    place = quote(str(mariadb.folder / "socket"), safe="")
    assert look(f"mysql://root:{mariadb.password}@{place}/mysql", driver, "SELECT 1") == 1


@each_driver
def test_what_both_drivers_know_does_the_same(mysql_url: str, driver: str) -> None:
    query = urlencode(
        {
            "sql_mode": "ANSI_QUOTES,STRICT_ALL_TABLES",
            "init_command": "SET @greeting = 'hello'",
            "charset": "latin1",
            "program_name": "till",
            "connect_timeout": 5,
            "read_timeout": 5,
        }
    )
    seen = "SELECT CONCAT_WS(' ', @@sql_mode, @greeting, @@character_set_client)"
    assert (
        look(f"{mysql_url}?{query}", driver, seen) == "ANSI_QUOTES,STRICT_ALL_TABLES hello latin1"
    )


@pytest.mark.parametrize(
    ("query", "driver", "other"),
    [("collation=utf8mb4_bin", "pymysql", "asyncmy"), ("stmt_cache_size=9", "asyncmy", "pymysql")],
)
def test_what_one_driver_knows_the_other_refuses(
    mysql_url: str, query: str, driver: str, other: str
) -> None:
    assert look(f"{mysql_url}?{query}", driver, "SELECT 1") == 1
    with pytest.raises(UnsupportedByDriver, match=f"{other} cannot do .* {query}"):
        look(f"{mysql_url}?{query}", other, "SELECT 1")


def test_a_connect_timeout_of_the_url_is_not_made_longer() -> None:
    """The pool's own is 30 seconds."""
    backend = MySQL(make_url("mysql://db.example/shop?connect_timeout=7"))
    arguments = backend.engine_options(Side.SYNC, Role.PRIMARY, {})["connect_args"]
    backend.limit_connect(arguments, 30.0)
    assert arguments["connect_timeout"] == arguments["read_timeout"] == 7


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encrypted(certificates: Certificates) -> Iterator[MariaServer]:
    """A server with TLS, whose name is localhost."""
    if find_mariadbd() is None:
        pytest.skip("there is no mariadbd here: as root, `apt-get install mariadb-server`")
    with MariaServer(certificates) as server:
        yield server


@pytest.fixture
def url(encrypted: MariaServer) -> str:
    return encrypted.url().replace(encrypted.host, "localhost")


def fails(url: str, driver: str) -> None:
    with pytest.raises((DBAPIError, OSError)):  # the driver's own
        look(url, driver, "SELECT 1")


@each_driver
@pytest.mark.parametrize("mode", ["REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY"])
def test_a_server_without_tls_is_refused(driver: str, mode: str, mariadb: MariaServer) -> None:
    fails(f"{mariadb.url()}?ssl-mode={mode}", driver)


@each_driver
@pytest.mark.parametrize("query", ["ssl_mode=REQUIRED", "ssl-mode=required", "ssl=true"])
def test_required_encrypts_and_verifies_nothing(
    url: str, encrypted: MariaServer, driver: str, query: str
) -> None:
    assert cipher(f"{url}?{query}", driver)
    assert cipher(f"{encrypted.url()}?{query}", driver)


@each_driver
@pytest.mark.parametrize("query", ["ssl_mode=DISABLED", "ssl=false", "ssl_disabled=true"])
def test_disabled_does_not_encrypt(url: str, driver: str, query: str) -> None:
    assert cipher(f"{url}?{query}", driver) == ""


def test_preferred_is_what_one_driver_can_do(url: str, mariadb: MariaServer) -> None:
    assert cipher(f"{url}?ssl_mode=PREFERRED", "pymysql")
    assert cipher(f"{mariadb.url()}?ssl_mode=PREFERRED", "pymysql") == ""
    with pytest.raises(UnsupportedByDriver, match="REQUIRED, or DISABLED"):
        cipher(f"{url}?ssl_mode=PREFERRED", "asyncmy")


@each_driver
@pytest.mark.parametrize(
    ("query", "by_name"),
    [
        ("ssl_ca={root}", True),  # as SQLAlchemy has it
        ("ssl-mode=VERIFY_IDENTITY&ssl-ca={root}", True),
        ("ssl_ca={root}&ssl_check_hostname=false", False),
        ("ssl_mode=VERIFY_CA&ssl_ca={root}", False),
    ],
)
def test_the_server_is_verified_and_where_asked_its_name(
    url: str,
    encrypted: MariaServer,
    certificates: Certificates,
    driver: str,
    query: str,
    by_name: bool,
) -> None:
    right = query.format(root=certificates.root)
    assert cipher(f"{url}?{right}", driver)
    fails(f"{url}?{query.format(root=certificates.other_root)}", driver)
    by_another_name = f"{encrypted.url()}?{right}"
    if by_name:
        fails(by_another_name, driver)
    else:
        assert cipher(by_another_name, driver)


@each_driver
def test_without_an_authority_those_of_the_machine_are_trusted(url: str, driver: str) -> None:
    fails(f"{url}?ssl_mode=VERIFY_IDENTITY", driver)


@each_driver
def test_a_client_shows_its_certificate(
    url: str, encrypted: MariaServer, certificates: Certificates, driver: str, tmp_path: Path
) -> None:
    encrypted.execute("CREATE OR REPLACE USER only_x509 REQUIRE X509")
    key = tmp_path / "locked.key"
    certificates.encrypt_key(key, "open sesame")
    bare = url.replace(f"root:{encrypted.password}", "only_x509").replace("/mysql", "/")
    own = f"ssl_cert={certificates.cert}&ssl_key="
    fails(f"{bare}?ssl_mode=REQUIRED", driver)
    assert cipher(f"{bare}?{own}{certificates.key}", driver)
    assert cipher(f"{bare}?{own}{key}&ssl_key_password=open+sesame", driver)
    with pytest.raises(InvalidCertificate, match="ssl_key=") as caught:
        Database(f"{bare}?{own}{key}&ssl_key_password=open+sesam")
    assert "sesam" not in str(caught.value)


@each_driver
def test_what_a_file_of_options_says_of_tls_counts_with_the_mode_of_the_url(
    url: str, encrypted: MariaServer, certificates: Certificates, driver: str, tmp_path: Path
) -> None:
    def file(**options: object) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.cnf"
        lines = [f"{name} = {value}" for name, value in options.items()]
        path.write_text("\n".join(["[client]", *lines]))
        return f"?read_default_file={path}"

    right, wrong = file(ssl_ca=f'"{certificates.root}"'), file(ssl_ca=certificates.other_root)
    elsewhere = encrypted.url()  # by another name
    for query in ("", "&ssl=true", "&ssl_mode=VERIFY_IDENTITY", "&ssl_mode=VERIFY_CA"):
        assert cipher(f"{url}{right}{query}", driver)
        fails(f"{url}{wrong}{query}", driver)
        if query.endswith("CA"):
            assert cipher(f"{elsewhere}{right}{query}", driver)
        else:
            fails(f"{elsewhere}{right}{query}", driver)
    assert cipher(f"{url}{wrong}&ssl_ca={certificates.root}", driver)  # the URL's own counts first
    assert cipher(f"{url}{wrong}&ssl_mode=REQUIRED", driver)  # which verifies nothing
    if driver == "pymysql":
        assert cipher(f"{url}{right}&ssl_mode=DISABLED", driver) == ""
    else:
        with pytest.raises(UnsupportedByDriver, match="would encrypt in spite of"):
            cipher(f"{url}{right}&ssl_mode=DISABLED", driver)
    encrypted.execute("CREATE OR REPLACE USER only_x509 REQUIRE X509")
    bare = url.replace(f"root:{encrypted.password}", "only_x509").replace("/mysql", "/")
    own = file(**{"ssl-cert": certificates.cert, "ssl-key": certificates.key})
    for query in ("", "&ssl_mode=REQUIRED", f"&ssl_ca={certificates.root}"):
        assert cipher(f"{bare}{own}{query}", driver)
    with pytest.raises(InvalidURL, match="with its read_default_file has ssl_ca=, which says noth"):
        Database(f"{url}{right}&ssl_verify_cert=false")


@pytest.mark.parametrize(
    "query",
    [
        "ssl_mode=REQUIRED&ssl_ca=x.pem",
        "ssl_mode=DISABLED&ssl_cert=x.pem",
        "ssl=false&ssl_ca=x.pem",
        "ssl_mode=VERIFY_CA&ssl_check_hostname=true",
        "ssl_ca=x.pem&ssl_verify_cert=false",
        "ssl_mode=REQUIRED&ssl_verify_cert=true",
    ],
)
def test_what_would_verify_less_than_it_looks_is_refused(query: str) -> None:
    with pytest.raises(InvalidURL, match="says nothing with ssl_mode="):
        Database(f"mysql://db.example/shop?{query}")


def test_a_file_that_cannot_be_read_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidCertificate, match="ssl_ca=.*missing.pem cannot be used: No such"):
        Database(f"mysql://db.example/shop?ssl_ca={tmp_path / 'missing.pem'}")
    (none := tmp_path / "none.pem").write_text("no certificate")
    with pytest.raises(InvalidCertificate, match="see that it is PEM"):
        Database(f"mysql://db.example/shop?ssl_ca={none}")


@each_driver
def test_an_idle_connection_with_tls_lives_and_its_death_is_seen(
    url: str, encrypted: MariaServer, driver: str
) -> None:
    """Its socket is found under TLS as well, and holds nothing that looks like a last word."""
    numbers: list[int] = []

    def unit(connection: Any) -> None:
        numbers.append(connection.scalar(text("SELECT connection_id()")))

    options: dict[str, Any] = {"pool_size": 1, "pool_ping_after": 60}

    def die() -> None:
        encrypted.kill_backend(numbers[-1])
        while any(row[0] == numbers[-1] for row in encrypted.backends("mysql")):
            time.sleep(0.005)
        time.sleep(0.01)  # as guarantee 3 has it: the server hangs up a moment later

    if driver == "pymysql":
        with Database(f"{url}?ssl=true", **options) as database:
            for lives in (True, True, False, True):
                if not lives:
                    die()
                with database.session() as db:
                    unit(db.connection())
    else:

        async def main() -> None:
            async with DatabaseSessionManager().init(f"{url}?ssl=true", **options) as manager:
                for lives in (True, True, False, True):
                    if not lives:
                        die()
                    async with manager.session() as db:
                        await (await db.connection()).run_sync(unit)

        asyncio.run(main())
    first, second, third, fourth = numbers
    assert first == second != third == fourth


@each_driver
def test_a_cancelled_or_interrupted_statement_ends_on_a_server_with_tls(
    url: str, encrypted: MariaServer, driver: str
) -> None:
    """KILL goes over a connection of the same kind."""
    begun = threading.Event()
    place = f"{url}?ssl=true"

    def is_asleep() -> bool:
        return any("sleep(60)" in str(row[2]) for row in encrypted.backends("mysql"))

    if driver == "pymysql":
        with Database(place) as database:

            def sleep() -> None:
                with pytest.raises((DBAPIError, ManagerClosed)), database.session() as db:
                    begun.set()
                    db.execute(text("SELECT sleep(60)"))

            thread = threading.Thread(target=sleep)
            thread.start()
            begun.wait()
            while not is_asleep():
                time.sleep(0.005)
            database.close(timeout=0)
            thread.join(15)
            assert not thread.is_alive()
    else:

        async def main() -> None:
            async with DatabaseSessionManager().init(place) as manager:

                async def sleep() -> None:
                    async with manager.session() as db:
                        await db.execute(text("SELECT sleep(60)"))

                task = asyncio.create_task(sleep())
                while not await asyncio.to_thread(is_asleep):
                    time.sleep(0.005)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(main())
    while is_asleep():
        time.sleep(0.005)


# --- who connects ---------------------------------------------------------------------------------


@each_driver
def test_a_refused_password_is_asked_for_once_more(
    mariadb: MariaServer, mysql_database: str, driver: str
) -> None:
    """A rotated password costs no unit; the same answer is not tried twice."""
    mariadb.execute("CREATE OR REPLACE USER till IDENTIFIED BY 'fresh'")
    mariadb.execute(f"GRANT ALL ON {mysql_database}.* TO till")
    bare = f"mysql://till@{mariadb.host}:{mariadb.port}/{mysql_database}"
    answers = iter(["stale", "fresh"])
    assert look(bare, driver, "SELECT 1", password=lambda: next(answers)) == 1
    assert list(answers) == []
    asked = itertools.count()
    with pytest.raises(DBAPIError, match="1045"):
        look(bare, driver, "SELECT 1", password=lambda: f"{next(asked)} is stale"[2:])
    assert next(asked) == 2


@each_driver
def test_rotations_fail_no_unit(mariadb: MariaServer, mysql_database: str, driver: str) -> None:
    mariadb.execute("CREATE OR REPLACE USER till IDENTIFIED BY 'first'")
    mariadb.execute(f"GRANT ALL ON {mysql_database}.* TO till")
    bare = f"mysql://till@{mariadb.host}:{mariadb.port}/{mysql_database}"
    valid, lock, over, failed = ["first"], threading.Lock(), threading.Event(), []
    units = [0] * 5

    def password() -> str:
        with lock:
            return valid[-1]

    def rotate(number: int) -> None:
        with lock:
            mariadb.execute(f"ALTER USER till IDENTIFIED BY 'number {number}'")
            valid.append(f"number {number}")
        before = list(units)
        while not failed and min(after - one for after, one in zip(units, before, strict=True)) < 2:
            time.sleep(0.005)

    manager = DatabaseSessionManager().init(bare, password=password)
    engine = manager.sync_engine if driver == "pymysql" else manager.engine.sync_engine
    event.listen(engine, "checkin", lambda _, record: record.invalidate())

    async def work(number: int) -> None:
        while not over.is_set():
            try:
                async with manager.session() as db:
                    await db.scalar(text("SELECT 1"))
            except Exception as error:
                failed.append(error)
            units[number] += 1

    def work_here(number: int) -> None:
        while not over.is_set():
            try:
                with manager.sync_session() as db:
                    db.scalar(text("SELECT 1"))
            except Exception as error:
                failed.append(error)
            units[number] += 1

    async def main() -> None:
        kind = (lambda n: asyncio.to_thread(work_here, n)) if driver == "pymysql" else work
        tasks = [asyncio.ensure_future(kind(number)) for number in range(len(units))]
        for number in range(5):
            await asyncio.to_thread(rotate, number)
        over.set()
        await asyncio.gather(*tasks)
        await manager.close()

    asyncio.run(main())
    assert failed == []


@each_driver
def test_no_frame_of_a_connect_in_vain_has_the_password(mariadb: MariaServer, driver: str) -> None:
    secret = "s3cr3t-and-unheard-of"
    url = f"mysql://nobody:{secret}@{mariadb.host}:{mariadb.port}/mysql"
    with pytest.raises(DBAPIError, match="1045") as caught:
        look(url, driver, "SELECT 1")
    theirs = [frame for frame, _ in walk_tb(caught.tb) if frame.f_globals["__name__"] != __name__]
    assert len(theirs) > 5
    assert [frame for frame in theirs if secret in repr(frame.f_locals)] == []


@each_driver
def test_a_password_is_sent_in_utf_8(mariadb: MariaServer, driver: str) -> None:
    """As whoever has set it did; of what Latin-1 lacks, the drivers would print the whole."""
    mariadb.execute("CREATE OR REPLACE USER greek IDENTIFIED BY 'πä€'")
    place = f"{mariadb.host}:{mariadb.port}/"
    assert look(f"mysql://greek:{quote('πä€')}@{place}", driver, "SELECT 1") == 1
    assert look(f"mysql://greek@{place}", driver, "SELECT 1", password=lambda: "πä€") == 1


# --- why a server does not answer -----------------------------------------------------------------


def check(url: str, driver: str, wait: float | None = None, pool_timeout: float = 30) -> None:
    if driver == "pymysql":
        with Database(url, pool_timeout=pool_timeout) as door:
            door.check(wait=wait)
        return

    async def main() -> None:
        async with DatabaseSessionManager().init(url, pool_timeout=pool_timeout) as manager:
            await manager.check(wait=wait)

    asyncio.run(main())


@each_driver
def test_a_user_at_their_limit_is_waited_for(mariadb: MariaServer, driver: str) -> None:
    mariadb.execute("CREATE OR REPLACE USER few IDENTIFIED BY 'few' WITH MAX_USER_CONNECTIONS 1")
    url = f"mysql://few:few@{mariadb.host}:{mariadb.port}/"
    taken = pymysql.connect(host=mariadb.host, port=mariadb.port, user="few", password="few")
    with pytest.raises(DBAPIError, match="1226") as caught:
        check(url, driver, pool_timeout=2)
    assert "max_user_connections" in "".join(caught.value.__notes__)
    closing = threading.Timer(0.5, taken.close)
    closing.start()
    check(url, driver, wait=30)
    closing.join()


@pytest.mark.parametrize("number", [1129, 1130])
def test_a_host_that_is_kept_out_is_not_waited_for(number: int) -> None:
    """By its number: a server that resolves names, and one without `%`, would each be another."""
    why = MySQL(make_url("mysql://")).diagnose(pymysql.OperationalError(number, "Host is …"))
    assert why is not None
    assert (why.passes, why.is_reached) == (False, True)
    assert "FLUSH HOSTS" in why.cure


@each_driver
def test_a_server_without_tls_says_so_on_both_sides(mariadb: MariaServer, driver: str) -> None:
    with pytest.raises(DBAPIError) as caught:
        check(f"{mariadb.url()}?ssl_mode=REQUIRED", driver, wait=30)
    assert "no TLS came about with the server" in "".join(caught.value.__notes__)


@each_driver
def test_a_certificate_that_is_not_trusted_is_said_to_be_none(
    url: str, encrypted: MariaServer, certificates: Certificates, driver: str
) -> None:
    for place, root in (
        (url, certificates.other_root),
        (encrypted.url(), certificates.root),  # which names another host
    ):
        with pytest.raises((DBAPIError, OSError)) as caught:
            check(f"{place}?ssl_ca={root}", driver)
        (note,) = caught.value.__notes__
        assert "the server's certificate is not to be trusted. Name with ssl_ca who" in note


# --- deadlines ------------------------------------------------------------------------------------


@each_driver
def test_a_server_that_says_little_now_and_then_does_not_hold_a_connect(driver: str) -> None:
    """Each of its bytes is an answer in time, to PyMySQL's own limit."""
    over = threading.Event()

    def drip() -> None:
        line, _ = listener.accept()
        with line, suppress(OSError):
            for byte in b"\x4a\0\0\0\x0a" + b"8" * 100:
                line.sendall(bytes([byte]))
                if over.wait(0.4):
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        try:
            with pytest.raises((ConnectTimeout, DBAPIError, OSError)):
                look(
                    f"mysql://u:p@127.0.0.1:{listener.getsockname()[1]}/d",
                    driver,
                    "SELECT 1",
                    pool_timeout=2.5,
                )
            assert time.monotonic() - started < 12
        finally:
            over.set()
            thread.join()
