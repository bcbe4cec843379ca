"""Opening input as a stream of JSON lines, whatever its format, with its position for progress bars.

    .jsonl .json .ndjson and any other ending    the lines themselves
    .csv .tsv                                    a line for each row (tables.py)
    .parquet .arrow                              a line for each row (columns.py)
    .tar                                         a line for each sample of a WebDataset (tars.py)
    .gz .zst after these, .tgz                   decompressed (not Parquet and Arrow, which compress themselves)

So blocks, line numbers, journals and messages need to know of lines only. Nothing is unpacked on the disk, and no line
is longer in memory than a builder accepts.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from megatron_mm.config.documents import load_json
from megatron_mm.data.corpus.columns import arrow_lines, parquet_lines
from megatron_mm.data.corpus.record_lines import MAX_LINE_BYTES, RecordLines
from megatron_mm.data.corpus.tables import table_lines
from megatron_mm.data.corpus.tars import tar_lines
from megatron_mm.media.errors import DataError
from megatron_mm.media.files import open_file

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_LINES = (".jsonl", ".json", ".ndjson")
_PACKABLE = {
    ".csv": lambda *arguments: table_lines(*arguments, delimiter=","),
    ".tsv": lambda *arguments: table_lines(*arguments, delimiter="\t"),
    ".tar": tar_lines,
}
_COLUMNS = {".parquet": parquet_lines, ".arrow": arrow_lines}
_OPENERS = {".gz": lambda raw: gzip.GzipFile(fileobj=raw), ".zst": zstd.ZstdFile}


def _endings(path: str) -> tuple[str, str]:
    """Format and compression, as endings."""
    name = path.lower()
    if name.endswith(".tgz"):
        return ".tar", ".gz"
    packing = next((ending for ending in _OPENERS if name.endswith(ending)), "")
    return os.path.splitext(name.removesuffix(packing))[1], packing


def holds_records(path: str) -> bool:
    """Whether the lines of a file are JSON objects, by its ending; otherwise they may be plain text."""
    return _endings(path)[0] in (*_LINES, *_PACKABLE, *_COLUMNS)


def media_folder(path: str, media_root: str | None) -> str | None:
    """The folder to which the paths of media in an input are relative; None: none of its media are files.

    A list of lines or cells is the user's own, so it may name files anywhere. A tar, Parquet or Arrow file is a corpus
    by itself, which others made and pass on: its media lie in it, and what it names of this machine is not read.

    Args:
        path: the input.
        media_root: what the user named; None: the folder of the input.
    """
    if _endings(path)[0] in (".tar", *_COLUMNS):
        return None
    return media_root if media_root is not None else os.path.dirname(os.path.abspath(path))


def is_plain(path: str) -> bool:
    """Whether a file is lines as they are, which can be read from any place, by its ending."""
    form, packing = _endings(path)
    return not packing and form not in (*_PACKABLE, *_COLUMNS)


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files named by paths, folders and globs.

    A folder stands for its files of known endings, sorted; one written by Hugging Face's `save_to_disk` for its
    `.arrow` files in their own order. A glob stands for the files of known endings that it matches, sorted, or for
    all that it matches where there are none of these.

    Raises:
        DataError: nothing matches, or a folder is not what it should be.
    """
    paths: list[str] = []
    for pattern in patterns:
        if os.path.isfile(pattern):
            found = [pattern]
        elif os.path.isdir(pattern):
            found = _files_of(pattern)
        else:
            matches = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
            found = list(filter(holds_records, matches)) or matches
            if not found:
                raise DataError(f"{pattern}: no such file")
        paths += found
    return paths


def _files_of(folder: str) -> list[str]:
    state, splits = os.path.join(folder, "state.json"), os.path.join(folder, "dataset_dict.json")
    if os.path.exists(splits):
        raise DataError(f"{folder}: holds several splits; name the folder of one of them")
    if os.path.exists(state):
        try:
            names = [entry["filename"] for entry in load_json(state)["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{state}: not the state of a Hugging Face dataset ({error})") from error
        for name in names:
            if (
                not isinstance(name, str)
                or name != os.path.basename(name)
                or not os.path.isfile(os.path.join(folder, name))
            ):
                raise DataError(f"{state}: names {name}, which is not in the folder")
    else:
        names = sorted(name for name in os.listdir(folder) if not name.startswith(".") and holds_records(name))
    found = [os.path.join(folder, name) for name in names]
    found = [path for path in found if os.path.isfile(path)]
    if not found:
        endings = " ".join((*_LINES, *_PACKABLE, *_COLUMNS))
        raise DataError(f"{folder}: holds no input files ({endings}); subfolders need a glob, as in '{folder}/**/*'")
    return found


@contextmanager
def open_lines(path: str, max_line: int = MAX_LINE_BYTES) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file for reading lines; its ending says what it is (see above).

    Args:
        max_line: bytes of the longest line that will be accepted; what cannot become one is refused unread.

    Yields:
        (the stream to read, which can seek forward; the file or object whose `tell` measures progress in bytes).

    Raises:
        DataError: the file is missing or damaged, or a record cannot become a line (also while it is read).
    """
    form, packing = _endings(path)
    if packing and form in _COLUMNS:
        raise DataError(f"{path}: {form} files compress themselves; decompress it first")
    try:
        raw = open_file(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(raw)
        if form in _COLUMNS:
            lines, progress = _COLUMNS[form](path, raw)
            stack.callback(lines.close)
            yield RecordLines(lines), progress  # type: ignore[misc]
            return
        try:
            stream: BinaryIO = raw
            if packing:
                if not os.fstat(raw.fileno()).st_size:
                    raise EOFError("an empty file")
                stream = stack.enter_context(_OPENERS[packing](raw))
            if form in _PACKABLE:
                lines = _PACKABLE[form](path, stream, max_line)
                stack.callback(lines.close)
                stream = RecordLines(lines)  # type: ignore[assignment]
            yield stream, raw
        except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
            kind = {".gz": "gzip", ".zst": "zstd"}.get(packing, packing)
            raise DataError(f"{path}: damaged {kind} file ({error})") from error
