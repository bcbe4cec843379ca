"""What AVT learns from and what is held out, and that a clip holds the frames it should."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.data import audio_visual, clips, emoji_art
from examples.data.audio_visual import LIKE_THE_CLIPS, choose_things, heldout_samples, training_samples
from megatron_mm.media.decoding import decode_video
from tests.examples.art import write_animation, write_packages

NAMES = {"1f34e": "RED APPLE", "1f4d7": "GREEN BOOK", "2601-fe0f": "Cloud", "1f600": "GRINNING FACE", "1f9d1": "STONE"}


@pytest.fixture
def things(tmp_path):
    """Four of the names move; two vendors more drew one of them."""
    fetched = write_packages(tmp_path, NAMES)
    more = [name for name in emoji_art.ALL_VENDORS if name not in emoji_art.VENDORS]
    fetched |= write_packages(tmp_path, {"1f34e": "RED APPLE"}, more)
    return choose_things(fetched, dict.fromkeys(("1f34e", "1f4d7", "2601", "1f600"), Path("a.webp")), 0)


def test_names_that_move_are_taken_with_all_who_drew_them(things):
    assert [t.emoji.name for t in things] == ["red apple", "green book", "grinning face", "cloud"]
    assert set(things[0].emoji.pictures) == set(emoji_art.ALL_VENDORS)
    assert set(things[1].emoji.pictures) == set(emoji_art.VENDORS)


def test_neither_clip_nor_voice_of_a_held_out_pair_is_learned_from(things):
    train, held = training_samples(things, 3, seed=0), heldout_samples(things)
    kinds = ("images", "videos", "audios")
    learned = {path for sample in train for kind in kinds for path in sample[kind]}
    unseen = {path for samples in held.values() for sample in samples for kind in kinds for path in sample[kind]}
    assert not learned & unseen and len(unseen) == 8  # a clip and a recording of each of four names
    assert not any(audio_visual.HELDOUT_VOICE in path for path in learned)
    assert not any(f"/{LIKE_THE_CLIPS}/" in path for path in learned)
    assert [s["prompt"] for s in held["pairs"]] == ["<audio><video>"] * 4
    assert {s["prompt"] for s in held["names"]} == {""}
    assert {len(samples) for samples in held.values()} == {4}
    texts = [[s["text"] for s in samples] for samples in held.values()]
    assert texts == [[t.emoji.name for t in things]] * 4


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
    assert combinations == {(1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)}


def frames_of(path):
    return [np.asarray(frame).astype(int) for frame in decode_video(path.read_bytes(), clips.CLIP_FRAMES)]


def test_a_clip_is_evenly_spaced_frames_of_an_animation(tmp_path):
    source, target = write_animation(tmp_path / "1f34e.webp", 24), tmp_path / "clip.webp"
    clips.sample_animation(source, target)
    frames = frames_of(target)
    assert len(frames) == clips.CLIP_FRAMES and frames[0].shape == (clips.CLIP_SIZE, clips.CLIP_SIZE, 3)
    # The disc of frame n begins at n · 66/24 of 96 pixels; frames 1, 4, 7, … are taken.
    for number, pixels in enumerate(frames):
        assert (pixels[0, 0] == 255).all()
        columns = np.flatnonzero(pixels[22, :, 0] < 128)
        assert abs(columns[0] - (1 + 3 * number) * 66 / 24 / 2) <= 2
    before = target.stat().st_mtime_ns
    clips.sample_animation(source, target)
    assert target.stat().st_mtime_ns == before


def test_a_drawing_moves_little_by_little_on_one_background(tmp_path):
    source = tmp_path / "1f34e.png"
    drawing = Image.new("RGBA", (64, 64))
    drawing.paste((200, 30, 30, 255), (16, 16, 48, 48))
    drawing.save(source)
    made = {}
    for variant in (0, 1):
        made[variant] = tmp_path / f"{variant}.webp"
        clips.move_drawing(source, made[variant], variant)
    plain, coloured = (frames_of(path) for path in made.values())
    assert len(plain) == clips.CLIP_FRAMES and (plain[0][0, 0] == 255).all()
    assert {tuple(frame[0, 0]) for frame in coloured} == {tuple(coloured[0][0, 0])} != {(255, 255, 255)}
    changes = [abs(a - b).mean() for a, b in pairwise(plain)]
    assert min(changes) > 0 and abs(plain[0] - plain[-1]).mean() > 1.5 * max(changes)


def test_animations_are_found_by_code_points(tmp_path):
    folder = tmp_path / clips.PACKAGE.name.split("/")[1] / "assets"
    write_animation(folder / "1f600.webp", 12)
    write_animation(folder / "2700-fe0f.webp", 12)
    Image.new("RGBA", (9, 9)).save(folder / "1f610.webp")
    assert set(clips.fetch(tmp_path)) == {"1f600", "2700"}
