"""CLIP's vision transformer as nodes (arXiv:2103.00020), and the temporal table that turns frames into video.

`vision.embeddings` → `vision.layers.i` → `vision.temporal`, all on the stream `image_memory` [I, 1 + patches, C]. The
tower is whole on every context-parallel process and is never sequence-parallel: 257 tokens divide by no TP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import whole_plan
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import StackWork, copies
from megatron_mm.models.layers.elementwise import quick_gelu
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import StackLayerKind
from megatron_mm.models.names import CLIP, Entry, norm, plain
from megatron_mm.models.work import MatrixProduct
from megatron_mm.parts.clip.section import VisionTowerConfig


class PatchEmbedding(nn.Module):
    """Patches by a strided convolution, a class token, learned positions, LayerNorm: CLIPVisionEmbeddings."""

    def __init__(self, tower: VisionTowerConfig, settings: LayerSettings, shape: StackShape) -> None:
        super().__init__()
        width, dtype = tower.hidden_size, settings.dtype
        place = {"dtype": dtype, "device": torch.cuda.current_device()}
        self.patch_embedding = nn.utils.skip_init(
            nn.Conv2d, 3, width, tower.patch_size, stride=tower.patch_size, bias=False, **place
        )
        self.class_embedding = empty_parameter(width, dtype=dtype)
        self.position_embedding = empty_parameter(tower.tokens_per_image, width, dtype=dtype)
        self.pre_layernorm = backend_of(settings).norm(layer_config(settings, shape, sharded=False), width)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """[I, 1 + patches, C] of the microbatch's images."""
        images = context.batch.images_ICHW.to(self.class_embedding.dtype)
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        return self.pre_layernorm(torch.cat((first, patches), dim=1) + self.position_embedding)


class TemporalEmbedding(nn.Module):
    """Adds a frame's temporal position to all its tokens, and nothing to a still image."""

    def __init__(self, tower: VisionTowerConfig, settings: LayerSettings) -> None:
        super().__init__()
        self.position_embedding = empty_parameter(tower.max_frames, tower.hidden_size, dtype=settings.dtype)

    def forward(self, image_memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[I, M, C] -> [I, M, C]."""
        frames = context.batch.image_frames_I
        table = functional.embedding(frames.clamp(min=0), self.position_embedding)
        return image_memory + (table * (frames >= 0).to(table.dtype)[:, None])[:, None]


def vision_shape(tower: VisionTowerConfig, init_std: float) -> StackShape:
    """The tower as a stack of layers."""
    return StackShape.of(tower, normalization="LayerNorm", norm_epsilon=1e-5, activation=quick_gelu, init_std=init_std)


@dataclass(frozen=True)
class EmbeddingsKind:
    """Patches, class token and positions of all images; every process embeds all of them."""

    tower: VisionTowerConfig
    settings: LayerSettings
    shape: StackShape

    def build(self) -> nn.Module:
        """The module."""
        return describe(PatchEmbedding(self.tower, self.settings, self.shape), init_std=self.shape.init_std)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """One product of patches, on every process."""
        tower, tokens, width = self.tower, self.tower.tokens_per_image, self.tower.hidden_size
        patch = 3 * tower.patch_size**2 * width
        parameters = patch + width + tokens * width + 2 * width
        images = plan.num_images * copies(self.settings.sizes, sharded=False)
        stored = 2.0 * images * (3 * tower.image_size**2 + 2 * tokens * width)
        make, positions = StackWork(self.settings), plan.num_images * tokens
        work = (
            MatrixProduct(plan.num_images * (tokens - 1), width, 3 * tower.patch_size**2, what="patches"),
            make.moved(2 * positions * width, "class token"),
            make.moved(2 * positions * width, "positions"),
            make.norm(positions, width),
        )
        return NodeCost(parameters, work, stored, self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """CLIP's."""
        tower, width = self.tower, self.tower.hidden_size
        hf, patch = f"{exported}.embeddings", (width, 3, tower.patch_size, tower.patch_size)
        positions = (tower.tokens_per_image, width)
        yield plain(f"{node}.patch_embedding.weight", f"{hf}.patch_embedding.weight", *patch)
        yield plain(f"{node}.class_embedding", f"{hf}.class_embedding", width)
        yield plain(f"{node}.position_embedding", f"{hf}.position_embedding.weight", *positions)
        yield from norm(f"{node}.pre_layernorm", f"{exported}.pre_layrnorm", width, bias=True)


@dataclass(frozen=True)
class TemporalKind:
    """The table of temporal positions."""

    tower: VisionTowerConfig
    settings: LayerSettings
    init_std: float

    def build(self) -> nn.Module:
        """The module; the table begins with zeros."""
        module = TemporalEmbedding(self.tower, self.settings)
        return describe(module, init_std=self.init_std, constants={"position_embedding": 0.0})

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """One addition; a row of the table an image."""
        tower, make = self.tower, StackWork(self.settings)
        added = make.outside(plan.num_images * tower.tokens_per_image, tower.hidden_size, 2, "temporal positions")
        return NodeCost(tower.max_frames * tower.hidden_size, (added,), processes=self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """A name beside CLIP's."""
        sizes = (self.tower.max_frames, self.tower.hidden_size)
        yield plain(f"{node}.position_embedding", f"{exported}.temporal_embedding.weight", *sizes)


def vision_nodes(
    tower: VisionTowerConfig, settings: LayerSettings, init_std: float, exported: str = "vision_tower"
) -> list[Node]:
    """Nodes of the tower; the temporal table is trainable even where the tower is frozen.

    Args:
        exported: the tower's name in the exported model.
    """
    shape = vision_shape(tower, init_std)
    tokens, width, reads = tower.tokens_per_image, tower.hidden_size, ("image_memory",)
    writes = (Stream("image_memory", lambda plan: (plan.num_images, tokens, width)),)

    def sequences(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(plan.num_images, tokens)]

    def layer(index: int) -> Node:
        kind = StackLayerKind(settings, shape, index + 1, whole_plan, sequences, CLIP)
        place = f"{exported}.encoder.layers.{index}"
        options = {"trainable": not tower.frozen, "recomputable": True}
        return Node(f"vision.layers.{index}", kind, reads, writes, place, **options)

    embeddings, fields = EmbeddingsKind(tower, settings, shape), frozenset({"images_ICHW"})
    temporal, frames = TemporalKind(tower, settings, init_std), frozenset({"image_frames_I"})
    return [
        Node("vision.embeddings", embeddings, (), writes, exported, fields, trainable=not tower.frozen),
        *(layer(index) for index in range(tower.num_layers)),
        Node("vision.temporal", temporal, reads, writes, exported, frames),
    ]
