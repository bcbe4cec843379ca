"""Shows what is in datasets: counts, lengths, samples; --verify reads and decodes everything; --html makes a page.

    python tools/inspect_dataset.py --path data/emoji --tokenizer-model tokenizer.model --samples 5
    python tools/inspect_dataset.py --path data/emoji --tokenizer-model tokenizer.model --samples 20 --html emoji.html
    python tools/inspect_dataset.py --path data/emoji --tokenizer-model tokenizer.model --verify

The page is one file for any browser, without scripts and network: lengths as a histogram, samples with their images,
sounds to play, frames of videos, prompt, learned text, and tokens with their ids.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.config.outputs import check_file, figures
from megatron_mm.config.plugins import load_plugins
from megatron_mm.data.store.remote import localize
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.data.view.html_page import Entry, check_page, write_page
from megatron_mm.data.view.inspection import describe_sample, summary, verify
from megatron_mm.data.view.readable import readable_size
from megatron_mm.platform.atomic_files import write_figures
from megatron_mm.platform.tool import run_tool


@dataclass
class Args:
    """Inspect text shards and multimodal folders."""

    path: list[str]
    """Prefixes of text shards, or dataset folders; URLs are copied first."""
    tokenizer_model: str | None = None
    """File of the tokenizer: shows samples as text, and checks that it made the dataset."""
    samples: int = 3
    """Samples to show, evenly spaced."""
    verify: bool = False
    """Read every token and decode every medium; exit status 1 if anything is damaged."""
    json: str | None = None
    """Write the figures here."""
    html: str | None = None
    """Write a page with the figures and samples here; large images and long sounds are scaled down and cut."""
    plugins: tuple[str, ...] = ()
    """Python files or modules that register kinds of tokenizers (docs/data.md)."""


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
    check_file(args.json, "--json", figures("datasets"))
    check_page(args.html)
    load_plugins(args.plugins)
    tokenizer = open_tokenizer(args.tokenizer_model, require_media=False) if args.tokenizer_model else None
    results, entries = [], []
    for path in args.path:
        shard = Shard(localize(path), tokenizer)
        result = summary(shard)
        print(result["path"])
        show({k: v for k, v in result.items() if k != "path"})
        count = min(args.samples, len(shard))
        entry = Entry(shard, [i * len(shard) // count for i in range(count)])
        entries.append(entry)
        result["samples"] = [describe_sample(shard, document, tokenizer) for document in entry.documents]
        for sample in result["samples"]:
            print(f"  sample {sample['id']}")
            show({k: v for k, v in sample.items() if k != "id"}, "    ")
        if args.verify:
            problems = entry.problems = result["problems"] = verify(shard, tokenizer)
            for problem in problems:
                print(f"error: {problem}", file=sys.stderr)
            print(f"  verified: {'no damage' if not problems else f'{len(problems)} damaged records'}")
        results.append(result)
    write_figures(args.json, {"datasets": results})
    if args.html is not None:
        size = write_page(args.html, entries, tokenizer)
        print(f"wrote {args.html}: {sum(len(entry.documents) for entry in entries)} samples, {readable_size(size)}")
    return int(any(entry.problems for entry in entries))


if __name__ == "__main__":
    run_tool(main)
