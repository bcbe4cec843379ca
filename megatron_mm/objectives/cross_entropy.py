"""Cross-entropy of tokens over a vocabulary that is sharded over tensor parallelism: plain, or fused as a run asks.

Plain: megatron-core's, in fp32. Native: its compiled functions, which take the layers' precision, reduce over the
shards once instead of twice and round the gradient to bf16, so they are for bf16. TE: Transformer Engine's kernel,
which keeps logits as they are instead of fp32 probabilities. The others spoil the logits. `likeliest` is the token that
a model finds, over the same shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import distributed

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.models.work import Collective, Moved, Work, share

CrossEntropy = Literal["plain", "native", "te"]


def token_cross_entropy(logits_SBV: torch.Tensor, labels_SB: torch.Tensor, kind: CrossEntropy) -> torch.Tensor:
    """Loss of each token, fp32 [S, B]; logits are this process's part of the vocabulary."""
    if kind == "plain":
        return vocab_parallel_cross_entropy(logits_SBV.float(), labels_SB)
    group = get_tensor_model_parallel_group()
    if kind == "te" and logits_SBV.is_cuda:  # only a dry run comes here without CUDA, and plans for no less memory
        from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

        return te_parallel_cross_entropy(logits_SBV, labels_SB, group)
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return fused_vocab_parallel_cross_entropy(logits_SBV, labels_SB, group)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """[…, V/TP] of every tensor-parallel process -> the likeliest of V; of equals the first, as argmax takes it."""
    group = get_tensor_model_parallel_group()
    size = group.size()
    if size == 1:
        return logits.argmax(dim=-1)
    value, index = logits.max(dim=-1)
    index = index + group.rank() * logits.shape[-1]
    values, indices = ([torch.empty_like(own) for _ in range(size)] for own in (value, index))
    distributed.all_gather(values, value.contiguous(), group=group)
    distributed.all_gather(indices, index.contiguous(), group=group)
    best = torch.stack(values).argmax(dim=0, keepdim=True)
    return torch.stack(indices).gather(0, best)[0]


def cross_entropy_work(positions: int, vocab_size: int, sizes: ParallelSizes, kind: CrossEntropy) -> Iterator[Work]:
    """Of `positions` tokens of a process: kernels on its part of the vocabulary, and sums over tensor parallelism."""
    values = positions * share(vocab_size, sizes.tp, "vocabulary")
    if kind == "plain":  # conversion, subtraction of the maximum, exponential and division write; maximum and sum read
        yield Moved(8 * values, 4, "cross-entropy")
        yield Moved(4 * values, 2, "cross-entropy")
    else:  # fused, of bf16 logits
        yield Moved(4 * values, 2 if kind == "native" else 1, "cross-entropy")
    if sizes.tp > 1:  # in fp32: the maximum, the label's logit, the sum of exponentials
        of_kind = {
            "plain": (Collective("all_reduce", "tp", 4 * positions, 3, what="cross-entropy"),),
            "native": (
                Collective("all_reduce", "tp", 4 * positions, what="cross-entropy"),
                Collective("all_reduce", "tp", 8 * positions, what="cross-entropy"),
            ),
            "te": (Collective("all_gather", "tp", 12 * positions * sizes.tp, what="cross-entropy"),),
        }
        yield from of_kind[kind]
