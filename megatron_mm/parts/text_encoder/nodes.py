"""A causal text transformer in GPT-2's form as nodes: learned positions, LayerNorm, biases (Radford et al., 2019).

`text.embedding` → `text.layers.i` → `text.output` (final LayerNorm), all on the stream `text` [R, T, C]. Its 77 tokens
divide by no parallel size, so it is a tower: whole on every context-parallel process, never sequence-parallel.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import AttentionPlan
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import copies, layer_cost
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import stack_layer
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


class FinalNorm(nn.Module):
    """The norm that ends a stack."""

    def __init__(self, settings: LayerSettings, shape: StackShape) -> None:
        super().__init__()
        self.final_layernorm = backend_of(settings).norm(
            layer_config(settings, shape, sharded=False), shape.hidden_size
        )

    def forward(self, hidden: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """The stream, normalised."""
        return self.final_layernorm(hidden)


def causal_plan(hidden: torch.Tensor, context: ForwardContext) -> AttentionPlan:
    """Every token sees the earlier ones; padding stands after the text, so nothing sees it."""
    return AttentionPlan(rows=hidden.shape[0], causal=True)


def text_shape(text: TextEncoderConfig, init_std: float) -> StackShape:
    """The encoder as a stack of layers."""
    return StackShape(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_attention_heads,
        ffn_hidden_size=text.ffn_hidden_size,
        normalization="LayerNorm",
        norm_epsilon=text.layernorm_epsilon,
        activation=_ACTIVATIONS[text.activation],
        init_std=init_std,
    )


def text_nodes(text: TextEncoderConfig, settings: LayerSettings, init_std: float) -> list[Node]:
    """Nodes of the encoder."""
    shape, width = text_shape(text, init_std), text.hidden_size
    stream = Stream("text", lambda plan: (plan.num_rows, plan.row_length, width))

    def embedding() -> nn.Module:
        module = TextEmbedding(text, settings, shape)
        return describe(module, init_std=init_std, column={"word_embeddings": None})

    def output() -> nn.Module:
        return describe(FinalNorm(settings, shape), init_std=init_std)

    def embedding_cost(plan: MicrobatchPlan) -> NodeCost:
        stored = 8.0 * plan.num_rows * plan.row_length * copies(settings.sizes, sharded=False)
        return NodeCost((text.vocab_size + text.max_positions) * width, 0.0, stored)

    def output_cost(plan: MicrobatchPlan) -> NodeCost:
        stored = 2.0 * plan.num_rows * plan.row_length * width * copies(settings.sizes, sharded=False)
        return NodeCost(2 * width, 0.0, stored)

    nodes = [Node("text.embedding", embedding, (), (stream,), embedding_cost, frozenset({"tokens_RT"}))]
    for index in range(text.num_layers):
        nodes.append(
            Node(
                f"text.layers.{index}",
                partial(stack_layer, settings, shape, index + 1, causal_plan, sharded=False),
                ("text",),
                (stream,),
                lambda plan: layer_cost(shape, plan.num_rows, plan.row_length, settings.sizes, sharded=False),
                recomputable=True,
            )
        )
    nodes.append(Node("text.output", output, ("text",), (stream,), output_cost))
    return nodes
