"""Where documents begin and end in a packed row, for kernels of variable-length attention.

Such a kernel (FlashAttention, Transformer Engine's `thd`) takes one long sequence and the cumulative lengths of its
segments. Every document is a segment, and the padding at a row's end is one. How many there are depends on the data, so
each row gets a fixed number of segments, the last of them empty: nothing here reads a tensor's value.

Under context parallelism a process holds two pieces of each row (see `sharding`), each of which is one call: queries of
the piece, keys of the whole row up to the piece's end. A document that began before the piece has more keys than
queries, so the causal mask is aligned at the bottom right.

Shape suffixes: R rows, T tokens of a row, N segments of a row, K slots of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan


@dataclass(frozen=True)
class Segments:
    """One call of a variable-length kernel.

    Attributes:
        begin, end: the part of every local row whose tokens are the queries.
        query_bounds, key_bounds: int32, cumulative lengths of all rows' segments, beginning with 0.
        longest_query, longest_key: Python integers that no segment exceeds.
    """

    begin: int
    end: int
    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    longest_query: int
    longest_key: int


def row_pieces(length: int, cp_size: int, cp_rank: int) -> list[tuple[int, int]]:
    """Positions [begin, end) of a row that a process holds, in the order in which it holds them."""
    if cp_size == 1:
        return [(0, length)]
    size = length // (2 * cp_size)
    return [(chunk * size, (chunk + 1) * size) for chunk in (cp_rank, 2 * cp_size - 1 - cp_rank)]


def segment_count(plan: MicrobatchPlan) -> int:
    """N: documents of a row at most, and its padding."""
    documents = plan.max_documents_per_row or (1 if plan.one_document_per_row else plan.row_length)
    return documents + 1


def segment_starts(batch: Microbatch) -> torch.Tensor:
    """[R, N + 1]: where each segment begins, T for those that a row does not have and at the end."""
    documents_RT, plan = batch.document_ids_RT, batch.plan
    begins_RT = torch.ones_like(documents_RT)
    begins_RT[:, 1:] = (documents_RT[:, 1:] != documents_RT[:, :-1]).long()
    numbers_RT = begins_RT.cumsum(dim=1) - 1
    wanted = torch.arange(segment_count(plan) + 1, device=documents_RT.device).repeat(plan.num_rows, 1)
    return torch.searchsorted(numbers_RT, wanted)


def document_segments(batch: Microbatch, cp_size: int, cp_rank: int, causal: bool) -> tuple[Segments, ...]:
    """Self-attention within documents: one call for each piece of a row that this process holds.

    Keys and values are those of all positions of a row, in order; causal attention sees those up to the piece's end.
    """
    starts, length = segment_starts(batch), batch.plan.row_length
    calls, at = [], 0
    for begin, end in row_pieces(length, cp_size, cp_rank):
        # What follows the piece in a row is a segment of keys without queries.
        seen = starts.clamp(max=end) if causal else starts
        keys = torch.cat((seen, starts.new_full((starts.shape[0], 1), length)), dim=1)
        queries = _piece_bounds(starts, begin, end)
        size = end - begin
        # Padding is a segment too, and may be longer than any document.
        calls.append(Segments(at, at + size, _bounds(queries, size), _bounds(keys, length), size, length))
        at += size
    return tuple(calls)


def _piece_bounds(starts: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Segment bounds within a piece of the row, with an empty segment at the end."""
    inside = starts.clamp(begin, end) - begin
    return torch.cat((inside, inside.new_full((inside.shape[0], 1), end - begin)), dim=1)


def _bounds(starts: torch.Tensor, length: int) -> torch.Tensor:
    """Bounds of all rows, one after another, from those of each row (whose last one is `length`)."""
    rows = starts.shape[0]
    offset = torch.arange(rows, device=starts.device)[:, None] * length
    inner = (starts[:, :-1] + offset).flatten()
    return torch.cat((inner, inner.new_full((1,), rows * length))).int()


@dataclass(frozen=True)
class MediaKeys:
    """Keys of cross-attention, document by document.

    Attributes:
        order: [R · (K·tokens of a medium + … + N)] index into the positions of all media, memory after memory, then one
            position of zeros.
        calls: one for each piece of a row.
    """

    order: torch.Tensor
    calls: tuple[Segments, ...]


def media_keys(batch: Microbatch, media: tuple[tuple[str, int], ...], cp_size: int, cp_rank: int) -> MediaKeys:
    """Gives each document the positions of its media, or one position of zeros if it has none.

    Args:
        media: of each memory the list that it is of (`Microbatch.slots`), and positions of one.
    """
    plan, segments = batch.plan, segment_count(batch.plan)
    device = batch.document_ids_RT.device
    number_N = torch.arange(segments, device=device)
    owners, indices, base = [], [], 0
    counts = torch.zeros(plan.num_rows, segments, dtype=torch.long, device=device)
    for name, tokens in media:
        slots, documents = batch.slots(name)
        within = torch.arange(tokens, device=device)
        indices.append((base + slots.clamp(min=0)[:, :, None] * tokens + within).flatten(1))
        owner = documents.masked_fill(documents < 0, segments)
        owners.append(owner[:, :, None].expand(*owner.shape, tokens).flatten(1))
        counts = counts + (documents[:, :, None] == number_N).sum(dim=1) * tokens
        base += plan.number(name) * tokens
    lonely = counts == 0
    owners.append(torch.where(lonely, number_N, segments))
    indices.append(torch.full((plan.num_rows, segments), base, device=device))
    owner, index = torch.cat(owners, dim=1), torch.cat(indices, dim=1)
    order = index.gather(1, owner.argsort(dim=1, stable=True)).flatten()

    width = owner.shape[1]
    ends = torch.where(lonely, 1, counts).cumsum(dim=1)
    first = torch.zeros(plan.num_rows, 1, dtype=torch.long, device=device)
    keys = torch.cat((first, ends, first + width), dim=1)
    starts = segment_starts(batch)
    longest = sum(plan.slots(name) * tokens for name, tokens in media) + segments
    calls, at = [], 0
    for begin, end in row_pieces(plan.row_length, cp_size, cp_rank):
        queries = _bounds(_piece_bounds(starts, begin, end), end - begin)
        calls.append(Segments(at, at + end - begin, queries, _bounds(keys, width), end - begin, longest))
        at += end - begin
    return MediaKeys(order, tuple(calls))
