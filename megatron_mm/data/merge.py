"""Several datasets of one kind and one tokenizer → one dataset, atomically."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from megatron_mm.data.build_multimodal import Block, FolderWriter
from megatron_mm.data.build_text import SUFFIXES, write_text_manifest
from megatron_mm.data.errors import DataError
from megatron_mm.data.indexed import IndexedWriter
from megatron_mm.data.samples import KINDS
from megatron_mm.data.shards import Shard
from megatron_mm.data.unfinished import UnfinishedBuild, refuse_existing

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
    refuse_existing([output], overwrite, "remove it, choose another name or pass --overwrite")
    build = UnfinishedBuild(output, {"merged": [os.path.abspath(shard.path) for shard in shards]})
    writer = FolderWriter(build.data)
    try:
        build.begin()
        writer.begin(None)
        for shard in shards:
            for start in range(0, len(shard), _CHUNK):
                documents = range(start, min(start + _CHUNK, len(shard)))
                ids = [shard.ids.document(d).tobytes().decode() if shard.ids is not None else "" for d in documents]
                media = {kind: [shard.medium(kind, r) for d in documents for r in shard.records(kind, d)]
                         for kind in KINDS}  # fmt: skip
                tokens = np.concatenate([shard.text.document(d) for d in documents])
                writer.add(Block(tokens, np.array(shard.table[start : documents.stop]), ids, media))
                bar.update(len(documents))
        manifest = writer.finish(_manifest(shards))
        build.place([("", output)])
    except BaseException as error:
        writer.close()
        build.explain(error)
        raise
    return manifest["counts"]


def _manifest(shards: list[Shard]) -> dict:
    identities = {shard.manifest.get("tokenizer", {}).get("identity") for shard in shards}
    return {
        "tokenizer": shards[0].manifest.get("tokenizer", {}) if len(identities) == 1 else {},
        "options": {"merged": [shard.name for shard in shards]},
        "sources": [source for shard in shards for source in shard.manifest.get("sources", [])],
    }


def _merge_text(shards: list[Shard], output: str, overwrite: bool, bar: tqdm) -> dict:
    refuse_existing([output + s for s in SUFFIXES], overwrite, "choose another name or pass --overwrite")
    build = UnfinishedBuild(output, {"merged": [os.path.abspath(shard.path) for shard in shards]})
    prefix, writer = os.path.join(build.data, "text"), None
    try:
        build.begin()
        writer = IndexedWriter(prefix, shards[0].text.data.dtype.type)
        for shard in shards:
            writer.add_shard(shard.text)
            bar.update(len(shard))
        writer.finalize()
        counts = {"documents": len(writer), "tokens": writer.num_items}
        write_text_manifest(prefix, {"counts": counts, **_manifest(shards)})
        build.place([("text" + suffix, output + suffix) for suffix in SUFFIXES])
    except BaseException as error:
        if writer is not None:
            writer.close()
        build.explain(error)
        raise
    return counts
