"""Files that a sample, a list or a folder names, opened so that none can hang the reader or fill its memory.

A name may lead to a pipe that nobody writes to, to a device without an end, or to a file of /proc. Only plain files are
read, links to them included, and no more of one than it said it had when it was opened. What is read here was named by
data, so there is one such function: for builders, training, prompts, and the processor of an exported folder.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

from megatron_mm.media.errors import DataError

#: Longest file of a medium: a record of a shard has no more.
MAX_FILE_BYTES = (1 << 31) - 1
_KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
}  # fmt: skip


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A plain file, opened for reading its bytes; a link to one counts as one.

    Raises:
        OSError: there is no such file, it is a folder, or it cannot be opened.
        DataError: it is a pipe, a device or a socket; names it.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise FileNotFoundError(errno.ENOENT, f"No such file ({error})", path) from error
    _refuse_special(path, mode)  # before it is opened, which is an action for some devices
    stream = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    try:
        _refuse_special(path, os.fstat(stream.fileno()).st_mode)  # the name may lead elsewhere by now
    except BaseException:
        stream.close()
        raise
    return stream


def read_file(path: str | os.PathLike[str], most_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Bytes of a plain file, no more than its size was when it was opened.

    Raises:
        OSError: as `open_file`.
        DataError: as `open_file`, or it is longer than `most_bytes`.
    """
    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most_bytes:
            raise DataError(f"{path}: {size} bytes; the limit is {most_bytes}")
        return stream.read(size)


def _without_waiting(path: str, flags: int) -> int:
    """An opener that does not wait for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _refuse_special(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is {_KINDS.get(stat.S_IFMT(mode), 'no file')}; only plain files are read")
