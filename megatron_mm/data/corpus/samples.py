"""One line of a multimodal JSONL → tokens, media bytes and a row of the sample table.

A line is {"id", "prompt", "text", "images", "audios", "videos"}: `text` is learned, `prompt` is not, and the files
stand in the order of their placeholders; {"base64": "..."} in place of a path is a medium itself. Everything a line can
get wrong is refused here, by file and line number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import orjson

from megatron_mm.data.corpus.record_lines import inline_bytes, is_inline
from megatron_mm.data.tokens.tokenizer import PLACEHOLDERS, Tokenizer
from megatron_mm.media.decoding import check_medium, refuse_empty
from megatron_mm.media.encoding import KEEP, Encoding, encode_medium
from megatron_mm.media.errors import DataError
from megatron_mm.media.files import read_file

#: The sample table: one row a document, in the order of the token shard.
TABLE_DTYPE = np.dtype(
    [
        ("prompt_length", "<i4"),  # leading tokens that are not learned: BOS and the prompt
        ("num_tokens", "<i4"),
        ("num_loss_tokens", "<i4"),  # learned tokens, EOS included, placeholders not
        ("num_images", "<i4"),
        ("num_audios", "<i4"),
        ("num_videos", "<i4"),
        ("first_image", "<i8"),  # record of the first medium in its shard
        ("first_audio", "<i8"),
        ("first_video", "<i8"),
    ]
)
KINDS = tuple(PLACEHOLDERS)


@dataclass(frozen=True)
class Sample:
    """A tokenised line."""

    id: str
    tokens: list[int]
    prompt_length: int
    media: dict[str, list[bytes]]
    """Encoded files of each kind, in order."""


def parse_line(line: bytes, where: str, exact: bool = True) -> dict:
    """Parses one JSONL line to a dict.

    Args:
        line: with or without its end.
        where: file and line, for messages.
        exact: integers beyond 64 bits keep all their digits; otherwise they become floats, in half the time.

    Raises:
        DataError: not UTF-8, not JSON, or not an object; the message begins with `where`.
    """
    try:
        record = json.loads(line) if exact else _loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a line must be a JSON object, not {type(record).__name__}")
    return record


def _loads(line: bytes) -> object:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:  # Python's reader takes more (NaN, a byte order mark), and says what is wrong
        return json.loads(line)


def text_field(record: dict, key: str, where: str) -> str:
    """The string field `key`. Raises DataError if it is missing, no string, or no Unicode text."""
    if key not in record:
        raise DataError(f'{where}: lacks the field "{key}" (it has: {", ".join(map(str, record)) or "none"})')
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f'{where}: field "{key}" must be a string, not {type(value).__name__}')
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DataError(f'{where}: field "{key}" is not UTF-8 ({error.reason} at character {error.start})') from error
    return value


def read_sample(
    line: bytes,
    where: str,
    tokenizer: Tokenizer,
    media_root: str | None,
    check: bool,
    encoding: Encoding,
) -> Sample:
    """Tokenises one line and reads its media: files, or inline as {"base64": "..."}.

    Args:
        line: the JSON object.
        where: "file, line n", for messages.
        tokenizer: with media placeholders.
        media_root: folder to which paths are relative; None: a path is refused (`text_input.media_folder`).
        check: decode every medium.
        encoding: how media are stored; what is encoded anew is decoded in any case.

    Raises:
        DataError: anything wrong with the line or a file it names.
    """
    record = parse_line(line, where)
    text = text_field(record, "text", where)
    prompt = text_field(record, "prompt", where) if record.get("prompt") is not None else ""
    name = record.get("id")
    if name is not None and not isinstance(name, (str, int)):
        raise DataError(f'{where}: field "id" must be a string, not {type(name).__name__}')
    name = text_field(record, "id", where) if isinstance(name, str) else name
    media = {
        kind: [
            read_entry(kind, entry, number, media_root, where, check, encoding)
            for number, entry in enumerate(entries, 1)
        ]
        for kind, entries in media_entries(record, (prompt, text), where).items()
    }
    prompt_ids = tokenizer.encode(prompt) if prompt else []
    text_ids = tokenizer.encode(text)
    tokens = [tokenizer.bos_id, *prompt_ids, *text_ids, tokenizer.eos_id]
    return Sample("" if name is None else str(name), tokens, 1 + len(prompt_ids), media)


def media_entries(record: dict, texts: Sequence[str], where: str) -> dict[str, list]:
    """Paths or inline media of each kind. Raises DataError where they are none, or do not fit the placeholders."""
    entries: dict[str, list] = {}
    for kind, placeholder in PLACEHOLDERS.items():
        paths = record.get(kind) or []
        if not isinstance(paths, list) or not all(isinstance(path, str) or is_inline(path) for path in paths):
            raise DataError(f'{where}: field "{kind}" must be a list of paths (or of {{"base64": ...}})')
        count = sum(text.count(placeholder) for text in texts)
        if count != len(paths):
            raise DataError(
                f'{where}: {count} {placeholder} in prompt and text, but {len(paths)} files in "{kind}"; '
                "there must be one placeholder a file"
            )
        entries[kind] = paths
    return entries


def read_entry(
    kind: str,
    entry: str | dict[str, str],
    number: int,
    media_root: str | None,
    where: str,
    check: bool,
    encoding: Encoding = KEEP,
) -> bytes:
    """Bytes of the `number`th medium of a line (from 1), a path or inline; decoded once if `check`."""
    if isinstance(entry, str):
        return read_medium(kind, entry, media_root, where, check, encoding)
    return _inline_medium(kind, entry, f'{where}: field "{kind}", number {number}', check, encoding)


def refuse_file(kind: str, path: str, where: str) -> NoReturn:
    """Raises DataError for a path in an input that holds its media (`text_input.media_folder`)."""
    raise DataError(
        f'{where}: field "{kind}" names the file {path!r}; media of a tar, Parquet or Arrow file lie in it, and '
        "no other file is read (a JSONL may name files)"
    )


def read_medium(kind: str, path: str, media_root: str | None, where: str, check: bool, encoding: Encoding) -> bytes:
    """Bytes to store of a media file, decoded once if `check`. Raises DataError naming `where` and the path."""
    if media_root is None:
        refuse_file(kind, path, where)
    full = os.path.join(media_root, path)
    try:
        data = read_file(full)
    except FileNotFoundError as error:
        raise DataError(f"{where}: no such file: {full}") from error
    except OSError as error:
        raise DataError(f"{where}: {full}: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return _checked(kind, data, f"{where}: {full}", check, encoding)


def _inline_medium(kind: str, medium: dict[str, str], where: str, check: bool, encoding: Encoding) -> bytes:
    try:
        data = inline_bytes(medium)
    except ValueError as error:
        raise DataError(f"{where}: not base64 ({error})") from error
    return _checked(kind, data, where, check, encoding)


def _checked(kind: str, data: bytes, where: str, check: bool, encoding: Encoding) -> bytes:
    if len(data) > np.iinfo(np.int32).max:
        raise DataError(f"{where}: {len(data)} bytes; a record holds at most 2 GiB")
    try:
        refuse_empty(data)
        if encoding.changes(kind):
            return encode_medium(kind, data, encoding)
        if check:
            check_medium(kind, data)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return data


def table_row(sample: Sample, unlearned: np.ndarray) -> tuple:
    """The row of TABLE_DTYPE of a sample; record numbers are filled in by the writer, in order."""
    learned = np.asarray(sample.tokens[sample.prompt_length :])
    return (
        sample.prompt_length,
        len(sample.tokens),
        int((~np.isin(learned, unlearned)).sum()),
        *(len(sample.media[kind]) for kind in KINDS),
        0,
        0,
        0,
    )
