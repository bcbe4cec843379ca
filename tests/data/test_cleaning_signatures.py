"""Signatures against what they estimate: Jaccard similarity of shingle sets, and images that people call the same.

Truth: set arithmetic of Python on the texts' shingles; binomial bounds; pictures drawn here, encoded again.
"""

from __future__ import annotations

import io
import math
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megatron_mm.data.cleaning import text_signatures
from megatron_mm.data.cleaning.image_signatures import SIGNATURE_DTYPE, distances, image_signature
from megatron_mm.data.cleaning.text_signatures import (
    PERMUTATIONS,
    Bands,
    band_hashes,
    choose_bands,
    exact_hash,
    jaccard,
    minhashes,
    normalised,
    shingle_hashes,
    words_of,
)
from megatron_mm.media.decoding import decode_image


def pair_of_sets(dice: random.Random, similarity: float, size: int = 200) -> tuple[list[bytes], list[bytes], float]:
    """Two lists of different words whose union has `size`, and their Jaccard similarity."""
    union = [b"%x" % dice.getrandbits(60) for _ in range(size)]
    shared = round(similarity * size)
    half = (size - shared) // 2
    return union[: shared + half], union[:shared] + union[shared + half :], shared / size


def test_estimates_are_those_of_minhash():
    """Standardised errors of 400 independent pairs have mean 0 ± 4/√400 and variance 1 ± 4·√(2/400).

    The permutations of the code are fixed, the sets are random: over random sets any estimator of the kind is unbiased.
    """
    dice, errors = random.Random(1), []
    for _ in range(400):
        first, second, truth = pair_of_sets(dice, dice.uniform(0.1, 0.95))
        one, other = minhashes([first, second], 1)
        estimate = float(jaccard(one[None], other[None])[0])
        errors.append((estimate - truth) / math.sqrt(truth * (1 - truth) / PERMUTATIONS))
    assert abs(np.mean(errors)) < 4 / math.sqrt(400)
    assert abs(np.var(errors) - 1) < 4 * math.sqrt(2 / 400)


def test_shingles_are_runs_of_words():
    """Equal hashes if and only if Python's n-grams are equal, over texts hashed together."""
    dice = random.Random(2)
    texts = [[b"%d" % dice.randrange(4) for _ in range(dice.choice((1, 2, 3, 4, 30)))] for _ in range(50)]
    hashes, firsts = shingle_hashes(texts, 3)
    ngrams = [tuple(text[i : i + 3]) for text in texts for i in range(max(1, len(text) - 2))]
    assert firsts.tolist() == np.cumsum([0] + [max(1, len(text) - 2) for text in texts])[:-1].tolist()
    assert len(set(zip(ngrams, hashes.tolist()))) == len(set(ngrams)) == len(set(hashes.tolist()))


def test_long_texts_are_cut_without_loss(monkeypatch):
    dice = random.Random(3)
    texts = [[b"%x" % dice.getrandbits(20) for _ in range(size)] for size in (1, 5, 96, 97, 98, 99, 100, 1000)]
    whole = minhashes(texts, 5)
    monkeypatch.setattr(text_signatures, "_SEGMENT_WORDS", 47)
    monkeypatch.setattr(text_signatures, "_BATCH_BYTES", 300)
    assert (minhashes(texts, 5) == whole).all()


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_recall_is_that_of_the_formula(similarity):
    """Share of 600 pairs that meet in a band, within 4 standard deviations of 1 − (1 − s^r)^b."""
    dice, cut = random.Random(4), Bands(16, 8)
    pairs = [pair_of_sets(dice, similarity, 100) for _ in range(600)]
    one, other = (band_hashes(minhashes([pair[side] for pair in pairs], 1), cut) for side in (0, 1))
    met = float((one == other).any(axis=0).mean())
    expected = cut.recall(similarity)
    assert abs(met - expected) < 4 * math.sqrt(expected * (1 - expected) / 600) + 1e-9
    assert expected == pytest.approx(1 - (1 - similarity**8) ** 16)


def test_bands_are_as_long_as_the_recall_allows():
    for threshold in (0.5, 0.8, 0.95):
        cut = choose_bands(threshold)
        longer = Bands(PERMUTATIONS // (cut.rows + 1), cut.rows + 1)
        assert cut.recall(threshold) >= 0.98 > longer.recall(threshold)
        assert cut.bands * cut.rows <= PERMUTATIONS


def test_normal_forms():
    assert normalised("  Ａ\tﬁne\n Day ") == "a fine day"
    assert exact_hash("a") != exact_hash("a", [b""]) != exact_hash("a", [b"", b""])
    assert words_of("Don't stop: 3 words_more!") == [b"don", b"t", b"stop", b"3", b"words_more"]
    assert words_of("Ünder-ground ２") == ["ünder".encode(), b"ground", b"2"]
    assert words_of("猫が好き cat") == [*(c.encode() for c in "猫が好き"), b"cat"]
    ascii_and_not = [words_of(text) for text in ("Same, words", "Same, words é")]
    assert ascii_and_not[1][:-1] == ascii_and_not[0]


def picture(dice: np.random.Generator) -> Image.Image:
    """Shapes of random colours on a random ground, 100 to 220 pixels a side."""
    width, height = (int(v) for v in dice.integers(100, 220, 2))

    def colour() -> tuple[int, ...]:
        return tuple(int(v) for v in dice.integers(0, 256, 3))

    image = Image.new("RGB", (width, height), colour())
    draw = ImageDraw.Draw(image)
    for _ in range(int(dice.integers(3, 12))):
        x, y = int(dice.integers(0, width - 20)), int(dice.integers(0, height - 20))
        box = (x, y, x + int(dice.integers(15, width // 2)), y + int(dice.integers(15, height // 2)))
        (draw.ellipse if dice.integers(2) else draw.rectangle)(box, fill=colour())
    return image


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def signature(data: bytes) -> np.ndarray:
    return np.array([image_signature(decode_image(data), data)], dtype=SIGNATURE_DTYPE)


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    dice = np.random.default_rng(0)
    return [picture(dice) for _ in range(200)]


@pytest.fixture(scope="module")
def originals(pictures) -> np.ndarray:
    return np.array([image_signature(image, b"") for image in pictures], dtype=SIGNATURE_DTYPE)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: encoded(image, "JPEG", quality=50),
        lambda image: encoded(scaled(image, 0.5), "JPEG", quality=80),
        lambda image: encoded(scaled(image, 1.5), "WEBP", quality=80, method=0),
    ],
    ids=["jpeg-50", "half-jpeg-80", "larger-webp"],
)
def test_images_are_known_again(change, pictures, originals):
    """At most 2 of 200 are missed at the default distance; the original is not there by chance: see below."""
    changed = np.concatenate([signature(change(image)) for image in pictures])
    assert (distances(originals, changed) <= 4).sum() >= 198


def test_different_images_differ(originals):
    """All 19,900 pairs. Random hashes within 4 of 64 bits would be 4e-14 of them."""
    first, second = np.triu_indices(len(originals), 1)
    assert distances(originals[first], originals[second]).min() > 4


def test_images_of_one_colour_are_compared_by_their_bytes():
    red, red_again, other_size = (encoded(Image.new("RGB", (n, 64), "red"), "PNG") for n in (64, 64, 65))
    soft = Image.linear_gradient("L").point(lambda level: 100 + level // 64).convert("RGB")
    one, same, other = map(signature, (red, red_again, other_size))
    assert one["flat"] and signature(encoded(soft, "PNG"))["flat"]
    assert distances(one, same) == 0 and distances(one, other) == 65
    assert distances(one, signature(encoded(Image.new("RGB", (64, 64), "blue"), "PNG"))) == 65


def test_colours_tell_drawings_apart():
    def heart(colour: str, **options) -> bytes:
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).polygon([(64, 110), (10, 50), (40, 15), (64, 40), (90, 15), (118, 50)], fill=colour)
        return encoded(image, **options)

    red, green = heart("#d02020", form="PNG"), heart("#207a20", form="PNG")
    grey_levels = [np.asarray(decode_image(data).convert("L"))[64, 64] for data in (red, green)]
    assert abs(int(grey_levels[0]) - int(grey_levels[1])) < 15
    one, other = signature(red), signature(green)
    assert np.bitwise_count(one["hash"] ^ other["hash"]) <= 4 and distances(one, other) == 65
    assert distances(one, signature(heart("#d02020", form="JPEG", quality=60))) <= 4
