"""What nodes cost in training, from their own figures: the balance of the pipeline and MFU come from here.

A trainable node costs its forward pass three times (forward, gradient of the input, gradient of the weights); a frozen
node that gradients pass through twice; a frozen node that none reaches once. Full recomputation adds one forward pass.
"""

from __future__ import annotations

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import Graph, Node


def gradient_reaches(graph: Graph, position: int) -> bool:
    """Whether a gradient flows into node `position` from its inputs' side, so that its backward pass runs."""
    return any(graph.carries_gradient.get((position, name), False) for name in graph.nodes[position].reads)


def node_times(graph: Graph, plan: MicrobatchPlan, recompute: bool, cached: bool = False) -> list[float]:
    """FLOPs of each node for one microbatch, forward and backward.

    Args:
        recompute: with full recomputation.
        cached: with the first pass of losses over the whole batch, for which several microbatches run what leads to
            them once more (pipeline/whole_batch.py).
    """
    shared = [loss for loss in graph.losses if loss.whole_batch] if cached else []
    again = [bool(node.writes) for node in graph.leading_to(shared).nodes] if shared else [False] * len(graph.nodes)
    return [(_passes(graph, position, node, recompute) + again[position]) * node.cost(plan).forward_flops
            for position, node in enumerate(graph.nodes)]  # fmt: skip


def _passes(graph: Graph, position: int, node: Node, recompute: bool) -> int:
    reached = gradient_reaches(graph, position)
    passes = 1 + (1 if node.trainable else 0) + (1 if reached else 0)
    if passes > 1 and recompute and node.recomputable:
        passes += 1
    return passes


def model_flops(graph: Graph, plan: MicrobatchPlan) -> float:
    """FLOPs of a microbatch by which MFU is counted: no recomputation."""
    return sum(node_times(graph, plan, recompute=False))


def total_parameters(graph: Graph, plan: MicrobatchPlan) -> int:
    """Parameters of the whole model, frozen ones included."""
    return sum(node.cost(plan).parameters for node in graph.nodes)
