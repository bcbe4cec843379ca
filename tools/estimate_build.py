"""Says how long a build will take and how large it will be, before it is begun: builds samples of the input for real.

    python tools/estimate_build.py text --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-model tokenizer.model --append-eod --workers 8
    python tools/estimate_build.py multimodal --input samples.jsonl --output data/emoji \\
        --tokenizer-model tokenizer.model --seconds 60

After `text` stand the arguments of tools/preprocess_data.py, after `multimodal` those of preprocess_multimodal.py.
Samples are spread evenly over .jsonl files; compressed files, tables and tars are read from their beginning, which the
report says. Lines that --drop would leave out count. Samples are built on the output's disk and removed. Exit status 1
if that disk has too little room.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import preprocess_data
import preprocess_multimodal
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.config.outputs import check_file, figures
from megatron_mm.config.plugins import load_plugins
from megatron_mm.data.build.estimate import Estimate, Figure, estimate, multimodal_build, text_build
from megatron_mm.data.corpus.text_input import expand_inputs
from megatron_mm.data.view.readable import readable_size, readable_time
from megatron_mm.platform.atomic_files import write_figures
from megatron_mm.platform.tool import run_tool


@dataclass
class Limits:
    """How long to look."""

    seconds: float = 20.0
    """To spend, about."""
    megabytes: float = 64.0
    """Most input lines to build, in MB."""
    json: str | None = None
    """Write the figures here."""


@dataclass
class Text(Limits, preprocess_data.Args):
    """A build of tools/preprocess_data.py."""


@dataclass
class Multimodal(Limits, preprocess_multimodal.Args):
    """A build of tools/preprocess_multimodal.py."""


def margin(figure: Figure) -> str:
    """As it stands after a figure."""
    if not figure.value or figure.margin == 0:
        return ""
    return " (margin not known)" if figure.margin is None else f" ± {figure.margin:.1%}"


def show(result: Estimate) -> None:
    """Prints an estimate."""
    files = "1 file" if result.files == 1 else f"{result.files} files"
    print(f"input        {readable_size(result.input_bytes)} in {files}")
    built = f"built        {result.share:.2%} of it in {result.spent_seconds:.1f} s"
    print(built + (f", as {result.samples} samples" if result.samples > 1 else ""))
    for note in result.notes:
        print(f"             {note}")
    for name, figure in result.counts.items():
        print(f"{name:12} {figure.value:,.0f}{margin(figure)}")
    for path, figure in result.outputs.items():
        print(f"file         {path}: {readable_size(figure.value)}{margin(figure)}")
    print(f"time         {readable_time(result.seconds.value)}{margin(result.seconds)} with {result.workers} workers")
    verdict = "enough" if result.fits else "TOO LITTLE"
    needed = f"{readable_size(result.disk_bytes.value)}{margin(result.disk_bytes)}"
    free = readable_size(result.free_bytes)
    print(f"disk         {needed} while it is built; {result.disk} has {free} free: {verdict}")


def main() -> int:
    args = tyro.cli(Text | Multimodal, description=__doc__)
    load_plugins(args.plugins)
    check_file(args.json, "--json", figures("input_bytes"))
    if isinstance(args, Text):
        build = text_build(
            args.output_prefix, args.tokenizer_model, args.json_keys, args.append_eod, args.workers,
            on_error=args.on_error, sentences=args.sentences(),
        )  # fmt: skip
    else:
        build = multimodal_build(
            args.output, args.tokenizer_model, args.media_root, args.workers, args.check,
            on_error=args.on_error, encoding=args.encoding,
        )  # fmt: skip
    result = estimate(expand_inputs(args.input), build, args.seconds, args.megabytes)
    show(result)
    write_figures(args.json, result.to_dict())
    return int(not result.fits)


if __name__ == "__main__":
    run_tool(main)
