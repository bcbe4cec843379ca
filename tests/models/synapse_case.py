"""A small Synapse and small microbatches for the tests of layers: built on one process or in a layout, run once.

Run as a script under torchrun it compares a layout with one process (see `test_layouts.py`):
    torchrun --nproc-per-node 2 tests/models/synapse_case.py --tp 2 --sequence-parallel
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import distributed, nn

from megatron_mm.config.schema import (
    AudioTowerConfig,
    CrossAttentionConfig,
    DecoderConfig,
    SynapseConfig,
    VisionTowerConfig,
)
from megatron_mm.data.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Graph, ParallelSizes
from megatron_mm.models.initialization import initialize_module
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.systems import build_graph
from megatron_mm.platform import setup


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


def build(graph: Graph, seed: int = 7, tp_rank: int = 0, tp_size: int = 1) -> nn.ModuleDict:
    """Every node's module under its name (dots as slashes), with the initial weights of a seed."""
    modules = nn.ModuleDict()
    for node in graph.nodes:
        module = node.build()
        initialize_module(module, node.name, seed, tp_rank, tp_size)
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
    """Loss and whole gradients by logical parameter name, in any layout without pipeline or data parallelism."""
    from megatron.core import parallel_state

    tp, cp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
    loss, _ = run(graph, modules, batch)
    loss.backward()
    total = loss.detach().clone()
    distributed.all_reduce(total, group=cp)
    whole = {}
    for name, parameter in modules.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        distributed.all_reduce(gradient, group=cp)
        if getattr(parameter, "sequence_parallel", False):
            distributed.all_reduce(gradient, group=tp)
        if parameter.tensor_model_parallel and tp.size() > 1:
            pieces = [torch.empty_like(gradient) for _ in range(tp.size())]
            distributed.all_gather(pieces, gradient, group=tp)
            parts = parameter.init.parts
            split = [piece.chunk(parts, dim=parameter.partition_dim) for piece in pieces]
            gradient = torch.cat([split[r][p] for p in range(parts) for r in range(tp.size())], parameter.partition_dim)
        whole[name.replace("/", ".")] = gradient
    return total.item(), whole


def compare_with_one_process() -> None:
    """Runs a layout and one process (its groups all of size 1, on every rank) and compares loss and gradients."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--selective", action="store_true")
    options = parser.parse_args()
    from megatron.core import parallel_state

    sizes = ParallelSizes(tp=options.tp, cp=options.cp, sequence_parallel=options.sequence_parallel)
    setup.initialize(sizes, seed=1)
    config = tiny_config()
    batch = make_batch(config)
    settings = LayerSettings(sizes=sizes, recompute="selective" if options.selective else "none")
    graph = build_graph(config, settings)
    modules = build(graph, tp_rank=parallel_state.get_tensor_model_parallel_rank(), tp_size=options.tp)
    loss, found = gradients(graph, modules, batch)
    setup.initialize_groups(ParallelSizes(dp=sizes.world))
    graph = build_graph(config, LayerSettings())
    expected_loss, expected = gradients(graph, build(graph), batch)
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    worst = max(
        ((found[name] - value).norm() / max(value.norm(), 1e-6 * norm)).item() for name, value in expected.items()
    )
    if distributed.get_rank() == 0:
        for name, value in expected.items():
            error = ((found[name] - value).norm() / max(value.norm(), 1e-6 * norm)).item()
            if error > 1e-5:
                print(f"{name}: {error:.1e}")
        print(f"loss {loss:.6f} against {expected_loss:.6f}; largest relative gradient difference {worst:.1e}")
    distributed.barrier()
    if abs(loss - expected_loss) > 1e-5 * abs(expected_loss) or worst > 1e-5 or sorted(found) != sorted(expected):
        sys.exit(1)


if __name__ == "__main__":
    compare_with_one_process()
