"""The systems, each one record: its section of a recipe, its graph, its export. The program's own and a user's alike.

Only the section is imported when a recipe is read, so that `--help` needs no megatron-core; graph and export are
imported when they are asked for. A user's own system is a file that calls `register`, which a recipe names under
`plugins`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_mm.config.system import SystemConfig


@dataclass(frozen=True)
class System:
    """A system by name.

    Attributes:
        name: what a recipe says as `model.system`.
        section: the type of `model:` in a recipe, a `SystemConfig`.
        graph: `graph(section, settings)` -> models.graph.Graph.
        export: what an exported folder of it is (systems/export.py); None: it cannot be exported.

    Each but the name is the thing itself, or `module:name` of it, which is imported when it is asked for.
    """

    name: str
    section: type[SystemConfig] | str
    graph: Callable[..., Any] | str
    export: object | str | None = None

    def load(self, what: str) -> Any:
        """The `section`, `graph` or `export` itself."""
        value = getattr(self, what)
        return pkgutil.resolve_name(value) if isinstance(value, str) else value


def _own(name: str, section: str) -> System:
    folder = f"megatron_mm.systems.{name}"
    return System(name, f"{folder}.section:{section}", f"{folder}.graph:build_graph", f"{folder}.export:ADAPTER")


#: What a recipe that names no system means.
DEFAULT_SYSTEM = "synapse"

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        _own("synapse", "SynapseConfig"),
        _own("avt", "AVTConfig"),
        _own("vlm", "VLMConfig"),
        _own("perceiver_fusion", "PerceiverFusionConfig"),
        _own("dual_encoder", "DualEncoderConfig"),
    )
}


def register(system: System) -> None:
    """Adds a system of a user's own.

    Raises:
        ValueError: the name is taken.
    """
    if system.name in SYSTEMS:
        raise ValueError(f"there is already a system {system.name!r}")
    SYSTEMS[system.name] = system


def exported() -> tuple[str, ...]:
    """Names of the systems that can be exported."""
    return tuple(name for name, system in SYSTEMS.items() if system.export is not None)


def system_of(name: object) -> System:
    """The system of a name.

    Raises:
        ValueError: there is none; the known ones are named.
    """
    if not isinstance(name, str) or name not in SYSTEMS:
        raise ValueError(f"model.system is {name!r}; known systems: {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def section_of(name: object) -> type[SystemConfig]:
    """The section of a system.

    Raises:
        ValueError: as of system_of.
    """
    return system_of(name).load("section")
