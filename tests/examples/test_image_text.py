"""What the image-text systems learn from and what is held out, on packages of the test's own."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.data import easy_vqa, emoji_art, image_text, tux_paint
from tests.examples.art import NAMES, write_packages

pytestmark = pytest.mark.interface

SVG = '<svg xmlns="http://www.w3.org/2000/svg" {}><rect x="10" y="5" width="20" height="10" fill="#f00"/></svg>'


def write_questions(folder: Path) -> Path:
    """easy-vqa's data: three questions about two pictures in each split."""
    data = folder / "easy-vqa" / "easy_vqa" / "data"
    for split in ("train", "test"):
        (data / split / "images").mkdir(parents=True)
        questions = [["is it red?", "yes", 0], ["what shape?", f"circle of {split}", 1], ["is it red?", "no", 1]]
        (data / split / "questions.json").write_text(json.dumps(questions))
        for number in (0, 1):
            Image.new("RGB", (64, 64), "red").save(data / split / "images" / f"{number}.png")
    return data


def write_stamps(folder: Path) -> Path:
    """A stamp of each kind that is taken, and of each that is not."""
    root = folder / "tuxpaint-stamps" / "usr/share/tuxpaint/stamps"
    captions = {
        "animals/birds/owl.png": "An “eagle” owl.  It says “Hoo”!\nfr.utf8=Un hibou.",
        "food/fruit/apple.svg": "A red apple.",
        "food/fruit/pear.svg": "A pear.",
        "symbols/math/plus.png": "Plus.",
        "animals/long.png": "A caption of far more words than a stamp's name should ever have.",
        "animals/nothing.png": "",
    }
    for name, caption in captions.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        if path.suffix == ".png":
            Image.new("RGBA", (40, 20), (0, 0, 255, 255)).save(path)
        else:  # resvg cannot tell how large the pear is
            path.write_text(SVG.format('width="40" height="20"' if "apple" in name else 'width="9cm" height="5cm"'))
    return root


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prepared(tmp_path, capsys):
    """The folder that the script writes from a cache that holds every package."""
    cache = tmp_path / "cache"
    write_packages(cache, NAMES, emoji_art.ALL_VENDORS)
    write_questions(cache)
    write_stamps(cache)
    output = tmp_path / "data"
    image_text.main(image_text.Arguments(output, cache, variants=2, questions=2, heldout_questions=3, stamps=True))
    assert "3 names; 42 pairs to learn, 3 held out, 2 questions to learn, 3 held out" in capsys.readouterr().out
    return output


def test_no_held_out_picture_is_learned_from(prepared):
    for kind in ("pairs", "questions", "stamps"):
        train, held = (lines(prepared / f"{name}{kind}.jsonl") for name in ("", "heldout_"))
        assert train and held
        assert not {s["images"][0] for s in train} & {s["images"][0] for s in held}
        for s in train + held:
            assert len(s["images"]) == 1 and (prepared / s["images"][0]).is_file()
            assert s["prompt"].startswith("<image>") and s["text"]
    train, held = lines(prepared / "pairs.jsonl"), lines(prepared / "heldout_pairs.jsonl")
    assert {s["text"] for s in train} == {s["text"] for s in held} == {"red apple", "green book", "cloud"}
    assert all(image_text.HELDOUT_VENDOR in s["images"][0] for s in held) and len({s["id"] for s in train}) == 42
    assert [s["text"] for s in lines(prepared / "stamps.jsonl")] == ["an eagle owl"]
    assert [s["text"] for s in lines(prepared / "heldout_stamps.jsonl")] == ["a red apple"]
    assert all(s["id"].startswith("vqa/test/") for s in lines(prepared / "heldout_questions.jsonl"))


def test_a_question_is_the_prompt_and_only_its_answer_is_learned(prepared):
    held = {(s["prompt"], s["text"]) for s in lines(prepared / "heldout_questions.jsonl")}
    shape = ("<image>what shape?", "circle of test")
    assert held == {("<image>is it red?", "yes"), shape, ("<image>is it red?", "no")}
    texts = (prepared / "texts.txt").read_text().splitlines()
    assert {"red apple", "an eagle owl", "is it red?"} <= set(texts) and "circle of test" not in texts


def test_licences_name_every_package(prepared):
    licences = (prepared / "LICENCES.txt").read_text().splitlines()
    packages = [*(v.package for v in emoji_art.ALL_VENDORS.values()), easy_vqa.PACKAGE, tux_paint.PACKAGE]
    assert licences == [f"{package}: {package.licence}" for package in packages]


def test_stamps_are_drawn_whole_on_white(tmp_path):
    (owl, apple) = tux_paint.read_stamps(write_stamps(tmp_path))
    assert (owl.family, apple.family) == ("animals", "food")
    for stamp in (owl, apple):
        tux_paint.draw(stamp, tmp_path / f"{stamp.family}.png", 32)
    blue, red = (np.asarray(Image.open(tmp_path / f"{family}.png")) for family in ("animals", "food"))
    assert blue.shape == red.shape == (32, 32, 3) and (blue[0, 0] == 255).all() and (red[0, 0] == 255).all()
    assert (blue[16] == (0, 0, 255)).all() and (blue[5] == 255).all()  # 40 × 20 fills the width
    assert (red[16, 16] == (255, 0, 0)).all()
