"""Permutations, blends and splits against closed forms and statistics."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megatron_mm.config.proportions import parse_split
from megatron_mm.data.reading.order import Blend, Permutation, TaskSchedule, split_documents

pytestmark = pytest.mark.interface


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65537])
def test_permutation_visits_everything_once(size):
    out = Permutation(size, [1, 2])(np.arange(size))
    assert np.array_equal(np.sort(out), np.arange(size))
    if size >= 1000:
        assert not np.array_equal(out, Permutation(size, [1, 3])(np.arange(size)))
        assert abs(np.corrcoef(out, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
    one_by_one = [int(Permutation(size, [1, 2])(i)) for i in range(min(size, 20))]
    assert one_by_one == out[:20].tolist(), "no state: an index alone gives the same"


def test_permutation_is_uniform_and_keys_are_independent():
    """The image of a fixed index over many keys is uniform, and so is the distance of two neighbours' images."""
    size, keys = 30, 3000
    images = np.array([Permutation(size, [k])(np.array([4, 5])) for k in range(keys)])
    for column in (images[:, 0], images[:, 1]):
        assert stats.chisquare(np.bincount(column, minlength=size)).pvalue > 1e-4
    distance = (images[:, 1] - images[:, 0]) % size
    assert stats.chisquare(np.bincount(distance, minlength=size)[1:]).pvalue > 1e-4


def test_permutation_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="outside"):
        Permutation(5, [0])(5)
    with pytest.raises(ValueError, match="0 elements"):
        Permutation(0, [0])


@pytest.mark.parametrize(
    "weights", [[1], [1, 1], [0.7, 0.3], [1, 2, 3, 4], [0.98, 0.01, 0.01], [5, 1, 1, 1, 1, 1, 1, 3e-3]]
)
def test_blend_has_exact_proportions_at_every_prefix(weights):
    count = 5000
    datasets, within = Blend(weights).locate(np.arange(count))
    shares = np.array(weights) / sum(weights)
    for d, share in enumerate(shares):
        here = datasets == d
        assert np.array_equal(within[here], np.arange(here.sum())), "each dataset is read in order, without gaps"
        prefix = np.cumsum(here)
        assert np.abs(prefix - share * np.arange(1, count + 1)).max() < 2


def test_blend_needs_no_history():
    blend = Blend([3, 1, 0.5])
    datasets, within = blend.locate(np.arange(1000))
    for i in (0, 17, 999):
        d, w = blend.locate(np.array([i]))
        assert (d[0], w[0]) == (datasets[i], within[i])
    far, number = blend.locate(np.array([10**11]))
    assert 0 <= far[0] < 3 and abs(number[0] - 10**11 * [3, 1, 0.5][far[0]] / 4.5) < 1e11 * 1e-6
    with pytest.raises(ValueError, match="positive"):
        Blend([1, 0])


@pytest.mark.parametrize("split", ["969,30,1", "90,10", "1", "0.5,0.25,0.25", "0,100,0"])
@pytest.mark.parametrize("documents", [1, 7, 100, 12345])
def test_split_is_megatrons(split, documents):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    ours = split_documents(split, documents)
    for part, bounds in zip(ours, matrix):
        if bounds is None:
            assert len(part) == 0
        else:
            assert part == range(round(bounds[0] * documents), round(bounds[1] * documents))


@pytest.mark.parametrize("split", ["", "a,b", "-1,2", "1,2,3,4", "0,0,0"])
def test_bad_split(split):
    with pytest.raises(ValueError, match=r"--split: .* must be up to three proportions"):
        parse_split(split, "--split")


@pytest.mark.parametrize(
    ("tasks", "block"),
    [((("a", 0.5), ("b", 0.5)), 2), ((("a", 0.3), ("b", 0.7)), 10), ((("a", 1), ("b", 2), ("c", 5)), 8)],
)
def test_tasks_have_exact_proportions_in_a_keyed_order(tasks, block):
    schedule, total = TaskSchedule(tasks, seed=3), sum(weight for _, weight in tasks)
    names = [schedule(pool) for pool in range(40 * block)]
    for start in range(0, len(names), block):
        counts = [names[start : start + block].count(name) for name, _ in tasks]
        assert counts == pytest.approx([weight / total * block for _, weight in tasks])
    assert len({tuple(names[start : start + block]) for start in range(0, len(names), block)}) > 1
    assert names == [TaskSchedule(tasks, seed=3)(pool) for pool in range(40 * block)], "no state"
    assert names != [TaskSchedule(tasks, seed=4)(pool) for pool in range(40 * block)]


def test_tasks_do_not_fall_in_step_with_a_blend():
    """With one sample a pool, two datasets and two tasks in equal shares: every pair comes up."""
    schedule = TaskSchedule((("a", 0.5), ("b", 0.5)), seed=1)
    datasets, _ = Blend([1, 1]).locate(np.arange(2000))
    both = {(int(dataset), schedule(pool)) for pool, dataset in enumerate(datasets[:200])}
    assert len(both) == 4
    share = np.mean([schedule(pool) == "a" for pool in range(2000) if datasets[pool] == 0])
    assert 0.4 < share < 0.6


def test_tasks_of_irrational_shares_and_none():
    schedule = TaskSchedule((("a", 2**0.5), ("b", 1.0)), seed=0)
    share = np.mean([schedule(pool) == "a" for pool in range(2000)])
    assert abs(share - 2**0.5 / (1 + 2**0.5)) < 0.002
    assert TaskSchedule((), seed=0)(17) == ""
    with pytest.raises(ValueError, match="positive"):
        TaskSchedule((("a", 0.0), ("b", 0.0)), seed=0)
