"""Settings of the text encoder in GPT-2's form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron_mm.config.section import TENSOR_PARALLEL, divides, heads_problems, section


@section
class TextEncoderConfig:
    """Causal text transformer in GPT-2's form: LayerNorm, learned positions, GELU, biases."""

    num_layers: int = 24
    """Layers."""
    hidden_size: int = 1024
    """Width."""
    num_attention_heads: int = 16
    """Attention heads."""
    ffn_hidden_size: int = 4096
    """Inner width of the MLP."""
    vocab_size: int = 32768
    """Rows of the embedding, at least the tokenizer's vocabulary."""
    max_positions: int = 77
    """Rows of the position table."""
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu_tanh"
    """GPT-2's tanh approximation of GELU; OPT has relu."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every LayerNorm."""

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from heads_problems(name, self, tp)
        yield from divides(f"{name}.vocab_size", self.vocab_size, TENSOR_PARALLEL, tp)
