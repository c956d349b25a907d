"""The docs say what the code says: a heading for each error code, a line for each setting."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from scenario import until
from sqlalchemy import inspect

from engineroom import Database, DatabaseSettings, errors

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
ABSTRACT = {"engineroom-error", "usage-error", "configuration-error", "schema-error"}


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


PAGES = ["asgi.md", "fastapi.md", "flask.md", "litestar.md"]


def walk(page: str, folder: Path, python: Path) -> None:
    """Go a new user's way: the page's first block is `app.py`, its shell block starts that."""
    told = (DOCS / page).read_text()
    (folder / "app.py").write_text(re.findall(r"```python\n(.*?)```", told, re.DOTALL)[0])
    start, *calls = re.findall(r"```sh\n(.*?)```", told, re.DOTALL)[0].splitlines()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(python), "-m", *start.split(), "--port", str(port)]
    for sent in (calls, calls[-1:]):  # and it is started again the next day
        with started(command, folder, port):
            for call in sent:
                host, _, path = call.split()[-1].strip("'").partition("/")
                assert host.startswith("localhost:")
                method = "POST" if "-X POST" in call else "GET"
                answer = httpx.request(method, f"http://127.0.0.1:{port}/{path}")
                assert answer.status_code < 300, answer.text
            assert "valve" in answer.text


@pytest.mark.parametrize("page", PAGES)
def test_a_new_users_path_is_what_the_page_says(page: str, tmp_path: Path) -> None:
    walk(page, tmp_path, Path(sys.executable))


@pytest.mark.soak
@pytest.mark.parametrize("page", PAGES)
def test_what_the_page_installs_is_all_that_its_path_needs(page: str, tmp_path: Path) -> None:
    """The built wheel in an environment of its own, by the page's own line."""
    python, wheels = tmp_path / "venv" / "bin" / "python", tmp_path / "wheels"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [str(python), "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, DOCS.parent], check=True)
    (wheel,) = wheels.glob("*.whl")
    line = re.findall(r"^pip install (.*)$", (DOCS / page).read_text(), re.MULTILINE)[0]
    wanted = re.sub(r"(engineroom\[.*?\])", rf"\1@{wheel.as_uri()}", line)
    subprocess.run([*pip, "install", *shlex.split(wanted)], check=True)
    (tmp_path / "shop").mkdir()
    walk(page, tmp_path / "shop", python)


@contextmanager
def started(command: list[str], folder: Path, port: int) -> Iterator[None]:
    env = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.DEVNULL) as server:
        try:
            until(lambda: is_listening(port) or server.poll() is not None, bool, deadline=60)
            yield
        finally:
            server.terminate()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("name", sorted(DatabaseSettings.model_fields))
def test_each_setting_is_in_the_docs_with_its_variable_and_default(name: str) -> None:
    field = DatabaseSettings.model_fields[name]
    choices = getattr(field.validation_alias, "choices", [f"DB_{name.upper()}"])
    rows = (DOCS / "settings.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{choices[0]}`")]
    default = "|" if field.default in (None, "") else f"`{str(field.default).lower()}` |"
    assert row.rpartition(" | " if default != "|" else " ")[2] == default


def test_the_path_to_the_first_migration_is_what_the_page_says(tmp_path: Path) -> None:
    """Models, Alembic's own folder, `env.py`, a migration, an application: as they stand there."""
    told = (DOCS / "migrations.md").read_text()
    (tmp_path / "models.py").write_text(re.findall(r"```python\n(.*?)```", told, re.DOTALL)[0])
    files = dict(re.findall(r":caption: (\S+)\n(.*?)```", told, re.DOTALL))
    assert list(files) == ["migrations/env.py", "app.py"]
    env = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    scripts = re.findall(r"```sh\n(.*?)```", told, re.DOTALL)
    for script, file in zip(scripts, files, strict=True):
        shown = subprocess.run(
            ["sh", "-ec", script],
            cwd=tmp_path,
            env=env,
            text=True,
            capture_output=True,
            check=False,
        )
        assert shown.returncode == 0, shown.stdout + shown.stderr
        (tmp_path / file).write_text(files[file])
    assert "No new upgrade operations detected." in shown.stdout
    (tmp_path / "app.db").unlink()
    env["DATABASE_URL"] = "sqlite:///app.db"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) as server:
        try:
            until(lambda: is_listening(port) or server.poll() is not None, bool, deadline=60)
        finally:
            server.terminate()
    with Database(f"sqlite:///{tmp_path / 'app.db'}") as database:
        with database.connect() as connection:
            assert {"item", "alembic_version"} <= {*inspect(connection).get_table_names()}
