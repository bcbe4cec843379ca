"""Names of nodes in messages and tables: what a checkpoint's key says of its node, and ranges of layers."""

from __future__ import annotations

from collections.abc import Sequence


def node_and_weight(key: str) -> tuple[str, str]:
    """A checkpoint key of any model, cut into what its node is probably called and the weight's name in it: the node is
    what ends with the last number, or the first two words."""
    words = key.split(".")
    last = max((at for at, word in enumerate(words[:-1]) if word.isdigit()), default=min(1, len(words) - 2))
    return ".".join(words[: last + 1]), ".".join(words[last + 1 :])


def collapsed(names: Sequence[str]) -> list[str]:
    """Names that differ in their last number only as ranges, in the order of their first: `vision.layers.0-31`."""
    found: dict[tuple[str, str], list[int]] = {}
    for name in names:
        words = name.split(".")
        at = next((at for at in reversed(range(len(words))) if words[at].isdigit()), len(words))
        key = (".".join(words[:at]), ".".join(words[at + 1 :]))
        found.setdefault(key, []).extend(int(word) for word in words[at : at + 1])
    return [
        ".".join(part for part in (before, ranges(numbers), after) if part)
        for (before, after), numbers in found.items()
    ]


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as in `0-3,7`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
