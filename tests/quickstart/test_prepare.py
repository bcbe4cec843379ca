"""The quick start's samples: what is held out, what names are taken, and that a package is fetched once."""

import json
import subprocess
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from examples.data import emoji_art, speech
from examples.quickstart import prepare, report
from tests.examples.art import NAMES, write_packages

pytestmark = pytest.mark.interface


def test_names_are_plain_and_every_vendor_has_them(tmp_path):
    packages = write_packages(tmp_path, {**NAMES, "1f9d1-200d-1f680": "astronaut", "1f448": "HAND LEFT"})
    (packages["twitter"] / emoji_art.VENDORS["twitter"].pictures / "1f4d7.png").unlink()
    chosen = emoji_art.choose_names(packages, 0)
    assert [(e.code, e.name) for e in chosen] == [("1f34e", "red apple"), ("2601", "cloud")]
    assert len(emoji_art.choose_names(packages, 1)) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [("T-REX", "t rex"), ("CLOCK FACE FOUR", None), ("KEYCAP 0", None), ("a b c d", None), ("RED APPLE", "red apple")],
)
def test_readable_names(name, expected):
    assert emoji_art.readable_name(name) == expected


def test_what_is_held_out_is_never_trained_on(tmp_path):
    emoji = emoji_art.choose_names(write_packages(tmp_path, NAMES), 0)
    train, heldout = prepare.training_samples(emoji, 3, seed=0), prepare.heldout_samples(emoji)
    seen = {path for sample in train for path in sample["images"] + sample["audios"]}
    new = {path for samples in heldout.values() for sample in samples for path in sample["images"] + sample["audios"]}
    assert not seen & new and len(new) == 2 * len(emoji)
    assert not any(prepare.HELDOUT_VENDOR in path or prepare.HELDOUT_VOICE in path for path in seen)
    assert all(prepare.HELDOUT_VENDOR in sample["images"][0] for sample in heldout["image"])
    assert all(prepare.HELDOUT_VOICE in sample["audios"][0] for sample in heldout["sound"])
    assert {sample["text"] for sample in heldout["image"]} == {e.name for e in emoji}


def test_samples_of_every_kind_name_as_many_files_as_placeholders(tmp_path):
    emoji = emoji_art.choose_names(write_packages(tmp_path, NAMES), 0)
    train = prepare.training_samples(emoji, 3, seed=0)
    kinds = Counter((len(sample["images"]), len(sample["audios"])) for sample in train)
    voices = len(prepare.TRAIN_VOICES) * len(prepare.TRAIN_SPEEDS)
    each = len(emoji)
    alone = 3 * len(prepare.TRAIN_VENDORS)
    assert kinds == {(1, 0): alone * each, (0, 1): voices * each, (1, 1): each, (2, 0): each, (0, 0): each}
    for sample in train:
        assert sample["prompt"].count("<image>") == len(sample["images"])
        assert sample["prompt"].count("<audio>") == len(sample["audios"])
    assert len({sample["id"] for sample in train}) == len(train)
    assert train == prepare.training_samples(emoji, 3, seed=0)


def test_drawings_are_the_same_each_time_and_differ_between_variants(tmp_path):
    package = write_packages(tmp_path, {"1f34e": "RED APPLE"})["google"]
    source = package / emoji_art.VENDORS["google"].pictures / "1f34e.png"
    for name, variant in (("a", 0), ("b", 1), ("c", 1), ("d", 2)):
        emoji_art.draw(source, tmp_path / f"{name}.png", variant)
    a, b, c, d = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abcd")
    assert a.shape == (64, 64, 3) and (a[0, 0] == 255).all() and not (a[32, 32] == 255).all()
    assert (b == c).all() and not (b == d).all() and not (a == b).all()


def test_a_package_is_fetched_once_and_failure_names_it(tmp_path, monkeypatch):
    packages = write_packages(tmp_path, {"1f34e": "RED APPLE"})
    monkeypatch.setenv("PATH", "")
    assert emoji_art.fetch(emoji_art.VENDORS["google"], tmp_path) == packages["google"]
    with pytest.raises(ValueError, match="npm is not installed"):
        emoji_art.fetch(emoji_art.VENDORS["google"], tmp_path / "empty")


def test_speech_is_audible_trimmed_and_differs_between_voices(tmp_path):
    if subprocess.run(["which", "espeak-ng"], capture_output=True).returncode:
        pytest.skip("espeak-ng is not installed")
    first, second = (speech.speak("red apple", voice, 240) for voice in ("en-us", prepare.HELDOUT_VOICE))
    assert 0.2 * speech.SAMPLE_RATE < len(first) < 1.2 * speech.SAMPLE_RATE
    assert np.abs(first).max() > 0.1 and np.abs(first[:80]).max() > 0.005
    assert len(first) != len(second) or not np.allclose(first, second)
    seconds = speech.record("red apple", "en-us", 240, tmp_path / "a.wav")
    assert seconds == pytest.approx(len(first) / speech.SAMPLE_RATE)
    with pytest.raises(ValueError, match="xx-none"):
        speech.speak("red apple", "xx-none", 240)


def row(name: str, media: str, exact: float) -> dict:
    return {"input": name, "media": media, "samples": 9, "exact_match": exact, "cider": 1.0, "token_loss": 2.0}


def test_the_report_holds_the_run_to_its_promises():
    image, sound = report.HELDOUT["image"], report.HELDOUT["sound"]
    untrained = [row(image, "true", 0.0), row(sound, "true", 0.0)]
    good = [row(image, "true", 0.2), row(image, "swapped", 0.0), row(sound, "true", 0.5), row(sound, "swapped", 0.1)]
    results = report.results_of(good, untrained)
    assert results["sound"]["swapped"]["exact_match"] == 0.1 and report.failures(results) == []
    low = [row(image, "true", 0.09), *good[1:]]
    assert report.failures(report.results_of(low, untrained)) == ["image: exact match 0.090 is below 0.10"]
    guessing = [*good[:3], row(sound, "swapped", 0.11)]
    assert "not 5 times" in report.failures(report.results_of(guessing, untrained))[0]


def test_the_plot_shows_losses_their_mean_and_validation(tmp_path):
    """Drawn by matplotlib: pixels of each line's colour, those of validation only where it was measured."""
    records = [{"iteration": number, "loss": 5.0 / number} for number in range(1, 21)]
    records[9]["validation_loss"] = records[19]["validation_loss"] = 2.5
    colours = {"training": (176, 196, 222), "mean": (0, 0, 128), "validation": (255, 140, 0)}

    def pixels(lines: list[dict]) -> dict[str, int]:
        (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        report.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
        image = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
        assert image.shape == (540, 960, 3)
        return {name: int((image == colour).all(axis=-1).sum()) for name, colour in colours.items()}

    with_validation = pixels(records)
    assert min(with_validation.values()) > 50
    without = pixels([{key: value for key, value in line.items() if key != "validation_loss"} for line in records])
    assert without["validation"] == 0 and without["mean"] > 50
