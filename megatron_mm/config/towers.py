"""Sections of the parts that systems are made of: decoders, encoders, towers, fusion. Each says what it cannot be.

A section's `problems(name, tp)` yields what contradicts itself or the tensor parallel size; `name` is its path in the
recipe. Sizes of the full models are set by their recipes; the defaults here are those of the system that has the part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_mm.config.section import divides, section, share

_TP = "parallel.tensor_model_parallel_size"


def _heads(name: str, part, tp: int, groups: bool = False) -> Iterator[str]:
    """Heads divide the width, and tensor parallelism divides heads, key-value heads and the MLP."""
    heads = f"{name}.num_attention_heads"
    yield from divides(f"{name}.hidden_size", part.hidden_size, heads, part.num_attention_heads)
    yield from divides(heads, part.num_attention_heads, _TP, tp)
    if groups:
        key_value = f"{name}.num_query_groups"
        yield from divides(heads, part.num_attention_heads, key_value, part.num_query_groups)
        yield from divides(key_value, part.num_query_groups, _TP, tp)
    yield from divides(f"{name}.ffn_hidden_size", part.ffn_hidden_size, _TP, tp)


@section
class DecoderConfig:
    """The causal text decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, untied head."""

    num_layers: int = 80
    """Self-attention layers."""
    hidden_size: int = 8192
    """Width of the residual stream."""
    num_attention_heads: int = 64
    """Query heads."""
    num_query_groups: int = 8
    """Key-value heads."""
    ffn_hidden_size: int = 27648
    """Inner width of the SwiGLU MLP."""
    vocab_size: int = 128000
    """Rows of the embedding and the head, at least the tokenizer's vocabulary."""
    rotary_base: float = 500000.0
    """Base of the rotary frequencies."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm of the decoder."""

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from _heads(name, self, tp, groups=True)
        yield from divides(f"{name}.vocab_size", self.vocab_size, _TP, tp)
        if self.hidden_size // max(1, self.num_attention_heads) % 2:
            yield f"{name}: hidden_size / num_attention_heads must be even for rotary positions"


@section
class CrossAttentionConfig:
    """Tanh-gated cross-attention sublayers (Flamingo, arXiv:2204.14198) that read image and audio memory."""

    every: int = 10
    """One sublayer before each group of this many decoder layers."""
    num_query_groups: int = 32
    """Key-value heads; query heads are the decoder's. Memory is projected once, so these cost no growing cache."""
    qk_layernorm: bool = True
    """RMSNorm of queries and keys, per head."""
    gate_init: float = 0.0
    """Initial value of the gate before tanh; 0 leaves the decoder as it was."""


@section
class VisionTowerConfig:
    """CLIP's vision transformer (arXiv:2103.00020): class token, learned positions, quick-GELU, no final norm."""

    num_layers: int = 24
    """Transformer layers."""
    hidden_size: int = 1024
    """Width; the memory that cross-attention reads has this width."""
    num_attention_heads: int = 16
    """Attention heads."""
    ffn_hidden_size: int = 4096
    """Inner width of the MLP."""
    patch_size: int = 14
    """Pixels on a patch's side."""
    image_size: int = 224
    """Pixels on an image's side."""
    max_frames: int = 32
    """Rows of the temporal position table for video frames."""
    frozen: bool = True
    """Keep the tower's weights as loaded (the temporal table stays trainable)."""

    @property
    def tokens_per_image(self) -> int:
        """Memory positions of one image or frame: the patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from _heads(name, self, tp)
        yield from divides(f"{name}.image_size", self.image_size, f"{name}.patch_size", self.patch_size)


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
        yield from _heads(name, self, tp)
        if self.num_frames % 2 or self.num_frames < 2:
            yield f"{name}.seconds is {self.seconds}, {self.num_frames} frames of 10 ms; it must make an even number"
        yield from divides(f"{name}.hidden_size", self.hidden_size, "4 (sines and cosines of positions)", 4)


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
        yield from _heads(name, self, tp)
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
        yield from _heads(name, self, tp)
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
            yield from divides(f"{name}.num_heads of stage {stage}", heads, _TP, tp)
            yield from divides(f"MLP of {name} stage {stage}", int(width * self.mlp_ratio), _TP, tp)


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
        yield from _heads(name, self, tp)
        if len(self.front_kernels) != len(self.front_strides):
            yield f"{name}.front_kernels and {name}.front_strides differ in number"
        elif self.tokens_per_sound < 1:
            yield f"{name}.seconds is {self.seconds}: too short for the convolutions on the waveform"
        if self.conv_kernel_size % 2 == 0:
            yield f"{name}.conv_kernel_size is {self.conv_kernel_size}; it must be odd"


@section
class TransformerXLConfig:
    """Text encoder with relative positions and segment memory (Transformer-XL, arXiv:1901.02860), bidirectional within
    a segment, pre-norm. Memory is the segment before, of the same sample, without gradient."""

    num_layers: int = 32
    """Layers."""
    hidden_size: int = 5120
    """Width."""
    num_attention_heads: int = 40
    """Attention heads."""
    ffn_hidden_size: int = 23040
    """Inner width of the MLP."""
    segment_length: int = 128
    """Tokens of a segment, and of its memory."""
    vocab_size: int = 50176
    """Rows of the embedding, at least the tokenizer's vocabulary."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every LayerNorm of the encoder."""

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from _heads(name, self, tp)
        yield from divides(f"{name}.vocab_size", self.vocab_size, _TP, tp)
        yield from divides(f"{name}.hidden_size", self.hidden_size, "2 (sines and cosines of positions)", 2)


@section
class PerceiverConfig:
    """Latent transformer (Perceiver IO, arXiv:2107.14795): latents read the inputs again and again."""

    num_latents: int = 512
    """Latent vectors."""
    hidden_size: int = 4096
    """Width of a latent."""
    num_blocks: int = 4
    """Blocks of one cross-attention and several self-attention layers."""
    layers_per_block: int = 5
    """Self-attention layers of a block."""
    num_attention_heads: int = 32
    """Attention heads."""
    ffn_hidden_size: int = 16384
    """Inner width of the MLP."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every LayerNorm."""

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from _heads(name, self, tp)


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
        yield from _heads(name, self, tp, groups=True)


@section
class TextEncoderConfig:
    """Causal text transformer in GPT-2's form: LayerNorm, learned positions, GELU, biases."""

    num_layers: int = 24
    """Layers."""
    hidden_size: int = 1024
    """Width."""
    num_attention_heads: int = 16
    """Attention heads."""
    ffn_hidden_size: int = 4096
    """Inner width of the MLP."""
    vocab_size: int = 32768
    """Rows of the embedding, at least the tokenizer's vocabulary."""
    max_positions: int = 77
    """Rows of the position table."""
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu_tanh"
    """GPT-2's tanh approximation of GELU; OPT has relu."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every LayerNorm."""

    def problems(self, name: str, tp: int) -> Iterator[str]:
        """What is wrong."""
        yield from _heads(name, self, tp)
        yield from divides(f"{name}.vocab_size", self.vocab_size, _TP, tp)


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
class GatedBlockConfig:
    """Gated cross-attention blocks (attention and MLP, tanh gates) among the upper layers of a decoder."""

    first_layer: int = 16
    """Decoder layers below the first block."""
    every: int = 2
    """One block before each group of this many layers."""
    qk_layernorm: bool = True
    """RMSNorm of queries and keys, per head."""
    gate_init: float = 0.0
    """Initial value of the gates before tanh; 0 leaves the decoder as it was."""


@section
class ContrastiveConfig:
    """Symmetric InfoNCE with a learned temperature (CLIP, arXiv:2103.00020)."""

    embedding_size: int = 1024
    """Width of the shared space."""
    temperature: float = 0.07
    """Initial temperature; its inverse is the logit scale."""
    max_scale: float = 100.0
    """Largest logit scale."""
    negatives: Literal["microbatch", "batch"] = "microbatch"
    """Against the micro_batch_size x data parallel samples of a microbatch, or against the whole global batch (features
    are computed once without gradient, cached, and a second pass carries the gradient)."""

    def problems(self, name: str, training, sizes) -> Iterator[str]:
        """What is wrong; the loss compares samples with one another, so one alone teaches nothing."""
        if self.temperature <= 0:
            yield f"{name}.temperature is {self.temperature}; it must be positive"
        elif self.temperature * self.max_scale < 1:
            yield (
                f"{name}.temperature is {self.temperature}: the scale would begin with {1 / self.temperature:g}, above "
                f"{name}.max_scale {self.max_scale}"
            )
        if training.global_batch_size < 2:
            yield "training.global_batch_size is 1: a contrastive loss needs at least two samples"
        elif self.negatives == "microbatch" and training.micro_batch_size * sizes.dp < 2:
            yield (
                "training.micro_batch_size 1 x data parallel 1 leaves a contrastive loss one sample a microbatch; "
                f"take more, or {name}.negatives: batch"
            )


def weights_problems(name: str, **weights: float) -> Iterator[str]:
    """Objective weights must be non-negative and not all zero."""
    for key, value in weights.items():
        if value < 0:
            yield f"{name}.{key} is {value}; a weight must not be negative"
    if not any(value > 0 for value in weights.values()):
        yield f"{name}: every weight is zero ({', '.join(weights)}); nothing would be learned"
