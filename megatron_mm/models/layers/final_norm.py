"""The norm that ends a stack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, NodeCost
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import StackWork, copies
from megatron_mm.models.layers.parameters import describe
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import Sequences
from megatron_mm.models.names import Entry, norm


class FinalNorm(nn.Module):
    """The norm, whole on every process; several streams pass the same."""

    def __init__(self, settings: LayerSettings, shape: StackShape) -> None:
        super().__init__()
        self.final_layernorm = backend_of(settings).norm(
            layer_config(settings, shape, sharded=False), shape.hidden_size
        )

    def forward(self, *inputs: torch.Tensor | ForwardContext) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """(stream, …, context) -> each stream, normalised."""
        written = tuple(self.final_layernorm(stream) for stream in inputs[:-1])
        return written if len(written) > 1 else written[0]


@dataclass(frozen=True)
class FinalNormKind:
    """The LayerNorm of a tower; exported under the node's exported name.

    Attributes:
        sequences: (sequences, length) of each stream, in a microbatch.
    """

    settings: LayerSettings
    shape: StackShape
    sequences: Sequences

    def build(self) -> nn.Module:
        """The module."""
        return describe(FinalNorm(self.settings, self.shape), init_std=self.shape.init_std)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """No products; its input is kept."""
        positions = sum(sequences * length for sequences, length in self.sequences(plan))
        width, everywhere = self.shape.hidden_size, copies(self.settings.sizes, sharded=False)
        work = (StackWork(self.settings).norm(positions, width),)
        return NodeCost(2 * width, work, 2.0 * positions * width * everywhere, self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Weight and bias."""
        yield from norm(f"{node}.final_layernorm", exported, self.shape.hidden_size, bias=True)
