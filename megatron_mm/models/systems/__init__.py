"""Systems by name: each module builds the graph of one system from its section of the recipe."""

from __future__ import annotations

from megatron_mm.models.graph import Graph
from megatron_mm.models.layers.settings import LayerSettings


def build_graph(config, settings: LayerSettings) -> Graph:
    """The graph of the system that `config.system` names.

    Raises:
        ValueError: there is no such system.
    """
    if config.system == "synapse":
        from megatron_mm.models.systems import synapse

        return synapse.build_graph(config, settings)
    raise ValueError(f"model.system is {config.system!r}; known systems: synapse")
