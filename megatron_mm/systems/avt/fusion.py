"""Fusion of sight and sound: in every layer each modality reads the other, then both are one memory.

Shape suffixes: R rows, Mv, Ma memory positions of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import AttentionPlan, whole_plan
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import StackWork, copies
from megatron_mm.models.layers.memory_attention import MemoryLayerKind, MemoryLayerNames, ViewMaker
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import Sequences
from megatron_mm.models.names import LLAMA, Entry, norm, plain
from megatron_mm.models.work import MatrixProduct
from megatron_mm.systems.avt.rows import has_sound, read_audio, read_vision, seen_positions, vision_length
from megatron_mm.systems.avt.section import AVTConfig

#: What a layer has beyond Llama's.
CROSS_NAMES = MemoryLayerNames("cross_attn_layernorm", "cross_attn")


def fusion_shape(config: AVTConfig) -> StackShape:
    """Both modalities' layers."""
    fusion = config.fusion
    return StackShape.of(
        fusion,
        normalization="RMSNorm",
        norm_epsilon=fusion.layernorm_epsilon,
        activation=functional.silu,
        bias=False,
        gated=True,
        init_std=config.init_std,
    )


class FusionInputs(nn.Module):
    """Encoder outputs, one memory a row, projected to the fusion's width; whole on every process."""

    def __init__(self, config: AVTConfig, settings: LayerSettings) -> None:
        super().__init__()
        self._vision, width = config.vision, config.fusion.hidden_size
        self.vision_projection = empty_parameter(width, config.vision.hidden_size, dtype=settings.dtype)
        self.audio_projection = empty_parameter(width, config.audio.hidden_size, dtype=settings.dtype)

    def forward(
        self, vision_memory: torch.Tensor, audio_memory: torch.Tensor, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> [R, Mv, H], [R, Ma, H]."""
        vision, _ = read_vision(self._vision, functional.linear(vision_memory, self.vision_projection), context)
        return vision, read_audio(functional.linear(audio_memory, self.audio_projection), context)


class FusionLayer(nn.Module):
    """Each modality's layer reads the other modality as it was before."""

    def __init__(self, vision: nn.Module, audio: nn.Module) -> None:
        super().__init__()
        self.vision, self.audio = vision, audio

    def forward(
        self, vision_rows: torch.Tensor, audio_rows: torch.Tensor, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, Mv, H], [R, Ma, H] -> the same."""
        return self.vision(vision_rows, audio_rows, context), self.audio(audio_rows, vision_rows, context)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Those of both layers."""
        entries = self.vision.sharded_state_dict(f"{prefix}vision.", sharded_offsets, metadata)
        return {**entries, **self.audio.sharded_state_dict(f"{prefix}audio.", sharded_offsets, metadata)}


class FusionOutput(nn.Module):
    """Both modalities as one memory, normalised and projected to the decoder's width; whole on every process."""

    def __init__(self, config: AVTConfig, settings: LayerSettings) -> None:
        super().__init__()
        shape = fusion_shape(config)
        self.final_layernorm = backend_of(settings).norm(
            layer_config(settings, shape, sharded=False), shape.hidden_size
        )
        self.projection = empty_parameter(config.decoder.hidden_size, shape.hidden_size, dtype=settings.dtype)

    def forward(
        self, vision_rows: torch.Tensor, audio_rows: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """-> [R, Mv + Ma, decoder's width]."""
        both = self.final_layernorm(torch.cat((vision_rows, audio_rows), dim=1))
        return functional.linear(both, self.projection)


def _projection_cost(settings: LayerSettings, positions: int, inputs: int, outputs: int) -> NodeCost:
    everywhere = positions * copies(settings.sizes, sharded=False)
    work = (MatrixProduct(positions, outputs, inputs, what="projection"),)
    return NodeCost(inputs * outputs, work, 2.0 * everywhere * inputs, settings.sizes.tp_cp)


@dataclass(frozen=True)
class FusionInputsKind:
    """Both projections, on every process."""

    config: AVTConfig
    settings: LayerSettings

    def build(self) -> FusionInputs:
        """The module."""
        return describe(FusionInputs(self.config, self.settings), init_std=self.config.init_std)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Of all images, clips and sounds."""
        vision, audio, hidden = self.config.vision, self.config.audio, self.config.fusion.hidden_size
        seen = plan.num_images * vision.tokens_per_clip(1) + plan.num_clips * vision.tokens_per_clip(plan.clip_frames)
        heard = plan.num_sounds * audio.tokens_per_sound
        seen_cost = _projection_cost(self.settings, seen, vision.hidden_size, hidden)
        return seen_cost + _projection_cost(self.settings, heard, audio.hidden_size, hidden)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """One matrix a modality."""
        hidden = self.config.fusion.hidden_size
        for name, tower in (("vision", self.config.vision), ("audio", self.config.audio)):
            sizes = (hidden, tower.hidden_size)
            yield plain(f"{node}.{name}_projection", f"{exported}.{name}_projection.weight", *sizes)


@dataclass(frozen=True)
class FusionLayerKind:
    """A layer of each modality."""

    vision: MemoryLayerKind
    audio: MemoryLayerKind

    def build(self) -> FusionLayer:
        """The layer."""
        return FusionLayer(self.vision.build(), self.audio.build())

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Of both."""
        return self.vision.cost(plan) + self.audio.cost(plan)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Of both."""
        yield from self.vision.names(f"{node}.vision", f"{exported}.vision")
        yield from self.audio.names(f"{node}.audio", f"{exported}.audio")


@dataclass(frozen=True)
class FusionOutputKind:
    """Norm and projection of both modalities, on every process."""

    config: AVTConfig
    settings: LayerSettings

    def build(self) -> FusionOutput:
        """The module."""
        return describe(FusionOutput(self.config, self.settings), init_std=self.config.init_std)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Of all rows."""
        hidden, width = self.config.fusion.hidden_size, self.config.decoder.hidden_size
        positions = plan.num_rows * memory_length(self.config, plan)
        stored = 2.0 * positions * hidden * copies(self.settings.sizes, sharded=False)
        make = StackWork(self.settings)
        work = (make.moved(2 * positions * hidden, "one memory"), make.norm(positions, hidden))
        norm_cost = NodeCost(hidden, work, stored, self.settings.sizes.tp_cp)
        return norm_cost + _projection_cost(self.settings, positions, hidden, width)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Norm and matrix."""
        hidden, width = self.config.fusion.hidden_size, self.config.decoder.hidden_size
        yield from norm(f"{node}.final_layernorm", f"{exported}.norm", hidden, bias=False)
        yield plain(f"{node}.projection", f"{exported}.projection.weight", width, hidden)


def memory_length(config: AVTConfig, plan: MicrobatchPlan) -> int:
    """Mv + Ma."""
    return vision_length(config.vision, plan) + config.audio.tokens_per_sound


def fusion_nodes(config: AVTConfig, settings: LayerSettings) -> list[Node]:
    """Nodes from `vision_memory` and `audio_memory` to `memory`."""
    shape, sounds = fusion_shape(config), config.audio.tokens_per_sound
    hidden, width = shape.hidden_size, config.decoder.hidden_size
    reads = ("vision_rows", "audio_rows")
    rows = (
        Stream("vision_rows", lambda plan: (plan.num_rows, vision_length(config.vision, plan), hidden)),
        Stream("audio_rows", lambda plan: (plan.num_rows, sounds, hidden)),
    )
    memory = Stream("memory", lambda plan: (plan.num_rows, memory_length(config, plan), width))

    def seen(batch: Microbatch) -> tuple[None, torch.Tensor]:
        return None, seen_positions(config.vision, batch)

    def heard(batch: Microbatch) -> tuple[None, torch.Tensor]:
        return None, has_sound(batch)

    def vision_mask(batch: Microbatch) -> AttentionPlan:
        """Positions beyond an image's, in a row shorter than a clip, are hidden."""
        hidden_RM = ~seen_positions(config.vision, batch)
        mask = torch.zeros(hidden_RM.shape, dtype=settings.dtype, device=hidden_RM.device)
        mask = mask.masked_fill(hidden_RM & ~hidden_RM.all(dim=1, keepdim=True), float("-inf"))
        return AttentionPlan(hidden_RM.shape[0], mask=mask[:, None, None])

    def vision_plan(hidden_states: torch.Tensor, context: ForwardContext) -> AttentionPlan:
        return context.derived(vision_mask)

    def vision_rows(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(plan.num_rows, vision_length(config.vision, plan))]

    def audio_rows(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(plan.num_rows, sounds)]

    def layer(index: int) -> Node:
        def modality(view: ViewMaker, own: Sequences, other: Sequences, self_plan: Callable) -> MemoryLayerKind:
            sizes = (view, own, other, hidden, LLAMA, CROSS_NAMES)
            return MemoryLayerKind(settings, shape, index + 1, *sizes, self_plan=self_plan)

        vision = modality(heard, vision_rows, audio_rows, vision_plan)
        kind = FusionLayerKind(vision, modality(seen, audio_rows, vision_rows, whole_plan))
        name = f"fusion.layers.{index}"
        return Node(name, kind, reads, rows, name, recomputable=True)

    inputs, output = FusionInputsKind(config, settings), FusionOutputKind(config, settings)
    return [
        Node("fusion.inputs", inputs, ("vision_memory", "audio_memory"), rows, "fusion"),
        *(layer(index) for index in range(config.fusion.num_layers)),
        Node("fusion.output", output, reads, (memory,), "fusion"),
    ]
