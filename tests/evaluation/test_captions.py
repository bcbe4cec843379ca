"""Exact match and CIDEr against values worked out by hand, and CIDEr against pycocoevalcap's own entry point."""

import math

import pytest

from megatron_mm.evaluation.captions import cider, exact_match, normalise, score_captions

pytestmark = pytest.mark.interface


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("  Red   APPLE. ", "red apple"),
        ("A dog, a cat!", "a dog a cat"),
        ("the dog’s bone", "the dog's bone"),
        ("snake_case-word", "snake case word"),
        ("Ｆｕｌｌ width café", "full width café"),
        ("...", ""),
    ],
)
def test_normalise(caption, expected):
    assert normalise(caption) == expected


def test_exact_match_counts_any_reference_and_nothing_but_equality():
    captions = ["Red apple.", "green apple", "apple", ""]
    references = [["red apple"], ["pear", "Green  Apple"], ["red apple"], ["pear"]]
    assert exact_match(captions, references) == 0.5


def test_cider_of_perfect_captions_is_ten_times_the_share_of_ngram_orders():
    references = [["one two three four five"], ["red apple"], ["pear"]]
    captions = [texts[0] for texts in references]
    assert cider(captions, references) == pytest.approx((10 * 4 / 4 + 10 * 2 / 4 + 10 * 1 / 4) / 3)
    assert cider(["x", "y", "z"], references) == 0.0


def test_cider_weighs_words_by_rarity():
    # Two documents hold "red", one each "apple" and "pear", of three: idf is ln(3/2) and ln 3.
    references = [["red apple"], ["red pear"], ["green book"]]
    common, rare = math.log(3 / 2), math.log(3)
    unigrams = common**2 / (common**2 + rare**2)  # cosine of (red, apple) and (red, pear)
    expected = 10 * unigrams / 4 / 3 + 2 * 5.0 / 3
    assert cider(["red pear", "red pear", "green book"], references) == pytest.approx(expected)


def test_cider_equals_pycocoevalcap_on_tokenised_captions():
    from pycocoevalcap.cider.cider import Cider

    references = {0: ["a dog runs in the park", "the dog runs"], 1: ["two cats sleep"], 2: ["a red car on a road"]}
    captions = {0: ["a dog in the park"], 1: ["two dogs sleep"], 2: ["a car"]}
    peer, _ = Cider().compute_score(references, captions)
    ours = cider([texts[0] for texts in captions.values()], list(references.values()))
    assert ours == pytest.approx(peer) and ours > 0


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match="2 captions for 1 samples"):
        score_captions(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="0 captions"):
        exact_match([], [])
    with pytest.raises(ValueError, match="sample 1 must have a list"):
        cider(["a", "b"], [["a"], "b"])
