"""What a checkpoint states of its tensors, held against its files before memory is taken for any of it.

An index or a list of records may have come from elsewhere, right checksums included: a size in it is a number that
somebody wrote. Whatever passes here takes no more memory than the files have bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megatron_mm.checkpoints.regions import Region

#: Dimensions of a tensor; torch's iterators take no more.
_MAX_DIMENSIONS = 64
_MAX_VALUES = 1 << 62


def sizes(stated: Any, what: str) -> tuple[int, ...]:
    """A shape, or a first index.

    Raises:
        ValueError: it is none that a tensor can have.
    """
    found = tuple(stated)
    if len(found) > _MAX_DIMENSIONS or not all(type(size) is int and size >= 0 for size in found):
        raise ValueError(f"{what} {found[:_MAX_DIMENSIONS]}")
    if math.prod(size or 1 for size in found) > _MAX_VALUES:
        raise ValueError(f"{what} {found}, which no machine holds")
    return found


def region(shape: tuple[int, ...], offsets: Any, extents: Any) -> Region:
    """A piece of a tensor.

    Raises:
        ValueError: it lies outside the tensor.
    """
    found = sizes(offsets, "a piece at"), sizes(extents, "a piece of")
    if {len(found[0]), len(found[1])} != {len(shape)} or any(
        begin + extent > most for begin, extent, most in zip(*found, shape)
    ):
        raise ValueError(f"a piece of {found[1]} at {found[0]} of a tensor of {shape}")
    return found


def within_file(stretches: Iterable[tuple[int, int]], size: int) -> None:
    """Raises ValueError unless pieces lie in a file, each byte in at most one.

    Args:
        stretches: first byte and length of each piece.
        size: of the file, in bytes.
    """
    end = 0
    for at, length in sorted(stretches):
        if type(at) is not int or type(length) is not int or at < end or length < 0 or at + length > size:
            raise ValueError(f"a piece of {length} bytes at byte {at}, of {size} in the file, after one up to {end}")
        end = at + length
