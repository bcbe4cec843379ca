"""Report of the tiny runs with two phases: figures on unseen pictures beside the untrained model and a baseline.

    python -m examples.two_phases --folder outputs/vlm-tiny --seconds 400

Scores the newest checkpoints of FOLDER/mae and FOLDER/run, and the models that those runs began with, on
FOLDER/data/heldout_*.jsonl. Baselines: each patch's mean for masked autoencoding; chance for retrieval; for names the
trained model itself without the picture, or the commonest name where that is more; for answers, the one most often
given to the same question in training. Writes results.json; fails if a figure is not far enough beyond its baseline.
"""

from __future__ import annotations

import sys

import tyro

from examples.data.easy_vqa import COLOURS, SHAPES
from examples.data.samples import sample
from examples.held_out import Row, report, required, required_cider
from examples.scorer import Arguments, Scorer, generated, print_generated
from megatron_mm.evaluation.captions import score_captions
from megatron_mm.evaluation.vqa import BlindBaseline, vqa_accuracy

ART, QUESTIONS = "unseen vendor's art", "unseen shapes"
RECALL = {"image_to_text": "R@1, image to name", "text_to_image": "R@1, name to image"}


def tower_rows(scorer: Scorer, pairs: list[dict]) -> list[Row]:
    """Phase 1: masked autoencoding."""
    learned, initial = (scorer.objectives(model, pairs) for model in scorer.models("mae"))
    mean = learned["mae/loss_of_mean"]
    return [Row(ART, "MAE loss", learned["mae/loss"], initial["mae/loss"], mean, mean, lower=True)]


def joint_rows(scorer: Scorer, pairs: list[dict], questions: list[dict]) -> tuple[list[Row], list[dict]]:
    """Phase 2: retrieval, names and answers; and what the trained model said of each sample."""
    trained, untrained = scorer.models("run")
    learned, initial = (scorer.objectives(model, pairs) for model in (trained, untrained))
    rows = []
    for direction, figure in RECALL.items():
        chance = learned[f"contrastive/{direction}/chance"]
        values = (figures[f"contrastive/{direction}/recall_at_1"] for figures in (learned, initial))
        rows.append(Row(ART, figure, *values, chance, required(chance, len(pairs))))

    references = [[line["text"]] for line in pairs]
    unseen = [sample(line["id"], line["text"]) for line in pairs]
    said = scorer.texts(trained, pairs)
    scores, before, blind = (
        score_captions(texts, references)
        for texts in (said, scorer.texts(untrained, pairs), scorer.texts(trained, unseen))
    )
    commonest = max(references.count(texts) for texts in references) / len(references)
    guessed = max(blind.exact_match, commonest)
    least = required(guessed, len(pairs))
    rows.append(Row(ART, "name, exact match", scores.exact_match, before.exact_match, guessed, least))
    rows.append(Row(ART, "name, CIDEr-D", scores.cider, before.cider, blind.cider, required_cider(blind.cider)))

    guess = BlindBaseline((_question(line), line["text"]) for line in scorer.read("questions"))
    answers, first = (scorer.texts(model, questions) for model in (trained, untrained))
    for kind, figure in (("", "VQA accuracy"), ("what", "VQA, what is it"), ("is", "VQA, yes or no")):
        chosen = [i for i, line in enumerate(questions) if not kind or _kind(line) == kind]
        truth = [[questions[i]["text"]] for i in chosen]
        if chosen:
            values = (vqa_accuracy([texts[i] for i in chosen], truth) for texts in (answers, first))
            blindly = guess.accuracy([_question(questions[i]) for i in chosen], truth)
            rows.append(Row(QUESTIONS, figure, *values, blindly, None if kind else required(blindly, len(chosen))))
    return rows, generated(pairs + questions, said + answers)


def _question(line: dict) -> str:
    return line["prompt"].removeprefix("<image>")


def _kind(line: dict) -> str:
    return "what" if line["text"] in (*COLOURS, *SHAPES) else "is"


def main(arguments: Arguments) -> int:
    """Prints samples and table, writes results.json; 1 if a figure is too bad and `require`."""
    scorer = Scorer(arguments.folder)
    pairs, questions = (scorer.read(f"heldout_{kind}")[: arguments.limit or None] for kind in ("pairs", "questions"))
    rows = tower_rows(scorer, pairs)
    joint, said = joint_rows(scorer, pairs, questions)
    print_generated(said, 12)
    more = {"seconds": arguments.seconds, "generated": said}
    return report([*rows, *joint], arguments.results, arguments.require, **more)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
