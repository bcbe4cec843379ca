"""What a pipeline chunk would hold in memory, from its nodes' own figures: the limit that cuts must keep.

An estimate that costs nothing, so that every possible cut can be asked; the dry run then measures the cut that was
chosen. A process holds weights, gradients and optimizer state of its chunks, and for each microbatch between its
forward and backward pass the activations, or with full recomputation what the nodes read and one node's activations.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

import torch

from megatron_mm.config.schema import Config
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import Graph, Stream
from megatron_mm.planner.costs import gradient_reaches


def microbatches_in_flight(config: Config, sizes: ParallelSizes, stage: int) -> int:
    """Forward passes of a chunk whose backward pass is still to come, at most, under 1F1B."""
    microbatches = config.training.global_batch_size // (config.training.micro_batch_size * sizes.dp)
    if sizes.vpp == 1:
        return min(microbatches, sizes.pp - stage)
    warm_up = (sizes.pp - stage - 1) * 2 + (sizes.vpp - 1) * sizes.pp + 1
    return min(microbatches, -(-warm_up // sizes.vpp))


def optimizer_bytes(dtype: torch.dtype) -> int:
    """Adam's bytes a parameter: two fp32 moments, and the fp32 master weight in mixed precision."""
    return 12 if dtype == torch.bfloat16 else 8


def checkpoint_bytes(graph: Graph, plan: MicrobatchPlan, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint: all weights, and the optimizer state of those that learn."""
    per = {True: dtype.itemsize + optimizer_bytes(dtype), False: dtype.itemsize}
    return sum(node.cost(plan).parameters * per[node.trainable] for node in graph.nodes)


class ChunkMemory:
    """Bytes of any chunk of a graph on one process.

    Args:
        plan: the fullest microbatch.
        dtype: precision of weights and activations.
    """

    def __init__(
        self, config: Config, sizes: ParallelSizes, graph: Graph, plan: MicrobatchPlan, dtype: torch.dtype
    ) -> None:
        self.config, self.graph, self.plan, self.sizes, self.dtype = config, graph, plan, sizes, dtype
        shards = sizes.dp * sizes.cp if config.parallel.use_distributed_optimizer else 1
        learning = 4.0 + optimizer_bytes(dtype) / shards  # fp32 gradients
        recompute = config.parallel.recompute_granularity == "full"
        held, kept, again = [], [], []
        streams: dict[str, Stream] = {}
        for position, node in enumerate(graph.nodes):
            cost = node.cost(plan)
            held.append(cost.parameters / sizes.tp * (dtype.itemsize + (learning if node.trainable else 0.0)))
            learns = node.trainable or gradient_reaches(graph, position)
            activations = cost.activation_bytes / (sizes.tp * sizes.cp) * dtype.itemsize / 2 if learns else 0.0
            redone = recompute and node.recomputable and learns
            kept.append(sum(self._bytes(streams[name]) for name in node.reads) if redone else activations)
            again.append(activations if redone else 0.0)
            streams.update({stream.name: stream for stream in node.writes})  # a rewritten stream may change its shape
        self._held, self._kept, self._again = [0.0, *accumulate(held)], [0.0, *accumulate(kept)], again
        self._layers = [position for position, node in enumerate(graph.nodes) if node.recomputable]

    def _bytes(self, stream: Stream) -> int:
        return prod(stream.local_shape(self.plan, self.sizes)) * (stream.dtype or self.dtype).itemsize

    def __call__(self, chunk: int, start: int, stop: int) -> float:
        """Bytes of nodes start … stop-1 as chunk number `chunk`."""
        flight = microbatches_in_flight(self.config, self.sizes, chunk % self.sizes.pp)
        received = sum(self._bytes(stream) for stream in self.graph.live(start)) if start else 0
        kept = self._kept[stop] - self._kept[start] + received
        own = [at for at in self._layers if start <= at < stop]
        for at in own[: self.config.performance.cpu_offloading_num_layers]:  # they wait on the host
            kept -= self._kept[at + 1] - self._kept[at]
        return self._held[stop] - self._held[start] + flight * kept + max(self._again[start:stop])
