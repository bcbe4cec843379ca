"""The local backend's attention of text to media: each row sees the media of its slots, all of them, under a mask.

Shape suffixes are those of cross_attention.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.layers.attention import AttentionPlan, CoreAttention
from megatron_mm.models.layers.sharding import local_text


@dataclass(frozen=True)
class SlotKeys:
    """Keys of the local core: the media of each row's slots, all of them, under a mask.

    Attributes:
        index: for each memory [R·K] media of the slots; an empty slot names medium 0 and is hidden.
        plan: its mask [R, 1, L, E] is zero where nothing is visible, so that softmax stays finite.
    """

    index: tuple[torch.Tensor, ...]
    plan: AttentionPlan


def seen_slots(batch: Microbatch, lists: tuple[str, ...]) -> torch.Tensor:
    """[R, L, K + …]: whether a token's document owns a slot, list after list (`Microbatch.slots`)."""
    slots_R1K = torch.cat([batch.slots(name)[1] for name in lists], dim=1)[:, None]
    return local_text(batch.document_ids_RT)[:, :, None] == slots_R1K  # an empty slot is -2, padding -1: never equal


class MediaAttention(CoreAttention):
    """The local core: each row attends to the media of its slots under a mask."""

    @staticmethod
    def keys(
        batch: Microbatch, media: tuple[tuple[str, int], ...], dtype: torch.dtype, cp_size: int, cp_rank: int
    ) -> SlotKeys:
        """The part of a cross plan that this core needs.

        Args:
            media: of each memory the list that it is of, and positions of one.
        """
        lists = tuple(name for name, _ in media)
        seen_RLK = seen_slots(batch, lists)
        hidden_RLK = ~seen_RLK & seen_RLK.any(dim=-1, keepdim=True)
        mask_RLK = torch.zeros(hidden_RLK.shape, dtype=dtype, device=hidden_RLK.device)
        mask_RLK = mask_RLK.masked_fill(hidden_RLK, float("-inf"))
        masks = mask_RLK.split([batch.plan.slots(name) for name in lists], dim=-1)
        mask_RLE = torch.cat([_repeat(mask, tokens) for mask, (_, tokens) in zip(masks, media)], dim=-1)
        return SlotKeys(
            tuple(batch.slots(name)[0].clamp(min=0).flatten() for name in lists),
            AttentionPlan(batch.plan.num_rows, mask=mask_RLE[:, None]),
        )

    def forward(
        self,
        query: torch.Tensor,
        memories: Sequence[tuple[torch.Tensor, torch.Tensor]],
        keys: SlotKeys,
    ) -> torch.Tensor:
        """Queries [R, L, N, D]; of each memory keys and values of all its media, [I, M, G, D] -> [R, L, N·D]."""
        rows = keys.plan.rows
        key_REGD, value_REGD = (_pick(rows, zip(values, keys.index)) for values in zip(*memories))
        return super().forward(query, key_REGD, value_REGD, keys.plan)


def _pick(rows: int, media: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The media of each row's slots, one after another: [I, M, G, D] -> [R, E, G, D]."""
    return torch.cat(
        [values.index_select(0, index).view(rows, -1, *values.shape[2:]) for values, index in media], dim=1
    )


def _repeat(values: torch.Tensor, times: int) -> torch.Tensor:
    return values[..., None].expand(*values.shape, times).flatten(-2)
