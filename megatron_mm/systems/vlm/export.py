"""VLM as an exported folder: Llama's names for its decoder, ViT-MAE's for its tower; a phase `mae` is tower and decoder
of masked autoencoding alone."""

from __future__ import annotations

from megatron_mm.systems.export import DECODER_NAMES, Adapter, section_fields, section_tree
from megatron_mm.systems.vlm.section import VLMConfig

ADAPTER = Adapter(
    name="vlm",
    fields=lambda config: section_fields(config, "decoder", DECODER_NAMES),
    tree=lambda fields: section_tree(fields, VLMConfig, "decoder", DECODER_NAMES),
    config_class="configuration_vlm.VLMConfig",
    model_class="modeling_vlm.VLMModel",
)
