"""The Conformer block (arXiv:2005.08100) with relative positions as in Transformer-XL (arXiv:1901.02860).

    x + ½ FFN(x)  →  x + attention(x)  →  x + convolution(x)  →  x + ½ FFN(x)  →  LayerNorm

as in Hugging Face's Wav2Vec2Conformer, but for one norm: the convolution module normalises channels (LayerNorm), as
Wav2Vec2-BERT does, where the paper has BatchNorm, whose statistics depend on how a batch is split over processes.

Tensor parallelism shards heads, inner widths of the feed-forward modules and channels of the convolution module: each
sublayer is a column-parallel product, work on its own columns, a row-parallel product. Both backends build the same
modules. Scores with learned relative positions are a bias that needs a gradient, which neither FlashAttention nor
Transformer Engine computes, so attention is plain torch on both.

Shape suffixes: A sounds, L positions of a sound, P = 2L-1 distances, C width, N heads of this process, D width of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, NodeCost
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.channels import ChannelNorm, DepthwiseConvolution, ShardedModule
from megatron_mm.models.layers.costs import StackWork, copies
from megatron_mm.models.layers.parameters import describe, empty_parameter, shard
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.names import Entry, linear, norm, plain, query_key_value
from megatron_mm.models.work import Collective, MatrixProduct, Work


def relative_sinusoids(length: int, width: int, device: torch.device) -> torch.Tensor:
    """Fixed encodings of the distances length-1 … -(length-1) of a key before its query, fp32 [P, width].

    Sines and cosines alternate, of geometrically spaced time scales to 10,000.
    """
    distances = torch.arange(length - 1, -length, -1, dtype=torch.float32, device=device)
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    angles = distances[:, None] * torch.exp(steps * (-math.log(10000.0) / width))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class _RelativeScores(torch.autograd.Function):
    """(q + u)·k + (q + v)·p of each query's own distances, scaled.

    Element (i, j) of the second term is column L-1-i+j of row i of the product with all distances: a strided view of
    it, which is read and, in the backward pass, written in place.
    """

    @staticmethod
    def forward(ctx, query_NALD, key_NALD, positions_NDP, bias_u, bias_v, scale):
        heads, sounds, length, width = query_NALD.shape
        content = (query_NALD + bias_u[:, None, None]).mul_(scale).view(-1, length, width)
        relative = (query_NALD + bias_v[:, None, None]).mul_(scale).view(heads, -1, width)
        key = key_NALD.reshape(-1, length, width)
        ctx.save_for_backward(content, relative, key, positions_NDP)
        ctx.scale = scale
        scores = torch.baddbmm(_own_distances(relative.bmm(positions_NDP), length), content, key.mT)
        return scores.view(heads, sounds, length, length)

    @staticmethod
    def backward(ctx, gradient):
        content, relative, key, positions = ctx.saved_tensors
        heads, sounds, length, _ = gradient.shape
        gradient = gradient.reshape(-1, length, length)
        product = gradient.new_zeros(heads, sounds * length, 2 * length - 1)
        _own_distances(product, length).copy_(gradient)
        shape = (heads, sounds, length, -1)
        content_gradient = gradient.bmm(key).mul_(ctx.scale).view(shape)
        relative_gradient = product.bmm(positions.mT).mul_(ctx.scale).view(shape)
        key_gradient = gradient.mT.bmm(content).view(shape)
        return (
            content_gradient + relative_gradient,
            key_gradient,
            relative.mT.bmm(product),
            content_gradient.sum(dim=(1, 2)),
            relative_gradient.sum(dim=(1, 2)),
            None,
        )


def _own_distances(product: torch.Tensor, length: int) -> torch.Tensor:
    """[N, A·L, P], contiguous -> the view [N·A, L, L] of each query's distances to all keys."""
    batches = product.numel() // (length * (2 * length - 1))
    strides = (length * (2 * length - 1), 2 * length - 2, 1)
    return product.as_strided((batches, length, length), strides, product.storage_offset() + length - 1)


class RelativeAttention(ShardedModule):
    """Self-attention of all positions of a sound, its padding included, with learned biases u and v of each head."""

    attention_kernel = "torch's matrix products, for relative positions"

    def __init__(self, config: TransformerConfig, backend: ModuleType, shape: StackShape) -> None:
        super().__init__(config)
        hidden, self.width = shape.hidden_size, shape.head_dim
        inner = shape.num_attention_heads * self.width
        heads = shape.num_attention_heads // config.tensor_model_parallel_size
        self.linear_qkv = backend.column_linear(config, hidden, 3 * inner, bias=True)
        self.linear_pos = backend.column_linear(config, hidden, inner)
        self.pos_bias_u = empty_parameter(heads, self.width, dtype=config.params_dtype)
        self.pos_bias_v = empty_parameter(heads, self.width, dtype=config.params_dtype)
        self.linear_proj = backend.row_linear(config, inner, hidden, bias=True)
        self.recompute = config.recompute_granularity == "selective"

    def forward(self, hidden_ALC: torch.Tensor, positions_PC: torch.Tensor) -> torch.Tensor:
        """[A, L, C], [P, C] -> [A, L, C]."""
        mixed = self.linear_qkv(hidden_ALC)[0].unflatten(-1, (-1, 3, self.width))
        query_NALD, key_NALD, value_NALD = mixed.permute(3, 2, 0, 1, 4).contiguous().unbind(0)
        # The table is a constant: past the module, whose backward pass would sum its gradient over processes.
        projected = functional.linear(positions_PC, self.linear_pos.weight)
        positions_NDP = projected.unflatten(-1, (-1, self.width)).permute(1, 2, 0)
        inputs = (query_NALD, key_NALD, value_NALD, positions_NDP, self.pos_bias_u, self.pos_bias_v)
        if self.recompute and self.training and torch.is_grad_enabled():
            attended_NALD = tensor_parallel.checkpoint(self._attend, False, *inputs)
        else:
            attended_NALD = self._attend(*inputs)
        return self.linear_proj(attended_NALD.permute(1, 2, 0, 3).flatten(2))[0]

    def _attend(self, query_NALD, key_NALD, value_NALD, positions_NDP, bias_u, bias_v):
        scale = self.width**-0.5
        scores = _RelativeScores.apply(query_NALD, key_NALD, positions_NDP, bias_u, bias_v, scale)
        probabilities = scores.softmax(dim=-1)
        if self.training and self.config.attention_dropout > 0:
            with tensor_parallel.get_cuda_rng_tracker().fork():  # heads differ between tensor-parallel processes
                probabilities = functional.dropout(probabilities, self.config.attention_dropout)
        return probabilities @ value_NALD


class FeedForward(MegatronModule):
    """Two linear layers with swish between them."""

    def __init__(self, config: TransformerConfig, backend: ModuleType, shape: StackShape) -> None:
        super().__init__(config)
        self.linear_fc1 = backend.column_linear(config, shape.hidden_size, shape.ffn_hidden_size, bias=True)
        self.linear_fc2 = backend.row_linear(config, shape.ffn_hidden_size, shape.hidden_size, bias=True)

    def forward(self, hidden_ALC: torch.Tensor) -> torch.Tensor:
        """[A, L, C] -> [A, L, C]."""
        return self.linear_fc2(functional.silu(self.linear_fc1(hidden_ALC)[0]))[0]


class ConvolutionModule(MegatronModule):
    """Pointwise convolution to twice the channels, GLU, depthwise convolution, LayerNorm, swish, pointwise convolution.

    Each process has the same channels of both halves of the first convolution, value and gate.
    """

    def __init__(self, config: TransformerConfig, backend: ModuleType, shape: StackShape, kernel_size: int) -> None:
        super().__init__(config)
        hidden = shape.hidden_size
        self.pointwise_conv1 = backend.column_linear(config, hidden, 2 * hidden)
        self.depthwise_conv = DepthwiseConvolution(config, hidden, kernel_size)
        self.depthwise_layernorm = ChannelNorm(config, hidden)
        self.pointwise_conv2 = backend.row_linear(config, hidden, hidden)

    def forward(self, hidden_ALC: torch.Tensor) -> torch.Tensor:
        """[A, L, C] -> [A, L, C]."""
        gated = functional.glu(self.pointwise_conv1(hidden_ALC)[0], dim=-1)
        convolved = self.depthwise_layernorm(self.depthwise_conv(gated))
        return self.pointwise_conv2(functional.silu(convolved))[0]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Checkpoint entries; value and gate of all processes follow one another there."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        key = f"{prefix}pointwise_conv1.weight"
        single = (metadata or {}).get("singleton_local_shards", False)
        entries[key] = apply_swiglu_sharded_factory(entries[key], sharded_offsets, single)
        return entries


class ConformerLayer(MegatronModule):
    """One block; a pure function of its stream."""

    def __init__(self, settings: LayerSettings, shape: StackShape, kernel_size: int) -> None:
        config, backend = layer_config(settings, shape, sharded=False), backend_of(settings)
        super().__init__(config)
        self.ffn1_layernorm = backend.norm(config, shape.hidden_size)
        self.ffn1 = FeedForward(config, backend, shape)
        self.attention_layernorm = backend.norm(config, shape.hidden_size)
        self.self_attention = RelativeAttention(config, backend, shape)
        self.convolution_layernorm = backend.norm(config, shape.hidden_size)
        self.convolution = ConvolutionModule(config, backend, shape, kernel_size)
        self.ffn2_layernorm = backend.norm(config, shape.hidden_size)
        self.ffn2 = FeedForward(config, backend, shape)
        self.final_layernorm = backend.norm(config, shape.hidden_size)

    def forward(self, hidden_ALC: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[A, L, C] -> [A, L, C]."""
        hidden = hidden_ALC
        hidden = torch.add(hidden, self._drop(self.ffn1(self.ffn1_layernorm(hidden))), alpha=0.5)
        positions = relative_positions(hidden, context)
        hidden = hidden + self._drop(self.self_attention(self.attention_layernorm(hidden), positions))
        hidden = hidden + self._drop(self.convolution(self.convolution_layernorm(hidden)))
        hidden = torch.add(hidden, self._drop(self.ffn2(self.ffn2_layernorm(hidden))), alpha=0.5)
        return self.final_layernorm(hidden)

    def _drop(self, update: torch.Tensor) -> torch.Tensor:
        return functional.dropout(update, self.config.hidden_dropout, self.training)


def relative_positions(hidden_ALC: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """The table of distances [P, C], made once per microbatch and chunk."""
    _, length, width = hidden_ALC.shape
    return context.derived(_relative_positions, length, width, hidden_ALC.device, hidden_ALC.dtype)


def _relative_positions(
    batch: Microbatch, length: int, width: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    return relative_sinusoids(length, width, device).to(dtype)


def conformer_layer(settings: LayerSettings, shape: StackShape, kernel_size: int) -> ConformerLayer:
    """A block, its weights not yet filled."""
    heads = shape.num_attention_heads
    layer = describe(
        ConformerLayer(settings, shape, kernel_size),
        init_std=shape.init_std,
        num_layers=shape.num_layers,
        column={
            "linear_fc1": None,
            "linear_qkv": heads,
            "linear_pos": heads,
            "self_attention": heads,  # its own parameters: u and v
            "pointwise_conv1": None,
            "depthwise_conv": None,
        },
        row={"linear_fc2": None, "linear_proj": heads, "pointwise_conv2": None},
        gated=("pointwise_conv1",),
    )
    for parameter in layer.convolution.depthwise_layernorm.parameters():
        shard(parameter, 0)
    return layer


def conformer_cost(
    shape: StackShape, kernel_size: int, sounds: int, length: int, settings: LayerSettings
) -> NodeCost:
    """A block on `sounds` × `length` positions; see `costs` for what is counted."""
    sizes, hidden, ffn, heads = settings.sizes, shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads
    distances = 2 * length - 1
    # Feed-forward twice, q k v and output, both pointwise convolutions (one of double width), depthwise.
    products = 4 * hidden * ffn + 4 * hidden**2 + 3 * hidden**2 + kernel_size * hidden
    biases = 2 * (ffn + hidden) + 4 * hidden + 2 * hidden  # u and v are the last
    norms = 2 * 6 * hidden
    positions = sounds * length * sizes.cp
    # Inputs of five norms, and of the linears after four of them.
    whole = 9 * hidden * (copies(sizes, sharded=False) // sizes.cp)
    # Before and after swish, twice; q with either bias, k, v, attention output; in the convolution module: value and
    # gate, then what each of the four operations reads.
    divided = 4 * ffn + 5 * hidden + 6 * hidden
    probabilities = 0 if settings.recompute == "selective" else heads * length
    stored = 2.0 * (positions * (whole + divided + probabilities) + sizes.cp * distances * hidden)
    work = tuple(_conformer_work(shape, kernel_size, sounds, length, settings))
    return NodeCost(products + hidden**2 + biases + norms, work, stored, sizes.tp_cp)


def _conformer_work(
    shape: StackShape, kernel_size: int, sounds: int, length: int, settings: LayerSettings
) -> Iterator[Work]:
    make, hidden, ffn, width = StackWork(settings), shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    local, distances = sounds * length, 2 * length - 1
    heads, channels = make.split(shape.num_attention_heads, "heads"), make.split(hidden, "channels")
    for name in ("ffn1", "ffn2"):
        yield make.norm(local, hidden)
        yield from make.column(local, hidden, ffn, f"{name} fc1")
        yield make.moved(2 * local * make.split(ffn, "inner width"), "activation")
        yield from make.row(local, ffn, hidden, f"{name} fc2")
        yield make.outside(local, hidden, 3, "residual")
    yield make.norm(local, hidden)
    yield from make.column(local, hidden, 3 * hidden, "queries, keys, values")
    yield make.moved(2 * local * 3 * channels, "queries, keys, values")
    yield MatrixProduct(distances, channels, hidden, what="relative positions")  # of a constant, which has no gradient
    yield MatrixProduct(local, distances, width, heads, "scores of distances")
    yield MatrixProduct(length, length, width, sounds * heads, "scores of keys")
    yield make.moved(2 * sounds * heads * length * length, "softmax")
    yield MatrixProduct(length, width, length, sounds * heads, "probabilities times values")
    yield from make.row(local, hidden, hidden, "attention output")
    yield make.outside(local, hidden, 3, "residual")
    yield make.norm(local, hidden)
    yield from make.column(local, hidden, 2 * hidden, "pointwise convolution 1")
    yield make.moved(3 * local * channels, "gate")
    yield MatrixProduct(local, 1, kernel_size, channels, "depthwise convolution")
    yield make.moved(2 * local * channels, "norm")
    if settings.sizes.tp > 1:  # means and variances of each process's channels, in fp32 (layers/channels.py)
        yield Collective("all_gather", "tp", 4 * 2 * local * settings.sizes.tp, what="norm of channels")
        yield Collective("all_reduce", "tp", 4 * 2 * local, runs="dgrad", what="norm of channels")
    yield make.moved(2 * local * channels, "activation")
    yield from make.row(local, hidden, hidden, "pointwise convolution 2")
    yield make.outside(local, hidden, 3, "residual")
    yield make.norm(local, hidden)


@dataclass(frozen=True)
class ConformerLayerKind:
    """A block.

    Attributes:
        length: positions of a sound.
    """

    settings: LayerSettings
    shape: StackShape
    kernel_size: int
    length: int

    def build(self) -> ConformerLayer:
        """The block."""
        return conformer_layer(self.settings, self.shape, self.kernel_size)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Of all sounds."""
        return conformer_cost(self.shape, self.kernel_size, plan.num_sounds, self.length, self.settings)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Wav2Vec2-Conformer's."""
        size, heads, ffn = self.shape.hidden_size, self.shape.num_attention_heads, self.shape.ffn_hidden_size
        width = size // heads
        yield from _feed_forward_names(node, exported, "ffn1", size, ffn)
        yield from norm(f"{node}.attention_layernorm", f"{exported}.self_attn_layer_norm", size, bias=True)
        attention, hf = f"{node}.self_attention", f"{exported}.self_attn"
        names = (f"{hf}.linear_q", f"{hf}.linear_k", f"{hf}.linear_v")
        yield from query_key_value(f"{attention}.linear_qkv", names, heads, width, size)
        yield from linear(f"{attention}.linear_pos", f"{hf}.linear_pos", size, size, bias=False)
        for name in ("pos_bias_u", "pos_bias_v"):
            yield plain(f"{attention}.{name}", f"{hf}.{name}", heads, width)
        yield from linear(f"{attention}.linear_proj", f"{hf}.linear_out", size, size)
        convolution, hf = f"{node}.convolution", f"{exported}.conv_module"
        yield from norm(f"{node}.convolution_layernorm", f"{hf}.layer_norm", size, bias=True)
        yield from linear(f"{convolution}.pointwise_conv1", f"{hf}.pointwise_conv1", 2 * size, size, bias=False)
        depthwise = (size, 1, self.kernel_size)
        yield plain(f"{convolution}.depthwise_conv.weight", f"{hf}.depthwise_conv.weight", *depthwise)
        yield from norm(f"{convolution}.depthwise_layernorm", f"{hf}.depthwise_layer_norm", size, bias=True)
        yield from linear(f"{convolution}.pointwise_conv2", f"{hf}.pointwise_conv2", size, size, bias=False)
        yield from _feed_forward_names(node, exported, "ffn2", size, ffn)
        yield from norm(f"{node}.final_layernorm", f"{exported}.final_layer_norm", size, bias=True)


def _feed_forward_names(ours: str, theirs: str, name: str, size: int, ffn: int) -> Iterator[Entry]:
    yield from norm(f"{ours}.{name}_layernorm", f"{theirs}.{name}_layer_norm", size, bias=True)
    yield from linear(f"{ours}.{name}.linear_fc1", f"{theirs}.{name}.intermediate_dense", ffn, size)
    yield from linear(f"{ours}.{name}.linear_fc2", f"{theirs}.{name}.output_dense", size, ffn)
