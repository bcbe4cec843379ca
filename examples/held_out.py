"""The table that ends a tiny run: held-out figures beside the untrained model, a baseline and what each must reach.

What is required must not depend on luck: it lies beyond what guessing reaches on so few samples, and below what each
of three seeds reached. A figure for which no such value exists is printed and not required.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Row:
    """A line of the table: one figure on one set of samples."""

    given: str
    """The samples, in a few words."""
    figure: str
    trained: float
    untrained: float
    baseline: float
    """What chance, or the trained model without what it should look at, reaches."""
    required: float | None = None
    """What the trained model must reach; None where nothing is promised."""
    lower: bool = False
    """Lower is better, as of a loss: the trained model must be below what is required."""

    @property
    def holds(self) -> bool:
        """Whether what is required is reached; NaN never is."""
        if self.required is None:
            return True
        return self.trained < self.required if self.lower else self.trained >= self.required


#: Probability with which a model that guesses may reach what is required.
LUCK = 0.001


def required(baseline: float, samples: int) -> float:
    """The accuracy that a model must reach: three times the baseline, or half its error where that is above 0.3, and
    beyond what guessing reaches.

    Args:
        samples: how many are scored.
    """
    least = 3 * baseline if baseline <= 0.3 else 1 - (1 - baseline) / 2
    return max(least, beyond_chance(baseline, samples))


def beyond_chance(chance: float, samples: int) -> float:
    """The least share of right answers that a model which is right with probability `chance` reaches with a probability
    below LUCK (the upper tail of the binomial distribution); above 1 where so few samples decide nothing."""
    if chance <= 0 or samples <= 0:
        return 0.0

    def probability(right: int) -> float:
        ways = math.lgamma(samples + 1) - math.lgamma(right + 1) - math.lgamma(samples - right + 1)
        return math.exp(ways + right * math.log(chance) + (samples - right) * math.log1p(-chance))

    right, tail = samples, 0.0
    while right >= 0 and chance < 1 and (tail := tail + probability(right)) < LUCK:
        right -= 1
    return (right + 1) / samples


def required_cider(baseline: float) -> float:
    """The CIDEr-D (0 to 10) that a model must reach: three times the baseline, and at least 0.1, because the baseline
    is 0 where it says no word of any truth."""
    return max(3 * baseline, 0.1)


def report(rows: Sequence[Row], path: Path, require: bool, **more: object) -> int:
    """Prints the table and writes it, with `more`, as JSON.

    Returns:
        1 if `require` and a figure is not what it must be, which is then said on stderr; 0 otherwise.
    """
    width = max(len(row.given) for row in rows)
    print(f"{'held out':<{width}}  {'figure':<22}{'trained':>9}{'untrained':>11}{'baseline':>10}{'required':>10}")
    for row in rows:
        least = "" if row.required is None else f"{'<' if row.lower else ''}{row.required:.3f}"
        figures = f"{row.trained:>9.3f}{row.untrained:>11.3f}{row.baseline:>10.3f}{least:>10}"
        print(f"{row.given:<{width}}  {row.figure:<22}{figures}")
    failures = [
        f"{row.figure} of {row.given} is {row.trained:.3f}, {'not ' if row.lower else ''}below {row.required:.3f}"
        for row in rows
        if not row.holds
    ]
    results = {**more, "held_out": [asdict(row) for row in rows], "failures": failures}
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nfigures: {path}")
    if failures and require:
        print("error: " + "; ".join(failures), file=sys.stderr)
        return 1
    return 0
