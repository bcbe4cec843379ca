"""What each row of a microbatch sees and hears: an image or a clip, and a sound.

Shape suffixes: R rows, Mv memory positions of a row's vision.
"""

from __future__ import annotations

import torch

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext
from megatron_mm.parts.swin.section import SwinConfig


def vision_length(vision: SwinConfig, plan: MicrobatchPlan) -> int:
    """Mv: positions of a clip where the microbatch has one, else of an image."""
    return vision.tokens_per_clip(plan.clip_frames if plan.num_clips else 1)


def vision_positions(batch: Microbatch, image_tokens: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's positions lie in `vision_memory`, [R·Mv], and which of them exist, [R, Mv] bool.

    Args:
        image_tokens: positions of an image.
        length: Mv, see vision_length.
    """
    plan = batch.plan
    images_R1, at = batch.image_slots_RK[:, :1], torch.arange(length, device=batch.image_slots_RK.device)[None]
    of_image = (images_R1 >= 0) & (at < image_tokens)
    index = images_R1.clamp(min=0) * image_tokens + at.clamp(max=image_tokens - 1)
    if not plan.num_clips:
        return index.flatten(), of_image
    clips_R1 = batch.clip_slots_R[:, None]
    in_clips = plan.num_images * image_tokens + clips_R1.clamp(min=0) * length + at
    return torch.where(clips_R1 >= 0, in_clips, index).flatten(), (clips_R1 >= 0) | of_image


def seen_positions(vision: SwinConfig, batch: Microbatch) -> torch.Tensor:
    """[R, Mv] bool: which positions of each row's vision exist."""
    return vision_positions(batch, vision.tokens_per_clip(1), vision_length(vision, batch.plan))[1]


def has_sound(batch: Microbatch) -> torch.Tensor:
    """[R] bool."""
    return batch.sound_slots_RJ[:, 0] >= 0


def seen_and_heard(batch: Microbatch) -> torch.Tensor:
    """[R] float: 1 where a row has both an image or clip and a sound."""
    seen = batch.image_slots_RK[:, 0] >= 0
    if batch.clip_slots_R is not None:
        seen = seen | (batch.clip_slots_R >= 0)
    return (seen & has_sound(batch)).float()


def read_vision(
    vision: SwinConfig, memory: torch.Tensor, context: ForwardContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, Mv, C] of `vision_memory`, and [R, Mv] bool."""
    index, seen_RM = context.derived(
        vision_positions, vision.tokens_per_clip(1), vision_length(vision, context.batch.plan)
    )
    return memory.index_select(0, index).view(*seen_RM.shape, -1), seen_RM


def read_audio(memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """The sound of each row, [R, N, C]; a row without one reads sound 0."""
    return memory.index_select(0, context.batch.sound_slots_RJ[:, 0].clamp(min=0))
