"""Gated cross-attention: text reads the memories of its own document's media (Flamingo, arXiv:2204.14198).

    out = x + tanh(gate) · visible · proj(attention(q, k, v))

Which memories there are, the graph says: of images and frames, of sounds, of what a system lists of its own (a
sensor's readings), one or several. Memory travels at its tower's own width; each sublayer projects it to keys and
values, once per medium, and rows then pick the media of their slots. Positions whose document has no media get exactly
zero, and give exactly zero gradient.

Tensor parallelism shards heads, so the weights of the per-head norms, of which each process sees its own heads, have
their gradient summed here. Memory is replicated: its gradient is summed over tensor parallelism by the projections, and
over context parallelism by data parallelism's reduction of the towers' gradients.

Shape suffixes: R rows, L local tokens of a row, I media in the microbatch, M memory positions of a medium, K slots of a
row, E keys of a row (all slots, memory after memory), G key-value heads, N query heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import NodeCost
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import cross_cost
from megatron_mm.models.layers.elementwise import rms_norm
from megatron_mm.models.layers.media_attention import seen_slots
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.sharding import sequence_parallel_slice, sum_gradient_over_tp
from megatron_mm.models.layers.transformer import dropout_region
from megatron_mm.models.names import Entry, Part, norm, plain


@dataclass(frozen=True)
class MediaMemory:
    """A memory of media that rows name by slots.

    Attributes:
        name: in the names of its weights: `linear_kv_NAME`.
        listed: what it is of: "image", "sound", or a list of the system's own (InputFormat.own_lists).
        width: of its positions.
        tokens: positions of one medium.
    """

    name: str
    listed: str
    width: int
    tokens: int


@dataclass(frozen=True)
class CrossPlan:
    """Which positions of the media each token sees.

    Attributes:
        visible: [s, 1, 1] for this process's shard of the text: 1 where the document has media.
        keys: what the backend's core attention made of the slots.
    """

    visible: torch.Tensor
    keys: object


def cross_plan(
    batch: Microbatch,
    make_keys: Callable[..., object],
    media: tuple[tuple[str, int], ...],
    dtype: torch.dtype,
    sequence_parallel: bool,
) -> CrossPlan:
    """The plan of a microbatch, which all sublayers share.

    Args:
        make_keys: `keys` of the backend's core attention.
        media: of each memory the list that it is of, and positions of one.
    """
    visible = seen_slots(batch, tuple(name for name, _ in media)).any(dim=-1).to(dtype).reshape(-1, 1, 1)
    cp_size = parallel_state.get_context_parallel_world_size()
    cp_rank = parallel_state.get_context_parallel_rank()
    return CrossPlan(
        sequence_parallel_slice(visible) if sequence_parallel else visible,
        make_keys(batch, media, dtype, cp_size, cp_rank),
    )


class HeadNorm(nn.Module):
    """RMSNorm over the width of a head, with one weight for all heads of all tensor-parallel processes."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(width, dtype=dtype)

    def forward(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension; `weight` is `self.weight` with its gradient summed over processes."""
        return rms_norm(heads, weight, self.eps)


class GatedCrossAttention(MegatronModule):
    """One sublayer: RMSNorm, grouped-query cross-attention with per-head norms, tanh gate, residual."""

    def __init__(
        self,
        settings: LayerSettings,
        shape: StackShape,
        memories: tuple[MediaMemory, ...],
        qk_layernorm: bool,
    ) -> None:
        config = layer_config(settings, shape, sharded=True)
        super().__init__(config)
        backend = backend_of(settings)
        self.memories, self.media = memories, tuple((one.listed, one.tokens) for one in memories)
        self.width = shape.head_dim
        inner = shape.num_attention_heads * self.width
        memory = layer_config(settings, replace(shape, bias=False), sharded=False)
        kv = 2 * shape.num_query_groups * self.width
        self.input_layernorm = backend.norm(config, shape.hidden_size)
        self.linear_q = backend.column_linear(config, shape.hidden_size, inner)
        for one in memories:
            self.add_module(f"linear_kv_{one.name}", backend.column_linear(memory, one.width, kv))
        self.q_layernorm = self.k_layernorm = None
        if qk_layernorm:
            self.q_layernorm = HeadNorm(self.width, shape.norm_epsilon, settings.dtype)
            self.k_layernorm = HeadNorm(self.width, shape.norm_epsilon, settings.dtype)
        self.core_attention = backend.cross_core_attention(config)
        self.linear_proj = backend.row_linear(config, inner, shape.hidden_size)
        self.gate = empty_parameter(1, dtype=settings.dtype)
        # Each sequence-parallel process sees its shard of the positions that the gate scales.
        self.gate.sequence_parallel = config.sequence_parallel

    def forward(self, text: torch.Tensor, *memories_and_context) -> torch.Tensor:
        """text [s, 1, H], each memory [I, M, C] in the order of `memories`, the context -> text."""
        *memories, context = memories_and_context
        plan = context.derived(
            cross_plan,
            self.core_attention.keys,
            self.media,
            text.dtype,
            self.config.sequence_parallel,
        )
        rows = context.batch.plan.num_rows
        query, _ = self.linear_q(self.input_layernorm(text))
        query_RLND = query.view(rows, -1, query.shape[-1] // self.width, self.width)
        key_weight = None
        if self.q_layernorm is not None:
            query_RLND = self.q_layernorm(query_RLND, sum_gradient_over_tp(self.q_layernorm.weight))
            key_weight = sum_gradient_over_tp(self.k_layernorm.weight)
        projected = [
            self._project(self.get_submodule(f"linear_kv_{one.name}"), memory, key_weight)
            for one, memory in zip(self.memories, memories, strict=True)
        ]
        with dropout_region(self.config, self.training):  # heads differ between tensor-parallel processes
            attended = self.core_attention(query_RLND, projected, plan.keys)
        output, _ = self.linear_proj(attended.view(query.shape))
        scale = torch.tanh(self.gate) * plan.visible
        with dropout_region(self.config, self.training):
            dropped = functional.dropout(output, self.config.hidden_dropout, self.training)
        return torch.addcmul(text, dropped, scale)

    def _project(
        self, linear: nn.Module, memory: torch.Tensor, key_weight: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory [I, M, C] -> keys and values [I, M, G, D]."""
        both, _ = linear(memory)
        key, value = both.view(*memory.shape[:2], -1, 2, self.width).unbind(3)
        return (key if key_weight is None else self.k_layernorm(key, key_weight)), value


def gated_cross_attention(
    settings: LayerSettings,
    shape: StackShape,
    memories: tuple[MediaMemory, ...],
    *,
    qk_layernorm: bool,
    gate_init: float,
) -> GatedCrossAttention:
    """A sublayer, its weights not yet filled."""
    layer = GatedCrossAttention(settings, shape, memories, qk_layernorm)
    return describe(
        layer,
        init_std=shape.init_std,
        num_layers=shape.num_layers,
        column={
            "linear_q": shape.num_attention_heads,
            **{f"linear_kv_{one.name}": shape.num_query_groups for one in memories},
        },
        row={"linear_proj": shape.num_attention_heads},
        constants={"gate": gate_init},
    )


@dataclass(frozen=True)
class GatedCrossAttentionKind:
    """A sublayer that reads memories of the media in a row's slots: the streams after the text, in the same order.

    Raises:
        ValueError: no memory, or two of one name.
    """

    settings: LayerSettings
    shape: StackShape
    memories: tuple[MediaMemory, ...]
    qk_layernorm: bool
    gate_init: float

    def __post_init__(self) -> None:
        names = [one.name for one in self.memories]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"cross-attention reads at least one memory, each of another name; it was given {names}")

    def build(self) -> GatedCrossAttention:
        """The sublayer."""
        return gated_cross_attention(
            self.settings,
            self.shape,
            self.memories,
            qk_layernorm=self.qk_layernorm,
            gate_init=self.gate_init,
        )

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Of all rows; every medium is projected once."""
        memories = tuple(
            (one.width, plan.number(one.listed), one.tokens, plan.slots(one.listed)) for one in self.memories
        )
        return cross_cost(
            self.shape,
            self.settings,
            rows=plan.num_rows,
            length=plan.row_length,
            memories=memories,
            qk_layernorm=self.qk_layernorm,
        )

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Llama's, with keys and values of each medium."""
        size, attention = self.shape.hidden_size, f"{exported}.cross_attn"
        head_dim, groups = self.shape.head_dim, self.shape.num_query_groups
        yield from norm(f"{node}.input_layernorm", f"{exported}.input_layernorm", size, bias=False)
        yield plain(f"{node}.linear_q.weight", f"{attention}.q_proj.weight", size, size)
        for memory in self.memories:
            parts = tuple(Part(f"{attention}.{kind}_proj_{memory.name}.weight") for kind in "kv")
            yield Entry(f"{node}.linear_kv_{memory.name}.weight", parts, groups, head_dim, (memory.width,))
        if self.qk_layernorm:
            for kind in "qk":
                yield from norm(f"{node}.{kind}_layernorm", f"{attention}.{kind}_norm", head_dim, bias=False)
        yield plain(f"{node}.linear_proj.weight", f"{attention}.o_proj.weight", size, size)
        yield plain(f"{node}.gate", f"{exported}.gate", 1)
