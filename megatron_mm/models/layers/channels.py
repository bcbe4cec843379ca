"""Channels sharded over tensor parallelism: a depthwise convolution, and a LayerNorm over channels that no process
holds all of.

A convolution module (see `conformer`) splits its channels like an MLP its inner width. The depthwise convolution then
needs nothing of other processes; the norm needs two sums over channels at each position, forward and backward, which
are all that is communicated. Both compute the same numbers, to rounding, for any number of processes.

Shape suffixes: A sounds, L positions of a sound, C channels of this process.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import distributed
from torch.nn import functional

from megatron_mm.models.layers.parameters import empty_parameter
from megatron_mm.platform import collectives


class ShardedModule(MegatronModule):
    """A module whose own parameters are written to checkpoints as `parameters.shard` says, not as replicas."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Checkpoint entries of its own parameters and of its children."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = {name: p for name, p in self.named_parameters(recurse=False) if p.tensor_model_parallel}
        group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        dims = {name: parameter.partition_dim for name, parameter in own.items()}
        tp_group = parallel_state.get_tensor_model_parallel_group()
        entries.update(
            make_sharded_tensors_for_checkpoint(
                own, prefix, dims, sharded_offsets, tp_group=tp_group, dp_cp_group=group
            )
        )
        return entries


class DepthwiseConvolution(ShardedModule):
    """One filter a channel, without bias, over positions padded with zeros to keep their number."""

    def __init__(self, config: TransformerConfig, channels: int, kernel_size: int) -> None:
        super().__init__(config)
        self.kernel_size = kernel_size
        local = channels // config.tensor_model_parallel_size
        self.weight = empty_parameter(local, 1, kernel_size, dtype=config.params_dtype)

    def forward(self, hidden_ALC: torch.Tensor) -> torch.Tensor:
        """[A, L, C] -> [A, L, C]."""
        # As an image of height L and width 1 with channels last: no copy, and several times as fast on a CPU as conv1d.
        image = hidden_ALC.unsqueeze(2).permute(0, 3, 1, 2)
        padding = (self.kernel_size // 2, 0)
        convolved = functional.conv2d(image, self.weight[..., None], padding=padding, groups=image.shape[1])
        return convolved.permute(0, 2, 3, 1).squeeze(2)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        values = x.float()
        variance, mean = torch.var_mean(values, dim=-1, correction=0)
        local = torch.stack((mean, variance))
        gathered = local.new_empty((group.size() * 2, *local.shape[1:]))
        collectives.all_gather_single(gathered, local, group=group)
        means, variances = gathered.unflatten(0, (-1, 2)).unbind(1)
        # Processes hold equally many channels. Moments about local means are combined without cancellation (Chan).
        mean = means.mean(dim=0)
        variance = variances.add((means - mean).square()).mean(dim=0)
        scale = variance.add(eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.group = group
        return _normalized(x, mean, scale).mul_(weight).add_(bias).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, scale = ctx.saved_tensors
        normalized, gradient = _normalized(x, mean, scale), gradient.float()
        along = gradient * normalized
        bias_gradient = gradient.flatten(0, -2).sum(dim=0).to(weight.dtype)
        weight_gradient = along.flatten(0, -2).sum(dim=0).to(weight.dtype)
        scaled = gradient * weight
        sums = torch.stack((scaled.sum(dim=-1), along.mul_(weight).sum(dim=-1)))
        distributed.all_reduce(sums, group=ctx.group)
        mean_gradient, mean_along = sums.div_(x.shape[-1] * ctx.group.size()).unsqueeze(-1).unbind(0)
        result = scaled.sub_(mean_gradient).sub_(normalized.mul_(mean_along)).mul_(scale[..., None])
        return result.to(x.dtype), weight_gradient, bias_gradient, None, None


def _normalized(x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """In fp32, a new tensor."""
    return (x.float() - mean[..., None]).mul_(scale[..., None])


class ChannelNorm(ShardedModule):
    """LayerNorm over channels that are sharded over tensor parallelism."""

    def __init__(self, config: TransformerConfig, channels: int) -> None:
        super().__init__(config)
        local = channels // config.tensor_model_parallel_size
        self.weight = empty_parameter(local, dtype=config.params_dtype)
        self.bias = empty_parameter(local, dtype=config.params_dtype)

    def forward(self, hidden_ALC: torch.Tensor) -> torch.Tensor:
        """[A, L, C] -> [A, L, C]."""
        group, eps = parallel_state.get_tensor_model_parallel_group(), self.config.layernorm_epsilon
        if group.size() == 1:
            return functional.layer_norm(hidden_ALC, self.weight.shape, self.weight, self.bias, eps)
        return _LayerNorm.apply(hidden_ALC, self.weight, self.bias, eps, group)
