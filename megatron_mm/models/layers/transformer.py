"""A node's transformer layer: megatron-core's TransformerLayer, called with streams and a ForwardContext.

The layer, its parameters and its checkpoint keys are megatron-core's; this adds only where the attention plan of a
microbatch comes from, so the same class serves the text decoder and the towers, on both backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, NodeCost
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import layer_cost
from megatron_mm.models.layers.parameters import describe
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.names import Entry, LayerNames, mlp_names, self_attention_names


class StackLayer(TransformerLayer):
    """One layer of a stack; `plan` says how its tokens see one another."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int,
        plan: Callable[[torch.Tensor, ForwardContext], object],
    ) -> None:
        super().__init__(config, submodules, layer_number)
        self._plan = plan

    def forward(self, *inputs: torch.Tensor | ForwardContext) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """(stream, …, context) -> each stream rewritten in its own shape, all by the same weights."""
        *streams, context = inputs
        written = tuple(self._rewrite(stream, context) for stream in streams)
        return written if len(written) > 1 else written[0]

    def _rewrite(self, hidden_states: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        plan = self._plan(hidden_states, context)
        with dropout_region(self.config, self.training), get_fp8_context(self.config):
            output, _ = super().forward(hidden_states, attention_mask=None, packed_seq_params=plan)
        return output


def dropout_region(config: TransformerConfig, training: bool):
    """Dropout of a sequence shard draws from a generator of its own on each tensor-parallel process."""
    if training and config.sequence_parallel and config.hidden_dropout + config.attention_dropout > 0:
        return tensor_parallel.get_cuda_rng_tracker().fork()
    return nullcontext()


#: How many sequences a microbatch has for a layer, and how long they are: of each stream that the layer rewrites.
Sequences = Callable[[MicrobatchPlan], Sequence[tuple[int, int]]]


def rows_of_text(plan: MicrobatchPlan) -> list[tuple[int, int]]:
    """Each row of a microbatch is a sequence."""
    return [(plan.num_rows, plan.row_length)]


def causal(plan: MicrobatchPlan) -> bool:
    """Tokens of every microbatch see earlier ones only."""
    return True


def bidirectional(plan: MicrobatchPlan) -> bool:
    """Tokens of every microbatch see both sides."""
    return False


@dataclass(frozen=True)
class StackLayerKind:
    """A pre-norm layer of self-attention and MLP.

    Attributes:
        number: of the layer in its stack, from 1.
        plan: how the tokens of a stream see one another.
        sequences: (sequences, length) of each stream that the layer rewrites, in a microbatch.
        layer_names: what its parts are called in the exported model.
        sharded: positions are divided over context parallelism and sequence parallelism.
        is_causal: whether tokens of a microbatch see earlier ones only, as `plan` has it.
    """

    settings: LayerSettings
    shape: StackShape
    number: int
    plan: Callable[[torch.Tensor, ForwardContext], object]
    sequences: Sequences
    layer_names: LayerNames
    sharded: bool = False
    is_causal: Callable[[MicrobatchPlan], bool] = bidirectional

    def build(self) -> StackLayer:
        """The layer."""
        return stack_layer(self.settings, self.shape, self.number, self.plan, sharded=self.sharded)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Of all streams, by the same weights."""
        total, seen = None, {"causal": self.is_causal(plan), "one_document": plan.one_document_per_row}
        for sequences, length in self.sequences(plan):
            cost = layer_cost(self.shape, sequences, length, self.settings, sharded=self.sharded, **seen)
            total = cost if total is None else replace(total + cost, parameters=cost.parameters)
        return total

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Those of `layer_names`."""
        yield from attention_entries(node, exported, self.layer_names, self.shape)
        yield from mlp_entries(node, exported, self.layer_names, self.shape)


def attention_entries(node: str, exported: str, names: LayerNames, shape: StackShape) -> Iterator[Entry]:
    """Self-attention of a layer of this shape, with its norm."""
    norm_bias, heads = shape.normalization == "LayerNorm", shape.num_attention_heads
    sizes = (shape.hidden_size, heads, shape.num_query_groups)
    yield from self_attention_names(node, exported, names, *sizes, bias=shape.bias, norm_bias=norm_bias)


def mlp_entries(node: str, exported: str, names: LayerNames, shape: StackShape) -> Iterator[Entry]:
    """MLP of a layer of this shape, with its norm."""
    norm_bias = shape.normalization == "LayerNorm"
    sizes = (shape.hidden_size, shape.ffn_hidden_size)
    yield from mlp_names(node, exported, names, *sizes, bias=shape.bias, norm_bias=norm_bias)


def stack_layer(
    settings: LayerSettings,
    shape: StackShape,
    layer_number: int,
    plan: Callable[[torch.Tensor, ForwardContext], object],
    *,
    sharded: bool,
) -> StackLayer:
    """Layer `layer_number` (from 1) of a stack, its weights not yet filled."""
    backend = backend_of(settings)
    config = layer_config(settings, shape, sharded=sharded, decoder=sharded)
    layer = StackLayer(config, backend.layer_submodules(), layer_number, plan)
    gated = ("linear_fc1",) if shape.gated else ()
    return describe(
        layer,
        init_std=shape.init_std,
        num_layers=shape.num_layers,
        column={"linear_qkv": shape.num_query_groups, "linear_fc1": None},
        row={"linear_proj": shape.num_attention_heads, "linear_fc2": None},
        gated=gated,
    )
