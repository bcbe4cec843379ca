"""Files of a checkpoint that are written sequentially and checked block by block as they are read.

A `.safetensors` file holds the pieces that one process wrote; the JSON file beside it says where each lies and has a
checksum of each block of the file (XXH3, 64 bits: eight times as fast as zlib's CRC-32, which takes longer than the
disk). No torch and no numpy: the process that writes in the background starts in no time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import xxhash

from megatron_mm.checkpoints.own_files import DamagedError, open_own
from megatron_mm.platform.atomic_files import AnyPath, sync

#: Bytes of a file with a checksum of their own; a reader reads and checks blocks as a whole.
BLOCK = 4 << 20

def write_blocks(path: AnyPath, chunks: Iterable[memoryview]) -> tuple[int, list[int]]:
    """Writes a file, which is on the disk on return.

    It goes past the page cache where the file system can: several times as fast as through it, for a tenth of the CPU
    time, and nothing else is driven out of memory.

    Args:
        chunks: its bytes, in order. Each begins where a page does (as what mmap gives), and all but the last are
            multiples of `BLOCK`.

    Returns:
        its size, and the checksum of each block.

    Raises:
        OSError: as the file system says.
    """
    sums: list[int] = []
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _write_directly(descriptor, True)
        for chunk in chunks:
            for begin in range(0, len(chunk), BLOCK):
                block = chunk[begin : begin + BLOCK]
                sums.append(xxhash.xxh3_64_intdigest(block))
                _write(descriptor, block)
                size += len(block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, sums


def _write_directly(descriptor: int, directly: bool) -> None:
    """Past the page cache, or through it: what a file system cannot do, it refuses here or at the first write."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | flag if directly else flags & ~flag)


def _write(descriptor: int, block: memoryview) -> None:
    if len(block) % mmap.PAGESIZE:  # the end of the file, which is no whole page
        _write_directly(descriptor, False)
    while block:
        try:
            block = block[os.write(descriptor, block) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
                raise
            _write_directly(descriptor, False)


def write_pieces(path: Path, index: Path, chunks: Iterable[memoryview], tensors: dict[str, dict]) -> None:
    """Writes a file of pieces, and the index beside it; both are on the disk on return.

    Args:
        path: of the file.
        index: of the index.
        chunks: as for `write_blocks`.
        tensors: what the index says of each tensor.
    """
    size, sums = write_blocks(path, chunks)
    write_index(index, index_text(size, sums, tensors))


def index_text(size: int, sums: list[int], tensors: dict[str, dict]) -> str:
    """What an index says of a file of so many bytes, with these checksums of its blocks."""
    return json.dumps({"bytes": size, "block": BLOCK, "checksums": sums, "tensors": tensors}, separators=(",", ":"))


def write_index(index: Path, text: str) -> None:
    """Writes an index, which is on the disk on return."""
    with open(index, "x", encoding="utf-8") as file:
        file.write(text)
        sync(file)


def checksums(data: memoryview) -> list[int]:
    """Checksums of the blocks of a file that lies in memory."""
    return [xxhash.xxh3_64_intdigest(data[begin : begin + BLOCK]) for begin in range(0, len(data), BLOCK)]


def read_block(descriptor: int, number: int, size: int, checksum: int, buffer: memoryview, name: AnyPath) -> int:
    """Reads and checks a block.

    Args:
        size: of the whole file.
        buffer: of at least `BLOCK` bytes.
        name: of the file, for the error.

    Returns:
        how many bytes the block has.

    Raises:
        DamagedError: the block is not what was written.
    """
    begin = number * BLOCK
    length = max(0, min(BLOCK, size - begin))
    got = 0
    while got < length:
        count = os.preadv(descriptor, [buffer[got:length]], begin + got)
        if count == 0:
            raise DamagedError(f"{name} ends at byte {begin + got} of {size}")
        got += count
    check_block(buffer[:length], begin, checksum, name)
    return length


def check_block(block: memoryview, begin: int, checksum: int, name: AnyPath) -> None:
    """Raises DamagedError unless a block, which begins at a byte of its file, is what was written."""
    if xxhash.xxh3_64_intdigest(block) != checksum:
        raise DamagedError(f"{name} is damaged between bytes {begin} and {begin + len(block)}: its checksum differs")


def damaged_blocks(path: Path, size: int, sums: list[int]) -> Iterator[str | int]:
    """Reads a file of blocks from end to end.

    Args:
        size: of the file, in bytes.
        sums: checksums of its blocks.

    Yields:
        how many bytes of each block are right, or what is wrong with it.

    Raises:
        OSError, ValueError: as `open_own`.
    """
    buffer = memoryview(bytearray(BLOCK))
    with open_own(path) as file:
        for number, checksum in enumerate(sums):
            try:
                yield read_block(file.fileno(), number, size, checksum, buffer, path)
            except DamagedError as error:
                yield str(error)
