"""Masked tokens and patch noise: exact counts, BERT's shares, uniform choice, and nothing but the key matters."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megatron_mm.data.reading.masking import Masking, patch_noise

ORDINARY = np.arange(200) >= 10
RNG = np.random.default_rng(0)


def document(length: int) -> np.ndarray:
    """<s>, a placeholder, ordinary tokens, </s>."""
    return np.array([2, 4, *RNG.integers(10, 200, length), 3])


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 40, 333])
def test_exactly_the_stated_share_is_hidden(ratio, length):
    tokens = document(length)
    for key in range(20):
        shown, hidden = Masking(ratio, 7, ORDINARY)(tokens, [key, 5])
        assert hidden.sum() == max(1, int(ratio * length + 0.5))
        assert not hidden[:2].any() and not hidden[-1], "special tokens and placeholders stay"
        assert np.array_equal(shown[~hidden], tokens[~hidden])
        assert np.isin(shown[hidden], [7, *range(10, 200)]).all()


def test_documents_without_ordinary_tokens_hide_nothing():
    shown, hidden = Masking(0.15, 7, ORDINARY)(np.array([2, 4, 3]), [1])
    assert shown.tolist() == [2, 4, 3] and not hidden.any()


def test_shares_and_places_are_berts():
    """80% show the mask, 10% a random token (any ordinary one), 10% themselves; every place is as likely."""
    tokens = document(20)
    shown, hidden = (np.stack(part) for part in zip(*(Masking(0.15, 7, ORDINARY)(tokens, [3, k]) for k in range(8000))))
    assert stats.chisquare(hidden[:, 2:-1].sum(0)).pvalue > 1e-4
    total = hidden.sum()
    masked = ((shown == 7) & hidden).sum() / total
    swapped = ((shown != 7) & (shown != tokens) & hidden).sum() / total
    assert abs(masked - 0.8) < 0.01
    assert abs(swapped - 0.1 * 189 / 190) < 0.01  # one swap in 190 draws the token itself
    drawn = shown[(shown != 7) & (shown != tokens) & hidden]
    assert drawn.min() == 10 and drawn.max() == 199


def test_the_key_alone_decides():
    tokens, masking = document(100), Masking(0.15, 7, ORDINARY)
    first, again = masking(tokens, [1, 2, 3]), masking(tokens, [1, 2, 3])
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    for other in ([1, 2, 4], [1, 3, 3], [2, 2, 3]):
        assert not np.array_equal(first[1], masking(tokens, other)[1])


def test_patch_noise_is_uniform_and_keyed():
    noise = np.stack([patch_noise(49, [5, k]) for k in range(2000)])
    assert noise.dtype == np.float32 and 0 <= noise.min() < noise.max() < 1
    assert stats.kstest(noise[:, 7], "uniform").pvalue > 1e-4
    assert stats.chisquare(np.bincount(noise.argmin(1), minlength=49)).pvalue > 1e-4, "any patch may come first"
    assert np.array_equal(noise[3], patch_noise(49, [5, 3])) and not np.array_equal(noise[3], noise[4])
