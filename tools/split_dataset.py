"""Divides a text shard or a multimodal folder among several new ones.

    python tools/split_dataset.py --input data/emoji --output data/emoji --split 90,9,1 --shuffle --seed 7
    python tools/split_dataset.py --input data/corpus_text_document --output data/corpus --parts 4

The first makes data/emoji_train, _valid and _test, the second data/corpus_part1 to _part4. Without --shuffle documents
stay in order, and tools/merge_datasets.py puts them together again as they were.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.data.build.split import split_dataset
from megatron_mm.platform.tool import run_tool


@dataclass
class Args:
    """Split a dataset."""

    input: str
    """Prefix of a text shard, or a folder of tools/preprocess_multimodal.py."""
    output: str
    """New datasets are named OUTPUT_train and so on; they appear only when all are complete."""
    split: str | None = None
    """Proportions of train, valid and test, such as 969,30,1: the cuts that data.split makes."""
    parts: int | None = None
    """Number of equal parts, in place of --split."""
    shuffle: bool = False
    """Draw documents at random; each part then has them in that order."""
    seed: int = 1234
    """Of --shuffle: the same seed gives the same parts."""
    overwrite: bool = False
    """Replace existing outputs."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    seed = args.seed if args.shuffle else None
    made = split_dataset(args.input, args.output, args.split, args.parts, seed, args.overwrite)
    for path, counts in made.items():
        print(f"wrote {path}: " + ", ".join(f"{value} {name}" for name, value in counts.items()))


if __name__ == "__main__":
    run_tool(main)
