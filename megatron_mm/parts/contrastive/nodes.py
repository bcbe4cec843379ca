"""Contrastive embeddings: a pooled stream projected into the shared space, and the learned temperature."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, Stream
from megatron_mm.models.layers.pooling import (
    LogitScaleKind,
    PooledHeadKind,
    PooledHeadNames,
)
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
    sharded: bool = False,
) -> Node:
    """`contrastive.NAME`: pools a stream of a width and projects it into the shared space, fp32 [R, E] (EmbeddingHead).

    In the exported model it is `NAME_projection`, and its norm, if it has one, `NAME_norm`. `sharded`: the stream is a
    shard of the text, and `pool` sums over processes.
    """
    size = contrastive.embedding_size
    stream = Stream(writes, lambda plan: (plan.num_rows, size), dtype=torch.float32)
    names = PooledHeadNames(f"{name}_projection.weight", f"{name}_norm")
    kind = PooledHeadKind(settings, width, size, pool, rows_of, names, norm, sharded)
    return Node(f"contrastive.{name}", kind, (reads,), (stream,))


def rows_of(plan: MicrobatchPlan) -> int:
    """Vectors of a microbatch: one a row."""
    return plan.num_rows


def scale_node(settings: LayerSettings, contrastive: ContrastiveConfig) -> Node:
    """`contrastive.scale`: writes the learned inverse temperature, fp32 [1]."""
    kind = LogitScaleKind(settings, contrastive.temperature, contrastive.max_scale)
    stream = Stream("logit_scale", lambda plan: (1,), dtype=torch.float32)
    return Node("contrastive.scale", kind, (), (stream,), "logit_scale")
