"""PerceiverFusion as an exported folder: ViT-MAE's names for its image tower, its own for the rest; the head of masked
language modelling is the text embedding."""

from __future__ import annotations

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


ADAPTER = Adapter(
    name="perceiver_fusion",
    fields=lambda config: section_fields(config, "text", TEXT_NAMES),
    tree=lambda fields: section_tree(fields, PerceiverFusionConfig, "text", TEXT_NAMES),
    config_class="configuration_perceiver_fusion.PerceiverFusionConfig",
    model_class="modeling_perceiver_fusion.PerceiverFusionModel",
)
