"""Self-attention of the local backend: scaled_dot_product_attention with grouped queries, packing and context parallel.

megatron-core's local attention materialises its scores and refuses context parallelism. `SelfAttention` keeps its
projections, parameter names and sharded state, and replaces what lies between them. What depends on the microbatch
(rows, rotary angles, mask) is an `AttentionPlan`, made once per chunk and microbatch and passed through
TransformerLayer's `packed_seq_params`.

Shape suffixes: R rows (or images), L local tokens of a row, T all tokens of a row, G query groups, Q queries of a
group, N = G·Q heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional

from megatron_mm.data.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.elementwise import rotary_qkv
from megatron_mm.models.layers.packing import Segments, document_segments
from megatron_mm.models.layers.sharding import gather_context, gathered_text, local_text


@dataclass(frozen=True)
class AttentionPlan:
    """How the tokens of one microbatch see one another.

    Attributes:
        rows: independent sequences in the tensor.
        cos, sin: rotary factors [R, L, 1, D/2], or None for attention without positions.
        mask: added to the scores, [R or 1, 1, L, T]; None: all of a row is seen, or `causal` or `segments` says what.
        causal: earlier tokens only: without a mask, lower triangular; with segments, within each of them.
        segments: documents, for a backend of variable-length kernels, in place of a mask.
        gather: keys and values come from all context-parallel processes.
    """

    rows: int
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    causal: bool = False
    segments: tuple[Segments, ...] = ()
    gather: bool = False


def text_plan(
    context: ForwardContext,
    *,
    head_dim: int,
    rotary_base: float,
    dtype: torch.dtype,
    packed: bool,
    causal: bool = True,
) -> AttentionPlan:
    """Plan of attention within documents, made once per microbatch and chunk.

    Args:
        packed: the backend takes segments, not masks.
        causal: tokens see earlier ones only; otherwise all of their document.
    """
    cp_size = parallel_state.get_context_parallel_world_size()
    cp_rank = parallel_state.get_context_parallel_rank()

    def make(batch: Microbatch) -> AttentionPlan:
        cos, sin = rotary_factors(local_text(batch.position_ids_RT), head_dim, rotary_base, dtype)
        rows, gather = batch.plan.num_rows, cp_size > 1
        if packed:
            segments = document_segments(batch, cp_size, cp_rank, causal)
            return AttentionPlan(rows, cos, sin, causal=causal, segments=segments, gather=gather)
        triangle = causal and batch.plan.one_document_per_row and not gather
        mask = None if triangle else document_mask(batch, dtype, causal)
        return AttentionPlan(rows, cos, sin, mask, triangle, gather=gather)

    return context.derived(f"text_plan/{head_dim}/{rotary_base}/{dtype}/{causal}", make)


def rotary_factors(
    positions_RL: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of Llama's rotary angles (RoFormer, arXiv:2104.09864), each [R, L, 1, D/2]; computed in fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_RL.device) / head_dim
    angles = positions_RL.float()[:, :, None, None] * (1.0 / base**exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def document_mask(batch: Microbatch, dtype: torch.dtype, causal: bool = True) -> torch.Tensor:
    """Additive mask [R or 1, 1, L, T]: 0 for an (earlier, if causal) token of the same document, -inf otherwise.

    Keys are in the order of `gathered_text`. A row of padding sees itself, so no row of scores is empty.
    """
    plan = batch.plan
    index_T = torch.arange(plan.row_length, device=batch.document_ids_RT.device)[None]
    documents = batch.document_ids_RT
    hidden = local_text(index_T)[:, :, None] < gathered_text(index_T)[:, None, :]
    if not causal:
        hidden = local_text(documents)[:, :, None] != gathered_text(documents)[:, None, :]
    elif not plan.one_document_per_row:
        hidden = hidden | (local_text(documents)[:, :, None] != gathered_text(documents)[:, None, :])
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
    """megatron-core's self-attention with the core above; `packed_seq_params` is an AttentionPlan."""

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
        if plan.gather:
            both = gather_context(torch.stack((key_RLGD, value_RLGD), dim=2), in_order=bool(plan.segments))
            key_RLGD, value_RLGD = both.unbind(2)
        attended = self.core_attention(query_RLND, key_RLGD, value_RLGD, plan)
        return self.linear_proj(attended.view(*lead, -1))
