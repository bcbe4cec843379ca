"""The dual encoder as an exported folder: OPT's names for its text encoder, ViT-MAE's for its tower.

The head is the text embedding. A phase `mae` is tower and decoder of masked autoencoding alone.
"""

from __future__ import annotations

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


ADAPTER = Adapter(
    name="dual_encoder",
    fields=lambda config: section_fields(config, "text", TEXT_NAMES),
    tree=lambda fields: section_tree(fields, DualEncoderConfig, "text", TEXT_NAMES),
    config_class="configuration_dual_encoder.DualEncoderConfig",
    model_class="modeling_dual_encoder.DualEncoderModel",
)
