"""Several datasets of one kind and one tokenizer → one dataset, atomically."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tqdm import tqdm

from megatron_mm.data.build.copying import Selection, Target, copy_datasets
from megatron_mm.data.store.shards import Shard
from megatron_mm.media.errors import DataError


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
    target = Target(output, [Selection(shard, range(len(shard))) for shard in shards], _manifest(shards))
    options = {"merged": [os.path.abspath(shard.path) for shard in shards]}
    advice = ("remove it, " if first.is_multimodal else "") + "choose another name or pass --overwrite"
    with tqdm(total=sum(map(len, shards)), unit="doc", desc="merge", disable=not progress, mininterval=0.5) as bar:
        return copy_datasets([target], output, options, overwrite, advice, bar)[0]


def _manifest(shards: list[Shard]) -> dict:
    identities = {shard.manifest.get("tokenizer", {}).get("identity") for shard in shards}
    return {
        "tokenizer": shards[0].manifest.get("tokenizer", {}) if len(identities) == 1 else {},
        "options": {"merged": [shard.name for shard in shards]},
        "sources": [source for shard in shards for source in shard.manifest.get("sources", [])],
    }
