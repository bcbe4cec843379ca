"""Several datasets of one kind and one tokenizer → one dataset, atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from megatron_mm.data.build_multimodal import Block, FolderWriter
from megatron_mm.data.errors import DataError
from megatron_mm.data.indexed import IndexedWriter
from megatron_mm.data.samples import KINDS
from megatron_mm.data.shards import Shard

_CHUNK = 64


def merge_datasets(inputs: Sequence[str], output: str, overwrite: bool = False, progress: bool = True) -> dict:
    """Joins datasets in the order given.

    Args:
        inputs: prefixes of text shards, or dataset folders; all of one kind, made with one tokenizer.
        output: prefix or folder to make.
        overwrite: replace an existing output.
        progress: show a bar.

    Returns:
        The counts of the result.

    Raises:
        DataError: an input is damaged, kinds or tokenizers differ, or the output exists; nothing is left behind.
    """
    shards = [Shard(path) for path in inputs]
    if len({shard.is_multimodal for shard in shards}) > 1:
        raise DataError("text shards and multimodal folders cannot be merged into one; name both in data.datasets")
    first = shards[0]
    for shard in shards[1:]:
        made_by = [s.manifest.get("tokenizer", {}).get("identity") for s in (first, shard)]
        if None not in made_by and made_by[0] != made_by[1]:
            raise DataError(f"{shard.path}: made with another tokenizer than {first.path}")
        if shard.text.data.dtype != first.text.data.dtype:
            raise DataError(
                f"{shard.path}: ids are {shard.text.data.dtype}, but those of {first.path} are {first.text.data.dtype}"
            )
    bar = tqdm(total=sum(map(len, shards)), unit="doc", desc="merge", disable=not progress, mininterval=0.5)
    with bar:
        return _merge_folders(shards, output, overwrite, bar) if first.is_multimodal else _merge_text(
            shards, output, overwrite, bar
        )


def _merge_folders(shards: list[Shard], output: str, overwrite: bool, bar: tqdm) -> dict:
    writer = FolderWriter(output, overwrite)
    try:
        for shard in shards:
            for start in range(0, len(shard), _CHUNK):
                documents = range(start, min(start + _CHUNK, len(shard)))
                ids = [shard.ids.document(d).tobytes().decode() if shard.ids is not None else "" for d in documents]
                media = {kind: [shard.medium(kind, r) for d in documents for r in shard.records(kind, d)]
                         for kind in KINDS}  # fmt: skip
                tokens = np.concatenate([shard.text.document(d) for d in documents])
                writer.add(Block(tokens, np.array(shard.table[start : documents.stop]), ids, media))
                bar.update(len(documents))
        manifest = writer.finish(
            {
                "tokenizer": shards[0].manifest.get("tokenizer", {}),
                "options": {"merged": [shard.name for shard in shards]},
                "sources": [source for shard in shards for source in shard.manifest.get("sources", [])],
            }
        )
    except BaseException:
        writer.abandon()
        raise
    return manifest["counts"]


def _merge_text(shards: list[Shard], output: str, overwrite: bool, bar: tqdm) -> dict:
    names = [output + suffix for suffix in (".bin", ".json", ".idx")]
    for name in names:
        if os.path.exists(name) and not overwrite:
            raise DataError(f"{name}: exists already; choose another name or pass --overwrite")
    temporary = f"{output}.building-{os.getpid()}"
    writer: IndexedWriter | None = None
    try:
        writer = IndexedWriter(temporary, shards[0].text.data.dtype.type)
        for shard in shards:
            writer.add_shard(shard.text)
            bar.update(len(shard))
        writer.finalize()
        counts = {"documents": len(writer), "tokens": writer.num_items}
        identities = {shard.manifest.get("tokenizer", {}).get("identity") for shard in shards}
        manifest = {
            "format": "megatron text shard",
            "version": 1,
            "counts": counts,
            "tokenizer": shards[0].manifest.get("tokenizer", {}) if len(identities) == 1 else {},
            "options": {"merged": [shard.name for shard in shards]},
            "sources": [source for shard in shards for source in shard.manifest.get("sources", [])],
        }
        with open(temporary + ".json", "w", encoding="utf-8") as stream:
            json.dump(manifest, stream, indent=2, ensure_ascii=False)
            stream.write("\n")
        for suffix in (".bin", ".json", ".idx"):
            os.replace(temporary + suffix, output + suffix)
    except BaseException:
        if writer is not None:
            writer.close()
        for suffix in (".bin", ".idx", ".json"):
            if os.path.exists(temporary + suffix):
                os.remove(temporary + suffix)
        raise
    return counts
