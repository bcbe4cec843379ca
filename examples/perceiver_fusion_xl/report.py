"""Report of PerceiverFusion's tiny run: figures on held-out pictures beside the untrained model and a baseline.

    python -m examples.perceiver_fusion_xl.report --folder outputs/perceiver-fusion-tiny --seconds 400

Scores the newest checkpoint of FOLDER/run, and the model that the run began with, on FOLDER/data/heldout_*.jsonl: an
unseen vendor's emoji and unseen pictures of coloured shapes. Baselines are chance (for masked tokens: the commonest)
and, for masked tokens, the trained model itself without the pictures; it has learned texts alone as well. What is left
of a name often gives its hidden word away, so that second baseline is a demand on the shapes only. Matching is scored
on wrong pairs at random, which is the demand, and on hard ones. Writes results.json; fails if a figure is too low.
"""

from __future__ import annotations

import random
import sys

import tyro

from examples.data.samples import sample
from examples.held_out import Row, report, required
from examples.scorer import Arguments, Scorer
from megatron_mm.evaluation.streams import GraphReader

RECALL = {"image_to_text": "R@1, image to text", "text_to_image": "R@1, text to image"}
GIVEN = {"pairs": "unseen vendor's emoji", "shapes": "unseen coloured shapes"}
BOTH = "both together"
HARD_BATCH = 64  # samples among which wrong pairs are chosen; of two, it is the other one
RANDOM_PAIRS = 128  # samples of each kind that are scored two at a time


class Figures:
    """Rows of the table for a run's two models.

    Args:
        arguments: which run, and at most how many samples of each kind.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.scorer = Scorer(arguments.folder)
        self.trained, self.untrained = self.scorer.models("run")
        self.samples = {kind: self._read(kind)[: arguments.limit or None] for kind in GIVEN}

    def _read(self, kind: str) -> list[dict]:
        samples = self.scorer.read(f"heldout_{kind}")
        random.Random(0).shuffle(samples)  # in order of code points, neighbours are of one kind
        return samples

    def of(self, reader: GraphReader, samples: list[dict], batch_size: int = HARD_BATCH) -> dict[str, float]:
        """Figures by `objective/figure` of one model."""
        return self.scorer.objectives(reader, samples, batch_size)

    def rows(self, kind: str) -> list[Row]:
        """Lines of the table for one kind of samples."""
        samples, given = self.samples[kind], GIVEN[kind]
        trained, untrained = (self.of(reader, samples) for reader in (self.trained, self.untrained))
        blind = self.of(self.trained, [sample(line["id"], line["text"]) for line in samples])["masked_lm/accuracy"]

        def row(figure: str, key: str, baseline: float, promised: bool = True) -> Row:
            least = required(baseline, len(samples)) if promised else None
            return Row(given, figure, trained[key], untrained[key], baseline, least)

        found, commonest = "masked_lm/accuracy", trained["masked_lm/majority"]
        return [
            *(row(RECALL[d], f"contrastive/{d}/recall_at_1", trained[f"contrastive/{d}/chance"]) for d in RECALL),
            row("masked tokens", found, commonest),
            row("masked, against blind", found, max(blind, commonest), kind == "shapes"),
            row("matching, hard", "matching/accuracy", 0.5, promised=False),
        ]

    def matching(self) -> Row:
        """Matching of pairs of which the wrong ones are random, of both kinds of samples."""
        samples = [line for kind in GIVEN for line in self.samples[kind][:RANDOM_PAIRS]]
        scores = [self.of(reader, samples, 2)["matching/accuracy"] for reader in (self.trained, self.untrained)]
        return Row(BOTH, "matching, random", *scores, 0.5, required(0.5, len(samples)))


def main(arguments: Arguments) -> int:
    """Prints the table, writes results.json; 1 if a figure is too low and `require`."""
    figures = Figures(arguments)
    rows = [*(row for kind in GIVEN for row in figures.rows(kind)), figures.matching()]
    counts = {GIVEN[kind]: len(samples) for kind, samples in figures.samples.items()}
    return report(rows, arguments.results, arguments.require, seconds=arguments.seconds, samples=counts)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
