"""PerceiverFusion as an exported folder: ViT-MAE's names for its image tower, its own for the rest; the head of masked
language modelling is the text embedding."""

from __future__ import annotations

from megatron_mm.models.names import Entry, norm, plain
from megatron_mm.parts.contrastive.names import contrastive_entries
from megatron_mm.parts.perceiver.names import perceiver_entries, perceiver_query_entries
from megatron_mm.parts.transformer_xl.names import transformer_xl_entries
from megatron_mm.parts.vit.names import vit_entries
from megatron_mm.systems.export import Adapter, section_fields, section_tree
from megatron_mm.systems.perceiver_fusion.section import PerceiverFusionConfig

#: Fields of TransformerXLConfig and their names in a configuration of a language model.
TEXT_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "segment_length": "segment_length",
    "vocab_size": "vocab_size",
    "layernorm_epsilon": "layer_norm_eps",
}


def entries(config: PerceiverFusionConfig) -> list[Entry]:
    """Every parameter of a model, in the order of its nodes."""
    predicts, matches = config.masked_lm_weight > 0, config.matching_weight > 0
    text, latent = config.text.hidden_size, config.perceiver.hidden_size
    listed = list(vit_entries(config.vision, hf_prefix="vision_tower"))
    listed += transformer_xl_entries(config.text, hf_prefix="text_tower")
    if config.contrastive_weight > 0 or matches:
        listed += contrastive_entries(config.contrastive, image=config.vision.hidden_size, text=text)
    if predicts or matches:
        listed += perceiver_entries(config.perceiver, text, hf_prefix="perceiver")
    if matches:
        listed += norm("matching.head.pooled_layernorm", "match_norm", latent, bias=True)
        listed.append(plain("matching.head.projection", "match_projection.weight", 2, latent))
    if predicts:
        listed += perceiver_query_entries(config.perceiver, config.max_positions, hf_prefix="queries")
        listed += norm("masked_lm.output.final_layernorm", "lm_norm", latent, bias=True)
        listed.append(plain("masked_lm.output.projection", "lm_projection.weight", text, latent))
    return listed


ADAPTER = Adapter(
    name="perceiver_fusion",
    entries=entries,
    fields=lambda config: section_fields(config, "text", TEXT_NAMES),
    tree=lambda fields: section_tree(fields, PerceiverFusionConfig, "text", TEXT_NAMES),
    vocab_size=lambda model: model.text.vocab_size,
    config_class="configuration_perceiver_fusion.PerceiverFusionConfig",
    model_class="modeling_perceiver_fusion.PerceiverFusionModel",
    modules=(
        "configuration_mm",
        "exported_model",
        "image_text",
        "perceiver",
        "text_layers",
        "transformer_xl",
        "vit",
    ),
    speaks=lambda model: False,
)
