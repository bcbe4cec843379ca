"""Transformer-XL's text encoder as nodes (arXiv:1901.02860): tokens to the stream `text`, segment by segment.

`text.embedding` → `text.layers.i` → `text.output` (LayerNorm), on [variants · R, T, C]: the rows of the clean tokens,
then those of the masked ones, or whatever fields of the microbatch a system asks for. Layers are pre-norm; tokens see
their own segment in both directions, and the one before it as memory. Memory never leaves a layer, so it never crosses
a cut, a row or a microbatch. The tower is whole on every context-parallel process and never sequence-parallel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.costs import StackWork, copies, look_up
from megatron_mm.models.layers.final_norm import FinalNormKind
from megatron_mm.models.layers.parameters import describe
from megatron_mm.models.layers.relative_attention import (
    SegmentPlan,
    distance_sinusoids,
    hidden_keys,
    relative_layer,
    relative_layer_cost,
)
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import mlp_entries
from megatron_mm.models.names import VIT, Entry, linear, plain, self_attention_names
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
    return StackShape.of(
        text,
        normalization="LayerNorm",
        norm_epsilon=text.layernorm_epsilon,
        activation=functional.gelu,
        init_std=init_std,
    )


@dataclass(frozen=True)
class EmbeddingKind:
    """All variants of the text by one table."""

    text: TransformerXLConfig
    settings: LayerSettings
    shape: StackShape
    variants: tuple[str, ...]

    def build(self) -> nn.Module:
        """The module."""
        module = VariantEmbedding(self.settings, self.shape, self.text.vocab_size, self.variants)
        return describe(module, init_std=self.shape.init_std, column={"word_embeddings": None})

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """A look-up; indices of eight bytes."""
        sizes, width = self.settings.sizes, self.text.hidden_size
        tokens = len(self.variants) * plan.num_rows * plan.row_length
        stored = 8.0 * tokens * copies(sizes, sharded=False)
        work = look_up(StackWork(self.settings), tokens, width)
        return NodeCost(self.text.vocab_size * width, work, stored, sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """The table."""
        sizes = (self.text.vocab_size, self.text.hidden_size)
        yield plain(f"{node}.word_embeddings.weight", f"{exported}.embed_tokens.weight", *sizes)


@dataclass(frozen=True)
class RelativeLayerKind:
    """A layer of relative attention; u and v are the first layer's, exported beside the layers."""

    settings: LayerSettings
    shape: StackShape
    number: int
    segment_length: int
    variants: int
    tower: str
    """The encoder's name in the exported model."""

    def build(self) -> nn.Module:
        """The layer."""
        plan = partial(segment_plan, segment_length=self.segment_length)
        return relative_layer(self.settings, self.shape, self.number, plan)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Of all variants."""
        rows, segments = self.variants * plan.num_rows, plan.row_length // self.segment_length
        own = self.number == 1
        return relative_layer_cost(self.shape, rows, segments, self.segment_length, self.settings, own_biases=own)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Those of ViT's layers, with the projection of relative positions."""
        size, attention = self.shape.hidden_size, f"{node}.self_attention"
        if self.number == 1:
            for name in ("u", "v"):
                yield plain(f"{attention}.{name}", f"{self.tower}.{name}", size)
        heads = self.shape.num_attention_heads
        own = self_attention_names(node, exported, VIT, size, heads, heads, bias=False, norm_bias=True)
        *before, projection = own
        yield from before
        yield from linear(f"{attention}.linear_pos", f"{exported}.attention.r_proj", size, size, bias=False)
        yield projection
        yield from mlp_entries(node, exported, VIT, self.shape)


def transformer_xl_nodes(
    text: TransformerXLConfig,
    settings: LayerSettings,
    init_std: float,
    variants: tuple[str, ...],
    exported: str = "text_tower",
) -> list[Node]:
    """Nodes of the encoder.

    Args:
        variants: fields of Microbatch that hold tokens [R, T]; the stream holds their rows one variant after another.
        exported: the encoder's name in the exported model.
    """
    shape, count = text_shape(text, init_std), len(variants)
    stream = Stream("text", lambda plan: (count * plan.num_rows, plan.row_length, text.hidden_size))

    def sequences(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(count * plan.num_rows, plan.row_length)]

    def layer(index: int) -> Node:
        kind = RelativeLayerKind(settings, shape, index + 1, text.segment_length, count, exported)
        ties = {name: f"text.layers.0.{name}" for name in _SHARED} if index else {}
        place = f"{exported}.layers.{index}"
        return Node(f"text.layers.{index}", kind, ("text",), (stream,), place, recomputable=True, ties=ties)

    embedding = EmbeddingKind(text, settings, shape, variants)
    return [
        Node("text.embedding", embedding, (), (stream,), exported, frozenset(variants)),
        *(layer(index) for index in range(text.num_layers)),
        Node("text.output", FinalNormKind(settings, shape, sequences), ("text",), (stream,), f"{exported}.layernorm"),
    ]
