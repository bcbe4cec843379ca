"""A Conformer on the raw waveform as nodes: sounds of fixed length to the stream `audio_memory`.

`audio.front` (wav2vec 2.0's strided convolutions, arXiv:2006.11477, and a projection) → `audio.layers.i` (Conformer
blocks, see models/layers/conformer.py) → `audio.output` (LayerNorm), on [A, tokens_per_sound, C]. The front end is the
variant of wav2vec 2.0's larger models: convolutions with biases, LayerNorm over channels after each, so nothing depends
on other samples. Activations are GELU there and swish in the blocks, as in the published Wav2Vec2-Conformer models. The
tower is whole on every context-parallel process; its blocks are tensor-parallel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.initialization import Init
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.conformer import ConformerLayerKind
from megatron_mm.models.layers.costs import StackWork, copies
from megatron_mm.models.layers.final_norm import FinalNormKind
from megatron_mm.models.layers.parameters import describe
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.names import Entry, linear, norm, plain
from megatron_mm.models.work import MatrixProduct
from megatron_mm.parts.conformer.section import ConformerConfig


class StridedConvolution(nn.Module):
    """A strided convolution with bias, LayerNorm over its channels, GELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": torch.cuda.current_device()}
        self.stride = stride
        self.convolution = nn.utils.skip_init(nn.Conv1d, inputs, outputs, kernel, stride=stride, **place)
        self.layernorm = nn.utils.skip_init(nn.LayerNorm, outputs, eps=eps, **place)

    def forward(self, hidden_ALC: torch.Tensor) -> torch.Tensor:
        """[A, L, C] -> [A, L', C']."""
        # As an image of height 1 and width L with channels last, so that the norm reads what the convolution wrote.
        image = hidden_ALC.unsqueeze(1).permute(0, 3, 1, 2)
        weight = self.convolution.weight.unsqueeze(2)
        convolved = functional.conv2d(image, weight, self.convolution.bias, stride=(1, self.stride))
        return functional.gelu(self.layernorm(convolved.permute(0, 2, 3, 1).squeeze(1)))


class WaveformFront(nn.Module):
    """Convolutions over the waveform, LayerNorm, projection to the tower's width."""

    def __init__(self, tower: ConformerConfig, settings: LayerSettings, shape: StackShape) -> None:
        super().__init__()
        channels, dtype, eps = tower.front_channels, settings.dtype, tower.layernorm_epsilon
        inputs = [1] + [channels] * (len(tower.front_kernels) - 1)
        self.convolutions = nn.ModuleList(
            StridedConvolution(width, channels, kernel, stride, eps, dtype)
            for width, kernel, stride in zip(inputs, tower.front_kernels, tower.front_strides, strict=True)
        )
        self.projection_layernorm = backend_of(settings).norm(layer_config(settings, shape, sharded=False), channels)
        place = {"dtype": dtype, "device": torch.cuda.current_device()}
        self.projection = nn.utils.skip_init(nn.Linear, channels, tower.hidden_size, **place)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """[A, tokens_per_sound, C] of the microbatch's sounds."""
        hidden = context.batch.waveforms_AN.to(self.projection.weight.dtype).unsqueeze(-1)
        for convolution in self.convolutions:
            hidden = convolution(hidden)
        return self.projection(self.projection_layernorm(hidden))


def conformer_shape(tower: ConformerConfig, init_std: float) -> StackShape:
    """The tower as a stack of layers."""
    return StackShape.of(
        tower,
        normalization="LayerNorm",
        norm_epsilon=tower.layernorm_epsilon,
        activation=functional.silu,
        init_std=init_std,
    )


@dataclass(frozen=True)
class FrontKind:
    """Every tensor- and context-parallel process runs the front end on all sounds."""

    tower: ConformerConfig
    settings: LayerSettings
    shape: StackShape

    def build(self) -> nn.Module:
        """The module."""
        module = describe(WaveformFront(self.tower, self.settings, self.shape), init_std=self.shape.init_std)
        # Silence, which pads every sound, would pass convolutions without bias as exact zeros, and the gradient of each
        # norm at zero is 1/sqrt(eps): 1e12 through four of them.
        for layer in module.convolutions:
            layer.convolution.bias.init = Init("normal", std=self.shape.init_std)
        return module

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """Convolutions and projection."""
        tower = self.tower
        width, hidden, length = tower.front_channels, tower.hidden_size, tower.num_samples
        make, work = StackWork(self.settings), []
        parameters, stored, inputs = 0, length, 1
        for kernel, stride in zip(tower.front_kernels, tower.front_strides):
            length = (length - kernel) // stride + 1
            parameters += kernel * inputs * width + 3 * width
            positions = plan.num_sounds * length
            work.append(MatrixProduct(positions, width, kernel * inputs, what="convolution"))
            work += [make.norm(positions, width), make.moved(2 * positions * width, "activation")]
            stored += 3 * length * width  # inputs of the norm, of GELU, and of the next convolution or norm
            inputs = width
        parameters += 2 * width + width * hidden + hidden
        positions = plan.num_sounds * length
        work += [make.norm(positions, width), MatrixProduct(positions, hidden, width, what="projection")]
        stored += length * width  # input of the projection
        sounds = plan.num_sounds * copies(self.settings.sizes, sharded=False)
        return NodeCost(parameters, tuple(work), 2.0 * sounds * stored, self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Wav2Vec2-Conformer's."""
        channels = self.tower.front_channels
        for i, kernel in enumerate(self.tower.front_kernels):
            ours, theirs = f"{node}.convolutions.{i}", f"{exported}.feature_extractor.conv_layers.{i}"
            yield plain(f"{ours}.convolution.weight", f"{theirs}.conv.weight", channels, channels if i else 1, kernel)
            yield plain(f"{ours}.convolution.bias", f"{theirs}.conv.bias", channels)
            yield from norm(f"{ours}.layernorm", f"{theirs}.layer_norm", channels, bias=True)
        projection = f"{exported}.feature_projection"
        yield from norm(f"{node}.projection_layernorm", f"{projection}.layer_norm", channels, bias=True)
        yield from linear(f"{node}.projection", f"{projection}.projection", self.tower.hidden_size, channels)


def conformer_nodes(
    tower: ConformerConfig, settings: LayerSettings, init_std: float, exported: str = "audio_tower"
) -> list[Node]:
    """Nodes of the tower.

    Args:
        exported: the tower's name in the exported model.
    """
    shape = conformer_shape(tower, init_std)
    tokens, width, reads = tower.tokens_per_sound, tower.hidden_size, ("audio_memory",)
    writes, learns = (Stream("audio_memory", lambda plan: (plan.num_sounds, tokens, width)),), not tower.frozen

    def sequences(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(plan.num_sounds, tokens)]

    def layer(index: int) -> Node:
        kind = ConformerLayerKind(settings, shape, tower.conv_kernel_size, tokens)
        place = f"{exported}.encoder.layers.{index}"
        return Node(f"audio.layers.{index}", kind, reads, writes, place, trainable=learns, recomputable=True)

    front, fields = FrontKind(tower, settings, shape), frozenset({"waveforms_AN"})
    output = FinalNormKind(settings, shape, sequences)
    return [
        Node("audio.front", front, (), writes, exported, fields, trainable=learns),
        *(layer(index) for index in range(tower.num_layers)),
        Node("audio.output", output, reads, writes, f"{exported}.encoder.layer_norm", trainable=learns),
    ]
