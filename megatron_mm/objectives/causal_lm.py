"""Next-token prediction: cross-entropy over a vocabulary that is sharded over tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext, Loss
from megatron_mm.models.layers.sharding import local_text
from megatron_mm.models.work import Work, share
from megatron_mm.objectives.cross_entropy import CrossEntropy, cross_entropy_work, token_cross_entropy
from megatron_mm.objectives.measures import TokenAccuracy

_MEASURE = partial(TokenAccuracy, vocabulary_parallel=True)


def token_loss(
    name: str,
    logits: str,
    labels: Callable[[Microbatch], torch.Tensor],
    mask: Callable[[Microbatch], torch.Tensor],
    *,
    weight: float,
    sharded: bool,
    fields: frozenset[str],
    tasks: frozenset[str] | None,
    kind: CrossEntropy,
) -> Loss:
    """Cross-entropy of labels [R, T], summed where the mask [R, T] is 1; averaged over those of the global batch.

    Cross-entropy works in place: logits hold other values afterwards, so nothing may read the stream after this loss.

    Args:
        logits: stream [positions, 1, V], one position a token in order of rows.
        sharded: positions are this context-parallel process's; otherwise all of them.
    """

    def compute(logits_SBV: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        labels_RT, mask_RT = labels(context.batch), mask(context.batch)
        if sharded:
            labels_RT, mask_RT = local_text(labels_RT), local_text(mask_RT)
        losses = token_cross_entropy(logits_SBV, labels_RT.reshape(-1, 1), kind)
        return torch.dot(losses.flatten(), mask_RT.flatten())

    def count(batch: Microbatch) -> torch.Tensor:
        return mask(batch).sum()

    def work(shapes: Sequence[tuple[int, ...]], sizes: ParallelSizes) -> Sequence[Work]:
        ((positions, _, vocab_size),) = shapes
        local = share(positions, sizes.cp, "positions") if sharded else positions
        return tuple(cross_entropy_work(local, vocab_size, sizes, kind))

    options = {"measure": _MEASURE, "work": work}
    return Loss(name, compute, count, (logits,), weight, sharded, fields, tasks, **options)


def causal_lm_loss(
    name: str = "causal_lm",
    logits: str = "logits",
    weight: float = 1.0,
    *,
    sharded: bool = True,
    tasks: frozenset[str] | None = None,
    kind: CrossEntropy = "plain",
) -> Loss:
    """Cross-entropy of the next token of the same document; reads `labels_RT` and `loss_mask_RT`."""
    return token_loss(
        name,
        logits,
        lambda batch: batch.labels_RT,
        lambda batch: batch.loss_mask_RT,
        weight=weight,
        sharded=sharded,
        fields=frozenset({"labels_RT"}),
        tasks=tasks,
        kind=kind,
    )
