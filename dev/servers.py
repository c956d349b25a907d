"""Installs the servers that the tests need beside the throwaway ones: Debian's packages, as root.

    python dev/servers.py

It does nothing where they are there, and starts none of them: the tests start their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from debian import Failed, install

# Each package, and a program of it, by which it is known to be there.
PACKAGES = {
    "pgbouncer": ("/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"),
    "postgresql": ("/usr/lib/postgresql/*/bin/postgres",),
    "mariadb-server": ("/usr/sbin/mariadbd", "/usr/bin/mariadbd"),
}


def missing() -> list[str]:
    """Return the packages that are not there."""
    return [name for name, programs in PACKAGES.items() if not any(map(is_there, programs))]


def is_there(program: str) -> bool:
    """Whether a program, by its path or a pattern, is there."""
    return any(Path("/").glob(program.lstrip("/")))


def main() -> int:
    """Install what is missing, or say what has to be done by hand."""
    try:
        if packages := missing():
            install(packages, derived=True)
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
