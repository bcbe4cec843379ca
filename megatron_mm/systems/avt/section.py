"""Settings of AVT-33B."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.section import divides, heads_problems, section, share, weights_problems
from megatron_mm.config.system import SystemConfig, whole_notes
from megatron_mm.parts.conformer.section import ConformerConfig
from megatron_mm.parts.contrastive.section import ContrastiveConfig
from megatron_mm.parts.decoder.section import DecoderConfig
from megatron_mm.parts.swin.section import SwinConfig


@section
class BiModalFusionConfig:
    """Fusion of sight and sound: per modality self-attention, cross-attention to the other, SwiGLU."""

    num_layers: int = 8
    """Layers."""
    hidden_size: int = 4096
    """Width of both modalities."""
    num_attention_heads: int = 32
    """Query heads."""
    num_query_groups: int = 8
    """Key-value heads."""
    ffn_hidden_size: int = 14336
    """Inner width of the SwiGLU MLP."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm."""

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from heads_problems(name, self, tp, groups=True)


@section
class AVTConfig(SystemConfig):
    """AVT-33B: Swin and Conformer encoders, bi-modal fusion, a decoder that reads the fused memory in every layer."""

    system: Literal["avt"] = "avt"
    """Name of the system."""
    vision: SwinConfig = Field(default_factory=SwinConfig)
    audio: ConformerConfig = Field(default_factory=ConformerConfig)
    fusion: BiModalFusionConfig = Field(default_factory=BiModalFusionConfig)
    decoder: DecoderConfig = Field(
        default_factory=lambda: DecoderConfig(
            num_query_groups=8,
            vocab_size=50176,
            ffn_hidden_size=16384,
            num_layers=48,
            hidden_size=6144,
            num_attention_heads=48,
        )
    )
    contrastive: ContrastiveConfig = Field(default_factory=ContrastiveConfig)
    mask_ratio: float = 0.15
    """Share of the text's tokens that masked language modelling hides."""
    masked_lm_weight: float = 1.0
    """Weight of masked language modelling."""
    contrastive_weight: float = 1.0
    """Weight of the audio-visual contrastive loss."""
    generation_weight: float = 1.0
    """Weight of cross-modal generation."""
    masked_lm_share: float = 0.5
    """Share of the microbatches that learn masked language modelling; the others learn generation."""

    @property
    def tasks(self) -> dict[str, float]:
        """Share of the microbatches of each text objective that has weight."""
        shares = {"masked_lm": self.masked_lm_share, "generation": 1.0 - self.masked_lm_share}
        weights = {"masked_lm": self.masked_lm_weight, "generation": self.generation_weight}
        return {name: share for name, share in shares.items() if share > 0 and weights[name] > 0}

    @property
    def generates(self) -> bool:
        """Whether it learns to generate text."""
        return "generation" in self.tasks

    @property
    def contrasts(self) -> bool:
        """Whether sight and sound are embedded for comparison."""
        return self.contrastive_weight > 0

    @property
    def predicts_masked(self) -> bool:
        """Whether it learns masked language modelling."""
        return "masked_lm" in self.tasks

    @property
    def reads_text(self) -> bool:
        """Whether any objective needs fusion and decoder."""
        return bool(self.tasks)

    @property
    def inputs(self) -> InputFormat:
        """Rows of one text, one image or video clip, one waveform; microbatches of masked or causal text."""
        return InputFormat(
            vocab_size=self.decoder.vocab_size,
            packed=False,
            image_size=self.vision.image_size,
            video="clips",
            sound="waveform",
            sample_rate=self.audio.sample_rate,
            seconds=self.audio.seconds,
            mask_ratio=self.mask_ratio if self.predicts_masked else 0.0,
            tasks=tuple(self.tasks.items()),
        )

    def problems(self, config, sizes) -> Iterator[str]:
        """What is wrong."""
        yield from self.decoder.problems("model.decoder", sizes.tp)
        yield from self.vision.problems("model.vision", sizes.tp)
        yield from self.audio.problems("model.audio", sizes.tp)
        yield from self.fusion.problems("model.fusion", sizes.tp)
        if self.contrasts:
            yield from self.contrastive.problems("model.contrastive", config.training, sizes)
        yield from weights_problems(
            "model",
            masked_lm_weight=self.masked_lm_weight,
            contrastive_weight=self.contrastive_weight,
            generation_weight=self.generation_weight,
        )
        yield from share("model.mask_ratio", self.mask_ratio)
        if not 0.0 <= self.masked_lm_share <= 1.0:
            yield f"model.masked_lm_share is {self.masked_lm_share}; it must lie between 0 and 1"
        elif self.masked_lm_weight + self.generation_weight > 0 and not self.tasks:
            yield (
                f"model.masked_lm_share is {self.masked_lm_share}: no microbatch learns the one that has weight, of "
                f"model.masked_lm_weight {self.masked_lm_weight} and model.generation_weight {self.generation_weight}"
            )
        frames, patch = config.data.frames_per_video, self.vision.temporal_patch_size
        if frames < 1:
            yield f"data.frames_per_video is {frames}; it must be at least model.vision.temporal_patch_size {patch}"
        yield from divides("data.frames_per_video", frames, "model.vision.temporal_patch_size", patch)

    def notes(self, sizes) -> Iterator[str]:
        """Encoders and fusion are towers."""
        yield from whole_notes(sizes, "what comes before the decoder")
