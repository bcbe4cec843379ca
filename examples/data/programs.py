"""Programs that Debian and Ubuntu ship, installed with apt-get where they are missing.

Their releases cannot be named as those of PyPI and npm are: the archives keep none but the newest of a distribution.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from examples.data.clients import run_client


def install(packages: Mapping[str, str]) -> None:
    """Installs what is missing; nothing is called if nothing is.

    Args:
        packages: the package of each program, by the program's name.

    Raises:
        ValueError: a program is missing and this user cannot install it, or apt-get failed, or has it not.
    """
    absent = {program: package for program, package in packages.items() if not shutil.which(program)}
    if not absent:
        return
    names = sorted(set(absent.values()))
    if shutil.which("apt-get") is None:
        programs = ", ".join(sorted(absent))
        raise ValueError(f"{programs} not installed, and there is no apt-get; install it with this system's own tools")
    if os.geteuid() != 0:
        command = f"sudo apt-get install {' '.join(names)}"
        raise ValueError(f"{', '.join(names)} not installed; installing needs root: {command}")
    options = ["-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=1800"]  # for another apt-get to end
    old = ""
    try:
        run_client(["apt-get", "update", "-qq"], "the lists of packages")
    except ValueError as error:  # those that are there may do
        old = f"; before that, {error}"
    try:
        run_client(["apt-get", "install", *options, *names], ", ".join(names))
    except ValueError as error:
        raise ValueError(f"{error}{old}") from error
    for program, package in sorted(absent.items()):
        if not shutil.which(program):
            raise ValueError(f"apt-get installed {package}, but in this release that has no program {program}")
