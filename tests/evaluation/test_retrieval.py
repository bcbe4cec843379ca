"""Recall@K against rankings worked out by hand, chance against random embeddings."""

import pytest
import torch

from megatron_mm.objectives.retrieval import ranks, score_both_directions, score_retrieval


def test_orthogonal_pairs_are_found_and_a_rotation_of_the_candidates_is_not():
    basis = torch.eye(12)
    forward, backward = score_both_directions(basis, 3.0 * basis, list(range(12)))
    for scores in (forward, backward):
        assert (scores.recall_at_1, scores.recall_at_10, scores.median_rank) == (1.0, 1.0, 1.0)
        assert scores.chance == pytest.approx(1 / 12) and scores.queries == scores.candidates == 12
    # The right candidate scores 0 like ten wrong ones, and one wrong one scores 1: rank 12, for ties are lost.
    turned = score_retrieval(basis, basis.roll(1, 0), list(range(12)), list(range(12)))
    assert (turned.recall_at_1, turned.recall_at_10, turned.median_rank) == (0.0, 0.0, 12.0)


def test_ranks_on_a_circle_are_closed_form():
    # Query i at angle i·10°, candidates at i·10° + 14°: candidate i-1 is 4° away, i-2 is 6° away, the right one 14°,
    # and i-3 16°: so rank 3 where both nearer ones exist.
    angles = torch.arange(18) * torch.pi / 18
    shift = 14 * torch.pi / 180
    queries = torch.stack((angles.cos(), angles.sin()), dim=1)
    candidates = torch.stack(((angles + shift).cos(), (angles + shift).sin()), dim=1)
    labels = list(range(18))
    assert ranks(queries, candidates, labels, labels).tolist() == [1, 2] + [3] * 16
    scores = score_retrieval(queries, candidates, labels, labels)
    assert scores.recall_at_1 == pytest.approx(1 / 18) and scores.recall_at_5 == 1.0 and scores.median_rank == 3.0


def test_the_two_directions_differ():
    first = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    second = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    forward, backward = score_both_directions(first, second, ["a", "b", "c"])
    assert forward.recall_at_1 == pytest.approx(2 / 3)  # the second query is nearest to the first candidate
    assert backward.recall_at_1 == pytest.approx(2 / 3)
    assert ranks(second, first, ["a", "b", "c"], ["a", "b", "c"]).tolist() == [1, 2, 1]


def test_equal_labels_are_right_for_each_other_and_count_in_chance():
    first = torch.eye(4)
    second = first[[1, 0, 2, 3]]
    scores = score_retrieval(first, second, ["x", "x", "y", "z"], ["x", "x", "y", "z"])
    assert scores.recall_at_1 == 1.0
    assert scores.chance == pytest.approx((2 + 2 + 1 + 1) / 4 / 4)


def test_collapsed_embeddings_score_nothing_and_random_ones_chance():
    ones = torch.ones(20, 3)
    assert score_retrieval(ones, ones, range(20), range(20)).recall_at_10 == 0.0
    torch.manual_seed(0)
    scores = score_retrieval(torch.randn(2500, 8), torch.randn(50, 8), [i % 50 for i in range(2500)], range(50))
    assert scores.recall_at_1 == pytest.approx(1 / 50, abs=0.01) and scores.chance == pytest.approx(1 / 50)
    assert scores.recall_at_5 == pytest.approx(5 / 50, abs=0.02)


def test_what_cannot_be_scored_is_named():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="0 queries"):
        ranks(eye[:0], eye, [], ["a", "b"])
    with pytest.raises(ValueError, match="labelled 'c'"):
        ranks(eye, eye, ["a", "c"], ["a", "b"])
    with pytest.raises(ValueError, match="not finite"):
        ranks(eye * torch.nan, eye, ["a", "b"], ["a", "b"])
