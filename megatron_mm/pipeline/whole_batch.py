"""Losses that compare samples of the whole global batch: cached streams, one loss, a second pass with its gradients.

A pipeline sees one microbatch at a time, so a contrastive loss over 2048 pairs in 8 microbatches would have 256
negatives. Gradient caching (GradCache, arXiv:2101.06983) keeps all of them: a first pass without gradients leaves the
streams that such a loss reads on the last stage; the loss is computed once from all of them, with the gradient of each;
a second, normal pass learns the surrogate ⟨stream, gradient⟩ in its place, which has the same gradient in every weight.
Random states are replayed in between, so dropout draws the same. One microbatch needs none of this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext, Loss


def whole_batch_losses(losses: Sequence[Loss], microbatches: Sequence[Microbatch]) -> list[Loss]:
    """The losses that several of these microbatches share."""
    return [
        loss
        for loss in losses
        if loss.whole_batch and sum(loss.applies(batch.plan) for batch in microbatches) > 1
    ]


class StreamCache:
    """What the last stage keeps of whole-batch losses over one global batch.

    Until `compute`, `term` collects streams; afterwards it returns surrogates, microbatch by microbatch in the same
    order.

    Args:
        losses: from `whole_batch_losses`.
    """

    def __init__(self, losses: Sequence[Loss]) -> None:
        self.losses = {loss.name: loss for loss in losses}
        self.sums: dict[str, torch.Tensor] = {}
        """Each loss, summed over this process's samples of the global batch."""
        self._values: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in self.losses}
        self._gradients: dict[str, list[tuple[torch.Tensor | None, ...]]] = {}

    def term(self, name: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """What stands for the loss in one microbatch: zero while collecting, then the surrogate."""
        total = values[0].new_zeros((), dtype=torch.float32)
        if not self.sums:
            self._values[name].append(tuple(_exact(value) for value in values))
            return total
        for value, gradient in zip(values, self._gradients[name].pop(0)):
            if gradient is not None:
                total = total + (value.float() * gradient).sum()
        return total

    def compute(self, microbatches: Sequence[Microbatch], device: torch.device, learn: bool) -> None:
        """Each loss from what was collected; collective over the data-parallel processes of the last stage.

        Args:
            learn: find the gradients of the streams too.
        """
        for name, loss in self.losses.items():
            values = self._values.pop(name)
            # The media of all microbatches would not fit beside each other.
            batches = [batch.only(loss.fields) for batch in microbatches if loss.applies(batch.plan)]
            contexts = [ForwardContext(batch.to(device)).reading(loss.reader, loss.fields) for batch in batches]
            if learn:
                for value in (value for one in values for value in one if value.is_floating_point()):
                    value.requires_grad_()
            with torch.set_grad_enabled(learn):
                total = loss.compute(*(list(stream) for stream in zip(*values)), contexts)
            self.sums[name] = total.detach()
            if learn:
                self._gradients[name] = _gradients(total, values)


def _exact(value: torch.Tensor) -> torch.Tensor:
    """A copy without gradient, fp32 if it is real: what it was unpacked from is freed."""
    return value.detach().clone().float() if value.is_floating_point() else value.detach().clone()


def _gradients(
    total: torch.Tensor, values: Sequence[tuple[torch.Tensor, ...]]
) -> list[tuple[torch.Tensor | None, ...]]:
    leaves = [value for one in values for value in one if value.requires_grad]
    found = dict(zip(map(id, leaves), torch.autograd.grad(total, leaves, allow_unused=True)))
    return [tuple(found.get(id(value)) for value in one) for one in values]
