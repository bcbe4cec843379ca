"""One dataset → several, by proportions or in equal parts, atomically.

Proportions cut where `data.split` cuts, so a run that names the parts reads the documents that one with this split
would. Shuffled, each part holds its documents in the order of a keyed permutation, the same on every machine.
"""

from __future__ import annotations

import os

from tqdm import tqdm

from megatron_mm.config.proportions import parse_split
from megatron_mm.data.build.copying import Selection, Target, copy_datasets
from megatron_mm.data.reading.order import Permutation, Purpose, split_documents
from megatron_mm.data.store.shards import Shard
from megatron_mm.media.errors import DataError

NAMES = ("train", "valid", "test")


def split_dataset(
    path: str,
    output: str,
    split: str | None = None,
    parts: int | None = None,
    shuffle_seed: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, dict]:
    """Divides a dataset's documents among new datasets.

    Args:
        path: prefix of a text shard, or dataset folder.
        output: new prefixes or folders are named OUTPUT_train, _valid and _test, or OUTPUT_part1 and so on.
        split: proportions of train, valid and test, such as "969,30,1"; what has the proportion 0 is not made.
        parts: number of equal parts instead.
        shuffle_seed: draws documents at random, by this seed; None leaves them in order.
        overwrite: replace existing outputs.
        progress: show a bar.

    Returns:
        Counts of each new dataset, by its path.

    Raises:
        DataError: the dataset is damaged, a part would have no documents, or an output exists; nothing is left behind.
        ValueError: not exactly one of `split` and `parts`, or one that means nothing.
    """
    if (split is None) == (parts is None):
        raise ValueError("give one of --split (such as 969,30,1) and --parts (such as 4)")
    if shuffle_seed is not None and shuffle_seed < 0:
        raise ValueError(f"--seed: {shuffle_seed} must be at least 0")
    shard = Shard(path)
    pieces = _proportions(split, shard) if split is not None else _equal_parts(parts, shard)
    order = None if shuffle_seed is None else Permutation(len(shard), [shuffle_seed, Purpose.SPLIT])
    targets = []
    for name, places in pieces.items():
        made = {"of": shard.name, "part": name, "first": places.start, "end": places.stop, "documents": len(shard)}
        made |= {"split": split} if split is not None else {"parts": parts}
        manifest = {
            "tokenizer": shard.manifest.get("tokenizer", {}),
            "options": {**shard.manifest.get("options", {}), "split": {**made, "shuffle_seed": shuffle_seed}},
            "sources": shard.manifest.get("sources", []),
        }
        targets.append(Target(f"{output}_{name}", [Selection(shard, places, order)], manifest))
    options = {"split": [target.manifest["options"]["split"] for target in targets]}
    advice = "choose another --output or pass --overwrite"
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    with tqdm(total=len(shard), unit="doc", desc="split", disable=not progress, mininterval=0.5) as bar:
        counts = copy_datasets(targets, output, options, overwrite, advice, bar)
    return {target.path: count for target, count in zip(targets, counts)}


def _proportions(split: str, shard: Shard) -> dict[str, range]:
    shares, pieces = parse_split(split, "--split"), split_documents(split, len(shard))
    for name, share, piece in zip(NAMES, shares, pieces):
        if share and not piece:
            raise DataError(f'{shard.path}: --split "{split}" leaves no document for {name}; it has {len(shard)}')
    return {name: piece for name, piece in zip(NAMES, pieces) if piece}


def _equal_parts(parts: int, shard: Shard) -> dict[str, range]:
    if not 1 <= parts <= len(shard):
        raise DataError(f"{shard.path}: --parts {parts}; 1 to {len(shard)} are possible, as it has that many documents")
    bounds = [number * len(shard) // parts for number in range(parts + 1)]
    digits = len(str(parts))
    return {f"part{n + 1:0{digits}d}": range(bounds[n], bounds[n + 1]) for n in range(parts)}
