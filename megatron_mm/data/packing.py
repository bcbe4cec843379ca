"""Documents → rows of a fixed number of tokens: whole documents, bounded media, little padding; or one document a row.

Documents arrive in a keyed order and go to the open row that they fill best (best fit over a bounded number of open
rows, so that neighbours in the order stay neighbours). The result is a pure function of the lengths, the limits and
the key, kept as compact arrays. A text document longer than a row is cut into rows of its own (each piece a document
without the others' context); one with media is truncated, because its placeholders and prompt belong together.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from megatron_mm.data.formats import Limits
from megatron_mm.data.order import Permutation
from megatron_mm.data.shards import Shard

_OPEN_ROWS = 64


@dataclass(frozen=True)
class Packing:
    """Rows of pieces. Row r holds pieces row_starts[r] … row_starts[r+1]-1."""

    documents: np.ndarray
    """Document of each piece, int64 [pieces]."""
    offsets: np.ndarray
    """First token of the piece within its document, int32 [pieces]."""
    lengths: np.ndarray
    """Tokens of the piece, int32 [pieces]."""
    row_starts: np.ndarray
    """int64 [rows + 1]."""
    report: dict[str, int]
    """documents, tokens, rows, padding, documents_split, documents_truncated, tokens_cut, documents_too_short,
    media_dropped: counts of what was done."""

    def __len__(self) -> int:
        """Rows."""
        return self.row_starts.size - 1


def pack(shard: Shard, documents: range, limits: Limits, key: list[int] | None) -> Packing:
    """Packs documents of a shard.

    Args:
        shard: where they are.
        documents: which of them.
        limits: of one row.
        key: of the permutation in which documents arrive; None keeps their order.
    """
    number, lengths, too_short = _arriving(shard, documents, key)
    images, sounds, has_media, dropped = media_counts(shard, number, limits)
    long = lengths > limits.seq_length
    truncated, cut = long & has_media, long & ~has_media
    tokens_cut = int((lengths[truncated] - limits.seq_length).sum())
    lengths = np.where(truncated, limits.seq_length, lengths)
    pieces = np.where(cut, -(-lengths // limits.seq_length), 1)
    # A remainder of one token would be a piece without a label.
    lone = cut & (lengths % limits.seq_length == 1)
    pieces, lengths = pieces - lone, lengths - lone
    tokens_cut += int(lone.sum())
    source = np.repeat(np.arange(number.size), pieces)
    offsets = (np.arange(source.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * limits.seq_length
    piece_lengths = np.minimum(lengths[source] - offsets, limits.seq_length)

    rows = _best_fit(piece_lengths, images[source], sounds[source], limits)
    by_row = np.argsort(rows, kind="stable")
    num_rows = int(rows.max()) + 1 if rows.size else 0
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))]).astype(np.int64)
    tokens = int(piece_lengths.sum())
    return Packing(
        documents=number[source][by_row],
        offsets=offsets[by_row].astype(np.int32),
        lengths=piece_lengths[by_row].astype(np.int32),
        row_starts=row_starts,
        report={
            "documents": number.size,
            "tokens": tokens,
            "rows": num_rows,
            "padding": num_rows * limits.seq_length - tokens,
            "documents_split": int((pieces > 1).sum()),
            "documents_truncated": int(truncated.sum()),
            "tokens_cut": tokens_cut,
            "documents_too_short": too_short,
            "media_dropped": dropped,
        },
    )


def one_a_row(shard: Shard, documents: range, limits: Limits, key: list[int] | None) -> Packing:
    """Gives each document a row of its own; longer ones are truncated, media without a place left out. As `pack`."""
    number, lengths, too_short = _arriving(shard, documents, key)
    kept = np.minimum(lengths, limits.seq_length)
    images = shard.column("num_images")[number] + shard.column("num_videos")[number]
    sounds = shard.column("num_audios")[number]
    read_images = images if limits.frames_per_video else shard.column("num_images")[number]
    places = np.minimum(read_images, limits.max_images) + np.minimum(sounds, limits.max_sounds)
    return Packing(
        documents=number,
        offsets=np.zeros(number.size, np.int32),
        lengths=kept.astype(np.int32),
        row_starts=np.arange(number.size + 1, dtype=np.int64),
        report={
            "documents": number.size,
            "tokens": int(kept.sum()),
            "rows": number.size,
            "padding": int(number.size * limits.seq_length - kept.sum()),
            "documents_split": 0,
            "documents_truncated": int((lengths > kept).sum()),
            "tokens_cut": int((lengths - kept).sum()),
            "documents_too_short": too_short,
            "media_dropped": int((images + sounds - places).sum()),
        },
    )


def _arriving(shard: Shard, documents: range, key: list[int] | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Numbers and lengths of documents in the order in which they arrive, and how many are too short to learn from."""
    number = np.arange(documents.start, documents.stop, dtype=np.int64)
    if key is not None and number.size:
        number = number[Permutation(number.size, key)(np.arange(number.size))]
    lengths = shard.document_lengths[number]
    kept = lengths >= 2  # a single token has no label
    return number[kept], lengths[kept], int((~kept).sum())


def media_counts(shard: Shard, number: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Image slots and sounds that documents take in a row, at most the row's limits.

    Returns:
        Image slots [n], sounds [n], whether the document has media [n], and the number of slots beyond the limits.
    """
    if not shard.is_multimodal:
        zeros = np.zeros(number.size, np.int64)
        return zeros, zeros, np.zeros(number.size, bool), 0
    stills, videos = shard.column("num_images")[number], shard.column("num_videos")[number]
    images, sounds = stills + videos * limits.frames_per_video, shard.column("num_audios")[number]
    kept_images, kept_sounds = np.minimum(images, limits.max_images), np.minimum(sounds, limits.max_sounds)
    dropped = int((images - kept_images).sum() + (sounds - kept_sounds).sum())
    dropped += 0 if limits.frames_per_video else int(videos.sum())
    return kept_images, kept_sounds, (stills + videos + sounds) > 0, dropped


def _best_fit(lengths: np.ndarray, images: np.ndarray, sounds: np.ndarray, limits: Limits) -> np.ndarray:
    """Row of each piece, int64 [pieces]; rows are numbered as they are opened."""
    rows = np.empty(lengths.size, np.int64)
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    free_images: dict[int, int] = {}
    free_sounds: dict[int, int] = {}
    next_row = 0
    for i, (length, image, sound) in enumerate(zip(lengths.tolist(), images.tolist(), sounds.tolist())):
        at = bisect_left(open_rows, (length, -1))
        while at < len(open_rows):
            free, row = open_rows[at]
            if free_images[row] >= image and free_sounds[row] >= sound:
                del open_rows[at]
                break
            at += 1
        else:
            row, free = next_row, limits.seq_length
            next_row += 1
            free_images[row], free_sounds[row] = limits.max_images, limits.max_sounds
        rows[i] = row
        free_images[row] -= image
        free_sounds[row] -= sound
        insort(open_rows, (free - length, row))
        if len(open_rows) > _OPEN_ROWS:
            _, closed = open_rows.pop(0)  # the fullest
            del free_images[closed], free_sounds[closed]
    return rows
