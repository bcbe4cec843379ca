"""CLIP's vision transformer as nodes (arXiv:2103.00020), and the temporal table that turns frames into video.

`vision.embeddings` → `vision.layers.i` → `vision.temporal`, all on the stream `image_memory` [I, 1 + patches, C]. The
tower is whole on every context-parallel process and is never sequence-parallel: 257 tokens divide by no TP.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import AttentionPlan
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import copies, layer_cost
from megatron_mm.models.layers.elementwise import quick_gelu
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.transformer import stack_layer
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


def image_plan(hidden: torch.Tensor, context: ForwardContext) -> AttentionPlan:
    """Every token of an image sees all of that image."""
    return AttentionPlan(rows=hidden.shape[0])


def vision_shape(tower: VisionTowerConfig, init_std: float) -> StackShape:
    """The tower as a stack of layers."""
    return StackShape(
        num_layers=tower.num_layers,
        hidden_size=tower.hidden_size,
        num_attention_heads=tower.num_attention_heads,
        num_query_groups=tower.num_attention_heads,
        ffn_hidden_size=tower.ffn_hidden_size,
        normalization="LayerNorm",
        norm_epsilon=1e-5,
        activation=quick_gelu,
        init_std=init_std,
    )


def vision_nodes(tower: VisionTowerConfig, settings: LayerSettings, init_std: float) -> list[Node]:
    """Nodes of the tower; the temporal table is trainable even where the tower is frozen."""
    shape = vision_shape(tower, init_std)
    tokens, width = tower.tokens_per_image, tower.hidden_size
    memory = Stream("image_memory", lambda plan: (plan.num_images, tokens, width))

    def embeddings() -> nn.Module:
        return describe(PatchEmbedding(tower, settings, shape), init_std=init_std)

    def temporal() -> nn.Module:
        return describe(TemporalEmbedding(tower, settings), init_std=init_std, constants={"position_embedding": 0.0})

    def embeddings_cost(plan: MicrobatchPlan) -> NodeCost:
        patch = 3 * tower.patch_size**2 * width
        parameters = patch + width + tokens * width + 2 * width
        images = plan.num_images * copies(settings.sizes, sharded=False)  # every process embeds all images
        stored = 2.0 * images * (3 * tower.image_size**2 + 2 * tokens * width)
        return NodeCost(parameters, 2.0 * images * (tokens - 1) * patch, stored)

    def temporal_cost(plan: MicrobatchPlan) -> NodeCost:
        return NodeCost(tower.max_frames * width, 0.0, 0.0)

    learns = not tower.frozen
    nodes = [
        Node("vision.embeddings", embeddings, (), (memory,), embeddings_cost, frozenset({"images_ICHW"}), learns)
    ]
    for index in range(tower.num_layers):
        nodes.append(
            Node(
                f"vision.layers.{index}",
                partial(stack_layer, settings, shape, index + 1, image_plan, sharded=False),
                ("image_memory",),
                (memory,),
                lambda plan: layer_cost(shape, plan.num_images, tokens, settings.sizes, sharded=False),
                trainable=learns,
                recomputable=True,
            )
        )
    nodes.append(
        Node(
            "vision.temporal", temporal, ("image_memory",), (memory,), temporal_cost, frozenset({"image_frames_I"})
        )
    )
    return nodes
