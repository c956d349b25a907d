"""Which Pythons the machine has, from the oldest that engineroom promises on.

    python dev/pythons.py

prints the newest one's path.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST_MINOR = 11


def pythons() -> dict[str, Path]:
    """Return the program of each version, oldest first: of those on PATH and those of pyenv."""
    folders = pyenv_folders()
    found = {}
    for version in (f"3.{minor}" for minor in range(OLDEST_MINOR, OLDEST_MINOR + 20)):
        name = f"python{version}"
        on_path = shutil.which(name)
        places = [Path(on_path)] if on_path else []
        places += [folder / name for folder in folders]
        for place in places:
            if answers(place, version):
                found[version] = place
                break
    return found


def answers(python: Path, version: str) -> bool:
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
    try:
        folders = list(Path(root.strip(), "versions").glob("3.*/bin"))
    except PermissionError:  # another user's, whose environment we have inherited
        return []
    return sorted(folders, key=lambda f: [int(n) for n in re.findall(r"\d+", f.parent.name)])[::-1]


if __name__ == "__main__":
    if not (found := list(pythons().values())):
        sys.exit(f"There is no Python 3.{OLDEST_MINOR} or newer here.")
    print(found[-1])
