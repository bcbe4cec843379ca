"""Report of the quick start: five captions beside the truth, the table, the plot of the loss, results.json.

    python examples/quickstart/report.py prompts --data outputs/quickstart/data --output prompts.jsonl
    python examples/quickstart/report.py show --folder outputs/quickstart --seconds 800

`prompts` picks held-out samples for tools/generate.py; `show` reads what the run left in its folder (trained.json and
untrained.json of tools/evaluate.py, answers.jsonl of tools/generate.py, run/metrics.jsonl), prints and writes the
results, and fails if the model does not look and listen.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

#: What the quick start promises of exact match: absolute, and against swapped media.
LEAST_EXACT_MATCH, LEAST_RATIO = 0.10, 5.0
HELDOUT = {"image": "heldout_image.jsonl", "sound": "heldout_sound.jsonl"}


@dataclass
class Prompts:
    """Picks held-out samples to caption."""

    data: Path
    """Folder of prepare.py."""
    output: Path
    """JSONL to write."""
    images: int = 3
    """Pictures of the unseen vendor."""
    sounds: int = 2
    """Recordings of the unseen voice."""
    seed: int = 0
    """Chooses the samples."""


@dataclass
class Show:
    """Prints and writes the results."""

    folder: Path
    """Output folder of the quick start."""
    seconds: float
    """Wall time so far."""
    require: bool = True
    """Fail if exact match is lower than promised."""


def pick(arguments: Prompts) -> None:
    """Writes the prompts' JSONL, paths relative to the data folder."""
    chance = random.Random(arguments.seed)
    lines = []
    for modality, count in (("image", arguments.images), ("sound", arguments.sounds)):
        lines += chance.sample((arguments.data / HELDOUT[modality]).read_text(encoding="utf-8").splitlines(), count)
    arguments.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def results_of(trained: list[dict], untrained: list[dict]) -> dict[str, dict[str, dict]]:
    """Figures by modality and model: {"image": {"trained": {…}, "untrained": {…}, "swapped": {…}}, "sound": …}.

    Args:
        trained: rows of tools/evaluate.py with --swap-media.
        untrained: rows without.
    """
    results = {}
    for modality, name in HELDOUT.items():
        rows = {("trained" if row["media"] == "true" else "swapped"): row for row in trained if row["input"] == name}
        rows["untrained"] = next(row for row in untrained if row["input"] == name)
        keys = ("samples", "exact_match", "cider", "token_loss")
        results[modality] = {
            model: {key: rows[model][key] for key in keys} for model in ("trained", "untrained", "swapped")
        }
    return results


def failures(results: dict[str, dict[str, dict]]) -> list[str]:
    """Promises that the figures break; empty if they hold."""
    broken = []
    for modality, models in results.items():
        trained, swapped = models["trained"]["exact_match"], models["swapped"]["exact_match"]
        if trained < LEAST_EXACT_MATCH:
            broken.append(f"{modality}: exact match {trained:.3f} is below {LEAST_EXACT_MATCH:.2f}")
        if trained < LEAST_RATIO * swapped:
            bound = f"{LEAST_RATIO:g} times that with swapped media, {swapped:.3f}"
            broken.append(f"{modality}: exact match {trained:.3f} is not {bound}")
    return broken


def plot_loss(metrics: Path, target: Path) -> None:
    """Training loss of every step, its running mean, and validation loss where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_jsonl(metrics)
    steps, losses = [r["iteration"] for r in records], [r["loss"] for r in records]
    means, mean = [], losses[0]
    for loss in losses:
        mean += 0.1 * (loss - mean)
        means.append(mean)
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.plot(steps, losses, color="lightsteelblue", linewidth=0.8, label="training, each step")
    axes.plot(steps, means, color="navy", label="training, running mean")
    valid = [(r["iteration"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    if valid:
        axes.plot(*zip(*valid), "o-", color="darkorange", label="validation")
    axes.set(xlabel="iteration", ylabel="loss (nats a token)", title="synapse-tiny on emoji art and spoken names")
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def show(arguments: Show) -> int:
    """Prints captions and table, writes loss.png and results.json; 1 if a promise is broken and `require`."""
    folder = arguments.folder
    answers = read_jsonl(folder / "answers.jsonl")
    print(f"{'heard or seen':<34}{'generated':<26}truth")
    for answer in answers:
        print(f"{answer['id']:<34}{answer['generated']:<26}{answer['reference']}")
    trained, untrained = (
        json.loads((folder / f"{name}.json").read_text())["rows"] for name in ("trained", "untrained")
    )
    results = results_of(trained, untrained)
    print(f"\n{'held out':<10}{'model':<22}{'samples':>8}{'exact match':>13}{'CIDEr-D':>9}{'token loss':>12}")
    labels = {"trained": "trained", "untrained": "untrained", "swapped": "trained, media swapped"}
    for modality, models in results.items():
        for model, row in models.items():
            print(
                f"{modality:<10}{labels[model]:<22}{row['samples']:>8}{row['exact_match']:>13.3f}{row['cider']:>9.3f}"
                f"{row['token_loss']:>12.3f}"
            )
    plot_loss(folder / "run" / "metrics.jsonl", folder / "loss.png")
    broken = failures(results)
    captions = [{key: answer[key] for key in ("id", "generated", "reference")} for answer in answers]
    report = {"seconds": arguments.seconds, "held_out": results, "captions": captions, "failures": broken}
    (folder / "results.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nloss plot: {folder / 'loss.png'}; figures: {folder / 'results.json'}")
    if broken and arguments.require:
        print("error: " + "; ".join(broken), file=sys.stderr)
        return 1
    return 0


Command = Annotated[Prompts, tyro.conf.subcommand("prompts")] | Annotated[Show, tyro.conf.subcommand("show")]


def main() -> int:
    """Runs a subcommand; its exit status."""
    arguments = tyro.cli(Command, description=__doc__)
    if isinstance(arguments, Show):
        return show(arguments)
    pick(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
