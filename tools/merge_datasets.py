"""Joins several text shards, or several multimodal folders, into one.

    python tools/merge_datasets.py --input data/part1 data/part2 --output data/all
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.data.build.merge import merge_datasets
from megatron_mm.platform.tool import run_tool


@dataclass
class Args:
    """Merge datasets of one kind, made with one tokenizer."""

    input: list[str]
    """Prefixes of text shards, or folders of tools/preprocess_multimodal.py, in the order of the result."""
    output: str
    """Prefix or folder to make; it appears only when it is complete."""
    overwrite: bool = False
    """Replace an existing output."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    counts = merge_datasets(args.input, args.output, args.overwrite)
    print(f"wrote {args.output}: " + ", ".join(f"{value} {name}" for name, value in counts.items()))


if __name__ == "__main__":
    run_tool(main)
