"""Entries of the Swin V2 tower: the nodes of nodes.py and the modules of hf/swin.py."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.models.layers.windows import POSITION_WIDTH
from megatron_mm.models.names import Entry, Part, linear, norm, plain
from megatron_mm.parts.swin.section import SwinConfig


def swin_entries(
    tower: SwinConfig, training_prefix: str = "vision", hf_prefix: str = "model.vision_tower"
) -> Iterator[Entry]:
    """Every parameter of the tower, in the order of its nodes."""
    embeddings, hf = f"{training_prefix}.embeddings", f"{hf_prefix}.embeddings"
    width, patch = tower.embed_dim, (3, tower.temporal_patch_size, tower.patch_size, tower.patch_size)
    yield plain(f"{embeddings}.weight", f"{hf}.patch_embeddings.projection.weight", width, *patch)
    yield plain(f"{embeddings}.bias", f"{hf}.patch_embeddings.projection.bias", width)
    yield from norm(f"{embeddings}.layernorm", f"{hf}.norm", width, bias=True)
    for stage, depth in enumerate(tower.depths):
        node, layer = f"{training_prefix}.stages.{stage}", f"{hf_prefix}.encoder.layers.{stage}"
        for block in range(depth):
            yield from _block(tower, stage, f"{node}.blocks.{block}", f"{layer}.blocks.{block}")
        width = tower.embed_dim * 2**stage
        if stage < len(tower.depths) - 1:
            reduction = (f"{node}.merge.linear_reduction", f"{layer}.downsample.reduction")
            yield from linear(*reduction, 2 * width, 4 * width, bias=False)
            yield from norm(f"{node}.merge.layernorm", f"{layer}.downsample.norm", 2 * width, bias=True)
    yield from norm(f"{training_prefix}.output.final_layernorm", f"{hf_prefix}.layernorm", width, bias=True)


def _block(tower: SwinConfig, stage: int, node: str, layer: str) -> Iterator[Entry]:
    width, heads = tower.embed_dim * 2**stage, tower.num_heads[stage]
    attention, theirs = f"{node}.attention", f"{layer}.attention.self"
    parts = tuple(Part(f"{theirs}.{kind}.weight") for kind in ("query", "key", "value"))
    yield Entry(f"{attention}.linear_qkv.weight", parts, heads, width // heads, (width,))
    yield plain(f"{attention}.query_bias", f"{theirs}.query.bias", width)
    yield plain(f"{attention}.value_bias", f"{theirs}.value.bias", width)
    yield plain(f"{attention}.logit_scale", f"{theirs}.logit_scale", heads)
    position, mlp = f"{attention}.position_bias", f"{theirs}.continuous_position_bias_mlp"
    yield from linear(f"{position}.linear_offset", f"{mlp}.0", POSITION_WIDTH, 3)
    yield plain(f"{position}.head_weight", f"{mlp}.2.weight", heads, POSITION_WIDTH)
    yield from linear(f"{attention}.linear_proj", f"{layer}.attention.output.dense", width, width)
    yield from norm(f"{node}.attention_layernorm", f"{layer}.layernorm_before", width, bias=True)
    ffn = int(width * tower.mlp_ratio)
    yield from linear(f"{node}.linear_fc1", f"{layer}.intermediate.dense", ffn, width)
    yield from linear(f"{node}.linear_fc2", f"{layer}.output.dense", width, ffn)
    yield from norm(f"{node}.mlp_layernorm", f"{layer}.layernorm_after", width, bias=True)
