"""Causal and masked language modelling: torch's cross-entropy over the positions that count, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from megatron_mm.models.graph import ForwardContext
from megatron_mm.objectives.causal_lm import causal_lm_loss
from megatron_mm.objectives.masked_lm import masked_lm_loss
from tests.objectives.cases import rows


@pytest.mark.parametrize(
    ("make", "labels", "mask"),
    [
        (causal_lm_loss, "labels_RT", "loss_mask_RT"),
        (masked_lm_loss, "masked_labels_RT", "masked_loss_mask_RT"),
    ],
)
@pytest.mark.parametrize("sharded", [True, False])
def test_loss_is_torchs_cross_entropy_of_what_counts(make, labels, mask, sharded):
    generator = torch.Generator().manual_seed(0)
    batch = rows([0, 1, 2], {0})
    wanted, counts = torch.randint(0, 11, (3, 4), generator=generator), torch.tensor([[0, 1, 1, 0], [0] * 4, [1] * 4])
    for name in ("labels_RT", "masked_labels_RT"):
        setattr(batch, name, wanted if name == labels else torch.full((3, 4), 99))  # the other would not even fit
    for name in ("loss_mask_RT", "masked_loss_mask_RT"):
        setattr(batch, name, counts.float() if name == mask else torch.ones(3, 4))
    loss = make(weight=0.3, sharded=sharded, tasks=frozenset({"one"}))
    logits = torch.randn(12, 1, 11, generator=generator, requires_grad=True)
    theirs = logits.detach().clone().requires_grad_()
    found = loss.compute(logits * 1.0, ForwardContext(batch))
    kept = counts.flatten() > 0
    expected = functional.cross_entropy(theirs[:, 0][kept], wanted.flatten()[kept], reduction="sum")
    found.backward()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(logits.grad, theirs.grad, rtol=1e-6, atol=1e-7)
    assert (logits.grad[~kept] == 0).all()
    assert loss.count(batch) == counts.sum()
    assert (loss.weight, loss.sharded, loss.reads) == (0.3, sharded, ("logits",)) and labels in loss.fields
    assert loss.tasks == {"one"} and not loss.applies(batch.plan)
