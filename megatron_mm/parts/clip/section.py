"""Settings of CLIP's vision transformer."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config.section import divides, heads_problems, section


@section
class VisionTowerConfig:
    """CLIP's vision transformer (arXiv:2103.00020): class token, learned positions, quick-GELU, no final norm."""

    num_layers: int = 24
    """Transformer layers."""
    hidden_size: int = 1024
    """Width; the memory that cross-attention reads has this width."""
    num_attention_heads: int = 16
    """Attention heads."""
    ffn_hidden_size: int = 4096
    """Inner width of the MLP."""
    patch_size: int = 14
    """Pixels on a patch's side."""
    image_size: int = 224
    """Pixels on an image's side."""
    max_frames: int = 32
    """Rows of the temporal position table for video frames."""
    frozen: bool = True
    """Keep the tower's weights as loaded (the temporal table stays trainable)."""

    @property
    def tokens_per_image(self) -> int:
        """Memory positions of one image or frame: the patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from heads_problems(name, self, tp)
        yield from divides(f"{name}.image_size", self.image_size, f"{name}.patch_size", self.patch_size)
