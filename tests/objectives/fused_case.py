"""Cross-entropy over a vocabulary shared by tensor-parallel processes, plain and fused; under torchrun or alone.

Writes the losses, the gradient and the number of reductions of each kind as rank 0 sees its part of the vocabulary.
"""

from __future__ import annotations

import os
import sys
from unittest import mock

import torch

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.platform import setup

TOKENS, VOCABULARY = 12, 32


def figures() -> dict[str, dict]:
    """Losses, gradients and reductions by kind, in bf16."""
    from megatron.core import parallel_state

    from megatron_mm.objectives.cross_entropy import token_cross_entropy

    tp = setup.world_size()
    setup.initialize(ParallelSizes(tp=tp), seed=1)
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(TOKENS, 1, VOCABULARY, generator=generator, dtype=torch.float32) * 4
    labels = torch.randint(0, VOCABULARY, (TOKENS, 1), generator=generator)
    weights = torch.rand(TOKENS, 1, generator=generator)
    own = whole.chunk(tp, dim=-1)[parallel_state.get_tensor_model_parallel_rank()]
    found = {}
    for kind in ("plain", "native"):
        logits = own.to(torch.bfloat16).clone().requires_grad_()
        with mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as reduced:
            losses = token_cross_entropy(logits * 1.0, labels, kind)
            (losses * weights).sum().backward()
        found[kind] = {"losses": losses.detach(), "gradient": logits.grad, "reductions": reduced.call_count}
    return found


if __name__ == "__main__":
    results = figures()
    if int(os.environ["RANK"]) == 0:
        torch.save(results, sys.argv[1])
    setup.shutdown()
