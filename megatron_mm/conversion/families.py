"""Families of pretrained models: which parts they fit, and under which names they hold our tensors.

    section of a system ─ fields by their types ─ the part that a family fits ─ its nodes ─ tensors by our usual names

A part (megatron_mm/parts) is known by the type of its section, so that a system of a user's own is filled like the five
of the package. A family fits a part only if the two compute the same function; `expected` says what the source's
configuration must hold for that. `locate` turns our usual name of a tensor (mostly the source's) into the names that
the tensor, or the stored tensor of which it is a piece, may have in the source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch

from megatron_mm.config.system import SystemConfig
from megatron_mm.hf.modeling_synapse import sinusoids
from megatron_mm.hf.vit import sine_cosine_positions
from megatron_mm.models.graph import Node
from megatron_mm.models.names import Entry, Part
from megatron_mm.parts.clip.section import VisionTowerConfig
from megatron_mm.parts.conformer.section import ConformerConfig
from megatron_mm.parts.decoder.section import DecoderConfig
from megatron_mm.parts.swin.section import SwinConfig
from megatron_mm.parts.text_encoder.section import TextEncoderConfig
from megatron_mm.parts.transformer_xl.section import TransformerXLConfig
from megatron_mm.parts.vit.section import MAEConfig, ViTConfig
from megatron_mm.parts.whisper.section import AudioTowerConfig

#: What each part reads, and what it is, by the type of its section.
KINDS = {
    DecoderConfig: (
        "text", "a decoder in Llama's form (RMSNorm, rotary positions, grouped queries, gated MLP, no biases)"
    ),
    TextEncoderConfig: ("text", "a text encoder in GPT-2's form (LayerNorm, learned positions, biases)"),
    TransformerXLConfig: ("text", "a Transformer-XL (relative positions, both sides of a segment)"),
    VisionTowerConfig: ("image", "CLIP's vision transformer (learned positions, quick-GELU, no final norm)"),
    ViTConfig: ("image", "a ViT of masked autoencoders (fixed sine-cosine positions, GELU, a final norm)"),
    SwinConfig: ("image", "a Swin V2"),
    AudioTowerConfig: ("audio", "Whisper's encoder of spectrograms"),
    ConformerConfig: ("audio", "a Conformer on the waveform"),
}  # fmt: skip
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Stored:
    """A tensor of a source, or the piece of it that is ours."""

    name: str
    transposed: bool = False
    piece: tuple[int, int] = (0, 1)
    """(which, of how many) equal pieces of the rows."""
    skipped: int = 0
    """Leading rows that are not ours."""
    flat: bool = False
    """Stored with leading dimensions of one."""

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of our piece of a tensor of this shape."""
        if self.flat and all(size == 1 for size in stored[:-1]):
            stored = stored[-1:]
        rows, *rest = stored[::-1] if self.transposed else stored
        return (rows // self.piece[1] - self.skipped, *rest)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Our piece of the stored tensor."""
        tensor = tensor.t() if self.transposed else tensor
        tensor = tensor.reshape(tensor.shape[-1:]) if self.flat else tensor
        which, count = self.piece
        return tensor.chunk(count)[which][self.skipped :]


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """One kind of pretrained checkpoint."""

    name: str
    option: str
    kind: type
    """The section of the part that it fits."""
    model_types: tuple[str, ...]
    """What its config.json may call itself."""
    nodes: dict[str, str]
    """Beginnings of the names of the part's nodes, each with what our usual names begin with there."""
    ours: tuple[str, ...]
    """Prefixes of our usual names that it fills."""
    prefixes: tuple[str, ...]
    """What may stand before the source's names, tried in order."""
    expected: Callable[[Any, SystemConfig, list[str]], dict[str, object]]
    """Fields of the source's configuration and the values that the part's section in a model needs, to fill tensors of
    these names."""
    locate: Callable[[str], tuple[Stored, ...]]
    """Our usual name -> what may hold it, without prefix: the first that there is."""
    fields: Callable[[dict], dict] = dict
    """The source's config.json, brought to the names of `expected`."""
    defaults: dict[str, object] = field(default_factory=dict)
    """Values of fields that a config.json may leave out."""
    lacks: tuple[str, ...] = ()
    """Pieces of our names that it does not have; those tensors keep their initial values."""
    optional: str = ""
    """Prefix of our names that a source may lack as a whole."""
    vocabulary: tuple[str, ...] = ()
    """Our names of tensors with a row a token."""
    positions: str = ""
    """Our name of the table of positions, of which the first rows are taken."""
    computed: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    """Tables that the source may store and our model computes: the source's name, without prefix -> what a tensor
    [positions, width] of that name must hold."""

    @property
    def part(self) -> str:
        """`text`, `image` or `audio`."""
        return KINDS[self.kind][0]

    def entries(self, nodes: Sequence[Node]) -> list[Entry]:
        """What of a graph's weights the family may fill, under our usual names.

        A tower may have another place in a user's own model; what it is called there is its first node's `exported`.
        """
        found = []
        for beginning, usual in self.nodes.items():
            of_part = [node for node in nodes if node.name.startswith(beginning)]
            place = of_part[0].exported if of_part and usual else ""
            entries = (_renamed(entry, place, usual) for node in of_part for entry in node.names())
            found += [
                entry for entry in entries
                if entry.parts[0].name.startswith(self.ours)
                and not any(piece in entry.parts[0].name for piece in self.lacks)
            ]  # fmt: skip
        return found


def _renamed(entry: Entry, place: str, usual: str) -> Entry:
    """An entry whose exported names begin with `usual` in place of `place`; None stays."""

    def name(part: Part) -> str | None:
        inside = part.name is not None and place and part.name.startswith(f"{place}.")
        return f"{usual}{part.name.removeprefix(place)}" if inside else part.name

    return replace(entry, parts=tuple(replace(part, name=name(part)) for part in entry.parts))


# ------------------------------------------------------------------------------------------------------- Synapse's own


def _clip_expected(tower: VisionTowerConfig, model: SystemConfig, filled: list[str]) -> dict[str, object]:
    return {
        "hidden_size": tower.hidden_size, "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_attention_heads, "intermediate_size": tower.ffn_hidden_size,
        "patch_size": tower.patch_size, "image_size": tower.image_size, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }  # fmt: skip


CLIP = Family(
    name="CLIP",
    option="clip",
    kind=VisionTowerConfig,
    nodes={"vision.": "model.vision_tower"},
    model_types=("clip", "clip_vision_model"),
    ours=("model.vision_tower.",),
    prefixes=("vision_model.", "", "model.vision_model."),
    expected=_clip_expected,
    locate=lambda name: (Stored(name.removeprefix("model.vision_tower.")),),
    fields=lambda fields: fields.get("vision_config") or fields,
    defaults={
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "patch_size": 32, "image_size": 224, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    lacks=("temporal_embedding",),
)  # fmt: skip


def _whisper_expected(tower: AudioTowerConfig, model: SystemConfig, filled: list[str]) -> dict[str, object]:
    return {
        "d_model": tower.hidden_size, "encoder_layers": tower.num_layers,
        "encoder_attention_heads": tower.num_attention_heads, "encoder_ffn_dim": tower.ffn_hidden_size,
        "num_mel_bins": tower.num_mel_bins, "activation_function": "gelu", "scale_embedding": False,
    }  # fmt: skip


WHISPER = Family(
    name="Whisper",
    option="whisper",
    kind=AudioTowerConfig,
    nodes={"audio.": "model.audio_tower"},
    model_types=("whisper",),
    ours=("model.audio_tower.",),
    prefixes=("model.encoder.", "encoder.", ""),
    expected=_whisper_expected,
    locate=lambda name: (Stored(name.removeprefix("model.audio_tower.")),),
    defaults={
        "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536,
        "num_mel_bins": 80, "activation_function": "gelu", "scale_embedding": False,
    },
    computed={"embed_positions.weight": lambda stored: sinusoids(*stored.shape, "cpu")},
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- text


def _llama_fields(fields: dict) -> dict:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    heads = fields.get("num_attention_heads", 32)
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "num_key_value_heads": heads, "head_dim": fields.get("hidden_size", 4096) // heads,
        **{name: value for name, value in fields.items() if value is not None},
    }  # fmt: skip


def _llama_expected(decoder: DecoderConfig, model: SystemConfig, filled: list[str]) -> dict[str, object]:
    return {
        "hidden_size": decoder.hidden_size, "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_attention_heads, "num_key_value_heads": decoder.num_query_groups,
        "intermediate_size": decoder.ffn_hidden_size, "rms_norm_eps": decoder.layernorm_epsilon,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "head_dim": decoder.hidden_size // decoder.num_attention_heads,
        "rope_theta": decoder.rotary_base, "rope_type": "default",
    }  # fmt: skip


LLAMA = Family(
    name="Llama",
    option="llama",
    kind=DecoderConfig,
    nodes={"decoder.": ""},
    model_types=("llama",),
    ours=("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
    prefixes=("", "language_model."),
    expected=_llama_expected,
    locate=lambda name: (Stored(name),),
    fields=_llama_fields,
    defaults={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-6},
    lacks=(".cross_attn",),
    vocabulary=("model.embed_tokens.weight", "lm_head.weight"),
)

_GPT2_LAYER = {
    "self_attn_layer_norm": "ln_1",
    "self_attn.out_proj": "attn.c_proj",
    "final_layer_norm": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}
_GPT2_ENDS = {"embed_tokens": "wte", "embed_positions": "wpe", "final_layer_norm": "ln_f"}
_ENCODER = "text_encoder."
_ENCODER_TABLES = {
    "vocabulary": (f"{_ENCODER}embed_tokens.weight",),
    "positions": f"{_ENCODER}embed_positions.weight",
}


def _gpt2_locate(name: str) -> tuple[Stored, ...]:
    """GPT-2 keeps queries, keys and values together, and its matrices transposed (Conv1D)."""
    module, _, leaf = name.removeprefix(_ENCODER).rpartition(".")
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if found is None:
        return (Stored(f"{_GPT2_ENDS[module]}.{leaf}"),)
    layer, inner = found.groups()
    is_matrix = leaf == "weight" and "norm" not in inner
    projection = re.fullmatch(r"self_attn\.([qkv])_proj", inner)
    if projection:
        return (Stored(f"h.{layer}.attn.c_attn.{leaf}", is_matrix, ("qkv".index(projection.group(1)), 3)),)
    return (Stored(f"h.{layer}.{_GPT2_LAYER[inner]}.{leaf}", is_matrix),)


def _gpt2_fields(fields: dict) -> dict:
    activation = fields.get("activation_function", "gelu_new")
    inner = fields.get("n_inner") or 4 * fields.get("n_embd", 768)
    return fields | {"activation": ACTIVATIONS.get(activation, activation), "n_inner": inner}


def _gpt2_expected(text: TextEncoderConfig, model: SystemConfig, filled: list[str]) -> dict[str, object]:
    return {
        "n_embd": text.hidden_size, "n_layer": text.num_layers, "n_head": text.num_attention_heads,
        "n_inner": text.ffn_hidden_size, "activation": text.activation, "layer_norm_epsilon": text.layernorm_epsilon,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    }  # fmt: skip


GPT2 = Family(
    name="GPT-2",
    option="gpt2",
    kind=TextEncoderConfig,
    nodes={"text.": "text_encoder"},
    model_types=("gpt2",),
    ours=(_ENCODER,),
    prefixes=("transformer.", ""),
    expected=_gpt2_expected,
    locate=_gpt2_locate,
    fields=_gpt2_fields,
    defaults={
        "n_embd": 768, "n_layer": 12, "n_head": 12, "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    **_ENCODER_TABLES,
)  # fmt: skip


def _opt_locate(name: str) -> tuple[Stored, ...]:
    """Our names are OPT's; its table of positions begins with two rows that no token has."""
    return (Stored(name.removeprefix(_ENCODER), skipped=2 if name.startswith(f"{_ENCODER}embed_positions") else 0),)


def _opt_fields(fields: dict) -> dict:
    width = fields.get("word_embed_proj_dim") or fields.get("hidden_size", 768)
    activation = fields.get("activation_function", "relu")
    return fields | {"activation": ACTIVATIONS.get(activation, activation), "word_embed_proj_dim": width}


def _opt_expected(text: TextEncoderConfig, model: SystemConfig, filled: list[str]) -> dict[str, object]:
    return {
        "hidden_size": text.hidden_size, "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_attention_heads, "ffn_dim": text.ffn_hidden_size,
        "activation": text.activation, "layer_norm_eps": text.layernorm_epsilon, "do_layer_norm_before": True,
        "word_embed_proj_dim": text.hidden_size, "enable_bias": True, "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    }  # fmt: skip


OPT = Family(
    name="OPT",
    option="opt",
    kind=TextEncoderConfig,
    nodes={"text.": "text_encoder"},
    model_types=("opt",),
    ours=(_ENCODER,),
    prefixes=("model.decoder.", "decoder.", ""),
    expected=_opt_expected,
    locate=_opt_locate,
    fields=_opt_fields,
    defaults={
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072,
        "layer_norm_eps": 1e-5,  # torch's own; OPT's configuration does not name it
        "do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    },
    **_ENCODER_TABLES,
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- ViT-MAE

_OLD_VIT = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _vit_mae_locate(name: str) -> tuple[Stored, ...]:
    """Files have the names that transformers gave before its release 5, or, for the decoder's layers, a third kind; a
    tower alone has no prefix."""
    top, _, inner = name.partition(".")
    flat = inner.endswith(("cls_token", "mask_token"))
    spellings = [inner]
    found = re.fullmatch(r"(layers|decoder_layers)\.(\d+)\.(.+)\.(weight|bias)", inner)
    if found is not None:
        layers, number, module, leaf = found.groups()
        old = f"{number}.{_OLD_VIT.get(module, module)}.{leaf}"
        stacks = ("encoder.layer",) if layers == "layers" else ("decoder_layers", "decoder_encoder.layer")
        spellings += [f"{stack}.{old}" for stack in stacks]
    prefixes = ("vit.", "") if top == "vision_tower" else ("decoder.",)
    return tuple(Stored(prefix + spelling, flat=flat) for prefix in prefixes for spelling in spellings)


def _vit_mae_expected(tower: ViTConfig, model: SystemConfig, filled: list[str]) -> dict[str, object]:
    fields = {
        "hidden_size": tower.hidden_size, "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_attention_heads, "intermediate_size": tower.ffn_hidden_size,
        "patch_size": tower.patch_size, "image_size": tower.image_size, "layer_norm_eps": tower.layernorm_epsilon,
        "hidden_act": "gelu", "qkv_bias": True, "num_channels": 3,
    }  # fmt: skip
    if not any(name.startswith("mae_decoder.") for name in filled):
        return fields
    mae = section_in(model, MAEConfig)[1]
    return fields | {
        "decoder_hidden_size": mae.hidden_size, "decoder_num_hidden_layers": mae.num_layers,
        "decoder_num_attention_heads": mae.num_attention_heads, "decoder_intermediate_size": mae.ffn_hidden_size,
    }  # fmt: skip


def _vit_positions(stored: torch.Tensor) -> torch.Tensor:
    return sine_cosine_positions(round((len(stored) - 1) ** 0.5), stored.shape[1], stored)


VIT_MAE = Family(
    name="ViT-MAE",
    option="vit_mae",
    kind=ViTConfig,
    nodes={"vision.": "vision_tower", "mae.": "mae_decoder"},
    model_types=("vit_mae",),
    ours=("vision_tower.", "mae_decoder."),
    prefixes=("",),
    expected=_vit_mae_expected,
    locate=_vit_mae_locate,
    defaults={
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "patch_size": 16, "image_size": 224, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "qkv_bias": True,
        "num_channels": 3, "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8,
        "decoder_num_attention_heads": 16, "decoder_intermediate_size": 2048,
    },
    optional="mae_decoder.",
    computed=dict.fromkeys(
        ("vit.embeddings.position_embeddings", "embeddings.position_embeddings", "decoder.decoder_pos_embed"),
        _vit_positions,
    ),
)  # fmt: skip

FAMILIES = {family.option: family for family in (CLIP, WHISPER, LLAMA, GPT2, OPT, VIT_MAE)}


def sections_of(model: Any, kinds: tuple[type, ...], prefix: str = "model") -> Iterator[tuple[str, Any]]:
    """Paths and values of the fields of a section, and of the sections in it, that are of one of some types."""
    for item in fields(model):
        value, path = getattr(model, item.name), f"{prefix}.{item.name}"
        if isinstance(value, kinds):
            yield path, value
        elif is_dataclass(value):
            yield from sections_of(value, kinds, path)


def section_in(model: SystemConfig, kind: type) -> tuple[str, Any]:
    """Path and value of the one field of a type.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = list(sections_of(model, (kind,)))
    if len(found) != 1:
        said = ", ".join(path for path, _ in found) or "no field"
        raise ValueError(f"{model.system} has {said} of the type {kind.__name__}; an import needs exactly one")
    return found[0]


def check_fits(family: Family, model: SystemConfig) -> None:
    """Refuses a family that computes another function than the system's part, with the reason."""
    system = model.system
    if family.part == "text" and not model.reads_text:
        phase = f" in the phase {model.phase}" if hasattr(model, "phase") else ""
        raise ValueError(f"{family.name} does not fit {system}{phase}, which has no text")
    if any(True for _ in sections_of(model, (family.kind,))):
        section_in(model, family.kind)
        return
    rivals = tuple(kind for kind, (part, _) in KINDS.items() if part == family.part)
    found = [kind for _, value in sections_of(model, rivals) for kind in rivals if isinstance(value, kind)]
    if not found:
        raise ValueError(f"{family.name} does not fit {system}, which has no {family.part} part that is known here")
    others = [f"--{other.option.replace('_', '-')}" for other in FAMILIES.values() if other.kind in found]
    advice = f"{' or '.join(others)} fits" if others else "nothing that can be imported fits"
    raise ValueError(
        f"{family.name} does not fit {system}: its {family.part} part is {KINDS[found[0]][1]}, {family.name} is "
        f"{KINDS[family.kind][1]}; {advice}"
    )
