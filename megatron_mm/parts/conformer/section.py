"""Settings of the Conformer."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from megatron_mm.config.section import heads_problems, section


@section
class ConformerConfig:
    """Conformer (arXiv:2005.08100) on the raw waveform, behind wav2vec 2.0's convolutions (arXiv:2006.11477)."""

    num_layers: int = 32
    """Conformer blocks."""
    hidden_size: int = 1536
    """Width of the output."""
    num_attention_heads: int = 16
    """Attention heads."""
    ffn_hidden_size: int = 6144
    """Inner width of both feed-forward modules."""
    conv_kernel_size: int = 31
    """Kernel of the depthwise convolution; odd."""
    front_channels: int = 512
    """Channels of the convolutions on the waveform."""
    front_kernels: list[int] = Field(default_factory=lambda: [10, 3, 3, 3, 3, 2, 2])
    """Kernels of the convolutions on the waveform."""
    front_strides: list[int] = Field(default_factory=lambda: [5, 2, 2, 2, 2, 2, 2])
    """Strides of the convolutions on the waveform: 320 samples, 20 ms, in all."""
    sample_rate: int = 16000
    """Samples a second; sounds of another rate are resampled."""
    seconds: float = 10.0
    """Length to which every sound is padded or cut."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every LayerNorm of the tower."""
    frozen: bool = False
    """Keep the tower's weights as loaded."""

    @property
    def num_samples(self) -> int:
        """Samples of one sound."""
        return round(self.seconds * self.sample_rate)

    @property
    def tokens_per_sound(self) -> int:
        """Output positions of one sound."""
        length = self.num_samples
        for kernel, stride in zip(self.front_kernels, self.front_strides):
            length = (length - kernel) // stride + 1
        return max(0, length)

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from heads_problems(name, self, tp)
        if len(self.front_kernels) != len(self.front_strides):
            yield f"{name}.front_kernels and {name}.front_strides differ in number"
        elif self.tokens_per_sound < 1:
            yield f"{name}.seconds is {self.seconds}: too short for the convolutions on the waveform"
        if self.conv_kernel_size % 2 == 0:
            yield f"{name}.conv_kernel_size is {self.conv_kernel_size}; it must be odd"
