"""Scores of generated captions against references: exact match and CIDEr.

Both see captions through `normalise`, so that case, punctuation and spaces do not count. Functions take parallel lists;
`CaptionScores` is what a report needs.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CaptionScores:
    """Means over samples."""

    samples: int
    exact_match: float
    """Share of captions equal to one of their references, 0 to 1."""
    cider: float
    """CIDEr-D, 0 to 10."""


def normalise(caption: str) -> str:
    """Lower-case words of letters and digits, joined by single spaces (apostrophes inside words stay)."""
    text = unicodedata.normalize("NFKC", caption).lower()
    return " ".join(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text)).replace("’", "'")


def exact_match(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of captions that equal one of their references after `normalise`.

    Args:
        captions: one caption a sample.
        references: the references of each sample.

    Raises:
        ValueError: no sample, another number of references than captions, or a sample without reference.
    """
    _check(captions, references)
    hits = (normalise(caption) in map(normalise, texts) for caption, texts in zip(captions, references))
    return sum(hits) / len(captions)


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (arXiv:1411.5726, the variant with clipping and length penalty), mean over samples, 0 to 10.

    The scorer is pycocoevalcap's; document frequencies come from these references. Words are those of `normalise`,
    where pycocoevalcap runs the PTB tokenizer in Java: equal for plain words, so no Java is needed. The score averages
    n-grams of one to four words, so a perfect caption of k < 4 words reaches 10·k/4.

    Raises:
        ValueError: pycocoevalcap is missing, or as `exact_match`.
    """
    _check(captions, references)
    try:
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ImportError as error:
        raise ValueError("CIDEr needs the package pycocoevalcap: pip install megatron_mm[evaluation]") from error
    scorer = CiderScorer(n=4, sigma=6.0)
    for caption, texts in zip(captions, references):
        scorer += (normalise(caption), [normalise(text) for text in texts])
    mean, _ = scorer.compute_score()
    return float(mean)


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Every score of this file; raises as they do."""
    return CaptionScores(len(captions), exact_match(captions, references), cider(captions, references))


def _check(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not captions or len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions for {len(references)} samples: there must be as many, and some")
    for number, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"sample {number} must have a list of at least one reference, not {texts!r}")
