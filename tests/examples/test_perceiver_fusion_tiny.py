"""PerceiverFusion's tiny run: its data, what its table demands, and the whole of it on a few samples."""

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from examples.data import easy_vqa, emoji_art
from tests.examples.art import write_packages
from tests.support.programs import environment

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


def run(*options: str) -> subprocess.CompletedProcess:
    command = ["bash", str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment())


def test_shapes_are_captioned_where_both_answers_are_known(tmp_path):
    data = write_shapes(tmp_path)
    samples = easy_vqa.caption_samples(data, "test", tmp_path / "out")
    assert len(samples) == 7
    for line in samples:
        number = int(line["id"].rsplit("/", 1)[1])
        assert line["text"] == f"{easy_vqa.COLOURS[number]} {easy_vqa.SHAPES[number % 3]}"
        assert (tmp_path / "out" / line["images"][0]).resolve() == data / "test" / "images" / f"{number}.png"
    assert easy_vqa.caption_samples(data, "test", tmp_path / "out", count=3) == samples[:3]


@pytest.mark.slow
def test_the_whole_run_on_a_few_samples(tmp_path):
    write_packages(tmp_path / "cache", NAMES, emoji_art.ALL_VENDORS)
    write_shapes(tmp_path / "cache")
    done = run("--smoke", "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["samples"] == {"unseen vendor's emoji": 5, "unseen coloured shapes": 7}
    figures = ("R@1, image to text", "R@1, text to image", "masked tokens", "masked, against blind", "matching, hard")
    assert [row["figure"] for row in results["held_out"]] == [*figures * 2, "matching, random"]
    assert results["held_out"][0]["baseline"] == pytest.approx(1 / 5)
    assert "both together" in done.stdout and "Done in" in done.stdout
