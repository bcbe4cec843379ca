"""Tokenises text into Megatron's .bin/.idx, with Megatron's flag names and byte for byte its output.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-model tokenizer.model --append-eod --workers 8

Input is JSONL, CSV or TSV (the header names the fields), Parquet, a folder of Hugging Face's save_to_disk, or a
WebDataset tar (.txt members are "text"); all but Parquet and save_to_disk also as .gz and .zst. The shard is
data/corpus_text_document.bin and .idx: name `data/corpus_text_document` as a dataset's path.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.config.plugins import load_plugins
from megatron_mm.data.build.text import Sentences, build_text
from megatron_mm.data.corpus.text_input import expand_inputs
from megatron_mm.data.jobs.skipped import OnError
from megatron_mm.data.tokens.sentences import MAX_CHARACTERS
from megatron_mm.platform.tool import run_tool


@dataclass
class Args:
    """Tokenise text into Megatron's .bin/.idx."""

    input: list[str]
    """Files (.jsonl .csv .tsv .parquet .arrow .tar, .gz .zst), folders of them, globs."""
    output_prefix: str
    """Shards are named PREFIX_KEY_document.bin and .idx."""
    tokenizer_model: str
    """File of the tokenizer: a SentencePiece model, or another kind (docs/data.md)."""
    tokenizer_type: Literal["SentencePieceTokenizer", "GPTSentencePieceTokenizer"] = "GPTSentencePieceTokenizer"
    """For Megatron's scripts: it changes nothing, because the file says of which kind it is."""
    json_keys: tuple[str, ...] = ("text",)
    """Text fields; every record must have all of them."""
    append_eod: bool = False
    """End each document with </s>."""
    workers: int = 2
    """Worker processes; 0 works in this one. The result does not depend on it."""
    log_interval: int = 1000
    """Documents between refreshes of the rate."""
    split_sentences: bool = False
    """Split documents into sentences with nltk, a million characters at a time; shards are then named
    PREFIX_KEY_sentence."""
    lang: str = "english"
    """Language of nltk's sentence model."""
    keep_newlines: bool = False
    """Sentences keep the spaces and line ends that follow them."""
    nltk_data: str | None = None
    """Folder with nltk's tokenizers/punkt_tab, unless it is in one of nltk's own places."""
    drop: str | None = None
    """Folder of tools/clean_corpus.py: leave out the lines that it names."""
    overwrite: bool = False
    """Replace existing shards."""
    on_error: OnError = "stop"
    """skip: leave out lines that cannot be used, and list them in PREFIX_skipped.jsonl; stop: end with the first."""
    plugins: tuple[str, ...] = ()
    """Python files or modules that register kinds of tokenizers (docs/data.md)."""

    def sentences(self) -> Sentences | None:
        """How documents are split, if they are."""
        return Sentences(self.lang, self.keep_newlines, self.nltk_data) if self.split_sentences else None


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    load_plugins(args.plugins)
    report = build_text(
        expand_inputs(args.input), args.output_prefix, args.tokenizer_model, args.json_keys, args.append_eod,
        args.workers, args.overwrite, args.log_interval, drop=args.drop,
        on_error=args.on_error, sentences=args.sentences(),
    )  # fmt: skip
    for prefix, figures in report.items():
        rate = figures["tokens"] / figures["seconds"] / 1e6
        counts = f"{figures['documents']} documents, {figures['tokens']} tokens"
        print(f"wrote {prefix}.bin, .idx: {counts}, {rate:.2f} Mtok/s")
        if cut := figures.get("cut"):
            print(f"cut {cut} documents into pieces of {MAX_CHARACTERS:,} characters: a sentence across a cut is two")
    if skipped := next(iter(report.values())).get("skipped"):
        print(f"left out {skipped} lines; {args.output_prefix}_skipped.jsonl lists them with their causes")


if __name__ == "__main__":
    run_tool(main)
