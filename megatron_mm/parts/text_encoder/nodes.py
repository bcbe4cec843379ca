"""A causal text transformer in GPT-2's form as nodes: learned positions, LayerNorm, biases (Radford et al., 2019).

`text.embedding` → `text.layers.i` → `text.output` (final LayerNorm), all on the stream `text` [R, T, C]. Its 77 tokens
divide by no parallel size, so it is a tower: whole on every context-parallel process, never sequence-parallel.
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

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import causal_plan
from megatron_mm.models.layers.costs import StackWork, copies, look_up
from megatron_mm.models.layers.final_norm import FinalNormKind
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import StackLayerKind, causal, rows_of_text
from megatron_mm.models.names import OPT, Entry, plain
from megatron_mm.parts.text_encoder.section import TextEncoderConfig

_ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


class TextEmbedding(MegatronModule):
    """Tokens and learned positions -> [R, T, C]."""

    def __init__(self, text: TextEncoderConfig, settings: LayerSettings, shape: StackShape) -> None:
        config = layer_config(settings, shape, sharded=False)
        super().__init__(config)
        self.word_embeddings = VocabParallelEmbedding(
            text.vocab_size,
            shape.hidden_size,
            init_method=config.init_method,
            config=config,
            tp_group=get_tensor_model_parallel_group(),
        )
        self.position_embedding = empty_parameter(text.max_positions, shape.hidden_size, dtype=settings.dtype)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """[R, T, C] of the microbatch's tokens."""
        tokens = context.batch.tokens_RT
        return self.word_embeddings(tokens) + self.position_embedding[: tokens.shape[1]]


def text_shape(text: TextEncoderConfig, init_std: float) -> StackShape:
    """The encoder as a stack of layers."""
    return StackShape.of(
        text,
        normalization="LayerNorm",
        norm_epsilon=text.layernorm_epsilon,
        activation=_ACTIVATIONS[text.activation],
        init_std=init_std,
    )


@dataclass(frozen=True)
class EmbeddingKind:
    """Tokens and positions of all rows."""

    text: TextEncoderConfig
    settings: LayerSettings
    shape: StackShape

    def build(self) -> nn.Module:
        """The module."""
        module = TextEmbedding(self.text, self.settings, self.shape)
        return describe(module, init_std=self.shape.init_std, column={"word_embeddings": None})

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """A look-up; indices of eight bytes."""
        stored = 8.0 * plan.num_rows * plan.row_length * copies(self.settings.sizes, sharded=False)
        positions, width = plan.num_rows * plan.row_length, self.text.hidden_size
        make = StackWork(self.settings)
        work = (*look_up(make, positions, width), make.outside(positions, width, 3, "positions"))
        parameters = (self.text.vocab_size + self.text.max_positions) * width
        return NodeCost(parameters, work, stored, self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """OPT's."""
        text, width = self.text, self.text.hidden_size
        yield plain(f"{node}.word_embeddings.weight", f"{exported}.embed_tokens.weight", text.vocab_size, width)
        yield plain(f"{node}.position_embedding", f"{exported}.embed_positions.weight", text.max_positions, width)


def text_nodes(
    text: TextEncoderConfig, settings: LayerSettings, init_std: float, exported: str = "text_encoder"
) -> list[Node]:
    """Nodes of the encoder.

    Args:
        exported: the encoder's name in the exported model.
    """
    shape, width = text_shape(text, init_std), text.hidden_size
    stream = Stream("text", lambda plan: (plan.num_rows, plan.row_length, width))

    def layer(index: int) -> Node:
        kind = StackLayerKind(settings, shape, index + 1, causal_plan, rows_of_text, OPT, is_causal=causal)
        place = f"{exported}.layers.{index}"
        return Node(f"text.layers.{index}", kind, ("text",), (stream,), place, recomputable=True)

    embedding, output = EmbeddingKind(text, settings, shape), FinalNormKind(settings, shape, rows_of_text)
    return [
        Node("text.embedding", embedding, (), (stream,), exported, frozenset({"tokens_RT"})),
        *(layer(index) for index in range(text.num_layers)),
        Node("text.output", output, ("text",), (stream,), f"{exported}.final_layer_norm"),
    ]
