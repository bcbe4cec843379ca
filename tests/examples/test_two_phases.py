"""The tiny runs with two phases: what their table demands, and the whole of one on a few samples."""

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from examples.data import easy_vqa, emoji_art
from examples.held_out import Row, report
from tests.examples.art import write_packages
from tests.support.programs import environment

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = {"1f401": "RED APPLE", "1f402": "GREEN BOOK", "1f403": "CLOUD", "1f404": "OWL", "1f405": "BLUE KEY"}


def write_questions(folder: Path) -> None:
    """easy-vqa's data: three questions about each of twelve pictures a split."""
    data = folder / "easy-vqa" / "easy_vqa" / "data"
    for split in ("train", "test"):
        (data / split / "images").mkdir(parents=True)
        questions = []
        for number in range(12):
            colour, shape = easy_vqa.COLOURS[number % 8], easy_vqa.SHAPES[number % 3]
            Image.new("RGB", (64, 64), colour).save(data / split / "images" / f"{number}.png")
            questions += [["what shape is it?", shape, number], ["is it red?", "no", number]]
            questions += [["what color is it?", colour, number]]
        (data / split / "questions.json").write_text(json.dumps(questions))


def run(system: str, *options: str) -> subprocess.CompletedProcess:
    command = ["bash", str(EXAMPLES / system / "tiny.sh"), *options]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment())


def test_a_loss_must_be_below_its_baseline(tmp_path, capsys):
    good, bad, never = (Row("art", "MAE loss", loss, 1.6, 0.9, 0.9, lower=True) for loss in (0.7, 0.9, float("nan")))
    assert report([good], tmp_path / "r.json", True) == 0
    assert report([good, bad], tmp_path / "r.json", True) == report([never], tmp_path / "r.json", True) == 1
    printed = capsys.readouterr()
    assert "MAE loss of art is 0.900, not below 0.900" in printed.err and "<0.900" in printed.out


@pytest.mark.slow
@pytest.mark.parametrize("system", ["vlm_14b", "dual_encoder"])
def test_the_whole_run_on_a_few_samples(system, tmp_path):
    write_packages(tmp_path / "cache", NAMES, emoji_art.ALL_VENDORS)
    write_questions(tmp_path / "cache")
    done = run(system, "--smoke", "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    figures = {row["figure"]: row for row in results["held_out"]}
    assert list(figures) == [
        *("MAE loss", "R@1, image to name", "R@1, name to image", "name, exact match", "name, CIDEr-D"),
        *("VQA accuracy", "VQA, what is it", "VQA, yes or no"),
    ]
    assert figures["R@1, image to name"]["baseline"] == pytest.approx(1 / 5)
    assert figures["VQA, yes or no"]["baseline"] == 1.0, "the same question always has the same answer"
    assert figures["name, CIDEr-D"]["required"] >= 0.1
    assert figures["MAE loss"]["trained"] > 0 and figures["MAE loss"]["lower"]
    assert len(results["generated"]) == 5 + 16 and "Done in" in done.stdout
    assert "vision.layers.0-3" in done.stdout and "not in this model" in done.stdout, "phase 2 says what it took"
