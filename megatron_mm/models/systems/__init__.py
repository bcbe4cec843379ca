"""Systems by name: each module builds the graph of one system from its section of the recipe.

A user's own system is a section (a dataclass that derives from `SystemConfig`, decorated with `config.section.section`)
and a function that builds its graph; a recipe names the file that registers it under `plugins`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from megatron_mm.config.systems import SECTIONS, SystemConfig
from megatron_mm.models.graph import Graph
from megatron_mm.models.layers.settings import LayerSettings

GraphBuilder = Callable[[SystemConfig, LayerSettings], Graph]

_REGISTERED: dict[str, GraphBuilder] = {}


def register(name: str, section: type[SystemConfig], build: GraphBuilder) -> None:
    """Adds a system of a user's own, for recipes that say `model.system: NAME`.

    Raises:
        ValueError: the name is taken.
    """
    if name in SECTIONS:
        raise ValueError(f"there is already a system {name!r}")
    SECTIONS[name], _REGISTERED[name] = section, build


def build_graph(config: SystemConfig, settings: LayerSettings) -> Graph:
    """The graph of the system that `config.system` names.

    Raises:
        ValueError: there is no such system.
    """
    if config.system in _REGISTERED:
        return _REGISTERED[config.system](config, settings)
    if config.system not in SECTIONS:
        raise ValueError(f"model.system is {config.system!r}; known systems: {', '.join(SECTIONS)}")
    return import_module(f"megatron_mm.models.systems.{config.system}").build_graph(config, settings)
