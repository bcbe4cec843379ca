"""Entries of the Perceiver: the nodes of nodes.py and the modules of hf/perceiver.py."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.models.names import Entry, Part, linear, norm, plain, query_key_value
from megatron_mm.parts.perceiver.section import PerceiverConfig


def perceiver_entries(
    config: PerceiverConfig,
    memory_width: int,
    training_prefix: str = "perceiver",
    hf_prefix: str = "model.perceiver",
) -> Iterator[Entry]:
    """Every parameter of latents and blocks, in the order of the nodes."""
    size, heads, ffn = config.hidden_size, config.num_attention_heads, config.ffn_hidden_size
    yield plain(f"{training_prefix}.latents.latents", f"{hf_prefix}.latents", config.num_latents, size)
    for block in range(config.num_blocks):
        node, hf = f"{training_prefix}.blocks.{block}", f"{hf_prefix}.blocks.{block}"
        yield from _cross(config, memory_width, f"{node}.cross", f"{hf}.cross")
        for i in range(config.layers_per_block):
            ours, layer = f"{node}.layers.{i}", f"{hf}.layers.{i}"
            qkv = tuple(f"{layer}.attention.{name}_proj" for name in "qkv")
            yield from norm(f"{ours}.input_layernorm", f"{layer}.layernorm_before", size, bias=True)
            yield from query_key_value(f"{ours}.self_attention.linear_qkv", qkv, heads, size // heads, size)
            yield from linear(f"{ours}.self_attention.linear_proj", f"{layer}.attention.o_proj", size, size)
            yield from _mlp(f"{ours}", layer, size, ffn)


def perceiver_query_entries(
    config: PerceiverConfig,
    num_queries: int,
    training_prefix: str = "perceiver.queries",
    hf_prefix: str = "model.perceiver_queries",
) -> Iterator[Entry]:
    """Every parameter of the output queries."""
    yield plain(f"{training_prefix}.queries", f"{hf_prefix}.queries", num_queries, config.hidden_size)
    yield from _cross(config, config.hidden_size, f"{training_prefix}.cross", f"{hf_prefix}.cross")


def _cross(config: PerceiverConfig, memory_width: int, node: str, layer: str) -> Iterator[Entry]:
    size, heads = config.hidden_size, config.num_attention_heads
    ours, attention = f"{node}.cross_attention", f"{layer}.attention"
    yield from norm(f"{node}.pre_cross_attn_layernorm", f"{layer}.layernorm_before", size, bias=True)
    yield from norm(f"{ours}.memory_layernorm", f"{layer}.layernorm_memory", memory_width, bias=True)
    yield from linear(f"{ours}.linear_q", f"{attention}.q_proj", size, size)
    for kind, trailing in (("weight", (memory_width,)), ("bias", ())):
        parts = tuple(Part(f"{attention}.{name}_proj.{kind}") for name in "kv")
        yield Entry(f"{ours}.linear_kv.{kind}", parts, heads, size // heads, trailing)
    yield from linear(f"{ours}.linear_proj", f"{attention}.o_proj", size, size)
    yield from _mlp(node, layer, size, config.ffn_hidden_size)


def _mlp(node: str, layer: str, size: int, ffn: int) -> Iterator[Entry]:
    yield from norm(f"{node}.pre_mlp_layernorm", f"{layer}.layernorm_after", size, bias=True)
    yield from linear(f"{node}.mlp.linear_fc1", f"{layer}.mlp.fc1", ffn, size)
    yield from linear(f"{node}.mlp.linear_fc2", f"{layer}.mlp.fc2", size, ffn)
