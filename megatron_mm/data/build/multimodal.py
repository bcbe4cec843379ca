"""Samples with media → a dataset folder that trains: tokens, encoded media, a table that joins them, a manifest.

The folder holds Megatron's `.bin`/`.idx` pairs: `text` (int32 tokens, one document a sample) and, where there are any,
`images`, `sounds`, `videos` (uint8: the files' own bytes, one a document) and `ids`. `samples.npy` is the table
(`samples.TABLE_DTYPE`), `manifest.json` says what made it. Lines travel in blocks to worker processes and come back in
order, so the bytes do not depend on the number of workers. A build that is killed continues (`jobs/unfinished.py`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from megatron_mm.data.cleaning.drop_list import DropList, drop_options
from megatron_mm.data.corpus.samples import KINDS, TABLE_DTYPE, read_sample, table_row
from megatron_mm.data.corpus.text_input import media_folder
from megatron_mm.data.jobs.parallel import LineBlock
from megatron_mm.data.jobs.skipped import LIST, OnError, SkippedLine, SkippedLines
from megatron_mm.data.jobs.unfinished import Lines, Replacing, UnfinishedBuild, check_output
from megatron_mm.data.store.indexed import CHECKSUMS, IndexedWriter, open_at
from megatron_mm.data.store.layout import FORMAT, MEDIA_SHARDS, TABLE, VERSION, table_counts
from megatron_mm.data.store.manifest import MANIFEST, describe_sources, differs_from_folder, write_manifest
from megatron_mm.data.tokens.tokenizer import Tokenizer, open_tokenizer
from megatron_mm.media.encoding import KEEP, Encoding
from megatron_mm.media.errors import DataError
from megatron_mm.platform.atomic_files import sync

_ROWS = "samples.rows"  # the table while it grows
_FILES = re.compile(r"(text|images|sounds|videos|ids)\.(bin|idx|crc)|samples\.npy|skipped\.jsonl")
_TABLE_FIELDS = {"images": "image", "audios": "audio", "videos": "video"}


@dataclass
class Block:
    """What a worker makes of a block of lines."""

    tokens: np.ndarray
    table: np.ndarray
    ids: list[str]
    media: dict[str, list[bytes]] = field(default_factory=dict)
    skipped: list[SkippedLine] = field(default_factory=list)


class _Worker:
    """State of one worker process."""

    tokenizer: Tokenizer
    unlearned: np.ndarray
    media_root: str | None
    check: bool
    encoding: Encoding
    on_error: OnError
    drops: DropList | None

    @classmethod
    def start(
        cls,
        tokenizer: str,
        media_root: str | None,
        check: bool,
        encoding: Encoding,
        on_error: OnError,
        drop: str | None,
    ) -> None:
        cls.tokenizer = open_tokenizer(tokenizer)
        cls.unlearned = np.array(cls.tokenizer.unlearned_ids)
        cls.media_root, cls.check, cls.encoding, cls.on_error = media_root, check, encoding, on_error
        cls.drops = DropList(drop) if drop is not None else None


def _build_block(block: LineBlock) -> Block:
    """Reads the samples of a block of lines; runs in a worker."""
    root = media_folder(block.path, _Worker.media_root)
    media: dict[str, list[bytes]] = {kind: [] for kind in KINDS}
    tokens: list[int] = []
    rows, ids, skipped = [], [], []
    dropped = _Worker.drops.within(block) if _Worker.drops is not None else ()
    for number, line in enumerate(block.data.split(b"\n"), block.first_line):
        if not line.strip() or number in dropped:
            continue
        where = f"{block.path}, line {number}"
        try:
            sample = read_sample(line, where, _Worker.tokenizer, root, _Worker.check, _Worker.encoding)
        except DataError as error:
            if _Worker.on_error == "stop":
                raise
            skipped.append(SkippedLine.of(block.path, number, error))
            continue
        tokens += sample.tokens
        rows.append(table_row(sample, _Worker.unlearned))
        ids.append(sample.id)
        for kind in KINDS:
            media[kind] += sample.media[kind]
    return Block(np.array(tokens, dtype=np.int32), np.array(rows, dtype=TABLE_DTYPE), ids, media, skipped)


class FolderWriter:
    """Writes the files of a dataset folder, block by block.

    Args:
        folder: an existing folder, which only `finish` makes a dataset.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._writers: dict[str, IndexedWriter] = {}
        self._rows = 0
        self._table: BinaryIO | None = None
        self.skipped = SkippedLines(folder)

    def begin(self, state: dict | None) -> None:
        """Opens the files: new, or as they were at `state`."""
        state = state or {"rows": 0, "shards": {}, "skipped": None}
        self._rows, self._writers = state["rows"], {}
        self._table = open_at(os.path.join(self.folder, _ROWS), self._rows * TABLE_DTYPE.itemsize)
        self.skipped.begin(state["skipped"])
        for name, value in state["shards"].items():
            self._writers[name] = IndexedWriter(os.path.join(self.folder, name), _dtype(name), value)

    def state(self) -> dict:
        """How far the files are; all of it is on the disk."""
        sync(self._table)
        shards = {name: writer.state() for name, writer in self._writers.items()}
        return {"rows": self._rows, "shards": shards, "skipped": self.skipped.state()}

    def _writer(self, name: str) -> IndexedWriter:
        if name not in self._writers:
            self._writers[name] = IndexedWriter(os.path.join(self.folder, name), _dtype(name))
        return self._writers[name]

    def __len__(self) -> int:
        """Samples written so far."""
        return self._rows

    def count(self, kind: str) -> int:
        """Media of a kind written so far."""
        name = MEDIA_SHARDS[kind]
        return len(self._writers[name]) if name in self._writers else 0

    def add(self, block: Block) -> None:
        """Appends the samples of a block; record numbers in its table are set here."""
        table = block.table.copy()
        for kind in KINDS:
            counts = table[f"num_{kind}"].astype(np.int64)
            table[f"first_{_TABLE_FIELDS[kind]}"] = self.count(kind) + np.cumsum(counts) - counts
            for data in block.media.get(kind, ()):
                self._writer(MEDIA_SHARDS[kind]).add(data)
        self._writer("text").add_documents(block.tokens, table["num_tokens"])
        for name in block.ids:
            self._writer("ids").add(name.encode())
        self._table.write(table.tobytes())
        self.skipped.add(block.skipped)
        self._rows += table.size

    def finish(self, manifest: dict) -> dict:
        """Writes indexes, table and manifest.

        Args:
            manifest: tokenizer, options and sources; format, counts and checksums are added.

        Raises:
            DataError: there are no samples.
        """
        self._table.close()
        skipped = self.skipped.finish(self._rows)
        if not self._rows:
            raise DataError("the input holds no samples")
        unnamed = None if self._writers["ids"].num_items else self._writers.pop("ids")
        for writer in self._writers.values():
            writer.finalize()
        rows = os.path.join(self.folder, _ROWS)
        table = np.memmap(rows, dtype=TABLE_DTYPE, mode="r")
        np.save(os.path.join(self.folder, TABLE), table)
        manifest = {"format": FORMAT, "version": VERSION, "counts": {**table_counts(table), **skipped}, **manifest}
        del table
        shards = [name + suffix for name in self._writers for suffix in (".bin", ".idx", CHECKSUMS)]
        names = [TABLE, *shards, *([LIST] if skipped else [])]
        write_manifest(os.path.join(self.folder, MANIFEST), manifest, self.folder + os.sep, names)
        os.remove(rows)  # last: until here a killed build continues
        for writer in self._writers.values():
            writer.tidy()
        if unnamed is not None:
            unnamed.discard()
        return manifest

    def close(self) -> None:
        """Closes the files, whatever they hold."""
        for writer in self._writers.values():
            writer.close()
        self.skipped.close()
        if self._table is not None:
            with contextlib.suppress(OSError):
                self._table.close()


def _dtype(shard: str) -> type[np.generic]:
    return np.int32 if shard == "text" else np.uint8


def differs_from_dataset(path: str) -> str | None:
    """What tells that a path is no dataset folder, or not one alone; None: it is."""
    return differs_from_folder(path, FORMAT, _FILES)


def build_multimodal(
    inputs: Sequence[str],
    output: str,
    tokenizer: str,
    media_root: str | None = None,
    workers: int = 2,
    check: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    drop: str | None = None,
    encoding: Encoding = KEEP,
    on_error: OnError = "stop",
) -> dict:
    """Builds a dataset folder from JSONL files, or others with the same fields.

    Args:
        inputs: files of the formats of `corpus/text_input.py`, read in this order.
        output: folder to make.
        tokenizer: a file that `open_tokenizer` reads, with media placeholders.
        media_root: folder of the media; None: that of each input file.
        workers: processes; 0 works in this one. The output does not depend on it.
        check: decode every medium once.
        overwrite: replace an existing dataset folder.
        progress: show a bar.
        drop: folder of tools/clean_corpus.py, made of all these inputs; the lines that it names are left out.
        encoding: how media are stored.
        on_error: "skip" leaves out lines that cannot be used, and lists them in the folder (`jobs/skipped.py`).

    Returns:
        The manifest.

    Raises:
        DataError: a line or a medium cannot be used (file, line and cause are named); what was built before it is kept
            where the build was long, and continued from when the line is mended. An input is not the one that was
            cleaned.
    """
    model = open_tokenizer(tokenizer)
    advice = "remove it, choose another name or pass --overwrite"
    replacing = Replacing(overwrite, differs_from_dataset, advice)
    check_output(output, [output], replacing)
    root = os.path.abspath(media_root) if media_root is not None else None
    made_by = {"identity": model.identity, "vocab_size": model.vocab_size}
    how = {"check": check, "on_error": on_error, "encoding": asdict(encoding), **drop_options(drop, inputs)}
    build = UnfinishedBuild(output, {"format": FORMAT, "tokenizer": made_by, "media_root": root, **how})
    writer = FolderWriter(build.data)
    initargs = (tokenizer, media_root, check, encoding, on_error, drop)
    lines = Lines(_build_block, _Worker.start, initargs, workers, 1 << 18, 32)
    total = sum(os.path.getsize(path) for path in inputs if os.path.exists(path))
    try:
        build.begin()
        with tqdm(total=total, unit="B", unit_scale=True, desc="samples", disable=not progress, mininterval=0.5) as bar:
            for _ in build.read_lines(inputs, writer, lines, bar):
                bar.set_postfix(samples=len(writer), media=sum(map(writer.count, KINDS)), refresh=False)
        manifest = {"tokenizer": made_by, "options": how, "sources": describe_sources(inputs)}
        manifest = writer.finish(manifest)
        build.place([("", output)], replacing)
        return manifest
    except BaseException as error:
        writer.close()
        build.explain(error)
        raise
