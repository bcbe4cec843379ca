"""What the image-text systems share: one image at most a row, and contrastive embeddings of images and texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megatron_mm.config.towers import ContrastiveConfig
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Loss, Node, NodeCost, Stream
from megatron_mm.models.layers.costs import pooled_head_cost
from megatron_mm.models.layers.pooling import embedding_head, logit_scale
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.objectives.contrastive import contrastive_loss
from megatron_mm.objectives.matching import rows_with_image


def image_of_row(batch: Microbatch) -> torch.Tensor:
    """[R]: the image that a row reads; a row without one names image 0 and is masked elsewhere."""
    return batch.image_slots_RK[:, 0].clamp(min=0)


def row_images(batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The view of cross-attention: image of each row, and whether it has one, all of whose positions it then sees."""
    return image_of_row(batch), batch.image_slots_RK[:, 0] >= 0


def mean_patch(image_memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """Mean of the patches of each row's image, without the class token: [I, 1 + P, C] -> [R, C]."""
    return image_memory[:, 1:].mean(dim=1).index_select(0, image_of_row(context.batch))


def embedding_node(
    name: str,
    reads: str,
    writes: str,
    settings: LayerSettings,
    width: int,
    contrastive: ContrastiveConfig,
    pool: Callable[[torch.Tensor, ForwardContext], torch.Tensor],
    norm: StackShape | None = None,
) -> Node:
    """A node that pools a stream of a width and projects it into the shared space, fp32 [R, E] (see EmbeddingHead)."""
    size = contrastive.embedding_size

    def cost(plan: MicrobatchPlan) -> NodeCost:
        return pooled_head_cost(width, size, plan.num_rows, settings.sizes, norm=norm)

    stream = Stream(writes, lambda plan: (plan.num_rows, size), dtype=torch.float32)
    build = partial(embedding_head, settings, width, size, pool, norm)
    return Node(name, build, (reads,), (stream,), cost)


def scale_node(settings: LayerSettings, contrastive: ContrastiveConfig) -> Node:
    """`contrastive.scale`: writes the learned inverse temperature, fp32 [1]."""
    return Node(
        "contrastive.scale",
        partial(logit_scale, settings, contrastive.temperature, contrastive.max_scale),
        (),
        (Stream("logit_scale", lambda plan: (1,), dtype=torch.float32),),
        lambda plan: NodeCost(1),
    )


def image_text_loss(contrastive: ContrastiveConfig, weight: float) -> Loss:
    """Contrastive loss of `image_embedding` and `text_embedding`, over rows that have an image."""
    return contrastive_loss(
        "contrastive",
        ("image_embedding", "text_embedding", "logit_scale"),
        rows_with_image,
        weight=weight,
        whole_batch=contrastive.negatives == "batch",
    )
