"""Settings of the Transformer-XL encoder."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config.section import TENSOR_PARALLEL, divides, heads_problems, section


@section
class TransformerXLConfig:
    """Text encoder with relative positions and segment memory (Transformer-XL, arXiv:1901.02860), bidirectional within
    a segment, pre-norm. Memory is the segment before, of the same sample, without gradient."""

    num_layers: int = 32
    """Layers."""
    hidden_size: int = 5120
    """Width."""
    num_attention_heads: int = 40
    """Attention heads."""
    ffn_hidden_size: int = 23040
    """Inner width of the MLP."""
    segment_length: int = 128
    """Tokens of a segment, and of its memory."""
    vocab_size: int = 50176
    """Rows of the embedding, at least the tokenizer's vocabulary."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every LayerNorm of the encoder."""

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from heads_problems(name, self, tp)
        yield from divides(f"{name}.vocab_size", self.vocab_size, TENSOR_PARALLEL, tp)
        yield from divides(f"{name}.hidden_size", self.hidden_size, "2 (sines and cosines of positions)", 2)
