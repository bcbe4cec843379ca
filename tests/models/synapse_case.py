"""A small Synapse and small microbatches for the tests of layers: built on one process and run once."""

from __future__ import annotations

import torch
from torch import nn

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Graph
from megatron_mm.models.initialization import initialize_module
from megatron_mm.parts.clip.section import VisionTowerConfig
from megatron_mm.parts.decoder.section import CrossAttentionConfig, DecoderConfig
from megatron_mm.parts.whisper.section import AudioTowerConfig
from megatron_mm.systems.synapse.section import SynapseConfig


def tiny_config(**changes: object) -> SynapseConfig:
    """Every kind of node, grouped queries, two cross layers; gates are open so that everything has a gradient."""
    return SynapseConfig(
        decoder=DecoderConfig(
            num_layers=3, hidden_size=64, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=96, vocab_size=128
        ),
        cross_attention=CrossAttentionConfig(every=2, num_query_groups=2, gate_init=0.5),
        vision=VisionTowerConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, patch_size=8, image_size=16,
            max_frames=4, frozen=False,
        ),
        audio=AudioTowerConfig(
            num_layers=2, hidden_size=48, num_attention_heads=4, ffn_hidden_size=64, num_mel_bins=8, seconds=0.12
        ),
        **changes,
    )


def make_batch(config: SynapseConfig, seed: int = 0, rows: int = 3, length: int = 32) -> Microbatch:
    """Rows with several documents, with several media, with one, and with none; the last tokens are padding."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.full((rows, length), -1)
    positions = torch.zeros(rows, length, dtype=torch.long)
    cuts = [[12, 8, 7], [length], [5, 20]]
    for row in range(rows):
        start = 0
        for number, size in enumerate(cuts[row % 3]):
            size = min(size, length - start)
            documents[row, start : start + size] = number
            positions[row, start : start + size] = torch.arange(size)
            start += size
    image_slots = torch.full((rows, 3), -1)
    image_documents = torch.full((rows, 3), -2)
    sound_slots, sound_documents = torch.full((rows, 1), -1), torch.full((rows, 1), -2)
    image_slots[0] = torch.tensor([0, 1, 2])
    image_documents[0] = torch.tensor([0, 0, 2])
    sound_slots[0], sound_documents[0] = 0, 1
    if rows > 2:
        image_slots[2, 0], image_documents[2, 0] = 3, 1
        sound_slots[2, 0], sound_documents[2, 0] = 1, 1
    num_images, num_sounds = 4, 2
    mask = (documents >= 0).float() * (torch.rand(rows, length, generator=generator) < 0.8)
    size, audio = config.vision.image_size, config.audio
    return Microbatch(
        plan=MicrobatchPlan(rows, length, num_images, num_sounds, 3, 1, False, length),
        document_ids_RT=documents,
        position_ids_RT=positions,
        loss_mask_RT=mask,
        image_slots_RK=image_slots,
        image_slot_documents_RK=image_documents,
        sound_slots_RJ=sound_slots,
        sound_slot_documents_RJ=sound_documents,
        tokens_RT=torch.randint(0, config.decoder.vocab_size, (rows, length), generator=generator),
        labels_RT=torch.randint(0, config.decoder.vocab_size, (rows, length), generator=generator),
        images_ICHW=torch.randn(num_images, 3, size, size, generator=generator),
        image_frames_I=torch.tensor([-1, 0, 1, -1]),
        sounds_AMF=torch.randn(num_sounds, audio.num_mel_bins, audio.num_frames, generator=generator),
    )


def fill(module: nn.Module, name: str = "node", seed: int = 7) -> nn.Module:
    """The module, with the initial weights of a seed."""
    initialize_module(module, name, seed)
    return module


def build(graph: Graph, seed: int = 7) -> nn.ModuleDict:
    """Every node's module under its name (dots as slashes), with the initial weights of a seed."""
    modules = nn.ModuleDict()
    for node in graph.nodes:
        module = node.build()
        initialize_module(module, node.name, seed)
        modules[node.name.replace(".", "/")] = module
    return modules


def run(graph: Graph, modules: nn.ModuleDict, batch: Microbatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Runs all nodes and losses: (sum of losses over this process, streams)."""
    context = ForwardContext(batch)
    streams: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        outputs = modules[node.name.replace(".", "/")](*[streams[name] for name in node.reads], context)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        streams.update({stream.name: value for stream, value in zip(node.writes, outputs, strict=True)})
    total = sum(
        loss.weight * loss.compute(*[streams[name] for name in loss.reads], context) for loss in graph.losses
    )
    return total, streams


def tower(graph: Graph, modules: nn.ModuleDict, batch: Microbatch, prefix: str) -> torch.Tensor:
    """What the nodes of one tower write last."""
    context, memory = ForwardContext(batch), []
    for node in graph.nodes:
        if node.name.startswith(prefix):
            memory = [modules[node.name.replace(".", "/")](*memory, context)]
    return memory[0]


def logits_of(graph: Graph, modules: nn.ModuleDict, batch: Microbatch) -> torch.Tensor:
    """Logits [R, T, V] of one process, before the loss works on them in place."""
    _, streams = run(Graph(graph.nodes, []), modules, batch)
    return streams["logits"].view(*batch.tokens_RT.shape, -1)


def gradients(graph: Graph, modules: nn.ModuleDict, batch: Microbatch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and gradients by parameter name."""
    loss, _ = run(graph, modules, batch)
    loss.backward()
    found = {name.replace("/", "."): parameter.grad.clone() for name, parameter in modules.named_parameters()}
    return loss.item(), found
