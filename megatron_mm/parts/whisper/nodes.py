"""Whisper's encoder as nodes (arXiv:2212.04356): log-mel spectrograms of fixed length to the stream `audio_memory`.

`audio.embeddings` (convolutions of stride 1 and 2, fixed sinusoids) → `audio.layers.i` → `audio.output` (LayerNorm),
on [A, frames / 2, C]. The tower is whole on every context-parallel process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import whole_plan
from megatron_mm.models.layers.costs import StackWork, copies
from megatron_mm.models.layers.final_norm import FinalNormKind
from megatron_mm.models.layers.parameters import describe
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.models.layers.transformer import StackLayerKind
from megatron_mm.models.names import WHISPER, Entry, plain
from megatron_mm.models.work import MatrixProduct
from megatron_mm.parts.whisper.section import AudioTowerConfig


def sinusoids(length: int, width: int, device: torch.device | int | str = "cpu") -> torch.Tensor:
    """Whisper's fixed positions [length, width]: sines, then cosines, of geometrically spaced time scales to 10,000."""
    step = math.log(10000) / (width // 2 - 1)
    scales = torch.exp(-step * torch.arange(width // 2, device=device))
    angles = torch.arange(length, device=device)[:, None] * scales[None]
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class SpectrogramEmbedding(nn.Module):
    """Two convolutions with GELU over the spectrogram, and sinusoidal positions."""

    def __init__(self, tower: AudioTowerConfig, settings: LayerSettings) -> None:
        super().__init__()
        width, place = tower.hidden_size, {"dtype": settings.dtype, "device": torch.cuda.current_device()}
        self.conv1 = nn.utils.skip_init(nn.Conv1d, tower.num_mel_bins, width, 3, padding=1, **place)
        positions = sinusoids(tower.tokens_per_sound, width, torch.cuda.current_device()).to(settings.dtype)
        self.register_buffer("positions", positions, persistent=False)
        self.conv2 = nn.utils.skip_init(nn.Conv1d, width, width, 3, stride=2, padding=1, **place)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """[A, frames / 2, C] of the microbatch's sounds."""
        hidden = functional.gelu(self.conv1(context.batch.sounds_AMF.to(self.conv1.weight.dtype)))
        return functional.gelu(self.conv2(hidden)).transpose(1, 2) + self.positions


def audio_shape(tower: AudioTowerConfig, init_std: float) -> StackShape:
    """The tower as a stack of layers."""
    return StackShape.of(
        tower,
        normalization="LayerNorm",
        norm_epsilon=1e-5,
        activation=functional.gelu,
        init_std=init_std,
    )


@dataclass(frozen=True)
class EmbeddingsKind:
    """Both convolutions over all spectrograms, on every process."""

    tower: AudioTowerConfig
    settings: LayerSettings
    init_std: float

    def build(self) -> nn.Module:
        """The module."""
        return describe(SpectrogramEmbedding(self.tower, self.settings), init_std=self.init_std)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """What is kept are the inputs of both convolutions and of both GELUs."""
        width, bins = self.tower.hidden_size, self.tower.num_mel_bins
        conv1, conv2 = 3 * bins * width, 3 * width * width
        frames = plan.num_sounds * self.tower.num_frames * copies(self.settings.sizes, sharded=False)
        stored = 2.0 * frames * (bins + 2 * width + width / 2)
        before, after = plan.num_sounds * self.tower.num_frames, plan.num_sounds * self.tower.tokens_per_sound
        make = StackWork(self.settings)
        work = (
            MatrixProduct(before, width, 3 * bins, what="convolution 1"),
            make.moved(2 * before * width, "activation"),
            MatrixProduct(after, width, 3 * width, what="convolution 2"),
            make.moved(2 * after * width, "activation"),
            make.moved(2 * after * width, "positions"),
        )
        return NodeCost(conv1 + conv2 + 2 * width, work, stored, self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Whisper's."""
        width = self.tower.hidden_size
        for name, channels in (("conv1", self.tower.num_mel_bins), ("conv2", width)):
            yield plain(f"{node}.{name}.weight", f"{exported}.{name}.weight", width, channels, 3)
            yield plain(f"{node}.{name}.bias", f"{exported}.{name}.bias", width)


def audio_nodes(
    tower: AudioTowerConfig, settings: LayerSettings, init_std: float, exported: str = "audio_tower"
) -> list[Node]:
    """Nodes of the tower.

    Args:
        exported: the tower's name in the exported model.
    """
    shape = audio_shape(tower, init_std)
    tokens, width, reads = tower.tokens_per_sound, tower.hidden_size, ("audio_memory",)
    writes = (Stream("audio_memory", lambda plan: (plan.num_sounds, tokens, width)),)
    learns = not tower.frozen

    def sequences(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(plan.num_sounds, tokens)]

    def layer(index: int) -> Node:
        kind = StackLayerKind(settings, shape, index + 1, whole_plan, sequences, WHISPER)
        place = f"{exported}.layers.{index}"
        return Node(f"audio.layers.{index}", kind, reads, writes, place, trainable=learns, recomputable=True)

    embeddings, fields = EmbeddingsKind(tower, settings, init_std), frozenset({"sounds_AMF"})
    output = FinalNormKind(settings, shape, sequences)
    return [
        Node("audio.embeddings", embeddings, (), writes, exported, fields, trainable=learns),
        *(layer(index) for index in range(tower.num_layers)),
        Node("audio.output", output, reads, writes, f"{exported}.layer_norm", trainable=learns),
    ]
