"""Image-text matching with hard negatives (ALBEF, arXiv:2107.07651): does this image belong to this text?

Each row with an image gives three pairs: its own, its image with a wrong text, its text with a wrong image. Wrong ones
are drawn from the pool with probability ∝ exp(scale · similarity) of the contrastive embeddings, which is the hardness;
rows with the same text are never wrong. The draw is a Gumbel maximum whose noise is keyed by the two sample numbers, so
it does not depend on the layout. Hard negatives of other data-parallel processes are gathered with gradients.

Shape suffixes: R rows, P rows of the pool, M image positions, T text positions, C width, E width of the shared space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch.nn import functional

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext, Loss
from megatron_mm.models.work import Moved
from megatron_mm.objectives.contrastive import gather_rows
from megatron_mm.objectives.measures import Matching
from megatron_mm.parts.vit.rows import rows_with_image

_TEXTS, _IMAGES = 1, 2  # whose negatives a draw is for


def pair_noise(first_R: torch.Tensor, second_P: torch.Tensor, salt: int) -> torch.Tensor:
    """Gumbel noise [R, P] of pairs of sample numbers, by SplitMix64 (the same on every device)."""
    mixed = first_R[:, None] * 0x1E3779B97F4A7C15 + second_P[None] * 0x3F58476D1CE4E5B9 + salt * 0x14D049BB133111EB
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    mixed = mixed ^ ((mixed >> 31) & ((1 << 33) - 1))
    uniform = (((mixed >> 11) & ((1 << 52) - 1)).double() + 0.5) / (1 << 52)
    return -torch.log(-torch.log(uniform)).float()


@torch.no_grad()
def hard_negatives(
    batch: Microbatch, image_RE: torch.Tensor, text_RE: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each row a wrong text and a wrong image of the pool.

    Args:
        image_RE, text_RE: fp32 embeddings, of any length.
        scale: inverse temperature.

    Returns:
        numbers in the pool of the texts [R] and of the images [R], and [R] 1 where the row has such negatives.
    """
    rows = image_RE.shape[0]
    valid_R, numbers_R = rows_with_image(batch), batch.sample_numbers_R
    valid_P, numbers_P, tokens_PT = gather_rows(valid_R), gather_rows(numbers_R), gather_rows(batch.tokens_RT)
    own_R = parallel_state.get_data_parallel_rank() * rows + torch.arange(rows, device=image_RE.device)
    same_RP = (batch.tokens_RT[:, None] == tokens_PT[None]).all(dim=2)
    same_RP = same_RP | (own_R[:, None] == torch.arange(tokens_PT.shape[0], device=own_R.device)[None])
    wrong_RP = ~same_RP & (valid_P > 0)[None]
    chosen = []
    for salt, query_RE, key_RE in ((_TEXTS, image_RE, text_RE), (_IMAGES, text_RE, image_RE)):
        key_PE = gather_rows(functional.normalize(key_RE, dim=-1))
        scores = scale * (functional.normalize(query_RE, dim=-1) @ key_PE.t())
        scores = scores + pair_noise(numbers_R, numbers_P, salt)
        chosen.append(scores.masked_fill(~wrong_RP, -1e30).argmax(dim=1))
    return chosen[0], chosen[1], valid_R * wrong_RP.any(dim=1)


def matching_pairs(
    context: ForwardContext,
    images_RMC: torch.Tensor,
    texts_RTC: torch.Tensor,
    image_RE: torch.Tensor,
    text_RE: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three pairs of each row: own pairs, then wrong texts, then wrong images.

    Returns:
        memory [3R, M + T, C], visible positions [3R, M + T] float, and [3R] 1 where a pair counts.
    """
    batch = context.batch
    wrong_text, wrong_image, valid_R = hard_negatives(batch, image_RE, text_RE, scale)
    images_PMC, texts_PTC = gather_rows(images_RMC), gather_rows(texts_RTC)
    seen_RT = (batch.document_ids_RT >= 0).float()
    seen_RM = rows_with_image(batch)[:, None].expand(-1, images_RMC.shape[1])
    seen_PT = gather_rows(seen_RT)
    other_texts, other_images = texts_PTC.index_select(0, wrong_text), images_PMC.index_select(0, wrong_image)
    images = torch.cat((images_RMC, images_RMC, other_images))
    texts = torch.cat((texts_RTC, other_texts, texts_RTC))
    seen_texts = torch.cat((seen_RT, seen_PT.index_select(0, wrong_text), seen_RT))
    seen = torch.cat((seen_RM.repeat(3, 1), seen_texts), dim=1)
    own = rows_with_image(batch)
    return torch.cat((images, texts), dim=1), seen, torch.cat((own, valid_R, valid_R))


def matching_loss(reads: tuple[str, str] = ("match_logits", "match_valid"), weight: float = 1.0) -> Loss:
    """Cross-entropy of match against no match, summed over pairs; averaged over three pairs a row with an image.

    A row without any other text in its pool has no negatives: those pairs add nothing.

    Args:
        reads: streams of the logits [3R, 2] (match, no match) and of what counts [3R].
    """

    def compute(logits: torch.Tensor, valid: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        rows = logits.shape[0] // 3
        truth = torch.ones(3 * rows, dtype=torch.int64, device=logits.device)
        truth[:rows] = 0
        return torch.dot(functional.cross_entropy(logits, truth, reduction="none"), valid)

    def count(batch: Microbatch) -> torch.Tensor:
        return 3 * rows_with_image(batch).sum()

    def work(shapes: Sequence[tuple[int, ...]], sizes: ParallelSizes) -> tuple[Moved, ...]:
        return (Moved(8 * math.prod(shapes[0]), what="cross-entropy of pairs"),)  # fp32

    return Loss("matching", compute, count, reads, weight, sharded=False, measure=Matching, work=work)
