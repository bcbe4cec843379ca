"""Samples with media → a dataset folder that trains: tokens, encoded media, a table that joins them, a manifest.

The folder holds Megatron's `.bin`/`.idx` pairs: `text` (int32 tokens, one document a sample) and, where there are any,
`images`, `sounds`, `videos` (uint8: the files' own bytes, one a document) and `ids`. `samples.npy` is the table
(`samples.TABLE_DTYPE`), `manifest.json` says what made it. Lines travel in blocks to worker processes and come back in
order, so the bytes do not depend on the number of workers. The folder is built under a temporary name and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from megatron_mm.data.errors import DataError
from megatron_mm.data.indexed import IndexedWriter
from megatron_mm.data.parallel import LineBlock, line_blocks, ordered_map
from megatron_mm.data.samples import KINDS, TABLE_DTYPE, read_sample, table_row
from megatron_mm.data.text_input import open_lines
from megatron_mm.data.tokenizer import Tokenizer

FORMAT = "megatron_mm multimodal dataset"
VERSION = 1
TABLE = "samples.npy"
MANIFEST = "manifest.json"
#: Shard of each kind of media, within the folder.
MEDIA_SHARDS = {"images": "images", "audios": "sounds", "videos": "videos"}
_TABLE_FIELDS = {"images": "image", "audios": "audio", "videos": "video"}


@dataclass
class Block:
    """What a worker makes of a block of lines."""

    tokens: np.ndarray
    table: np.ndarray
    ids: list[str]
    media: dict[str, list[bytes]] = field(default_factory=dict)


class _Worker:
    """State of one worker process."""

    tokenizer: Tokenizer
    unlearned: np.ndarray
    media_root: str | None
    check: bool

    @classmethod
    def start(cls, tokenizer: str, media_root: str | None, check: bool) -> None:
        cls.tokenizer = Tokenizer(tokenizer)
        cls.unlearned = np.array(cls.tokenizer.unlearned_ids)
        cls.media_root, cls.check = media_root, check


def _build_block(block: LineBlock) -> Block:
    """Reads the samples of a block of lines; runs in a worker."""
    root = _Worker.media_root if _Worker.media_root is not None else os.path.dirname(os.path.abspath(block.path))
    media: dict[str, list[bytes]] = {kind: [] for kind in KINDS}
    tokens: list[int] = []
    rows, ids = [], []
    for number, line in enumerate(block.data.split(b"\n"), block.first_line):
        if not line.strip():
            continue
        sample = read_sample(line, f"{block.path}, line {number}", _Worker.tokenizer, root, _Worker.check)
        tokens += sample.tokens
        rows.append(table_row(sample, _Worker.unlearned))
        ids.append(sample.id)
        for kind in KINDS:
            media[kind] += sample.media[kind]
    return Block(np.array(tokens, dtype=np.int32), np.array(rows, dtype=TABLE_DTYPE), ids, media)


class FolderWriter:
    """Writes a dataset folder block by block, under a temporary name until `finish`.

    Nothing is on the disk before the first block, so that a caller can clean up from there on, whatever interrupts it.
    """

    def __init__(self, output: str, overwrite: bool = False) -> None:
        self.output = os.path.abspath(output)
        if os.path.exists(self.output) and not overwrite:
            raise DataError(f"{output}: exists already; remove it, choose another name or pass --overwrite")
        self.folder = f"{self.output}.building-{os.getpid()}"
        self._writers: dict[str, IndexedWriter] = {}
        self._tables: list[np.ndarray] = []
        self._ids: list[str] = []

    @property
    def tokens(self) -> IndexedWriter:
        """Of the texts."""
        return self._writer("text", np.int32)

    def _writer(self, name: str, dtype: type[np.generic] = np.uint8) -> IndexedWriter:
        if name not in self._writers:
            os.makedirs(self.folder, exist_ok=True)
            self._writers[name] = IndexedWriter(os.path.join(self.folder, name), dtype)
        return self._writers[name]

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
        self.tokens.add_documents(block.tokens, table["num_tokens"])
        self._tables.append(table)
        self._ids += block.ids

    def finish(self, manifest: dict) -> dict:
        """Writes indexes, table and manifest, and gives the folder its name.

        Args:
            manifest: tokenizer, options and sources; format and counts are added.
        """
        table = np.concatenate(self._tables) if self._tables else np.empty(0, TABLE_DTYPE)
        if not table.size:
            raise DataError(f"{self.output}: the input holds no samples")
        if any(self._ids):
            writer = self._writer("ids")
            for name in self._ids:
                writer.add(name.encode())
        for writer in self._writers.values():
            writer.finalize()
        np.save(os.path.join(self.folder, TABLE), table)
        manifest = {"format": FORMAT, "version": VERSION, "counts": table_counts(table), **manifest}
        with open(os.path.join(self.folder, MANIFEST), "w", encoding="utf-8") as stream:
            json.dump(manifest, stream, indent=2, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        if os.path.exists(self.output):
            old = f"{self.folder}.old"
            os.rename(self.output, old)
            os.rename(self.folder, self.output)
            shutil.rmtree(old) if os.path.isdir(old) else os.remove(old)
        else:
            os.rename(self.folder, self.output)
        return manifest

    def abandon(self) -> None:
        """Removes what was written."""
        for writer in self._writers.values():
            writer.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def table_counts(table: np.ndarray) -> dict[str, int]:
    """Totals of a sample table, as the manifest has them."""
    return {
        "samples": int(table.size),
        "tokens": int(table["num_tokens"].sum(dtype=np.int64)),
        "loss_tokens": int(table["num_loss_tokens"].sum(dtype=np.int64)),
        **{kind: int(table[f"num_{kind}"].sum(dtype=np.int64)) for kind in KINDS},
    }


def build_multimodal(
    inputs: Sequence[str],
    output: str,
    tokenizer: str,
    media_root: str | None = None,
    workers: int = 2,
    check: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Builds a dataset folder from JSONL files.

    Args:
        inputs: JSONL files (`.gz` too), read in this order.
        output: folder to make.
        tokenizer: SentencePiece model with media placeholders.
        media_root: folder of the media; None: that of each JSONL file.
        workers: processes; 0 works in this one. The output does not depend on it.
        check: decode every medium once.
        overwrite: replace an existing output.
        progress: show a bar.

    Returns:
        The manifest.

    Raises:
        DataError: a line or a medium cannot be used (file, line and cause are named); nothing is left behind.
    """
    model = Tokenizer(tokenizer)
    writer = FolderWriter(output, overwrite)
    try:
        with tqdm(
            total=sum(os.path.getsize(path) for path in inputs if os.path.exists(path)),
            unit="B", unit_scale=True, desc="samples", disable=not progress, mininterval=0.5,
        ) as bar:  # fmt: skip
            for path in inputs:
                with open_lines(path) as (stream, raw):
                    done = 0
                    blocks = line_blocks(path, stream, raw, 1 << 18, 32)
                    initargs = (tokenizer, media_root, check)
                    for task, block in ordered_map(_build_block, blocks, workers, _Worker.start, initargs):
                        writer.add(block)
                        bar.update(task.end - done)
                        done = task.end
                        bar.set_postfix(samples=len(writer.tokens), media=sum(map(writer.count, KINDS)), refresh=False)
        return writer.finish(
            {
                "tokenizer": {"identity": model.identity, "vocab_size": model.vocab_size},
                "options": {"check": check},
                "sources": [{"name": os.path.basename(path), "bytes": os.path.getsize(path)} for path in inputs],
            }
        )
    except BaseException:
        writer.abandon()
        raise
