"""Installs Debian's packages, as root: what the tests need that pip cannot bring."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# Throwaway machines are what it is installed on by itself: no time for a disk that may lose power.
INSTALL = ("install", "--yes", "--no-install-recommends", "-o=Dpkg::Options::=--force-unsafe-io")
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian's packages ask it whether they may start a service
NO_SERVICE = "#!/bin/sh\nexit 101\n"


class Failed(Exception):
    """What is missing cannot be installed, and why."""


def systems() -> list[str]:
    """Return the name of this system, and of those that it is made of."""
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        return []
    return [system["ID"], *system.get("ID_LIKE", "").split()]


def install(packages: Sequence[str], *, derived: bool) -> None:
    """Install packages; what apt says is shown only where it fails.

    Args:
        derived: Those of the systems that are made of Debian are as good.

    Raises:
        Failed: they could not be.
    """
    if "debian" not in (systems() if derived else systems()[:1]) or not shutil.which("apt-get"):
        raise Failed("only on Debian are they installed by themselves, with apt-get")
    if os.geteuid() != 0:
        raise Failed("only root can install them")
    print(f"· installing Debian's {', '.join(packages)}", file=sys.stderr, flush=True)
    with no_services():
        for words in (("update",), (*INSTALL, *packages)):
            command = ["apt-get", "-qq", "-o=Acquire::Retries=3", *words]
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
