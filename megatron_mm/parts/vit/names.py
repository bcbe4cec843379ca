"""Entries of the ViT tower and of its MAE decoder: the nodes of nodes.py and mae.py and the modules of hf/vit.py."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.models.names import Entry, linear, norm, plain, query_key_value
from megatron_mm.parts.vit.section import MAEConfig, ViTConfig


def vit_entries(
    tower: ViTConfig, training_prefix: str = "vision", hf_prefix: str = "model.vision_tower"
) -> Iterator[Entry]:
    """Every parameter of the tower, in the order of its nodes."""
    embeddings, hf = f"{training_prefix}.embeddings", f"{hf_prefix}.embeddings"
    width, patch = tower.hidden_size, (3, tower.patch_size, tower.patch_size)
    yield plain(f"{embeddings}.class_token", f"{hf}.cls_token", width)
    projection = f"{hf}.patch_embeddings.projection"
    yield plain(f"{embeddings}.patch_embedding.weight", f"{projection}.weight", width, *patch)
    yield plain(f"{embeddings}.patch_embedding.bias", f"{projection}.bias", width)
    yield from _layers(tower, f"{training_prefix}.layers", f"{hf_prefix}.layers")
    yield from norm(f"{training_prefix}.output.final_layernorm", f"{hf_prefix}.layernorm", width, bias=True)


def mae_entries(
    tower: ViTConfig, mae: MAEConfig, training_prefix: str = "mae", hf_prefix: str = "model.mae_decoder"
) -> Iterator[Entry]:
    """Every parameter of the MAE decoder, in the order of its nodes."""
    embeddings, output, width = f"{training_prefix}.embeddings", f"{training_prefix}.output", mae.hidden_size
    yield plain(f"{embeddings}.mask_token", f"{hf_prefix}.mask_token", width)
    yield from linear(f"{embeddings}.linear", f"{hf_prefix}.decoder_embed", width, tower.hidden_size)
    yield from _layers(mae, f"{training_prefix}.layers", f"{hf_prefix}.decoder_layers")
    yield from norm(f"{output}.final_layernorm", f"{hf_prefix}.decoder_norm", width, bias=True)
    yield from linear(f"{output}.linear", f"{hf_prefix}.decoder_pred", 3 * tower.patch_size**2, width)


def _layers(part: ViTConfig | MAEConfig, training: str, hf: str) -> Iterator[Entry]:
    size, heads, ffn = part.hidden_size, part.num_attention_heads, part.ffn_hidden_size
    for i in range(part.num_layers):
        node, layer = f"{training}.{i}", f"{hf}.{i}"
        attention, mlp = f"{layer}.attention", f"{layer}.mlp"
        qkv = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
        yield from norm(f"{node}.input_layernorm", f"{layer}.layernorm_before", size, bias=True)
        yield from query_key_value(f"{node}.self_attention.linear_qkv", qkv, heads, size // heads, size)
        yield from linear(f"{node}.self_attention.linear_proj", f"{attention}.o_proj", size, size)
        yield from norm(f"{node}.pre_mlp_layernorm", f"{layer}.layernorm_after", size, bias=True)
        yield from linear(f"{node}.mlp.linear_fc1", f"{mlp}.fc1", ffn, size)
        yield from linear(f"{node}.mlp.linear_fc2", f"{mlp}.fc2", size, ffn)
