"""How evenly cuts divide the times of nodes among the chunks of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def slowest(times: Sequence[float], cuts: Sequence[int]) -> float:
    """Time of the slowest chunk."""
    return max(sum(times[low:high]) for low, high in pairwise(cuts))


def slowest_over_mean(times: Sequence[float], cuts: Sequence[int]) -> float:
    """The slowest chunk over the mean of all, where the cuts hold every node."""
    return slowest(times, cuts) * (len(cuts) - 1) / sum(times)
