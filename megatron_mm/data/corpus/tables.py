"""CSV and TSV → JSON lines: the header names the fields, a row is a sample, lines keep their numbers.

Cells are strings, quoted as Python's csv module reads them (in .tsv too). A cell of "images", "audios" or "videos" is a
list of paths with `;` between them. A row gives as many lines as it takes in the file, blank but for the first, and so
does the header: messages then name the line of the file.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from megatron_mm.data.corpus.record_lines import read_line, record_line, with_placeholders
from megatron_mm.data.tokens.tokenizer import PLACEHOLDERS
from megatron_mm.media.errors import DataError


class _Text:
    """The lines of a file as text, counted. Raises DataError where they are not UTF-8 or too long."""

    def __init__(self, path: str, stream: BinaryIO, max_line: int) -> None:
        self.path, self.stream, self.max_line, self.read = path, stream, max_line, 0

    def __iter__(self) -> Iterator[str]:
        while line := read_line(self.stream, self.max_line, f"{self.path}, line {self.read + 1}"):
            self.read += 1
            try:
                yield line.decode("utf-8-sig" if self.read == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = f"{self.path}, line {self.read}"
                raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error


def table_lines(path: str, stream: BinaryIO, max_line: int, delimiter: str) -> Iterator[bytes]:
    """JSON lines of a table.

    Raises:
        DataError: a row cannot be used; file, line and cause are named.
    """
    csv.field_size_limit(max(csv.field_size_limit(), max_line))  # of the process; its default is 128 KiB
    text = _Text(path, stream, max_line)
    rows = csv.reader(iter(text), delimiter=delimiter, strict=True)
    fields: list[str] | None = None
    while True:
        first = text.read + 1
        where = f"{path}, line {first}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{where}: not a row of a table ({error})") from error
        if row is None:
            return
        if not row:
            yield b"\n"
        elif fields is None:
            fields = _header(row, where)
            yield b"\n"
        elif len(row) != len(fields):
            raise DataError(f"{where}: {len(row)} fields, but the header names {len(fields)} ({', '.join(fields)})")
        else:
            record: dict = dict(zip(fields, row))
            for kind in PLACEHOLDERS.keys() & record.keys():
                record[kind] = [name.strip() for name in record[kind].split(";") if name.strip()]
            yield record_line(with_placeholders(record))
        yield from [b"\n"] * (text.read - first)


def _header(row: list[str], where: str) -> list[str]:
    twice = [name for name in row if row.count(name) > 1]
    if twice or "" in row:
        problem = f"names {twice[0]!r} twice" if twice else "has a field without a name"
        raise DataError(f"{where}: the header {problem}")
    return row
