"""Next-token prediction: cross-entropy over a vocabulary that is sharded over tensor parallelism."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

from megatron_mm.data.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext, Loss
from megatron_mm.models.layers.sharding import local_text


def causal_lm_loss(name: str = "causal_lm", logits: str = "logits", weight: float = 1.0) -> Loss:
    """Cross-entropy of the labels, summed over the positions that count; averaged over those of the global batch.

    It reads `labels_RT` and `loss_mask_RT`. megatron-core's cross-entropy works in place: fp32 logits hold
    probabilities afterwards, so nothing may read the stream after this loss.
    """

    def compute(logits_SBV: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        batch = context.batch
        labels = local_text(batch.labels_RT).reshape(-1, 1)
        mask = local_text(batch.loss_mask_RT).flatten()
        losses = vocab_parallel_cross_entropy(logits_SBV.float(), labels)
        return torch.dot(losses.flatten(), mask)

    def count(batch: Microbatch) -> torch.Tensor:
        return batch.loss_mask_RT.sum()

    return Loss(name, compute, count, (logits,), weight, sharded=True, fields=frozenset({"labels_RT"}))
