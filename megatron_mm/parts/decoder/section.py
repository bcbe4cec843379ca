"""Settings of the text decoder, and of the two kinds of gated layers by which it reads media."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config.section import TENSOR_PARALLEL, divides, heads_problems, section


@section
class DecoderConfig:
    """The causal text decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, untied head."""

    num_layers: int = 80
    """Self-attention layers."""
    hidden_size: int = 8192
    """Width of the residual stream."""
    num_attention_heads: int = 64
    """Query heads."""
    num_query_groups: int = 8
    """Key-value heads."""
    ffn_hidden_size: int = 27648
    """Inner width of the SwiGLU MLP."""
    vocab_size: int = 128000
    """Rows of the embedding and the head, at least the tokenizer's vocabulary."""
    rotary_base: float = 500000.0
    """Base of the rotary frequencies."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm of the decoder."""

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from heads_problems(name, self, tp, groups=True)
        yield from divides(f"{name}.vocab_size", self.vocab_size, TENSOR_PARALLEL, tp)
        if self.hidden_size // max(1, self.num_attention_heads) % 2:
            yield f"{name}: hidden_size / num_attention_heads must be even for rotary positions"


@section
class CrossAttentionConfig:
    """Tanh-gated cross-attention sublayers (Flamingo, arXiv:2204.14198) that read image and audio memory."""

    every: int = 10
    """One sublayer before each group of this many decoder layers."""
    num_query_groups: int = 32
    """Key-value heads; query heads are the decoder's. Memory is projected once, so these cost no growing cache."""
    qk_layernorm: bool = True
    """RMSNorm of queries and keys, per head."""
    gate_init: float = 0.0
    """Initial value of the gate before tanh; 0 leaves the decoder as it was."""


@section
class GatedBlockConfig:
    """Gated cross-attention blocks (attention and MLP, tanh gates) among the upper layers of a decoder."""

    first_layer: int = 16
    """Decoder layers below the first block."""
    every: int = 2
    """One block before each group of this many layers."""
    qk_layernorm: bool = True
    """RMSNorm of queries and keys, per head."""
    gate_init: float = 0.0
    """Initial value of the gates before tanh; 0 leaves the decoder as it was."""
