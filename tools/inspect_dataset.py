"""Shows what is in datasets: counts, lengths, samples; --verify reads and decodes everything.

    python tools/inspect_dataset.py --path data/emoji --tokenizer-model tokenizer.model --samples 5
    python tools/inspect_dataset.py --path data/emoji --tokenizer-model tokenizer.model --verify
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import tyro

from megatron_mm.data.errors import run_tool
from megatron_mm.data.inspection import describe_sample, summary, verify
from megatron_mm.data.shards import Shard
from megatron_mm.data.tokenizer import Tokenizer


@dataclass
class Args:
    """Inspect text shards and multimodal folders."""

    path: list[str]
    """Prefixes of text shards, or dataset folders."""
    tokenizer_model: str | None = None
    """SentencePiece model: shows samples as text, and checks that it made the dataset."""
    samples: int = 3
    """Samples to show, evenly spaced."""
    verify: bool = False
    """Read every token and decode every medium; exit status 1 if anything is damaged."""
    json: str | None = None
    """Write the figures here."""


def show(value: dict, indent: str = "  ") -> None:
    """Prints a dict, one entry a line."""
    for name, entry in value.items():
        if isinstance(entry, dict):
            entry = ", ".join(f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v:,}" for k, v in entry.items())
        elif isinstance(entry, int):
            entry = f"{entry:,}"
        print(f"{indent}{name}: {entry}")


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    tokenizer = Tokenizer(args.tokenizer_model, require_media=False) if args.tokenizer_model else None
    results, damaged = [], False
    for path in args.path:
        shard = Shard(path, tokenizer)
        result = summary(shard)
        print(result["path"])
        show({k: v for k, v in result.items() if k != "path"})
        count = min(args.samples, len(shard))
        result["samples"] = [describe_sample(shard, i * len(shard) // count, tokenizer) for i in range(count)]
        for sample in result["samples"]:
            print(f"  sample {sample['id']}")
            show({k: v for k, v in sample.items() if k != "id"}, "    ")
        if args.verify:
            problems = verify(shard, tokenizer)
            result["problems"] = problems
            for problem in problems:
                print(f"error: {problem}", file=sys.stderr)
            print(f"  verified: {'no damage' if not problems else f'{len(problems)} damaged records'}")
            damaged |= bool(problems)
        results.append(result)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as stream:
            json.dump({"datasets": results}, stream, indent=2, ensure_ascii=False)
    return int(damaged)


if __name__ == "__main__":
    run_tool(main)
