"""What a pipeline is built from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mm.models.graph import Graph
from megatron_mm.models.layers.settings import LayerSettings


@dataclass(frozen=True)
class PipelineDesign:
    """What the pipeline of a run is built from, the same on every process.

    Attributes:
        cuts: chunk beginnings and end, as from partition.balance.
        distributed_optimizer: optimizer state is sharded over data parallelism, and gradients are reduced to shards.
    """

    graph: Graph
    cuts: list[int]
    settings: LayerSettings
    distributed_optimizer: bool = False
