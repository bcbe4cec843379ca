"""Clients of package registries (npm, pip, apt-get, dpkg-deb), and what it means when one of them fails."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_PACKAGES = {"npm": "npm", "dpkg-deb": "dpkg"}
#: What a client says in each case; the first line that matches is quoted.
_CAUSES = {
    "this version is not, or no longer, in its registry": (
        r"notarget|\(from versions: (?!none\))|Version '.*' for '.*' was not found|Failed to fetch .* 404 "
    ),
    "its registry, or this release of the distribution, has no such package": (
        r"npm (error|ERR!) 404 .*Not Found|Unable to locate package|no installation candidate|couldn't find any package"
    ),
    "the registry cannot be reached: without a network only what was downloaded before is there": (
        r"ENOTFOUND|EAI_AGAIN|ECONN|ENETUNREACH|EHOSTUNREACH|ETIMEDOUT|Failed to establish a new connection|"
        r"Temporary failure|Could not (resolve|connect)|Cannot initiate the connection|ConnectTimeout|ReadTimeout"
    ),
    "the registry has no such package, or cannot be reached": r"\(from versions: none\)",
}
#: Ends of a client's output that say nothing of the cause.
_NOISE = re.compile(r"^(npm (error|ERR!|notice)\s*($|.*complete log of this run)|\[notice\])")


def run_client(arguments: Sequence[str], what: str, folder: Path | None = None, output: Path | None = None) -> str:
    """Runs a client and returns what it printed.

    Args:
        what: it is to get, for messages.
        folder: working directory.
        output: file for what it prints.

    Raises:
        ValueError: it is not installed, or failed; the cause and the line that tells it are said.
    """
    if shutil.which(arguments[0]) is None:
        where = f" (Debian and Ubuntu: the package {_PACKAGES[name]})" if (name := arguments[0]) in _PACKAGES else ""
        raise ValueError(f"{name} is not installed; it is needed to get {what}{where}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    with output.open("wb") if output is not None else contextlib.nullcontext(subprocess.PIPE) as out:
        done = subprocess.run(arguments, stdout=out, stderr=subprocess.PIPE, env=environment, cwd=folder, check=False)
    printed = (done.stdout or b"").decode(errors="replace")
    if done.returncode != 0:
        said = f"{done.stderr.decode(errors='replace')}\n{printed}"
        name = " ".join(arguments[1:3]) if arguments[1:2] == ["-m"] else arguments[0]
        raise ValueError(f"{name.removeprefix('-m ')} could not get {what}: {explain(said)}")
    return printed


def explain(said: str) -> str:
    """Why a client failed, from all that it said; its last line where the cause is another than those known."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not _NOISE.match(line.strip())]
    for cause, pattern in _CAUSES.items():
        for line in lines:
            if re.search(pattern, line):
                return f"{cause} ({line})"
    return lines[-1] if lines else "no message"
