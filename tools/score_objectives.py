"""Scores a training checkpoint on held-out samples, by every objective of its system, beside the untrained model.

    python tools/score_objectives.py --checkpoint outputs/run --input heldout.jsonl --untrained

Recall@K of the contrastive embeddings, accuracy of masked tokens and of matching, the loss of masked patches: whatever
the system learns (megatron_mm/evaluation/objectives.py says what is measured). The checkpoint may be of any layout; it
is read into this one process. Captions and answers are tools/evaluate.py's.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.config.outputs import check_file, figures
from megatron_mm.platform.atomic_files import write_figures
from megatron_mm.platform.tool import run_tool


@dataclass
class Arguments:
    """Which checkpoint, on which samples."""

    checkpoint: Path
    """Checkpoint, folder of checkpoints, or output folder of a run."""
    input: Path | None = None
    """JSONL of samples, as tools/preprocess_multimodal.py reads it; default: the samples by which the run validates."""
    media_root: Path | None = None
    """Folder to which paths in the JSONL are relative; default: the JSONL's."""
    untrained: bool = False
    """Also score the same model as it was before training."""
    limit: int = 0
    """At most this many samples; 0 takes all (of a run's own: those of training.eval_iters global batches)."""
    batch_size: int = 64
    """Samples handled at once; hard negatives are chosen among them."""
    tokenizer: Path | None = None
    """File of a tokenizer of any kind (docs/data.md); default: the checkpoint's."""
    json: Path | None = None
    """File for the figures: {"trained": {…}, "untrained": {…}}."""
    plugins: list[str] = field(default_factory=list)
    """Files or modules with a system or a dataset of your own, imported first; a checkpoint names them and loads
    none."""


def run(arguments: Arguments) -> dict[str, dict[str, float]]:
    """Figures of each model, by `objective/figure`."""
    check_file(arguments.json, "--json", figures("trained"))
    import torch

    from megatron_mm.config.plugins import load_plugins
    from megatron_mm.conversion.convert import find_checkpoint, tokenizer_of
    from megatron_mm.evaluation.objectives import score_objectives
    from megatron_mm.evaluation.streams import GraphReader, reading_jsonl, validation_rows

    torch.set_num_threads(os.cpu_count() or 1)
    load_plugins(arguments.plugins)
    results = {}
    for model in ("trained", "untrained") if arguments.untrained else ("trained",):
        reader = GraphReader.from_path(
            arguments.checkpoint, trained=model == "trained", reads_data=arguments.input is None
        )
        if arguments.input is None:
            limits = (arguments.batch_size, arguments.limit)
            results[model] = score_objectives(reader, reader.config, *limits, rows=validation_rows)
            continue
        if reader.config.data.builder and arguments.tokenizer is None:
            raise ValueError(
                f"{arguments.checkpoint}: its samples are made by data.builder {reader.config.data.builder}; leave "
                "--input out to score those by which it validates, or name a --tokenizer that reads the JSONL"
            )
        tokenizer = arguments.tokenizer or tokenizer_of(reader.config, find_checkpoint(arguments.checkpoint))
        if tokenizer is None:
            raise ValueError(f"{arguments.checkpoint}: holds no tokenizer; name one with --tokenizer")
        with reading_jsonl(reader.config, arguments.input, tokenizer, arguments.media_root) as config:
            results[model] = score_objectives(reader, config, arguments.batch_size, arguments.limit)
    write_figures(arguments.json, results)
    return results


def print_table(results: dict[str, dict[str, float]]) -> None:
    """One line a figure, one column a model."""
    names = list(results["trained"])
    width = max(map(len, names))
    print(f"{'figure':<{width}}" + "".join(f"{model:>12}" for model in results))
    for name in names:
        print(f"{name:<{width}}" + "".join(f"{figures[name]:>12.4g}" for figures in results.values()))


def main() -> None:
    """Scores and prints the table."""
    print_table(run(tyro.cli(Arguments, description=__doc__)))


if __name__ == "__main__":
    run_tool(main, left="")
