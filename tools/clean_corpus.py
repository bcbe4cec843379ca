"""Finds what to leave out of a corpus: duplicates, and records that break rules of quality and safety.

    python tools/clean_corpus.py --input 'crawl/*.jsonl.gz' --output data/clean --text.gopher --blocklist words.txt
    python tools/preprocess_data.py --input 'crawl/*.jsonl.gz' --drop data/clean ...

The corpus stays as it is; the folder says which lines to drop, and preprocess_data.py and preprocess_multimodal.py
leave them out. In it, report.md has counts by reason with samples, dropped.jsonl a line a dropped record. Inputs are
read as by the builders, all together: of equal records the first is kept, whatever file it is in.

By default equal records, texts that are equal to 80% (of records without media) and records that have the images of an
earlier one, and its prompt, are dropped. Every rule is off until it has a threshold. Scores of a classifier are fields:
--field-below nsfw 0.5 --field-above aesthetic 4.5 --field-equals language en. A rule of your own is a function
keep(record) or keep(record, media) that returns None or True, or a reason to drop: --predicate rules.py:keep. It gets
the record's fields, and its media decoded when asked: media.images, media.sounds, media.frames(4).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.data.cleaning.clean_corpus import clean_corpus
from megatron_mm.data.cleaning.duplicates import DuplicateRules
from megatron_mm.data.cleaning.field_rules import FieldRules
from megatron_mm.data.cleaning.media_rules import ImageRules, SoundRules, VideoRules
from megatron_mm.data.cleaning.report import markdown
from megatron_mm.data.cleaning.scan import Rules
from megatron_mm.data.cleaning.text_rules import TextRules
from megatron_mm.data.corpus.text_input import expand_inputs
from megatron_mm.platform.tool import run_tool


@dataclass
class Args:
    """Find duplicates and what breaks rules in a corpus."""

    input: list[str]
    """Files (.jsonl .csv .tsv .parquet .arrow .tar, .gz .zst), folders of them, globs."""
    output: str
    """Folder to make; it appears only when it is complete."""
    text_keys: tuple[str, ...] = ("text",)
    """Text fields; every record must have all of them, "prompt" only if it is there."""
    media_root: str | None = None
    """Folder of the media; by default that of the input file."""
    duplicates: DuplicateRules = field(default_factory=DuplicateRules)
    text: TextRules = field(default_factory=TextRules)
    images: ImageRules = field(default_factory=ImageRules)
    audios: SoundRules = field(default_factory=SoundRules)
    videos: VideoRules = field(default_factory=VideoRules)
    field_below: tuple[tuple[str, float], ...] = ()
    """FIELD LIMIT: keep records whose number in the field is smaller."""
    field_above: tuple[tuple[str, float], ...] = ()
    """FIELD LIMIT: keep records whose number in the field is larger."""
    field_equals: tuple[tuple[str, str], ...] = ()
    """FIELD VALUE: keep records that have this; several values of one field are alternatives."""
    blocklist: str | None = None
    """File of words and phrases, one a line; *part* is found inside of words too."""
    predicate: str | None = None
    """Your own rule, module:function or file.py:function."""
    check: bool = True
    """Decode every medium once; what does not decode is unreadable."""
    on_error: Literal["stop", "drop"] = "stop"
    """Unreadable records end the run, or are dropped and reported."""
    workers: int = 2
    """Worker processes; 0 works in this one. The result does not depend on it."""
    overwrite: bool = False
    """Replace an existing output."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    rules = Rules(
        text=args.text,
        images=args.images,
        audios=args.audios,
        videos=args.videos,
        fields=FieldRules(args.field_below, args.field_above, args.field_equals),
        blocklist=args.blocklist,
        predicate=args.predicate,
        check=args.check,
        on_error=args.on_error,
    )
    report = clean_corpus(
        expand_inputs(args.input), args.output, args.text_keys, args.media_root, rules, args.duplicates, args.workers,
        args.overwrite,
    )  # fmt: skip
    print(markdown(report), end="")
    print(f"wrote {args.output}: pass it to the builders as --drop {args.output}")


if __name__ == "__main__":
    run_tool(main)
