"""Which image a row of one document reads, and what of its memory."""

from __future__ import annotations

import torch

from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext


def image_of_row(batch: Microbatch) -> torch.Tensor:
    """[R]: the image that a row reads; a row without one names image 0 and is masked elsewhere."""
    return batch.image_slots_RK[:, 0].clamp(min=0)


def rows_with_image(batch: Microbatch) -> torch.Tensor:
    """[R] float: 1 where a row has an image."""
    return (batch.image_slots_RK[:, 0] >= 0).float()


def row_images(batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The view of cross-attention: image of each row, and whether it has one, all of whose positions it then sees."""
    return image_of_row(batch), batch.image_slots_RK[:, 0] >= 0


def mean_patch(image_memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """Mean of the patches of each row's image, without the class token: [I, 1 + P, C] -> [R, C]."""
    return image_memory[:, 1:].mean(dim=1).index_select(0, image_of_row(context.batch))
