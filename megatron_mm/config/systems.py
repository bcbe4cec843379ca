"""Sections of the systems: what `model:` of a recipe may hold, chosen by `model.system`.

Beside its fields a section offers what the rest of the program asks of a system: `inputs`, the InputFormat of its
samples; `problems(config, sizes)`, what contradicts itself; `notes(sizes)`, what a layout cannot divide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.section import divides, megatron, section, share
from megatron_mm.config.towers import (
    AudioTowerConfig,
    BiModalFusionConfig,
    ConformerConfig,
    ContrastiveConfig,
    CrossAttentionConfig,
    DecoderConfig,
    GatedBlockConfig,
    LateFusionConfig,
    MAEConfig,
    PerceiverConfig,
    SwinConfig,
    TextEncoderConfig,
    TransformerXLConfig,
    VisionTowerConfig,
    ViTConfig,
    weights_problems,
)

_TP = "parallel.tensor_model_parallel_size"


@section
class SystemConfig:
    """What every system has; a system's own section derives from it."""

    system: str
    """Name of the system."""
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation: Transformer Engine on CUDA, plain torch elsewhere; auto chooses."""
    attention_backend: Annotated[
        Literal["auto", "flash", "fused", "unfused", "local"], megatron("attention-backend")
    ] = "auto"
    """Kernels that Transformer Engine takes for attention: FlashAttention, cuDNN's fused ones, its own unfused; auto:
    the fastest that there is. local is torch's attention, which model.backend local has."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    hidden_dropout: float = 0.0
    """Dropout on each sublayer's output."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""

    @property
    def inputs(self) -> InputFormat:
        """What samples must hold."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its samples hold")

    def problems(self, config, sizes) -> Iterator[str]:
        """What contradicts itself, the rest of the configuration or the layout."""
        yield from ()

    def notes(self, sizes) -> Iterator[str]:
        """What this system does not divide the way a layout asks; it is repeated instead."""
        yield from ()


def _whole(sizes, what: str) -> Iterator[str]:
    if sizes.cp > 1:
        yield f"context parallel {sizes.cp}: {what} is whole on each of these processes, which repeat its work"
    if sizes.sequence_parallel:
        yield f"sequence parallel: {what} is tensor parallel only, because its length divides by no size"


@section
class SynapseConfig(SystemConfig):
    """Synapse-70B: a decoder that reads image, video and audio memory through gated cross-attention."""

    system: Literal["synapse"] = "synapse"
    """Name of the system."""
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    cross_attention: CrossAttentionConfig = Field(default_factory=CrossAttentionConfig)
    vision: VisionTowerConfig = Field(default_factory=VisionTowerConfig)
    audio: AudioTowerConfig = Field(default_factory=AudioTowerConfig)

    @property
    def inputs(self) -> InputFormat:
        """Packed rows with images, frames of videos and spectrograms."""
        return InputFormat(
            vocab_size=self.decoder.vocab_size,
            image_size=self.vision.image_size,
            video="frames",
            sound="log_mel",
            sample_rate=self.audio.sample_rate,
            seconds=self.audio.seconds,
            num_mel_bins=self.audio.num_mel_bins,
        )

    def problems(self, config, sizes) -> Iterator[str]:
        """What is wrong."""
        yield from self.decoder.problems("model.decoder", sizes.tp)
        groups, name = self.cross_attention.num_query_groups, "model.cross_attention.num_query_groups"
        yield from divides("model.decoder.num_attention_heads", self.decoder.num_attention_heads, name, groups)
        yield from divides(name, groups, _TP, sizes.tp)
        if self.cross_attention.every < 1:
            yield f"model.cross_attention.every is {self.cross_attention.every}; it must be at least 1"
        yield from self.vision.problems("model.vision", sizes.tp)
        yield from self.audio.problems("model.audio", sizes.tp)
        frames = config.data.frames_per_video
        if frames > self.vision.max_frames:
            yield f"data.frames_per_video is {frames}, above model.vision.max_frames {self.vision.max_frames}"

    def notes(self, sizes) -> Iterator[str]:
        """Both towers are whole."""
        yield from _whole(sizes, "each tower")


def _decoder(**fields) -> DecoderConfig:
    return DecoderConfig(**{"num_query_groups": 8, "vocab_size": 50176, "ffn_hidden_size": 16384, **fields})


@section
class AVTConfig(SystemConfig):
    """AVT-33B: Swin and Conformer encoders, bi-modal fusion, a decoder that reads the fused memory in every layer."""

    system: Literal["avt"] = "avt"
    """Name of the system."""
    vision: SwinConfig = Field(default_factory=SwinConfig)
    audio: ConformerConfig = Field(default_factory=ConformerConfig)
    fusion: BiModalFusionConfig = Field(default_factory=BiModalFusionConfig)
    decoder: DecoderConfig = Field(
        default_factory=lambda: _decoder(num_layers=48, hidden_size=6144, num_attention_heads=48)
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
            mask_ratio=self.mask_ratio if "masked_lm" in self.tasks else 0.0,
            tasks=tuple(self.tasks.items()),
        )

    def problems(self, config, sizes) -> Iterator[str]:
        """What is wrong."""
        yield from self.decoder.problems("model.decoder", sizes.tp)
        yield from self.vision.problems("model.vision", sizes.tp)
        yield from self.audio.problems("model.audio", sizes.tp)
        yield from self.fusion.problems("model.fusion", sizes.tp)
        if self.contrastive_weight > 0:
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
        yield from _whole(sizes, "what comes before the decoder")


@section
class VLMConfig(SystemConfig):
    """VLM-14B: an MAE vision tower and a causal decoder whose upper half reads it through gated blocks."""

    system: Literal["vlm"] = "vlm"
    """Name of the system."""
    phase: Literal["mae", "joint"] = "joint"
    """Masked autoencoding of the tower alone, or contrastive and causal LM of everything."""
    vision: ViTConfig = Field(default_factory=ViTConfig)
    mae: MAEConfig = Field(default_factory=MAEConfig)
    decoder: DecoderConfig = Field(
        default_factory=lambda: _decoder(num_layers=32, hidden_size=5120, num_attention_heads=40)
    )
    cross_attention: GatedBlockConfig = Field(default_factory=GatedBlockConfig)
    contrastive: ContrastiveConfig = Field(default_factory=ContrastiveConfig)
    contrastive_weight: float = 0.5
    """Weight of the image-text contrastive loss."""
    causal_lm_weight: float = 0.5
    """Weight of next-token prediction."""

    @property
    def inputs(self) -> InputFormat:
        """Rows of one text and at most one image."""
        patches = self.vision.num_patches if self.phase == "mae" else 0
        return InputFormat(self.decoder.vocab_size, packed=False, image_size=self.vision.image_size, patches=patches)

    def problems(self, config, sizes) -> Iterator[str]:
        """What is wrong."""
        yield from self.vision.problems("model.vision", sizes.tp)
        yield from self.mae.problems("model.mae", sizes.tp)
        if self.phase == "mae":
            yield from self.mae.mask_problems("model.mae", self.vision)
        yield from self.decoder.problems("model.decoder", sizes.tp)
        if self.phase == "joint":
            weights = {"contrastive_weight": self.contrastive_weight, "causal_lm_weight": self.causal_lm_weight}
            yield from weights_problems("model", **weights)
            if self.contrastive_weight > 0:
                yield from self.contrastive.problems("model.contrastive", config.training, sizes)
        cross = self.cross_attention
        if not 1 <= cross.first_layer < self.decoder.num_layers or cross.every < 1:
            yield (
                f"model.cross_attention: first_layer {cross.first_layer} and every {cross.every} do not lie within "
                f"1 … {self.decoder.num_layers - 1} (the text embedding is taken below the first block)"
            )

    def notes(self, sizes) -> Iterator[str]:
        """The tower is whole."""
        yield from _whole(sizes, "the vision tower")


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
    def inputs(self) -> InputFormat:
        """Rows of one text and at most one image, with a masked copy of the text if that is learned from."""
        return InputFormat(
            self.text.vocab_size,
            packed=False,
            image_size=self.vision.image_size,
            mask_ratio=self.mask_ratio if self.masked_lm_weight > 0 else 0.0,
        )

    def problems(self, config, sizes) -> Iterator[str]:
        """What is wrong."""
        yield from self.vision.problems("model.vision", sizes.tp)
        yield from self.text.problems("model.text", sizes.tp)
        yield from self.perceiver.problems("model.perceiver", sizes.tp)
        if self.contrastive_weight > 0:
            yield from self.contrastive.problems("model.contrastive", config.training, sizes)
        yield from weights_problems(
            "model",
            contrastive_weight=self.contrastive_weight,
            masked_lm_weight=self.masked_lm_weight,
            matching_weight=self.matching_weight,
        )
        if self.matching_weight > 0 and config.training.micro_batch_size * sizes.dp < 2:
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
        yield from _whole(sizes, "the whole model")


@section
class DualEncoderConfig(SystemConfig):
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
    def inputs(self) -> InputFormat:
        """Rows of one text and at most one image."""
        masks = self.phase == "mae" or self.mae_weight > 0
        patches = self.vision.num_patches if masks else 0
        return InputFormat(self.text.vocab_size, packed=False, image_size=self.vision.image_size, patches=patches)

    def problems(self, config, sizes) -> Iterator[str]:
        """What is wrong."""
        yield from self.vision.problems("model.vision", sizes.tp)
        yield from self.mae.problems("model.mae", sizes.tp)
        if self.phase == "mae" or self.mae_weight > 0:
            yield from self.mae.mask_problems("model.mae", self.vision)
        yield from self.text.problems("model.text", sizes.tp)
        if self.phase == "joint":
            weights = {"contrastive_weight": self.contrastive_weight, "causal_lm_weight": self.causal_lm_weight}
            yield from weights_problems("model", **weights)
            if self.contrastive_weight > 0:
                yield from self.contrastive.problems("model.contrastive", config.training, sizes)
        if self.mae_weight < 0:
            yield f"model.mae_weight is {self.mae_weight}; a weight must not be negative"
        heads = "model.fusion.num_attention_heads"
        yield from divides("model.text.hidden_size", self.text.hidden_size, heads, self.fusion.num_attention_heads)
        yield from divides(heads, self.fusion.num_attention_heads, _TP, sizes.tp)
        yield from divides("model.fusion.ffn_hidden_size", self.fusion.ffn_hidden_size, _TP, sizes.tp)
        length, positions = config.data.seq_length, self.text.max_positions
        if length > positions:
            yield f"data.seq_length is {length}, above model.text.max_positions {positions}"

    def notes(self, sizes) -> Iterator[str]:
        """All of it is towers."""
        yield from _whole(sizes, "the whole model")


#: Sections by the name of their system; `models.systems.register` adds a user's own.
SECTIONS: dict[str, type[SystemConfig]] = {
    "synapse": SynapseConfig,
    "avt": AVTConfig,
    "vlm": VLMConfig,
    "perceiver_fusion": PerceiverFusionConfig,
    "dual_encoder": DualEncoderConfig,
}
