"""Finds a Chromium for the tests of the page; installs Debian's where that is possible.

    python dev/browser.py

Its last word is where the browser is; or, with exit status 1, what has to be done by hand.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# Throwaway machines are what it is installed on by itself: no time for a disk that may lose power.
INSTALL = ("install", "--yes", "--no-install-recommends", "-o=Dpkg::Options::=--force-unsafe-io")


class Failed(Exception):
    """There is no browser, and why."""


def find() -> str | None:
    """Return where a Chromium is, of those on PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def is_debian() -> bool:
    """Whether this is Debian itself; Ubuntu's package of that name only calls a snap."""
    try:
        return platform.freedesktop_os_release()["ID"] == "debian"
    except OSError:
        return False


def install() -> None:
    """Install Debian's package."""
    if not is_debian() or shutil.which("apt-get") is None:
        raise Failed("by itself it is installed only on Debian, with apt-get")
    if os.geteuid() != 0:
        raise Failed("only root can install it")
    print("· installing Debian's chromium", file=sys.stderr, flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (("update",), (*INSTALL, "chromium")):
        command = ["apt-get", "-qq", "-o=Acquire::Retries=3", *words]
        run = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if run.returncode:
            raise Failed(f"{' '.join(command)} failed:\n{run.stdout.strip()}")


def main() -> int:
    """Say where the browser is, or what is missing."""
    try:
        if find() is None:
            install()
    except Failed as reason:
        print(
            f"make browser needs Chromium, and none of {', '.join(NAMES)} is on PATH: {reason}.\n"
            "Install it, and run this again: apt-get install chromium on Debian, dnf install "
            "chromium on Fedora, Google's package on Ubuntu and macOS. Where nobody can install "
            "it, this step cannot pass.",
            file=sys.stderr,
        )
        return 1
    print(find())
    return 0


if __name__ == "__main__":
    sys.exit(main())
