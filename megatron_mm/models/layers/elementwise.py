"""Elementwise operations with backward passes by hand: fewer passes over memory than autograd makes of their formulas.

On a CPU these operations are bound by memory. Each function here keeps only what its gradient needs, and writes its
gradient once. The formulas are the usual ones, and tests hold them to autograd's results.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.reshape(-1, x.shape[-1])
        scale = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().div_(rows.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(rows, weight, scale)
        return (rows * scale).mul_(weight).view(x.shape)

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, scale = ctx.saved_tensors
        shape, gradient = gradient.shape, gradient.reshape(rows.shape)
        product = gradient * rows
        weight_gradient = scale.view(1, -1).mm(product).view(-1) if ctx.needs_input_grad[1] else None
        along = product.mv(weight)[:, None].mul_(scale).mul_(scale).div_(-rows.shape[1])
        return (gradient * weight).addcmul_(rows, along).mul_(scale).view(shape), weight_gradient, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension (arXiv:1910.07467); half precision is computed in fp32."""
    if x.dtype is torch.float32 and x.device.type != "cuda":
        return _RMSNorm.apply(x, weight, eps)
    return functional.rms_norm(x, weight.shape, weight, eps)


class _RotaryQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, cos, sin):
        ctx.save_for_backward(cos, sin)
        rows, length, groups, members, width = mixed.shape
        query = mixed.new_empty(rows, length, groups, members - 2, width)
        key, value = mixed.new_empty(rows, length, groups, width), mixed.new_empty(rows, length, groups, width)
        _rotate(mixed[..., :-2, :], cos[:, :, None], sin[:, :, None], query)
        _rotate(mixed[..., -2, :], cos, sin, key)
        value.copy_(mixed[..., -1, :])
        return query.flatten(2, 3), key, value

    @staticmethod
    def backward(ctx, query, key, value):
        cos, sin = ctx.saved_tensors
        rows, length, groups, width = key.shape
        queries = query.shape[2] // groups
        mixed = key.new_empty(rows, length, groups, queries + 2, width)
        _rotate(query.unflatten(2, (groups, queries)), cos[:, :, None], -sin[:, :, None], mixed[..., :-2, :])
        _rotate(key, cos, -sin, mixed[..., -2, :])
        mixed[..., -1, :].copy_(value)
        return mixed, None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Turns the pairs (x[i], x[i + D/2]) by an angle (Llama's convention)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)


def rotary_qkv(
    mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes a fused projection apart and turns its queries and keys.

    Args:
        mixed: [R, L, G, Q + 2, D]: of each group the queries, the key, the value.
        cos, sin: [R, L, 1, D/2], in the dtype of `mixed`.

    Returns:
        queries [R, L, G·Q, D], keys and values [R, L, G, D], each contiguous.
    """
    return _RotaryQKV.apply(mixed, cos, sin)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_gradient)
        torch.mul(functional.silu(gate), gradient, out=up_gradient)
        return result


class SwiGLU(MegatronModule):
    """silu(gate) · up of [..., gate | up] (arXiv:2002.05202)."""

    def __init__(self, config: TransformerConfig | None = None) -> None:
        super().__init__(config)

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        """[..., 2·F] -> [..., F]."""
        return _SwiGLU.apply(both)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        scaled = x * 1.702
        ctx.save_for_backward(scaled)
        return functional.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx, gradient):
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, scaled)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's approximation of GELU, x · sigmoid(1.702 x)."""
    return _QuickGELU.apply(x)
