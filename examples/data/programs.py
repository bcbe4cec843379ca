"""Programs that Debian and Ubuntu ship, installed with apt-get where they are missing.

Their releases cannot be named as those of PyPI and npm are: the archives keep none but the newest of a distribution.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping


def install(packages: Mapping[str, str]) -> None:
    """Installs what is missing.

    Args:
        packages: the package of each program, by the program's name.

    Raises:
        ValueError: a program is missing and this user cannot install it, or apt-get failed.
    """
    missing = sorted({package for program, package in packages.items() if not shutil.which(program)})
    if not missing:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        names = " ".join(missing)
        raise ValueError(f"{', '.join(missing)} not installed; installing needs root: sudo apt-get install {names}")
    options = ["-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=1800"]  # for another apt-get to end
    for arguments in (["update", "-qq"], ["install", *options, *missing]):
        done = subprocess.run(
            ["apt-get", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            check=False,
        )
    if done.returncode != 0:
        raise ValueError(f"apt-get could not install {', '.join(missing)}: {done.stderr.strip()}")
