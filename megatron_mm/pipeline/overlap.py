"""Data-parallel communication beside computation: gradients as the backward pass leaves them, weights as nodes ask.

megatron-core's DDP reduces a bucket once each of its parameters had its gradient as often as in the first step. Here
that never holds for long: a microbatch of one task leaves another's head out, one without clips leaves their embedding
out, and data-parallel processes differ in it, so buckets would start in different orders, or never. The order is the
graph's instead. Autograd runs functions in the reverse order of their creation, so a mark made between two nodes on the
anchor, which every loss passes, is reached when all later nodes are done, whatever took part; buckets that hold
only those nodes' parameters start there, on every process alike. Weights that chunks share (ties.py) wait: their
gradients are summed over the pipeline first.

In the same way a node waits for the buckets of its own weights before it runs, so a weight is there however its module
reads it, and `finish` waits for all that something else reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import nn


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, reached):
        ctx.reached = reached
        return anchor.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.reached()
        return gradient, None


def mark(anchor: torch.Tensor, reached: Callable[[], None]) -> torch.Tensor:
    """The anchor; `reached` is called when the backward pass has done all that was computed since."""
    return _Mark.apply(anchor, reached)


@dataclass
class _Bucket:
    """One bucket of gradients (megatron-core: a group of buckets)."""

    group: object
    first: int
    """The first node of the chunk whose parameters it holds."""
    tied: bool
    counted: int | None = None
    """Gradients that had come when it started; None before."""

    def start(self) -> None:
        """Begins to reduce it."""
        self.counted = self._come()
        self.group.start_grad_sync()

    def _come(self) -> int:
        return sum(self.group.per_param_grad_ready_counts.values())

    def close(self) -> None:
        """Forgets the step.

        Raises:
            RuntimeError: a gradient came after it was started, so the result is wrong.
        """
        if self._come() != self.counted:
            raise RuntimeError("a gradient was added to a bucket after its reduction had begun")
        # Without counts megatron-core takes every step for the first one, in which it starts no bucket by itself.
        self.group.per_param_grad_ready_counts = {}
        self.counted = None


class GradientReduction:
    """Starts the buckets of this process's chunks while the last backward pass runs.

    Args:
        chunks: in DDP with `overlap_grad_reduce`.
        tied: parameters that other chunks hold too.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], tied: Iterable[nn.Parameter]) -> None:
        tied_ids = {id(parameter) for parameter in tied}
        self._chunks: list[list[_Bucket]] = []
        for chunk in chunks:
            nodes = _first_nodes(chunk)
            self._chunks.append(
                [
                    _Bucket(
                        group,
                        min(nodes[id(parameter)] for parameter in group.params),
                        any(id(parameter) in tied_ids for parameter in group.params),
                    )
                    for group in chunk.bucket_groups
                ]
            )
        for number, chunk in enumerate(chunks):
            chunk.module.done_from = lambda node, number=number: self._done_from(number, node)

    def _done_from(self, chunk: int, node: int) -> None:
        """The backward pass of the last microbatch has done the nodes from this one on."""
        for bucket in self._chunks[chunk]:
            if bucket.first >= node and bucket.counted is None and not bucket.tied:
                bucket.start()

    def finish(self) -> None:
        """Starts what is left; megatron-core's finalize_model_grads then waits for all of them."""
        buckets = [bucket for chunk in self._chunks for bucket in chunk]
        for bucket in buckets:
            if bucket.counted is None:
                bucket.start()
        for bucket in buckets:
            bucket.close()


class WeightGathering:
    """Gathers the weights that the distributed optimizer updated, bucket by bucket, as the next forward pass runs.

    Args:
        chunks: in DDP with `overlap_param_gather`.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._groups: dict[int, object] = {}
        """Bucket group of each parameter, by its id."""
        self._all = [group for chunk in chunks for group in reversed(chunk.bucket_groups)]  # as nodes will ask
        self._waiting: set[int] = set()
        for chunk in chunks:
            chunk.disable_forward_pre_hook(param_sync=False)  # which know a parameter by the module that owns it only
            self._groups |= {id(p): group for p, group in chunk.param_to_bucket_group.items()}
            chunk.module.before_node = self._before

    def begin(self) -> None:
        """To be called when the optimizer has updated its shards: the first bucket starts."""
        for group in self._all:
            group.param_gather_dispatched = False
        self._waiting = {id(group) for group in self._all}
        if self._all:
            self._all[0].start_param_sync()

    def finish(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Waits for the buckets of these parameters, or for all. Collective over data parallelism."""
        groups = self._all if parameters is None else self._of(parameters)
        for group in groups:
            if id(group) in self._waiting:
                self._waiting.discard(id(group))
                group.finish_param_sync()

    def _of(self, parameters: Iterable[nn.Parameter]) -> list:
        found = {id(group): group for p in parameters if (group := self._groups.get(id(p))) is not None}
        return list(found.values())

    def _before(self, module: nn.Module) -> None:
        if self._waiting:
            self.finish(module.parameters())


def _first_nodes(chunk: DistributedDataParallel) -> dict[int, int]:
    """The first node of a chunk that has each parameter, by the parameter's id."""
    nodes: dict[int, int] = {}
    for number, module in enumerate(chunk.module.node_modules):
        for parameter in module.parameters():
            nodes.setdefault(id(parameter), number)
    return nodes
