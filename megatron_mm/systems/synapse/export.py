"""Synapse as an exported folder: CLIP's and Whisper's names for its towers, Llama's for its decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_mm.config.schema import Config
from megatron_mm.models.names import Entry, Part, norm, plain
from megatron_mm.parts.decoder.names import decoder_layer_entries, embedding_entry, output_entries
from megatron_mm.systems.export import DECODER_NAMES, Adapter
from megatron_mm.systems.synapse.section import SynapseConfig

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


# ------------------------------------------------------------------------------------------------------------ entries


def _tower_layers(training: str, hf: str, tower, names: dict[str, str], key_bias: bool) -> Iterator[Entry]:
    """Layers of an encoder with biases and LayerNorm; `names` are the Hugging Face names inside a layer."""
    size, heads, ffn = tower.hidden_size, tower.num_attention_heads, tower.ffn_hidden_size
    for i in range(tower.num_layers):
        node, layer = f"{training}.{i}", f"{hf}.{i}"
        attention = f"{layer}.self_attn"
        yield from norm(f"{node}.input_layernorm", f"{layer}.{names['attention_norm']}", size, bias=True)
        for kind, trailing in (("weight", (size,)), ("bias", ())):
            key = None if kind == "bias" and not key_bias else f"{attention}.k_proj.{kind}"
            parts = (Part(f"{attention}.q_proj.{kind}"), Part(key), Part(f"{attention}.v_proj.{kind}"))
            yield Entry(f"{node}.self_attention.linear_qkv.{kind}", parts, heads, size // heads, trailing)
        yield plain(f"{node}.self_attention.linear_proj.weight", f"{attention}.out_proj.weight", size, size)
        yield plain(f"{node}.self_attention.linear_proj.bias", f"{attention}.out_proj.bias", size)
        yield from norm(f"{node}.pre_mlp_layernorm", f"{layer}.{names['mlp_norm']}", size, bias=True)
        for linear, rows, columns in (("fc1", ffn, size), ("fc2", size, ffn)):
            yield plain(f"{node}.mlp.linear_{linear}.weight", f"{layer}.{names[linear]}.weight", rows, columns)
            yield plain(f"{node}.mlp.linear_{linear}.bias", f"{layer}.{names[linear]}.bias", rows)


def _vision(config: SynapseConfig) -> Iterator[Entry]:
    tower, hf = config.vision, "model.vision_tower"
    size = tower.hidden_size
    embeddings = "vision.embeddings"
    patch = (size, 3, tower.patch_size, tower.patch_size)
    yield plain(f"{embeddings}.patch_embedding.weight", f"{hf}.embeddings.patch_embedding.weight", *patch)
    yield plain(f"{embeddings}.class_embedding", f"{hf}.embeddings.class_embedding", size)
    yield plain(
        f"{embeddings}.position_embedding", f"{hf}.embeddings.position_embedding.weight", tower.tokens_per_image, size
    )
    yield from norm(f"{embeddings}.pre_layernorm", f"{hf}.pre_layrnorm", size, bias=True)
    names = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    yield from _tower_layers("vision.layers", f"{hf}.encoder.layers", tower, names, key_bias=True)
    yield plain("vision.temporal.position_embedding", f"{hf}.temporal_embedding.weight", tower.max_frames, size)


def _audio(config: SynapseConfig) -> Iterator[Entry]:
    tower, hf = config.audio, "model.audio_tower"
    size = tower.hidden_size
    for name, channels in (("conv1", tower.num_mel_bins), ("conv2", size)):
        yield plain(f"audio.embeddings.{name}.weight", f"{hf}.{name}.weight", size, channels, 3)
        yield plain(f"audio.embeddings.{name}.bias", f"{hf}.{name}.bias", size)
    names = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm", "fc1": "fc1", "fc2": "fc2"}
    yield from _tower_layers("audio.layers", f"{hf}.layers", tower, names, key_bias=False)
    yield from norm("audio.output.final_layernorm", f"{hf}.layer_norm", size, bias=True)


def _cross_layer(config: SynapseConfig, j: int) -> Iterator[Entry]:
    size, heads = config.decoder.hidden_size, config.decoder.num_attention_heads
    head_dim, groups = size // heads, config.cross_attention.num_query_groups
    node, hf = f"decoder.cross_layers.{j}", f"model.cross_layers.{j}"
    yield from norm(f"{node}.input_layernorm", f"{hf}.input_layernorm", size, bias=False)
    yield plain(f"{node}.linear_q.weight", f"{hf}.cross_attn.q_proj.weight", size, size)
    for memory, width in (("image", config.vision.hidden_size), ("audio", config.audio.hidden_size)):
        parts = tuple(Part(f"{hf}.cross_attn.{kind}_proj_{memory}.weight") for kind in "kv")
        yield Entry(f"{node}.linear_kv_{memory}.weight", parts, groups, head_dim, (width,))
    if config.cross_attention.qk_layernorm:
        for kind in "qk":
            yield from norm(f"{node}.{kind}_layernorm", f"{hf}.cross_attn.{kind}_norm", head_dim, bias=False)
    yield plain(f"{node}.linear_proj.weight", f"{hf}.cross_attn.o_proj.weight", size, size)
    yield plain(f"{node}.gate", f"{hf}.gate", 1)


def synapse_entries(config: SynapseConfig) -> list[Entry]:
    """Every parameter of a Synapse model, in the order of its nodes."""
    entries = [*_vision(config), *_audio(config), embedding_entry(config.decoder)]
    for i in range(config.decoder.num_layers):
        if i % config.cross_attention.every == 0:
            entries += _cross_layer(config, i // config.cross_attention.every)
        entries += decoder_layer_entries(config.decoder, i)
    return [*entries, *output_entries(config.decoder)]


ADAPTER = Adapter(
    name="synapse",
    entries=synapse_entries,
    fields=fields,
    tree=tree,
    vocab_size=lambda model: model.decoder.vocab_size,
    config_class="configuration_synapse.SynapseConfig",
    model_class="modeling_synapse.SynapseForCausalLM",
    bare_class="modeling_synapse.SynapseModel",
    modules=("exported_model", "text_layers"),
    speaks=lambda model: True,
)
