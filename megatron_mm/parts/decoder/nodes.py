"""The nodes that every text decoder has: token embedding, self-attention layers, head, on the sharded stream `text`.

Systems put what else their decoders need (cross-attention, pooled states) between these. The stream is [R·T, 1, H],
sharded over context parallelism, and over tensor parallelism under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, Stream
from megatron_mm.models.layers.attention import AttentionPlan, text_plan
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.models.layers.text_ends import (
    HeadNames,
    LanguageHeadKind,
    TokenEmbeddingKind,
)
from megatron_mm.models.layers.transformer import StackLayerKind, causal, rows_of_text
from megatron_mm.models.names import LLAMA
from megatron_mm.parts.decoder.section import DecoderConfig

#: The name of Llama's embedding.
EMBEDDING = "model.embed_tokens.weight"


def clean_tokens(batch: Microbatch) -> torch.Tensor:
    """Every microbatch reads its tokens as they are."""
    return batch.tokens_RT


def decoder_shape(decoder: DecoderConfig, init_std: float) -> StackShape:
    """The decoder as a stack of layers."""
    return StackShape.of(
        decoder,
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
        kind = TokenEmbeddingKind(self.settings, self.shape, self.decoder.vocab_size, tokens)
        return Node("decoder.embedding", kind, (), (self.text,), EMBEDDING, fields)

    def layer(self, index: int) -> Node:
        """`decoder.layers.INDEX`: self-attention and MLP."""
        options = {"sequences": rows_of_text, "layer_names": LLAMA, "sharded": True, "is_causal": self.is_causal}
        kind = StackLayerKind(self.settings, self.shape, index + 1, self.plan, **options)
        place = f"model.layers.{index}"
        return Node(f"decoder.layers.{index}", kind, ("text",), (self.text,), place, recomputable=True)

    def output(self) -> Node:
        """`decoder.output`: final norm and head, writes `logits`."""
        names = HeadNames("model.norm", head="lm_head.weight")
        kind = LanguageHeadKind(self.settings, self.shape, self.decoder.vocab_size, names)
        return Node("decoder.output", kind, ("text",), (self.logits,))
