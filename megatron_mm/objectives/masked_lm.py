"""Masked language modelling (BERT, arXiv:1810.04805): the hidden tokens are predicted from both sides.

Which tokens are hidden, and what stands in their place (80% the mask, 10% a random token, 10% the token itself), is
drawn with the data (data/reading/masking.py); attention that sees both sides is the system's.
"""

from __future__ import annotations

from megatron_mm.models.graph import Loss
from megatron_mm.objectives.causal_lm import token_loss
from megatron_mm.objectives.cross_entropy import CrossEntropy


def masked_lm_loss(
    name: str = "masked_lm",
    logits: str = "logits",
    weight: float = 1.0,
    *,
    sharded: bool = True,
    tasks: frozenset[str] | None = None,
    kind: CrossEntropy = "plain",
) -> Loss:
    """Cross-entropy of the hidden tokens; reads `masked_labels_RT` and `masked_loss_mask_RT`."""
    return token_loss(
        name,
        logits,
        lambda batch: batch.masked_labels_RT,
        lambda batch: batch.masked_loss_mask_RT,
        weight=weight,
        sharded=sharded,
        fields=frozenset({"masked_labels_RT"}),
        tasks=tasks,
        kind=kind,
    )
