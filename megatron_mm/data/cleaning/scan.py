"""The first pass: every line, in worker processes, becomes a row of fixed size, or a verdict.

    records.bin     a row a record: where it stands, its exact hash, what a report shows of it
    texts.bin       a row a text that is compared: its record and MinHash signature
    band-NN.bin     hashes of that band of the signatures, one a row of texts.bin
    images.bin      a row an image that is compared: its record and perceptual signature
    rejected.jsonl  a line a record that a rule drops

What a rule drops has no rows but that in records.bin, so it is nobody's original. The files grow with the records, not
memory; they are the same for any number of workers.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

import numpy as np

from megatron_mm.data.cleaning.field_rules import FieldRules
from megatron_mm.data.cleaning.image_signatures import SIGNATURE_DTYPE, image_signature
from megatron_mm.data.cleaning.media_rules import ImageRules, SoundRules, VideoRules, measure_video
from megatron_mm.data.cleaning.predicate import Predicate, PredicateError
from megatron_mm.data.cleaning.records import Record
from megatron_mm.data.cleaning.text_rules import Blocklist, TextRules
from megatron_mm.data.cleaning.text_signatures import (
    PERMUTATIONS,
    Bands,
    band_hashes,
    exact_hash,
    minhashes,
    normalised,
    words_of,
)
from megatron_mm.data.cleaning.verdict import Verdict
from megatron_mm.data.corpus.samples import KINDS
from megatron_mm.data.corpus.text_input import media_folder
from megatron_mm.data.jobs.parallel import LineBlock
from megatron_mm.data.store.indexed import open_at
from megatron_mm.data.tokens.tokenizer import PLACEHOLDERS
from megatron_mm.media.errors import DataError
from megatron_mm.platform.atomic_files import sync

#: Bytes of a record's text that reports show.
EXCERPT_BYTES = 160
RECORD_DTYPE = np.dtype(
    [
        ("exact", "<u8", (2,)),
        ("line", "<u8"),
        ("file", "<u4"),
        ("characters", "<u4"),
        ("images", "<u4"),
        ("rejected", "?"),
        ("excerpt", f"S{EXCERPT_BYTES}"),
    ]
)
TEXT_DTYPE = np.dtype([("record", "<u8"), ("signature", "<u4", (PERMUTATIONS,))])
_SIGNATURE = [(name, SIGNATURE_DTYPE[name]) for name in SIGNATURE_DTYPE.names]
IMAGE_DTYPE = np.dtype([("record", "<u8"), ("prompt", "<u8"), *_SIGNATURE])
RECORDS, TEXTS, IMAGES, REJECTED = "records.bin", "texts.bin", "images.bin", "rejected.jsonl"
UNREADABLE = "unreadable"


def band_file(band: int) -> str:
    """Name of the file of a band's hashes."""
    return f"band-{band:02}.bin"


@dataclass(frozen=True)
class Rules:
    """What a record must be to be kept, whatever the others are. One with neither text nor media never is."""

    text: TextRules = field(default_factory=TextRules)
    images: ImageRules = field(default_factory=ImageRules)
    audios: SoundRules = field(default_factory=SoundRules)
    videos: VideoRules = field(default_factory=VideoRules)
    fields: FieldRules = field(default_factory=FieldRules)
    blocklist: str | None = None
    """File of words and phrases (`text_rules.Blocklist`)."""
    predicate: str | None = None
    """A function of the user's (`predicate.Predicate`)."""
    check: bool = True
    """Decode every medium; what does not decode is unreadable."""
    on_error: Literal["stop", "drop"] = "stop"
    """Unreadable records end the run, or are dropped."""


@dataclass(frozen=True)
class Wanted:
    """Which signatures the second pass needs."""

    exact: Literal["off", "normalised", "verbatim"]
    cut: Bands | None
    """Bands of MinHash; None: texts are not compared."""
    shingle_words: int
    texts_with_media: bool
    images: bool
    prompts: bool
    """Whether images are compared within equal prompts only."""


@dataclass
class Rows:
    """What a worker makes of a block of lines. Record numbers are within the block."""

    records: np.ndarray
    texts: np.ndarray
    bands: np.ndarray
    images: np.ndarray
    rejected: list[tuple[int, Verdict]]


class Worker:
    """State of one worker process."""

    @classmethod
    def start(
        cls, inputs: Sequence[str], text_keys: tuple[str, ...], media_root: str | None, rules: Rules, wanted: Wanted
    ) -> None:
        cls.numbers = {path: number for number, path in enumerate(inputs)}
        cls.text_keys, cls.media_root, cls.rules, cls.wanted = text_keys, media_root, rules, wanted
        cls.text_rules = rules.text.filled()
        cls.blocklist = Blocklist(rules.blocklist) if rules.blocklist else None
        cls.predicate = Predicate(rules.predicate) if rules.predicate else None


def _judge(record: Record) -> Verdict | None:
    """The first rule that a record breaks, those that cost least first: what they drop need not decode."""
    rules, media = Worker.rules, record.media
    if not record.text.strip() and not media:
        return Verdict("empty", {})
    verdict = rules.fields.judge(record.fields, record.where)
    if verdict is None and Worker.blocklist is not None:
        verdict = Worker.blocklist.judge(f"{record.prompt}\n{record.text}")
    if verdict is None and Worker.text_rules.wanted:
        verdict = Worker.text_rules.judge(record.text)
    if verdict is None and rules.check:
        media.check()
    if verdict is None and rules.images.wanted and media.count("images"):
        verdict = rules.images.judge(media.images)
    if verdict is None and rules.audios.wanted and media.count("audios"):
        verdict = rules.audios.judge(media.sounds)
    if verdict is None and rules.videos.wanted and media.count("videos"):
        verdict = rules.videos.judge(media.measure_videos(measure_video))
    if verdict is None and Worker.predicate is not None:
        verdict = Worker.predicate.judge(record)
    return verdict


def _question(prompt: str) -> int:
    """Hash of what a prompt asks, wherever its placeholders stand."""
    for mark in PLACEHOLDERS.values():
        prompt = prompt.replace(mark, " ")
    return int.from_bytes(exact_hash(normalised(prompt))[:8], "little")


def _exact(record: Record) -> bytes:
    """Hash of everything that would be learned from."""
    prompt, text = record.prompt, record.text
    if Worker.wanted.exact == "normalised":
        prompt, text = normalised(prompt), normalised(text)
    media = (kind.encode() + data for kind in KINDS for data in record.media.files(kind))
    return exact_hash(f"{prompt}\x00{text}", media)


def scan_block(block: LineBlock) -> Rows:
    """Judges the lines of a block and signs those that no rule drops; runs in a worker.

    Raises:
        DataError: a line cannot be used, where such lines end the run, or the predicate failed.
    """
    root = media_folder(block.path, Worker.media_root)
    file, wanted = Worker.numbers[block.path], Worker.wanted
    records, images, rejected = [], [], []
    words: list[list[bytes]] = []
    word_records: list[int] = []
    for number, line in enumerate(block.data.split(b"\n"), block.first_line):
        if not line or line.isspace():
            continue
        at, where = len(records), f"{block.path}, line {number}"
        exact, characters, pictures = bytes(16), 0, 0
        excerpt = line[:EXCERPT_BYTES]
        try:
            record = Record(line, where, Worker.text_keys, root)
            characters, pictures = len(record.text), record.media.count("images")
            excerpt = (record.text or record.prompt)[:EXCERPT_BYTES].encode()[:EXCERPT_BYTES]
            verdict = _judge(record)
            if verdict is None:
                if wanted.exact != "off":
                    exact = _exact(record)
                if wanted.images and pictures:
                    key = _question(record.prompt) if wanted.prompts else 0
                    signatures = zip(record.media.images, record.media.files("images"))
                    images += [(at, key, *image_signature(image, data)) for image, data in signatures]
                comparable = wanted.cut is not None and (wanted.texts_with_media or not record.media)
                if comparable and (found := words_of(record.text)):
                    words.append(found)
                    word_records.append(at)
        except DataError as error:
            if isinstance(error, PredicateError) or Worker.rules.on_error == "stop":
                raise
            verdict = Verdict(UNREADABLE, {"error": str(error).removeprefix(f"{where}: ")})
        if verdict is not None:
            rejected.append((at, verdict))
        records.append((np.frombuffer(exact, "<u8"), number, file, characters, pictures, verdict is not None, excerpt))
    texts = np.zeros(len(words), dtype=TEXT_DTYPE)
    bands = np.empty((wanted.cut.bands if wanted.cut else 0, len(words)), dtype=np.uint64)
    if words:
        texts["record"] = word_records
        texts["signature"] = minhashes(words, wanted.shingle_words)
        bands = band_hashes(texts["signature"], wanted.cut)
    return Rows(np.array(records, RECORD_DTYPE), texts, bands, np.array(images, IMAGE_DTYPE), rejected)


class RowWriter:
    """Appends the rows of blocks to the files of the first pass.

    Args:
        folder: an existing folder.
        bands: of the signatures.
    """

    def __init__(self, folder: str, bands: int) -> None:
        self.folder = folder
        self._names = [RECORDS, TEXTS, IMAGES, REJECTED, *map(band_file, range(bands))]
        self._files: dict[str, BinaryIO] = {}
        self.records = self.rejected = 0

    def begin(self, state: dict | None) -> None:
        """Opens the files: new, or as they were at `state`."""
        state = state or {"records": 0, "rejected": 0, "sizes": {}}
        self.records, self.rejected = state["records"], state["rejected"]
        for name in self._names:
            self._files[name] = open_at(os.path.join(self.folder, name), state["sizes"].get(name, 0))

    def add(self, rows: Rows) -> None:
        """Appends the rows of the next block."""
        for table in (rows.texts, rows.images):
            table["record"] += np.uint64(self.records)
        for name, table in ((RECORDS, rows.records), (TEXTS, rows.texts), (IMAGES, rows.images)):
            self._files[name].write(table.tobytes())
        for band, hashes in enumerate(rows.bands):
            self._files[band_file(band)].write(hashes.tobytes())
        for number, verdict in rows.rejected:
            value = {"record": self.records + number, **verdict._asdict()}
            line = json.dumps(value, ensure_ascii=False) + "\n"
            self._files[REJECTED].write(line.encode(errors="backslashreplace"))  # half a surrogate pair, as JSON has it
        self.records += len(rows.records)
        self.rejected += len(rows.rejected)

    def state(self) -> dict:
        """How far the files are; all of it is on the disk."""
        for stream in self._files.values():
            sync(stream)
        sizes = {name: stream.tell() for name, stream in self._files.items()}
        return {"records": self.records, "rejected": self.rejected, "sizes": sizes}

    def close(self) -> None:
        """Closes the files, whatever they hold."""
        for stream in self._files.values():
            with contextlib.suppress(OSError):
                stream.close()


def read_rows(path: str, dtype: np.dtype) -> np.ndarray:
    """Rows of a file, mapped, not read."""
    return np.memmap(path, dtype=dtype, mode="r") if os.path.getsize(path) else np.empty(0, dtype=dtype)
