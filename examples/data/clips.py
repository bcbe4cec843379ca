"""Animated emoji from npm as short clips: a few frames of each, small, on a background, as an animated WebP."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageSequence

from examples.data import packages
from examples.data.emoji_art import restyle
from examples.data.packages import Package

CLIP_SIZE, CLIP_FRAMES = 48, 8
LICENCE = "Fluent Emoji animated art by Microsoft, MIT"
#: Parts of one collection, each about 180 MB.
PACKAGES = tuple(
    Package("npm", f"@lobehub/fluent-emoji-anim-{part}", "1.0.0", r"assets/.*\.webp", LICENCE) for part in (3, 4)
)


def fetch(folder: Path) -> dict[str, Path]:
    """The animations by code points (without variation selectors), downloaded unless they are there already."""
    found = {}
    for package in PACKAGES:
        pictures = packages.fetch(package, folder / package.name.split("/")[1]) / "assets"
        for path in sorted(pictures.iterdir()):
            with Image.open(path) as opened:  # some files of the collection hold a single frame
                if getattr(opened, "n_frames", 1) >= CLIP_FRAMES:
                    found[path.stem.lower().replace("-fe0f", "")] = path
    return found


def make_clips(source: Path, targets: dict[int, Path]) -> None:
    """Writes CLIP_FRAMES evenly spaced frames of an animation, in one file a variant, unless the file exists.

    Args:
        source: animated WebP with transparency.
        targets: files by number of the variant: 0 is as it is on white, others are turned, shifted, mirrored and in
            other colours, every frame alike, on a light colour.
    """
    missing = {variant: path for variant, path in targets.items() if not path.is_file()}
    if not missing:
        return
    with Image.open(source) as opened:
        wanted = {(2 * i + 1) * opened.n_frames // (2 * CLIP_FRAMES) for i in range(CLIP_FRAMES)}
        size = (CLIP_SIZE, CLIP_SIZE)
        frames = [
            frame.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
            for number, frame in enumerate(ImageSequence.Iterator(opened))
            if number in wanted
        ]
    for variant, path in missing.items():
        background, drawn = (255, 255, 255), frames
        if variant:
            key = f"{source.stem}/{variant}"
            chance = random.Random(key)
            background = tuple(chance.randint(120, 255) for _ in range(3))
            state = chance.getstate()
            drawn = []
            for frame in frames:
                chance.setstate(state)  # the same choices for every frame
                drawn.append(restyle(frame, chance))
        canvas = Image.new("RGBA", size, (*background, 255))
        pictures = [Image.alpha_composite(canvas, frame).convert("RGB") for frame in drawn]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        pictures[0].save(
            partial, format="WEBP", save_all=True, append_images=pictures[1:], lossless=True, duration=100
        )
        partial.rename(path)
