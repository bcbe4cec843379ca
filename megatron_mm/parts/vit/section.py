"""Settings of the ViT of masked autoencoders, and of masked autoencoding."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_mm.config.section import divides, heads_problems, section, share


@section
class ViTConfig:
    """Vision transformer of masked autoencoders (arXiv:2111.06377): class token, fixed sine-cosine positions, GELU."""

    num_layers: int = 32
    """Transformer layers."""
    hidden_size: int = 1280
    """Width; the memory that others read has this width."""
    num_attention_heads: int = 16
    """Attention heads."""
    ffn_hidden_size: int = 5120
    """Inner width of the MLP."""
    patch_size: int = 14
    """Pixels on a patch's side."""
    image_size: int = 224
    """Pixels on an image's side."""
    layernorm_epsilon: float = 1e-6
    """Epsilon of every LayerNorm of the tower."""
    frozen: bool = False
    """Keep the tower's weights as loaded."""

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_image(self) -> int:
        """Memory positions of one image: the class token and the patches."""
        return self.num_patches + 1

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from heads_problems(name, self, tp)
        yield from divides(f"{name}.image_size", self.image_size, f"{name}.patch_size", self.patch_size)
        yield from divides(f"{name}.hidden_size", self.hidden_size, "4 (sines and cosines of two axes)", 4)


@section
class MAEConfig:
    """Masked autoencoding (arXiv:2111.06377): random masks and the light decoder that is dropped afterwards."""

    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see."""
    normalize_pixels: bool = True
    """Predict each patch's pixels normalised by the patch's own mean and deviation."""
    num_layers: int = 8
    """Decoder layers."""
    hidden_size: int = 512
    """Width of the decoder."""
    num_attention_heads: int = 16
    """Attention heads."""
    ffn_hidden_size: int = 2048
    """Inner width of the MLP."""

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from heads_problems(name, self, tp)
        yield from share(f"{name}.mask_ratio", self.mask_ratio)
        yield from divides(f"{name}.hidden_size", self.hidden_size, "4 (sines and cosines of two axes)", 4)

    def mask_problems(self, name: str, vision: ViTConfig) -> Iterator[str]:
        """What is wrong where masks are used: some patches must be seen and some hidden."""
        if not 0.0 < self.mask_ratio < 1.0 or vision.patch_size < 1:
            return  # `problems` says so
        patches = vision.num_patches
        said = f"{name}.mask_ratio is {self.mask_ratio}: of an image's {patches} patches it hides"
        if patches < 2:
            yield f"{name}: an image is {patches} patch, so none can be hidden while others are seen"
        elif self.visible_patches(patches) == 0:
            most = math.floor((1 - 1 / patches) * 10000)
            most -= not int(patches * (1 - most / 10000))  # 0.9975 of 400 patches is all of them, by rounding
            yield f"{said} all; at most {most / 10000} leaves one"
        elif self.visible_patches(patches) == patches:
            yield f"{said} none; at least {1 / patches:.4g} hides one"

    def visible_patches(self, patches: int) -> int:
        """Patches that the encoder sees."""
        return int(patches * (1 - self.mask_ratio))
