"""Contrastive embeddings: a pooled stream projected into the shared space, and the learned temperature."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.costs import pooled_head_cost
from megatron_mm.models.layers.pooling import embedding_head, logit_scale
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.parts.contrastive.section import ContrastiveConfig


def embedding_node(
    name: str,
    reads: str,
    writes: str,
    settings: LayerSettings,
    width: int,
    contrastive: ContrastiveConfig,
    pool: Callable[[torch.Tensor, ForwardContext], torch.Tensor],
    norm: StackShape | None = None,
) -> Node:
    """A node that pools a stream of a width and projects it into the shared space, fp32 [R, E] (see EmbeddingHead)."""
    size = contrastive.embedding_size

    def cost(plan: MicrobatchPlan) -> NodeCost:
        return pooled_head_cost(width, size, plan.num_rows, settings.sizes, norm=norm)

    stream = Stream(writes, lambda plan: (plan.num_rows, size), dtype=torch.float32)
    build = partial(embedding_head, settings, width, size, pool, norm)
    return Node(name, build, (reads,), (stream,), cost)


def scale_node(settings: LayerSettings, contrastive: ContrastiveConfig) -> Node:
    """`contrastive.scale`: writes the learned inverse temperature, fp32 [1]."""
    return Node(
        "contrastive.scale",
        partial(logit_scale, settings, contrastive.temperature, contrastive.max_scale),
        (),
        (Stream("logit_scale", lambda plan: (1,), dtype=torch.float32),),
        lambda plan: NodeCost(1),
    )
