"""Settings of Synapse-70B."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.section import TENSOR_PARALLEL, divides, section
from megatron_mm.config.system import SystemConfig, whole_notes
from megatron_mm.parts.clip.section import VisionTowerConfig
from megatron_mm.parts.decoder.section import CrossAttentionConfig, DecoderConfig
from megatron_mm.parts.whisper.section import AudioTowerConfig


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
    def generates(self) -> bool:
        """Whether it learns to generate text."""
        return True

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
        yield from divides(name, groups, TENSOR_PARALLEL, sizes.tp)
        if self.cross_attention.every < 1:
            yield f"model.cross_attention.every is {self.cross_attention.every}; it must be at least 1"
        yield from self.vision.problems("model.vision", sizes.tp)
        yield from self.audio.problems("model.audio", sizes.tp)
        frames = config.data.frames_per_video
        if frames > self.vision.max_frames:
            yield f"data.frames_per_video is {frames}, above model.vision.max_frames {self.vision.max_frames}"

    def notes(self, sizes) -> Iterator[str]:
        """Both towers are whole."""
        yield from whole_notes(sizes, "each tower")
