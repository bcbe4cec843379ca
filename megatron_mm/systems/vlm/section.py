"""Settings of VLM-14B."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.section import section, weights_problems
from megatron_mm.config.system import SystemConfig, whole_notes
from megatron_mm.parts.contrastive.section import ContrastiveConfig
from megatron_mm.parts.decoder.section import DecoderConfig, GatedBlockConfig
from megatron_mm.parts.vit.section import MAEConfig, ViTConfig
from megatron_mm.systems.two_phases import TwoPhases


@section
class VLMConfig(TwoPhases, SystemConfig):
    """VLM-14B: an MAE vision tower and a causal decoder whose upper half reads it through gated blocks."""

    system: Literal["vlm"] = "vlm"
    """Name of the system."""
    phase: Literal["mae", "joint"] = "joint"
    """Masked autoencoding of the tower alone, or contrastive and causal LM of everything."""
    vision: ViTConfig = Field(default_factory=ViTConfig)
    mae: MAEConfig = Field(default_factory=MAEConfig)
    decoder: DecoderConfig = Field(
        default_factory=lambda: DecoderConfig(
            num_query_groups=8,
            vocab_size=50176,
            ffn_hidden_size=16384,
            num_layers=32,
            hidden_size=5120,
            num_attention_heads=40,
        )
    )
    cross_attention: GatedBlockConfig = Field(default_factory=GatedBlockConfig)
    contrastive: ContrastiveConfig = Field(default_factory=ContrastiveConfig)
    contrastive_weight: float = 0.5
    """Weight of the image-text contrastive loss."""
    causal_lm_weight: float = 0.5
    """Weight of next-token prediction."""

    @property
    def reconstructs(self) -> bool:
        """Whether it learns masked autoencoding."""
        return not self.reads_text

    @property
    def inputs(self) -> InputFormat:
        """Rows of one text and at most one image."""
        patches = self.vision.num_patches if self.reconstructs else 0
        return InputFormat(self.decoder.vocab_size, packed=False, image_size=self.vision.image_size, patches=patches)

    def problems(self, config, sizes) -> Iterator[str]:
        """What is wrong."""
        yield from self.vision.problems("model.vision", sizes.tp)
        yield from self.mae.problems("model.mae", sizes.tp)
        if self.reconstructs:
            yield from self.mae.mask_problems("model.mae", self.vision)
        yield from self.decoder.problems("model.decoder", sizes.tp)
        if self.reads_text:
            weights = {"contrastive_weight": self.contrastive_weight, "causal_lm_weight": self.causal_lm_weight}
            yield from weights_problems("model", **weights)
            if self.contrasts:
                yield from self.contrastive.problems("model.contrastive", config.training, sizes)
        cross = self.cross_attention
        if not 1 <= cross.first_layer < self.decoder.num_layers or cross.every < 1:
            yield (
                f"model.cross_attention: first_layer {cross.first_layer} and every {cross.every} do not lie within "
                f"1 … {self.decoder.num_layers - 1} (the text embedding is taken below the first block)"
            )

    def notes(self, sizes) -> Iterator[str]:
        """The tower is whole."""
        yield from whole_notes(sizes, "the vision tower")
