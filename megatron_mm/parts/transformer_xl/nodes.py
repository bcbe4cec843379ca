"""Transformer-XL's text encoder as nodes (arXiv:1901.02860): tokens to the stream `text`, segment by segment.

`text.embedding` → `text.layers.i` → `text.output` (LayerNorm), on [variants · R, T, C]: the rows of the clean tokens,
then those of the masked ones, or whatever fields of the microbatch a system asks for. Layers are pre-norm; tokens see
their own segment in both directions, and the one before it as memory. Memory never leaves a layer, so it never crosses
a cut, a row or a microbatch. The tower is whole on every context-parallel process and never sequence-parallel.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import copies
from megatron_mm.models.layers.parameters import describe
from megatron_mm.models.layers.relative_attention import (
    SegmentPlan,
    distance_sinusoids,
    hidden_keys,
    relative_layer,
    relative_layer_cost,
)
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.parts.transformer_xl.section import TransformerXLConfig

_SHARED = ("self_attention.u", "self_attention.v")


class VariantEmbedding(MegatronModule):
    """Embeds several versions of the microbatch's text by one vocabulary-parallel table."""

    def __init__(
        self, settings: LayerSettings, shape: StackShape, vocab_size: int, variants: tuple[str, ...]
    ) -> None:
        config = layer_config(settings, shape, sharded=False)
        super().__init__(config)
        self.variants = variants
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size,
            shape.hidden_size,
            init_method=config.init_method,
            config=config,
            tp_group=get_tensor_model_parallel_group(),
        )

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """[variants · R, T, C]."""
        return self.word_embeddings(torch.cat([getattr(context.batch, name) for name in self.variants]))


class TextOutput(nn.Module):
    """The encoder's final LayerNorm."""

    def __init__(self, settings: LayerSettings, shape: StackShape) -> None:
        super().__init__()
        self.final_layernorm = backend_of(settings).norm(
            layer_config(settings, shape, sharded=False), shape.hidden_size
        )

    def forward(self, text: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.final_layernorm(text)


def segment_plan(text: torch.Tensor, context: ForwardContext, segment_length: int) -> SegmentPlan:
    """The plan of a microbatch, made once per chunk: all layers and variants share it.

    Raises:
        ValueError: rows are not whole segments.
    """
    rows, length, width = text.shape
    if length % segment_length:
        raise ValueError(f"rows of {length} tokens are not whole segments of text.segment_length {segment_length}")
    return context.derived(_segment_plan, segment_length, rows, width, text.dtype)


def _segment_plan(batch: Microbatch, segment_length: int, rows: int, width: int, dtype: torch.dtype) -> SegmentPlan:
    hidden = hidden_keys(batch.document_ids_RT < 0, segment_length)
    return SegmentPlan(
        hidden.repeat(rows // hidden.shape[0], 1, 1, 1),
        distance_sinusoids(segment_length, width, dtype, hidden.device),
    )


def text_shape(text: TransformerXLConfig, init_std: float) -> StackShape:
    """The encoder as a stack of layers; biases are those of the MLP."""
    return StackShape(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_attention_heads,
        ffn_hidden_size=text.ffn_hidden_size,
        normalization="LayerNorm",
        norm_epsilon=text.layernorm_epsilon,
        activation=functional.gelu,
        init_std=init_std,
    )


def transformer_xl_nodes(
    text: TransformerXLConfig, settings: LayerSettings, init_std: float, variants: tuple[str, ...]
) -> list[Node]:
    """Nodes of the encoder.

    Args:
        variants: fields of Microbatch that hold tokens [R, T]; the stream holds their rows one variant after another.
    """
    shape, length = text_shape(text, init_std), text.segment_length
    stream = Stream("text", lambda plan: (len(variants) * plan.num_rows, plan.row_length, text.hidden_size))
    plan_of = partial(segment_plan, segment_length=length)

    def embedding() -> nn.Module:
        module = VariantEmbedding(settings, shape, text.vocab_size, variants)
        return describe(module, init_std=init_std, column={"word_embeddings": None})

    def output() -> nn.Module:
        return describe(TextOutput(settings, shape), init_std=init_std)

    def tokens(plan: MicrobatchPlan) -> int:
        return len(variants) * plan.num_rows * plan.row_length * copies(settings.sizes, sharded=False)

    def embedding_cost(plan: MicrobatchPlan) -> NodeCost:
        return NodeCost(text.vocab_size * text.hidden_size, 0.0, 8.0 * tokens(plan))

    def layer_cost(plan: MicrobatchPlan, first: bool) -> NodeCost:
        rows, segments = len(variants) * plan.num_rows, plan.row_length // length
        return relative_layer_cost(shape, rows, segments, length, settings.sizes, own_biases=first)

    def output_cost(plan: MicrobatchPlan) -> NodeCost:
        return NodeCost(2 * text.hidden_size, 0.0, 2.0 * tokens(plan) * text.hidden_size)

    nodes = [Node("text.embedding", embedding, (), (stream,), embedding_cost, frozenset(variants))]
    for index in range(text.num_layers):
        nodes.append(
            Node(
                f"text.layers.{index}",
                partial(relative_layer, settings, shape, index + 1, plan_of),
                ("text",),
                (stream,),
                partial(layer_cost, first=index == 0),
                recomputable=True,
                ties={name: f"text.layers.0.{name}" for name in _SHARED} if index else {},
            )
        )
    nodes.append(Node("text.output", output, ("text",), (stream,), output_cost))
    return nodes
