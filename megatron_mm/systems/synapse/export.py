"""Synapse as an exported folder: CLIP's and Whisper's names for its towers, Llama's for its decoder."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mm.config.schema import Config
from megatron_mm.systems.export import DECODER_NAMES, Adapter

#: Fields of both towers and their names, after the tower's.
TOWER_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
}
VISION_NAMES = TOWER_NAMES | {name: name for name in ("patch_size", "image_size", "max_frames")}
AUDIO_NAMES = TOWER_NAMES | {name: name for name in ("num_mel_bins", "sample_rate", "seconds")}
CROSS_NAMES = {
    "every": "cross_attention_every",
    "num_query_groups": "cross_attention_num_key_value_heads",
    "qk_layernorm": "cross_attention_qk_norm",
}
SECTIONS = {
    "decoder": DECODER_NAMES,
    "cross_attention": CROSS_NAMES,
    "vision": {ours: f"vision_{theirs}" for ours, theirs in VISION_NAMES.items()},
    "audio": {ours: f"audio_{theirs}" for ours, theirs in AUDIO_NAMES.items()},
}


def fields(config: Config) -> dict:
    """config.json of a recipe."""
    model, data = config.model, config.data
    named = {
        theirs: getattr(getattr(model, section), ours)
        for section, names in SECTIONS.items()
        for ours, theirs in names.items()
    }
    return named | {
        "initializer_range": model.init_std,
        "max_position_embeddings": data.seq_length,
        "image_mean": list(data.image_mean),
        "image_std": list(data.image_std),
        "frames_per_video": data.frames_per_video,
    }


def tree(fields: Mapping) -> dict:
    """The recipe's tree from config.json."""
    model = {
        section: {ours: fields[theirs] for ours, theirs in names.items()} for section, names in SECTIONS.items()
    }
    data = {name: fields[name] for name in ("image_mean", "image_std", "frames_per_video")}
    data["seq_length"] = fields["max_position_embeddings"]
    return {"model": {"init_std": fields["initializer_range"], **model}, "data": data}


ADAPTER = Adapter(
    name="synapse",
    fields=fields,
    tree=tree,
    config_class="configuration_synapse.SynapseConfig",
    model_class="modeling_synapse.SynapseForCausalLM",
    bare_class="modeling_synapse.SynapseModel",
)
