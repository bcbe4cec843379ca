"""Report of PerceiverFusion's tiny run: figures on held-out pictures beside the untrained model and a baseline.

    python -m examples.perceiver_fusion_xl.report --folder outputs/perceiver-fusion-tiny --seconds 400

Scores the newest checkpoint of FOLDER/run, and the model that the run began with, on FOLDER/data/heldout_*.jsonl: an
unseen vendor's emoji and unseen pictures of coloured shapes. Baselines: chance for retrieval and matching; for masked
tokens the trained model itself without the pictures (it has learned texts alone as well), or the commonest token where
that is more. Names of several words give a hidden one away, so what is required of masked tokens holds for all captions
together. Writes results.json; fails if a figure is not far enough above its baseline.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from examples.data.samples import sample, write_jsonl
from examples.held_out import Row, report, required
from megatron_mm.evaluation.objectives import score_objectives
from megatron_mm.evaluation.streams import GraphReader, reading_jsonl

RECALL = {"image_to_text": "R@1, image to text", "text_to_image": "R@1, text to image"}
GIVEN = {"pairs": "unseen vendor's emoji", "shapes": "unseen coloured shapes", "all": "both together"}


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
    """Fail if a figure is lower than it must be."""


class Scorer:
    """Figures of the objectives of two models on the held-out samples of a folder.

    Args:
        folder: output folder of tiny.sh.
        limit: at most this many samples of each kind; 0 takes all.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.data, self.tokenizer = folder / "data", folder / "tokenizer.model"
        self.trained, self.untrained = (GraphReader.from_path(folder / "run", kind) for kind in (True, False))
        self.samples = {kind: self._read(kind)[: limit or None] for kind in ("pairs", "shapes")}
        self.samples["all"] = [line for kind in ("pairs", "shapes") for line in self.samples[kind]]

    def _read(self, kind: str) -> list[dict]:
        lines = (self.data / f"heldout_{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        samples = [json.loads(line) for line in lines]
        random.Random(0).shuffle(samples)  # in order of code points, neighbours are of one kind
        return samples

    def figures(self, reader: GraphReader, samples: list[dict]) -> dict[str, float]:
        """Figures by `objective/figure` of one model."""
        scored = self.data / "scored.jsonl"  # beside the pictures, to which its paths are relative
        write_jsonl(scored, samples)
        try:
            with reading_jsonl(reader.config, scored, self.tokenizer) as config:
                return score_objectives(reader, config)
        finally:
            scored.unlink()

    def rows(self, kind: str) -> list[Row]:
        """Lines of the table for one kind of samples."""
        samples, given = self.samples[kind], GIVEN[kind]
        trained, untrained = (self.figures(reader, samples) for reader in (self.trained, self.untrained))
        blind = self.figures(self.trained, [sample(line["id"], line["text"]) for line in samples])

        def row(figure: str, key: str, baseline: float, promised: bool) -> Row:
            least = required(baseline) if promised else None
            return Row(given, figure, trained[key], untrained[key], baseline, least)

        rows = []
        if kind != "all":
            chances = {direction: trained[f"contrastive/{direction}/chance"] for direction in RECALL}
            rows += [row(RECALL[d], f"contrastive/{d}/recall_at_1", chance, True) for d, chance in chances.items()]
        guessed = max(blind["masked_lm/accuracy"], trained["masked_lm/majority"])
        rows.append(row("masked tokens", "masked_lm/accuracy", guessed, kind == "all"))
        rows.append(row("matching", "matching/accuracy", 0.5, kind == "all"))
        return rows


def main(arguments: Arguments) -> int:
    """Prints the table, writes results.json; 1 if a figure is too low and `require`."""
    torch.set_num_threads(os.cpu_count() or 1)
    scorer = Scorer(arguments.folder, arguments.limit)
    rows = [row for kind in GIVEN for row in scorer.rows(kind)]
    counts = {GIVEN[kind]: len(samples) for kind, samples in scorer.samples.items()}
    path = arguments.folder / "results.json"
    return report(rows, path, arguments.require, seconds=arguments.seconds, samples=counts)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
