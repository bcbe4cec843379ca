"""Initial weights that no layout can change.

Every parameter is drawn from the CPU generator keyed by (seed, logical name, part, block). A *part* is a logical matrix
of a fused weight (gate and up of SwiGLU); a *block* is one of gcd(64, units) equal slices of the sharded dimension,
where a unit is what tensor parallelism never splits (a head, a query group, a row). A process draws only the blocks
that overlap its own slice, so no process ever holds a full matrix and every layout gets the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Init:
    """How one parameter begins; layers set it as the parameter's attribute `init`.

    Attributes:
        kind: `normal` uses std, `constant` uses value.
        parts: logical matrices stacked along the sharded dimension of every process's slice.
        units: logical units of the sharded dimension of one part over all processes; None: its rows.
        dim: the dimension that tensor parallelism shards (if the parameter's `tensor_model_parallel` is set).
    """

    kind: Literal["normal", "zeros", "ones", "constant"] = "normal"
    std: float = 0.02
    value: float = 0.0
    parts: int = 1
    units: int | None = None
    dim: int = 0


def block_generator(seed: int, name: str, part: int, block: int) -> torch.Generator:
    """CPU generator of one block of one parameter."""
    key = hashlib.blake2b(f"{seed}/{name}/{part}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


@torch.no_grad()
def initialize_parameter(
    parameter: torch.Tensor, init: Init, name: str, seed: int, tp_rank: int = 0, tp_size: int = 1
) -> None:
    """Fills one process's slice of a parameter.

    Args:
        parameter: the local slice, any floating dtype, any device but meta.
        name: logical name, equal in every layout.

    Raises:
        ValueError: the slice does not hold whole parts, or units do not divide the dimension.
    """
    if init.kind == "zeros":
        parameter.zero_()
    elif init.kind == "ones":
        parameter.fill_(1.0)
    elif init.kind == "constant":
        parameter.fill_(init.value)
    else:
        if not getattr(parameter, "tensor_model_parallel", False):
            tp_rank, tp_size = 0, 1
        if parameter.shape[init.dim] % init.parts:
            raise ValueError(f"{name}: {parameter.shape[init.dim]} rows are not {init.parts} equal parts")
        for part, target in enumerate(parameter.chunk(init.parts, dim=init.dim)):
            _fill_part(target, init, name, seed, part, tp_rank, tp_size)


def _fill_part(
    target: torch.Tensor, init: Init, name: str, seed: int, part: int, tp_rank: int, tp_size: int
) -> None:
    local = target.shape[init.dim]
    full = local * tp_size
    units = init.units or full
    if full % units:
        raise ValueError(f"{name}: {units} units do not divide {full} rows")
    blocks = math.gcd(64, units)
    size = full // blocks
    begin, end = tp_rank * local, (tp_rank + 1) * local
    shape = list(target.shape)
    shape[init.dim] = size
    for block in range(begin // size, -(-end // size)):
        drawn = torch.empty(shape).normal_(0.0, init.std, generator=block_generator(seed, name, part, block))
        low, high = max(begin, block * size), min(end, (block + 1) * size)
        piece = drawn.narrow(init.dim, low - block * size, high - low)
        target.narrow(init.dim, low - begin, high - low).copy_(piece)


def initialize_module(module: torch.nn.Module, node_name: str, seed: int, tp_rank: int = 0, tp_size: int = 1) -> None:
    """Fills every parameter of a node's module.

    Raises:
        ValueError: a parameter has no `init`.
    """
    for name, parameter in module.named_parameters():
        init = getattr(parameter, "init", None)
        if init is None:
            raise ValueError(f"parameter {node_name}.{name} does not say how it is initialised")
        initialize_parameter(parameter, init, f"{node_name}.{name}", seed, tp_rank, tp_size)
