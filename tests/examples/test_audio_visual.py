"""What AVT learns from and what is held out, and that a clip holds the frames it should."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.data import audio_visual, clips, emoji_art
from examples.data.audio_visual import LIKE_THE_CLIPS, choose_things, heldout_samples, training_samples
from megatron_mm.data.media import decode_video
from tests.examples.art import write_animation, write_packages

NAMES = {"1f34e": "RED APPLE", "1f4d7": "GREEN BOOK", "2601-fe0f": "Cloud", "1f600": "GRINNING FACE", "1f9d1": "STONE"}


@pytest.fixture
def things(tmp_path):
    """Four of the names move; two vendors more drew one of them."""
    fetched = write_packages(tmp_path, NAMES)
    more = [name for name in emoji_art.ALL_VENDORS if name not in emoji_art.VENDORS]
    fetched |= write_packages(tmp_path, {"1f34e": "RED APPLE"}, more)
    return choose_things(fetched, dict.fromkeys(("1f34e", "1f4d7", "2601", "1f600"), Path("a.webp")), 0)


def test_half_of_the_moving_names_keep_their_clips_back(things):
    assert [t.emoji.name for t in things] == ["red apple", "green book", "grinning face", "cloud"]
    assert [t.clip_is_held_out for t in things] == [False, True, False, True]
    assert set(things[0].emoji.pictures) == set(emoji_art.ALL_VENDORS)
    assert set(things[1].emoji.pictures) == set(emoji_art.VENDORS)


def test_neither_clip_nor_voice_of_a_held_out_pair_is_learned_from(things):
    train, held = training_samples(things, 3, seed=0), heldout_samples(things)
    kinds = ("images", "videos", "audios")
    learned = {path for sample in train for kind in kinds for path in sample[kind]}
    unseen = {path for samples in held.values() for sample in samples for kind in kinds for path in sample[kind]}
    assert not learned & unseen and len(unseen) == 4  # a clip and a recording of each of two names
    assert not any(audio_visual.HELDOUT_VOICE in path for path in learned)
    kept_back = {t.emoji.name for t in things if t.clip_is_held_out}
    for sample in train:
        if sample["text"] in kept_back:
            assert not sample["videos"]
            assert not any(f"/{vendor}/" in path for path in sample["images"] for vendor in LIKE_THE_CLIPS)
    assert {s["text"] for s in held["pairs"]} == kept_back
    assert [s["prompt"] for s in held["pairs"]] == ["<audio><video>"] * 2
    assert {len(samples) for samples in held.values()} == {2}


def test_samples_say_and_show_the_same_name(things):
    train = training_samples(things, 2, seed=0)
    assert train == training_samples(things, 2, seed=0) and len({s["id"] for s in train}) == len(train)
    names = {t.emoji.code: t.emoji.name for t in things}
    combinations = set()
    for sample in train:
        assert sample["text"] == names[sample["id"].split("/")[1]]
        for path in sample["audios"]:
            assert path.endswith(f"/{sample['text'].replace(' ', '_')}.wav")
        for path in sample["images"] + sample["videos"]:
            assert names[Path(path).stem.split("-")[0]] == sample["text"]
        combinations.add(tuple(len(sample[kind]) for kind in ("images", "videos", "audios")))
    assert combinations == {(1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)}


def test_a_clip_is_evenly_spaced_frames_on_one_background(tmp_path):
    source = write_animation(tmp_path / "1f34e.webp", 24)
    targets = {0: tmp_path / "plain.webp", 2: tmp_path / "restyled.webp"}
    clips.make_clips(source, targets)
    plain, restyled = (decode_video(path.read_bytes(), clips.CLIP_FRAMES) for path in targets.values())
    assert len(plain) == len(restyled) == clips.CLIP_FRAMES and plain[0].size == (clips.CLIP_SIZE,) * 2
    # The disc of frame n begins at n · 66/24 of 96 pixels; frames 1, 4, 7, … are taken.
    for number, frame in enumerate(plain):
        pixels = np.asarray(frame).astype(int)
        assert (pixels[0, 0] == 255).all()
        columns = np.flatnonzero(pixels[22, :, 0] < 128)
        assert abs(columns[0] - (1 + 3 * number) * 66 / 24 / 2) <= 2
    corners = {tuple(np.asarray(frame)[0, 0]) for frame in restyled}
    assert len(corners) == 1 and corners != {(255, 255, 255)}
    before = targets[0].stat().st_mtime_ns
    clips.make_clips(source, targets)
    assert targets[0].stat().st_mtime_ns == before


def test_animations_are_found_by_code_points(tmp_path):
    for number, package in enumerate(clips.PACKAGES):
        folder = tmp_path / package.name.split("/")[1] / "assets"
        write_animation(folder / f"1f60{number}.webp", 12)
        write_animation(folder / f"270{number}-fe0f.webp", 12)
        Image.new("RGBA", (9, 9)).save(folder / f"1f61{number}.webp")
    assert set(clips.fetch(tmp_path)) == {"1f600", "1f601", "2700", "2701"}
