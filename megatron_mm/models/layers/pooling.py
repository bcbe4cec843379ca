"""From the states of many positions to one vector a row, and on into a space shared with another modality.

Pooling a position of sharded text sums over the processes that share the row, with gradients: over context parallelism
each process then computes the same pooled vector and loss (see Loss.sharded), over sequence parallelism too.

Shape suffixes: R rows, M positions, C width, E width of the shared space, s local positions of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import nn

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, NodeCost
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import pooled_head_cost
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.sharding import local_text, sequence_parallel_slice, sum_over_context
from megatron_mm.models.names import Entry, norm, plain


def last_positions(batch: Microbatch) -> torch.Tensor:
    """[R]: the last token of each row's one document, its end of text; 0 in an empty row."""
    return ((batch.document_ids_RT >= 0).sum(dim=1) - 1).clamp(min=0)


def last_state(text: torch.Tensor, context: ForwardContext, sequence_parallel: bool) -> torch.Tensor:
    """The state of each row's last token, from a shard of the text [s, 1, H] -> [R, H], whole on every process."""
    at, here = context.derived(_last_places, text.dtype, sequence_parallel)
    pooled = text.squeeze(1).index_select(0, at) * here
    if sequence_parallel:
        pooled = reduce_from_tensor_model_parallel_region(pooled)
    return sum_over_context(pooled)


def _last_places(
    batch: Microbatch, dtype: torch.dtype, sequence_parallel: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in this shard each row's last token lies, and whether it lies there, [R] and [R, 1]."""
    plan = batch.plan
    positions_T = torch.arange(plan.row_length, device=batch.document_ids_RT.device)
    chosen_RL = local_text((positions_T[None] == last_positions(batch)[:, None]).to(dtype))
    rows = torch.eye(plan.num_rows, dtype=dtype, device=chosen_RL.device)
    spread = (rows[:, :, None] * chosen_RL[None]).flatten(1)  # [R, R·L]
    spread = sequence_parallel_slice(spread.t()).t() if sequence_parallel else spread
    here, at = spread.max(dim=1)
    return at, here[:, None]


def last_row_state(text: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """The state of each row's last token, from whole rows [≥ R, T, C] -> [R, C]; further variants are left out."""
    last = context.derived(last_positions)
    rows = text[: context.batch.plan.num_rows]
    return rows.gather(1, last[:, None, None].expand(-1, 1, rows.shape[2])).squeeze(1)


def masked_mean(hidden: torch.Tensor, seen_RM: torch.Tensor) -> torch.Tensor:
    """Mean over visible positions, [R, M, C] -> [R, C]; zero where there is none."""
    weights = seen_RM.to(hidden.dtype)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return (hidden * weights[:, :, None]).sum(dim=1)


class EmbeddingHead(nn.Module):
    """Pools a stream, normalises it (where asked to) and projects it into the shared space: fp32 [R, E], of any length.

    Small, and whole on every process.
    """

    def __init__(
        self,
        settings: LayerSettings,
        width: int,
        embedding_size: int,
        pool: Callable[[torch.Tensor, ForwardContext], torch.Tensor],
        norm: StackShape | None,
    ) -> None:
        super().__init__()
        self._pool = pool
        self.pooled_layernorm = None
        if norm is not None:
            self.pooled_layernorm = backend_of(settings).norm(layer_config(settings, norm, sharded=False), width)
        self.projection = empty_parameter(embedding_size, width, dtype=settings.dtype)

    def forward(self, hidden: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """The stream -> [R, E]."""
        pooled = self._pool(hidden, context)
        if self.pooled_layernorm is not None:
            pooled = self.pooled_layernorm(pooled)
        return nn.functional.linear(pooled, self.projection).float()


class LogitScale(nn.Module):
    """The learned inverse temperature of a contrastive loss, held as its logarithm and bounded (CLIP).

    The gradient passes the bound unchanged: a scale that has grown beyond it can fall again.
    """

    def __init__(self, settings: LayerSettings, max_scale: float) -> None:
        super().__init__()
        self.max_scale = max_scale
        self.log_scale = empty_parameter(1, dtype=settings.dtype)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """[1], fp32."""
        scale = self.log_scale.float().exp()
        return scale + (scale.clamp(max=self.max_scale) - scale).detach()


def embedding_head(
    settings: LayerSettings,
    width: int,
    embedding_size: int,
    pool: Callable[[torch.Tensor, ForwardContext], torch.Tensor],
    norm: StackShape | None = None,
) -> EmbeddingHead:
    """A head, its weights not yet filled.

    Args:
        width: C.
        pool: the stream -> [R, C].
        norm: the stack whose kind of norm the pooled state passes first; None after a tower that ends with a norm.
    """
    std = 1.0 / math.sqrt(width)  # CLIP's: embeddings of unit size from normalised states
    return describe(EmbeddingHead(settings, width, embedding_size, pool, norm), init_std=std)


def logit_scale(settings: LayerSettings, temperature: float, max_scale: float) -> LogitScale:
    """The scale, beginning with 1 / temperature."""
    begin = -math.log(temperature)
    return describe(LogitScale(settings, max_scale), init_std=0.0, constants={"log_scale": begin})


@dataclass(frozen=True)
class PooledHeadNames:
    """Full names of a head's parts in the exported model."""

    projection: str
    norm: str


@dataclass(frozen=True)
class PooledHeadKind:
    """A projection of pooled states, behind a norm where `norm` is a stack.

    Attributes:
        outputs: width of the result.
        pool: the stream -> [vectors, width].
        vectors: of a microbatch.
        norm: the stack whose kind of norm the pooled state passes first.
        sharded: `pool` reads a shard of the text, and sums over processes.
    """

    settings: LayerSettings
    width: int
    outputs: int
    pool: Callable[[torch.Tensor, ForwardContext], torch.Tensor]
    vectors: Callable[[MicrobatchPlan], int]
    head_names: PooledHeadNames
    norm: StackShape | None = None
    sharded: bool = False

    def build(self) -> EmbeddingHead:
        """The head."""
        return embedding_head(self.settings, self.width, self.outputs, self.pool, self.norm)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """One product of all vectors."""
        vectors, kind = self.vectors(plan), {"norm": self.norm, "sharded": self.sharded}
        return pooled_head_cost(self.width, self.outputs, vectors, self.settings, **kind)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Those of `head_names`."""
        if self.norm is not None:
            bias = self.norm.normalization == "LayerNorm"
            yield from norm(f"{node}.pooled_layernorm", self.head_names.norm, self.width, bias=bias)
        yield plain(f"{node}.projection", self.head_names.projection, self.outputs, self.width)


@dataclass(frozen=True)
class LogitScaleKind:
    """The learned inverse temperature; exported under the node's exported name."""

    settings: LayerSettings
    temperature: float
    max_scale: float

    def build(self) -> LogitScale:
        """The module."""
        return logit_scale(self.settings, self.temperature, self.max_scale)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Nothing."""
        return NodeCost(1, processes=self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """One number."""
        yield plain(f"{node}.log_scale", exported, 1)
