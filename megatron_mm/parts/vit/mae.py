"""The light decoder of masked autoencoders as nodes (arXiv:2111.06377), dropped once the tower has learned.

`mae.embeddings` takes `masked_memory` [I, 1 + V, C] to the decoder's width, puts a mask token where a patch was hidden
and adds fixed positions; `mae.layers.i` are transformer layers on all patches; `mae.output` predicts their pixels,
`mae_prediction` [I, P, X], for the loss (objectives/mae.py). Like the tower it is whole on every context-parallel
process; its first and last linear maps are also whole on every tensor-parallel one, because they are small.

Shape suffixes as in nodes.py; D is the decoder's width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import whole_plan
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import StackWork, copies
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import StackLayerKind
from megatron_mm.models.names import VIT, Entry, linear, norm, plain
from megatron_mm.models.work import MatrixProduct
from megatron_mm.parts.vit.nodes import shuffled_patches, sine_cosine_positions, vit_shape
from megatron_mm.parts.vit.section import MAEConfig, ViTConfig


def _linear(inputs: int, outputs: int, settings: LayerSettings) -> nn.Module:
    return nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=settings.dtype, device=torch.cuda.current_device())


class MAEEmbedding(nn.Module):
    """Visible patches at their places, mask tokens at the others, positions."""

    def __init__(self, tower: ViTConfig, mae: MAEConfig, settings: LayerSettings) -> None:
        super().__init__()
        self.linear = _linear(tower.hidden_size, mae.hidden_size, settings)
        self.mask_token = empty_parameter(mae.hidden_size, dtype=settings.dtype)
        grid = tower.image_size // tower.patch_size
        positions = sine_cosine_positions(grid, mae.hidden_size, torch.cuda.current_device())
        self.register_buffer("positions", positions.to(settings.dtype), persistent=False)

    def forward(self, masked_memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[I, 1 + V, C] -> [I, 1 + P, D]."""
        hidden = self.linear(masked_memory)
        images, tokens, width = hidden.shape
        index_IV = shuffled_patches(context)[:, : tokens - 1, None].expand(-1, -1, width)
        masks = self.mask_token.expand(images, self.positions.shape[0] - 1, -1)
        return torch.cat((hidden[:, :1], masks.scatter(1, index_IV, hidden[:, 1:])), dim=1) + self.positions


class MAEOutput(nn.Module):
    """LayerNorm and the pixels of every patch; the class token is dropped."""

    def __init__(self, tower: ViTConfig, settings: LayerSettings, shape: StackShape) -> None:
        super().__init__()
        self.final_layernorm = backend_of(settings).norm(
            layer_config(settings, shape, sharded=False), shape.hidden_size
        )
        self.linear = _linear(shape.hidden_size, 3 * tower.patch_size**2, settings)

    def forward(self, mae_hidden: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[I, 1 + P, D] -> [I, P, X]."""
        return self.linear(self.final_layernorm(mae_hidden[:, 1:]))


@dataclass(frozen=True)
class EmbeddingsKind:
    """What the decoder reads, on every process."""

    tower: ViTConfig
    mae: MAEConfig
    settings: LayerSettings
    init_std: float

    def build(self) -> nn.Module:
        """The module."""
        return describe(MAEEmbedding(self.tower, self.mae, self.settings), init_std=self.init_std)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """A product of the visible patches and the class token."""
        inputs, width = self.tower.hidden_size, self.mae.hidden_size
        images = plan.num_images * copies(self.settings.sizes, sharded=False)
        visible = self.mae.visible_patches(self.tower.num_patches)
        tokens, matrix = images * (1 + visible), inputs * width
        make, positions = StackWork(self.settings), plan.num_images * (1 + self.tower.num_patches)
        work = (
            MatrixProduct(plan.num_images * (1 + visible), width, inputs, what="projection"),
            make.moved(2 * positions * width, "mask tokens", count=2),
            make.moved(2 * positions * width, "positions"),
        )
        stored = 2.0 * tokens * inputs + 8.0 * images * visible
        return NodeCost(matrix + 2 * width, work, stored, self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """ViT-MAE's."""
        width = self.mae.hidden_size
        yield plain(f"{node}.mask_token", f"{exported}.mask_token", width)
        yield from linear(f"{node}.linear", f"{exported}.decoder_embed", width, self.tower.hidden_size)


@dataclass(frozen=True)
class OutputKind:
    """Norm and pixels, on every process."""

    tower: ViTConfig
    settings: LayerSettings
    shape: StackShape

    @property
    def pixels(self) -> int:
        """Values of a patch."""
        return 3 * self.tower.patch_size**2

    def build(self) -> nn.Module:
        """The module."""
        return describe(MAEOutput(self.tower, self.settings, self.shape), init_std=self.shape.init_std)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """What is kept are the inputs of the norm and of the linear layer, and the loss's error in fp32."""
        width, pixels = self.shape.hidden_size, self.pixels
        tokens = plan.num_images * copies(self.settings.sizes, sharded=False) * self.tower.num_patches
        matrix = width * pixels
        positions = plan.num_images * self.tower.num_patches
        norm_work = StackWork(self.settings).norm(positions, width)
        work = (norm_work, MatrixProduct(positions, pixels, width, what="pixels"))
        stored = tokens * (4.0 * width + 4.0 * pixels)
        return NodeCost(matrix + pixels + 2 * width, work, stored, self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """ViT-MAE's."""
        yield from norm(f"{node}.final_layernorm", f"{exported}.decoder_norm", self.shape.hidden_size, bias=True)
        yield from linear(f"{node}.linear", f"{exported}.decoder_pred", self.pixels, self.shape.hidden_size)


def mae_nodes(
    tower: ViTConfig, mae: MAEConfig, settings: LayerSettings, init_std: float, exported: str = "mae_decoder"
) -> list[Node]:
    """Nodes of the decoder; LayerNorms have the tower's epsilon.

    Args:
        exported: the decoder's name in the exported model.
    """
    shape = vit_shape(mae, tower.layernorm_epsilon, init_std)
    patches, width = tower.num_patches, mae.hidden_size
    output = OutputKind(tower, settings, shape)
    hidden = Stream("mae_hidden", lambda plan: (plan.num_images, 1 + patches, width))
    prediction = Stream("mae_prediction", lambda plan: (plan.num_images, patches, output.pixels))

    def sequences(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(plan.num_images, 1 + patches)]

    def layer(index: int) -> Node:
        kind = StackLayerKind(settings, shape, index + 1, whole_plan, sequences, VIT)
        place = f"{exported}.decoder_layers.{index}"
        return Node(f"mae.layers.{index}", kind, ("mae_hidden",), (hidden,), place, recomputable=True)

    embeddings, fields = EmbeddingsKind(tower, mae, settings, init_std), frozenset({"patch_noise_IP"})
    return [
        Node("mae.embeddings", embeddings, ("masked_memory",), (hidden,), exported, fields),
        *(layer(index) for index in range(mae.num_layers)),
        Node("mae.output", output, ("mae_hidden",), (prediction,), exported),
    ]
