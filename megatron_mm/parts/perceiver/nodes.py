"""The latent transformer that joins modalities, as nodes (Perceiver IO, arXiv:2107.14795).

`perceiver.latents` → `perceiver.blocks.k.cross` → `perceiver.blocks.k.layers.j`, on the stream `latents` [B, L, D]: one
set of learned latents a pair of image and text (or whatever a system pairs). Each block reads the stream `pair_memory`
[B, M, W] under `pair_mask` [B, M] (1 is visible) and then thinks about it in self-attention layers; weights are not
shared between blocks. `perceiver.queries` turns the latents of the first pairs into outputs, one a learned query. All
of it is whole on every context-parallel process and never sequence-parallel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import AttentionPlan
from megatron_mm.models.layers.costs import layer_cost
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.perceiver import latent_layer, latent_layer_cost, query_block
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.models.layers.transformer import stack_layer
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


def latent_plan(hidden: torch.Tensor, context: ForwardContext) -> AttentionPlan:
    """Every latent of a pair sees all of that pair's."""
    return AttentionPlan(rows=hidden.shape[0])


def latent_shape(config: PerceiverConfig, init_std: float) -> StackShape:
    """The latent transformer as a stack of layers; cross-attention layers count as well."""
    return StackShape(
        num_layers=config.num_blocks * (1 + config.layers_per_block),
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_attention_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        normalization="LayerNorm",
        norm_epsilon=config.layernorm_epsilon,
        activation=functional.gelu,
        init_std=init_std,
    )


def perceiver_nodes(
    config: PerceiverConfig,
    settings: LayerSettings,
    init_std: float,
    *,
    memory_width: int,
    pairs: Count,
    memory_length: Count,
) -> list[Node]:
    """Nodes of the latent transformer.

    Args:
        memory_width: W of `pair_memory`.
        pairs: B of a microbatch.
        memory_length: M of a microbatch.
    """
    shape, count, sizes = latent_shape(config, init_std), config.num_latents, settings.sizes
    latents = Stream("latents", lambda plan: (pairs(plan), count, config.hidden_size))

    def first() -> nn.Module:
        return describe(Latents(config, settings, pairs), init_std=init_std)

    def cross_cost(plan: MicrobatchPlan) -> NodeCost:
        lengths = {"memory_length": memory_length(plan), "memory_width": memory_width}
        return latent_layer_cost(shape, sizes, pairs=pairs(plan), queries=count, **lengths)

    nodes = [Node("perceiver.latents", first, (), (latents,), lambda plan: NodeCost(count * config.hidden_size))]
    number = 0
    for block in range(config.num_blocks):
        nodes.append(
            Node(
                f"perceiver.blocks.{block}.cross",
                partial(latent_layer, settings, shape, memory_width=memory_width),
                ("latents", "pair_memory", "pair_mask"),
                (latents,),
                cross_cost,
                recomputable=True,
            )
        )
        for index in range(config.layers_per_block):
            number += 1
            nodes.append(
                Node(
                    f"perceiver.blocks.{block}.layers.{index}",
                    partial(stack_layer, settings, shape, number, latent_plan, sharded=False),
                    ("latents",),
                    (latents,),
                    lambda plan: layer_cost(shape, pairs(plan), count, sizes, sharded=False),
                    recomputable=True,
                )
            )
    return nodes


def query_node(
    config: PerceiverConfig, settings: LayerSettings, init_std: float, *, num_queries: int, rows: Count
) -> Node:
    """The node `perceiver.queries`: the latents of the first `rows(plan)` pairs -> `query_states`."""
    shape = latent_shape(config, init_std)
    states = Stream("query_states", lambda plan: (rows(plan), num_queries, config.hidden_size))

    def cost(plan: MicrobatchPlan) -> NodeCost:
        lengths = {"memory_length": config.num_latents, "memory_width": config.hidden_size}
        layer = latent_layer_cost(shape, settings.sizes, pairs=rows(plan), queries=num_queries, **lengths)
        parameters = layer.parameters + num_queries * config.hidden_size
        return NodeCost(parameters, layer.forward_flops, layer.activation_bytes)

    return Node(
        "perceiver.queries",
        partial(query_block, settings, shape, num_queries=num_queries, rows=rows),
        ("latents",),
        (states,),
        cost,
        recomputable=True,
    )
