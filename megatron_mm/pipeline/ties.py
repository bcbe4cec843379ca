"""Tied weights of a graph that is cut into chunks: one weight for the user, copies where several chunks use it.

Within a chunk all uses share one Parameter (`share`). Chunks, also two of one process, hold copies: DDP keeps the
gradients of each chunk in a buffer of its own. Then copies take the owner's values at the start and after every step
(`copy_weights`), so nothing can drive them apart, and their gradients are summed over the processes of a pipeline
before data parallelism reduces them (`sum_gradients`): a whole, unsharded gradient exists only then. A copy does not
count in the gradient norm (megatron-core's mark `shared`), and is read from a checkpoint, never written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from megatron_mm.models.graph import Graph


def _get(module: nn.Module, name: str, where: str) -> nn.Parameter:
    owner, _, leaf = name.rpartition(".")
    try:
        return module.get_submodule(owner)._parameters[leaf]
    except (AttributeError, KeyError):
        raise ValueError(f"tied weight {where}.{name}: the node has no such parameter") from None


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter


def share(graph: Graph, start: int, modules: Sequence[nn.Module]) -> dict[int, str]:
    """Makes the tied weights of one chunk one Parameter each.

    Args:
        start: position of the chunk's first node.
        modules: its nodes' modules, in order.

    Returns:
        Checkpoint key of each Parameter (by id) whose owner is in another chunk.

    Raises:
        ValueError: a node lacks the parameter that it ties, or tied shapes differ.
    """
    copies = {}
    for key, members in graph.ties.items():
        here = [(at - start, name) for at, name in members if start <= at < start + len(modules)]
        if not here:
            continue
        first = _get(modules[here[0][0]], here[0][1], graph.nodes[start + here[0][0]].name)
        for at, name in here[1:]:
            node = graph.nodes[start + at].name
            other = _get(modules[at], name, node)
            if other.shape != first.shape:
                raise ValueError(f"{node}.{name} is {tuple(other.shape)} and tied to {key}, {tuple(first.shape)}")
            _set(modules[at], name, first)
        if (start + here[0][0], here[0][1]) != members[0]:
            first.shared = True
            copies[id(first)] = key
    return copies


def as_stored(entries: dict, copies: dict[int, str]) -> dict:
    """A chunk's checkpoint entries with tied weights once, copies under the owner's key and not to be written."""
    seen: set[int] = set()
    kept = {}
    for name, entry in entries.items():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            if id(entry.data) in seen:
                continue
            seen.add(id(entry.data))
            if id(entry.data) in copies:
                entry.key = copies[id(entry.data)]
                entry.replica_id = (1, *entry.replica_id[1:])
        kept[name] = entry
    return kept


@dataclass(frozen=True)
class _Tie:
    """One weight that several chunks hold."""

    copies: list[nn.Parameter]
    """This process's, one a chunk."""
    group: dist.ProcessGroup | None
    """Processes of this pipeline that hold one, if more than this."""
    source: int
    """Rank of the owner."""
    owner: nn.Parameter | None
    """The owner's, if it is on this process."""


class Ties:
    """The weights that several chunks hold, as one process of a pipeline sees them.

    Args:
        cuts: chunk beginnings and end.
        chunks: (number of the chunk, its nodes' modules) of this process.

    Raises:
        ValueError: copies differ in shape or sharding.
    """

    def __init__(
        self, graph: Graph, cuts: Sequence[int], chunks: Sequence[tuple[int, Sequence[nn.Module]]], pp: int
    ) -> None:
        self._ties: list[_Tie] = []
        groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for key, members in graph.ties.items():
            holders: dict[int, tuple[int, str]] = {}  # chunk: its first member
            for at, name in members:
                chunk = next(number for number in range(len(cuts) - 1) if cuts[number] <= at < cuts[number + 1])
                holders.setdefault(chunk, (at, name))
            if len(holders) == 1:
                continue
            stages = tuple(sorted({chunk % pp for chunk in holders}))
            if len(stages) > 1 and stages not in groups:
                groups[stages] = _subgroup(stages)
            own = {
                chunk: _get(modules[holders[chunk][0] - cuts[chunk]], holders[chunk][1], key)
                for chunk, modules in chunks
                if chunk in holders
            }
            _check(key, list(own.values()))
            if own:
                first = next(iter(holders))
                pipeline = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
                self._ties.append(
                    _Tie(list(own.values()), groups.get(stages), pipeline[first % pp], own.get(first))
                )
        self.copy_weights()

    def parameters(self) -> list[nn.Parameter]:
        """This process's copies of all weights that several chunks hold."""
        return [copy for tie in self._ties for copy in tie.copies]

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Gives every copy the owner's values."""
        for tie in self._ties:
            value = tie.owner if tie.owner is not None else tie.copies[0]
            if tie.group is not None:
                dist.broadcast(value.data, src=tie.source, group=tie.group)
            for copy in _others(tie.copies, value):
                copy.copy_(value)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Leaves in every copy's `main_grad` the sum of all copies' of the pipeline."""
        for tie in self._ties:
            first = tie.copies[0]
            if not first.requires_grad:
                continue
            for copy in tie.copies[1:]:
                first.main_grad.add_(copy.main_grad)
            if tie.group is not None:
                dist.all_reduce(first.main_grad, group=tie.group)
            for copy in tie.copies[1:]:
                copy.main_grad.copy_(first.main_grad)


def _others(copies: Sequence[nn.Parameter], one: nn.Parameter) -> Iterator[nn.Parameter]:
    return (copy for copy in copies if copy is not one)


def _subgroup(stages: tuple[int, ...]) -> dist.ProcessGroup | None:
    """Processes of these stages of this pipeline, or None if this one is not among them. Collective over the world."""
    own = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    pipelines: list = [None] * dist.get_world_size()
    dist.all_gather_object(pipelines, own)
    lists = [[ranks[stage] for stage in stages] for ranks in sorted(set(map(tuple, pipelines)))]
    group = dist.new_subgroups_by_enumeration(lists)[0]
    return group if dist.get_rank() in {rank for ranks in lists for rank in ranks} else None


def _check(key: str, copies: Sequence[nn.Parameter]) -> None:
    """Refuses copies that differ. Collective over the pipeline."""

    def facts(copy: nn.Parameter) -> str:
        whole = not getattr(copy, "tensor_model_parallel", False)
        sharded = "not sharded" if whole else f"sharded on dimension {copy.partition_dim}"
        reduced = ", gradient summed over tensor parallelism" if getattr(copy, "sequence_parallel", False) else ""
        return f"{tuple(copy.shape)} {copy.dtype} {sharded}{reduced}"

    group = parallel_state.get_pipeline_model_parallel_group()
    everyone: list = [None] * group.size()
    dist.all_gather_object(everyone, [facts(copy) for copy in copies], group=group)
    kinds = sorted({kind for one in everyone for kind in one})
    if len(kinds) > 1:
        raise ValueError(f"weights tied to {key} differ: {'; '.join(kinds)}")
