"""Parquet and Arrow files (Hugging Face datasets) → JSON lines: line n is row n.

Rows are read a few megabytes at a time. Hugging Face keeps an image or a sound as a struct of `bytes` and `path`; the
bytes become an inline medium, or the path stands where there are none, and such a column named `image`, `audio` or
`video` counts as the list with one element that samples have. Binary cells become inline media too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from typing import BinaryIO

from megatron_mm.data.errors import DataError
from megatron_mm.data.record_lines import inline_medium, record_line, with_placeholders

_CHUNK_BYTES = 4 << 20
_SINGULAR = {"image": "images", "audio": "audios", "video": "videos"}
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


class Progress:
    """Bytes of a file that were read, as far as rows tell."""

    def __init__(self) -> None:
        self.position = 0

    def tell(self) -> int:
        return self.position


Lines = tuple[Generator[bytes, None, None], Progress]


def parquet_lines(path: str, raw: BinaryIO) -> Lines:
    """JSON lines of a Parquet file, and how far they are. Raises DataError where it is damaged."""
    size = os.fstat(raw.fileno()).st_size

    def batches() -> Iterator[tuple]:
        parquet = _pyarrow(path, "pyarrow.parquet")
        # Without threads, because worker processes are forked later; buffered, or whole columns are read at once.
        with parquet.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False) as file:
            rows = max(1, file.metadata.num_rows)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            row_bytes = max([group.total_byte_size / max(1, group.num_rows) for group in groups], default=1)
            step = int(min(4096, max(1, _CHUNK_BYTES / max(1, row_bytes))))
            done = 0
            for batch in file.iter_batches(step, use_threads=False):
                done += batch.num_rows
                yield batch, size * done // rows

    return _lines(path, batches)


def arrow_lines(path: str, raw: BinaryIO) -> Lines:
    """JSON lines of an Arrow file, streamed (as Hugging Face writes it) or not, and how far they are."""

    def batches() -> Iterator[tuple]:
        arrow = _pyarrow(path, "pyarrow")
        is_file = raw.read(6) == b"ARROW1"
        if not is_file:
            raw.seek(0, os.SEEK_END)
            raw.seek(-min(8, raw.tell()), os.SEEK_END)
            if raw.read() != _STREAM_END:  # a reader takes the end of a cut file for that of the data
                raise EOFError("it is cut off")
        with arrow.memory_map(path) as mapped:  # a batch is as large as its writer liked; so it is not copied whole
            if is_file:
                reader = arrow.ipc.open_file(mapped)
                count = max(1, reader.num_record_batches)
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number), mapped.size() * (number + 1) // count
            else:
                for batch in arrow.ipc.open_stream(mapped):
                    yield batch, mapped.tell()

    return _lines(path, batches)


def _lines(path: str, batches: Callable[[], Iterator[tuple]]) -> Lines:
    progress = Progress()

    def lines() -> Generator[bytes, None, None]:
        first = 1
        with contextlib.closing(_named(path, batches())) as checked:
            for batch, position in checked:
                step = int(max(1, _CHUNK_BYTES * batch.num_rows // max(1, batch.nbytes)))
                for start in range(0, batch.num_rows, step):
                    try:
                        rows = batch.slice(start, step).to_pylist()
                    except (ValueError, OverflowError) as error:  # a date that Python cannot hold, two equal names
                        raise DataError(f"{path}, from line {first + start} on: {error}") from error
                    for row in rows:
                        yield record_line(_record(row))
                progress.position = position
                first += batch.num_rows

    return lines(), progress


def _named(path: str, batches: Iterator[tuple]) -> Generator[tuple, None, None]:
    """The batches, each checked in full (offsets, UTF-8). Raises DataError naming the file and the rows."""
    arrow = _pyarrow(path, "pyarrow")
    row = 1
    while True:
        try:
            item = next(batches, None)
            if item is None:
                return
            item[0].validate(full=True)
        except (arrow.ArrowException, OSError, EOFError) as error:
            raise DataError(f"{path}, from line {row} on: damaged ({error})") from error
        row += item[0].num_rows
        yield item


def _record(row: dict) -> dict:
    record = {}
    for name, value in row.items():
        if isinstance(value, list):
            record[name] = [_medium(item) for item in value]
        elif name in _SINGULAR and _is_medium(value) and _SINGULAR[name] not in row:
            medium = _medium(value)
            record[_SINGULAR[name]] = [] if medium is None else [medium]
        else:
            record[name] = _medium(value)
    return with_placeholders(record)


def _is_medium(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def _medium(value: object) -> object:
    if not _is_medium(value):
        return value
    return inline_medium(value["bytes"]) if value["bytes"] is not None else value["path"]


def _pyarrow(path: str, module: str):
    """An optional requirement, imported when a file needs it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{path}: reading it needs pyarrow: pip install 'megatron_mm[parquet]'") from error
