"""Finds a Chromium for the tests of the page; installs Debian's where that is possible.

    python dev/browser.py

Its last word is where the browser is; or, with exit status 1, what has to be done by hand.
"""

from __future__ import annotations

import shutil
import sys

from debian import Failed, install

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def find() -> str | None:
    """Return where a Chromium is, of those on PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def main() -> int:
    """Say where the browser is, or what is missing."""
    try:
        if find() is None:
            install(["chromium"], derived=False)  # (Ubuntu's of that name only calls a snap)
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
