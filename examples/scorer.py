"""What the reports of the tiny runs share: their command line, and how a run's models do its held-out samples.

    FOLDER/data/heldout_*.jsonl ─ Scorer ─ figures of the objectives, generated texts ─ rows of a table (held_out.py)

A report (avt_33b/report.py, perceiver_fusion_xl/report.py, two_phases.py) chooses samples, figures and baselines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mm.evaluation.greedy import greedy_captions
from megatron_mm.evaluation.objectives import score_objectives
from megatron_mm.evaluation.streams import GraphReader, reading_samples


@dataclass
class Arguments:
    """Scores a run."""

    folder: Path
    """Output folder of tiny.sh."""
    seconds: float
    """Wall time so far."""
    limit: int = 0
    """At most this many held-out samples of each kind; 0 takes all."""
    require: bool = True
    """Fail if a figure is worse than it must be."""

    @property
    def results(self) -> Path:
        """File of the figures."""
        return self.folder / "results.json"


class Scorer:
    """Reads the samples of a run's folder and lets its models do them, on every processor of this machine.

    Args:
        folder: output folder of tiny.sh.
    """

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self.folder, self.data, self.tokenizer = folder, folder / "data", folder / "tokenizer.model"

    def read(self, name: str) -> list[dict]:
        """All samples of a file of the data."""
        lines = (self.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def models(self, run: str) -> tuple[GraphReader, GraphReader]:
        """The newest model that a run trained, and what it began with."""
        trained, untrained = (GraphReader.from_path(self.folder / run, kind) for kind in (True, False))
        return trained, untrained

    def objectives(self, reader: GraphReader, samples: Sequence[dict], batch_size: int = 64) -> dict[str, float]:
        """Figures by `objective/figure`; hard negatives are chosen within a batch."""
        with reading_samples(reader.config, samples, self.tokenizer, self.data) as config:
            return score_objectives(reader, config, batch_size)

    def texts(self, reader: GraphReader, samples: Sequence[dict], task: str = "") -> list[str]:
        """What a model says after the prompt and media of each sample, its decoder as in `task`."""
        with reading_samples(reader.config, samples, self.tokenizer, self.data) as config:
            return greedy_captions(reader, config, task, batch_size=128)


def generated(samples: Sequence[dict], texts: Sequence[str]) -> list[dict[str, str]]:
    """What was said of each sample, beside the truth."""
    return [{"id": s["id"], "generated": text, "reference": s["text"]} for s, text in zip(samples, texts)]


def print_generated(lines: Sequence[dict[str, str]], count: int) -> None:
    """About so many of them, evenly taken."""
    width = 4 + max(len(line["id"]) for line in lines)
    print(f"{'held out':<{width}}{'generated':<26}truth")
    for line in lines[:: max(1, len(lines) // count)]:
        print(f"{line['id']:<{width}}{line['generated']:<26}{line['reference']}")
    print()
