"""What an exported folder of a system is: config.json and modelling files by its `Adapter`, tensors by its graph.

Most of a configuration is the recipe's section as it is: fields of the text part are renamed to those that transformers
expects of a language model, the other parts stand under their own names (`section_fields`, `section_tree`).

    classes that config.json names ─ their files ─ what these import (`from .name import`) ─ files of the folder

A modelling file is looked for where the adapter says and then in megatron_mm/hf: a system of a user's own brings its
own files and takes the rest from there.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType

from megatron_mm.config.schema import Config
from megatron_mm.config.system import SystemConfig
from megatron_mm.config.systems import SYSTEMS, exported
from megatron_mm.models.graph import Node, names_of
from megatron_mm.models.names import Entry

#: The package of the modelling files that come with this program.
HF = "megatron_mm.hf"
#: Field of config.json that names the plugins without which nothing here knows the folder's system.
PLUGINS = "megatron_mm_plugins"

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
MEDIA = ("decoding", "errors", "files", "transforms")
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
    bare_class: str | None = None
    """What AutoModel gives, if it is another class."""
    processor_class: str | None = "processing_mm.MultimodalProcessor"
    """What AutoProcessor gives: made as `Class(configuration, tokenizer or None)`; None: there is none, and the tools
    that answer prompts refuse the model."""
    reads_tokenizer: bool = True
    """The processor of a model that reads text takes the tokenizer of a file, which decides the special ids of
    config.json; False: it needs none, and `fields` says them (pad_token_id, bos_token_id, eos_token_id)."""
    source: str | Path = HF
    """Where the modelling files are: the name of a package, or a folder, such as that of a plugin's file. What is not
    there is taken from megatron_mm/hf."""
    outputs: Mapping[str, str] = field(default_factory=dict)
    """Fields of the model's output and the streams [R, …] of the graph that they are, which the proof of an export
    compares besides those that it knows (evaluation/export_proof.py)."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that config.json names, each once."""
        named = (self.config_class, self.model_class, self.bare_class, self.processor_class)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where modelling files are looked for, in this order.

        Raises:
            ValueError: there is no such package or folder.
        """
        if isinstance(self.source, str):
            found = importlib.util.find_spec(self.source)
            if found is None or not found.submodule_search_locations:
                raise ValueError(f"the export of {self.name}: source {self.source!r} is no package")
            places = [Path(place) for place in found.submodule_search_locations]
        else:
            places = [Path(self.source).resolve()]
            if not places[0].is_dir():
                raise ValueError(
                    f"the export of {self.name}: source {self.source} is no folder; give Path(__file__).parent"
                )
        ours = importlib.util.find_spec(HF).submodule_search_locations
        return tuple(dict.fromkeys((*places, *map(Path, ours))))

    @property
    def files(self) -> dict[str, Path]:
        """All modelling files by name: those of the classes, and what they import.

        Raises:
            ValueError: a file is missing, or imports what an exported folder cannot give it.
        """
        found: dict[str, Path] = {}
        for name in self.classes:
            loaded = name.partition(".")[0]
            found[f"{loaded}.py"] = self._file(loaded, "the adapter")
            needed, waiting = {loaded}, [loaded]
            while waiting:
                module = waiting.pop()
                file = self._file(module, f"{module}.py")
                for other in _imported(file, self.folders):
                    found[f"{other}.py"] = self._file(other, str(file))
                    if other not in needed:
                        needed.add(other)
                        waiting.append(other)
            self._check_imports(loaded, needed)
        return found

    def _file(self, module: str, who: str) -> Path:
        for folder in self.folders:
            if (folder / f"{module}.py").is_file():
                return folder / f"{module}.py"
        if module in {f"media_{name}" for name in MEDIA}:
            return self.folders[-1].parent / "media" / f"{module.removeprefix('media_')}.py"
        places = " or ".join(map(str, self.folders))
        raise ValueError(f"the export of {self.name}: {who} names {module}.py, which is not in {places}")

    def _check_imports(self, loaded: str, needed: set[str]) -> None:
        """transformers before 5.6 copies what the loaded file names, and no more, out of a folder.

        What the configuration's file brings is there before the others are loaded.
        """
        there: set[str] = set()
        for module in dict.fromkeys((self.config_class.partition(".")[0], loaded)):
            there |= {module, *_imported(self._file(module, ""), self.folders)}
        if missing := sorted(needed - there):
            names = ", ".join(f".{module}" for module in missing)
            raise ValueError(
                f"the export of {self.name}: {loaded}.py must itself import {names}, which its imports import: "
                "transformers before 5.6 copies no other files"
            )

    def auto_map(self, model: SystemConfig) -> dict[str, str]:
        """Which class each of transformers' Auto classes loads."""
        classes = {"AutoConfig": self.config_class, "AutoModel": self.bare_class or self.model_class}
        if self.processor_class is not None:
            classes["AutoProcessor"] = self.processor_class
        return classes | ({"AutoModelForCausalLM": self.model_class} if model.generates else {})

    def load_class(self, name: str) -> type:
        """A class of the modelling files, in this process."""
        module, _, leaf = name.partition(".")
        package = HF if self.source == HF else _package(self.folders).__name__
        return getattr(import_module(f"{package}.{module}"), leaf)


def _package(folders: Sequence[Path]) -> ModuleType:
    """The files of several folders as the modules of one package, as they stand side by side in an exported folder."""
    digest = hashlib.blake2b("\n".join(map(str, folders)).encode(), digest_size=4).hexdigest()
    name = f"megatron_mm_exported_{digest}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder) for folder in folders]
        sys.modules[name] = package
    return sys.modules[name]


def _imported(file: Path, folders: Sequence[Path]) -> list[str]:
    """Modules of the exported folder that a modelling file imports, each once.

    `from megatron_mm.media.NAME import` is written there as `from .media_NAME import`.

    Raises:
        ValueError: it imports what an exported folder has not, or in a form that transformers does not see.
    """
    modules: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or "." in node.module:
                said = "." * node.level + (node.module or "")
                raise ValueError(
                    f"{file}, line {node.lineno}: it imports from {said}; write `from .module import name`"
                )
            modules.append(node.module)
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            top = name.partition(".")[0]
            if isinstance(node, ast.ImportFrom) and re.fullmatch(r"megatron_mm\.media\.\w+", name):
                modules.append(f"media_{name.rpartition('.')[2]}")
            elif top == "megatron_mm" or any((folder / f"{top}.py").is_file() for folder in folders):
                raise ValueError(
                    f"{file}, line {node.lineno}: it imports {name}, which is not installed where an exported folder "
                    "is loaded; modelling files import one another as `from .module import name`"
                )
    return list(dict.fromkeys(modules))


def model_nodes(model: SystemConfig) -> Sequence[Node]:
    """The nodes of a model's graph.

    Args:
        model: the section of a system.
    """
    from megatron_mm.platform import setup

    setup.apply_platform()  # before anything of megatron-core is imported
    from megatron_mm.models.layers.settings import LayerSettings
    from megatron_mm.systems.graph import build_graph

    return build_graph(model, LayerSettings()).nodes


def model_entries(model: SystemConfig) -> list[Entry]:
    """Each training tensor of a model and the exported tensors that it is made of, in the order of its nodes.

    Args:
        model: the section of a system.
    """
    return names_of(model_nodes(model))


def needed_plugins(config: Config) -> list[str]:
    """What an exported folder says of a recipe's plugins: files without their folders, which are this machine's."""
    return [Path(name).name if name.endswith(".py") else name for name in config.plugins]


def adapter_of(name: object, source: object) -> Adapter:
    """The adapter of a system.

    Args:
        source: what names it, for messages.

    Raises:
        ValueError: none is known.
    """
    if name not in exported():
        raise ValueError(
            f"{source}: there is no export of the system {name!r}; there is one of {', '.join(exported())}. A plugin's "
            "system has one where it is registered with an Adapter: System(…, export=…), docs/adding_a_system.md"
        )
    adapter = SYSTEMS[name].load("export")
    if adapter.name != name:
        raise ValueError(f"{source}: the system {name!r} is registered with the adapter of {adapter.name!r}")
    return adapter


# ------------------------------------------------------------------------------------- configurations from sections


#: Fields of a recipe's `data` that an exported model keeps: the longest row, and how images are read.
DATA = ("seq_length", "image_mean", "image_std", "frames_per_video")


def section_fields(config: Config, text: str | None, names: Mapping[str, str], data: Sequence[str] = DATA) -> dict:
    """config.json of a recipe: the text part flat under `names`, the other parts as they are, and what inputs are.

    Args:
        text: name of the text part's section; None: the text part has none, and `names` are fields of the model.
        names: its fields and theirs.
        data: fields of the recipe's `data`.
    """
    tree = _plain(dataclasses.asdict(config.model))
    section = tree if text is None else tree.pop(text)
    fields = {"initializer_range": tree.pop("init_std")}
    fields |= {theirs: section.pop(ours) for ours, theirs in names.items()}
    return fields | tree | {name: _plain(getattr(config.data, name)) for name in data}


def section_tree(
    fields: Mapping,
    section: type[SystemConfig],
    text: str | None,
    names: Mapping[str, str],
    data: Sequence[str] = DATA,
) -> dict:
    """The recipe's tree from config.json: what `section_fields` wrote."""
    model = {"system": fields["model_type"], "init_std": fields["initializer_range"]}
    named = {ours: fields[theirs] for ours, theirs in names.items()}
    model |= named if text is None else {text: named}
    skipped = TRAINING_ONLY | {"init_std", *model}
    model |= {f.name: fields[f.name] for f in dataclasses.fields(section) if f.name not in skipped}
    return {"model": model, "data": {name: fields[name] for name in data}}


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
