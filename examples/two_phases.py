"""Report of the tiny runs with two phases: figures on unseen pictures beside the untrained model and a baseline.

    python -m examples.two_phases --folder outputs/vlm-tiny --seconds 400

Scores the newest checkpoints of FOLDER/mae and FOLDER/run, and the models that those runs began with, on
FOLDER/data/heldout_*.jsonl. Baselines: each patch's mean for masked autoencoding; chance for retrieval; for names the
trained model itself without the picture, or the commonest name where that is more; for answers, the one most often
given to the same question in training. Writes results.json; fails if a figure is not far enough beyond its baseline.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from examples.data.easy_vqa import COLOURS, SHAPES
from examples.data.samples import sample
from examples.held_out import Row, report, required, required_cider
from megatron_mm.evaluation.captions import score_captions
from megatron_mm.evaluation.greedy import greedy_captions
from megatron_mm.evaluation.objectives import score_objectives
from megatron_mm.evaluation.streams import GraphReader, reading_samples
from megatron_mm.evaluation.vqa import BlindBaseline, vqa_accuracy

ART, QUESTIONS = "unseen vendor's art", "unseen shapes"
RECALL = {"image_to_text": "R@1, image to name", "text_to_image": "R@1, name to image"}


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


class Scorer:
    """Reads the held-out samples of a folder and lets models do them.

    Args:
        folder: output folder of tiny.sh.
        limit: at most this many samples of each kind; 0 takes all.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.data, self.tokenizer = folder, folder / "data", folder / "tokenizer.model"
        self.pairs, self.questions = (self.read(f"heldout_{kind}")[: limit or None] for kind in ("pairs", "questions"))

    def read(self, name: str) -> list[dict]:
        """Samples of a file of the data."""
        return [json.loads(line) for line in (self.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    def models(self, run: str) -> tuple[GraphReader, GraphReader]:
        """The model that a run trained, and what it began with."""
        trained, untrained = (GraphReader.from_path(self.folder / run, kind) for kind in (True, False))
        return trained, untrained

    def objectives(self, reader: GraphReader, samples: list[dict]) -> dict[str, float]:
        """Figures by `objective/figure`."""
        with reading_samples(reader.config, samples, self.tokenizer, self.data) as config:
            return score_objectives(reader, config)

    def texts(self, reader: GraphReader, samples: list[dict]) -> list[str]:
        """What a model says after each prompt."""
        with reading_samples(reader.config, samples, self.tokenizer, self.data) as config:
            return greedy_captions(reader, config, batch_size=128)


def tower_rows(scorer: Scorer) -> list[Row]:
    """Phase 1: masked autoencoding."""
    learned, initial = (scorer.objectives(model, scorer.pairs) for model in scorer.models("mae"))
    mean = learned["mae/loss_of_mean"]
    return [Row(ART, "MAE loss", learned["mae/loss"], initial["mae/loss"], mean, mean, lower=True)]


def joint_rows(scorer: Scorer) -> tuple[list[Row], list[dict]]:
    """Phase 2: retrieval, names and answers; and what the trained model said of each sample."""
    trained, untrained = scorer.models("run")
    learned, initial = (scorer.objectives(model, scorer.pairs) for model in (trained, untrained))
    rows = []
    for direction, figure in RECALL.items():
        chance = learned[f"contrastive/{direction}/chance"]
        values = (figures[f"contrastive/{direction}/recall_at_1"] for figures in (learned, initial))
        rows.append(Row(ART, figure, *values, chance, required(chance, len(scorer.pairs))))

    references = [[line["text"]] for line in scorer.pairs]
    unseen = [sample(line["id"], line["text"]) for line in scorer.pairs]
    said = scorer.texts(trained, scorer.pairs)
    scores, before, blind = (
        score_captions(texts, references)
        for texts in (said, scorer.texts(untrained, scorer.pairs), scorer.texts(trained, unseen))
    )
    commonest = max(references.count(texts) for texts in references) / len(references)
    guessed = max(blind.exact_match, commonest)
    least = required(guessed, len(scorer.pairs))
    rows.append(Row(ART, "name, exact match", scores.exact_match, before.exact_match, guessed, least))
    rows.append(Row(ART, "name, CIDEr-D", scores.cider, before.cider, blind.cider, required_cider(blind.cider)))

    guess = BlindBaseline((_question(line), line["text"]) for line in scorer.read("questions"))
    answers, first = (scorer.texts(model, scorer.questions) for model in (trained, untrained))
    for kind, figure in (("", "VQA accuracy"), ("what", "VQA, what is it"), ("is", "VQA, yes or no")):
        chosen = [i for i, line in enumerate(scorer.questions) if not kind or _kind(line) == kind]
        truth = [[scorer.questions[i]["text"]] for i in chosen]
        if chosen:
            values = (vqa_accuracy([texts[i] for i in chosen], truth) for texts in (answers, first))
            blindly = guess.accuracy([_question(scorer.questions[i]) for i in chosen], truth)
            rows.append(Row(QUESTIONS, figure, *values, blindly, None if kind else required(blindly, len(chosen))))
    lines = list(zip(scorer.pairs + scorer.questions, said + answers))
    return rows, [{"id": line["id"], "generated": text, "reference": line["text"]} for line, text in lines]


def _question(line: dict) -> str:
    return line["prompt"].removeprefix("<image>")


def _kind(line: dict) -> str:
    return "what" if line["text"] in (*COLOURS, *SHAPES) else "is"


def main(arguments: Arguments) -> int:
    """Prints samples and table, writes results.json; 1 if a figure is too bad and `require`."""
    torch.set_num_threads(os.cpu_count() or 1)
    scorer = Scorer(arguments.folder, arguments.limit)
    rows = tower_rows(scorer)
    joint, generated = joint_rows(scorer)
    print(f"{'held out':<30}{'generated':<26}truth")
    for line in generated[:: max(1, len(generated) // 12)]:
        print(f"{line['id']:<30}{line['generated']:<26}{line['reference']}")
    print()
    path, more = arguments.folder / "results.json", {"seconds": arguments.seconds, "generated": generated}
    return report([*rows, *joint], path, arguments.require, **more)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
