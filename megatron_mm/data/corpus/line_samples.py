"""Samples of an input's lines, spread evenly over all of its bytes, from which a build is estimated.

A plain file of lines is read at many places. Other formats (compressed files, tables, tars) can only be read from
their beginning: lines of their heads are unpacked into a folder and stand for the whole file, whose length in lines is
taken from how much of it they were.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mm.data.corpus.record_lines import MAX_LINE_BYTES, read_line
from megatron_mm.data.corpus.text_input import is_plain, open_lines
from megatron_mm.media.errors import DataError

#: Files that cannot be read in the middle of which heads are unpacked; so many, evenly spread, stand for all.
MAX_HEADS = 16
#: A head goes on until so much of its file was read: compressed files are read ahead, Parquet in groups of rows.
_MEASURED_BYTES = 1 << 22
_HEAD_BYTES = 1 << 20


@dataclass
class _Readable:
    """Lines that can be read at any place, standing for a stretch of the input."""

    name: str
    """The input file, for messages and for paths that are relative to it."""
    path: str
    size: int
    """Bytes of `path` that are lines of the input."""
    stands_for: float
    """Bytes of lines in the input."""


@dataclass
class Sample:
    """Whole lines of the input."""

    lines: list[bytes]
    origins: list[tuple[str, int]]
    """File of each line, and the byte at which it begins; of files that are not plain, in the lines made of them."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(map(len, self.lines))


class LineSamples:
    """Draws samples of an input.

    Args:
        inputs: files of the formats of `text_input.py`.
        folder: an existing one, for heads.
        most_bytes: of lines in all heads together, about.

    Raises:
        DataError: a file is missing or damaged, or there are no lines.
    """

    def __init__(self, inputs: Sequence[str], folder: str, most_bytes: int) -> None:
        self.notes: list[str] = []
        """What a reader of the estimate should know."""
        self.files, self.bytes = len(inputs), sum(map(_size, inputs))
        heads = [path for path in inputs if not is_plain(path)]
        count = min(len(heads), MAX_HEADS)
        chosen = [heads[(2 * n + 1) * len(heads) // (2 * count)] for n in range(count)]
        chosen_bytes, head_bytes = sum(map(_size, chosen)), sum(map(_size, heads))
        self._readables: list[_Readable] = []
        cut: list[str] = []
        for number, path in enumerate(inputs):
            size = _size(path)
            if is_plain(path):
                self._readables.append(_Readable(path, path, size, size))
            elif path in chosen:
                most = max(_HEAD_BYTES, most_bytes * size // max(1, head_bytes))
                head = os.path.join(folder, f"head-{number}")
                length, share = _unpack_head(path, head, most)
                cut += [os.path.basename(path)] if share < 1 else []
                stands_for = length / share * (head_bytes / chosen_bytes if chosen_bytes else 1)
                self._readables.append(_Readable(path, head, length, stands_for))
        self._readables = [readable for readable in self._readables if readable.size]
        if not self._readables:
            raise DataError(f"{', '.join(inputs)}: no lines")
        if cut:
            names = ", ".join(cut[:3]) + (f" and {len(cut) - 3} more" if len(cut) > 3 else "")
            self.notes.append(f"read from the beginning only: {names}; margins (±) know nothing of the rest")
        if len(chosen) < len(heads):
            self.notes.append(f"{len(chosen)} of {len(heads)} compressed files, tables and tars were read")
        self.line_bytes = sum(readable.stands_for for readable in self._readables)
        """Bytes of all lines of the input; estimated where heads stand for files."""
        self.readable_bytes = sum(readable.size for readable in self._readables)
        """Bytes of the lines that can be drawn."""
        self.is_exact = not cut and len(chosen) == len(heads)
        """Whether those are all lines."""

    def all(self) -> Sample:
        """Every line (of the heads)."""
        sample = Sample([], [])
        for readable in self._readables:
            _read(readable, 0, readable.size, sample)
        return sample

    def draw(self, number: int, count: int, blocks: int, size: int) -> Sample:
        """One of several samples that together are spread evenly.

        Args:
            number: of this sample, from 0.
            count: of samples.
            blocks: places at which this sample is taken.
            size: bytes of lines at all places together, about: at each, lines are read until they are enough.
        """
        sample = Sample([], [])
        for block in range(blocks):
            at = (block * count + number + 0.5) / (blocks * count) * self.line_bytes
            for readable in self._readables:
                if at < readable.stands_for:
                    break
                at -= readable.stands_for
            begin = min(1.0, at / readable.stands_for) * readable.size
            # The place is the middle of what is read, so that the ends of the input are read as often as the rest.
            length = max(1, size // blocks)
            begin = max(0, min(int(begin) - length // 2, readable.size - length))
            _read(readable, begin, length, sample)
        return sample


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _unpack_head(path: str, head: str, most: int) -> tuple[int, float]:
    """Writes the first lines of a file.

    Returns:
        Bytes written, and what share they are of all its lines.
    """
    size = written = read = number = 0
    with open_lines(path) as (stream, raw), open(head, "wb") as out:
        size = os.path.getsize(path)
        while line := read_line(stream, MAX_LINE_BYTES, f"{path}, line {number + 1}"):
            number += 1
            read += len(line)
            if written < most:
                written += out.write(line if line.endswith(b"\n") else line + b"\n")
            elif raw.tell() >= min(size, _MEASURED_BYTES):
                at = min(size, raw.tell())
                return written, written / read * at / size
    return written, min(1.0, written / max(1, read))


def _read(readable: _Readable, begin: int, length: int, sample: Sample) -> None:
    """Adds the lines that begin within a stretch of a file; if none does, the next one, or the first of all."""
    with open(readable.path, "rb") as stream:
        if begin:
            stream.seek(begin - 1)
            while (part := stream.readline(MAX_LINE_BYTES)) and not part.endswith(b"\n"):
                pass
        if stream.tell() >= readable.size:
            stream.seek(0)
        at, end = stream.tell(), stream.tell() + length
        while at < end:
            line = read_line(stream, MAX_LINE_BYTES, f"{readable.name}, the line at byte {at}")
            if not line:
                break
            sample.lines.append(line if line.endswith(b"\n") else line + b"\n")
            sample.origins.append((readable.name, at))
            at += len(line)
