"""Self-attention over segments with relative positions and memory (Transformer-XL, arXiv:1901.02860).

A row of T tokens is S segments of L. The queries of a segment see its own keys, in both directions, and those of the
segment before it, its memory:

    score(i, j) = ((q_i + u) · k_j + (q_i + v) · r_(i-j)) / √D

where r_(i-j) is a projection of the sinusoid of the distance, and u, v are shared by all layers. Memory is the layer's
normed input of the segment before, without gradient: it teaches the weights, not the hidden states that it came from.
Since that is known before the layer runs, all segments of all rows are one batch, and the keys and values of a
segment are projected once, for itself and as memory of the next.

Transformer Engine has neither such scores nor such a gradient: queries, keys, values and scores are torch's on both
backends; the other linears, norms and the MLP are the backend's.

Shape suffixes: B rows, T tokens of a row, S segments of a row, L tokens of a segment, K = 2·L keys of a segment (memory
first), P = 3·L distances, C hidden width, H heads of this process, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import distributed
from torch.nn import functional

from megatron_mm.models.graph import ForwardContext, NodeCost
from megatron_mm.models.initialization import Init
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import StackWork, copies, mlp_cost
from megatron_mm.models.layers.linear import ColumnParallelLinear
from megatron_mm.models.layers.parameters import describe, empty_parameter, shard
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import StackLayer
from megatron_mm.models.work import MatrixProduct


@dataclass(frozen=True)
class SegmentPlan:
    """How the tokens of one microbatch see one another.

    Attributes:
        hidden_BS1K: True for the keys that a segment's queries do not see.
        sinusoids_PC: of the distances 2·L, 2·L - 1, …, 1 - L from a query to a key (see `distance_sinusoids`).
    """

    hidden_BS1K: torch.Tensor
    sinusoids_PC: torch.Tensor


def distance_sinusoids(
    segment_length: int, width: int, dtype: torch.dtype, device: torch.device | str | int
) -> torch.Tensor:
    """[3·L, C]: sines, then cosines, of the distances 2·L … 1 - L; computed in fp32.

    2·L is a distance that no query has: with it, rows of 3·L turn into rows of one less (see `_by_key`).
    """
    distances = torch.arange(2 * segment_length, -segment_length, -1, dtype=torch.float32, device=device)
    scales = 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    angles = distances[:, None] / scales
    return torch.cat((angles.sin(), angles.cos()), dim=1).to(dtype)


def hidden_keys(padding_RT: torch.Tensor, segment_length: int) -> torch.Tensor:
    """[R, S, 1, 2·L] bool: padding, and the memory of the first segment, which does not exist.

    A segment that would see nothing at all (padding after padding) sees all its keys instead: its scores stay finite,
    and no real token sees what comes of them.
    """
    own = padding_RT.unflatten(1, (-1, segment_length))
    memory = torch.cat((torch.ones_like(own[:, :1]), own[:, :-1]), dim=1)
    hidden = torch.cat((memory, own), dim=2)
    return (hidden & ~hidden.all(dim=2, keepdim=True))[:, :, None]


class _ProjectSegments(torch.autograd.Function):
    """Queries [H, B, S, L, D], keys and values [H, B, S, K, D] of `hidden` [B, T, C]; memory has no gradient to it."""

    @staticmethod
    def forward(ctx, hidden, weight, segments, width, group):
        ctx.save_for_backward(hidden, weight)
        ctx.group = group
        mixed = functional.linear(hidden, weight)
        # Rows of the weight are, for each head, those of the query, the key and the value.
        mixed = mixed.view(hidden.shape[0], segments, -1, mixed.shape[-1] // (3 * width), 3, width)
        query, key, value = mixed.permute(4, 3, 0, 1, 2, 5).unbind(0)
        return query.contiguous(), _after_memory(key), _after_memory(value)

    @staticmethod
    def backward(ctx, query, key, value):
        hidden, weight = ctx.saved_tensors
        heads, rows, segments, length, width = query.shape
        mixed = query.new_empty(rows, segments, length, heads, 3, width)
        parts = mixed.permute(4, 3, 0, 1, 2, 5)
        for part, gradient in zip(parts, (query, key[..., length:, :], value[..., length:, :])):
            part.copy_(gradient)
        flat = mixed.view(-1, weight.shape[0])
        input_gradient = weight_gradient = reduction = None
        if ctx.needs_input_grad[0]:
            input_gradient = flat.mm(weight).view(hidden.shape)
            if ctx.group.size() > 1:  # each process has its own heads
                reduction = distributed.all_reduce(input_gradient, group=ctx.group, async_op=True)
        if ctx.needs_input_grad[1]:
            for part, gradient in zip(parts[1:], (key, value)):
                part[:, :, :-1].add_(gradient[:, :, 1:, :length])
            weight_gradient = flat.t().mm(hidden.reshape(-1, hidden.shape[-1]))
        if reduction is not None:
            reduction.wait()
        return input_gradient, weight_gradient, None, None, None


def _after_memory(own: torch.Tensor) -> torch.Tensor:
    """[H, B, S, L, D] -> [H, B, S, K, D]: each segment's, behind those of the one before; zeros before the first."""
    length = own.shape[3]
    both = own.new_empty(*own.shape[:3], 2 * length, own.shape[4])
    both[:, :, :1, :length].zero_()
    both[:, :, 1:, :length] = own[:, :, :-1]
    both[..., length:, :] = own
    return both


class SegmentQKV(ColumnParallelLinear):
    """Queries, keys and values, sharded by heads: the weight of megatron-core's `linear_qkv`, no bias."""

    def forward(self, hidden_BTC: torch.Tensor, segments: int, width: int) -> tuple[torch.Tensor, ...]:
        """Queries [H, B, S, L, D]; keys and values, after those of the memory, [H, B, S, K, D]."""
        return _ProjectSegments.apply(hidden_BTC, self.weight, segments, width, self.tp_group)


def _by_key(scores_LP: torch.Tensor) -> torch.Tensor:
    """View [..., L, 3·L] by distance -> [..., L, 2·L] by key.

    Query i stands L + i - j before key j, which is column L - i + j: each row begins one column before the last one's.
    """
    length = scores_LP.shape[-2]
    return scores_LP.flatten(-2)[..., length:].unflatten(-1, (length, 3 * length - 1))[..., : 2 * length]


class _RelativeScores(torch.autograd.Function):
    """Scaled scores [H, N, L, K] of queries [H, N, L, D], keys [H, N, K, D] and distances [H, P, D]; -inf if hidden."""

    @staticmethod
    def forward(ctx, query, key, distance, u, v, hidden):
        ctx.save_for_backward(query, key, distance, u, v)
        heads, batch, length, width = query.shape
        by_distance = ((query + v) * width**-0.5).flatten(1, 2).bmm(distance.transpose(1, 2))
        by_key = _by_key(by_distance.view(heads * batch, length, -1))
        content = ((query + u) * width**-0.5).flatten(0, 1)
        scores = torch.baddbmm(by_key, content, key.flatten(0, 1).transpose(1, 2)).view(heads, batch, length, -1)
        return scores.masked_fill_(hidden, float("-inf"))

    @staticmethod
    def backward(ctx, gradient):
        # Hidden scores need no mask here: their probabilities are zero, and with them the softmax's gradient.
        query, key, distance, u, v = ctx.saved_tensors
        heads, batch, length, width = query.shape
        scale = width**-0.5
        gradient = gradient.flatten(0, 1)
        by_distance = gradient.new_zeros(heads * batch, length, distance.shape[1])
        _by_key(by_distance).copy_(gradient)
        by_distance = by_distance.view(heads, batch * length, -1)
        content = ((query + u) * scale).flatten(0, 1)
        key_gradient = gradient.transpose(1, 2).bmm(content).view(key.shape)
        position = ((query + v) * scale).flatten(1, 2)
        distance_gradient = by_distance.transpose(1, 2).bmm(position)
        content = gradient.bmm(key.flatten(0, 1)).mul_(scale).view(query.shape)
        position = by_distance.bmm(distance).mul_(scale).view(query.shape)
        u_gradient, v_gradient = (part.sum(dim=(1, 2), keepdim=True) for part in (content, position))
        return content.add_(position), key_gradient, distance_gradient, u_gradient, v_gradient, None


class RelativeAttention(MegatronModule):
    """The attention without norm or residual; made by TransformerLayer as its `self_attention`."""

    attention_kernel = "torch's matrix products, for relative positions"

    def __init__(
        self, config: TransformerConfig, *, settings: LayerSettings, shape: StackShape, **unused: object
    ) -> None:
        super().__init__(config)
        backend, size = backend_of(settings), shape.hidden_size
        self.width = shape.head_dim
        self.dropout = config.attention_dropout
        self.checkpoint = config.recompute_granularity == "selective"
        self.linear_qkv = SegmentQKV(
            size, 3 * size, config=config, init_method=config.init_method, bias=False, gather_output=False,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )  # fmt: skip
        self.linear_pos = backend.column_linear(config, size, size)
        # One dimension, as biases have: weight decay passes them by.
        self.u = empty_parameter(size // settings.sizes.tp, dtype=settings.dtype)
        self.v = empty_parameter(size // settings.sizes.tp, dtype=settings.dtype)
        self.linear_proj = backend.row_linear(config, size, size)

    def forward(
        self, hidden_BTC: torch.Tensor, *args: object, packed_seq_params: SegmentPlan, **unused: object
    ) -> tuple[torch.Tensor, None]:
        """[B, T, C] -> [B, T, C]."""
        plan = packed_seq_params
        rows, segments = plan.hidden_BS1K.shape[:2]
        query, key, value = self.linear_qkv(hidden_BTC, segments, self.width)
        distance, _ = self.linear_pos(plan.sinusoids_PC)
        distance_HPD = distance.view(distance.shape[0], -1, self.width).transpose(0, 1)
        hidden = plan.hidden_BS1K.flatten(0, 1)
        u, v = (bias.view(-1, 1, 1, self.width) for bias in (self.u, self.v))

        def run(query, key, value, distance, u, v):
            scores = _RelativeScores.apply(query, key, distance, u, v, hidden)
            probabilities = scores.softmax(dim=-1)
            if self.dropout > 0 and self.training:
                with tensor_parallel.get_cuda_rng_tracker().fork():  # each process has its own heads
                    probabilities = functional.dropout(probabilities, self.dropout)
            return probabilities.flatten(0, 1).bmm(value.flatten(0, 1))

        inputs = (*(part.flatten(1, 2) for part in (query, key, value)), distance_HPD, u, v)
        if self.checkpoint and self.training and torch.is_grad_enabled():
            attended = tensor_parallel.checkpoint(run, False, *inputs)
        else:
            attended = run(*inputs)
        attended = attended.view(-1, rows, hidden_BTC.shape[1], self.width).permute(1, 2, 0, 3).flatten(2)
        return self.linear_proj(attended)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Checkpoint entries; u and v are sharded by heads."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        biases = make_sharded_tensors_for_checkpoint(
            {"u": self.u, "v": self.v},
            prefix,
            {"u": 0, "v": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        return {**entries, **biases}


def relative_layer(
    settings: LayerSettings,
    shape: StackShape,
    layer_number: int,
    plan: Callable[[torch.Tensor, ForwardContext], SegmentPlan],
) -> StackLayer:
    """Layer `layer_number` (from 1) of a stack: pre-norm, this attention, MLP. Its weights are not yet filled."""
    backend = backend_of(settings)
    parts = backend.layer_submodules()
    parts = replace(
        parts,
        input_layernorm=backend.NORM,
        self_attention=ModuleSpec(module=RelativeAttention, params={"settings": settings, "shape": shape}),
        # The checkpoint name that the norm of every other stack has.
        sharded_state_dict_keys_map={
            **parts.sharded_state_dict_keys_map, "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        },
    )  # fmt: skip
    layer = StackLayer(layer_config(settings, shape, sharded=False), parts, layer_number, plan)
    heads = shape.num_attention_heads
    describe(
        layer,
        init_std=shape.init_std,
        num_layers=shape.num_layers,
        column={"linear_qkv": heads, "linear_pos": heads, "linear_fc1": None},
        row={"linear_proj": heads, "linear_fc2": None},
    )
    for bias in (layer.self_attention.u, layer.self_attention.v):
        shard(bias, 0)
        bias.init = Init("normal", std=shape.init_std, units=heads)
    return layer


def relative_layer_cost(
    shape: StackShape, rows: int, segments: int, length: int, settings: LayerSettings, *, own_biases: bool
) -> NodeCost:
    """A layer on `rows` × `segments` segments of `length` tokens.

    Args:
        own_biases: u and v count here; they are other layers' too.
    """
    sizes, size, ffn, heads = settings.sizes, shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads
    token = 4 * size * size + 2 * size * ffn
    parameters = token + size * size + ffn + size + 4 * size + (2 * size if own_biases else 0)
    positions = rows * segments * length * sizes.cp  # towers are whole on every context-parallel process
    make, local, batch = StackWork(settings), rows * segments * length, rows * segments
    own, width = make.split(heads, "heads"), shape.head_dim
    attention = (
        make.norm(local, size),
        *make.column(local, size, 3 * size, "queries, keys, values"),
        make.moved(2 * local * 5 * own * width, "queries, keys, values"),  # keys and values again as memory
        *make.column(3 * length, size, size, "relative positions"),
        MatrixProduct(batch * length, 3 * length, width, own, "scores of distances"),
        MatrixProduct(length, 2 * length, width, batch * own, "scores of keys"),
        make.moved(2 * batch * own * length * 2 * length, "softmax"),
        MatrixProduct(length, width, 2 * length, batch * own, "probabilities times values"),
        *make.row(local, size, size, "attention output"),
        make.outside(local, size, 3, "residual"),
    )
    work = attention + mlp_cost(shape, rows, segments * length, settings, sharded=False).work
    # Inputs of both norms and of the linears after them; then, sharded by TP: queries, keys and values with their
    # memory, probabilities, attention output, what the activation reads and gives.
    whole = 4 * size * (copies(sizes, sharded=False) // sizes.cp)
    divided = (1 + 2 + 2 + 1) * size + 2 * length * heads + 2 * ffn
    stored = 2.0 * (positions * (whole + divided) + sizes.cp * 3 * length * size)
    return NodeCost(parameters, work, stored, sizes.tp_cp)
