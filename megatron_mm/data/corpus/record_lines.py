"""Records of tables and archives as a stream of JSON lines.

These formats know nothing of placeholders, so a sample with media that has none gets them at the head of its prompt.
Media that lie in the file itself travel in the line, as {"base64": ...} in place of a path.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import BinaryIO

from megatron_mm.data.tokens.tokenizer import PLACEHOLDERS
from megatron_mm.media.errors import DataError

#: Longest line that is read; a longer one is refused before it fills memory.
MAX_LINE_BYTES = 1 << 28
_INLINE = "base64"


def read_line(stream: BinaryIO, max_line: int, where: str) -> bytes:
    """The next line with its end, b"" after the last. Raises DataError naming `where` if it is too long."""
    line = stream.readline(max_line)
    if len(line) == max_line and not line.endswith(b"\n"):
        raise DataError(f"{where}: longer than {max_line} bytes")
    return line


def inline_medium(data: bytes) -> dict[str, str]:
    """A medium that stands in the line itself."""
    return {_INLINE: base64.b64encode(data).decode()}


def is_inline(medium: object) -> bool:
    """Whether an entry of "images", "audios" or "videos" is a medium itself, not a path."""
    return isinstance(medium, dict) and medium.keys() == {_INLINE} and isinstance(medium[_INLINE], str)


def inline_bytes(medium: dict[str, str]) -> bytes:
    """Bytes of an inline medium. Raises ValueError if it is not base64."""
    return base64.b64decode(medium[_INLINE], validate=True)


def with_placeholders(record: dict) -> dict:
    """The record; if it has media but no placeholder in prompt or text, with one for each before its prompt."""
    marks = "".join(
        mark * len(record[kind]) for kind, mark in PLACEHOLDERS.items() if isinstance(record.get(kind), list)
    )
    prompt = "" if record.get("prompt") is None else record["prompt"]
    if not marks or not isinstance(prompt, str):
        return record
    if any(mark in f"{prompt}{record.get('text')}" for mark in PLACEHOLDERS.values()):
        return record
    return {**record, "prompt": marks + prompt}


def record_line(record: dict) -> bytes:
    """A JSON line; what JSON has no form for (dates, decimals) becomes its text, bytes become an inline medium."""
    return json.dumps(record, default=_plain).encode() + b"\n"


def _plain(value: object) -> object:
    return inline_medium(value) if isinstance(value, bytes) else str(value)


class RecordLines(io.BufferedIOBase):
    """Lines that are made while they are read, as a file that can seek forward only."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._line, self._at, self._position = b"", 0, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def _take(self, size: int) -> bytes:
        """At most `size` bytes of the current line; b"" after the last."""
        if self._at == len(self._line):
            self._line, self._at = next(self._lines, b""), 0
        part = self._line[self._at : self._at + size]
        self._at += len(part)
        self._position += len(part)
        return part

    def read(self, size: int | None = -1) -> bytes:
        left = float("inf") if size is None or size < 0 else size
        parts = []
        while left and (part := self._take(int(min(left, MAX_LINE_BYTES)))):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def readline(self, size: int | None = -1) -> bytes:
        return self._take(MAX_LINE_BYTES if size is None or size < 0 else size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._position:
            raise io.UnsupportedOperation("only forward from the start")
        while self._position < offset and self._take(offset - self._position):
            pass
        return self._position
