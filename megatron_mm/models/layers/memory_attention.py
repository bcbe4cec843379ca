"""Cross-attention of rows to a memory of their own: to an image, a fused memory, or another modality.

Each row of queries reads one memory, under a mask of its positions; `MemoryLayer` is megatron-core's TransformerLayer
with it between self-attention and MLP, and `GatedMemoryLayer` one without self-attention whose two branches pass
tanh gates (Flamingo, arXiv:2204.14198). Rows whose memory is empty get exactly zero from the attention.

Packed rows with several media a document are cross_attention.py's. Arbitrary masks are not for variable-length kernels:
the attention here is torch's on both backends; linears, norms and MLP are the backend's.

Shape suffixes: R rows, L local positions of a row, I memories, M positions of a memory, C its width, G key-value heads,
N query heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, NodeCost
from megatron_mm.models.layers.attention import AttentionPlan, CoreAttention
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import StackWork, copies, mlp_cost, self_attention_cost
from megatron_mm.models.layers.cross_attention import HeadNorm
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.sharding import sequence_parallel_slice, sum_gradient_over_tp
from megatron_mm.models.layers.transformer import (
    Sequences,
    attention_entries,
    bidirectional,
    dropout_region,
    mlp_entries,
)
from megatron_mm.models.names import Entry, LayerNames, memory_attention_names, norm, plain


@dataclass(frozen=True)
class MemoryView:
    """Which memory each row reads, and which of its positions.

    Attributes:
        index: [R] memory of each row; None: row r reads memory r.
        plan: mask [R, 1, 1, M] added to the scores, or None where a memory is seen whole or not at all.
        visible: 1 where the row has a memory, else 0: [R, 1, 1] for towers, [s, 1, 1] for a text shard.
    """

    index: torch.Tensor | None
    plan: AttentionPlan
    visible: torch.Tensor


@dataclass(frozen=True)
class Memory:
    """The values [I, M, C] with the view of the microbatch."""

    values: torch.Tensor
    view: MemoryView


#: Makes the view of a microbatch: (index [R] or None, visible positions [R, M] bool or rows [R] bool).
ViewMaker = Callable[[Microbatch], tuple[torch.Tensor | None, torch.Tensor]]


def memory_view(
    batch: Microbatch, make: ViewMaker, dtype: torch.dtype, sharded: bool, sequence_parallel: bool
) -> MemoryView:
    """The view of a microbatch.

    Args:
        make: says which memory each row reads; a function that the layers share, so that they share the view.
        sharded: queries are a shard of the text [s, 1, H]; otherwise rows [R, L, H].
    """
    index, seen = make(batch)
    mask = None
    rows = seen
    if seen.dim() == 2:
        rows = seen.any(dim=1)
        hidden = ~seen & rows[:, None]  # a row that sees nothing keeps finite scores: its output is zeroed
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        mask = mask.masked_fill(hidden, float("-inf"))[:, None, None]
    visible = rows.to(dtype)
    if sharded:
        local = batch.plan.row_length // parallel_state.get_context_parallel_world_size()
        visible = visible[:, None].expand(-1, local).reshape(-1, 1, 1)
        visible = sequence_parallel_slice(visible) if sequence_parallel else visible
    else:
        visible = visible[:, None, None]
    return MemoryView(index, AttentionPlan(rows.shape[0], mask=mask), visible)


class MemoryAttention(MegatronModule):
    """Grouped-query cross-attention without norm or residual; made by TransformerLayer as its `cross_attention`."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        settings: LayerSettings,
        shape: StackShape,
        memory_width: int,
        qk_layernorm: bool,
        **unused: object,
    ) -> None:
        super().__init__(config)
        backend = backend_of(settings)
        self.width = shape.head_dim
        inner = shape.num_attention_heads * self.width
        memory = layer_config(settings, replace(shape, bias=False), sharded=False)
        self.linear_q = backend.column_linear(config, shape.hidden_size, inner)
        self.linear_kv = backend.column_linear(memory, memory_width, 2 * shape.num_query_groups * self.width)
        self.q_layernorm = self.k_layernorm = None
        if qk_layernorm:
            self.q_layernorm = HeadNorm(self.width, shape.norm_epsilon, settings.dtype)
            self.k_layernorm = HeadNorm(self.width, shape.norm_epsilon, settings.dtype)
        self.core_attention = CoreAttention(config)
        self.linear_proj = backend.row_linear(config, inner, shape.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, *, key_value_states: Memory, **unused: object
    ) -> tuple[torch.Tensor, None]:
        """[s, 1, H] or [R, L, H] -> the same shape."""
        view = key_value_states.view
        query, _ = self.linear_q(hidden_states)
        both, _ = self.linear_kv(key_value_states.values)
        both = both.view(*both.shape[:2], -1, 2, self.width)
        key_IMGD, value_IMGD = both.unbind(3)
        query_RLND = query.view(view.plan.rows, -1, query.shape[-1] // self.width, self.width)
        if self.q_layernorm is not None:
            query_RLND = self.q_layernorm(query_RLND, sum_gradient_over_tp(self.q_layernorm.weight))
            key_IMGD = self.k_layernorm(key_IMGD, sum_gradient_over_tp(self.k_layernorm.weight))
        if view.index is not None:
            key_IMGD, value_IMGD = key_IMGD.index_select(0, view.index), value_IMGD.index_select(0, view.index)
        attended = self.core_attention(query_RLND, key_IMGD, value_IMGD, view.plan)
        output, _ = self.linear_proj(attended.view(query.shape))
        return output * view.visible, None


class MemoryLayer(TransformerLayer):
    """Pre-norm self-attention, cross-attention to the memory, MLP."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int,
        plan: Callable[[torch.Tensor, ForwardContext], object] | None,
        view: Callable[[ForwardContext], MemoryView],
    ) -> None:
        super().__init__(config, submodules, layer_number)
        self._plan, self._view = plan, view
        # megatron-core adds residuals with gradients enabled even where the caller has none: with gates, evaluation
        # would keep every branch for a backward pass.
        self.bias_dropout_add_exec_handler = nullcontext

    def forward(self, hidden_states: torch.Tensor, memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """The stream, rewritten, in the same shape; memory is [I, M, C]."""
        plan = self._plan(hidden_states, context) if self._plan is not None else None
        with dropout_region(self.config, self.training):
            output, _ = super().forward(
                hidden_states,
                attention_mask=None,
                context=Memory(memory, self._view(context)),
                packed_seq_params=plan,
            )
        return output


class GatedAdd(nn.Module):
    """residual + tanh(gate) · branch, in place of TransformerLayer's bias-dropout-add."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = empty_parameter(1, dtype=config.params_dtype)
        # Each sequence-parallel process sees its shard of the positions that the gate scales.
        self.gate.sequence_parallel = config.sequence_parallel

    def forward(self, training: bool, fused: bool) -> Callable:
        """The function that TransformerLayer applies to (branch, bias), residual and dropout probability."""

        def add(branch_and_bias, residual: torch.Tensor, probability: float) -> torch.Tensor:
            branch, bias = branch_and_bias
            branch = branch if bias is None else branch + bias
            return torch.addcmul(residual, functional.dropout(branch, probability, training), torch.tanh(self.gate))

        return add


class GatedMemoryLayer(MemoryLayer):
    """Cross-attention and MLP, each behind a gate, without self-attention."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.cross_attn_bda = GatedAdd(self.config)
        self.mlp_bda = GatedAdd(self.config)


def memory_layer(
    settings: LayerSettings,
    shape: StackShape,
    layer_number: int,
    view: ViewMaker,
    *,
    memory_width: int,
    sharded: bool,
    plan: Callable[[torch.Tensor, ForwardContext], object] | None = None,
    cross_query_groups: int | None = None,
    qk_layernorm: bool = False,
    gate_init: float | None = None,
) -> MemoryLayer:
    """A layer that reads a memory, its weights not yet filled.

    Args:
        view: which memory and positions each row sees.
        plan: of self-attention; unused in a gated layer.
        cross_query_groups: key-value heads of the cross-attention; None: those of `shape`.
        gate_init: makes a gated layer without self-attention, whose gates begin with this.
    """
    backend, gated = backend_of(settings), gate_init is not None
    config = layer_config(settings, shape, sharded=sharded)
    across = replace(shape, num_query_groups=cross_query_groups or shape.num_query_groups)
    parts = backend.layer_submodules()
    cross = {
        "pre_cross_attn_layernorm": backend.NORM,
        "cross_attention": ModuleSpec(
            module=MemoryAttention,
            params={"settings": settings, "shape": across, "memory_width": memory_width, "qk_layernorm": qk_layernorm},
        ),
        "cross_attn_bda": get_bias_dropout_add,
    }
    if gated:
        kept = ("pre_mlp_layernorm", "mlp", "mlp_bda", "sharded_state_dict_keys_map")
        parts = TransformerLayerSubmodules(**{key: getattr(parts, key) for key in kept}, **cross)
    else:
        parts = replace(parts, **cross)

    def view_of(context: ForwardContext) -> MemoryView:
        return context.derived(memory_view, view, settings.dtype, sharded, config.sequence_parallel)

    layer = (GatedMemoryLayer if gated else MemoryLayer)(config, parts, layer_number, plan, view_of)
    for parameter in layer.pre_cross_attn_layernorm.parameters():  # Transformer Engine puts this off on meta
        parameter.sequence_parallel = config.sequence_parallel
    return describe(
        layer,
        init_std=shape.init_std,
        num_layers=shape.num_layers,
        column={
            **({} if gated else {"linear_qkv": shape.num_query_groups}),
            "linear_fc1": None,
            "linear_q": shape.num_attention_heads,
            "linear_kv": across.num_query_groups,
        },
        row={"linear_proj": shape.num_attention_heads, "linear_fc2": None},
        gated=("linear_fc1",) if shape.gated else (),
        constants={"gate": gate_init} if gated else None,
    )


def memory_layer_cost(
    shape: StackShape,
    settings: LayerSettings,
    *,
    rows: int,
    length: int,
    memories: int,
    memory_length: int,
    memory_width: int,
    sharded: bool,
    cross_query_groups: int | None = None,
    qk_layernorm: bool = False,
    gated: bool = False,
    **seen: bool,
) -> NodeCost:
    """A layer as `memory_layer` makes it.

    Args:
        rows: sequences of `length` queries.
        memories: memories of the microbatch, each projected once, on every context-parallel process.
        seen: as of self_attention_cost; of no use in a gated layer.
    """
    sizes, hidden, query = settings.sizes, shape.hidden_size, shape.num_attention_heads * shape.head_dim
    groups = cross_query_groups or shape.num_query_groups
    key_value = 2 * groups * shape.head_dim
    norm = hidden * (2 if shape.normalization == "LayerNorm" else 1)
    parameters = 2 * hidden * query + memory_width * key_value + norm + (2 * shape.head_dim if qk_layernorm else 0)
    make, whole = StackWork(settings, sharded), StackWork(settings)
    local, own = rows * make.local(length), make.split(key_value, "key-value heads")
    work = [
        make.norm(local, hidden),
        *make.column(local, hidden, query, "queries"),
        *whole.column(memories * memory_length, memory_width, key_value, "keys, values of the memory"),
    ]
    if qk_layernorm:
        work.append(make.moved(2 * local * make.split(query, "heads"), "norm"))
        work.append(make.moved(memories * memory_length * own, "norm"))  # of keys alone
        work += make.summed_gradient(shape.head_dim, "norm") * 2
    work += [
        make.attention(rows, length, memory_length, shape, "cross-attention", groups=groups),
        *make.row(local, query, hidden, "attention output"),
        make.outside(local, hidden, 3, "residual"),
    ]
    positions = rows * length * (1 if sharded else sizes.cp)
    kept = copies(sizes, sharded=sharded) // (1 if sharded else sizes.cp)
    values = positions * (3 * hidden * kept + 3 * query) + sizes.cp * (memories + rows) * memory_length * key_value
    stored = 2.0 * values + 4.0 * positions * shape.num_attention_heads
    across = NodeCost(parameters + (2 if gated else 0), tuple(work), stored, sizes.tp_cp)
    mlp = mlp_cost(shape, rows, length, settings, sharded=sharded)
    if gated:
        return across + mlp
    return self_attention_cost(shape, rows, length, settings, sharded=sharded, **seen) + across + mlp


@dataclass(frozen=True)
class MemoryLayerNames:
    """Names of what a layer has beyond `LayerNames`, below the layer's own."""

    cross_norm: str
    cross_attention: str
    cross_gate: str = ""
    mlp_gate: str = ""


@dataclass(frozen=True)
class MemoryLayerKind:
    """A layer that reads a memory; gated, it has no self-attention.

    Attributes:
        sequences: of the one stream that the layer rewrites.
        memories: likewise: how many there are in a microbatch, and positions of one.
        self_plan: how the tokens of the stream see one another.
        is_causal: whether tokens of a microbatch see earlier ones only, as `self_plan` has it.
        gate_init: makes a gated layer, whose gates begin with this.
    """

    settings: LayerSettings
    shape: StackShape
    number: int
    view: ViewMaker
    sequences: Sequences
    memories: Sequences
    memory_width: int
    layer_names: LayerNames
    memory_names: MemoryLayerNames
    sharded: bool = False
    self_plan: Callable[[torch.Tensor, ForwardContext], object] | None = None
    cross_query_groups: int | None = None
    qk_layernorm: bool = False
    gate_init: float | None = None
    is_causal: Callable[[MicrobatchPlan], bool] = bidirectional

    def build(self) -> MemoryLayer:
        """The layer."""
        return memory_layer(
            self.settings,
            self.shape,
            self.number,
            self.view,
            memory_width=self.memory_width,
            sharded=self.sharded,
            plan=self.self_plan,
            cross_query_groups=self.cross_query_groups,
            qk_layernorm=self.qk_layernorm,
            gate_init=self.gate_init,
        )

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Of all rows and memories."""
        ((rows, length),) = self.sequences(plan)
        ((memories, memory_length),) = self.memories(plan)
        return memory_layer_cost(
            self.shape,
            self.settings,
            rows=rows,
            length=length,
            memories=memories,
            memory_length=memory_length,
            memory_width=self.memory_width,
            sharded=self.sharded,
            cross_query_groups=self.cross_query_groups,
            qk_layernorm=self.qk_layernorm,
            gated=self.gate_init is not None,
            causal=self.is_causal(plan),
            one_document=plan.one_document_per_row,
        )

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """In the order of the layer's parts."""
        shape, gated = self.shape, self.gate_init is not None
        if not gated:
            yield from attention_entries(node, exported, self.layer_names, shape)
        yield from self.cross_entries(node, exported)
        yield from mlp_entries(node, exported, self.layer_names, shape)
        if gated:
            yield plain(f"{node}.mlp_bda.gate", f"{exported}.{self.memory_names.mlp_gate}", 1)

    def cross_entries(self, node: str, exported: str) -> Iterator[Entry]:
        """The cross-attention, with its norm and its gate."""
        shape, names = self.shape, self.memory_names
        norm_bias, groups = shape.normalization == "LayerNorm", self.cross_query_groups or shape.num_query_groups
        heads, size = shape.num_attention_heads, shape.hidden_size
        across = (size, heads, groups, self.memory_width, self.qk_layernorm)
        yield from norm(f"{node}.pre_cross_attn_layernorm", f"{exported}.{names.cross_norm}", size, bias=norm_bias)
        yield from memory_attention_names(f"{node}.cross_attention", f"{exported}.{names.cross_attention}", *across)
        if self.gate_init is not None:
            yield plain(f"{node}.cross_attn_bda.gate", f"{exported}.{names.cross_gate}", 1)
