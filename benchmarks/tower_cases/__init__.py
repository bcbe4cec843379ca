"""What benchmarks/towers.py measures: for each tower one module here with `build(smoke: bool) -> TowerCase`.

A case holds two towers of the same shape with the same weights and the same inputs, already in memory: the training
path's nodes on one process, and the peer's module (Hugging Face, with its SDPA attention where it has one). The
benchmark imports a case as `benchmarks.tower_cases.NAME`, after megatron-core's groups of size 1 exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TowerCase:
    """Two sides of one comparison.

    Attributes:
        name: what is compared, with its sizes, for the table.
        ours, theirs: set gradients to None, run forward in training mode without dropout, and return the output, the
            same numbers from both sides; the benchmark differentiates its sum.
    """

    name: str
    ours: Callable[[], torch.Tensor]
    theirs: Callable[[], torch.Tensor]
