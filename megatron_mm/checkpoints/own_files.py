"""Files of a checkpoint, opened and read as files that somebody else may have made: no links, no devices, no bombs."""

from __future__ import annotations

import os
from typing import BinaryIO

import xxhash

from megatron_mm.config.documents import parse_json
from megatron_mm.media.files import open_file
from megatron_mm.platform.atomic_files import AnyPath

#: Longest manifest, index or pickle of records, in bytes.
MAX_DESCRIPTION_BYTES = 1 << 28
_READ_AT_ONCE = 1 << 20


class DamagedError(ValueError):
    """A file of a checkpoint is not what was written."""


def open_own(path: AnyPath) -> BinaryIO:
    """A file of a checkpoint, opened for reading: one of its own, no link to another.

    Raises:
        OSError: there is no such file, it is a folder, or it cannot be opened.
        ValueError: it is a link, a pipe, a device or a socket; names it.
    """
    if os.path.islink(path):
        raise DamagedError(f"{path}: is a link, and a checkpoint has files of its own; put a copy of the file there")
    return open_file(path)


def read_description(path: AnyPath) -> bytes:
    """A small file of a checkpoint, whole.

    Raises:
        OSError: as `open_own`.
        ValueError: as `open_own`, or it is longer than any such file.
    """
    with open_own(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_DESCRIPTION_BYTES:
            raise DamagedError(f"{path}: has {size} bytes; the limit is {MAX_DESCRIPTION_BYTES}")
        return file.read(size)


def load_description(path: AnyPath) -> object:
    """The JSON value of a small file of a checkpoint; raises as `read_description`, and ValueError where it is none."""
    return parse_json(read_description(path))


def checksum_of(path: AnyPath) -> int:
    """Checksum of a whole file; raises as `open_own`."""
    digest = xxhash.xxh3_64()
    with open_own(path) as file:
        while data := file.read(_READ_AT_ONCE):
            digest.update(data)
    return digest.intdigest()
