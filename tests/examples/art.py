"""Unpacked packages of emoji art with a plain drawing of each code, for tests that fetch nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw

from examples.data import emoji_art

NAMES = {"1f34e": "RED APPLE", "1f4d7": "GREEN BOOK", "2601-fe0f": "Cloud", "1f575": "SLEUTH OR SPY NUMBER 7"}


def write_packages(root: Path, names: dict[str, str], vendors: Iterable[str] = emoji_art.VENDORS) -> dict[str, Path]:
    """Packages of the vendors, as `emoji_art.fetch` leaves them: names by code points with variation selectors."""
    packages = {}
    records = [{"unified": code.upper(), "name": name, "category": "Food & Drink"} for code, name in names.items()]
    for vendor in vendors:
        folder = packages[vendor] = root / vendor
        pictures = folder / emoji_art.ALL_VENDORS[vendor].pictures
        pictures.mkdir(parents=True)
        (folder / "package.json").write_text("{}")
        (folder / "emoji.json").write_text(json.dumps(records))
        for code in names:
            picture = Image.new("RGBA", (72, 72))
            ImageDraw.Draw(picture).ellipse((10, 20, 60, 50), fill=(200, 40, 30, 255))
            path = pictures / f"{code}.png"
            picture.save(path)
    return packages


def write_animation(path: Path, frames: int, size: int = 96) -> Path:
    """An animated WebP with transparency: a disc that moves to the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number in range(frames):
        picture = Image.new("RGBA", (size, size))
        left = number * (size - 30) // frames
        ImageDraw.Draw(picture).ellipse((left, 30, left + 30, 60), fill=(20, 40, 200, 255))
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40, lossless=True)
    return path
