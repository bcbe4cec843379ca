"""Settings of PerceiverFusion-XL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.section import divides, section, share, weights_problems
from megatron_mm.config.system import SystemConfig, whole_notes
from megatron_mm.parts.contrastive.section import ContrastiveConfig
from megatron_mm.parts.perceiver.section import PerceiverConfig
from megatron_mm.parts.transformer_xl.section import TransformerXLConfig
from megatron_mm.parts.vit.section import ViTConfig


@section
class PerceiverFusionConfig(SystemConfig):
    """PerceiverFusion-XL: ViT and Transformer-XL encoders, joined by a Perceiver with output queries."""

    system: Literal["perceiver_fusion"] = "perceiver_fusion"
    """Name of the system."""
    vision: ViTConfig = Field(
        default_factory=lambda: ViTConfig(
            num_layers=48, hidden_size=5120, num_attention_heads=40, ffn_hidden_size=26624
        )
    )
    text: TransformerXLConfig = Field(default_factory=TransformerXLConfig)
    perceiver: PerceiverConfig = Field(default_factory=PerceiverConfig)
    contrastive: ContrastiveConfig = Field(default_factory=ContrastiveConfig)
    max_positions: int = 256
    """Output queries, one a token of the text: data.seq_length."""
    mask_ratio: float = 0.15
    """Share of the text's tokens that masked language modelling hides."""
    contrastive_weight: float = 1.0
    """Weight of the image-text contrastive loss."""
    masked_lm_weight: float = 1.0
    """Weight of masked language modelling through the output queries."""
    matching_weight: float = 1.0
    """Weight of image-text matching with hard negatives."""

    @property
    def contrasts(self) -> bool:
        """Whether images and texts are compared."""
        return self.contrastive_weight > 0

    @property
    def matches(self) -> bool:
        """Whether pairs of images and texts are told from wrong ones."""
        return self.matching_weight > 0

    @property
    def predicts_masked(self) -> bool:
        """Whether it learns masked language modelling."""
        return self.masked_lm_weight > 0

    @property
    def inputs(self) -> InputFormat:
        """Rows of one text and at most one image, with a masked copy of the text if that is learned from."""
        return InputFormat(
            self.text.vocab_size,
            packed=False,
            image_size=self.vision.image_size,
            mask_ratio=self.mask_ratio if self.predicts_masked else 0.0,
        )

    def problems(self, config, sizes) -> Iterator[str]:
        """What is wrong."""
        yield from self.vision.problems("model.vision", sizes.tp)
        yield from self.text.problems("model.text", sizes.tp)
        yield from self.perceiver.problems("model.perceiver", sizes.tp)
        if self.contrasts:
            yield from self.contrastive.problems("model.contrastive", config.training, sizes)
        yield from weights_problems(
            "model",
            contrastive_weight=self.contrastive_weight,
            masked_lm_weight=self.masked_lm_weight,
            matching_weight=self.matching_weight,
        )
        if self.matches and config.training.micro_batch_size * sizes.dp < 2:
            yield (
                "training.micro_batch_size 1 x data parallel 1 leaves image-text matching no wrong pair (they are "
                "drawn from a microbatch); take more, or model.matching_weight: 0"
            )
        yield from share("model.mask_ratio", self.mask_ratio)
        length, segment = config.data.seq_length, self.text.segment_length
        yield from divides("data.seq_length", length, "model.text.segment_length", segment)
        if length != self.max_positions:
            yield f"data.seq_length is {length}; model.max_positions, one output query a token, is {self.max_positions}"
        if self.vision.hidden_size != self.text.hidden_size:
            yield (
                f"model.vision.hidden_size is {self.vision.hidden_size} and model.text.hidden_size "
                f"{self.text.hidden_size}: the latents read both as one memory, so they must be equal"
            )

    def notes(self, sizes) -> Iterator[str]:
        """All of it is towers."""
        yield from whole_notes(sizes, "the whole model")
