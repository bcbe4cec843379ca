"""Tux Paint's stamps from Debian: drawings and photographs of things, each with a caption of a sentence.

A stamp's folder is its family (`animals/birds`, `food/fruit/cartoon`); families can be held out whole.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image

from examples.data import packages
from examples.data.packages import Package

PACKAGE = Package(
    "apt",
    "tuxpaint-stamps-default",
    "",
    r"usr/share/(tuxpaint/stamps/.*\.(png|svg|txt)|doc/.*/copyright)",
    "Tux Paint stamps by Bill Kendrick and others, GPL-2",
)
#: Families whose caption says something else than what is to be seen: letters, money, notes, chess pieces, signs.
_UNSEEN = re.compile(r"^(symbols|town/flags|town/roadsigns)\b")


@dataclass(frozen=True)
class Stamp:
    """One picture with its caption."""

    name: str
    """Path below the stamps' folder, without suffix."""
    picture: Path
    caption: str

    @property
    def family(self) -> str:
        """The first folder, such as "animals"."""
        return self.name.split("/")[0]


def fetch(folder: Path) -> Path:
    """The folder of stamps, downloaded unless it is there already."""
    return packages.fetch(PACKAGE, folder / "tuxpaint-stamps") / "usr/share/tuxpaint/stamps"


def read_stamps(folder: Path, longest: int = 8) -> list[Stamp]:
    """Stamps of things with an English caption of at most `longest` words, in order of their names."""
    stamps = []
    for table in sorted(folder.rglob("*.txt")):
        name = table.relative_to(folder).with_suffix("").as_posix()
        picture = next((path for s in (".png", ".svg") if (path := table.with_suffix(s)).is_file()), None)
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
        caption = _plain(lines[0]) if lines else ""
        if picture is None or not caption or len(caption.split()) > longest or _UNSEEN.match(name):
            continue
        if picture.suffix == ".png" or _has_size(picture.read_text(encoding="utf-8", errors="replace")):
            stamps.append(Stamp(name, picture, caption))
    return stamps


def _has_size(svg: str) -> bool:
    """Whether a drawing says how large it is in its own units: without a view box resvg refuses points and inches."""
    tag = re.search(r"<svg[^>]*>", svg)
    return tag is not None and ("viewBox" in tag[0] or re.search(r'\swidth="[\d.]+(px)?"', tag[0]) is not None)


def _plain(caption: str) -> str:
    """The first sentence, in lower case without punctuation."""
    first = re.split(r"(?<=\w)[.!?](?:\s|$)", caption.strip())[0]
    return " ".join(re.findall(r"[a-z]+(?:['’-][a-z]+)*", first.lower()))


def draw(stamp: Stamp, target: Path, size: int) -> None:
    """Writes the stamp on white as an RGB PNG of `size` pixels on a side, unless the file exists."""
    if target.is_file():
        return
    data = stamp.picture.read_bytes()
    if stamp.picture.suffix == ".svg":
        data = resvg_py.svg_to_bytes(svg_string=data.decode(), width=size)
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGBA")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    canvas.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.convert("RGB").save(target)
