"""Short clips as small animated WebP: animated emoji from npm, and still drawings that move."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageSequence

from examples.data import packages
from examples.data.emoji_art import open_art, place, recolour
from examples.data.packages import Package
from megatron_mm.platform.atomic_files import written_whole

CLIP_SIZE, CLIP_FRAMES = 48, 8
LICENCE = "Fluent Emoji animated art by Microsoft, MIT"
#: One part of the collection, about 180 MB.
PACKAGE = Package("npm", "@lobehub/fluent-emoji-anim-3", "1.0.0", r"assets/.*\.webp", LICENCE)


def fetch(folder: Path) -> dict[str, Path]:
    """The animations by code points (without variation selectors), downloaded unless they are there already."""
    found = {}
    for path in sorted((packages.fetch(PACKAGE, folder / PACKAGE.name.split("/")[1]) / "assets").iterdir()):
        with Image.open(path) as opened:  # some files of the collection hold a single frame
            if getattr(opened, "n_frames", 1) >= CLIP_FRAMES:
                found[path.stem.lower().replace("-fe0f", "")] = path
    return found


def sample_animation(source: Path, target: Path) -> None:
    """Writes CLIP_FRAMES evenly spaced frames of an animation on white, unless the file exists.

    Args:
        source: animated WebP with transparency.
    """
    if target.is_file():
        return
    with Image.open(source) as opened:
        wanted = {(2 * i + 1) * opened.n_frames // (2 * CLIP_FRAMES) for i in range(CLIP_FRAMES)}
        size = (CLIP_SIZE, CLIP_SIZE)
        frames = [
            frame.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
            for number, frame in enumerate(ImageSequence.Iterator(opened))
            if number in wanted
        ]
    _write(frames, (255, 255, 255), target)


def move_drawing(source: Path, target: Path, variant: int) -> None:
    """Writes a clip in which a drawing turns, grows or shrinks and drifts, unless the file exists.

    Args:
        source: picture with transparency.
        variant: number of the variant; the same number and source give the same clip.
    """
    if target.is_file():
        return
    chance = random.Random(f"{source.stem}/moving/{variant}")
    background = tuple(chance.randint(120, 255) for _ in range(3)) if variant else (255, 255, 255)
    picture = recolour(open_art(source, CLIP_SIZE), chance)
    # Angle, side and both corners at the first and at the last frame.
    first, last = ((chance.uniform(-20, 20), chance.uniform(0.7, 1), chance.random(), chance.random()) for _ in "ab")
    frames = []
    for number in range(CLIP_FRAMES):
        angle, side, x, y = (a + (b - a) * number / (CLIP_FRAMES - 1) for a, b in zip(first, last))
        pixels = round(CLIP_SIZE * side)
        free = CLIP_SIZE - pixels
        frames.append(place(picture, angle, pixels, (round(free * x), round(free * y))))
    _write(frames, background, target)


def _write(frames: list[Image.Image], background: tuple[int, ...], target: Path) -> None:
    canvas = Image.new("RGBA", frames[0].size, (*background, 255))
    pictures = [Image.alpha_composite(canvas, frame).convert("RGB") for frame in frames]
    with written_whole(target, "xb", partial=target.with_suffix(".partial")) as stream:
        pictures[0].save(stream, format="WEBP", save_all=True, append_images=pictures[1:], lossless=True, duration=100)
