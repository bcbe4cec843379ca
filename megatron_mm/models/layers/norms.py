"""LayerNorm and RMSNorm of the local backend: plain torch, but aware of sequence parallelism.

megatron-core's torch wrapper refuses sequence parallel. A norm whose input is a sequence shard has a partial weight
gradient on each tensor-parallel process; the attribute `sequence_parallel` asks megatron-core to sum it.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional

from megatron_mm.models.layers.elementwise import rms_norm
from megatron_mm.models.layers.parameters import empty_parameter


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, as the configuration says."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(hidden_size, dtype=config.params_dtype)
        names = ["weight"]
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = empty_parameter(hidden_size, dtype=config.params_dtype)
            names.append("bias")
        for name in names:
            getattr(self, name).sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as `hidden`."""
        if self.bias is None:
            return rms_norm(hidden, self.weight, self.eps)
        return functional.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)
