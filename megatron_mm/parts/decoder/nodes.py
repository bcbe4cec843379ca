"""The nodes that every text decoder has: token embedding, self-attention layers, head, on the sharded stream `text`.

Systems put what else their decoders need (cross-attention, pooled states) between these. The stream is [R·T, 1, H],
sharded over context parallelism, and over tensor parallelism under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import AttentionPlan, text_plan
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import embedding_cost, head_cost, layer_cost
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.models.layers.text_ends import language_head, token_embedding
from megatron_mm.models.layers.transformer import stack_layer
from megatron_mm.parts.decoder.section import DecoderConfig


def causal(plan: MicrobatchPlan) -> bool:
    """Every microbatch is causal."""
    return True


def clean_tokens(batch: Microbatch) -> torch.Tensor:
    """Every microbatch reads its tokens as they are."""
    return batch.tokens_RT


def decoder_shape(decoder: DecoderConfig, init_std: float) -> StackShape:
    """The decoder as a stack of layers."""
    return StackShape(
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        num_attention_heads=decoder.num_attention_heads,
        num_query_groups=decoder.num_query_groups,
        ffn_hidden_size=decoder.ffn_hidden_size,
        normalization="RMSNorm",
        norm_epsilon=decoder.layernorm_epsilon,
        activation=functional.silu,
        bias=False,
        gated=True,
        init_std=init_std,
    )


class DecoderNodes:
    """Makes the nodes of one decoder.

    Args:
        is_causal: whether a microbatch of this plan sees earlier tokens only.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        settings: LayerSettings,
        init_std: float,
        is_causal: Callable[[MicrobatchPlan], bool] = causal,
    ) -> None:
        self.decoder, self.settings, self.is_causal = decoder, settings, is_causal
        self.shape = decoder_shape(decoder, init_std)
        self.text = self._stream("text", decoder.hidden_size)
        self.logits = self._stream("logits", decoder.vocab_size)

    def _stream(self, name: str, width: int) -> Stream:
        return Stream(name, lambda plan: (plan.num_rows * plan.row_length, 1, width), "sequence")

    def plan(self, hidden: torch.Tensor, context: ForwardContext) -> AttentionPlan:
        """How tokens of the microbatch see one another."""
        return text_plan(
            context,
            head_dim=self.shape.head_dim,
            rotary_base=self.decoder.rotary_base,
            dtype=self.settings.dtype,
            packed=backend_of(self.settings).PACKED,
            cp_comm_type=self.settings.cp_comm_type,
            causal=self.is_causal(context.batch.plan),
        )

    def embedding(
        self,
        tokens: Callable[[Microbatch], torch.Tensor] = clean_tokens,
        fields: frozenset[str] = frozenset({"tokens_RT"}),
    ) -> Node:
        """`decoder.embedding`: writes `text` from the tokens that a microbatch is to read."""
        vocab = self.decoder.vocab_size
        return Node(
            "decoder.embedding",
            partial(token_embedding, self.settings, self.shape, vocab, tokens),
            (),
            (self.text,),
            lambda plan: embedding_cost(self.shape, vocab, plan.num_rows * plan.row_length, self.settings.sizes),
            fields,
        )

    def layer(self, index: int) -> Node:
        """`decoder.layers.INDEX`: self-attention and MLP."""

        def cost(plan: MicrobatchPlan) -> NodeCost:
            return layer_cost(self.shape, plan.num_rows, plan.row_length, self.settings.sizes, sharded=True)

        return Node(
            f"decoder.layers.{index}",
            partial(stack_layer, self.settings, self.shape, index + 1, self.plan, sharded=True),
            ("text",),
            (self.text,),
            cost,
            recomputable=True,
        )

    def output(self) -> Node:
        """`decoder.output`: final norm and head, writes `logits`."""
        vocab = self.decoder.vocab_size
        return Node(
            "decoder.output",
            partial(language_head, self.settings, self.shape, vocab),
            ("text",),
            (self.logits,),
            lambda plan: head_cost(self.shape, vocab, plan.num_rows * plan.row_length, self.settings.sizes),
        )
