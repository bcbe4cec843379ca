"""The latent transformer on a masked memory against transformers' PerceiverModel, whose attention has no SDPA form.

The peer reads its inputs once and shares weights between blocks: the case is one block.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.tower_cases import TowerCase
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, names_of
from megatron_mm.models.initialization import initialize_module
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.perceiver.nodes import perceiver_nodes
from megatron_mm.parts.perceiver.section import PerceiverConfig


def sizes(smoke: bool) -> tuple[PerceiverConfig, int, int, int]:
    """The latent transformer, rows, positions and width of their memory."""
    latents, width, heads, layers, rows, length = (8, 32, 4, 2, 3, 11) if smoke else (256, 512, 8, 5, 2, 257)
    config = PerceiverConfig(
        num_latents=latents,
        hidden_size=width,
        num_blocks=1,
        layers_per_block=layers,
        num_attention_heads=heads,
        ffn_hidden_size=4 * width,
    )
    return config, rows, length, width + width // 4


def peer_name(name: str) -> str:
    """A name of hf/perceiver.py as transformers has it."""
    if name == "latents":
        return "embeddings.latents"
    for ours, theirs in (
        ("blocks.0.cross.", "encoder.cross_attention."),
        ("blocks.0.layers.", "encoder.self_attends."),
        ("attention.q_proj", "attention.self.query"),
        ("attention.k_proj", "attention.self.key"),
        ("attention.v_proj", "attention.self.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("layernorm_before", "attention.self.layernorm1"),
        ("layernorm_memory", "attention.self.layernorm2"),
        ("layernorm_after", "layernorm"),
        ("mlp.fc", "mlp.dense"),
    ):
        name = name.replace(ours, theirs)
    return name


def build(smoke: bool) -> TowerCase:
    """Memories of which the second half of the last row is hidden."""
    from transformers import PerceiverConfig as PeerConfig
    from transformers import PerceiverModel

    config, rows, length, memory_width = sizes(smoke)
    nodes = perceiver_nodes(
        config,
        LayerSettings(),
        0.02,
        memory_width=memory_width,
        pairs=lambda plan: rows,
        memory_length=lambda plan: length,
    )
    modules = nn.ModuleDict()
    for node in nodes:
        modules[node.name.replace(".", "/")] = module = node.build()
        initialize_module(module, node.name, seed=0)
    peer = PerceiverModel(
        PeerConfig(
            num_latents=config.num_latents,
            d_latents=config.hidden_size,
            d_model=memory_width,
            num_blocks=1,
            num_self_attends_per_block=config.layers_per_block,
            num_self_attention_heads=config.num_attention_heads,
            num_cross_attention_heads=config.num_attention_heads,
            qk_channels=config.hidden_size,
            v_channels=config.hidden_size,
            self_attention_widening_factor=4,
            cross_attention_widening_factor=4,
            attention_probs_dropout_prob=0.0,
        )
    ).train()
    found = {name.replace("/", "."): parameter.detach() for name, parameter in modules.named_parameters()}
    entries = names_of(
        perceiver_nodes(
            config,
            LayerSettings(),
            0.02,
            "peer",
            memory_width=memory_width,
            pairs=lambda plan: 1,
            memory_length=lambda plan: 1,
        )
    )
    peer.load_state_dict(
        {
            peer_name(name.removeprefix("peer.")): value
            for entry in entries
            for name, value in entry.split(found[entry.training])
        }
    )
    memory = torch.randn(rows, length, memory_width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.ones(rows, length)
    mask[-1, length // 2 :] = 0.0
    zeros = torch.zeros(rows, 1, dtype=torch.long)
    batch = Microbatch(MicrobatchPlan(rows, 1, 1, 1, 1, 1, True, 1), *[zeros] * 7)

    def run_ours() -> torch.Tensor:
        modules.zero_grad(set_to_none=True)
        memory.grad = None
        context = ForwardContext(batch)
        given = {"pair_memory": memory, "pair_mask": mask}
        for node, module in zip(nodes, modules.values()):
            given["latents"] = module(*[given[name] for name in node.reads], context)
        return given["latents"]

    def run_peer() -> torch.Tensor:
        peer.zero_grad(set_to_none=True)
        memory.grad = None
        return peer(memory, attention_mask=mask).last_hidden_state

    name = (
        f"Perceiver, {config.num_latents} latents × {config.hidden_size}, 1 cross + {config.layers_per_block} self, "
        f"{rows} memories of {length} × {memory_width}"
    )
    return TowerCase(name, run_ours, run_peer)
