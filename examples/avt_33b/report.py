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

from examples.data.samples import sample, write_jsonl
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


@dataclass
class Row:
    """A line of the table."""

    given: str
    figure: str
    trained: float
    untrained: float
    baseline: float
    required: float


def required(baseline: float) -> float:
    """Three times the baseline, or half its error where that would be more than 0.9."""
    return 3 * baseline if baseline <= 0.3 else 1 - (1 - baseline) / 2


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
    write_jsonl(scorer.data / "heldout_blind.jsonl", [sample(line["id"], line["text"]) for line in pairs])
    trained, untrained = (GraphReader.from_path(folder / "run", kind) for kind in (True, False))
    learned, initial = (scorer.objectives(reader, "pairs") for reader in (trained, untrained))
    rows = []
    for key, given in RECALL.items():
        chance = learned[f"contrastive/{key}/chance"]
        values = (figures[f"contrastive/{key}/recall_at_1"] for figures in (learned, initial))
        rows.append(Row(given, "R@1", *values, chance, required(chance)))
    _, blind = scorer.captions(trained, "blind")
    generated = []
    for kind, given in CAPTIONED.items():
        captions, scores = scorer.captions(trained, kind)
        _, scores_before = scorer.captions(untrained, kind)
        for figure, value in scores.items():
            # One caption for all is right at most as often as the commonest name: all are different.
            baseline = max(blind[figure], 1 / len(pairs)) if figure == "exact match" else blind[figure]
            least = required(baseline) if figure == "exact match" else 3 * baseline
            rows.append(Row(given, figure, value, scores_before[figure], baseline, least))
        generated += [
            {"id": line["id"], "generated": caption, "reference": line["text"]}
            for line, caption in zip(scorer.references(kind), captions)
        ]
    guessed = scorer.objectives(trained, "blind")
    baseline = max(guessed["masked_lm/accuracy"], learned["masked_lm/majority"])
    values = (figures["masked_lm/accuracy"] for figures in (learned, initial))
    rows.append(Row(CAPTIONED["pairs"], "masked tokens", *values, baseline, required(baseline)))
    return rows, generated


def main(arguments: Arguments) -> int:
    """Prints captions and table, writes results.json; 1 if a figure is too low and `require`."""
    rows, generated = score(arguments.folder, arguments.limit)
    print(f"{'held out':<34}{'generated':<26}truth")
    for caption in generated[:: max(1, len(generated) // 9)]:
        print(f"{caption['id']:<34}{caption['generated']:<26}{caption['reference']}")
    print(f"\n{'given':<16}{'figure':<15}{'trained':>9}{'untrained':>11}{'baseline':>10}{'required':>10}")
    for row in rows:
        figures = f"{row.trained:>9.3f}{row.untrained:>11.3f}{row.baseline:>10.3f}{row.required:>10.3f}"
        print(f"{row.given:<16}{row.figure:<15}{figures}")
    broken = [
        f"{row.figure} from {row.given} is {row.trained:.3f}, below {row.required:.3f}"
        for row in rows
        if row.trained < row.required
    ]
    report = {
        "seconds": arguments.seconds,
        "held_out": [asdict(row) for row in rows],
        "captions": generated,
        "failures": broken,
    }
    path = arguments.folder / "results.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nfigures: {path}")
    if broken and arguments.require:
        print("error: " + "; ".join(broken), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
