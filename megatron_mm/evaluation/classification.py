"""Scores of predicted classes: accuracy, weighted and unweighted average recall, F1; and F1 over a text's words.

A class may be anything hashable: a caption, an emotion, a token. WAR is the mean recall of the classes weighted by how
often each is true; for one prediction a sample that is accuracy, and the unweighted mean (UAR) tells whether it rests
on the common classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from megatron_mm.evaluation.captions import normalise


@dataclass(frozen=True)
class ClassScores:
    """Over all samples and the classes that are true of any; 0 to 1."""

    samples: int
    classes: int
    weighted_recall: float
    """WAR: recall of each class, weighted by its samples."""
    unweighted_recall: float
    """UAR: mean recall of the classes."""
    macro_f1: float
    """Mean over classes of the harmonic mean of precision and recall."""
    majority: float
    """WAR of always answering the most common class."""


def score_classes(predicted: Sequence[Hashable], truth: Sequence[Hashable]) -> ClassScores:
    """Scores of one predicted class a sample. A class that is predicted and never true lowers others' precision only.

    Raises:
        ValueError: no sample, or another number of predictions.
    """
    if not truth or len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predictions for {len(truth)} samples: there must be as many, and some")
    support, chosen = Counter(truth), Counter(predicted)
    hits = Counter(right for given, right in zip(predicted, truth) if given == right)
    recalls = {label: hits[label] / count for label, count in support.items()}
    # 2PR / (P + R) with P = hits / chosen and R = hits / support
    f1 = [2 * hits[label] / (chosen[label] + count) for label, count in support.items()]
    return ClassScores(
        samples=len(truth),
        classes=len(support),
        weighted_recall=sum(recalls[label] * count for label, count in support.items()) / len(truth),
        unweighted_recall=sum(recalls.values()) / len(support),
        macro_f1=sum(f1) / len(f1),
        majority=max(support.values()) / len(truth),
    )


def score_class_names(texts: Sequence[str], truth: Sequence[str]) -> ClassScores:
    """Scores of texts that name a class, as generated of a sample and as it is: equal after `captions.normalise`.

    Raises:
        ValueError: as `score_classes`.
    """
    return score_classes([normalise(text) for text in texts], [normalise(text) for text in truth])


def word_f1(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over samples of the best F1 between the words of a text and of one of its references (SQuAD's F1).

    Words are those of `captions.normalise`, counted with repetition. Two texts without words are equal.

    Raises:
        ValueError: no text, another number of references, or a sample without reference.
    """
    if not texts or len(texts) != len(references):
        raise ValueError(f"{len(texts)} texts for {len(references)} samples: there must be as many, and some")
    total = 0.0
    for number, (text, wanted) in enumerate(zip(texts, references)):
        if isinstance(wanted, str) or not wanted:
            raise ValueError(f"sample {number} must have a list of at least one reference, not {wanted!r}")
        total += max(_overlap(text, reference) for reference in wanted)
    return total / len(texts)


def _overlap(text: str, reference: str) -> float:
    given, wanted = Counter(normalise(text).split()), Counter(normalise(reference).split())
    words = given.total() + wanted.total()
    return 2 * (given & wanted).total() / words if words else 1.0
