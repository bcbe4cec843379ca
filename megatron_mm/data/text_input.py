"""Opening line-based input: plain or gzip files, with the raw position for progress bars."""

from __future__ import annotations

import glob
import gzip
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from megatron_mm.data.errors import DataError


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files named by paths and globs (sorted within a glob). Raises DataError where nothing matches."""
    paths: list[str] = []
    for pattern in patterns:
        if os.path.isfile(pattern):
            paths.append(pattern)
            continue
        matches = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not matches:
            raise DataError(f"{pattern}: no such file")
        paths += matches
    return paths


@contextmanager
def open_lines(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file for reading lines; `.gz` is decompressed.

    Yields:
        (the stream to read, the file whose position measures progress).

    Raises:
        DataError: the file is missing, or its compression is damaged.
    """
    try:
        raw = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    with raw:
        if not path.endswith(".gz"):
            yield raw, raw
            return
        try:
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream, raw  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged gzip file ({error})") from error
