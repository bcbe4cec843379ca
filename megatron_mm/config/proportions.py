"""Shares of train, validation and test documents, as Megatron writes them."""

from __future__ import annotations


def parse_split(split: str, field: str | None = None) -> tuple[float, float, float]:
    """Normalised shares of train, validation and test documents from "969,30,1".

    Args:
        field: names it in messages.

    Raises:
        ValueError: not one to three non-negative numbers with a positive sum.
    """
    try:
        parts = [float(part) for part in split.replace("/", ",").split(",") if part.strip()]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or any(not 0 <= part < float("inf") for part in parts) or sum(parts) <= 0:
        named = f"{field}: " if field else ""
        raise ValueError(f'{named}"{split}" must be up to three proportions, such as "969,30,1"')
    parts += [0.0] * (3 - len(parts))
    total = sum(parts)
    return parts[0] / total, parts[1] / total, parts[2] / total
