"""Symmetric InfoNCE between two embeddings of each row (CLIP, arXiv:2103.00020, figure 3).

    logits = scale · a bᵀ / (‖a‖ ‖b‖);   ½ · (cross-entropy along rows + along columns), diagonal as truth

Each data-parallel process compares its own rows with the rows of all processes, gathered with gradients: the sum over
processes then has exactly the gradient of the loss of one process with all rows. Rows without one of the two do not
take part, but every process enters every gather. Negatives are the rows of the microbatch's pool, or of the whole
global batch (Loss.whole_batch, pipeline/whole_batch.py).

Shape suffixes: R rows of this process, P rows of all, E width of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import parallel_state
from torch.nn import functional

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext, Loss
from megatron_mm.models.work import Collective, MatrixProduct, Moved, Work
from megatron_mm.objectives.measures import Retrieval
from megatron_mm.parts.contrastive.section import ContrastiveConfig
from megatron_mm.parts.vit.rows import rows_with_image
from megatron_mm.platform import collectives


class _GatherRows(torch.autograd.Function):
    """[R, …] of every process -> [P, …]; the gradient is summed over processes and scattered back."""

    @staticmethod
    def forward(ctx, local, group):
        ctx.group = group
        gathered = local.new_empty((group.size() * local.shape[0], *local.shape[1:]))
        collectives.all_gather_single(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        local = gradient.new_empty((gradient.shape[0] // ctx.group.size(), *gradient.shape[1:]))
        collectives.reduce_scatter_single(local, gradient.contiguous(), group=ctx.group)
        return local, None


def gather_rows(local: torch.Tensor) -> torch.Tensor:
    """Rows of all data-parallel processes, in order of ranks (context parallelism repeats rows); gradients pass."""
    group = parallel_state.get_data_parallel_group()
    return local if group.size() == 1 else _GatherRows.apply(local, group)


def info_nce(
    first_RE: torch.Tensor, second_RE: torch.Tensor, valid_R: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Sum over this process's valid rows of the symmetric loss.

    Args:
        first_RE, second_RE: fp32 embeddings, of any length.
        valid_R: 1 where the row has both.
        scale: inverse temperature.
    """
    rows = first_RE.shape[0]
    rank = parallel_state.get_data_parallel_rank()
    first_RE, second_RE = functional.normalize(first_RE, dim=-1), functional.normalize(second_RE, dim=-1)
    first_PE, second_PE, valid_P = gather_rows(first_RE), gather_rows(second_RE), gather_rows(valid_R)
    own_R = rank * rows + torch.arange(rows, device=first_RE.device)
    # An invalid row still compares with itself, so that its loss is finite; it then counts nothing.
    hidden_RP = (valid_P == 0)[None] & (own_R[:, None] != torch.arange(first_PE.shape[0], device=own_R.device)[None])
    total = first_RE.new_zeros(())
    for queries, keys in ((first_RE, second_PE), (second_RE, first_PE)):
        logits_RP = (scale * (queries @ keys.t())).masked_fill(hidden_RP, float("-inf"))
        total = total + 0.5 * torch.dot(functional.cross_entropy(logits_RP, own_R, reduction="none"), valid_R)
    return total


def info_nce_work(shapes: Sequence[tuple[int, ...]], sizes: ParallelSizes) -> Iterator[Work]:
    """Of `info_nce` of two embeddings [R, E], all in fp32."""
    rows, width = shapes[0]
    pool = rows * sizes.dp
    yield Moved(8 * rows * width, 2, "norm of embeddings")
    if sizes.dp > 1:
        yield Collective("all_gather", "dp", 4 * pool * width, 2, what="embeddings")
        yield Collective("reduce_scatter", "dp", 4 * pool * width, 2, "dgrad", what="embeddings")
        yield Collective("all_gather", "dp", 4 * pool, what="rows that count")
    yield MatrixProduct(rows, pool, width, count=2, what="similarities")
    yield Moved(8 * rows * pool, 2 * 3, "cross-entropy of similarities")  # scale, mask, softmax


def contrastive_loss(
    name: str,
    reads: tuple[str, str, str],
    valid: Callable[[Microbatch], torch.Tensor],
    *,
    weight: float,
    whole_batch: bool,
) -> Loss:
    """The loss over two embedding streams and the logit scale.

    Args:
        reads: streams [R, E], [R, E] and [1].
        valid: [R] float, 1 where a row has both modalities.
        whole_batch: negatives from the whole global batch instead of the microbatch's pool.
    """

    def of_microbatch(first, second, scale, context: ForwardContext) -> torch.Tensor:
        return info_nce(first, second, valid(context.batch), scale)

    def of_batch(
        first: Sequence[torch.Tensor],
        second: Sequence[torch.Tensor],
        scale: Sequence[torch.Tensor],
        contexts: Sequence[ForwardContext],
    ) -> torch.Tensor:
        valid_R = torch.cat([valid(context.batch) for context in contexts])
        # The same number in each microbatch: its mean gives each an equal part of the gradient.
        return info_nce(torch.cat(list(first)), torch.cat(list(second)), valid_R, torch.stack(list(scale)).mean())

    def count(batch: Microbatch) -> torch.Tensor:
        return valid(batch).sum()

    return Loss(
        name,
        of_batch if whole_batch else of_microbatch,
        count,
        reads,
        weight,
        sharded=False,
        whole_batch=whole_batch,
        measure=Retrieval,
        work=info_nce_work,
    )


def image_text_loss(contrastive: ContrastiveConfig, weight: float) -> Loss:
    """Contrastive loss of `image_embedding` and `text_embedding`, over rows that have an image."""
    return contrastive_loss(
        "contrastive",
        ("image_embedding", "text_embedding", "logit_scale"),
        rows_with_image,
        weight=weight,
        whole_batch=contrastive.negatives == "batch",
    )
