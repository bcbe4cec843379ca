"""Nodes that learn otherwise than the rest (`optimizer.groups`): at a rate of their own, or not before an iteration.

Between two unfreezings a run is a *phase*: a graph of its own over the same node names, with its own partition, DDP and
optimizer. At the end of one the run saves, builds the next and loads what it saved (training/loop.py), so a run that is
resumed at any iteration is in the right phase. Adam counts the steps of a group from the end of its frozen time: its
moments are zero then, and its bias correction is that of a first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from megatron_mm.config.schema import NodeGroupConfig
from megatron_mm.models.graph import Graph
from megatron_mm.models.node_names import collapsed

#: An iteration of the last phase, in which all that ever learns does.
LAST_PHASE = math.inf


def group_of(groups: Sequence[NodeGroupConfig], name: str) -> NodeGroupConfig | None:
    """The first group that a node belongs to."""
    return next((group for group in groups if any(fnmatchcase(name, pattern) for pattern in group.nodes)), None)


def phase_graph(graph: Graph, groups: Sequence[NodeGroupConfig], iteration: float) -> Graph:
    """The graph after `iteration` steps, its frozen nodes not trainable.

    Raises:
        ValueError: a pattern matches no node, nodes that share a weight are not frozen alike, or nothing is left to
            learn.
    """
    names = [node.name for node in graph.nodes]
    for number, group in enumerate(groups):
        for pattern in group.nodes:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"optimizer.groups.{number}.nodes: {pattern!r} matches no node; the nodes are "
                    f"{', '.join(collapsed(names))}"
                )

    _check_ties(graph, groups)

    def frozen(name: str) -> bool:
        group = group_of(groups, name)
        return group is not None and (group.frozen_iters < 0 or iteration < group.frozen_iters)

    if not any(frozen(name) for name in names):
        return graph
    nodes = [replace(node, trainable=node.trainable and not frozen(node.name)) for node in graph.nodes]
    if not any(node.trainable for node in nodes):
        raise ValueError(f"optimizer.groups freezes every node at iteration {iteration}; nothing would be learned")
    return Graph(nodes, graph.losses)


def _check_ties(graph: Graph, groups: Sequence[NodeGroupConfig]) -> None:
    """Refuses a weight that in this phase or a later one would learn in one node and be frozen in another."""

    def frozen_iters(at: int) -> int:
        group = group_of(groups, graph.nodes[at].name)
        return group.frozen_iters if group else 0

    for key, ((owner, _), *others) in graph.ties.items():
        for at, _ in others:
            steps = frozen_iters(at), frozen_iters(owner)
            if steps[0] != steps[1]:
                raise ValueError(
                    f"optimizer.groups: {graph.nodes[at].name!r} and {graph.nodes[owner].name!r} share {key!r}, so "
                    f"both must have the same frozen_iters; they have {steps[0]} and {steps[1]}"
                )


def phase_ends(groups: Sequence[NodeGroupConfig]) -> set[int]:
    """Iterations after which nodes begin to learn."""
    return {group.frozen_iters for group in groups if group.frozen_iters > 0}
