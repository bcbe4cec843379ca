"""Documents of datasets → new datasets, atomically: what merging and splitting share.

Documents are copied in the order asked for, a few at a time, so memory does not grow with the dataset. Each is compared
with its checksum on the way: a copy gets new checksums, which would hide an old damage for ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megatron_mm.data.build.multimodal import Block, FolderWriter, differs_from_dataset
from megatron_mm.data.build.text import differs_from_shard, write_text_manifest
from megatron_mm.data.corpus.samples import KINDS
from megatron_mm.data.jobs.unfinished import Replacing, UnfinishedBuild, check_output
from megatron_mm.data.store.indexed import IndexedWriter
from megatron_mm.data.store.layout import SUFFIXES
from megatron_mm.data.store.shards import Shard

_CHUNK_DOCUMENTS = 1024
_BLOCK_DOCUMENTS, _BLOCK_BYTES = 64, 1 << 25


@dataclass
class Selection:
    """Some documents of a dataset, in the order in which they are copied."""

    shard: Shard
    places: range
    """Which of the order below."""
    order: Callable[[np.ndarray], np.ndarray] | None = None
    """Documents at places of an order, both int64 [n]; None: the dataset's own order."""

    def chunks(self) -> Iterator[list[int]]:
        """Numbers of documents, a chunk at a time."""
        for start in range(self.places.start, self.places.stop, _CHUNK_DOCUMENTS):
            places = np.arange(start, min(start + _CHUNK_DOCUMENTS, self.places.stop), dtype=np.int64)
            yield (places if self.order is None else self.order(places)).tolist()


@dataclass
class Target:
    """A dataset to make."""

    path: str
    """Prefix of a text shard, or folder."""
    selections: Sequence[Selection]
    manifest: dict
    """Tokenizer, options and sources."""


def copy_datasets(
    targets: Sequence[Target], output: str, options: dict, overwrite: bool, advice: str, bar: tqdm
) -> list[dict]:
    """Makes datasets of documents of others; none gets its name before all are complete.

    Args:
        targets: all text shards, or all folders, as their selections are.
        output: names the folder in which they grow.
        options: what is made, as JSON.
        overwrite: replace existing datasets of the same kind.
        advice: what to do about existing ones, for the message.
        bar: counts documents.

    Returns:
        Counts of each target.

    Raises:
        DataError: a target exists, or a document is damaged; nothing is left behind.
    """
    is_folder = targets[0].selections[0].shard.is_multimodal
    suffixes = ("",) if is_folder else SUFFIXES  # the index last: a shard without it does not open
    replacing = Replacing(overwrite, differs_from_dataset if is_folder else differs_from_shard, advice)
    check_output(output, [target.path + suffix for target in targets for suffix in suffixes], replacing)
    build, counts = UnfinishedBuild(output, options), []
    make = _make_folder if is_folder else _make_text
    try:
        build.begin()
        for number, target in enumerate(targets):
            counts.append(make(target, os.path.join(build.data, str(number)), bar))
        names = [(f"{n}{suffix}", target.path + suffix) for suffix in suffixes for n, target in enumerate(targets)]
        build.place(names, replacing)
    except BaseException as error:
        build.explain(error)
        raise
    return counts


def _make_text(target: Target, prefix: str, bar: tqdm) -> dict:
    writer = IndexedWriter(prefix, target.selections[0].shard.text.data.dtype.type)
    try:
        for selection in target.selections:
            for numbers in selection.chunks():
                writer.add_copies(selection.shard.text, numbers)
                bar.update(len(numbers))
        writer.finalize()
    except BaseException:
        writer.close()
        raise
    counts = {"documents": len(writer), "tokens": writer.num_items}
    write_text_manifest(prefix, {"counts": counts, **target.manifest})
    return counts


def _make_folder(target: Target, folder: str, bar: tqdm) -> dict:
    os.makedirs(folder)
    writer = FolderWriter(folder)
    try:
        writer.begin(None)
        for selection in target.selections:
            for block in _blocks(selection.shard, (number for chunk in selection.chunks() for number in chunk)):
                writer.add(block)
                bar.update(len(block.ids))
        return writer.finish(target.manifest)["counts"]
    except BaseException:
        writer.close()
        raise


def _blocks(shard: Shard, documents: Iterable[int]) -> Iterator[Block]:
    """Documents with their media, as many at a time as memory should hold."""
    numbers: list[int] = []
    tokens: list[np.ndarray] = []
    ids: list[str] = []
    media: dict[str, list[bytes]] = {kind: [] for kind in KINDS}
    held = 0

    def block() -> Block:
        return Block(np.concatenate(tokens), np.array(shard.table[numbers]), ids, media)

    for number in documents:
        numbers.append(number)
        tokens.append(shard.text.checked(number))
        ids.append(shard.ids.checked(number).tobytes().decode() if shard.ids is not None else "")
        for kind in KINDS:
            for record in shard.records(kind, number):
                media[kind].append(shard.media[kind].checked(record).tobytes())
                held += len(media[kind][-1])
        if len(numbers) == _BLOCK_DOCUMENTS or held >= _BLOCK_BYTES:
            yield block()
            numbers, tokens, ids, media, held = [], [], [], {kind: [] for kind in KINDS}, 0
    if numbers:
        yield block()
