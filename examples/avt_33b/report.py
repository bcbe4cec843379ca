"""Report of AVT's tiny run: figures on held-out pairs beside the untrained model and a baseline; results.json.

    python -m examples.avt_33b.report --folder outputs/avt-tiny --seconds 400

Scores the newest checkpoint of FOLDER/run, and the model that the run began with, on FOLDER/data/heldout_*.jsonl:
unseen clips with an unseen voice, and each alone. Baselines: chance for retrieval; for text the trained model itself,
blind and deaf. Fails if a figure is not far enough above its baseline.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from examples.held_out import Row, report, required, required_cider
from megatron_mm.evaluation.captions import score_captions
from megatron_mm.evaluation.greedy import greedy_captions
from megatron_mm.evaluation.objectives import score_objectives
from megatron_mm.evaluation.streams import GraphReader, reading_jsonl

CAPTIONED = {"pairs": "clip and sound", "clips": "clip alone", "sounds": "sound alone"}
RECALL = {"vision_to_audio": "clip to sound", "audio_to_vision": "sound to clip"}


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
    """Scores models on the held-out samples of a folder.

    Args:
        folder: output folder of tiny.sh.
        limit: at most this many samples of each kind; 0 takes all.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.data, self.tokenizer, self.limit = folder / "data", folder / "tokenizer.model", limit

    def references(self, kind: str) -> list[dict]:
        """The samples."""
        lines = (self.data / f"heldout_{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines][: self.limit or None]

    def objectives(self, reader: GraphReader, kind: str) -> dict[str, float]:
        """Figures of the objectives."""
        with reading_jsonl(reader.config, self.data / f"heldout_{kind}.jsonl", self.tokenizer) as config:
            return score_objectives(reader, config, limit=self.limit)

    def captions(self, reader: GraphReader, kind: str) -> tuple[list[str], dict[str, float]]:
        """Generated captions, and their scores."""
        with reading_jsonl(reader.config, self.data / f"heldout_{kind}.jsonl", self.tokenizer) as config:
            captions = greedy_captions(reader, config, "generation", limit=self.limit)
        scores = asdict(score_captions(captions, [[line["text"]] for line in self.references(kind)]))
        return captions, {"exact match": scores["exact_match"], "CIDEr-D": scores["cider"]}


def score(folder: Path, limit: int) -> tuple[list[Row], list[dict]]:
    """Every line of the table, and the trained model's captions of each kind of sample."""
    scorer = Scorer(folder, limit)
    pairs = scorer.references("pairs")
    trained, untrained = (GraphReader.from_path(folder / "run", kind) for kind in (True, False))
    learned, initial = (scorer.objectives(reader, "pairs") for reader in (trained, untrained))
    rows = []
    for key, given in RECALL.items():
        chance = learned[f"contrastive/{key}/chance"]
        values = (figures[f"contrastive/{key}/recall_at_1"] for figures in (learned, initial))
        # Not required: so short a run learns its training clips by heart. Three seeds were at chance, 0.009 to 0.027.
        rows.append(Row(given, "R@1", *values, chance))
    _, blind = scorer.captions(trained, "names")
    generated = []
    for kind, given in CAPTIONED.items():
        captions, scores = scorer.captions(trained, kind)
        _, scores_before = scorer.captions(untrained, kind)
        for figure, value in scores.items():
            # One caption for all is right at most as often as the commonest name: all are different.
            baseline = max(blind[figure], 1 / len(pairs)) if figure == "exact match" else blind[figure]
            least = required(baseline, len(captions)) if figure == "exact match" else required_cider(baseline)
            rows.append(Row(given, figure, value, scores_before[figure], baseline, least))
        generated += [
            {"id": line["id"], "generated": caption, "reference": line["text"]}
            for line, caption in zip(scorer.references(kind), captions)
        ]
    guessed = scorer.objectives(trained, "names")
    baseline = max(guessed["masked_lm/accuracy"], learned["masked_lm/majority"])
    values = (figures["masked_lm/accuracy"] for figures in (learned, initial))
    rows.append(Row(CAPTIONED["pairs"], "masked tokens", *values, baseline, required(baseline, len(pairs))))
    return rows, generated


def main(arguments: Arguments) -> int:
    """Prints captions and table, writes results.json; 1 if a figure is too low and `require`."""
    rows, generated = score(arguments.folder, arguments.limit)
    print(f"{'held out':<34}{'generated':<26}truth")
    for caption in generated[:: max(1, len(generated) // 9)]:
        print(f"{caption['id']:<34}{caption['generated']:<26}{caption['reference']}")
    print()
    path = arguments.folder / "results.json"
    return report(rows, path, arguments.require, seconds=arguments.seconds, captions=generated)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
