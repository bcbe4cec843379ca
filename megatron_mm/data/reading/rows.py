"""Documents → the fields of a microbatch that need no media: tokens, labels, masks, slots, and its plan.

    Document … ─ collate ─┬─ Microbatch of text and slots
                          └─ what its images, clips and sounds are, in the order in which it lists them

Where a document comes from is no matter here: shards (data/reading/blend.py), random numbers
(data/reading/generated.py) or a user's own builder. Media are whatever the caller can make pixels and samples of; only
their numbers and order count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_mm.config.inputs import InputFormat
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan


@dataclass
class Document:
    """A text with its media, or a piece of one, as it stands in a row."""

    tokens: np.ndarray
    """int [length]."""
    learned: np.ndarray
    """Whether each token counts where it is a label, bool [length]: not a prompt, not a placeholder."""
    id: str = ""
    images: list[Any] = field(default_factory=list)
    """Stills and frames."""
    frames: list[int] = field(default_factory=list)
    """Frame number of each image within its video; -1 for a still."""
    clips: list[Any] = field(default_factory=list)
    """A video, where the system reads clips."""
    sounds: list[Any] = field(default_factory=list)
    shown: np.ndarray | None = None
    """The tokens with some hidden (data/reading/masking.py), where the format masks."""
    hidden: np.ndarray | None = None
    """Which are hidden, bool [length]."""


@dataclass
class Collated:
    """A microbatch without pixels and samples, and what these are to be made of."""

    microbatch: Microbatch
    images: list[Any]
    clips: list[Any]
    sounds: list[Any]


def collate(
    rows: Sequence[Sequence[Document]],
    inputs: InputFormat,
    row_length: int,
    numbers: Sequence[int],
    task: str = "",
    clip_frames: int = 0,
    pad_id: int = 0,
) -> Collated:
    """Puts documents into rows.

    Args:
        rows: documents of each row; together at most `row_length` tokens.
        inputs: the format.
        row_length: tokens of a row.
        numbers: global sample number of each row.
        task: what the microbatch learns.
        clip_frames: frames of a clip, where the system reads clips.
        pad_id: token after the documents.
    """
    shape = (len(rows), row_length)
    tokens, labels = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    positions, documents = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    learned, hidden = np.zeros(shape, np.float32), np.zeros(shape, bool)
    shown = tokens.copy()
    for r, row in enumerate(rows):
        at = 0
        for d, document in enumerate(row):
            end = at + document.tokens.size
            tokens[r, at:end] = document.tokens
            labels[r, at : end - 1] = document.tokens[1:]
            positions[r, at:end] = np.arange(end - at)
            documents[r, at:end] = d
            learned[r, at : end - 1] = document.learned[1:]
            if inputs.mask_ratio:
                shown[r, at:end], hidden[r, at:end] = document.shown, document.hidden
            at = end
    image_slots, image_documents = _slots([[len(document.images) for document in row] for row in rows])
    sound_slots, sound_documents = _slots([[len(document.sounds) for document in row] for row in rows])
    clip_slots, _ = _slots([[len(document.clips) for document in row] for row in rows])
    everything = [document for row in rows for document in row]
    images = [image for document in everything for image in document.images]
    clips = [clip for document in everything for clip in document.clips]
    sounds = [sound for document in everything for sound in document.sounds]
    frames = [frame for document in everything for frame in document.frames]
    plan = MicrobatchPlan(
        num_rows=len(rows),
        row_length=row_length,
        num_images=max(1, len(images)),
        num_sounds=max(1, len(sounds)),
        image_slots=image_slots.shape[1],
        sound_slots=sound_slots.shape[1],
        one_document_per_row=all(len(row) <= 1 for row in rows),
        max_document_length=max(document.tokens.size for document in everything),
        max_documents_per_row=max(len(row) for row in rows),
        num_clips=len(clips),
        clip_frames=clip_frames,
        task=task,
    )
    fields = {
        "document_ids_RT": documents,
        "position_ids_RT": positions,
        "loss_mask_RT": learned,
        "image_slots_RK": image_slots,
        "image_slot_documents_RK": image_documents,
        "sound_slots_RJ": sound_slots,
        "sound_slot_documents_RJ": sound_documents,
        "sample_numbers_R": np.array(numbers, np.int64),
        "tokens_RT": tokens,
        "labels_RT": labels,
    }
    if inputs.image_size:
        fields["image_frames_I"] = np.array(frames or [-1], np.int64)
    if inputs.video == "clips":
        fields["clip_slots_R"] = clip_slots[:, 0]
    if inputs.mask_ratio:
        fields["masked_tokens_RT"] = shown
        fields["masked_labels_RT"] = np.where(hidden, tokens, 0)
        fields["masked_loss_mask_RT"] = hidden.astype(np.float32)
    microbatch = Microbatch(
        plan=plan,
        sample_ids=[document.id for document in everything],
        **{name: torch.from_numpy(value) for name, value in fields.items()},
    )
    return Collated(microbatch, images, clips, sounds)


def _slots(counts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Slot tables [rows, most slots of a row, at least 1] of media numbered in row order: number (-1: none), document
    (-2: none)."""
    width = max(1, *(sum(row) for row in counts)) if counts else 1
    numbers, documents = np.full((len(counts), width), -1, np.int64), np.full((len(counts), width), -2, np.int64)
    first = 0
    for r, row in enumerate(counts):
        total = sum(row)
        numbers[r, :total] = np.arange(first, first + total)
        documents[r, :total] = np.repeat(np.arange(len(row)), row)
        first += total
    return numbers, documents
