"""Settings of Swin V2."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from megatron_mm.config.section import TENSOR_PARALLEL, divides, section


@section
class SwinConfig:
    """Swin V2 (arXiv:2111.09883) over images and, with windows in time as well, over video clips (arXiv:2106.13230).

    An image is a clip of one frame, whose patch spans it alone.
    """

    embed_dim: int = 512
    """Width of the first stage; each later stage doubles it."""
    depths: list[int] = Field(default_factory=lambda: [2, 2, 42, 4])
    """Blocks of each stage."""
    num_heads: list[int] = Field(default_factory=lambda: [16, 32, 64, 128])
    """Attention heads of each stage."""
    mlp_ratio: float = 4.0
    """Inner width of the MLP over the stage's width."""
    patch_size: int = 4
    """Pixels on a patch's side."""
    temporal_patch_size: int = 2
    """Frames of a patch."""
    window_size: int = 7
    """Patches on a window's side."""
    temporal_window_size: int = 8
    """Patches of a window in time."""
    image_size: int = 224
    """Pixels on a frame's side."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every LayerNorm of the tower."""
    frozen: bool = False
    """Keep the tower's weights as loaded."""

    @property
    def hidden_size(self) -> int:
        """Width of the output."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def grid_size(self) -> int:
        """Output positions on a side."""
        return self.image_size // self.patch_size // 2 ** (len(self.depths) - 1)

    def tokens_per_clip(self, frames: int) -> int:
        """Output positions of a clip of so many frames; 1 is an image."""
        return max(1, frames // self.temporal_patch_size) * self.grid_size**2

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        if len(self.num_heads) != len(self.depths):
            yield f"{name}.num_heads has {len(self.num_heads)} stages, {name}.depths has {len(self.depths)}"
            return
        scale = self.patch_size * 2 ** (len(self.depths) - 1)
        yield from divides(f"{name}.image_size", self.image_size, "patch_size x 2^(stages - 1)", scale)
        for stage, heads in enumerate(self.num_heads):
            width = self.embed_dim * 2**stage
            yield from divides(f"width {width} of {name} stage {stage}", width, f"{name}.num_heads", heads)
            yield from divides(f"{name}.num_heads of stage {stage}", heads, TENSOR_PARALLEL, tp)
            yield from divides(f"MLP of {name} stage {stage}", int(width * self.mlp_ratio), TENSOR_PARALLEL, tp)
