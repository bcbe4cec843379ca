"""What an exported folder of a system is: config.json and modelling files by its `ADAPTER`, tensors by its graph.

Most of a configuration is the recipe's section as it is: fields of the text part are renamed to those that transformers
expects of a language model, the other parts stand under their own names (`section_fields`, `section_tree`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

from megatron_mm.config.schema import Config
from megatron_mm.config.system import SystemConfig
from megatron_mm.config.systems import SYSTEMS, exported
from megatron_mm.models.names import Entry

#: Fields of DecoderConfig and their names in a configuration of Llama.
DECODER_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "rms_norm_eps",
}
#: Files of megatron_mm/media that every folder's processor reads media by.
MEDIA = ("decoding", "errors", "transforms")
#: Fields of a recipe's model that an exported model does not have.
TRAINING_ONLY = frozenset({"system", "backend", "attention_backend", "hidden_dropout", "attention_dropout", "frozen"})
#: Fields whose values a recipe may have otherwise than the folder that is restored under it.
NO_FUNCTION = frozenset({"initializer_range", "gate_init", "temperature", "negatives", "mask_ratio", "masked_lm_share"})


@dataclass(frozen=True)
class Adapter:
    """What conversion must know of a system."""

    name: str
    """The system's; `model_type` in config.json."""
    fields: Callable[[Config], dict]
    """config.json of a recipe, without transformers' own fields."""
    tree: Callable[[Mapping], dict]
    """The recipe's tree from config.json; KeyError names a missing field."""
    config_class: str
    """`module.Class` among the modelling files."""
    model_class: str
    modules: tuple[str, ...]
    """Modelling files that the folder needs besides these two and the processor's."""
    bare_class: str | None = None
    """What AutoModel gives, if it is another class."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all code files of a folder."""
        named = (self.config_class.partition(".")[0], self.model_class.partition(".")[0], "processing_mm")
        media = (f"media_{module}" for module in MEDIA)
        return tuple(f"{module}.py" for module in (*named, *self.modules, *media))

    def auto_map(self, model: SystemConfig) -> dict[str, str]:
        """Which class each of transformers' Auto classes loads."""
        classes = {
            "AutoConfig": self.config_class,
            "AutoModel": self.bare_class or self.model_class,
            "AutoProcessor": "processing_mm.MultimodalProcessor",
        }
        return classes | ({"AutoModelForCausalLM": self.model_class} if model.generates else {})

    def load_class(self, name: str) -> type:
        """A class of the modelling files, in this process."""
        module, _, leaf = name.partition(".")
        return getattr(import_module(f"megatron_mm.hf.{module}"), leaf)


def model_entries(model: SystemConfig) -> list[Entry]:
    """Each training tensor of a model and the exported tensors that it is made of, in the order of its nodes.

    Args:
        model: the section of a system.
    """
    from megatron_mm.platform import setup

    setup.apply_platform()  # before anything of megatron-core is imported
    from megatron_mm.models.graph import names_of
    from megatron_mm.models.layers.settings import LayerSettings
    from megatron_mm.systems.graph import build_graph

    return names_of(build_graph(model, LayerSettings()).nodes)


def adapter_of(name: object, source: object) -> Adapter:
    """The adapter of a system.

    Args:
        source: what names it, for messages.

    Raises:
        ValueError: none is known.
    """
    if name not in exported():
        raise ValueError(
            f"{source}: there is no export of the system {name!r}; there is one of {', '.join(exported())}, and none "
            "yet of a plugin's system (docs/adding_a_system.md)"
        )
    return SYSTEMS[name].load("export")


# ------------------------------------------------------------------------------------- configurations from sections


def section_fields(config: Config, text: str, names: Mapping[str, str]) -> dict:
    """config.json of a recipe: the text part flat under `names`, the other parts as they are, and what inputs are.

    Args:
        text: name of the text part's section.
        names: its fields and theirs.
    """
    tree = _plain(dataclasses.asdict(config.model))
    section = tree.pop(text)
    fields = {"initializer_range": tree.pop("init_std")}
    fields |= {theirs: section[ours] for ours, theirs in names.items()}
    data = config.data
    return fields | tree | {
        "seq_length": data.seq_length,
        "image_mean": list(data.image_mean),
        "image_std": list(data.image_std),
        "frames_per_video": data.frames_per_video,
    }  # fmt: skip


def section_tree(fields: Mapping, section: type[SystemConfig], text: str, names: Mapping[str, str]) -> dict:
    """The recipe's tree from config.json: what `section_fields` wrote."""
    model = {"system": fields["model_type"], "init_std": fields["initializer_range"]}
    model[text] = {ours: fields[theirs] for ours, theirs in names.items()}
    skipped = TRAINING_ONLY | {"init_std", text}
    model |= {f.name: fields[f.name] for f in dataclasses.fields(section) if f.name not in skipped}
    data = {name: fields[name] for name in ("seq_length", "image_mean", "image_std", "frames_per_video")}
    return {"model": model, "data": data}


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in TRAINING_ONLY}
    return list(value) if isinstance(value, tuple) else value


def differences(found: Mapping, wanted: Mapping, prefix: str = "") -> list[str]:
    """What two configurations say otherwise of the function, as sentences."""
    lines = []
    for name, value in wanted.items():
        theirs = found.get(name)
        if isinstance(value, Mapping) and isinstance(theirs, Mapping):
            lines += differences(theirs, value, f"{prefix}{name}.")
        elif name not in NO_FUNCTION and theirs != value:
            lines.append(f"{prefix}{name}: {theirs} in the folder, {value} in the recipe")
    return lines
