"""Recipe and command line to a checked Config, and back to YAML.

    pretrain_multimodal.py --config RECIPE.yaml [--field.sub value …]

The recipe is validated against the typed tree (an unknown key or a wrong type is refused by its path), the command line
overrides any field, by its path or by Megatron's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
import yaml
from pydantic import Field, TypeAdapter, ValidationError

from megatron_mm.config.documents import load_yaml
from megatron_mm.config.plugins import load_plugin, locate_plugin, named_plugin
from megatron_mm.config.schema import Config, DatasetConfig
from megatron_mm.config.section import changed, section
from megatron_mm.config.system import SystemConfig
from megatron_mm.config.systems import DEFAULT_SYSTEM, SYSTEMS, section_of

#: What a run once wrote into its settings, and said nothing of it: options of a command line.
_VERBS = ("check", "dry_run", "dry_run_json")


#: Builders of this package that earlier settings name by where they were.
_MOVED = {"megatron_mm.data.generated:build": "megatron_mm.data.reading.generated:build"}
#: Modules of this package that have builders.
_BUILDERS = ("megatron_mm.data.reading.generated",)
#: (recipe, plugin) of which was said that they run.
_announced: set[tuple[str, str]] = set()


@dataclass
class Verbs:
    """What pretrain_multimodal.py is to do other than train."""

    check: bool = False
    """Compare code, settings and data of all processes, measure every device and group, and end with status 0 or 1."""
    dry_run: bool = False
    """Build and run one microbatch of every pipeline stage without data or devices, print its costs, and end."""
    dry_run_json: str | None = None
    """Also write the dry run's figures to this file."""


class CommandLine(NamedTuple):
    """A command line, read."""

    config: Config
    verbs: Verbs


RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def load_config(path: str | Path) -> Config:
    """A recipe that the user names as a Config; the plugins that it names run, and are printed before they do.

    What a checkpoint holds is read by `load_saved_config`.

    Raises:
        ValueError: no such file, not YAML, an unknown field or a value of the wrong type (each named by its path).
    """
    tree = _tree_of(Path(path))
    named = [code for code in (*_plugins_of(tree, path), _builder_of(tree)[0]) if code and code not in _BUILDERS]
    for code in dict.fromkeys(str(locate_plugin(code, Path(path).parent)) for code in named):
        if (str(path), code) not in _announced:
            _announced.add((str(path), code))
            if os.environ.get("RANK", "0") == "0":
                print(f"{path}: its code runs: {code}", file=sys.stderr, flush=True)
    return config_from_tree(tree, path)


def load_saved_config(path: str | Path, reads_data: bool = False) -> Config:
    """The settings that a checkpoint holds, of which nothing runs: its plugins must have been named by the user.

    Args:
        reads_data: the data of the run are wanted, so that `data.builder` must have been named too; otherwise one that
            was not is left out.

    Raises:
        ValueError: as `load_config`, or a plugin or builder was not named with --plugins; says which.
    """
    tree, named = _tree_of(Path(path)), []
    for name in _plugins_of(tree, path):
        if (plugin := named_plugin(name)) is None:
            raise _not_named(path, "plugins", name)
        named.append(plugin)
    file, function = _builder_of(tree)
    if file and file not in _BUILDERS:
        if (plugin := named_plugin(file)) is None and reads_data:
            raise _not_named(path, "data.builder", file)
        tree = {**tree, "data": {**tree["data"], "builder": None if plugin is None else f"{plugin}:{function}"}}
    return config_from_tree({**tree, "plugins": named}, path)


def _not_named(path: str | Path, field: str, name: str) -> ValueError:
    return ValueError(
        f"{path}: {field} names {name!r}, which this command does not; name that file or module with --plugins (it is "
        "code, which runs only where you name it)"
    )


def _tree_of(path: Path) -> dict:
    try:
        tree = load_yaml(path)
    except FileNotFoundError:
        known = ", ".join(sorted(recipe.name for recipe in RECIPES.glob("*.yaml")))
        raise ValueError(f"there is no recipe {path}; megatron_mm/recipes has {known}") from None
    except ValueError as error:
        raise ValueError(f"{path}: no recipe: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold sections such as model, data and training")
    return tree


def _plugins_of(tree: dict, source: str | Path) -> list[str]:
    plugins = tree.get("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        raise ValueError(f"{source}:\n  plugins: it must be a list of files or modules, not {plugins!r}")
    return plugins


def _builder_of(tree: dict) -> tuple[str, str]:
    """File or module, and function, that `data.builder` names; empty where there is none."""
    data = tree.get("data")
    builder = data.get("builder") if isinstance(data, dict) else None
    if not isinstance(builder, str):
        return "", ""
    file, _, function = _MOVED.get(builder, builder).rpartition(":")
    return file, function


def config_from_tree(tree: dict, source: str | Path) -> Config:
    """Parsed YAML or JSON as a Config, its plugins loaded: the user has named them.

    Raises:
        ValueError: an unknown system or field, or a value of the wrong type; source and fields are named.
    """
    folder, plugins = Path(source).parent, _plugins_of(tree, source)
    for name in _VERBS:
        if tree.get(name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{source}:\n  {name}: it is no setting but an option of the command line ({option})")
    tree = {name: value for name, value in tree.items() if name not in _VERBS}
    tree = {**tree, "plugins": [locate_plugin(name, folder) for name in plugins]}
    for plugin in tree["plugins"]:
        load_plugin(plugin, folder)
    file, function = _builder_of(tree)
    if file:
        tree = {**tree, "data": {**tree["data"], "builder": f"{locate_plugin(file, folder)}:{function}"}}
    model = tree.get("model")
    name = model.get("system", DEFAULT_SYSTEM) if isinstance(model, dict) else DEFAULT_SYSTEM
    if not isinstance(name, str) or name not in SYSTEMS:
        raise ValueError(f"{source}:\n  model.system: there is no {name!r}; known: {', '.join(SYSTEMS)}")
    try:
        return TypeAdapter(config_type(section_of(name))).validate_python(tree)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {_say(item)}" for item in error.errors()]
        raise ValueError(f"{source}:\n  " + "\n  ".join(lines)) from None


@functools.cache
def config_type(model: type[SystemConfig]) -> type[Config]:
    """The settings tree whose `model` is the section of one system."""
    fields = {"__annotations__": {"model": model}, "model": Field(default_factory=model), "__doc__": Config.__doc__}
    return section(type("Config", (Config,), {**fields, "__module__": Config.__module__}))


def _say(item: dict) -> str:
    if item["type"] == "unexpected_keyword_argument":
        return "there is no such field (see pretrain_multimodal.py --help)"
    if item["type"] == "value_error":  # a section's own check, which quotes the value
        return str(item["ctx"]["error"])
    return f"{item['msg']}, not {item['input']!r}"


def parse_command_line(arguments: Sequence[str] | None = None, default_recipe: str | None = None) -> CommandLine:
    """Settings from `--config RECIPE` and overrides, and what is to be done with them.

    Exits with status 2 and a message on a usage error, after `--help` with 0.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    recipe = default_recipe
    rest: list[str] = []
    blend: list[str] = []
    position = 0
    while position < len(arguments):
        word = arguments[position]
        if word == "--config" and position + 1 < len(arguments):
            recipe, position = arguments[position + 1], position + 2
        elif word.startswith("--config="):
            recipe, position = word.partition("=")[2], position + 1
        elif word == "--data-path":
            end = next((at for at in range(position + 1, len(arguments)) if arguments[at].startswith("--")), None)
            blend = arguments[position + 1 : end]
            position += 1 + len(blend)
        else:
            rest.append(word)
            position += 1
    try:
        config = load_config(recipe) if recipe else config_type(section_of(DEFAULT_SYSTEM))()
        if blend:
            config = changed(config, {"data.datasets": parse_blend(blend)})
    except (ValueError, OSError) as error:
        fail(str(error), status=2)
    if recipe is None and not {"-h", "--help"} & set(rest):
        fail("--config RECIPE.yaml is missing; recipes are in megatron_mm/recipes", status=2)
    description = (
        "Pretrains a multimodal model.\n\n--config RECIPE.yaml names the recipe, --data-path [WEIGHT] PATH … the "
        "datasets (Megatron's form); any other field can be overridden:"
    )
    said = io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            if os.environ.get("RANK", "0") != "0":
                stack.enter_context(contextlib.redirect_stdout(said))
                stack.enter_context(contextlib.redirect_stderr(said))
            unnamed = tyro.conf.arg(name="")  # options begin with the names of sections, as paths of the recipe do
            kind = make_dataclass(
                "CommandLine", [("verbs", Annotated[Verbs, unnamed]), ("config", Annotated[type(config), unnamed])]
            )
            read = tyro.cli(
                kind,
                default=kind(Verbs(), config),
                args=rest,
                description=description,
                config=(tyro.conf.HelptextFromCommentsOff,),
            )
            return CommandLine(read.config, read.verbs)
    except SystemExit as end:
        if end.code and said.getvalue():
            report(said.getvalue())
        raise


def parse_blend(words: Sequence[str]) -> list[DatasetConfig]:
    """Megatron's `--data-path`: one or more paths, or weights and paths in turn.

    Raises:
        ValueError: a weight without a path, or what should be a weight is no number.
    """

    def weight(word: str) -> float | None:
        try:
            return float(word)
        except ValueError:
            return None

    if weight(words[0]) is None:
        return [DatasetConfig(path=word) for word in words]
    if len(words) % 2:
        raise ValueError(f"--data-path: weights and paths come in pairs, not {' '.join(words)}")
    weights = [weight(word) for word in words[::2]]
    if None in weights:
        raise ValueError(f"--data-path: {words[2 * weights.index(None)]!r} stands where a weight should")
    return [DatasetConfig(path=path, weight=value) for value, path in zip(weights, words[1::2])]


def fail(message: str, status: int = 1) -> None:
    """Prints an error once and exits."""
    report(f"error: {message}")
    raise SystemExit(status)


def report(message: str) -> None:
    """Prints what rank 0 and perhaps every other rank has to say, once for all whom a launcher ends together.

    Those are the processes of a node under torchrun, of a job under Slurm. Rank 0 is the first to speak, and to end;
    others wait, each longer than the one before it on its node. Who is left to speak says where it is.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(5.0 + int(os.environ.get("LOCAL_RANK", "0")))
        message = f"{message.rstrip()}\n  (on rank {rank}, {socket.gethostname()})"
    print(message, file=sys.stderr, flush=True)


def dump_config(config: Config, path: str | Path) -> None:
    """Writes a resolved config as YAML that `load_config` reads back."""
    Path(path).write_text(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
