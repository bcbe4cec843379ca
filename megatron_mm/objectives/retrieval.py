"""Retrieval between two modalities: recall@K in both directions, and the rank at which the right one stands.

Embeddings are compared by cosine. Items that share a label (the same caption under two pictures) are right answers for
each other, as several captions of one picture are in COCO; a tie with a wrong item counts as lost, so embeddings that
have collapsed to a point score 0 instead of chance.

Shape suffixes: N queries, M candidates, E width of the shared space.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

_CHUNK = 1024  # queries compared at once: bounds memory to _CHUNK x candidates


@dataclass(frozen=True)
class RetrievalScores:
    """One direction, over all queries."""

    queries: int
    candidates: int
    recall_at_1: float
    """Share of queries whose nearest candidate is right, 0 to 1."""
    recall_at_5: float
    recall_at_10: float
    median_rank: float
    """Median rank of the best right candidate, from 1."""
    chance: float
    """Recall@1 of a random order."""


def ranks(
    queries_NE: torch.Tensor,
    candidates_ME: torch.Tensor,
    query_labels: Sequence[Hashable],
    candidate_labels: Sequence[Hashable],
) -> torch.Tensor:
    """Rank from 1 of each query's best right candidate: one more than the wrong candidates at least as near.

    Args:
        queries_NE, candidates_ME: of any length, compared in fp64 so that near ties are what they are.
        query_labels, candidate_labels: a candidate is right for a query with an equal label.

    Returns:
        int64 [N].

    Raises:
        ValueError: no queries, other numbers of labels than embeddings, a query without right candidate, or embeddings
            that are not finite.
    """
    if not len(queries_NE) or len(queries_NE) != len(query_labels) or len(candidates_ME) != len(candidate_labels):
        raise ValueError(
            f"{len(queries_NE)} queries with {len(query_labels)} labels and {len(candidates_ME)} candidates with "
            f"{len(candidate_labels)}: there must be a label for each, and some queries"
        )
    numbers = {label: number for number, label in enumerate(dict.fromkeys(candidate_labels))}
    for label in query_labels:
        if label not in numbers:
            raise ValueError(f"no candidate is right for the query labelled {label!r}")
    queries = functional.normalize(queries_NE.double(), dim=-1)
    candidates = functional.normalize(candidates_ME.double(), dim=-1)
    if not (torch.isfinite(queries).all() and torch.isfinite(candidates).all()):
        raise ValueError("embeddings hold values that are not finite")
    wanted = torch.tensor([numbers[label] for label in query_labels])
    owned = torch.tensor([numbers[label] for label in candidate_labels])
    found = []
    for start in range(0, len(queries), _CHUNK):
        scores = queries[start : start + _CHUNK] @ candidates.t()
        right = wanted[start : start + _CHUNK, None] == owned[None]
        best = scores.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True).values
        found.append(((scores >= best) & ~right).sum(dim=1) + 1)
    return torch.cat(found)


def recall_at(ranks_N: torch.Tensor, k: int) -> float:
    """Share of queries whose right candidate stands among the first k."""
    return (ranks_N <= k).double().mean().item()


def score_retrieval(
    queries_NE: torch.Tensor,
    candidates_ME: torch.Tensor,
    query_labels: Sequence[Hashable],
    candidate_labels: Sequence[Hashable],
) -> RetrievalScores:
    """One direction; raises as `ranks`."""
    ranks_N = ranks(queries_NE, candidates_ME, query_labels, candidate_labels)
    count: dict[Hashable, int] = {}
    for label in candidate_labels:
        count[label] = count.get(label, 0) + 1
    right = sum(count[label] for label in query_labels) / len(query_labels)
    return RetrievalScores(
        queries=len(query_labels),
        candidates=len(candidate_labels),
        recall_at_1=recall_at(ranks_N, 1),
        recall_at_5=recall_at(ranks_N, 5),
        recall_at_10=recall_at(ranks_N, 10),
        median_rank=ranks_N.double().quantile(0.5).item(),
        chance=right / len(candidate_labels),
    )


def score_both_directions(
    first_NE: torch.Tensor, second_NE: torch.Tensor, labels: Sequence[Hashable]
) -> tuple[RetrievalScores, RetrievalScores]:
    """Pairs, row by row: first → second and second → first.

    Args:
        first_NE, second_NE: embeddings of the two sides of each pair.
        labels: of each pair; pairs with equal labels are interchangeable.
    """
    return (
        score_retrieval(first_NE, second_NE, labels, labels),
        score_retrieval(second_NE, first_NE, labels, labels),
    )
