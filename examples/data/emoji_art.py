"""Emoji art of several vendors from npm, as small RGB pictures with an English name each.

npm's own client fetches the packages once into a folder; `choose_names` picks base emoji that all vendors drew and
whose name is plain short English; `draw` composites one drawing onto a background. What is held out later is a vendor,
so the same names are in both splits but no picture is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image, ImageEnhance, ImageOps
from tqdm import tqdm

from examples.data import packages
from examples.data.packages import Package
from megatron_mm.platform.atomic_files import give_name

PICTURE_SIZE = 64
#: Categories of emoji-datasource that are things one can see and name; flags, signs and letters are left out.
CATEGORIES = ("Food & Drink", "Animals & Nature", "Objects", "Travel & Places", "Activities", "Smileys & Emotion")
#: Names that describe a drawing's style or one of a series rather than a thing.
UNWANTED = re.compile(r"\b(clock face|symbol|sign|sun behind|mark|button|heavy|medium|hand|left|right)\b")


@dataclass(frozen=True)
class Vendor:
    """One vendor's art as an npm package."""

    name: str
    package: Package
    pictures: str
    """Folder of pictures inside the package, named by their code points."""


def _vendor(name: str, package: str, version: str, pictures: str, licence: str) -> Vendor:
    return Vendor(name, Package("npm", package, version, rf"{pictures}/[^/]+|emoji\.json", licence), pictures)


def _iconify(name: str, version: str, licence: str) -> Vendor:
    package = Package("npm", f"@iconify-json/{name}", version, r"icons\.json", licence)
    return Vendor(name, package, "svg")


#: The vendors of the quick start.
VENDORS = {
    vendor.name: vendor
    for vendor in (
        _vendor(
            "google",
            "emoji-datasource-google",
            "16.0.0",
            "img/google/64",
            "Noto Emoji art by Google, Apache-2.0; emoji-datasource data, MIT",
        ),
        _vendor("fluent", "@lobehub/fluent-emoji-3d", "1.1.0", "assets", "Fluent Emoji 3D art by Microsoft, MIT"),
        _vendor("flat", "@lobehub/fluent-emoji-flat", "1.1.0", "assets", "Fluent Emoji flat art by Microsoft, MIT"),
        _vendor("openmoji", "openmoji", "17.0.0", "color/svg", "OpenMoji art by the OpenMoji project, CC-BY-SA-4.0"),
        _vendor(
            "twitter",
            "emoji-datasource-twitter",
            "16.0.0",
            "img/twitter/64",
            "Twemoji art by Twitter and contributors, CC-BY-4.0; emoji-datasource data, MIT",
        ),
    )
}
#: More vendors, who drew fewer emoji; their packages are one file of drawings by name.
ICONIFY_VENDORS = {
    vendor.name: vendor
    for vendor in (
        _iconify("noto-v1", "1.2.5", "Noto Emoji art of 2013–2016 by Google, Apache-2.0"),
        _iconify("emojione", "1.2.3", "EmojiOne 2 art by EmojiOne, CC-BY-4.0"),
        _iconify("emojione-v1", "1.2.3", "EmojiOne 1 art by EmojiOne, CC-BY-SA-4.0"),
    )
}
ALL_VENDORS = VENDORS | ICONIFY_VENDORS
#: Iconify's name of each emoji's code points.
ICONIFY_CODES = Package("npm", "@iconify-json/noto", "1.2.9", r"chars\.json", "table of names, Apache-2.0")


@dataclass(frozen=True)
class Emoji:
    """A named emoji and the file of each vendor's drawing."""

    code: str
    """Code points, lower-case hexadecimal joined by hyphens, without variation selectors."""
    name: str
    pictures: dict[str, Path]


def fetch(vendor: Vendor, folder: Path) -> Path:
    """Downloads and unpacks a vendor's package, unless it is there already.

    Returns:
        The unpacked package's folder; its `vendor.pictures` has a file for each emoji, named by code points.

    Raises:
        ValueError: npm is missing or could not fetch the package.
    """
    target = packages.fetch(vendor.package, folder / vendor.name)
    if vendor.name in ICONIFY_VENDORS and not (target / vendor.pictures).is_dir():
        codes = packages.fetch(ICONIFY_CODES, folder / "iconify-codes") / "chars.json"
        _write_drawings(target / "icons.json", codes, target / vendor.pictures)
    return target


def _write_drawings(icons: Path, codes: Path, target: Path) -> None:
    """Writes an SVG for each emoji of an Iconify set, named by code points."""
    table = json.loads(icons.read_text(encoding="utf-8"))
    drawings = {name: icon["body"] for name, icon in table["icons"].items()}
    drawings |= {
        name: drawings[alias["parent"]]
        for name, alias in table.get("aliases", {}).items()
        if alias.keys() == {"parent"} and alias["parent"] in drawings
    }
    size = f'width="{table["width"]}" height="{table["height"]}" viewBox="0 0 {table["width"]} {table["height"]}"'
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for code, name in json.loads(codes.read_text(encoding="utf-8")).items():
        if name in drawings:
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{drawings[name]}</svg>'
            (partial / f"{code}.svg").write_text(svg, encoding="utf-8")
    give_name(partial, target)


def pictures_of(vendor: str, package: Path) -> dict[str, Path]:
    """A vendor's pictures by code points, without variation selectors; of two alike, the one named without."""
    paths = sorted((package / ALL_VENDORS[vendor].pictures).iterdir())
    return {_without_selectors(path.stem): path for path in paths}


def choose_names(fetched: dict[str, Path], count: int) -> list[Emoji]:
    """Base emoji that every vendor drew, with a unique name of one to three plain words.

    Args:
        fetched: unpacked package of each vendor (`fetch`); "google" must have the table of names.
        count: at most this many, a fixed pseudo-random choice; 0 takes all.

    Returns:
        The emoji in order of their code.
    """
    available = {}
    for vendor, package in fetched.items():
        available[vendor] = pictures_of(vendor, package)
    chosen: dict[str, Emoji] = {}
    for record in json.loads((fetched["google"] / "emoji.json").read_text(encoding="utf-8")):
        code, name = _without_selectors(record["unified"]), readable_name(record["name"] or "")
        if record["category"] not in CATEGORIES or "200d" in code or name is None or name in chosen:
            continue
        if all(code in files for files in available.values()):
            chosen[name] = Emoji(code, name, {vendor: files[code] for vendor, files in available.items()})
    by_hash = sorted(chosen.values(), key=lambda emoji: hashlib.sha256(emoji.code.encode()).digest())
    return sorted(by_hash[:count] if count else by_hash, key=lambda emoji: emoji.code)


def readable_name(name: str) -> str | None:
    """The name in lower case, or None if it is not one to three plain English words of at most 22 letters."""
    name = name.lower().replace("-", " ")
    if not re.fullmatch(r"[a-z]+( [a-z]+){0,2}", name) or len(name) > 22 or UNWANTED.search(name):
        return None
    return name


def _without_selectors(code: str) -> str:
    return re.sub(r"-fe0f", "", code.lower())


def picture_path(emoji: Emoji, vendor: str, variant: int) -> str:
    """Path of a picture relative to the output folder."""
    return f"images/{vendor}/{emoji.code}-{variant}.png"


def draw_all(emoji: list[Emoji], vendors: dict[str, int], output: Path) -> None:
    """Draws every picture that is not there yet.

    Args:
        vendors: variants of each vendor's drawings.
        output: folder to which `picture_path` is relative.
    """

    def draw_if_missing(job: tuple[Path, Path, int]) -> None:
        if not job[1].is_file():
            draw(*job)

    jobs = [
        (e.pictures[vendor], output / picture_path(e, vendor, variant), variant)
        for e in emoji
        for vendor, variants in vendors.items()
        for variant in range(variants)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the lock
        drawn = pool.map(draw_if_missing, jobs)
        list(tqdm(drawn, total=len(jobs), desc="drawing", unit="picture", mininterval=1))


def draw(source: Path, target: Path, variant: int) -> None:
    """Writes one RGB picture of PICTURE_SIZE: variant 0 as it is on white, others `restyle`d on a light colour.

    Args:
        source: picture with transparency.
        target: PNG to write.
        variant: number of the variant; the same number and source give the same picture.
    """
    picture = open_art(source, PICTURE_SIZE)
    background = (255, 255, 255)
    if variant:
        chance = random.Random(f"{source.stem}/{variant}")
        background = tuple(chance.randint(120, 255) for _ in range(3))
        picture = restyle(picture, chance)
    canvas = Image.new("RGBA", picture.size, (*background, 255))
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.alpha_composite(canvas, picture).convert("RGB").save(target)


def open_art(source: Path, size: int) -> Image.Image:
    """A drawing (SVG or pixels) as RGBA of `size` on a side."""
    data = source.read_bytes()
    if source.suffix == ".svg":
        data = resvg_py.svg_to_bytes(svg_string=data.decode(), width=size, height=size)
    with Image.open(io.BytesIO(data)) as opened:
        return opened.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)


def restyle(picture: Image.Image, chance: random.Random) -> Image.Image:
    """The same thing as another vendor might draw it: turned, shifted, mirrored, in somewhat other colours.

    Args:
        picture: RGBA.
        chance: source of every choice.

    Returns:
        RGBA of the same size.
    """
    colours = recolour(picture, chance)
    size = picture.width
    side = round(size * chance.uniform(0.7, 1.0))
    angle = chance.uniform(-15, 15)
    return place(colours, angle, side, tuple(chance.randint(0, size - side) for _ in range(2)))


def recolour(picture: Image.Image, chance: random.Random) -> Image.Image:
    """RGBA in somewhat other colours, perhaps mirrored (no chosen name says left or right)."""
    colours, alpha = picture.convert("RGB"), picture.getchannel("A")
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        colours = enhance(colours).enhance(chance.uniform(0.6, 1.4))
    colours.putalpha(alpha)
    return ImageOps.mirror(colours) if chance.random() < 0.5 else colours


def place(picture: Image.Image, angle: float, side: int, corner: tuple[int, int]) -> Image.Image:
    """RGBA of the same size that holds the picture turned by `angle` degrees, `side` pixels wide, at `corner`."""
    turned = picture.rotate(angle, Image.Resampling.BICUBIC).resize((side, side))
    placed = Image.new("RGBA", picture.size)
    placed.paste(turned, corner)
    return placed
