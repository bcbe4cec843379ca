"""Turns samples with images, sounds and videos into a dataset folder that trains.

    python tools/preprocess_multimodal.py --input samples.jsonl --tokenizer-model tokenizer.model --output data/emoji

A line: {"id": "7", "prompt": "<image> What is this?", "text": " A cat.", "images": ["cat.png"]}. `text` is learned,
`prompt` (optional) is not; there is one <image>, <audio> or <video> for each file of "images", "audios", "videos", in
order; paths are relative to the input file or to --media-root. {"base64": "..."} in place of a path is a file's bytes.

Tables have these fields as columns: CSV and TSV with a header, "images" being paths with ; between them; Parquet and
folders of Hugging Face's save_to_disk, whose image or audio columns are read too. In a WebDataset tar, the members of a
sample have its name: .txt or .caption is "text", .json further fields, images, sounds and videos its media. Tables and
tars may leave the placeholders out: they are put before the prompt then. All but Parquet and save_to_disk may be .gz or
.zst. A line is at most 256 MiB, so media inside the input are at most 192 MiB a sample; longer ones need paths.

Media are stored as they are, or smaller and quicker to read (megatron_mm/media/encoding.py):

    python tools/preprocess_multimodal.py --input samples.jsonl --tokenizer-model tokenizer.model --output data/small \\
        --image-encoding webp --image-size 448 --audio-encoding flac --video-encoding frames --video-frames 8
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.config.plugins import load_plugins
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.corpus.text_input import expand_inputs
from megatron_mm.data.jobs.skipped import OnError
from megatron_mm.media.encoding import KEEP, Encoding
from megatron_mm.platform.tool import run_tool


@dataclass
class Args:
    """Build a multimodal dataset folder."""

    input: list[str]
    """Files (.jsonl .csv .tsv .parquet .arrow .tar, .gz .zst), folders of them, globs."""
    output: str
    """Folder to make; it appears only when it is complete."""
    tokenizer_model: str
    """File of the tokenizer: a SentencePiece model, or another kind (docs/data.md)."""
    media_root: str | None = None
    """Folder of the media; by default that of the input file."""
    workers: int = 2
    """Worker processes; 0 works in this one. The result does not depend on it."""
    check: bool = True
    """Decode every medium once; --no-check stores the bytes unseen."""
    drop: str | None = None
    """Folder of tools/clean_corpus.py: leave out the lines that it names."""
    overwrite: bool = False
    """Replace an existing output."""
    on_error: OnError = "stop"
    """skip: leave out samples that cannot be used, and list them in OUTPUT/skipped.jsonl; stop: end with the first."""
    plugins: tuple[str, ...] = ()
    """Python files or modules that register kinds of tokenizers (docs/data.md)."""
    encoding: Annotated[Encoding, tyro.conf.OmitArgPrefixes] = KEEP


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    load_plugins(args.plugins)
    manifest = build_multimodal(
        expand_inputs(args.input), args.output, args.tokenizer_model, args.media_root, args.workers, args.check,
        args.overwrite, encoding=args.encoding, on_error=args.on_error, drop=args.drop,
    )  # fmt: skip
    print(f"wrote {args.output}: " + ", ".join(f"{value} {name}" for name, value in manifest["counts"].items()))
    if skipped := manifest["counts"].get("skipped"):
        print(f"left out {skipped} samples; {args.output}/skipped.jsonl lists them with their causes")


if __name__ == "__main__":
    run_tool(main)
