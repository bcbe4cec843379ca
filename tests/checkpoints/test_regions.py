"""Regions of tensors. Truth: numpy's own indexing of whole tensors, of 0 to 4 dimensions, some of them empty."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from megatron_mm.checkpoints.regions import Region, flat_range, overlap, rectangles, slices, tile


def shapes(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    dice = random.Random(seed)
    drawn = [tuple(dice.randint(0, 5) for _ in range(dice.randint(0, 4))) for _ in range(count)]
    return [(), (0,), (1,), (2, 0, 3), *drawn]


def random_region(shape: tuple[int, ...], dice: random.Random) -> Region:
    offsets = tuple(dice.randint(0, size) for size in shape)
    return offsets, tuple(dice.randint(0, size - at) for size, at in zip(shape, offsets))


def mask(shape: tuple[int, ...], region: Region) -> np.ndarray:
    found = np.zeros(shape, bool)
    found[tuple(slice(at, at + size) for at, size in zip(*region))] = True
    return found


@pytest.mark.parametrize("shape", shapes(30), ids=str)
def test_rectangles_are_a_stretch_of_the_flattened_tensor(shape):
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    for begin, end in itertools.combinations_with_replacement(range(min(whole.size, 40) + 1), 2):
        found = list(rectangles(shape, begin, end))
        pieces = [whole[slices(region, ((0,) * len(shape), shape))] for region in found]
        assert [piece.shape for piece in pieces] == [sizes for _, sizes in found]
        values = np.concatenate([piece.reshape(-1) for piece in pieces]) if pieces else np.empty(0)
        assert values.tolist() == list(range(begin, end)), "each element once, in order"
        assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("shape", shapes(30, seed=1), ids=str)
def test_overlap_and_places_in_it(shape):
    dice = random.Random(str(shape))
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    for _ in range(60):
        one, other = random_region(shape, dice), random_region(shape, dice)
        both = mask(shape, one) & mask(shape, other)
        common = overlap(one, other)
        assert overlap(other, one) == common
        assert (common is None) == (not both.any())
        if common is not None:
            assert (mask(shape, common) == both).all()
            own = numbers[tuple(slice(at, at + size) for at, size in zip(*one))]
            there = numbers[tuple(slice(at, at + size) for at, size in zip(*common))]
            assert own[slices(common, one)].tolist() == there.tolist()
            first, last = flat_range(common, one)
            wanted = np.flatnonzero(np.isin(own.reshape(-1), numbers[both]))
            assert (first, last) == (wanted[0], wanted[-1] + 1)


def cut(region: Region, times: int, dice: random.Random) -> list[Region]:
    """A region cut in two, and its parts again."""
    if times == 0 or max(region[1], default=0) < 2:
        return [region]
    axis = dice.choice([axis for axis, size in enumerate(region[1]) if size >= 2])
    at = dice.randint(1, region[1][axis] - 1)

    def part(first: int, size: int) -> Region:
        offsets, sizes = list(region[0]), list(region[1])
        offsets[axis], sizes[axis] = offsets[axis] + first, size
        return tuple(offsets), tuple(sizes)

    return [
        piece for half in (part(0, at), part(at, region[1][axis] - at)) for piece in cut(half, times - 1, dice)
    ]  # fmt: skip


@pytest.mark.parametrize("shape", shapes(60, seed=2), ids=str)
def test_tiles_cover_each_element_once(shape):
    dice = random.Random(str(shape))
    pieces = cut(((0,) * len(shape), shape), 3, dice)
    dice.shuffle(pieces)
    assert tile(pieces, shape)
    if np.prod(shape) == 0:
        return
    assert not tile(pieces[1:], shape), "a piece lacks"
    assert not tile([*pieces, pieces[0]], shape), "a piece is there twice"
    for number, (offsets, sizes) in enumerate(pieces):
        for axis in range(len(shape)):
            for by in (-1, 1):
                moved = (*offsets[:axis], offsets[axis] + by, *offsets[axis + 1 :]), sizes
                others = [*pieces[:number], moved, *pieces[number + 1 :]]
                assert not tile(others, shape), "a piece lies elsewhere"
