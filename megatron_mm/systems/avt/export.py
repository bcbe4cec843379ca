"""AVT as an exported folder: Swin V2's and Wav2Vec2-Conformer's names for its encoders, Llama's for its decoder."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.models.names import Entry, norm, plain
from megatron_mm.parts.conformer.names import conformer_entries
from megatron_mm.parts.contrastive.names import contrastive_entries
from megatron_mm.parts.decoder.names import (
    decoder_layer_entries,
    embedding_entry,
    grouped_attention_entries,
    memory_attention_entries,
    output_entries,
    swiglu_entries,
)
from megatron_mm.parts.swin.names import swin_entries
from megatron_mm.systems.avt.section import AVTConfig
from megatron_mm.systems.export import DECODER_NAMES, Adapter, section_fields, section_tree


def _fusion(config: AVTConfig) -> Iterator[Entry]:
    fusion, towers = config.fusion, {"vision": config.vision, "audio": config.audio}
    size, heads, groups = fusion.hidden_size, fusion.num_attention_heads, fusion.num_query_groups
    for name, tower in towers.items():
        yield plain(
            f"fusion.inputs.{name}_projection", f"fusion.{name}_projection.weight", size, tower.hidden_size
        )
    for index in range(fusion.num_layers):
        for name in towers:
            node = hf = f"fusion.layers.{index}.{name}"
            yield from norm(f"{node}.input_layernorm", f"{hf}.input_layernorm", size, bias=False)
            yield from grouped_attention_entries(f"{node}.self_attention", f"{hf}.self_attn", size, heads, groups)
            yield from norm(f"{node}.pre_cross_attn_layernorm", f"{hf}.cross_attn_layernorm", size, bias=False)
            yield from memory_attention_entries(
                f"{node}.cross_attention", f"{hf}.cross_attn", size, heads, groups, size
            )
            yield from norm(f"{node}.pre_mlp_layernorm", f"{hf}.post_attention_layernorm", size, bias=False)
            yield from swiglu_entries(f"{node}.mlp", f"{hf}.mlp", size, fusion.ffn_hidden_size)
    yield from norm("fusion.output.final_layernorm", "fusion.norm", size, bias=False)
    yield plain("fusion.output.projection", "fusion.projection.weight", config.decoder.hidden_size, size)


def _decoder(config: AVTConfig) -> Iterator[Entry]:
    decoder = config.decoder
    size, heads, groups = decoder.hidden_size, decoder.num_attention_heads, decoder.num_query_groups
    yield embedding_entry(decoder)
    for index in range(decoder.num_layers):
        node, hf = f"decoder.layers.{index}", f"model.layers.{index}"
        yield from decoder_layer_entries(decoder, index)
        yield from norm(f"{node}.pre_cross_attn_layernorm", f"{hf}.cross_attn_layernorm", size, bias=False)
        yield from memory_attention_entries(f"{node}.cross_attention", f"{hf}.cross_attn", size, heads, groups, size)
    yield from output_entries(decoder)


def decodes(config: AVTConfig) -> bool:
    """Whether any objective needs fusion and decoder."""
    return (config.masked_lm_weight > 0 and config.masked_lm_share > 0) or speaks(config)


def speaks(config: AVTConfig) -> bool:
    """Whether the model learns to generate."""
    return config.generation_weight > 0 and config.masked_lm_share < 1


def entries(config: AVTConfig) -> list[Entry]:
    """Every parameter of a model, in the order of its nodes."""
    listed = list(swin_entries(config.vision, hf_prefix="vision_tower"))
    listed += conformer_entries(config.audio, "audio", "audio_tower")
    if config.contrastive_weight > 0:
        widths = {"vision": config.vision.hidden_size, "audio": config.audio.hidden_size}
        listed += contrastive_entries(config.contrastive, **widths)
    return [*listed, *_fusion(config), *_decoder(config)] if decodes(config) else listed


ADAPTER = Adapter(
    name="avt",
    entries=entries,
    fields=lambda config: section_fields(config, "decoder", DECODER_NAMES),
    tree=lambda fields: section_tree(fields, AVTConfig, "decoder", DECODER_NAMES),
    vocab_size=lambda model: model.decoder.vocab_size if decodes(model) else 0,
    config_class="configuration_avt.AVTConfig",
    model_class="modeling_avt.AVTModel",
    modules=("configuration_mm", "conformer", "exported_model", "swin", "text_layers"),
    speaks=speaks,
)
