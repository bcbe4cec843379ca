"""A small Swin V2 and microbatches of images and clips, for its tests of layers and of export.

Oracles are compared in double precision. In single precision transformers' own gradients of these random weights are
off by up to 7e-5 of the largest value: norms after attention enlarge small differences between averages.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import Graph, names_of
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.swin.nodes import swin_nodes
from megatron_mm.parts.swin.section import SwinConfig
from tests.models import synapse_case as case


def tower(**changes: object) -> SwinConfig:
    """Stage 0 is 8 x 8 in windows of 4 (shifted in every second block), stage 1 is one window of 4 x 4."""
    sizes = {
        "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "temporal_window_size": 2,
        "image_size": 32,
    }  # fmt: skip
    return SwinConfig(**sizes | changes)


#: Settings of comparisons with an oracle.
DOUBLE = LayerSettings(dtype=torch.float64)


def make_batch(tower: SwinConfig, images: int = 3, clips: int = 0, frames: int = 8, seed: int = 0) -> Microbatch:
    """Random images and clips in double precision; text is of no matter to the tower."""
    generator = torch.Generator().manual_seed(seed)
    rows, length, size = images + clips, 4, tower.image_size
    plan = MicrobatchPlan(rows, length, images, 1, 1, 1, True, length, num_clips=clips, clip_frames=frames)
    return Microbatch(
        plan=plan,
        document_ids_RT=torch.zeros(rows, length, dtype=torch.long),
        position_ids_RT=torch.arange(length).repeat(rows, 1),
        loss_mask_RT=torch.ones(rows, length),
        image_slots_RK=torch.full((rows, 1), -1),
        image_slot_documents_RK=torch.full((rows, 1), -2),
        sound_slots_RJ=torch.full((rows, 1), -1),
        sound_slot_documents_RJ=torch.full((rows, 1), -2),
        images_ICHW=torch.randn(images, 3, size, size, generator=generator, dtype=torch.float64),
        clips_VFCHW=torch.randn(clips, frames, 3, size, size, generator=generator, dtype=torch.float64)
        if clips
        else None,
    )


def build(tower: SwinConfig, settings: LayerSettings = DOUBLE, seed: int = 3) -> tuple[Graph, nn.ModuleDict]:
    """The graph and its modules, with random values in all parameters: nothing is 0 or 1."""
    graph = Graph(swin_nodes(tower, settings, 0.02), [])
    modules = case.build(graph)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale"):
                parameter.copy_(1.0 + noise)
            elif parameter.dim() == 1:
                parameter.copy_(noise * 0.1 + ("norm.weight" in name))
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return graph, modules


def run(graph: Graph, modules: nn.ModuleDict, batch: Microbatch) -> torch.Tensor:
    """The tower's memory."""
    return case.run(graph, modules, batch)[1]["vision_memory"]


def named(modules: nn.ModuleDict) -> dict[str, nn.Parameter]:
    """Parameters by training name."""
    return {name.replace("/", "."): parameter for name, parameter in modules.named_parameters()}


def exported(tower: SwinConfig, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by training name under the names of an exported folder."""
    entries = names_of(swin_nodes(tower, LayerSettings(), 0.02, "tower"))
    assert sorted(entry.training for entry in entries) == sorted(values)
    pairs = (pair for entry in entries for pair in entry.split(values[entry.training]))
    return {name.removeprefix("tower."): value.contiguous() for name, value in pairs}


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """To 1e-5 of the largest value."""
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    difference = (found - expected).abs().max().item()
    assert difference <= 1e-5 * max(expected.abs().max().item(), 1e-3), (name, difference)
