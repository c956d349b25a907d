"""Installs the servers that the tests need beside the throwaway ones: Debian's packages, as root.

    python dev/servers.py

It does nothing where they are there, and starts none of them: the tests start their own.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Each package, and a program of it, by which it is known to be there.
PACKAGES = {
    "pgbouncer": ("/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"),
    "postgresql": ("/usr/lib/postgresql/*/bin/postgres",),
    "mariadb-server": ("/usr/sbin/mariadbd", "/usr/bin/mariadbd"),
}
# Throwaway machines are what it is installed on by itself: no time for a disk that may lose power.
INSTALL = ("install", "--yes", "--no-install-recommends", "-o=Dpkg::Options::=--force-unsafe-io")
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian's packages ask it whether they may start a service
NO_SERVICE = "#!/bin/sh\nexit 101\n"


class Failed(Exception):
    """What is missing cannot be installed, and why."""


def missing() -> list[str]:
    """Return the packages that are not there."""
    return [name for name, programs in PACKAGES.items() if not any(map(is_there, programs))]


def is_there(program: str) -> bool:
    """Whether a program, by its path or a pattern, is there."""
    return any(Path("/").glob(program.lstrip("/")))


def is_debian() -> bool:
    """Whether this is Debian, or made of it."""
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        return False
    return "debian" in f"{system['ID']} {system.get('ID_LIKE', '')}".split()


def install(packages: list[str]) -> None:
    """Install Debian's packages."""
    if not is_debian() or shutil.which("apt-get") is None:
        raise Failed("by itself they are installed only on Debian, with apt-get")
    if os.geteuid() != 0:
        raise Failed("only root can install them")
    print(f"· installing Debian's {', '.join(packages)}", file=sys.stderr, flush=True)
    with no_services():
        for words in (("update",), (*INSTALL, *packages)):
            run("apt-get", "-qq", "-o=Acquire::Retries=3", *words)


def run(*command: str) -> None:
    """Run a command; what it says is shown only where it fails."""
    done = subprocess.run(
        command,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(f"{' '.join(command)} failed:\n{done.stdout.strip()}")


@contextlib.contextmanager
def no_services() -> Iterator[None]:
    """Have no package start its service, nor a cluster of databases, while it is installed."""
    kept = POLICY.with_name("policy-rc.d.engineroom")
    if POLICY.exists() and not kept.exists():
        POLICY.rename(kept)
    POLICY.write_text(NO_SERVICE)
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)
        if kept.exists():
            kept.rename(POLICY)


def main() -> int:
    """Install what is missing, or say what has to be done by hand."""
    try:
        if packages := missing():
            install(packages)
        if packages := missing():
            raise Failed("they were installed, and are not where they are looked for")
    except Failed as reason:
        print(
            f"make servers needs {', '.join(packages)}, which are not there: {reason}.\nInstall "
            "them, and run this again: on Debian and Ubuntu, apt-get install "
            f"{' '.join(packages)}. Without them the tests that need them do not run, and say so; "
            "where CI is set that is a failure.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
