"""A small Conformer tower and sounds, for tests of its layers, its costs and its export."""

from __future__ import annotations

import torch
from torch import nn

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Graph, Loss
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.names import Entry
from megatron_mm.parts.conformer.nodes import conformer_nodes
from megatron_mm.parts.conformer.section import ConformerConfig
from tests.models.synapse_case import run


def tiny_tower(**changes: object) -> ConformerConfig:
    """Two blocks, three convolutions on the waveform, 21 positions a sound."""
    sizes = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "conv_kernel_size": 7,
        "front_channels": 16, "front_kernels": [10, 3, 2], "front_strides": [5, 2, 2], "seconds": 0.027,
    }
    return ConformerConfig(**(sizes | changes))


def tower_graph(tower: ConformerConfig, settings: LayerSettings | None = None) -> Graph:
    """The tower alone."""
    return Graph(conformer_nodes(tower, settings or LayerSettings(), 0.02), [])


def make_batch(tower: ConformerConfig, sounds: int = 2, seed: int = 0) -> Microbatch:
    """One row a sound; the second sound ends early and is zero from there."""
    generator = torch.Generator().manual_seed(seed)
    waveforms = torch.randn(sounds, tower.num_samples, generator=generator)
    waveforms[1:, tower.num_samples * 2 // 3 :] = 0.0
    nothing = torch.zeros(sounds, 1, dtype=torch.long)
    return Microbatch(
        plan=MicrobatchPlan(sounds, 1, 1, sounds, 1, 1, True, 1),
        document_ids_RT=nothing,
        position_ids_RT=nothing,
        loss_mask_RT=nothing.float(),
        image_slots_RK=nothing - 1,
        image_slot_documents_RK=nothing - 2,
        sound_slots_RJ=torch.arange(sounds)[:, None],
        sound_slot_documents_RJ=nothing,
        waveforms_AN=waveforms,
    )


def tensor_parallel_case(settings: LayerSettings) -> tuple[Graph, Microbatch]:
    """The tower under a loss that weighs every output differently."""
    tower = tiny_tower()

    def compute(memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return (memory * torch.randn(memory.shape, generator=torch.Generator().manual_seed(5))).sum()

    loss = Loss("weighted", compute, lambda batch: torch.ones(()), ("audio_memory",))
    return Graph(conformer_nodes(tower, settings, 0.2), [loss]), make_batch(tower)


def memory(graph: Graph, modules: nn.ModuleDict, batch: Microbatch) -> torch.Tensor:
    """What the tower writes last, [A, L, C]."""
    return run(graph, modules, batch)[1]["audio_memory"]


def context() -> ForwardContext:
    """For a layer alone, which reads nothing of a batch."""
    return ForwardContext(make_batch(tiny_tower()))


def parameters(modules: nn.Module) -> dict[str, nn.Parameter]:
    """By training name."""
    return {name.replace("/", "."): parameter for name, parameter in modules.named_parameters()}


def randomize(module: nn.Module) -> None:
    """Weights of every kind away from 0 and 1, so that nothing is tested at a special point."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * (parameter.numel() / parameter.shape[0]) ** -0.5)


def training_tensors(entries: list[Entry], source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Training tensors made of Hugging Face's (parameters or their gradients), by training name."""
    made = {}
    for entry in entries:
        made[entry.training] = torch.empty(entry.shape)
        for part in entry.parts:
            entry.fill(made[entry.training], part, source[part.name])
    return made


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """To 1e-5 of the largest value expected."""
    assert found.shape == expected.shape, name
    scale = max(expected.abs().max().item(), 1e-3)
    assert (found - expected).abs().max().item() <= 1e-5 * scale, name
