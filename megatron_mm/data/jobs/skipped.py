"""Lines that a builder leaves out under `--on-error skip`: a list beside the data, of file, line and cause.

Only what is wrong with one line can be left out: its JSON, its fields, its media. A file that cannot be read on
(damaged compression, a table or tar whose next record cannot be found, a line without end) always stops the build,
because nobody can say how much would be missing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import BinaryIO, Literal

from megatron_mm.config.outputs import records
from megatron_mm.data.store.indexed import open_at
from megatron_mm.media.errors import DataError
from megatron_mm.platform.atomic_files import sync

#: What becomes of a line that cannot be used: the build ends with its name, or goes on without it.
OnError = Literal["stop", "skip"]
LIST = "skipped.jsonl"
#: What such a list holds.
LISTED = records("file", "line", "cause")


@dataclass(frozen=True)
class SkippedLine:
    """One line that was left out."""

    file: str
    line: int
    """From 1; the row of a table, the sample of a tar."""
    cause: str

    @classmethod
    def of(cls, file: str, line: int, error: DataError) -> SkippedLine:
        """From an error whose message begins with file and line."""
        return cls(file, line, str(error).removeprefix(f"{file}, line {line}: "))


class SkippedLines:
    """The list while it grows; it can be taken up where an earlier one was (`state`).

    Args:
        folder: in which `skipped.jsonl` is made. It is there at the end if anything was left out.
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, LIST)
        self.count = 0
        """Lines left out so far."""
        self.first: SkippedLine | None = None
        """The first of this process."""
        self._bytes = 0
        self._stream: BinaryIO | None = None

    def begin(self, state: dict[str, int] | None) -> None:
        """Opens the list: new, or as it was at `state`."""
        self.count, self._bytes = (state["count"], state["bytes"]) if state else (0, 0)
        self._stream = open_at(self.path, self._bytes)

    def add(self, lines: Sequence[SkippedLine]) -> None:
        """Lists lines."""
        for line in lines:
            self.first = self.first or line
            data = json.dumps(asdict(line), ensure_ascii=False).encode(errors="surrogateescape") + b"\n"
            self._bytes += self._stream.write(data)
        self.count += len(lines)

    def state(self) -> dict[str, int]:
        """How far the list is; all of it is on the disk."""
        sync(self._stream)
        return {"count": self.count, "bytes": self._bytes}

    def finish(self, used: int) -> dict[str, int]:
        """Closes the list, and removes an empty one.

        Args:
            used: lines that were not left out.

        Returns:
            {"skipped": lines left out}, for a manifest's counts; {} if there are none.

        Raises:
            DataError: nothing but lines left out.
        """
        if self.count and not used:
            cause = f"; the first: {self.first.file}, line {self.first.line}: {self.first.cause}" if self.first else ""
            raise DataError(f"none of the {self.count} lines of the input can be used{cause}")
        self._stream.close()
        if not self.count:
            os.remove(self.path)
        return {"skipped": self.count} if self.count else {}

    def close(self) -> None:
        """Closes the list, whatever it holds."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
