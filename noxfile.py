"""The matrix: each Python of the machine × SQLAlchemy 2.0 and 2.1, against the built wheel.

The column "2.0" is the oldest of everything: each floor that pyproject.toml promises, as it stands
there. The column "2.1" is the newest of everything.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).parent
sys.path.append(str(ROOT / "dev"))

from pythons import pythons  # noqa: E402

SOURCES = ROOT / "src"
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
SQLALCHEMY = ["2.0", "2.1"]

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["tests"]


FOUND = pythons()
PYTHONS = list(FOUND)
for python in FOUND.values():
    if shutil.which(python.name) != str(python):  # where nox looks
        os.environ["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"


def floors() -> list[str]:
    """Return the oldest version that pyproject.toml promises of each dependency, as a pin."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    promised = [*PROJECT["project"]["dependencies"], *(line for lines in extras for line in lines)]
    return [re.sub(r">=([\d.]+).*", r"==\1", line) for line in promised if "pytest" not in line]


# What the corners leave to `make test` and to the whole matrix, for the time it takes.
SLOW = (
    "abandoned",
    "bench",
    "cap",
    "celery",
    "check",
    "clones",
    "close",
    "deadlines",
    "docs",
    "fork",
    "liveness",
    "loops",
    "memory",
    "mysql_rooms",
    "nights",
    "plugin",
    "pool",
    "pooler",
    "preload",
    "proxy",
    "registry",
    "sandbox",
    "sandbox_fates",
    "servers",
    "shop",
    "shop_process",
    "shop_service",
    "shop_suite",
    "sqlite",
    "starters",
    "strikes",
    "web_load",
)
WITHOUT_SLOW = tuple(f"--ignore=tests/test_{name}.py" for name in SLOW)


def packed(wheel: Path) -> set[str]:
    """Return the names of the files in a wheel."""
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def run_tests(session: nox.Session, sqlalchemy: str, *options: str) -> None:
    """Build the wheel, install it with the dependencies of a column, and run the tests on it."""
    wheels = Path(session.create_tmp())
    for old in wheels.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(wheels), ".")
    (wheel,) = wheels.glob("*.whl")
    files = {str(file.relative_to(SOURCES)) for file in SOURCES.rglob("*.*") if file.is_file()}
    if missing := {name for name in files if "__pycache__" not in name} - packed(wheel):
        session.error(f"not in the wheel: {', '.join(sorted(missing))}")
    extras = ",".join(PROJECT["project"]["optional-dependencies"])
    pins = floors() if sqlalchemy == "2.0" else ["sqlalchemy~=2.1.0"]
    groups = nox.project.dependency_groups(PROJECT, "tests")
    session.install(
        "--no-compile", f"engineroom[{extras}] @ {wheel.resolve().as_uri()}", *groups, *pins
    )
    environment = {"SQLALCHEMY": sqlalchemy}  # tests/test_house.py sees that it is that one
    cache = f"cache_dir={session.create_tmp()}/pytest"
    pytest = ("python", "-m", "pytest", "-o", cache, *options, *session.posargs)
    try:
        session.run(*pytest, "--numprocesses", "6", "--dist", "loadfile", env=environment)
    except CommandFailed:  # as in .ci/run: what failed beside others runs once more alone
        session.run(
            *(*pytest, "--last-failed", "--last-failed-no-failures", "none"), env=environment
        )


@nox.session(python=PYTHONS)
@nox.parametrize("sqlalchemy", SQLALCHEMY)
def tests(session: nox.Session, sqlalchemy: str) -> None:
    """Run the tests on one field of the matrix."""
    run_tests(session, sqlalchemy)


@nox.session(python=PYTHONS[0], tags=["corners"])
def oldest(session: nox.Session) -> None:
    """Run a tenth of the quicker tests on the oldest Python with the oldest dependencies."""
    run_tests(session, SQLALCHEMY[0], *WITHOUT_SLOW, "--sample=10")


@nox.session(python=PYTHONS[-1], tags=["corners"])
def newest(session: nox.Session) -> None:
    """Run the tests on the newest Python with the newest dependencies."""
    run_tests(session, SQLALCHEMY[-1], *WITHOUT_SLOW)
