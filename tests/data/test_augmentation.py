"""Views of images: colour changes against their formulas, flips that spare texts with sides, keys."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from PIL import Image

from megatron_mm.data.reading.augmentation import Augmentation, View, change_colour, names_a_side, random_jitter
from megatron_mm.media.transforms import center_crop_box, image_tensor, pixel_tensor

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8))


def grey(pixels: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma, as Pillow's L."""
    return pixels @ np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("factor", [0.4, 0.8, 1.0, 1.3, 1.9])
def test_colour_changes_are_blends(factor):
    """Brightness blends with black, contrast with the mean grey, saturation with each pixel's grey."""
    pixels = np.asarray(PICTURE, np.float64)
    others = {
        "brightness": np.zeros_like(pixels),
        "contrast": np.full_like(pixels, grey(pixels).mean()),
        "saturation": np.repeat(grey(pixels)[..., None], 3, 2),
    }
    for name, other in others.items():
        expected = np.clip(other + factor * (pixels - other), 0, 255)
        assert np.abs(np.asarray(change_colour(PICTURE, name, factor)) - expected).max() <= 2, name
        assert factor != 1.0 or np.array_equal(np.asarray(change_colour(PICTURE, name, factor)), pixels)


@pytest.mark.parametrize("shift", [-0.25, -0.1, 0.0, 0.05, 0.25])
def test_hue_turns_around_the_circle(shift):
    for colour in ((200, 40, 60), (30, 180, 90), (70, 60, 220)):
        turned = np.asarray(change_colour(Image.new("RGB", (4, 4), colour), "hue", shift))[1, 1]
        h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
        expected = np.array(colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)) * 255
        assert np.abs(turned - expected).max() <= 12  # hue has 256 steps, of up to 4 levels here


def test_jitter_has_the_stated_ranges_and_any_order():
    drawn = [random_jitter(0.4, [1, k]) for k in range(1000)]
    amounts = {name: np.array([dict(changes)[name] for changes in drawn]) for name, _ in drawn[0]}
    for name in ("brightness", "contrast", "saturation"):
        assert 0.6 <= amounts[name].min() < 0.62 and 1.38 < amounts[name].max() <= 1.4
    assert -0.1 <= amounts["hue"].min() < -0.095 and 0.095 < amounts["hue"].max() <= 0.1
    assert len({tuple(name for name, _ in changes) for changes in drawn}) == 24
    assert drawn[5] == random_jitter(0.4, [1, 5]) != random_jitter(0.4, [2, 5])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("The car turns LEFT.", True),
        ("a right-hand glove", True),
        ("une flèche vers la gauche", True),
        ("flecha a la derecha", True),
        ("der linke Schuh", True),
        ("стрелка влево", True),
        ("向左的箭头", True),
        ("с правого бока", True),
        ("у левого края", True),
        ("несколько правых туфель, левее", True),
        ("a lefthanded batter", True),
        ("RightArrow", True),
        ("arrowLEFT.png", True),
        ("arrow_left_2", True),
        (r"\rightarrow", True),
        ("der Linkspfeil", True),
        ("de rechterkant", True),
        ("un gaucher", True),
        ("왼쪽 화살표", True),
        ("오른손", True),
        ("みぎのやじるし", True),
        ("a bright light, leftovers, copyright", False),
        ("upright, outright, all rights reserved, BrightArrow", False),
        ("правда, правило, справка, лев и львица", False),
        ("ein Rechteck, linked", False),
        ("세 개의 화살표", False),
        ("", False),
    ],
)
def test_texts_that_name_a_side(text, named):
    assert names_a_side(text) is named


def test_flips_have_the_stated_chance_and_spare_texts_with_sides():
    augmentation = Augmentation(horizontal_flip=0.3)
    asked = []

    def text(words: str):
        return lambda: asked.append(words) or words

    plain = [augmentation.view(60, 40, 1, [0, 0, k], text("a dog")).mirrored for k in range(2000)]
    assert abs(np.mean(plain) - 0.3) < 0.04
    assert len(asked) == sum(plain), "the text is looked up only where a flip is due"
    assert not any(augmentation.view(60, 40, 1, [0, 0, k], text("dog on the left")).mirrored for k in range(300))
    assert all(Augmentation(horizontal_flip=1.0).view(60, 40, 1, [0, k], text("x")).mirrored for k in range(50))


def test_a_view_crops_mirrors_and_colours_in_this_order():
    box = (5.0, 3.0, 35.0, 33.0)
    seen = View(box, mirrored=True, colours=(("brightness", 0.5), ("contrast", 1.5))).apply(PICTURE, 16)
    plain = PICTURE.resize((16, 16), Image.Resampling.BICUBIC, box=box)
    expected = change_colour(change_colour(plain, "brightness", 0.5), "contrast", 1.5)
    assert np.array_equal(np.asarray(seen), np.asarray(expected)[:, ::-1])


def test_the_default_is_the_centre_crop_alone():
    view = Augmentation().view(60, 40, 1, [0, 0], lambda: pytest.fail("no text is needed"))
    assert view == View(center_crop_box(60, 40))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    assert np.array_equal(
        pixel_tensor(view.apply(PICTURE, 20), mean, std), image_tensor(PICTURE, 20, center_crop_box(60, 40), mean, std)
    )


def test_a_view_depends_on_seed_and_name_alone():
    augmentation = Augmentation(True, 0.5, 0.4)
    views = [augmentation.view(60, 40, seed, [epoch, 0, 3], lambda: "") for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(views)) == 4
    assert views[0] == Augmentation(True, 0.5, 0.4).view(60, 40, 1, [0, 0, 3], lambda: "")
