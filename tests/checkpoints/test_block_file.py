"""Files that are written past the page cache or through it, and checked block by block.

Truth: the bytes that were given, and xxhash of each block of them.
"""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from megatron_mm.checkpoints import block_file
from megatron_mm.checkpoints.block_file import BLOCK
from megatron_mm.checkpoints.own_files import DamagedError

PAGE = mmap.PAGESIZE
SIZES = (0, 1, PAGE - 1, PAGE, PAGE + 1, BLOCK - PAGE, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + PAGE, 2 * BLOCK + 77)


@pytest.fixture(params=["disk", "memory"])
def place(request, tmp_path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    folder = Path("/dev/shm") / f"megatron-mm-test-{os.getpid()}"
    if not folder.parent.is_dir():
        pytest.skip("this system has no /dev/shm")
    folder.mkdir()
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def pages(size: int) -> memoryview:
    """Bytes that begin where a page does."""
    memory = memoryview(mmap.mmap(-1, max(1, size)))[:size]
    pattern = os.urandom(1 << 16)
    for begin in range(0, size, len(pattern)):
        memory[begin : begin + len(pattern)] = pattern[: size - begin]
    return memory


def write(path: Path, data: memoryview) -> tuple[int, list[int]]:
    return block_file.write_blocks(path, (data[at : at + 2 * BLOCK] for at in range(0, len(data), 2 * BLOCK)))


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
@pytest.mark.parametrize("size", SIZES)
def test_what_was_given_is_there_with_its_checksums(size, direct, place, monkeypatch):
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    data = pages(size)
    written, sums = write(place / "file", data)
    content = (place / "file").read_bytes()
    assert written == size and content == bytes(data)
    assert sums == [xxhash.xxh3_64_intdigest(content[at : at + BLOCK]) for at in range(0, size, BLOCK)]
    found = list(block_file.damaged_blocks(place / "file", size, sums))
    assert all(isinstance(count, int) for count in found) and sum(found) == size


def test_a_file_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            write(tmp_path / name, pages(5))
    assert (tmp_path / "file").read_bytes() == b"mine" and not (tmp_path / "elsewhere").exists()


def test_each_damaged_block_is_named_and_no_other(tmp_path):
    size = 3 * BLOCK + 5
    _, sums = write(tmp_path / "file", pages(size))
    with open(tmp_path / "file", "r+b") as file:
        for at in (BLOCK - 1, size - 1):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
    first, *whole, last = block_file.damaged_blocks(tmp_path / "file", size, sums)
    assert whole == [BLOCK, BLOCK]
    assert first == f"{tmp_path}/file is damaged between bytes 0 and {BLOCK}: its checksum differs"
    assert last == f"{tmp_path}/file is damaged between bytes {3 * BLOCK} and {size}: its checksum differs"
    os.truncate(tmp_path / "file", BLOCK + 3)
    ends = rf"ends at byte {BLOCK + 3} of {size}"
    with open(tmp_path / "file", "rb") as file, pytest.raises(DamagedError, match=ends):
        block_file.read_block(file.fileno(), 1, size, sums[1], memoryview(bytearray(BLOCK)), "file")


def test_a_disk_without_room_is_an_error(tmp_path):
    words = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)]
    if os.geteuid() == 0 and subprocess.run(words, capture_output=True).returncode == 0:
        try:
            with pytest.raises(OSError, match="No space left"):
                write(tmp_path / "file", pages(3 * BLOCK))
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "file", pages(3 * BLOCK))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
