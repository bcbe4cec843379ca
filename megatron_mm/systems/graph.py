"""The graph of whichever system a recipe names."""

from __future__ import annotations

from megatron_mm.config.system import SystemConfig
from megatron_mm.config.systems import system_of
from megatron_mm.models.graph import Graph
from megatron_mm.models.layers.settings import LayerSettings


def build_graph(config: SystemConfig, settings: LayerSettings) -> Graph:
    """The graph of the system that `config.system` names.

    Raises:
        ValueError: there is no such system, or its graph reads fields that its samples do not have.
    """
    graph = system_of(config.system).load("graph")(config, settings)
    graph.check_fields(config.inputs)
    return graph
