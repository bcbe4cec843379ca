"""Trains a SentencePiece tokenizer with media placeholders.

    python tools/train_tokenizer.py --input corpus.jsonl --json-keys text --vocab-size 8000 --output tokenizer.model
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.data.build.train_tokenizer import train_tokenizer
from megatron_mm.data.corpus.text_input import expand_inputs
from megatron_mm.platform.tool import run_tool


@dataclass
class Args:
    """Train a SentencePiece model: <pad> <unk> <s> </s> are 0–3, then <image> <audio> <video> <mask>, then pieces."""

    input: list[str]
    """Files: .jsonl .csv .tsv .parquet .arrow .tar or plain text, .gz .zst; folders, globs."""
    output: str
    """The .model file to write."""
    vocab_size: int
    """Pieces wanted, the 8 special ones and 256 bytes included; a small corpus may yield fewer (it is said)."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    """SentencePiece's algorithm."""
    json_keys: tuple[str, ...] = ("text",)
    """Text fields of a record; a record must have one of them."""
    character_coverage: float = 0.9995
    """Share of the characters that get pieces of their own; the rest is written in bytes."""
    normalization: Literal["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"] = "nmt_nfkc"
    """Unicode normalisation."""
    max_sentences: int = 0
    """Lines to learn from, drawn at random; 0 takes all."""
    num_threads: int = 4
    """Threads of the trainer."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    print(f"training a {args.model_type} model of {args.vocab_size} pieces", flush=True)
    size = train_tokenizer(
        expand_inputs(args.input), args.output, args.vocab_size, args.model_type, args.json_keys,
        args.character_coverage, args.normalization, args.max_sentences, args.num_threads,
    )  # fmt: skip
    if size < args.vocab_size:
        print(f"the corpus is too small for {args.vocab_size} pieces: the vocabulary has {size}")
    print(f"wrote {args.output}: {size} pieces")


if __name__ == "__main__":
    run_tool(main)
