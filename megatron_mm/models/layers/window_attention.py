"""Attention of Swin V2 (arXiv:2111.09883): scaled cosine attention in windows with a continuous position bias.

Queries and keys are normalised, each head scales their products by a learned factor of at most 100, and an MLP over the
log-spaced offset of two tokens says each head's bias. Heads are sharded over tensor parallelism: projections, biases,
scales and the MLP's second layer by head; its first layer is whole on every process, its gradient summed.

Linear layers are the backend's. The rest is torch on both backends: a learned bias rules FlashAttention out, and the
memory-efficient kernel of `scaled_dot_product_attention` takes one on CUDA, with its gradient and no stored scores.

Shape suffixes as in `windows`; B windows, N heads of this process, D width of a head.
"""

from __future__ import annotations

import math

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from torch.nn import functional

from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.parameters import empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.sharding import sum_gradient_over_tp
from megatron_mm.models.layers.windows import POSITION_WIDTH, WindowGroup, Windows

_LARGEST_LOGIT_SCALE = math.log(100.0)
_EPSILON = 1e-12


class _CosineQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, scale, query_bias, value_bias):
        windows, length, heads, _, width = mixed.shape
        query, key, value = (mixed.new_empty(windows, heads, length, width) for _ in range(3))
        torch.add(mixed[:, :, :, 0].transpose(1, 2), query_bias[:, None], out=query)
        key.copy_(mixed[:, :, :, 1].transpose(1, 2))
        torch.add(mixed[:, :, :, 2].transpose(1, 2), value_bias[:, None], out=value)
        query_factor, key_factor = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=_EPSILON).reciprocal_() for x in (query, key)
        )
        query_factor.mul_(scale[:, None, None])
        query.mul_(query_factor)
        key.mul_(key_factor)
        ctx.save_for_backward(query, key, query_factor, key_factor, scale)
        return query, key, value

    @staticmethod
    def backward(ctx, query_gradient, key_gradient, value_gradient):
        query, key, query_factor, key_factor, scale = ctx.saved_tensors
        windows, heads, length, width = query.shape
        result = query.new_empty(windows, length, heads, 3, width)
        along = (query_gradient * query).sum(dim=-1, keepdim=True)
        scale_gradient = along.sum(dim=(0, 2, 3)) / scale
        along.div_(scale.square()[:, None, None])
        turned = query_gradient.addcmul(query, along, value=-1)
        torch.mul(turned, query_factor, out=result[:, :, :, 0].transpose(1, 2))
        along = (key_gradient * key).sum(dim=-1, keepdim=True)
        turned = key_gradient.addcmul(key, along, value=-1)
        torch.mul(turned, key_factor, out=result[:, :, :, 1].transpose(1, 2))
        result[:, :, :, 2].copy_(value_gradient.transpose(1, 2))
        bias_gradients = (result[:, :, :, part].sum(dim=(0, 1)) for part in (0, 2))
        return result, scale_gradient, *bias_gradients


def cosine_qkv(
    mixed: torch.Tensor, scale: torch.Tensor, query_bias: torch.Tensor, value_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes a fused projection apart for cosine attention.

    Args:
        mixed: [B, M, N, 3, D]: of each head the query, the key, the value, without biases.
        scale: [N], by which each head's normalised queries are multiplied.
        query_bias, value_bias: [N, D]; keys have none.

    Returns:
        queries of length `scale`, keys of length 1, and values, each [B, N, M, D].
    """
    return _CosineQKV.apply(mixed, scale, query_bias, value_bias)


class PositionBias(MegatronModule):
    """The MLP from offsets to each head's bias, between 0 and 16: 3 -> 512 -> heads."""

    def __init__(self, settings: LayerSettings, shape: StackShape) -> None:
        super().__init__(layer_config(settings, shape, sharded=False))
        heads = shape.num_attention_heads // settings.sizes.tp
        place = {"dtype": settings.dtype, "device": torch.cuda.current_device()}
        self.linear_offset = nn.utils.skip_init(nn.Linear, 3, POSITION_WIDTH, **place)
        self.head_weight = empty_parameter(heads, POSITION_WIDTH, dtype=settings.dtype)

    def forward(self, group: WindowGroup) -> torch.Tensor:
        """Bias of every pair of tokens of a window, [N, M, M]."""
        first = torch.cat((self.linear_offset.weight, self.linear_offset.bias[:, None]), dim=1)
        weight, bias = sum_gradient_over_tp(first).split((3, 1), dim=1)
        inner_PF = functional.linear(group.coordinates, weight, bias[:, 0]).relu()
        table_PN = 16.0 * functional.linear(inner_PF, self.head_weight).sigmoid()
        pairs = table_PN.index_select(0, group.pairs.flatten())
        return pairs.view(group.length, group.length, -1).permute(2, 0, 1).contiguous()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Checkpoint entries; the second layer is sharded by head."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return entries | sharded_by_head({"head_weight": self.head_weight}, prefix, sharded_offsets)


def sharded_by_head(parameters: dict[str, nn.Parameter], prefix: str, sharded_offsets: tuple) -> dict:
    """Checkpoint entries of a module's own parameters that tensor parallelism shards on dimension 0."""
    return make_sharded_tensors_for_checkpoint(parameters, prefix, dict.fromkeys(parameters, 0), sharded_offsets)


class WindowAttention(MegatronModule):
    """Scaled cosine attention in windows. Queries and values have biases; keys have none, as in the paper."""

    attention_kernel = "torch's scaled_dot_product_attention, with a position bias in windows"

    def __init__(self, settings: LayerSettings, shape: StackShape) -> None:
        config = layer_config(settings, shape, sharded=False)
        super().__init__(config)
        backend, dtype = backend_of(settings), settings.dtype
        self.width, heads = shape.head_dim, shape.num_attention_heads // settings.sizes.tp
        self.linear_qkv = backend.column_linear(config, shape.hidden_size, 3 * shape.hidden_size)
        self.query_bias = empty_parameter(heads * self.width, dtype=dtype)
        self.value_bias = empty_parameter(heads * self.width, dtype=dtype)
        self.logit_scale = empty_parameter(heads, dtype=dtype)
        self.position_bias = PositionBias(settings, shape)
        self.linear_proj = backend.row_linear(config, shape.hidden_size, shape.hidden_size, bias=True)
        self.checkpoint = config.recompute_granularity == "selective"

    def forward(self, tokens: torch.Tensor, windows: Windows) -> torch.Tensor:
        """[S, C] -> [S, C]: each token reads those of its window that are its neighbours."""
        mixed, _ = self.linear_qkv(windows.cut(tokens))
        scale = self.logit_scale.clamp(max=_LARGEST_LOGIT_SCALE).exp()
        query_bias, value_bias = (bias.view(-1, self.width) for bias in (self.query_bias, self.value_bias))
        attended = []
        for group, part in zip(windows.groups, mixed.split([group.num_places for group in windows.groups])):
            part_BMN3D = part.view(-1, group.length, part.shape[1] // (3 * self.width), 3, self.width)
            query, key, value = cosine_qkv(part_BMN3D, scale, query_bias, value_bias)
            bias = self.position_bias(group)
            counts = [count for count, _ in group.kinds]
            kinds = zip(group.kinds, query.split(counts), key.split(counts), value.split(counts))
            of_group = [self._attend(*qkv, bias if mask is None else bias + mask) for (_, mask), *qkv in kinds]
            attended.append(_join(of_group).view(-1, part.shape[1] // 3))
        output, _ = self.linear_proj(_join(attended))
        return windows.join(output)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """[B, N, M, D] of windows of a kind, bias [N, M, M] -> [B, M, N, D]."""
        dropout = self.config.attention_dropout if self.training else 0.0

        def run(query, key, value, bias):
            mask = bias.expand(query.shape[0], *bias.shape)
            return functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=1.0)

        def forked(*tensors):
            with tensor_parallel.get_cuda_rng_tracker().fork():  # heads differ between tensor-parallel processes
                return run(*tensors)

        core = forked if dropout else run
        if self.checkpoint and self.training and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(core, False, query, key, value, bias).transpose(1, 2)
        return core(query, key, value, bias).transpose(1, 2)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Checkpoint entries; biases and scales are sharded by head."""
        own = {name: getattr(self, name) for name in ("query_bias", "value_bias", "logit_scale")}
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return entries | sharded_by_head(own, prefix, sharded_offsets)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
