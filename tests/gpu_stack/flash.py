"""FlashAttention's four operators in plain torch, so that what calls them runs on a CPU.

flash-attn's Python layer registers its kernels as torch operators for CUDA. `install()` registers others for the CPU:
the same arguments and results, computed in fp32 from the formulas of the paper (arXiv:2205.14135, appendix B), the
causal mask aligned at the bottom right as since release 2.1. A backward pass takes `out` and the log-sum-exp as given,
which may be those of more keys than it has (ring attention), as the kernels do.

Shape suffixes: B rows, S queries, T keys of a row, H query heads, G key-value heads, D width, N all queries.
"""

from __future__ import annotations

from itertools import pairwise

import torch


def _scores(query_SHD: torch.Tensor, key_TGD: torch.Tensor, scale: float, window: tuple[int, int]) -> torch.Tensor:
    """[H, S, T], -inf where a key is hidden."""
    key_THD = key_TGD.repeat_interleave(query_SHD.shape[1] // key_TGD.shape[1], dim=1)
    scores = torch.einsum("shd,thd->hst", query_SHD, key_THD) * scale
    queries, keys = scores.shape[1:]
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    left, right = window
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    hidden |= (distance > right) if right >= 0 else hidden
    hidden |= (distance < -left) if left >= 0 else hidden
    return scores.masked_fill(hidden, float("-inf"))


def _forward(query, key, value, scale, window) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: output [S, H, D] and log-sum-exp [H, S]."""
    query_SHD, key_TGD, value_TGD = (part.float() for part in (query, key, value))
    scores = _scores(query_SHD, key_TGD, scale, window)
    sums_HS = scores.logsumexp(dim=-1)
    value_THD = value_TGD.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return torch.einsum("hst,thd->shd", (scores - sums_HS[..., None]).exp(), value_THD), sums_HS


def _backward(gradient, query, key, value, out, sums_HS, scale, window) -> tuple[torch.Tensor, ...]:
    """One sequence: gradients of queries, keys and values."""
    groups, heads = key.shape[1], query.shape[1] // key.shape[1]
    gradient, query, key, value, out = (part.float() for part in (gradient, query, key, value, out))
    probabilities = (_scores(query, key, scale, window) - sums_HS[..., None]).exp()
    wide_key, wide_value = (part.repeat_interleave(heads, dim=1) for part in (key, value))
    of_probabilities = torch.einsum("shd,thd->hst", gradient, wide_value)
    along = (gradient * out).sum(dim=-1).T[..., None]
    of_scores = probabilities * (of_probabilities - along) * scale
    of_query = torch.einsum("hst,thd->shd", of_scores, wide_key)
    of_key = torch.einsum("hst,shd->thd", of_scores, query)
    of_value = torch.einsum("hst,shd->thd", probabilities, gradient)
    return of_query, *(part.unflatten(1, (groups, heads)).sum(dim=2) for part in (of_key, of_value))


def _window(causal: bool, left: int, right: int) -> tuple[int, int]:
    return left, 0 if causal else right


def _nothing(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What forward operators return besides: stored probabilities and the state of dropout's generator."""
    return query.new_empty(0), torch.zeros(2, dtype=torch.int64)


def dense_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, *unused):
    """[B, S, H, D] -> the same, log-sum-exp [B, H, S]."""
    assert not dropout_p
    window = _window(causal, window_size_left, window_size_right)
    parts = [_forward(*row, softmax_scale, window) for row in zip(q, k, v)]
    return torch.stack([out for out, _ in parts]).to(q.dtype), torch.stack([sums for _, sums in parts]), *_nothing(q)


def dense_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    *unused,
):  # fmt: skip
    """Fills dq, dk and dv; returns what nobody reads."""
    window = _window(causal, window_size_left, window_size_right)
    for row, of in zip(zip(dout, q, k, v, out, softmax_lse), zip(dq, dk, dv)):
        for target, value in zip(of, _backward(*row, softmax_scale, window)):
            target.copy_(value)
    return softmax_lse.clone()


def varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, *unused,
):  # fmt: skip
    """[N, H, D] -> the same, log-sum-exp [H, N]: each segment alone."""
    assert not dropout_p
    window = _window(causal, window_size_left, window_size_right)
    out, sums = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    for queries, keys in _segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        out[queries], sums[:, queries] = _forward(q[queries], k[keys], v[keys], softmax_scale, window)
    return out, sums, *_nothing(q)


def varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, *unused,
):  # fmt: skip
    """Fills dq, dk and dv, with zero where a key has no query."""
    window = _window(causal, window_size_left, window_size_right)
    for target in (dq, dk, dv):
        target.zero_()
    for queries, keys in _segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        row = (dout[queries], q[queries], k[keys], v[keys], out[queries], softmax_lse[:, queries])
        dq[queries], dk[keys], dv[keys] = _backward(*row, softmax_scale, window)
    return softmax_lse.clone()


def _segments(query_bounds, key_bounds, longest_query, longest_key):
    """Slices of the queries and keys of every segment that has queries."""
    for (q0, k0), (q1, k1) in pairwise(zip(query_bounds.tolist(), key_bounds.tolist())):
        assert 0 <= q1 - q0 <= longest_query and 0 <= k1 - k0 <= longest_key, "a segment is longer than was said"
        if q1 > q0:
            assert k1 > k0, "a segment of queries has no keys"
            yield slice(q0, q1), slice(k0, k1)


class _Once:
    """A message that may be waited for again: Transformer Engine does so, which NCCL allows and gloo never ends."""

    def __init__(self, work: torch.distributed.Work) -> None:
        self._work: torch.distributed.Work | None = work

    def wait(self) -> None:
        """Returns at once the second time."""
        if self._work is not None:
            self._work.wait()
        self._work = None


def install() -> None:
    """Gives flash-attn's operators, which must be imported, their kernels on the CPU, and ring attention gloo."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    communicate = context_parallel.flash_attn_p2p_communicate
    context_parallel.flash_attn_p2p_communicate = lambda *given: [_Once(work) for work in communicate(*given)]
    kernels = {
        "forward": dense_forward,
        "backward": dense_backward,
        "varlen_forward": varlen_forward,
        "varlen_backward": varlen_backward,
    }
    for name, kernel in kernels.items():
        torch.library.register_kernel(f"flash_attn::_flash_attn_{name}", "cpu", kernel)
