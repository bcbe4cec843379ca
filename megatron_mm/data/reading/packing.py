"""Documents → rows of a fixed number of tokens: whole documents, bounded media, little padding; or one document a row.

Documents arrive in a keyed order and go to the open row that they fill best (best fit over a bounded number of open
rows, so that neighbours in the order stay neighbours). The result is a pure function of the lengths, the limits and
the key, kept as compact arrays: in memory for small datasets, in files for large ones (`plans.py`), made block by block
either way. A text document longer than a row is cut into rows of its own (each piece a document without the others'
context); one with media is truncated, because its placeholders and prompt belong together.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_mm.config.inputs import Limits
from megatron_mm.data.reading.order import Permutation
from megatron_mm.data.store.shards import Shard

#: A piece of a document: its first token within the document and its tokens.
PIECE_DTYPE = np.dtype([("document", "<i8"), ("offset", "<i4"), ("length", "<i4")])
_OPEN_ROWS = 64
_BLOCK = 1 << 20

#: Makes an array of a name, dtype and size.
Allocate = Callable[[str, np.dtype, int], np.ndarray]


@dataclass(frozen=True)
class Packing:
    """Rows of pieces. Row r holds pieces row_starts[r] … row_starts[r+1]-1."""

    pieces: np.ndarray
    """PIECE_DTYPE [pieces]."""
    row_starts: np.ndarray
    """int64 [rows + 1]."""
    report: dict[str, int]
    """documents, tokens, rows, padding, documents_split, documents_truncated, tokens_cut, documents_too_short,
    media_dropped: counts of what was done."""

    def __len__(self) -> int:
        """Rows."""
        return self.row_starts.size - 1

    def row(self, number: int) -> list[tuple[int, int, int]]:
        """(document, offset, length) of the pieces of a row."""
        return self.pieces[int(self.row_starts[number]) : int(self.row_starts[number + 1])].tolist()


def in_memory(_: str, dtype: np.dtype, size: int) -> np.ndarray:
    """An array that is not kept."""
    return np.empty(size, dtype)


def pack(
    shard: Shard,
    documents: range,
    limits: Limits,
    key: list[int] | None,
    packed: bool = True,
    allocate: Allocate = in_memory,
    progress: Callable[[int], object] = lambda documents: None,
) -> Packing:
    """Packs documents of a shard.

    Args:
        shard: where they are.
        documents: which of them.
        limits: of one row.
        key: of the permutation in which documents arrive; None keeps their order.
        packed: several documents a row; False gives each a row of its own, where longer ones are truncated and media
            without a place left out.
        allocate: makes the arrays; nothing else grows with the number of documents.
        progress: told how many documents more were packed.
    """
    cut = _cut if packed else _truncate
    most = sum(_pieces_at_most(shard, block, limits, packed) for block in _blocks(documents))
    arrived = allocate("arrived", PIECE_DTYPE, most)
    rows = allocate("rows", np.dtype(np.int64), most)
    fit = _BestFit(limits) if packed else _OwnRow()
    counts: Counter[str] = Counter()
    end = 0
    for number, lengths, too_short in _arriving(shard, documents, key):
        source, offsets, piece_lengths, images, sounds, done = cut(shard, number, lengths, limits)
        here = slice(end, end + source.size)
        arrived["document"][here], arrived["offset"][here] = number[source], offsets
        arrived["length"][here] = piece_lengths
        rows[here] = fit(piece_lengths, images[source], sounds[source])
        end += source.size
        counts.update(done, documents=number.size, tokens=int(piece_lengths.sum()), documents_too_short=too_short)
        progress(number.size + too_short)
    pieces, row_starts = _by_row(arrived[:end], rows[:end], fit.num_rows, allocate)
    report = {name: int(counts[name]) for name in ("documents", "tokens")}
    report |= {"rows": fit.num_rows, "padding": fit.num_rows * limits.seq_length - report["tokens"]}
    names = ("documents_split", "documents_truncated", "tokens_cut", "documents_too_short", "media_dropped")
    return Packing(pieces, row_starts, report | {name: int(counts[name]) for name in names})


def _blocks(documents: range) -> Iterator[range]:
    for start in range(0, len(documents), _BLOCK):
        yield documents[start : start + _BLOCK]


def _arriving(shard: Shard, documents: range, key: list[int] | None) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Numbers and lengths of documents in the order in which they arrive, and how many are too short to learn from."""
    order = Permutation(len(documents), key) if key is not None and len(documents) else None
    for block in _blocks(range(len(documents))):
        number = np.arange(block.start, block.stop, dtype=np.int64)
        number = documents.start + (order(number) if order else number)
        lengths = shard.document_lengths(number)
        kept = lengths >= 2  # a single token has no label
        yield number[kept], lengths[kept], int((~kept).sum())


def _pieces_at_most(shard: Shard, documents: range, limits: Limits, packed: bool) -> int:
    lengths = shard.document_lengths(np.arange(documents.start, documents.stop, dtype=np.int64))
    lengths = lengths[lengths >= 2]
    return int((-(-lengths // limits.seq_length)).sum()) if packed else lengths.size


def _cut(shard: Shard, number: np.ndarray, lengths: np.ndarray, limits: Limits) -> tuple:
    """Pieces that fit into a row: (document of each, offset, length, media of the documents [2], counts)."""
    images, sounds, has_media, dropped = media_counts(shard, number, limits)
    long = lengths > limits.seq_length
    truncated, split = long & has_media, long & ~has_media
    tokens_cut = int((lengths[truncated] - limits.seq_length).sum())
    lengths = np.where(truncated, limits.seq_length, lengths)
    pieces = np.where(split, -(-lengths // limits.seq_length), 1)
    # A remainder of one token would be a piece without a label.
    lone = split & (lengths % limits.seq_length == 1)
    pieces, lengths = pieces - lone, lengths - lone
    tokens_cut += int(lone.sum())
    source = np.repeat(np.arange(number.size), pieces)
    offsets = (np.arange(source.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * limits.seq_length
    done = {
        "documents_split": int((pieces > 1).sum()),
        "documents_truncated": int(truncated.sum()),
        "tokens_cut": tokens_cut,
        "media_dropped": dropped,
    }
    return source, offsets, np.minimum(lengths[source] - offsets, limits.seq_length), images, sounds, done


def _truncate(shard: Shard, number: np.ndarray, lengths: np.ndarray, limits: Limits) -> tuple:
    """As `_cut`, for rows of one document."""
    kept = np.minimum(lengths, limits.seq_length)
    stills, videos, sounds = (shard.column(f"num_{kind}", number) for kind in ("images", "videos", "audios"))
    read = stills + videos if limits.frames_per_video else stills
    places = np.minimum(read, limits.max_images) + np.minimum(sounds, limits.max_sounds)
    done = {
        "documents_truncated": int((lengths > kept).sum()),
        "tokens_cut": int((lengths - kept).sum()),
        "media_dropped": int((stills + videos + sounds - places).sum()),
    }
    return np.arange(number.size), np.zeros(number.size, np.int64), kept, stills, sounds, done


def media_counts(shard: Shard, number: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Image slots and sounds that documents take in a row, at most the row's limits.

    Returns:
        Image slots [n], sounds [n], whether the document has media [n], and the number of slots beyond the limits.
    """
    if not shard.is_multimodal:
        zeros = np.zeros(number.size, np.int64)
        return zeros, zeros, np.zeros(number.size, bool), 0
    stills, videos = shard.column("num_images", number), shard.column("num_videos", number)
    images, sounds = stills + videos * limits.frames_per_video, shard.column("num_audios", number)
    kept_images, kept_sounds = np.minimum(images, limits.max_images), np.minimum(sounds, limits.max_sounds)
    dropped = int((images - kept_images).sum() + (sounds - kept_sounds).sum())
    dropped += 0 if limits.frames_per_video else int(videos.sum())
    return kept_images, kept_sounds, (stills + videos + sounds) > 0, dropped


class _OwnRow:
    """A row for each piece."""

    def __init__(self) -> None:
        self.num_rows = 0

    def __call__(self, lengths: np.ndarray, images: np.ndarray, sounds: np.ndarray) -> np.ndarray:
        self.num_rows += lengths.size
        return np.arange(self.num_rows - lengths.size, self.num_rows)


class _BestFit:
    """Row of each piece that arrives; rows are numbered as they are opened."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_rows = 0
        self._open: list[tuple[int, int]] = []  # (free tokens, row), sorted
        self._images: dict[int, int] = {}  # free places of the open rows
        self._sounds: dict[int, int] = {}

    def __call__(self, lengths: np.ndarray, images: np.ndarray, sounds: np.ndarray) -> np.ndarray:
        """Rows, int64 [pieces], of pieces with these tokens, images and sounds."""
        limits, open_rows, free_images, free_sounds = self.limits, self._open, self._images, self._sounds
        rows = np.empty(lengths.size, np.int64)
        for i, (length, image, sound) in enumerate(zip(lengths.tolist(), images.tolist(), sounds.tolist())):
            at = bisect_left(open_rows, (length, -1))
            while at < len(open_rows):
                free, row = open_rows[at]
                if free_images[row] >= image and free_sounds[row] >= sound:
                    del open_rows[at]
                    break
                at += 1
            else:
                row, free = self.num_rows, limits.seq_length
                self.num_rows += 1
                free_images[row], free_sounds[row] = limits.max_images, limits.max_sounds
            rows[i] = row
            free_images[row] -= image
            free_sounds[row] -= sound
            insort(open_rows, (free - length, row))
            if len(open_rows) > _OPEN_ROWS:
                _, closed = open_rows.pop(0)  # the fullest
                del free_images[closed], free_sounds[closed]
        return rows


def _by_row(arrived: np.ndarray, rows: np.ndarray, num_rows: int, allocate: Allocate) -> tuple[np.ndarray, np.ndarray]:
    """Pieces ordered by row, those of a row as they arrived, and where each row starts: a counting sort in blocks."""
    row_starts = allocate("row_starts", np.dtype(np.int64), num_rows + 1)
    row_starts[:] = 0
    for start in range(0, rows.size, _BLOCK):
        which, counts = np.unique(rows[start : start + _BLOCK], return_counts=True)
        row_starts[which + 1] += counts
    total = 0
    for start in range(0, num_rows + 1, _BLOCK):
        ends = total + np.cumsum(row_starts[start : start + _BLOCK])
        row_starts[start : start + _BLOCK] = ends
        total = int(ends[-1])
    pieces = allocate("pieces", PIECE_DTYPE, rows.size)
    filled = allocate("filled", np.dtype(np.int64), num_rows)
    filled[:] = row_starts[:-1]
    for start in range(0, rows.size, _BLOCK):
        block = rows[start : start + _BLOCK]
        order = np.argsort(block, kind="stable")
        which, first, counts = np.unique(block[order], return_index=True, return_counts=True)
        within = np.arange(block.size) - np.repeat(first, counts)
        pieces[np.repeat(filled[which], counts) + within] = arrived[start : start + _BLOCK][order]
        filled[which] += counts
    return pieces, row_starts
