"""megatron-core's parallel linear layers, without their detours where there is one tensor-parallel process.

There, torch's own `linear` adds the bias inside the product and runs its backward pass in C++; megatron-core's function
adds it in a pass of its own (`skip_bias_add` leaves it to a fused kernel that the local backend does not have).
Their weights may be tied to others', so they leave gradients to autograd where Transformer Engine's layers add them up.
"""

from __future__ import annotations

import copy

import torch
from megatron.core import tensor_parallel
from torch.nn import functional


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Output sharded over tensor parallelism; the bias is always added here."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **_own(kwargs))

    def forward(self, input_: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
        """[..., in] -> [..., out / TP]."""
        if self.tp_group.size() == 1:
            return functional.linear(input_, self.weight, self.bias), None
        return super().forward(input_, *args, **kwargs)


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Input sharded over tensor parallelism; the bias is added once, after the sum."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **_own(kwargs))

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[..., in / TP] -> [..., out]."""
        if self.tp_group.size() == 1:
            return functional.linear(input_, self.weight, self.bias), None
        return super().forward(input_)


def _own(options: dict) -> dict:
    """What megatron-core's constructors are told instead."""
    config = copy.copy(options["config"])
    config.gradient_accumulation_fusion = False
    return {**options, "config": config, "skip_bias_add": False}
