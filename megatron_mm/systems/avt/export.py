"""AVT as an exported folder: Swin V2's and Wav2Vec2-Conformer's names for its encoders, Llama's for its decoder."""

from __future__ import annotations

from megatron_mm.systems.avt.section import AVTConfig
from megatron_mm.systems.export import DECODER_NAMES, Adapter, section_fields, section_tree

ADAPTER = Adapter(
    name="avt",
    fields=lambda config: section_fields(config, "decoder", DECODER_NAMES),
    tree=lambda fields: section_tree(fields, AVTConfig, "decoder", DECODER_NAMES),
    config_class="configuration_avt.AVTConfig",
    model_class="modeling_avt.AVTModel",
)
