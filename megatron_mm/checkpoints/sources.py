"""Where the blocks of a checkpoint's files come from: a folder that this process sees.

Of files that lie on several nodes they come from scattered.py. Either source gives a reader (reader.py) the index of
every file, and then the blocks that it asks for, checked, in the order of the files.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_mm.checkpoints.block_file import BLOCK, read_block
from megatron_mm.checkpoints.folder import MANIFEST
from megatron_mm.checkpoints.image import own_paths
from megatron_mm.checkpoints.own_files import load_description, open_own


class Extent(NamedTuple):
    """A file of pieces, as its index states it."""

    size: int
    """Bytes."""
    checksums: list[int]
    """Of its blocks."""


class PieceSource(Protocol):
    """The files of pieces of a checkpoint."""

    name: Path
    """Of the checkpoint, for messages."""

    def manifest(self) -> Any:
        """What its manifest says; raises what reading it raises."""

    def count(self, manifest: Any) -> int:
        """How many files of pieces there are."""

    def index(self, number: int) -> Any:
        """What the index of a file says; raises FileNotFoundError where there is none."""

    def size(self, number: int) -> int | None:
        """Bytes that a file has, None where another process sees it."""

    def blocks(
        self, needed: Mapping[int, Sequence[int]], extents: Sequence[Extent]
    ) -> Iterator[tuple[int, int, memoryview]]:
        """Blocks of files, as (number of the file, number of the block, bytes, which are there until the next).

        Args:
            needed: numbers of blocks of each file, in their order.
            extents: of every file.

        Raises:
            DamagedError: a block is not what was written.
        """


@dataclass(frozen=True)
class FolderSource:
    """A checkpoint whose files all lie in a folder."""

    name: Path

    def manifest(self) -> Any:
        """What its manifest says."""
        return load_description(self.name / MANIFEST)

    def count(self, manifest: Any) -> int:
        """Files of pieces that the manifest names."""
        return sum(name.endswith(".safetensors") for name in manifest["files"])

    def index(self, number: int) -> Any:
        """What stands beside a file."""
        return load_description(own_paths(self.name, number)[1])

    def size(self, number: int) -> int:
        """Bytes of a file."""
        with open_own(own_paths(self.name, number)[0]) as file:
            return os.fstat(file.fileno()).st_size

    def blocks(
        self, needed: Mapping[int, Sequence[int]], extents: Sequence[Extent]
    ) -> Iterator[tuple[int, int, memoryview]]:
        """Reads block after block of each file; the next one is read and checked while one is used."""
        with ThreadPoolExecutor(1, "checkpoint blocks") as ahead:
            for number, blocks in sorted(needed.items()):
                for block, data in self._of_file(number, blocks, extents[number], ahead):
                    yield number, block, data

    def _of_file(
        self, number: int, blocks: Sequence[int], extent: Extent, ahead: Executor
    ) -> Iterator[tuple[int, memoryview]]:
        path, (size, sums) = own_paths(self.name, number)[0], extent
        file = open_own(path)
        descriptor = file.fileno()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        buffers = cycle(memoryview(bytearray(BLOCK)) for _ in range(2))
        reading: deque[tuple[int, memoryview, Future[int]]] = deque()
        try:
            for block in blocks:
                buffer = next(buffers)
                length = ahead.submit(read_block, descriptor, block, size, sums[block], buffer, path)
                reading.append((block, buffer, length))
                if len(reading) == 2:
                    before, filled, length = reading.popleft()
                    yield before, filled[: length.result()]
            for block, buffer, length in reading:
                yield block, buffer[: length.result()]
        finally:
            wait([length for *_, length in reading])
            file.close()
