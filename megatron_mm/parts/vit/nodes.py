"""The vision transformer of masked autoencoders as nodes (arXiv:2111.06377), over whole images, masked images, or both.

`vision.embeddings` → `vision.layers.i` → `vision.output` (LayerNorm) write `image_memory` [I, 1 + P, C], which fusion
reads, and `masked_memory` [I, 1 + V, C], which the MAE decoder reads (mae.py). Each node applies the same
weights to both. The masked application embeds and transforms the visible patches only: those whose `patch_noise_IP` is
smallest, in the order of their noise. The tower is whole on every context-parallel process.

Embeddings are plain torch on both backends; layers and norms are the backend's.

Shape suffixes: I images, P patches of an image, V visible patches, M = 1 + P or 1 + V tokens, C width, X pixels of a
patch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import copies, layer_cost
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import stack_layer
from megatron_mm.parts.clip.nodes import image_plan
from megatron_mm.parts.vit.section import MAEConfig, ViTConfig


def patchify(images_ICHW: torch.Tensor, patch_size: int, *, channels_last: bool) -> torch.Tensor:
    """[I, 3, H, W] -> patches [I, P, X] row by row of the image.

    The values of a patch are ordered as in a convolution's weight (channel, row, column), or, `channels_last`, as MAE
    predicts them (row, column, channel).
    """
    images, channels, height, width = images_ICHW.shape
    grid = images_ICHW.reshape(images, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    order = (0, 2, 4, 3, 5, 1) if channels_last else (0, 2, 4, 1, 3, 5)
    return grid.permute(order).flatten(3).flatten(1, 2)


def sine_cosine_positions(grid: int, width: int, device: torch.device | int | str) -> torch.Tensor:
    """MAE's fixed positions [1 + grid², width]: zero for the class token, then for each patch the sines and cosines of
    its column and of its row, a quarter of the width each, over geometrically spaced scales to 10,000."""
    scales = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64, device=device)[:, None] * scales
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)
    table = torch.cat((axis[None].expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)), dim=2).flatten(0, 1)
    return functional.pad(table, (0, 0, 1, 0)).float()


def shuffled_patches(context: ForwardContext) -> torch.Tensor:
    """Patches [I, P] of each image in the order of their noise; a masked application sees the first of them."""
    return context.derived(_shuffled_patches)


def _shuffled_patches(batch: Microbatch) -> torch.Tensor:
    return batch.patch_noise_IP.argsort(dim=1, stable=True)


def pick(values_IPC: torch.Tensor, index_IV: torch.Tensor) -> torch.Tensor:
    """Some patches of each image: [I, P, C] -> [I, V, C].

    `index_select` keeps the indices for its backward pass, where `gather` would keep all the values too.
    """
    images, patches, _ = values_IPC.shape
    first = torch.arange(images, device=index_IV.device)[:, None] * patches
    return values_IPC.flatten(0, 1).index_select(0, (index_IV + first).flatten()).unflatten(0, (images, -1))


class ViTEmbedding(nn.Module):
    """Patches through a linear map (a convolution's weight), fixed positions, a class token."""

    def __init__(self, tower: ViTConfig, settings: LayerSettings, full: bool, visible: int | None) -> None:
        super().__init__()
        width, place = tower.hidden_size, torch.cuda.current_device()
        self.patch_size, self.full, self.visible = tower.patch_size, full, visible
        self.patch_embedding = nn.utils.skip_init(
            nn.Conv2d, 3, width, tower.patch_size, stride=tower.patch_size, dtype=settings.dtype, device=place
        )
        self.class_token = empty_parameter(width, dtype=settings.dtype)
        positions = sine_cosine_positions(tower.image_size // tower.patch_size, width, place)
        self.register_buffer("positions", positions.to(settings.dtype), persistent=False)

    def forward(self, context: ForwardContext) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """[I, 1 + P, C] and [I, 1 + V, C], those that are asked for."""
        weight = self.patch_embedding.weight
        images = context.batch.images_ICHW.to(weight.dtype)
        patches = patchify(images, self.patch_size, channels_last=False)
        positions = self.positions[1:]
        written = []
        if self.full:
            embedded = self._embed(patches) + positions
            written.append(self._with_class_token(embedded))
        if self.visible is not None:
            index = shuffled_patches(context)[:, : self.visible]
            if self.full:
                seen = pick(embedded, index)
            else:
                seen = self._embed(pick(patches, index)) + functional.embedding(index, positions)
            written.append(self._with_class_token(seen))
        return tuple(written) if len(written) > 1 else written[0]

    def _embed(self, patches: torch.Tensor) -> torch.Tensor:
        return functional.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _with_class_token(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.class_token.expand(patches.shape[0], 1, -1), patches), dim=1)  # its position is zero


class ViTOutput(nn.Module):
    """The final LayerNorm."""

    def __init__(self, settings: LayerSettings, shape: StackShape) -> None:
        super().__init__()
        self.final_layernorm = backend_of(settings).norm(
            layer_config(settings, shape, sharded=False), shape.hidden_size
        )

    def forward(self, *inputs: torch.Tensor | ForwardContext) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """(stream, …, context) -> each stream, normalised."""
        written = tuple(self.final_layernorm(stream) for stream in inputs[:-1])
        return written if len(written) > 1 else written[0]


def vit_shape(part: ViTConfig | MAEConfig, epsilon: float, init_std: float) -> StackShape:
    """The tower, or the MAE decoder, as a stack of layers."""
    return StackShape(
        num_layers=part.num_layers,
        hidden_size=part.hidden_size,
        num_attention_heads=part.num_attention_heads,
        num_query_groups=part.num_attention_heads,
        ffn_hidden_size=part.ffn_hidden_size,
        normalization="LayerNorm",
        norm_epsilon=epsilon,
        activation=functional.gelu,
        init_std=init_std,
    )


def vit_nodes(
    tower: ViTConfig, settings: LayerSettings, init_std: float, *, full: bool = True, masked: MAEConfig | None = None
) -> list[Node]:
    """Nodes of the tower.

    Args:
        full: write `image_memory`, of whole images.
        masked: write `masked_memory`, of what this mask ratio leaves visible.

    Raises:
        ValueError: neither is asked for, or the mask ratio leaves no patch visible.
    """
    if not full and masked is None:
        raise ValueError("a vision tower must be applied to whole images (full), to masked images (masked), or to both")
    shape = vit_shape(tower, tower.layernorm_epsilon, init_std)
    patches, width, whole = tower.num_patches, tower.hidden_size, copies(settings.sizes, sharded=False)
    visible = None if masked is None else masked.visible_patches(patches)
    if visible == 0:
        raise ValueError(f"a mask ratio of {masked.mask_ratio} leaves none of an image's {patches} patches visible")
    lengths = {}
    if full:
        lengths["image_memory"] = 1 + patches
    if visible is not None:
        lengths["masked_memory"] = 1 + visible

    def stream(name: str, length: int) -> Stream:
        return Stream(name, lambda plan: (plan.num_images, length, width))

    names, streams = tuple(lengths), tuple(stream(name, length) for name, length in lengths.items())
    tokens = sum(lengths.values())

    def embeddings() -> nn.Module:
        return describe(ViTEmbedding(tower, settings, full, visible), init_std=init_std)

    def output() -> nn.Module:
        return describe(ViTOutput(settings, shape), init_std=init_std)

    def embeddings_cost(plan: MicrobatchPlan) -> NodeCost:
        patch = 3 * tower.patch_size**2
        embedded = plan.num_images * whole * (patches if full else visible)
        picked = plan.num_images * whole * (visible or 0)  # their indices, eight bytes each
        return NodeCost((patch + 2) * width, 2.0 * embedded * patch * width, 2.0 * embedded * patch + 8.0 * picked)

    def layers_cost(plan: MicrobatchPlan) -> NodeCost:
        costs = [
            layer_cost(shape, plan.num_images, length, settings.sizes, sharded=False) for length in lengths.values()
        ]
        return NodeCost(
            costs[0].parameters, sum(cost.forward_flops for cost in costs), sum(c.activation_bytes for c in costs)
        )

    def output_cost(plan: MicrobatchPlan) -> NodeCost:
        return NodeCost(2 * width, 0.0, 2.0 * plan.num_images * tokens * width * whole)

    learns = not tower.frozen
    fields = frozenset({"images_ICHW"} | ({"patch_noise_IP"} if visible is not None else set()))
    nodes = [Node("vision.embeddings", embeddings, (), streams, embeddings_cost, fields, learns)]
    for index in range(tower.num_layers):
        nodes.append(
            Node(
                f"vision.layers.{index}",
                partial(stack_layer, settings, shape, index + 1, image_plan, sharded=False),
                names,
                streams,
                layers_cost,
                trainable=learns,
                recomputable=True,
            )
        )
    nodes.append(Node("vision.output", output, names, streams, output_cost, trainable=learns))
    return nodes
