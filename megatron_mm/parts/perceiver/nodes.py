"""The latent transformer that joins modalities, as nodes (Perceiver IO, arXiv:2107.14795).

`perceiver.latents` → `perceiver.blocks.k.cross` → `perceiver.blocks.k.layers.j`, on the stream `latents` [B, L, D]: one
set of learned latents a pair of image and text (or whatever a system pairs). Each block reads the stream `pair_memory`
[B, M, W] under `pair_mask` [B, M] (1 is visible) and then thinks about it in self-attention layers; weights are not
shared between blocks. `perceiver.queries` turns the latents of the first pairs into outputs, one a learned query. All
of it is whole on every context-parallel process and never sequence-parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import whole_plan
from megatron_mm.models.layers.costs import StackWork
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.perceiver import (
    LatentLayerKind,
    QueryBlockKind,
)
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.models.layers.transformer import StackLayerKind
from megatron_mm.models.names import VIT, Entry, plain
from megatron_mm.parts.perceiver.section import PerceiverConfig

Count = Callable[[MicrobatchPlan], int]


class Latents(nn.Module):
    """The learned latents, once for each pair."""

    def __init__(self, config: PerceiverConfig, settings: LayerSettings, pairs: Count) -> None:
        super().__init__()
        self.pairs = pairs
        self.latents = empty_parameter(config.num_latents, config.hidden_size, dtype=settings.dtype)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """[B, L, D]."""
        return self.latents.repeat(self.pairs(context.batch.plan), 1, 1)


def latent_shape(config: PerceiverConfig, init_std: float) -> StackShape:
    """The latent transformer as a stack of layers; cross-attention layers count as well."""
    return StackShape.of(
        config,
        num_layers=config.num_blocks * (1 + config.layers_per_block),
        normalization="LayerNorm",
        norm_epsilon=config.layernorm_epsilon,
        activation=functional.gelu,
        init_std=init_std,
    )


@dataclass(frozen=True)
class LatentsKind:
    """The latents, the same for every pair."""

    config: PerceiverConfig
    settings: LayerSettings
    init_std: float
    pairs: Count

    def build(self) -> nn.Module:
        """The module."""
        return describe(Latents(self.config, self.settings, self.pairs), init_std=self.init_std)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """No products."""
        table = self.config.num_latents * self.config.hidden_size
        repeated = StackWork(self.settings).moved((1 + self.pairs(plan)) * table, "latents")
        return NodeCost(table, (repeated,), processes=self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """The table."""
        yield plain(f"{node}.latents", f"{exported}.latents", self.config.num_latents, self.config.hidden_size)


def perceiver_nodes(
    config: PerceiverConfig,
    settings: LayerSettings,
    init_std: float,
    exported: str = "perceiver",
    *,
    memory_width: int,
    pairs: Count,
    memory_length: Count,
) -> list[Node]:
    """Nodes of the latent transformer.

    Args:
        exported: its name in the exported model.
        memory_width: W of `pair_memory`.
        pairs: B of a microbatch.
        memory_length: M of a microbatch.
    """
    shape, count = latent_shape(config, init_std), config.num_latents
    latents = Stream("latents", lambda plan: (pairs(plan), count, config.hidden_size))

    def sequences(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(pairs(plan), count)]

    nodes = [Node("perceiver.latents", LatentsKind(config, settings, init_std, pairs), (), (latents,), exported)]
    reads, number = ("latents", "pair_memory", "pair_mask"), 0
    for block in range(config.num_blocks):
        name, place = f"perceiver.blocks.{block}", f"{exported}.blocks.{block}"
        cross = LatentLayerKind(settings, shape, memory_width, pairs, count, memory_length)
        nodes.append(Node(f"{name}.cross", cross, reads, (latents,), f"{place}.cross", recomputable=True))
        for index in range(config.layers_per_block):
            number += 1
            kind = StackLayerKind(settings, shape, number, whole_plan, sequences, VIT)
            at = f"layers.{index}"
            nodes.append(Node(f"{name}.{at}", kind, ("latents",), (latents,), f"{place}.{at}", recomputable=True))
    return nodes


def query_node(
    config: PerceiverConfig,
    settings: LayerSettings,
    init_std: float,
    exported: str = "queries",
    *,
    num_queries: int,
    rows: Count,
) -> Node:
    """The node `perceiver.queries`: the latents of the first `rows(plan)` pairs -> `query_states`."""
    kind = QueryBlockKind(settings, latent_shape(config, init_std), config.num_latents, num_queries, rows)
    states = Stream("query_states", lambda plan: (rows(plan), num_queries, config.hidden_size))
    return Node("perceiver.queries", kind, ("latents",), (states,), exported, recomputable=True)
