"""Whisper's encoder as nodes (arXiv:2212.04356): log-mel spectrograms of fixed length to the stream `audio_memory`.

`audio.embeddings` (convolutions of stride 1 and 2, fixed sinusoids) → `audio.layers.i` → `audio.output` (LayerNorm),
on [A, frames / 2, C]. The tower is whole on every context-parallel process.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import AttentionPlan
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import copies, layer_cost
from megatron_mm.models.layers.parameters import describe
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import stack_layer
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


class AudioOutput(nn.Module):
    """The encoder's final LayerNorm."""

    def __init__(self, settings: LayerSettings, shape: StackShape) -> None:
        super().__init__()
        self.final_layernorm = backend_of(settings).norm(
            layer_config(settings, shape, sharded=False), shape.hidden_size
        )

    def forward(self, audio_memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[A, M, C] -> [A, M, C]."""
        return self.final_layernorm(audio_memory)


def sound_plan(hidden: torch.Tensor, context: ForwardContext) -> AttentionPlan:
    """Every position of a sound sees all of that sound, its padding included, as in Whisper."""
    return AttentionPlan(rows=hidden.shape[0])


def audio_shape(tower: AudioTowerConfig, init_std: float) -> StackShape:
    """The tower as a stack of layers."""
    return StackShape(
        num_layers=tower.num_layers,
        hidden_size=tower.hidden_size,
        num_attention_heads=tower.num_attention_heads,
        num_query_groups=tower.num_attention_heads,
        ffn_hidden_size=tower.ffn_hidden_size,
        normalization="LayerNorm",
        norm_epsilon=1e-5,
        activation=functional.gelu,
        init_std=init_std,
    )


def audio_nodes(tower: AudioTowerConfig, settings: LayerSettings, init_std: float) -> list[Node]:
    """Nodes of the tower."""
    shape = audio_shape(tower, init_std)
    tokens, width, bins = tower.tokens_per_sound, tower.hidden_size, tower.num_mel_bins
    memory = Stream("audio_memory", lambda plan: (plan.num_sounds, tokens, width))

    def embeddings() -> nn.Module:
        return describe(SpectrogramEmbedding(tower, settings), init_std=init_std)

    def output() -> nn.Module:
        return describe(AudioOutput(settings, shape), init_std=init_std)

    def embeddings_cost(plan: MicrobatchPlan) -> NodeCost:
        conv1, conv2 = 3 * bins * width, 3 * width * width
        frames = plan.num_sounds * tower.num_frames * copies(settings.sizes, sharded=False)  # on every process
        # Inputs of both convolutions and of both GELUs.
        stored = 2.0 * frames * (bins + 2 * width + width / 2)
        return NodeCost(conv1 + conv2 + 2 * width, 2.0 * frames * (conv1 + conv2 / 2), stored)

    def output_cost(plan: MicrobatchPlan) -> NodeCost:
        stored = 2.0 * plan.num_sounds * tokens * width * copies(settings.sizes, sharded=False)
        return NodeCost(2 * width, 0.0, stored)

    learns = not tower.frozen
    nodes = [
        Node("audio.embeddings", embeddings, (), (memory,), embeddings_cost, frozenset({"sounds_AMF"}), learns)
    ]
    for index in range(tower.num_layers):
        nodes.append(
            Node(
                f"audio.layers.{index}",
                partial(stack_layer, settings, shape, index + 1, sound_plan, sharded=False),
                ("audio_memory",),
                (memory,),
                lambda plan: layer_cost(shape, plan.num_sounds, tokens, settings.sizes, sharded=False),
                trainable=learns,
                recomputable=True,
            )
        )
    nodes.append(Node("audio.output", output, ("audio_memory",), (memory,), output_cost, trainable=learns))
    return nodes
