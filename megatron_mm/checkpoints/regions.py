"""Rectangular regions of tensors: what a process holds, writes and reads of one, in the coordinates of the whole.

A piece of a flattened tensor, such as a shard of the distributed optimizer, is a few rectangles, so that a checkpoint
knows nothing of the layout that wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Coordinates = tuple[int, ...]
Region = tuple[Coordinates, Coordinates]
"""(first index, size) in each dimension."""


def rectangles(sizes: Sequence[int], begin: int, end: int) -> Iterator[Region]:
    """The regions that elements `begin` to `end` of a flattened (row-major) tensor fill, in that order.

    At most 2N - 1 for N dimensions; each is contiguous.
    """
    if begin >= end:
        return
    if not sizes:
        yield (), ()
        return
    if len(sizes) == 1:
        yield (begin,), (end - begin,)
        return
    row = math.prod(sizes[1:])
    first, last = -(-begin // row), end // row
    if first > last:  # within one row
        yield from _within(sizes, last, begin - last * row, end - last * row)
        return
    if begin < first * row:
        yield from _within(sizes, first - 1, begin - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in sizes[1:])), (last - first, *sizes[1:])
    if last * row < end:
        yield from _within(sizes, last, 0, end - last * row)


def _within(sizes: Sequence[int], row: int, begin: int, end: int) -> Iterator[Region]:
    for offsets, extents in rectangles(sizes[1:], begin, end):
        yield (row, *offsets), (1, *extents)


def overlap(one: Region, other: Region) -> Region | None:
    """What two regions of a tensor share, or None."""
    begins = tuple(max(a, b) for a, b in zip(one[0], other[0]))
    sizes = tuple(min(a + m, b + n) - begin for a, m, b, n, begin in zip(one[0], one[1], other[0], other[1], begins))
    return (begins, sizes) if all(size > 0 for size in sizes) else None


def slices(region: Region, within: Region) -> tuple[slice, ...]:
    """Where a region lies in a tensor that holds `within`."""
    return tuple(slice(at - base, at - base + size) for at, size, base in zip(*region, within[0]))


def flat_range(region: Region, within: Region) -> tuple[int, int]:
    """First element, and one past the last, of a region in a flattened tensor that holds `within`."""
    first = last = 0
    for at, size, base, extent in zip(*region, *within):
        first = first * extent + at - base
        last = last * extent + at - base + size - 1
    return first, last + 1


def tile(pieces: Sequence[Region], shape: Sequence[int]) -> bool:
    """Whether regions cover a whole tensor, each element once."""
    if sum(math.prod(sizes) for _, sizes in pieces) != math.prod(shape):
        return False
    if any(at < 0 or at + size > most for piece in pieces for at, size, most in zip(*piece, shape)):
        return False
    # Of the right volume in all: they cover everything unless two overlap, which neighbours in order would show.
    ordered = sorted(pieces)
    return all(
        overlap(piece, other) is None
        for number, piece in enumerate(ordered)
        for other in _near(ordered, number)
    )  # fmt: skip


def _near(ordered: Sequence[Region], number: int) -> Iterator[Region]:
    """Regions after one, in order of their first index, that may overlap with it."""
    offsets, sizes = ordered[number]
    for other in ordered[number + 1 :]:
        if offsets and other[0][0] >= offsets[0] + sizes[0]:
            return
        yield other
