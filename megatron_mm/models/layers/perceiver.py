"""Cross-attention layers of a Perceiver: a few latents read a long memory (arXiv:2103.03206, arXiv:2107.14795).

    x = queries + proj(attention(LayerNorm(queries), LayerNorm(memory)))
    out = x + MLP(LayerNorm(x))

with biases everywhere, as in Hugging Face's PerceiverLayer. At the end the same layer reads the other way round:
learned queries, one a position of the output, read the latents (`QueryBlock`). The residual and the MLP are
megatron-core's TransformerLayer, whose self-attention is left out. Masks are arbitrary, which no variable-length kernel
takes: the attention is torch's on both backends; linears, norms and MLP are the backend's.

Shape suffixes: B pairs (rows of latents), L latents or queries, M positions of the memory, N heads of this process, D
width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, NodeCost
from megatron_mm.models.layers.attention import AttentionPlan, CoreAttention
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import StackWork, copies
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import mlp_entries
from megatron_mm.models.names import VIT, Entry, Part, linear, norm, plain


class LatentAttention(MegatronModule):
    """The attention without norm of the queries or residual; made by TransformerLayer as its `cross_attention`."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        settings: LayerSettings,
        shape: StackShape,
        memory_width: int,
        **unused: object,
    ) -> None:
        super().__init__(config)
        backend, size = backend_of(settings), shape.hidden_size
        self.width = shape.head_dim
        self.memory_layernorm = backend.norm(config, memory_width)
        self.linear_q = backend.column_linear(config, size, size, bias=True)
        self.linear_kv = backend.column_linear(config, memory_width, 2 * size, bias=True)
        self.core_attention = CoreAttention(config)
        self.linear_proj = backend.row_linear(config, size, size, bias=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        key_value_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **unused: object,
    ) -> tuple[torch.Tensor, None]:
        """Queries [B, L, C], memory [B, M, W], mask [B, M] (1 is visible; None: all) -> [B, L, C].

        A row that sees nothing attends to nothing: its output is the bias of the projection.
        """
        rows = hidden_states.shape[0]
        query, _ = self.linear_q(hidden_states)
        both, _ = self.linear_kv(self.memory_layernorm(key_value_states))
        key_BMND, value_BMND = both.view(rows, both.shape[1], -1, 2, self.width).unbind(3)
        query_BLND = query.view(rows, query.shape[1], -1, self.width)
        if attention_mask is None:
            attended = self.core_attention(query_BLND, key_BMND, value_BMND, AttentionPlan(rows))
        else:
            seen = attention_mask > 0
            sees = seen.any(dim=1, keepdim=True)
            mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
            mask = mask.masked_fill(~seen & sees, float("-inf"))  # a row of -inf alone would have no softmax
            plan = AttentionPlan(rows, mask=mask[:, None, None])
            attended = self.core_attention(query_BLND, key_BMND, value_BMND, plan) * sees[..., None]
        return self.linear_proj(attended)


class LatentLayer(TransformerLayer):
    """Cross-attention of latents to the memory of their pair, and an MLP."""

    def forward(
        self,
        latents: torch.Tensor,
        memory: torch.Tensor,
        mask: torch.Tensor | None,
        context: ForwardContext | None = None,
    ) -> torch.Tensor:
        """[B, L, C], [B, M, W], [B, M] -> [B, L, C]."""
        output, _ = super().forward(latents, context=memory, context_mask=mask)
        return output


class QueryBlock(MegatronModule):
    """Learned queries, one a position of the output, read the latents of the first pairs (Perceiver IO's decoder).

    The residual keeps the query, as `use_query_residual` of Hugging Face's decoders does: the MLP then knows for which
    position it reads what came from the latents.
    """

    def __init__(
        self,
        settings: LayerSettings,
        shape: StackShape,
        num_queries: int,
        rows: Callable[[MicrobatchPlan], int],
    ) -> None:
        super().__init__(layer_config(settings, shape, sharded=False))
        self.rows = rows
        self.queries = empty_parameter(num_queries, shape.hidden_size, dtype=settings.dtype)
        self.cross = latent_layer(settings, shape, memory_width=shape.hidden_size)

    def forward(self, latents: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[B, L, C] -> [rows, num_queries, C]."""
        rows = self.rows(context.batch.plan)
        return self.cross(self.queries.repeat(rows, 1, 1), latents[:rows], None)


def latent_layer(settings: LayerSettings, shape: StackShape, *, memory_width: int) -> LatentLayer:
    """A layer, its weights not yet filled; its checkpoint keys are its parameters' names on both backends."""
    backend = backend_of(settings)
    parts = backend.layer_submodules()
    params = {"settings": settings, "shape": shape, "memory_width": memory_width}
    parts = TransformerLayerSubmodules(
        pre_cross_attn_layernorm=backend.NORM,
        cross_attention=ModuleSpec(module=LatentAttention, params=params),
        cross_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=parts.pre_mlp_layernorm,
        mlp=parts.mlp,
        mlp_bda=parts.mlp_bda,
        sharded_state_dict_keys_map={"mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."},
    )
    return _describe(LatentLayer(layer_config(settings, shape, sharded=False), parts), shape)


def query_block(
    settings: LayerSettings, shape: StackShape, *, num_queries: int, rows: Callable[[MicrobatchPlan], int]
) -> QueryBlock:
    """The block, its weights not yet filled; `rows` says how many pairs are read."""
    return _describe(QueryBlock(settings, shape, num_queries, rows), shape)


def _describe(module: MegatronModule, shape: StackShape) -> MegatronModule:
    heads = shape.num_attention_heads
    return describe(
        module,
        init_std=shape.init_std,
        num_layers=shape.num_layers,
        column={"linear_q": heads, "linear_kv": heads, "linear_fc1": None},
        row={"linear_proj": heads, "linear_fc2": None},
    )


def latent_layer_cost(
    shape: StackShape,
    settings: LayerSettings,
    *,
    pairs: int,
    queries: int,
    memory_length: int,
    memory_width: int,
) -> NodeCost:
    """A layer on `pairs` × `queries` positions, each pair with a memory of its own."""
    sizes, size, ffn = settings.sizes, shape.hidden_size, shape.ffn_hidden_size
    position, memory = 2 * size * size + 2 * size * ffn, 2 * memory_width * size
    parameters = position + memory + (2 * size + 2 * size + ffn + size) + 4 * size + 2 * memory_width
    positions, keys = pairs * queries * sizes.cp, pairs * memory_length * sizes.cp
    make, local = StackWork(settings), pairs * queries
    work = (
        make.norm(local, size),
        *make.column(local, size, size, "queries"),
        make.norm(pairs * memory_length, memory_width),
        *make.column(pairs * memory_length, memory_width, 2 * size, "keys, values of the memory"),
        make.attention(pairs, queries, memory_length, shape, "cross-attention"),
        *make.row(local, size, size, "attention output"),
        make.outside(local, size, 3, "residual"),
        make.norm(local, size),
        *make.column(local, size, ffn, "fc1"),
        make.moved(2 * local * make.split(ffn, "inner width"), "activation"),
        *make.row(local, ffn, size, "fc2"),
        make.outside(local, size, 3, "residual"),
    )
    # Inputs of both norms and of the linears after them, and the normed memory; then, sharded by TP: queries, attention
    # output before and after rows without memory are zeroed, with its log-sum-exp, MLP; keys and values.
    whole = copies(sizes, sharded=False) // sizes.cp
    values = positions * (4.0 * size * whole + 3 * size + 2 * ffn) + keys * (memory_width * whole + 2.0 * size)
    stored = 2.0 * values + 4.0 * positions * shape.num_attention_heads
    return NodeCost(parameters, work, stored, sizes.tp_cp)


def latent_layer_names(node: str, exported: str, shape: StackShape, memory_width: int) -> Iterator[Entry]:
    """Each training tensor of a layer that reads a memory with biases and a norm of its own, and the exported ones."""
    size, heads = shape.hidden_size, shape.num_attention_heads
    ours, attention = f"{node}.cross_attention", f"{exported}.attention"
    yield from norm(f"{node}.pre_cross_attn_layernorm", f"{exported}.layernorm_before", size, bias=True)
    yield from norm(f"{ours}.memory_layernorm", f"{exported}.layernorm_memory", memory_width, bias=True)
    yield from linear(f"{ours}.linear_q", f"{attention}.q_proj", size, size)
    for kind, trailing in (("weight", (memory_width,)), ("bias", ())):
        parts = tuple(Part(f"{attention}.{name}_proj.{kind}") for name in "kv")
        yield Entry(f"{ours}.linear_kv.{kind}", parts, heads, size // heads, trailing)
    yield from linear(f"{ours}.linear_proj", f"{attention}.o_proj", size, size)
    yield from mlp_entries(node, exported, VIT, shape)


@dataclass(frozen=True)
class LatentLayerKind:
    """Latents read the memory of their pair.

    Attributes:
        pairs: of a microbatch.
        queries: latents of a pair.
        memory_length: positions of a pair's memory.
    """

    settings: LayerSettings
    shape: StackShape
    memory_width: int
    pairs: Callable[[MicrobatchPlan], int]
    queries: int
    memory_length: Callable[[MicrobatchPlan], int]

    def build(self) -> LatentLayer:
        """The layer."""
        return latent_layer(self.settings, self.shape, memory_width=self.memory_width)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Of all pairs."""
        lengths = {"memory_length": self.memory_length(plan), "memory_width": self.memory_width}
        return latent_layer_cost(
            self.shape, self.settings, pairs=self.pairs(plan), queries=self.queries, **lengths
        )

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """See latent_layer_names."""
        yield from latent_layer_names(node, exported, self.shape, self.memory_width)


@dataclass(frozen=True)
class QueryBlockKind:
    """Output queries read the latents.

    Attributes:
        rows: pairs of a microbatch that are read.
    """

    settings: LayerSettings
    shape: StackShape
    num_latents: int
    num_queries: int
    rows: Callable[[MicrobatchPlan], int]

    def build(self) -> QueryBlock:
        """The block."""
        return query_block(self.settings, self.shape, num_queries=self.num_queries, rows=self.rows)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """A layer on the queries, and their table."""
        width = self.shape.hidden_size
        lengths = {"memory_length": self.num_latents, "memory_width": width}
        rows, table = self.rows(plan), self.num_queries * width
        layer = latent_layer_cost(self.shape, self.settings, pairs=rows, queries=self.num_queries, **lengths)
        repeated = (StackWork(self.settings).moved((1 + rows) * table, "queries"),)
        return layer + NodeCost(table, repeated, processes=self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """The table, and those of latent_layer_names."""
        width = self.shape.hidden_size
        yield plain(f"{node}.queries", f"{exported}.queries", self.num_queries, width)
        yield from latent_layer_names(f"{node}.cross", f"{exported}.cross", self.shape, width)
