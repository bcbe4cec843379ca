"""Which lines of which files a cleaning drops, as the builders ask for it.

    OUTPUT/
        drops.npy      numbers of the dropped lines (u8), ascending within each file, file after file
        manifest.json  the files, in that order, with their sizes; checksums
        dropped.jsonl  for people: a line a dropped record, with the reason
        report.json, report.md
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from megatron_mm.data.jobs.parallel import LineBlock
from megatron_mm.data.store.arrays import load_array
from megatron_mm.data.store.manifest import CHECKSUM, MANIFEST, read_manifest, sha256
from megatron_mm.media.errors import DataError

FORMAT = "megatron_mm cleaned corpus"
VERSION = 1
DROPS = "drops.npy"


class DropList:
    """The dropped lines of a cleaning; the file of numbers is mapped, not read.

    Args:
        folder: written by tools/clean_corpus.py.

    Raises:
        DataError: it is something else, or damaged.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        path = os.path.join(folder, MANIFEST)
        if not os.path.exists(path):
            raise DataError(f"{folder}: holds no {MANIFEST}; name a folder that tools/clean_corpus.py wrote")
        self._manifest = read_manifest(path)
        if (self._manifest.get("format"), self._manifest.get("version")) != (FORMAT, VERSION):
            raise DataError(f"{path}: not of a cleaned corpus (format {self._manifest.get('format')!r})")
        try:
            self._sources = {source["path"]: source for source in self._manifest["sources"]}
            counts = [int(source["dropped"]) for source in self._sources.values()]
            self._checksums = self._manifest[CHECKSUM], self._manifest["files"][DROPS]["sha256"]
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(f"{path}: damaged (no list of files and what was dropped: {error!r})") from error
        lines = load_array(os.path.join(folder, DROPS))
        if lines.dtype != np.uint64 or lines.shape != (sum(counts),):
            raise DataError(f"{os.path.join(folder, DROPS)}: damaged (it and {MANIFEST} disagree)")
        self._lines = dict(zip(self._sources, np.split(lines, np.cumsum(counts)[:-1])))

    @property
    def identity(self) -> str:
        """Checksum of what is dropped, of which files, and why."""
        return self._checksums[0]

    def check_inputs(self, inputs: Sequence[str]) -> None:
        """Compares the list with the files that a builder is to read.

        Raises:
            DataError: the list is damaged, was made of other files, or a file's size has changed since.
        """
        path = os.path.join(self.folder, DROPS)
        if sha256(path) != self._checksums[1]:
            raise DataError(f"{path}: damaged (its SHA-256 is not the one with which it was written)")
        for given in inputs:
            source = self._sources.get(os.path.abspath(given))
            if source is None:
                raise DataError(f"{given}: {self.folder} was made without this file; clean it with the others")
            if (size := os.path.getsize(given)) != source["bytes"]:
                raise DataError(
                    f"{given}: has {size} bytes, but {source['bytes']} when {self.folder} was made of it; "
                    "run tools/clean_corpus.py again"
                )

    def within(self, block: LineBlock) -> frozenset[int]:
        """Numbers of the lines of a block that are dropped."""
        lines = self._lines[os.path.abspath(block.path)]
        end = block.first_line + block.data.count(b"\n") + (not block.data.endswith(b"\n"))
        low, high = np.searchsorted(lines, np.array([block.first_line, end], dtype=np.uint64))
        return frozenset(lines[low:high].tolist())


def drop_options(folder: str | None, inputs: Sequence[str]) -> dict[str, str]:
    """What a builder notes in its options and manifest of its --drop: nothing, or the list's identity.

    Raises:
        DataError: the list does not fit the builder's inputs.
    """
    if folder is None:
        return {}
    drops = DropList(folder)
    drops.check_inputs(inputs)
    return {"drop": drops.identity}
