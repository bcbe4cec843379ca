"""Settings of Whisper's encoder."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config.section import divides, heads_problems, section


@section
class AudioTowerConfig:
    """Whisper's encoder (arXiv:2212.04356) on log-mel spectrograms of fixed length."""

    num_layers: int = 24
    """Transformer layers."""
    hidden_size: int = 1024
    """Width; the memory that cross-attention reads has this width."""
    num_attention_heads: int = 16
    """Attention heads."""
    ffn_hidden_size: int = 4096
    """Inner width of the MLP."""
    num_mel_bins: int = 80
    """Mel bands."""
    sample_rate: int = 16000
    """Samples a second; sounds of another rate are resampled."""
    seconds: float = 30.0
    """Length to which every sound is padded or cut."""
    frozen: bool = False
    """Keep the tower's weights as loaded."""

    @property
    def num_frames(self) -> int:
        """Spectrogram frames of one sound (10 ms hop)."""
        return round(self.seconds * 100)

    @property
    def tokens_per_sound(self) -> int:
        """Memory positions of one sound: the second convolution has stride 2."""
        return self.num_frames // 2

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from heads_problems(name, self, tp)
        if self.num_frames % 2 or self.num_frames < 2:
            yield f"{name}.seconds is {self.seconds}, {self.num_frames} frames of 10 ms; it must make an even number"
        yield from divides(f"{name}.hidden_size", self.hidden_size, "4 (sines and cosines of positions)", 4)
