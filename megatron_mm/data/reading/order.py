"""Which sample comes when: arithmetic on (seed, sample number), no arrays and no state.

A global sample number belongs to one dataset of the blend (`Blend`, exact proportions at every prefix); its number
within that dataset says epoch and place; a keyed permutation of the place (`Permutation`) says which row is read. So
any process can start anywhere, and a run resumed on other workers or ranks continues the same sequence.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from enum import IntEnum
from fractions import Fraction
from math import lcm

import numpy as np

from megatron_mm.config.proportions import parse_split

_ROUNDS = 8
_MAX_DENOMINATOR = 1 << 20
_LONGEST_BLOCK = 64


class Purpose(IntEnum):
    """What a key is for: its second integer, after the seed, so that no two uses share random numbers."""

    PACK = 1
    VISIT = 2
    CROP = 3
    TASK = 4
    FLIP = 5
    JITTER = 6
    HIDE = 7
    NOISE = 8
    SPLIT = 9


def keyed_generator(key: Sequence[int]) -> np.random.Generator:
    """Random numbers that depend on the key alone: non-negative integers that name what they are for."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))


def mixed(x: np.ndarray) -> np.ndarray:
    """Every output bit from every input bit: SplitMix64's finaliser (Steele et al. 2014), uint64 with wraparound."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A keyed permutation of 0 … size-1: a Feistel network on the next power of two, walked until it lands inside.

    Args:
        size: number of elements, 1 to 2^62.
        key: integers that select the permutation, each 0 to 2^64-1.
    """

    def __init__(self, size: int, key: Sequence[int]) -> None:
        if not 0 < size <= 1 << 62:
            raise ValueError(f"a permutation of {size} elements; 1 to 2^62 are possible")
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, np.uint64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        high, low = x >> self._low, x & self._low_mask
        for i, key in enumerate(self._keys):
            if i % 2 == 0:
                high = high ^ (mixed(low + key) & self._high_mask)
            else:
                low = low ^ (mixed(high + key) & self._low_mask)
        return (high << self._low) | low

    def __call__(self, index: np.ndarray | int) -> np.ndarray:
        """Images of `index` (each in 0 … size-1), int64, of the same shape."""
        out = np.asarray(index, dtype=np.int64)
        if out.size and (out.min() < 0 or out.max() >= self.size):
            raise ValueError(f"index outside 0 … {self.size - 1}")
        flat = self._network(out.astype(np.uint64).ravel())
        outside = np.flatnonzero(flat >= self.size)
        while outside.size:
            walked = self._network(flat[outside])
            flat[outside] = walked
            outside = outside[walked >= self.size]
        return flat.astype(np.int64).reshape(out.shape)


class Blend:
    """Assigns sample numbers to datasets in proportion to weights, as evenly as possible, in closed form.

    A Huffman tree over the weights; at a node whose left side has share p, the first n samples hold round(n·p) of the
    left. So the first n samples of the blend hold n·w of a dataset of weight w up to fewer than 2 samples at any n, and
    the number of a sample within its dataset comes out of the same walk.

    Args:
        weights: positive numbers, of any sum. Shares are rational with denominators up to 2^20.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or any(not 0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights of a blend must be positive numbers, not {list(weights)}")
        self.num_datasets = len(weights)
        heap: list[tuple[Fraction, int, object]] = [
            (Fraction(weight), i, i) for i, weight in enumerate(weights)
        ]
        heapq.heapify(heap)
        serial = len(heap)
        while len(heap) > 1:
            small, _, right = heapq.heappop(heap)
            large, _, left = heapq.heappop(heap)
            total = small + large
            share = (large / total).limit_denominator(_MAX_DENOMINATOR)
            heapq.heappush(heap, (total, serial, (share, left, right)))
            serial += 1
        self._tree = heap[0][2]

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset of each sample number, and the number of the sample within it; int64 arrays [n]."""
        index = np.asarray(index, dtype=np.int64)
        datasets, within = np.zeros(index.size, np.int64), np.zeros(index.size, np.int64)
        stack = [(self._tree, np.arange(index.size), index)]
        while stack:
            node, where, number = stack.pop()
            if not where.size:
                continue
            if not isinstance(node, tuple):
                datasets[where], within[where] = node, number
                continue
            share, left, right = node
            before, after = self._left_count(number, share), self._left_count(number + 1, share)
            goes_left = after > before
            stack.append((left, where[goes_left], before[goes_left]))
            stack.append((right, where[~goes_left], (number - before)[~goes_left]))
        return datasets, within

    @staticmethod
    def _left_count(number: np.ndarray, share: Fraction) -> np.ndarray:
        """round(number · share), in integers that do not overflow below 2^41 samples."""
        p, q = share.numerator, share.denominator
        return (2 * number * p + q) // (2 * q)


class TaskSchedule:
    """Which task each pool of samples learns: exact proportions, in a keyed order.

    A pool is the micro_batch_size × data-parallel size consecutive samples that share a microbatch index. Every block
    of as many pools as the shares' common denominator (at most 64) holds each task in proportion; within it the order
    is shuffled, so that tasks do not fall in step with the datasets of a blend.

    Args:
        tasks: names and weights; empty: every microbatch has the task "".
        seed: of the order.
    """

    def __init__(self, tasks: Sequence[tuple[str, float]], seed: int) -> None:
        self.names = [name for name, _ in tasks]
        self.seed = seed
        if not tasks:
            return
        self._blend = Blend([weight for _, weight in tasks])
        total = sum(Fraction(weight) for _, weight in tasks)
        shares = [(Fraction(weight) / total).limit_denominator(_MAX_DENOMINATOR) for _, weight in tasks]
        self._block = min(_LONGEST_BLOCK, lcm(*(share.denominator for share in shares)))

    def __call__(self, pool: int) -> str:
        """Task of a pool, counted from the first sample of the run."""
        if not self.names:
            return ""
        block, place = divmod(pool, self._block)
        place = Permutation(self._block, [self.seed, Purpose.TASK, block])(np.array([place]))
        return self.names[int(self._blend.locate(block * self._block + place)[0][0])]


def epoch_and_place(within: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch of a dataset's n-th sample, and its place within the epoch."""
    return np.divmod(np.asarray(within, dtype=np.int64), num_rows)


def split_documents(split: str, num_documents: int) -> list[range]:
    """Documents of train, validation and test: consecutive, rounded as Megatron rounds them."""
    bounds, total = [0], 0.0
    for share in parse_split(split):
        total += share
        bounds.append(round(total * float(num_documents)))
    return [range(bounds[i], bounds[i + 1]) for i in range(3)]
