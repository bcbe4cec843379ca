"""The dual encoder as an exported folder: OPT's names for its text encoder, ViT-MAE's for its tower.

The head is the text embedding. A phase `mae` is tower and decoder of masked autoencoding alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.models.names import Entry, linear, norm, plain, query_key_value
from megatron_mm.parts.contrastive.names import contrastive_entries
from megatron_mm.parts.decoder.names import memory_attention_entries
from megatron_mm.parts.vit.names import mae_entries, vit_entries
from megatron_mm.systems.dual_encoder.section import DualEncoderConfig
from megatron_mm.systems.export import Adapter, section_fields, section_tree

#: Fields of TextEncoderConfig and their names in a configuration of a language model.
TEXT_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "activation": "hidden_act",
    "layernorm_epsilon": "layer_norm_eps",
}


def _self_attention(node: str, hf: str, size: int, heads: int) -> Iterator[Entry]:
    yield from norm(f"{node}.input_layernorm", f"{hf}.self_attn_layer_norm", size, bias=True)
    attention = f"{hf}.self_attn"
    qkv = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    yield from query_key_value(f"{node}.self_attention.linear_qkv", qkv, heads, size // heads, size)
    yield from linear(f"{node}.self_attention.linear_proj", f"{attention}.out_proj", size, size)


def _mlp(node: str, hf: str, size: int, ffn: int) -> Iterator[Entry]:
    yield from norm(f"{node}.pre_mlp_layernorm", f"{hf}.final_layer_norm", size, bias=True)
    yield from linear(f"{node}.mlp.linear_fc1", f"{hf}.fc1", ffn, size)
    yield from linear(f"{node}.mlp.linear_fc2", f"{hf}.fc2", size, ffn)


def _text(config: DualEncoderConfig) -> Iterator[Entry]:
    text, hf = config.text, "text_encoder"
    size = text.hidden_size
    yield plain("text.embedding.word_embeddings.weight", f"{hf}.embed_tokens.weight", text.vocab_size, size)
    yield plain("text.embedding.position_embedding", f"{hf}.embed_positions.weight", text.max_positions, size)
    for index in range(text.num_layers):
        node, layer = f"text.layers.{index}", f"{hf}.layers.{index}"
        yield from _self_attention(node, layer, size, text.num_attention_heads)
        yield from _mlp(node, layer, size, text.ffn_hidden_size)
    yield from norm("text.output.final_layernorm", f"{hf}.final_layer_norm", size, bias=True)


def _fusion(config: DualEncoderConfig) -> Iterator[Entry]:
    fusion, size = config.fusion, config.text.hidden_size
    heads = fusion.num_attention_heads
    for index in range(fusion.num_layers):
        node, layer = f"fusion.layers.{index}", f"fusion.layers.{index}"
        yield from _self_attention(node, layer, size, heads)
        yield from norm(f"{node}.pre_cross_attn_layernorm", f"{layer}.cross_attn_layer_norm", size, bias=True)
        yield from memory_attention_entries(
            f"{node}.cross_attention", f"{layer}.cross_attn", size, heads, heads, config.vision.hidden_size
        )
        yield from _mlp(node, layer, size, fusion.ffn_hidden_size)
    yield from norm("fusion.output.final_layernorm", "fusion.final_layer_norm", size, bias=True)


def entries(config: DualEncoderConfig) -> list[Entry]:
    """Every parameter of a phase's model, in the order of its nodes."""
    listed = list(vit_entries(config.vision, hf_prefix="vision_tower"))
    if config.phase == "mae" or config.mae_weight > 0:
        listed += mae_entries(config.vision, config.mae, hf_prefix="mae_decoder")
    if config.phase == "mae":
        return listed
    listed += _text(config)
    if config.contrastive_weight > 0:
        widths = {"image": config.vision.hidden_size, "text": config.text.hidden_size}
        listed += contrastive_entries(config.contrastive, **widths)
    return [*listed, *_fusion(config)] if config.causal_lm_weight > 0 else listed


ADAPTER = Adapter(
    name="dual_encoder",
    entries=entries,
    fields=lambda config: section_fields(config, "text", TEXT_NAMES),
    tree=lambda fields: section_tree(fields, DualEncoderConfig, "text", TEXT_NAMES),
    vocab_size=lambda model: 0 if model.phase == "mae" else model.text.vocab_size,
    config_class="configuration_dual_encoder.DualEncoderConfig",
    model_class="modeling_dual_encoder.DualEncoderModel",
    modules=("configuration_mm", "exported_model", "image_text", "text_layers", "vit"),
    speaks=lambda model: model.phase == "joint" and model.causal_lm_weight > 0,
)
