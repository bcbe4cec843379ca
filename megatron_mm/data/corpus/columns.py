"""Parquet and Arrow files (Hugging Face datasets) → JSON lines: line n is row n.

Rows are read a few megabytes at a time. Hugging Face keeps an image or a sound as a struct of `bytes` and `path`; the
bytes become an inline medium, or the path stands where there are none, and such a column named `image`, `audio` or
`video` counts as the list with one element that samples have. Binary cells become inline media too.

Both formats store equal values once, as a dictionary: a file of two kilobytes can hold a million cells of a megabyte.
So rows are counted in bytes, as they will be in memory, before they are made, and no row is longer than a line may be.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from typing import BinaryIO

from megatron_mm.data.corpus.record_lines import MAX_LINE_BYTES, inline_medium, record_line, with_placeholders
from megatron_mm.media.errors import DataError

_CHUNK_BYTES = 4 << 20
#: Bytes of a Parquet dictionary that writers keep to by default, with some room.
_USUAL_DICTIONARY = 2 << 20
#: A column of text or media that shrank more than this is no data.
_MOST_COMPRESSION = 1000
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
        options = {"buffer_size": 1 << 20, "pre_buffer": False}
        with parquet.ParquetFile(raw, **options) as file:
            unexpanded, dictionary_bytes = _dictionaries(path, raw, file.metadata)
        with parquet.ParquetFile(raw, read_dictionary=unexpanded, **options) as file:
            rows = max(1, file.metadata.num_rows)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            row_bytes = max([group.total_byte_size / max(1, group.num_rows) for group in groups], default=1)
            step = int(min(4096, max(1, min(_CHUNK_BYTES / max(1, row_bytes), MAX_LINE_BYTES / dictionary_bytes))))
            done = 0
            for group in range(file.num_row_groups):  # each has dictionaries of its own, which a batch cannot join
                for batch in file.iter_batches(step, row_groups=[group], use_threads=False):
                    done += batch.num_rows
                    yield batch, size * done // rows

    return _lines(path, batches)


def _dictionaries(path: str, raw: BinaryIO, metadata) -> tuple[list[str], int]:
    """How large the values of a Parquet file can become.

    Returns:
        Columns that must not be expanded into plain values before they are measured; the most bytes of a row in the
        others that have dictionaries.

    Raises:
        DataError: a column claims to have shrunk as no data does.
    """
    unexpanded: set[str] = set()
    most = 1
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        row = 1
        for number in range(group.num_columns):
            column = group.column(number)
            if column.physical_type != "BYTE_ARRAY":
                continue
            packed, whole = column.total_compressed_size, column.total_uncompressed_size
            if whole > max(MAX_LINE_BYTES, _MOST_COMPRESSION * packed):
                raise DataError(f"{path}: column {column.path_in_schema} has {whole} bytes packed into {packed}")
            if not column.has_dictionary_page:
                continue
            size = _page_bytes(raw, column.dictionary_page_offset)
            repeats = metadata.schema.column(number).max_repetition_level > 0
            if size * column.num_values > MAX_LINE_BYTES and (repeats or size > _USUAL_DICTIONARY):
                unexpanded.add(column.path_in_schema)
            else:
                row += size
        most = max(most, row)
    return sorted(unexpanded), most


def _page_bytes(raw: BinaryIO, offset: int) -> int:
    """Uncompressed size of a page, the second number of its header (Thrift's compact protocol: a byte that names the
    field, then the number in groups of 7 bits, the sign last). Raises EOFError if there is no such header."""
    header, at, numbers = os.pread(raw.fileno(), 32, offset), 0, []
    while len(numbers) < 2:
        value, shift = 0, 0
        if header[at : at + 1] != b"\x15":
            raise EOFError("a page without a header")
        at += 1
        while at < len(header):
            value |= (header[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if header[at - 1] < 128:
                break
        numbers.append(value >> 1)
    return numbers[1]


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
                for start, part in _parts(path, batch, first, 0):
                    try:
                        rows = part.to_pylist()
                    except (ValueError, OverflowError) as error:  # a date that Python cannot hold, two equal names
                        raise DataError(f"{path}, from line {first + start} on: {error}") from error
                    for row in rows:
                        yield record_line(_record(row))
                progress.position = position
                first += batch.num_rows

    return lines(), progress


def _parts(path: str, batch, first: int, start: int) -> Iterator[tuple]:
    """Rows in parts of a few megabytes, and the number of the first row of each.

    Raises:
        DataError: a row is longer than a line may be.
    """
    size = sum(map(_held_bytes, batch.columns))
    if size <= _CHUNK_BYTES or batch.num_rows <= 1:
        if size > MAX_LINE_BYTES:
            raise DataError(f"{path}, line {first + start}: {size} bytes; a row has at most {MAX_LINE_BYTES}")
        yield start, batch
        return
    half = batch.num_rows // 2
    yield from _parts(path, batch.slice(0, half), first, start)
    yield from _parts(path, batch.slice(half), first, start + half)


def _held_bytes(array) -> int:
    """Bytes of the values of an array, those of a dictionary as often as they are used."""
    arrow = _pyarrow("", "pyarrow")
    compute, types = _pyarrow("", "pyarrow.compute"), arrow.types
    if types.is_dictionary(array.type):
        values = array.dictionary
        if not (types.is_binary(values.type) or types.is_string(values.type) or types.is_large_string(values.type)):
            return len(array) * _held_bytes(values)
        return int(compute.sum(compute.binary_length(values).take(array.indices)).as_py() or 0)
    if types.is_run_end_encoded(array.type):
        return len(array) * _held_bytes(array.values)
    if types.is_struct(array.type) or types.is_list(array.type) or types.is_large_list(array.type):
        inner = array.flatten()
        return sum(map(_held_bytes, inner)) if types.is_struct(array.type) else _held_bytes(inner)
    return array.nbytes


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
