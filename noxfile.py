"""The matrix: each Python of the machine × SQLAlchemy 2.0 and 2.1, against the built wheel.

The column "2.0" is the oldest of everything: each floor that pyproject.toml promises, as it stands
there. The column "2.1" is the newest of everything.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
SQLALCHEMY = ["2.0", "2.1"]
OLDEST_MINOR = 11

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["tests"]


def answers(python: str, version: str) -> bool:
    """Whether it is that Python and really runs: a shim may name one that is not there."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return run.stdout.strip() == version


def pyenv_folders() -> list[Path]:
    """Return the folders of the Pythons that pyenv keeps, newest first."""
    if root := os.environ.get("PYENV_ROOT"):
        pass
    elif pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=True).stdout
    else:
        return []
    folders = Path(root.strip(), "versions").glob("3.*/bin")
    return sorted(folders, key=lambda f: [int(n) for n in re.findall(r"\d+", f.parent.name)])[::-1]


def pythons() -> list[str]:
    """Return the versions that the machine has, oldest first, and put each where nox looks."""
    kept = pyenv_folders()
    found = []
    for minor in range(OLDEST_MINOR, OLDEST_MINOR + 20):
        version = f"3.{minor}"
        name = f"python{version}"
        on_path = shutil.which(name)
        places = [Path(on_path)] if on_path else []
        places += [folder / name for folder in kept]
        for place in places:
            if answers(str(place), version):
                if shutil.which(name) != str(place):
                    os.environ["PATH"] = f"{place.parent}{os.pathsep}{os.environ['PATH']}"
                found.append(version)
                break
    return found


PYTHONS = pythons()


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
    "clones",
    "close",
    "fork",
    "liveness",
    "loops",
    "memory",
    "plugin",
    "preload",
    "proxy",
    "registry",
    "servers",
    "shop",
    "shop_process",
    "sqlite",
    "starters",
    "strikes",
    "web_load",
)
WITHOUT_SLOW = tuple(f"--ignore=tests/test_{name}.py" for name in SLOW)


def run_tests(session: nox.Session, sqlalchemy: str, *options: str) -> None:
    """Build the wheel, install it with the dependencies of a column, and run the tests on it."""
    wheels = Path(session.create_tmp())
    for old in wheels.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(wheels), ".")
    (wheel,) = wheels.glob("*.whl")
    extras = ",".join(PROJECT["project"]["optional-dependencies"])
    pins = floors() if sqlalchemy == "2.0" else ["sqlalchemy~=2.1.0"]
    groups = nox.project.dependency_groups(PROJECT, "tests")
    session.install(f"engineroom[{extras}] @ {wheel.resolve().as_uri()}", *groups, *pins)
    cache = f"cache_dir={session.create_tmp()}/pytest"
    pytest = ("python", "-m", "pytest", "-o", cache, *options, *session.posargs)
    try:
        session.run(*pytest, "--numprocesses", "4", "--dist", "loadfile")
    except CommandFailed:  # as in .ci/run: what failed beside others runs once more alone
        session.run(*pytest, "--last-failed", "--last-failed-no-failures", "none")


@nox.session(python=PYTHONS)
@nox.parametrize("sqlalchemy", SQLALCHEMY)
def tests(session: nox.Session, sqlalchemy: str) -> None:
    """Run the tests on one field of the matrix."""
    run_tests(session, sqlalchemy)


@nox.session(python=PYTHONS[0], tags=["corners"])
def oldest(session: nox.Session) -> None:
    """Run the tests on the oldest Python with the oldest dependencies."""
    run_tests(session, SQLALCHEMY[0], *WITHOUT_SLOW)


@nox.session(python=PYTHONS[-1], tags=["corners"])
def newest(session: nox.Session) -> None:
    """Run the tests on the newest Python with the newest dependencies."""
    run_tests(session, SQLALCHEMY[-1], *WITHOUT_SLOW)
