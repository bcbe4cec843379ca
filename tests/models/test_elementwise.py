"""Hand-written gradients against autograd's of the plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from megatron_mm.models.layers.elementwise import SwiGLU, quick_gelu, rms_norm, rotary_qkv


def compare(ours: Callable, plain: Callable, *inputs: torch.Tensor) -> None:
    results = []
    for function in (ours, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        torch.autograd.backward(outputs, [torch.randn(o.shape, generator=generator) for o in outputs])
        results.append([*outputs, *[leaf.grad for leaf in leaves]])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(6, 1, 16), (2, 5, 3, 8)])
def test_rms_norm(shape: tuple[int, ...]):
    weight = torch.randn(shape[-1])
    compare(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w,
        torch.randn(shape),
        weight,
    )


@pytest.mark.parametrize("queries", [1, 3])
def test_rotary_qkv(queries: int):
    angles = torch.randn(2, 5, 1, 4)
    cos, sin = angles.cos(), angles.sin()

    def plain(mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def rotate(x: torch.Tensor) -> torch.Tensor:
            wide = [torch.cat((a, a), dim=-1).view(2, 5, *[1] * (x.dim() - 3), 8) for a in (cos, sin)]
            return x * wide[0] + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * wide[1]

        return rotate(mixed[..., :-2, :]).flatten(2, 3), rotate(mixed[..., -2, :]), mixed[..., -1, :]

    compare(lambda mixed: rotary_qkv(mixed, cos, sin), plain, torch.randn(2, 5, 2, queries + 2, 8))


def test_swiglu():
    compare(
        SwiGLU(), lambda x: functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], torch.randn(4, 1, 12)
    )  # fmt: skip


def test_quick_gelu():
    compare(quick_gelu, lambda x: x * torch.sigmoid(1.702 * x), torch.randn(4, 7) * 4)
