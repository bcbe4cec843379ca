"""Settings of the Perceiver."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config.section import heads_problems, section


@section
class PerceiverConfig:
    """Latent transformer (Perceiver IO, arXiv:2107.14795): latents read the inputs again and again."""

    num_latents: int = 512
    """Latent vectors."""
    hidden_size: int = 4096
    """Width of a latent."""
    num_blocks: int = 4
    """Blocks of one cross-attention and several self-attention layers."""
    layers_per_block: int = 5
    """Self-attention layers of a block."""
    num_attention_heads: int = 32
    """Attention heads."""
    ffn_hidden_size: int = 16384
    """Inner width of the MLP."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every LayerNorm."""

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from heads_problems(name, self, tp)
