"""A small Perceiver with a memory, for tests of its layers, costs and export, and Hugging Face's layers beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PerceiverConfig as HFPerceiverConfig
from transformers.models.perceiver.modeling_perceiver import PerceiverLayer

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Graph, Kind, Loss, Node, NodeCost, Stream
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.perceiver.nodes import perceiver_nodes, query_node
from megatron_mm.parts.perceiver.section import PerceiverConfig

ROWS, LENGTH, WIDTH, QUERIES = 4, 11, 24, 6
MASK = torch.ones(ROWS, LENGTH)
MASK[1, 5:], MASK[2, :7] = 0.0, 0.0


def tiny() -> PerceiverConfig:
    return PerceiverConfig(
        num_latents=7, hidden_size=32, num_blocks=2, layers_per_block=2, num_attention_heads=4, ffn_hidden_size=64
    )


def make_batch() -> Microbatch:
    """Nothing but a plan of the right number of rows is read."""
    nothing = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    return Microbatch(MicrobatchPlan(ROWS, LENGTH, 1, 1, 1, 1, True, LENGTH), *[nothing] * 7)


class Memory(nn.Module):
    """Writes a learned memory, so that its gradient is compared too, and the mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.memory = empty_parameter(ROWS, LENGTH, WIDTH, dtype=torch.float32)
        self.register_buffer("mask", mask)

    def forward(self, context: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        return self.memory, self.mask


def make_graph(settings: LayerSettings, mask: torch.Tensor = MASK, init_std: float = 0.3) -> Graph:
    """Memory, latents, blocks, queries of the first two pairs, and a loss of all outputs."""
    config = tiny()
    memory = Stream("pair_memory", lambda plan: (ROWS, LENGTH, WIDTH))
    visible = Stream("pair_mask", lambda plan: (ROWS, LENGTH))

    def given() -> nn.Module:
        return describe(Memory(mask), init_std=1.0)

    nodes = [Node("memory", Kind(given, lambda plan: NodeCost(ROWS * LENGTH * WIDTH)), (), (memory, visible))]
    nodes += perceiver_nodes(
        config, settings, init_std, memory_width=WIDTH, pairs=lambda plan: ROWS, memory_length=lambda plan: LENGTH
    )
    nodes.append(query_node(config, settings, init_std, num_queries=QUERIES, rows=lambda plan: 2))

    def weigh(latents: torch.Tensor, states: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        generator = torch.Generator().manual_seed(11)
        return sum((value * torch.randn(value.shape, generator=generator)).sum() for value in (latents, states))

    return Graph(nodes, [Loss("weighed", weigh, lambda batch: torch.ones(()), ("latents", "query_states"))])


def tensor_parallel_case(settings: LayerSettings) -> tuple[Graph, Microbatch]:
    return make_graph(settings), make_batch()


def hf_layer(memory_width: int | None) -> PerceiverLayer:
    """Hugging Face's layer of the same shape; memory_width None: self-attention."""
    config, part = HFPerceiverConfig(attention_probs_dropout_prob=0.0), tiny()
    size = part.hidden_size
    return PerceiverLayer(
        config, is_cross_attention=memory_width is not None, qk_channels=size, v_channels=size,
        num_heads=part.num_attention_heads, q_dim=size, kv_dim=memory_width or size,
        widening_factor=part.ffn_hidden_size // size,
    )  # fmt: skip


def randomize(module: nn.Module, seed: int = 1) -> None:
    """Random weights, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + one)


def from_hf(get: Callable[[str], torch.Tensor], cross: bool) -> dict[str, torch.Tensor]:
    """Our names of the parameters of a Hugging Face layer, or of anything that is named as they are."""
    heads = tiny().num_attention_heads
    names = {
        "mlp.linear_fc1": "mlp.dense1",
        "mlp.linear_fc2": "mlp.dense2",
        "pre_mlp_layernorm": "layernorm",
    }
    if cross:
        names |= {
            "pre_cross_attn_layernorm": "attention.self.layernorm1",
            "cross_attention.memory_layernorm": "attention.self.layernorm2",
            "cross_attention.linear_q": "attention.self.query",
            "cross_attention.linear_proj": "attention.output.dense",
        }
    else:
        names |= {"input_layernorm": "attention.self.layernorm1"}
        names |= {"self_attention.linear_proj": "attention.output.dense"}
    tensors = {f"{ours}.{kind}": get(f"{hf}.{kind}") for ours, hf in names.items() for kind in ("weight", "bias")}
    fused, parts = "self_attention.linear_qkv", ("query", "key", "value")
    if cross:
        fused, parts = "cross_attention.linear_kv", ("key", "value")
    for kind in ("weight", "bias"):
        each = [get(f"attention.self.{name}.{kind}").unflatten(0, (heads, -1)) for name in parts]
        tensors[f"{fused}.{kind}"] = torch.stack(each, dim=1).flatten(0, 2)
    return tensors
