"""PerceiverFusion's tiny run: its data, what its table demands, and the whole of it on a few samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from examples.data import easy_vqa, emoji_art
from examples.held_out import Row, report, required
from tests.examples.art import write_packages

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "perceiver_fusion_xl" / "tiny.sh"
NAMES = {"1f401": "RED APPLE", "1f402": "GREEN BOOK", "1f403": "CLOUD", "1f404": "OWL", "1f405": "BLUE KEY"}


def write_shapes(folder: Path) -> Path:
    """easy-vqa's data: eight pictures a split; of the last, the colour is not told."""
    data = folder / "easy-vqa" / "easy_vqa" / "data"
    for split in ("train", "test"):
        (data / split / "images").mkdir(parents=True)
        questions = []
        for number in range(8):
            colour, shape = easy_vqa.COLOURS[number], easy_vqa.SHAPES[number % 3]
            Image.new("RGB", (64, 64), colour).save(data / split / "images" / f"{number}.png")
            questions += [["what shape is it?", shape, number], ["is it there?", "yes", number]]
            questions += [["what color is it?", colour, number]] * (number < 7)
        (data / split / "questions.json").write_text(json.dumps(questions))
    return data


def run(*options: str, timeout: float = 60) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def test_shapes_are_captioned_where_both_answers_are_known(tmp_path):
    data = write_shapes(tmp_path)
    samples = easy_vqa.caption_samples(data, "test", tmp_path / "out")
    assert len(samples) == 7
    for line in samples:
        number = int(line["id"].rsplit("/", 1)[1])
        assert line["text"] == f"{easy_vqa.COLOURS[number]} {easy_vqa.SHAPES[number % 3]}"
        assert (tmp_path / "out" / line["images"][0]).resolve() == data / "test" / "images" / f"{number}.png"
    assert easy_vqa.caption_samples(data, "test", tmp_path / "out", count=3) == samples[:3]


def test_three_times_a_low_baseline_or_half_the_error_of_a_high_one():
    assert required(0.01) == pytest.approx(0.03) and required(0.3) == pytest.approx(0.9)
    assert required(0.5) == pytest.approx(0.75)


@pytest.mark.parametrize(("trained", "require", "status"), [(0.76, True, 0), (0.74, True, 1), (0.74, False, 0)])
def test_table_fails_below_what_is_required(tmp_path, capsys, trained, require, status):
    rows = [Row("pictures", "matching", trained, 0.5, 0.5, required(0.5)), Row("pictures", "other", 0.0, 0.0, 0.5)]
    assert report(rows, tmp_path / "results.json", require, seconds=3.0) == status
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seconds"] == 3.0 and [row["trained"] for row in results["held_out"]] == [trained, 0.0]
    assert len(results["failures"]) == (trained < 0.75)
    assert ("matching of pictures is 0.740, below 0.750" in capsys.readouterr().err) == (status == 1)


@pytest.mark.slow
def test_the_whole_run_on_a_few_samples(tmp_path):
    write_packages(tmp_path / "cache", NAMES, emoji_art.ALL_VENDORS)
    write_shapes(tmp_path / "cache")
    done = run("--smoke", "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["samples"] == {"unseen vendor's emoji": 5, "unseen coloured shapes": 7}
    figures = ("R@1, image to text", "R@1, text to image", "masked tokens", "masked, against blind", "matching, hard")
    assert [row["figure"] for row in results["held_out"]] == [*figures * 2, "matching, random"]
    assert results["held_out"][0]["baseline"] == pytest.approx(1 / 5)
    assert "both together" in done.stdout and "Done in" in done.stdout
