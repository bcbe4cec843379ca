"""Self-attention of the local backend: scaled_dot_product_attention with grouped queries, packing and context parallel.

megatron-core's local attention materialises its scores and refuses context parallelism. `SelfAttention` keeps its
projections, parameter names and sharded state, and replaces what lies between them. What depends on the microbatch
(rows, rotary angles, mask) is an `AttentionPlan`, made once per chunk and microbatch and passed through
TransformerLayer's `packed_seq_params`.

Under context parallelism a process has the queries of its own tokens (`sharding`) and needs keys of all. Which of
`parallel.cp_comm_type` serves depends on the microbatch:

    all_gather  keys and values of all processes are gathered: any mask, any number of heads.
    a2a         heads are exchanged for tokens, so that each process attends whole rows with its share of the heads
                (DeepSpeed Ulysses, arXiv:2309.14509): any mask; key-value heads divide by tensor x context parallel.
    p2p         keys pass from process to process while attention runs (ring attention): Transformer Engine alone.

Where a row is one document and tokens see earlier ones only, Transformer Engine runs all three itself, since its layout
is ours: two chunks of each row a process. It would cut packed rows document by document (each padded to a multiple of
2·CP), and data would then depend on the layout: they and what sees both directions are exchanged here on both backends,
gathered where p2p was asked for.

Shape suffixes: R rows (or images), L local tokens of a row, T all tokens of a row, G query groups, Q queries of a
group, N = G·Q heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.elementwise import rotary_qkv
from megatron_mm.models.layers.packing import Segments, document_segments
from megatron_mm.models.layers.sharding import (
    gather_context,
    gathered_text,
    heads_for_tokens,
    local_text,
    tokens_for_heads,
    zigzag_slice,
)


@dataclass(frozen=True)
class AttentionPlan:
    """How the tokens of one microbatch see one another.

    Attributes:
        rows: independent sequences in the tensor.
        cos, sin: rotary factors [R, L, 1, D/2], or None for attention without positions.
        mask: added to the scores, [R or 1, 1, L, T]; None: all of a row is seen, or `causal` or `segments` says what.
        causal: earlier tokens only: without a mask, lower triangular; with segments, within each of them.
        segments: documents, for a backend of variable-length kernels, in place of a mask.
        exchange: how the keys of other context-parallel processes are met: there are none; they are gathered; heads are
            exchanged for tokens; the core attention does it itself.
    """

    rows: int
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    causal: bool = False
    segments: tuple[Segments, ...] = ()
    exchange: Literal["none", "gather", "heads", "core"] = "none"


def whole_plan(hidden: torch.Tensor, context: ForwardContext) -> AttentionPlan:
    """Every position of a sequence [B, T, C] sees all of that sequence, its padding included."""
    return AttentionPlan(rows=hidden.shape[0])


def causal_plan(hidden: torch.Tensor, context: ForwardContext) -> AttentionPlan:
    """Every token sees the earlier ones; padding stands after the text, so nothing sees it."""
    return AttentionPlan(rows=hidden.shape[0], causal=True)


def text_plan(
    context: ForwardContext,
    *,
    head_dim: int,
    rotary_base: float,
    dtype: torch.dtype,
    packed: bool,
    cp_comm_type: str = "all_gather",
    causal: bool = True,
) -> AttentionPlan:
    """Plan of attention within documents, made once per microbatch and chunk.

    Args:
        packed: the backend is Transformer Engine: it takes segments, not masks, and has context parallelism of its own.
        causal: tokens see earlier ones only; otherwise all of their document.
    """
    return context.derived(_text_plan, head_dim, rotary_base, dtype, packed, cp_comm_type, causal)


def _text_plan(
    batch: Microbatch,
    head_dim: int,
    rotary_base: float,
    dtype: torch.dtype,
    packed: bool,
    cp_comm_type: str,
    causal: bool,
) -> AttentionPlan:
    cp_size = parallel_state.get_context_parallel_world_size()
    cos, sin = rotary_factors(local_text(batch.position_ids_RT), head_dim, rotary_base, dtype)
    rows, triangle = batch.plan.num_rows, causal and batch.plan.one_document_per_row
    exchange = "none"
    if cp_size > 1:
        exchange = "core" if packed and triangle else "heads" if cp_comm_type == "a2a" else "gather"
    if triangle and exchange != "gather":
        return AttentionPlan(rows, cos, sin, causal=True, exchange=exchange)
    size, rank = (cp_size, parallel_state.get_context_parallel_rank()) if exchange == "gather" else (1, 0)
    if packed:
        segments = document_segments(batch, size, rank, causal)
        return AttentionPlan(rows, cos, sin, causal=causal, segments=segments, exchange=exchange)
    mask = document_mask(batch, dtype, causal, size, rank)
    return AttentionPlan(rows, cos, sin, mask, exchange=exchange)


def rotary_factors(
    positions_RL: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of Llama's rotary angles (RoFormer, arXiv:2104.09864), each [R, L, 1, D/2]; computed in fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_RL.device) / head_dim
    angles = positions_RL.float()[:, :, None, None] * (1.0 / base**exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def document_mask(
    batch: Microbatch, dtype: torch.dtype, causal: bool = True, cp_size: int = 1, cp_rank: int = 0
) -> torch.Tensor:
    """Additive mask [R or 1, 1, L, T]: 0 for an (earlier, if causal) token of the same document, -inf otherwise.

    Keys are in the order of `gathered_text`. A row of padding sees itself, so no row of scores is empty.
    """
    plan = batch.plan
    index_T = torch.arange(plan.row_length, device=batch.document_ids_RT.device)[None]

    def pairs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return zigzag_slice(values, cp_size, cp_rank)[:, :, None], gathered_text(values, cp_size)[:, None, :]

    of_query, of_key = pairs(batch.document_ids_RT)
    if not causal:
        hidden = of_query != of_key
    else:
        at_query, at_key = pairs(index_T)
        hidden = at_query < at_key
        if not plan.one_document_per_row:
            hidden = hidden | (of_query != of_key)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill(hidden, float("-inf"))[:, None]


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, dropout: float
) -> torch.Tensor:
    """[R, L, N, D], [R, T, G, D] -> [R, L, N, D], by torch's kernels."""
    return functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=plan.mask,
        dropout_p=dropout,
        is_causal=plan.causal,
        enable_gqa=query.shape[2] != key.shape[2],
    ).transpose(1, 2)


class CoreAttention(nn.Module):
    """softmax(q·k/√d + mask)·v on [R, tokens, heads, D], with fewer heads in keys and values if queries are grouped."""

    attention_kernel = "torch's scaled_dot_product_attention"

    def __init__(self, config: TransformerConfig, **unused: object) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.fork = self.dropout > 0 and not config.sequence_parallel  # a layer forks the tracker itself otherwise
        self.checkpoint = config.recompute_granularity == "selective"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """[R, L, N, D], [R, T, G, D] -> [R, L, N·D]."""

        def attend(query, key, value):
            return attention(query, key, value, plan, self.dropout if self.training else 0.0)

        def run(query, key, value):
            if self.fork and self.training:
                with tensor_parallel.get_cuda_rng_tracker().fork():
                    return attend(query, key, value)
            return attend(query, key, value)

        if self.checkpoint and self.training and torch.is_grad_enabled():
            attended = tensor_parallel.checkpoint(run, False, query, key, value)
        else:
            attended = run(query, key, value)
        return attended.flatten(2)


class SelfAttention(megatron_attention.SelfAttention):
    """megatron-core's self-attention with the core above; `packed_seq_params` is an AttentionPlan.

    Raises:
        ValueError: an exchange of heads over context parallelism would split a group of them.
    """

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        if config.cp_comm_type == "a2a" and self.num_query_groups_per_partition % config.context_parallel_size:
            tp, cp = config.tensor_model_parallel_size, config.context_parallel_size
            raise ValueError(
                f"parallel.cp_comm_type a2a: {config.num_query_groups} key-value heads do not divide over tensor "
                f"parallel size {tp} x context parallel size {cp}; use all_gather, or fewer processes"
            )

    def forward(self, hidden_states: torch.Tensor, *args: object, packed_seq_params: AttentionPlan, **unused: object):
        """[s, b, h] -> ([s, b, h], bias); s·b positions are the plan's rows one after another."""
        plan = packed_seq_params
        mixed, _ = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
        lead = mixed.shape[:2]
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        mixed = mixed.view(plan.rows, -1, groups, mixed.shape[-1] // width, width)
        if plan.cos is not None:
            query_RLND, key_RLGD, value_RLGD = rotary_qkv(mixed, plan.cos, plan.sin)
        else:
            query_RLGQD, key_RLGD, value_RLGD = mixed.split((mixed.shape[3] - 2, 1, 1), dim=3)
            query_RLND, key_RLGD, value_RLGD = query_RLGQD.flatten(2, 3), key_RLGD.squeeze(3), value_RLGD.squeeze(3)
        if plan.exchange == "heads":
            query_RLND, key_RLGD, value_RLGD = self._exchange_heads(query_RLND, key_RLGD, value_RLGD)
        elif plan.exchange == "gather":
            both = gather_context(torch.stack((key_RLGD, value_RLGD), dim=2), in_order=bool(plan.segments))
            key_RLGD, value_RLGD = both.unbind(2)
        attended = self.core_attention(query_RLND, key_RLGD, value_RLGD, plan)
        if plan.exchange == "heads":
            attended = tokens_for_heads(attended.unflatten(2, (key_RLGD.shape[2], -1)))
        return self.linear_proj(attended.reshape(*lead, -1))

    def _exchange_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[R, L, N, D], [R, L, G, D] twice -> [R, T, N/CP, D], [R, T, G/CP, D] twice, queries with their groups."""
        query_RLGQD = query.unflatten(2, (key.shape[2], -1))
        mixed = heads_for_tokens(torch.cat((query_RLGQD, key[:, :, :, None], value[:, :, :, None]), dim=3))
        query, key, value = mixed.split((query_RLGQD.shape[3], 1, 1), dim=3)
        return query.flatten(2, 3), key.squeeze(3), value.squeeze(3)
