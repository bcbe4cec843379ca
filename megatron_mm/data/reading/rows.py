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

from megatron_mm.config.fields import Field
from megatron_mm.config.inputs import InputFormat
from megatron_mm.data.reading.microbatch import ListedPlan, Microbatch, MicrobatchPlan


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
    listed: dict[str, list[Any]] = field(default_factory=dict)
    """Of each list of the system's own (InputFormat.own_lists), by its name, what this document has."""
    own: dict[str, np.ndarray] = field(default_factory=dict)
    """Values of fields of the system's own: [length, …] of one a token, […] of one a row; padded where not given."""


@dataclass
class Collated:
    """A microbatch without pixels and samples, and what these are to be made of."""

    microbatch: Microbatch
    images: list[Any]
    clips: list[Any]
    sounds: list[Any]
    listed: dict[str, list[Any]]
    """Of each list of the system's own."""
    inputs: InputFormat

    def fill(self, name: str, values: Sequence[np.ndarray]) -> None:
        """Gives the microbatch a field of the system's own that has one value for each image, sound or listed thing.

        Args:
            name: of the field.
            values: in the order in which `images`, `sounds` or `listed` has them. A value may be shorter than the field
                in its first dimension; it is padded at its end.

        Raises:
            ValueError: no such field, other values than things, or a value that does not fit.
        """
        letters = {"I": len(self.images), "A": len(self.sounds)}
        letters |= {one.letter: len(self.listed[one.name]) for one in self.inputs.own_lists}
        own = {one.name: one for one in self.inputs.own_fields if one.shape[0] in letters}
        if name not in own:
            raise ValueError(f"{name!r} is no field of this system's own that things have; these are {sorted(own)}")
        declared = own[name]
        if len(values) != letters[declared.shape[0]]:
            raise ValueError(f"{name}: {len(values)} values for {letters[declared.shape[0]]} things in the microbatch")
        out = _padded(declared, (max(1, len(values)), *declared.shape[1:]))
        for place, value in zip(out, values):
            value = _exact(declared, value)
            if value.dim() != place.dim() or value.shape[1:] != place.shape[1:] or value.shape[:1] > place.shape[:1]:
                raise ValueError(f"{name}: a value of shape {list(value.shape)}; it must fit {list(place.shape)}")
            (place[: len(value)] if value.dim() else place).copy_(value)
        setattr(self.microbatch, name, out)


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

    Fields of a system's own that hold one value a token or a row are made where any document gives them; those of
    things that are listed are None until `Collated.fill` makes them.

    Args:
        rows: documents of each row; together at most `row_length` tokens.
        inputs: the format.
        row_length: tokens of a row.
        numbers: global sample number of each row.
        task: what the microbatch learns.
        clip_frames: frames of a clip, where the system reads clips.
        pad_id: token after the documents.

    Raises:
        ValueError: what documents have of the system's own is not declared, too much for a row, or does not fit.
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
    listed = _listed(inputs, rows)
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
        own_lists=tuple(
            ListedPlan(one, max(1, len(things)), slots.shape[1])
            for one, (things, slots, _) in zip(inputs.own_lists, listed)
        ),
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
    for one, (_, slots, slot_documents) in zip(inputs.own_lists, listed):
        fields |= {one.slots: slots, one.slot_documents: slot_documents}
    tensors = {name: torch.from_numpy(value) for name, value in fields.items()}
    microbatch = Microbatch.of(plan, {**dict.fromkeys(own.name for own in inputs.own_fields), **tensors})
    microbatch.sample_ids = [document.id for document in everything]
    for declared in inputs.own_fields:
        if declared.shape[0] == "R":  # whatever documents these are: what one of them lacks is padded
            setattr(microbatch, declared.name, _of_rows(declared, rows, row_length))
    things = {one.name: of_list for one, (of_list, *_) in zip(inputs.own_lists, listed)}
    return Collated(microbatch, images, clips, sounds, things, inputs)


def _listed(
    inputs: InputFormat, rows: Sequence[Sequence[Document]]
) -> list[tuple[list[Any], np.ndarray, np.ndarray]]:
    """Of each list of the system's own: its things in order of rows, slots [R, K] and their documents [R, K]."""
    lists, fields = {one.name: one for one in inputs.own_lists}, {one.name for one in inputs.own_fields}
    for document in (document for row in rows for document in row):
        if unknown := (document.listed.keys() - lists.keys()) | (document.own.keys() - fields):
            raise ValueError(f"document {document.id!r} has {sorted(unknown)}, which this system does not declare")
    made = []
    for name, one in lists.items():
        counts = [[len(document.listed.get(name, [])) for document in row] for row in rows]
        if (most := max(map(sum, counts), default=0)) > one.most:
            raise ValueError(f"a row has {most} of {name!r}, at most {one.most} are declared (Listed.most)")
        things = [thing for row in rows for document in row for thing in document.listed.get(name, [])]
        made.append((things, *_slots(counts)))
    return made


def _padded(declared: Field, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, declared.pad, dtype=getattr(torch, declared.dtype))


def _exact(declared: Field, value: Any) -> torch.Tensor:
    """A value in the field's dtype. Raises ValueError where a whole number or a truth would become another."""
    given, dtype = torch.as_tensor(value), getattr(torch, declared.dtype)
    made = given.to(dtype)
    if not dtype.is_floating_point and not torch.equal(made.to(given.dtype), given):
        raise ValueError(f"{declared.name}: values of {given.dtype} that {dtype} does not hold")
    return made


def _of_rows(declared: Field, rows: Sequence[Sequence[Document]], row_length: int) -> torch.Tensor:
    """A field of one value a token, or of one a row."""
    tokens = declared.shape[1:2] == ("T",)
    rest = declared.shape[2 if tokens else 1 :]
    out = _padded(declared, (len(rows), row_length, *rest) if tokens else (len(rows), *rest))
    for place, row in zip(out, rows):
        at = 0
        for document in row:
            length = document.tokens.size
            value = document.own.get(declared.name)
            if value is not None:
                value, wanted = _exact(declared, value), (length, *rest) if tokens else rest
                if tuple(value.shape) != tuple(wanted):
                    shapes = f"{list(value.shape)}; it must be {list(wanted)}"
                    raise ValueError(f"document {document.id!r}: {declared.name} has shape {shapes}")
                (place[at : at + length] if tokens else place).copy_(value)
            at += length
    return out


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
