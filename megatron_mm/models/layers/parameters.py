"""Tells every parameter of a node how it is sharded and how it begins.

megatron-core sets a weight's tensor-parallel attributes while it initialises it, which its constructors do not do here
(see `settings.layer_config`), so they are set after construction, together with `init`, which
`models/initialization.py` reads.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from megatron_mm.models.initialization import Init

#: Module names whose weight ends a residual branch and starts smaller, by 1/sqrt(2 · layers) (GPT-2).
_OUTPUT_PROJECTIONS = ("linear_proj", "linear_fc2")


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter on the platform's current device (meta in a dry run), not yet filled."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=torch.cuda.current_device()))


def shard(parameter: nn.Parameter, dim: int | None, stride: int = 1) -> None:
    """Sets megatron-core's tensor-parallel attributes; `dim` None: every process holds the whole parameter."""
    parameter.tensor_model_parallel = dim is not None
    parameter.partition_dim = -1 if dim is None else dim
    parameter.partition_stride = stride


def describe(
    module: nn.Module,
    *,
    init_std: float,
    num_layers: int = 1,
    column: dict[str, int | None] | None = None,
    row: dict[str, int | None] | None = None,
    gated: tuple[str, ...] = (),
    constants: dict[str, float] | None = None,
) -> nn.Module:
    """Sets sharding attributes and `init` of every parameter of `module`, and returns it.

    Args:
        init_std: deviation of matrices.
        num_layers: depth of the stack, for the output projections.
        column: modules (last name) sharded on dimension 0, with the logical units of that dimension (None: rows).
        row: modules sharded on dimension 1, likewise.
        gated: column modules that stack two matrices, gate and up.
        constants: parameters (last name) that begin with a constant.

    Raises:
        ValueError: a name that no parameter has; its weight would be whole on every process, or begin otherwise.
    """
    column, row, constants = column or {}, row or {}, constants or {}
    unknown = {*column, *row, *gated, *constants}
    for name, parameter in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        owner = owner.rpartition(".")[2]
        unknown -= {owner, kind}
        norm = "layernorm" in owner or kind.startswith("layer_norm_")
        parts = 2 if owner in gated and not norm else 1
        dim = None
        if not norm and owner in column:
            dim = 0
        elif owner in row and kind == "weight":
            dim = 1
        shard(parameter, dim, parts)
        if kind in constants:
            parameter.init = Init("constant", value=constants[kind])
        elif kind.endswith("bias"):
            parameter.init = Init("zeros")
        elif norm:
            parameter.init = Init("ones")
        else:
            std = init_std / math.sqrt(2 * num_layers) if owner in _OUTPUT_PROJECTIONS else init_std
            units = column.get(owner) if dim == 0 else row.get(owner) if dim == 1 else None
            parameter.init = Init("normal", std=std, parts=parts, units=units, dim=dim or 0)
    if unknown:
        raise ValueError(f"{type(module).__name__} has no parameter of {', '.join(sorted(unknown))}")
    return module
