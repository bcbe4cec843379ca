"""VLM as an exported folder: Llama's names for its decoder, ViT-MAE's for its tower; a phase `mae` is tower and decoder
of masked autoencoding alone."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.models.names import Entry, norm, plain
from megatron_mm.parts.contrastive.names import contrastive_entries
from megatron_mm.parts.decoder.names import (
    decoder_layer_entries,
    embedding_entry,
    memory_attention_entries,
    output_entries,
    swiglu_entries,
)
from megatron_mm.parts.vit.names import mae_entries, vit_entries
from megatron_mm.systems.export import DECODER_NAMES, Adapter, section_fields, section_tree
from megatron_mm.systems.vlm.section import VLMConfig


def _gated_block(config: VLMConfig, number: int) -> Iterator[Entry]:
    decoder, cross = config.decoder, config.cross_attention
    size, heads, groups = decoder.hidden_size, decoder.num_attention_heads, decoder.num_query_groups
    node, hf = f"decoder.cross_layers.{number}", f"model.cross_layers.{number}"
    yield from norm(f"{node}.pre_cross_attn_layernorm", f"{hf}.input_layernorm", size, bias=False)
    yield from memory_attention_entries(
        f"{node}.cross_attention", f"{hf}.cross_attn", size, heads, groups, config.vision.hidden_size,
        cross.qk_layernorm,
    )  # fmt: skip
    yield plain(f"{node}.cross_attn_bda.gate", f"{hf}.cross_attn_gate", 1)
    yield from norm(f"{node}.pre_mlp_layernorm", f"{hf}.post_attention_layernorm", size, bias=False)
    yield from swiglu_entries(f"{node}.mlp", f"{hf}.mlp", size, decoder.ffn_hidden_size)
    yield plain(f"{node}.mlp_bda.gate", f"{hf}.mlp_gate", 1)


def entries(config: VLMConfig) -> list[Entry]:
    """Every parameter of a phase's model, in the order of its nodes."""
    decoder, cross = config.decoder, config.cross_attention
    listed = list(vit_entries(config.vision, hf_prefix="vision_tower"))
    if config.phase == "mae":
        return [*listed, *mae_entries(config.vision, config.mae, hf_prefix="mae_decoder")]
    contrasts, speaks = config.contrastive_weight > 0, config.causal_lm_weight > 0
    if contrasts:
        widths = {"image": config.vision.hidden_size, "text": decoder.hidden_size}
        listed += contrastive_entries(config.contrastive, **widths)
        listed += norm("contrastive.text.pooled_layernorm", "text_norm", decoder.hidden_size, bias=False)
    listed.append(embedding_entry(decoder))
    for index in range(decoder.num_layers if speaks else cross.first_layer):
        above = index - cross.first_layer
        if above >= 0 and above % cross.every == 0:
            listed += _gated_block(config, above // cross.every)
        listed += decoder_layer_entries(decoder, index)
    return [*listed, *output_entries(decoder)] if speaks else listed


ADAPTER = Adapter(
    name="vlm",
    entries=entries,
    fields=lambda config: section_fields(config, "decoder", DECODER_NAMES),
    tree=lambda fields: section_tree(fields, VLMConfig, "decoder", DECODER_NAMES),
    vocab_size=lambda model: 0 if model.phase == "mae" else model.decoder.vocab_size,
    config_class="configuration_vlm.VLMConfig",
    model_class="modeling_vlm.VLMModel",
    modules=("configuration_mm", "exported_model", "image_text", "text_layers", "vit"),
    speaks=lambda model: model.phase == "joint" and model.causal_lm_weight > 0,
)
