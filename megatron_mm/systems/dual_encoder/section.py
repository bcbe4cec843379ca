"""Settings of the dual encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.section import TENSOR_PARALLEL, divides, section, weights_problems
from megatron_mm.config.system import SystemConfig, whole_notes
from megatron_mm.parts.contrastive.section import ContrastiveConfig
from megatron_mm.parts.text_encoder.section import TextEncoderConfig
from megatron_mm.parts.vit.section import MAEConfig, ViTConfig
from megatron_mm.systems.two_phases import TwoPhases


@section
class LateFusionConfig:
    """Causal layers of self-attention, cross-attention to the image and MLP above the text encoder, at its width."""

    num_layers: int = 12
    """Layers."""
    num_attention_heads: int = 16
    """Attention heads."""
    ffn_hidden_size: int = 4096
    """Inner width of the MLP."""


@section
class DualEncoderConfig(TwoPhases, SystemConfig):
    """Dual encoder: MAE vision tower, GPT-2-like text encoder, late fusion by cross-attention, tied head."""

    system: Literal["dual_encoder"] = "dual_encoder"
    """Name of the system."""
    phase: Literal["mae", "joint"] = "joint"
    """Masked autoencoding of the tower alone, or everything."""
    vision: ViTConfig = Field(
        default_factory=lambda: ViTConfig(
            num_layers=24, hidden_size=1024, num_attention_heads=16, ffn_hidden_size=4096, patch_size=16
        )
    )
    mae: MAEConfig = Field(default_factory=MAEConfig)
    text: TextEncoderConfig = Field(default_factory=TextEncoderConfig)
    fusion: LateFusionConfig = Field(default_factory=LateFusionConfig)
    contrastive: ContrastiveConfig = Field(default_factory=lambda: ContrastiveConfig(embedding_size=512))
    contrastive_weight: float = 1.0
    """Weight of the image-text contrastive loss."""
    causal_lm_weight: float = 1.0
    """Weight of captioning and answering."""
    mae_weight: float = 0.0
    """Weight of masked autoencoding in the joint phase; 0 leaves it out."""

    @property
    def reconstructs(self) -> bool:
        """Whether it learns masked autoencoding."""
        return not self.reads_text or self.mae_weight > 0

    @property
    def inputs(self) -> InputFormat:
        """Rows of one text and at most one image."""
        patches = self.vision.num_patches if self.reconstructs else 0
        return InputFormat(self.text.vocab_size, packed=False, image_size=self.vision.image_size, patches=patches)

    def problems(self, config, sizes) -> Iterator[str]:
        """What is wrong."""
        yield from self.vision.problems("model.vision", sizes.tp)
        yield from self.mae.problems("model.mae", sizes.tp)
        if self.reconstructs:
            yield from self.mae.mask_problems("model.mae", self.vision)
        yield from self.text.problems("model.text", sizes.tp)
        if self.reads_text:
            weights = {"contrastive_weight": self.contrastive_weight, "causal_lm_weight": self.causal_lm_weight}
            yield from weights_problems("model", **weights)
            if self.contrasts:
                yield from self.contrastive.problems("model.contrastive", config.training, sizes)
        if self.mae_weight < 0:
            yield f"model.mae_weight is {self.mae_weight}; a weight must not be negative"
        heads = "model.fusion.num_attention_heads"
        yield from divides("model.text.hidden_size", self.text.hidden_size, heads, self.fusion.num_attention_heads)
        yield from divides(heads, self.fusion.num_attention_heads, TENSOR_PARALLEL, sizes.tp)
        yield from divides("model.fusion.ffn_hidden_size", self.fusion.ffn_hidden_size, TENSOR_PARALLEL, sizes.tp)
        length, positions = config.data.seq_length, self.text.max_positions
        if length > positions:
            yield f"data.seq_length is {length}, above model.text.max_positions {positions}"

    def notes(self, sizes) -> Iterator[str]:
        """All of it is towers."""
        yield from whole_notes(sizes, "the whole model")
