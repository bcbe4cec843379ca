"""Where the list of nodes is cut into pipeline chunks.

`balance` finds the contiguous cut whose slowest chunk is fastest, by dynamic programming over node costs, and among
those the one with the smallest sum of squares. `cuts_by_name` takes the user's own cut. `bottleneck` says in words
which nodes prevent a better one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from megatron_mm.models.graph import Graph

#: May chunk number c hold nodes start … stop-1? (memory limits)
Fits = Callable[[int, int, int], bool]


class NothingFits(ValueError):
    """Every cut has a chunk that may not be."""


def balance(costs: Sequence[float], chunks: int, fits: Fits | None = None) -> list[int]:
    """Positions of chunk beginnings and the end: [0, …, len(costs)], strictly increasing.

    Args:
        costs: time of each node (any unit).
        chunks: number of chunks, each with at least one node.
        fits: whether a chunk may hold a range of nodes; None: always.

    Raises:
        ValueError: fewer nodes than chunks.
        NothingFits: as it says.
    """
    count = len(costs)
    if count < chunks:
        raise ValueError(f"{count} nodes cannot fill {chunks} pipeline chunks; use fewer stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    slowest = _solve(count, chunks, fits, lambda low, high: total[high] - total[low], max)[0]
    limit = slowest * (1 + 1e-12)

    def square(low: int, high: int) -> float:
        span = total[high] - total[low]
        return span * span if span <= limit else float("inf")

    return _solve(count, chunks, fits, square, lambda left, right: left + right)[1]


def _solve(count, chunks, fits, cost, join) -> tuple[float, list[int]]:
    """Best joined cost of cutting [0, count) into chunks, with the cut."""
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for chunk in range(chunks):
        row: dict[int, tuple[float, int]] = {}
        last = chunk == chunks - 1
        for stop in [count] if last else range(chunk + 1, count - (chunks - chunk - 1) + 1):
            for start, (value, _) in best[chunk].items():
                if start >= stop or (fits is not None and not fits(chunk, start, stop)):
                    continue
                joined = join(value, cost(start, stop))
                if joined < row.get(stop, (float("inf"), 0))[0]:
                    row[stop] = (joined, start)
        if not row:
            raise NothingFits(f"no cut into {chunks} chunks fits")
        best.append(row)
    cuts = [count]
    for chunk in range(chunks, 0, -1):
        cuts.append(best[chunk][cuts[-1]][1])
    return best[chunks][count][0], cuts[::-1]


def cuts_by_name(graph: Graph, beginnings: Sequence[str], chunks: int) -> list[int]:
    """The user's cut: names of the nodes that begin chunks 2, 3, ….

    Raises:
        ValueError: an unknown name, the wrong number of names, or names out of order.
    """
    names = [node.name for node in graph.nodes]
    if len(beginnings) != chunks - 1:
        raise ValueError(f"parallel.pipeline_cuts names {len(beginnings)} nodes; {chunks} chunks need {chunks - 1}")
    for name in beginnings:
        if name not in names:
            raise ValueError(f"parallel.pipeline_cuts: there is no node {name!r}; the nodes are {', '.join(names)}")
    cuts = [0, *(names.index(name) for name in beginnings), len(names)]
    if any(left >= right for left, right in pairwise(cuts)):
        raise ValueError(f"parallel.pipeline_cuts must follow the order of the nodes: {', '.join(names)}")
    return cuts


def bottleneck(names: Sequence[str], costs: Sequence[float], cuts: Sequence[int]) -> str:
    """Which chunk is slowest and why none of its nodes can leave it."""
    loads = [sum(costs[low:high]) for low, high in pairwise(cuts)]
    slowest = max(range(len(loads)), key=loads.__getitem__)
    mean = sum(loads) / len(loads)
    low, high = cuts[slowest], cuts[slowest + 1]
    inside = names[low] if high - low == 1 else f"{names[low]} … {names[high - 1]}"
    text = f"chunk {slowest} ({inside}) takes {loads[slowest] / mean:.3f} x the mean"
    if high - low == 1:
        return f"{text}; it is one node, and nodes are never cut"
    reasons = []
    for neighbour, node in ((slowest - 1, low), (slowest + 1, high - 1)):
        if 0 <= neighbour < len(loads):
            moved = (loads[neighbour] + costs[node]) / mean
            reasons.append(f"{names[node]} in chunk {neighbour} would make that {moved:.3f}")
    return f"{text}; {'; '.join(reasons)}" if reasons else text
