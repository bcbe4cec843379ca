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

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import whole_plan
from megatron_mm.models.layers.costs import StackWork, copies
from megatron_mm.models.layers.final_norm import FinalNormKind
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.models.layers.transformer import StackLayerKind
from megatron_mm.models.names import VIT, Entry, plain
from megatron_mm.models.work import MatrixProduct
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


def vit_shape(part: ViTConfig | MAEConfig, epsilon: float, init_std: float) -> StackShape:
    """The tower, or the MAE decoder, as a stack of layers."""
    return StackShape.of(
        part,
        normalization="LayerNorm",
        norm_epsilon=epsilon,
        activation=functional.gelu,
        init_std=init_std,
    )


@dataclass(frozen=True)
class EmbeddingsKind:
    """Patches of whole images, of their visible patches, or of both, on every process.

    Attributes:
        visible: patches of a masked image; None: none are masked.
    """

    tower: ViTConfig
    settings: LayerSettings
    init_std: float
    full: bool
    visible: int | None

    def build(self) -> nn.Module:
        """The module."""
        return describe(ViTEmbedding(self.tower, self.settings, self.full, self.visible), init_std=self.init_std)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """One product of the patches that are embedded."""
        width, patch = self.tower.hidden_size, 3 * self.tower.patch_size**2
        images = plan.num_images * copies(self.settings.sizes, sharded=False)
        embedded = images * (self.tower.num_patches if self.full else self.visible)
        picked = images * (self.visible or 0)  # their indices, eight bytes each
        make, seen = StackWork(self.settings), self.tower.num_patches if self.full else self.visible
        positions, lengths = plan.num_images * seen, [self.tower.num_patches] if self.full else []
        lengths += [] if self.visible is None else [self.visible]
        work = (
            make.moved(2 * positions * patch, "patches"),
            MatrixProduct(positions, width, patch, what="patches"),
            make.moved(2 * positions * width, "positions"),
            *(make.moved(2 * plan.num_images * (1 + length) * width, "class token") for length in lengths),
        )
        stored = 2.0 * embedded * patch + 8.0 * picked
        return NodeCost((patch + 2) * width, work, stored, self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """ViT-MAE's."""
        hf, width, size = f"{exported}.embeddings", self.tower.hidden_size, self.tower.patch_size
        projection = f"{hf}.patch_embeddings.projection"
        yield plain(f"{node}.class_token", f"{hf}.cls_token", width)
        yield plain(f"{node}.patch_embedding.weight", f"{projection}.weight", width, 3, size, size)
        yield plain(f"{node}.patch_embedding.bias", f"{projection}.bias", width)


def vit_nodes(
    tower: ViTConfig,
    settings: LayerSettings,
    init_std: float,
    exported: str = "vision_tower",
    *,
    full: bool = True,
    masked: MAEConfig | None = None,
) -> list[Node]:
    """Nodes of the tower.

    Args:
        exported: the tower's name in the exported model.
        full: write `image_memory`, of whole images.
        masked: write `masked_memory`, of what this mask ratio leaves visible.

    Raises:
        ValueError: neither is asked for, or the mask ratio leaves no patch visible.
    """
    if not full and masked is None:
        raise ValueError("a vision tower must be applied to whole images (full), to masked images (masked), or to both")
    shape = vit_shape(tower, tower.layernorm_epsilon, init_std)
    patches, width = tower.num_patches, tower.hidden_size
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

    def sequences(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(plan.num_images, length) for length in lengths.values()]

    names, streams = tuple(lengths), tuple(stream(name, length) for name, length in lengths.items())
    learns = not tower.frozen

    def layer(index: int) -> Node:
        kind = StackLayerKind(settings, shape, index + 1, whole_plan, sequences, VIT)
        place = f"{exported}.layers.{index}"
        return Node(f"vision.layers.{index}", kind, names, streams, place, trainable=learns, recomputable=True)

    embeddings = EmbeddingsKind(tower, settings, init_std, full, visible)
    fields = frozenset({"images_ICHW"} | ({"patch_noise_IP"} if visible is not None else set()))
    output = FinalNormKind(settings, shape, sequences)
    return [
        Node("vision.embeddings", embeddings, (), streams, exported, fields, trainable=learns),
        *(layer(index) for index in range(tower.num_layers)),
        Node("vision.output", output, names, streams, f"{exported}.layernorm", trainable=learns),
    ]
