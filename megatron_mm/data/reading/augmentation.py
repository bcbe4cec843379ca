"""How a training image is seen this time: cropped, mirrored, in other colours.

A `View` is a pure function of the integers that name a medium (seed, epoch, dataset, document, medium), so a resumed
run, another number of workers or another rank sees the same pixels. It holds for every frame of a video. An image whose
text names a side is never mirrored, because that would make the text false.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from megatron_mm.data.reading.order import Purpose, keyed_generator
from megatron_mm.media.transforms import Box, center_crop_box, resize

CROP_SCALE = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
#: Patterns of words that name a side, in languages of common captions; a word too many only skips a flip.
SIDE_WORDS = (
    r"(?:left|right)(?:most|wards?|y|ies|hand\w*|side\w*|arrow\w*|bound)?",
    r"gauch(?:es?|ers?|ères?)|droit(?:e?s?|iers?|ières?)",
    r"izquierd[ao]s?|derech[ao]s?|zurd[ao]s?|diestr[ao]s?",
    r"esquerd[ao]s?|direit[ao]s?|canhot[ao]s?",
    r"sinistr[aeio]|destr[aeio]",
    r"(?:link|recht)(?:e[mns]?|er\w*|s\w*)",
    r"с(?:лев|прав)а|(?:в|на)(?:лев|прав)о|(?:лев|прав)ш(?:а|и|у|е|ой|ей|ам|ами|ах)|(?:лев|прав)осторонн\w*",
    r"(?:лев|прав)(?:ый|ого|ому|ым|ом|ая|ой|ою|ую|ое|ые|ых|ыми|ее|ей|о)",
)
#: What names a side wherever it stands: Chinese and Japanese, and Korean, whose words take endings.
SIDE_SYLLABLES = ("左", "右", "ひだり", "みぎ", "왼", "오른", "좌측", "우측", "좌회전", "우회전")
_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}
_LETTER = r"[^\W\d_]"
_SIDES = re.compile(rf"(?<!{_LETTER})(?:{'|'.join(SIDE_WORDS)})(?!{_LETTER})|{'|'.join(SIDE_SYLLABLES)}", re.IGNORECASE)
_HUMPS = re.compile("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def names_a_side(text: str) -> bool:
    """Whether a text says left or right, also inside a name such as arrow_left or RightArrow."""
    return _SIDES.search(_HUMPS.sub(" ", text)) is not None


def random_crop_box(width: int, height: int, key: Sequence[int]) -> Box:
    """The box of a random resized crop (torchvision's algorithm): area 0.5–1 of the image, aspect 3/4–4/3.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        key: non-negative integers that name the sample.

    Returns:
        (left, top, right, bottom), in pixels.
    """
    generator = keyed_generator(key)
    for _ in range(10):
        area = width * height * generator.uniform(*CROP_SCALE)
        aspect = math.exp(generator.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(0, width - w + 1)), int(generator.integers(0, height - h + 1))
            return left, top, left + w, top + h
    return center_crop_box(width, height)


def random_jitter(strength: float, key: Sequence[int]) -> tuple[tuple[str, float], ...]:
    """Colour changes in a keyed order: factors of brightness, contrast and saturation within 1 ± strength, and a shift
    of hue within ± strength / 4 of the circle."""
    generator = keyed_generator(key)
    changes = [(name, float(generator.uniform(1 - strength, 1 + strength))) for name in _ENHANCERS]
    changes.append(("hue", float(generator.uniform(-strength / 4, strength / 4))))
    return tuple(changes[i] for i in np.argsort(generator.random(len(changes))))


def change_colour(image: Image.Image, name: str, amount: float) -> Image.Image:
    """One colour change of an RGB image, as torchvision's functions of that name make it on Pillow images."""
    if name != "hue":
        return _ENHANCERS[name](image).enhance(amount)
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(amount * 255) & 255)  # wraps around, as hue does
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


@dataclass(frozen=True)
class View:
    """What is done to an image, or to every frame of a video."""

    box: Box
    mirrored: bool = False
    colours: tuple[tuple[str, float], ...] = ()

    def apply(self, image: Image.Image | np.ndarray, size: int) -> Image.Image:
        """The RGB image cropped, resized to size × size (`transforms.resize`), mirrored, and in its colours."""
        image = resize(image, size, self.box)
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for name, amount in self.colours:
            image = change_colour(image, name, amount)
        return image


@dataclass(frozen=True)
class Augmentation:
    """What a recipe does to training images (`data.random_crop`, `data.horizontal_flip`, `data.color_jitter`); the
    default, as in validation, crops the centre and nothing else."""

    random_crop: bool = False
    horizontal_flip: float = 0.0
    color_jitter: float = 0.0

    def view(self, width: int, height: int, seed: int, name: Sequence[int], text: Callable[[], str]) -> View:
        """How an image is seen.

        Args:
            width: of the image, pixels.
            height: of the image, pixels.
            seed: of the run.
            name: integers that name epoch and medium.
            text: the text to which it belongs; asked only where a flip is due.
        """
        crop = random_crop_box(width, height, [seed, Purpose.CROP, *name]) if self.random_crop else None
        flip = self.horizontal_flip and keyed_generator([seed, Purpose.FLIP, *name]).random() < self.horizontal_flip
        colours = random_jitter(self.color_jitter, [seed, Purpose.JITTER, *name]) if self.color_jitter else ()
        return View(crop or center_crop_box(width, height), bool(flip) and not names_a_side(text()), colours)
