"""What nodes cost in training, from their own figures: the balance of the pipeline and MFU come from here.

Kinds state the work of a forward pass (models/work.py). A trainable node costs it three times (forward, gradient of the
input, gradient of the weights); a frozen node that gradients pass through twice; a frozen node that none reaches once.
Full recomputation adds one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import Graph, Loss, Node
from megatron_mm.models.work import Collective, Moved, Pass, Work, merged


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
    runs = node_passes(graph, recompute, cached)
    return [sum(of.values()) * node.cost(plan).forward_flops for of, node in zip(runs, graph.nodes)]


def node_passes(graph: Graph, recompute: bool, cached: bool = False) -> list[dict[Pass, int]]:
    """How often each node's forward pass and both of its backward passes run for one microbatch; as of node_times."""
    shared = [loss for loss in graph.losses if loss.whole_batch] if cached else []
    again = [bool(node.writes) for node in graph.leading_to(shared).nodes] if shared else [False] * len(graph.nodes)
    return [_passes(graph, position, node, recompute, again[position]) for position, node in enumerate(graph.nodes)]


def _passes(graph: Graph, position: int, node: Node, recompute: bool, again: bool) -> dict[Pass, int]:
    reached = gradient_reaches(graph, position)
    redone = recompute and node.recomputable and (node.trainable or reached)
    return {"forward": 1 + redone + again, "dgrad": int(reached), "wgrad": int(node.trainable)}


def executed(records: Iterable[Work], runs: Mapping[Pass, int]) -> Iterator[Work]:
    """Records of all passes of a node for one microbatch, from those of its forward pass.

    Products and attention count in every pass that runs, so that FLOPs are those of `node_times`. By that rule a frozen
    node that gradients pass runs attention, and other products of two activations, once in its backward pass, where
    both operands' gradients are computed in fact; and one that no gradient reaches, but that learns, computes no
    gradient of an input, though its inner layers do. What moves bytes without FLOPs is told as it is: collectives of
    inputs' gradients run, and element-wise kernels once more, wherever there is a backward pass.
    """
    backward = int(bool(runs["dgrad"] or runs["wgrad"]))
    for record in records:
        if isinstance(record, Collective):
            times = {**runs, "dgrad": backward}[record.runs]
        elif isinstance(record, Moved):
            times = runs["forward"] + backward
        else:
            yield from (replace(record.during(of), count=record.count * times) for of, times in runs.items() if times)
            continue
        if times:
            yield replace(record, count=record.count * times)


def chunk_work(
    graph: Graph,
    start: int,
    stop: int,
    plan: MicrobatchPlan,
    sizes: ParallelSizes,
    recompute: bool,
    cached: bool = False,
) -> tuple[tuple[Work, ...], list[str]]:
    """What nodes start … stop-1 give one process for one microbatch, forward and backward, each record once.

    The losses are with the chunk that ends the graph.

    Args:
        recompute, cached: as of node_times; losses over the whole batch then run once a step, and are not here.

    Returns:
        the records, and names of nodes and losses that state none.
    """
    runs, done, silent = node_passes(graph, recompute, cached), [], []
    for position in range(start, stop):
        node = graph.nodes[position]
        records = node.cost(plan).records
        if records is None:
            silent.append(node.name)
        else:
            done += executed(records, runs[position])
    for loss in graph.losses if stop == len(graph.nodes) else ():
        if not loss.applies(plan) or (loss.whole_batch and cached):
            continue
        records = loss_work(graph, loss, plan, sizes)
        if records is None:
            silent.append(loss.name)
        else:
            done += executed(records, {"forward": 1, "dgrad": 1, "wgrad": 1})  # both operands have gradients
    return merged(done), silent


def loss_work(
    graph: Graph, loss: Loss, plan: MicrobatchPlan, sizes: ParallelSizes, microbatches: int = 1
) -> tuple[Work, ...] | None:
    """Records of a loss's forward pass on one process; None where it states none.

    FLOPs of losses are in no total: they are no node's, so that no cut can move them, and MFU is counted without them.

    Args:
        microbatches: of a step, for a loss over the whole batch, whose streams hold the samples of them all.
    """
    if loss.work is None:
        return None
    shapes = [graph.streams[name].shape(plan) for name in loss.reads]
    return tuple(loss.work([(shape[0] * microbatches, *shape[1:]) for shape in shapes], sizes))


def model_flops(graph: Graph, plan: MicrobatchPlan) -> float:
    """FLOPs of a microbatch by which MFU is counted: no recomputation."""
    return sum(node_times(graph, plan, recompute=False))


def total_parameters(graph: Graph, plan: MicrobatchPlan) -> int:
    """Parameters of the whole model, frozen ones included."""
    return sum(node.cost(plan).parameters for node in graph.nodes)
