"""Samples made of random numbers, for checks of layouts and speed that must not depend on any corpus.

A row is a pure function of (seed, global sample number), in the format of the recipe's system: a few documents of
random lengths, each with none, one or several images and sounds; or, where a row is one document, a text of random
length with an image, a clip or neither, and a sound or none. So a batch holds every case. `GeneratedRows` reads like a
split of a dataset.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from megatron_mm.config.schema import Config
from megatron_mm.data.masking import Masking
from megatron_mm.data.microbatch import Microbatch, MicrobatchPlan

#: Ids as the project's tokenizers have them: padding 0, beginning 2, end 3, mask 7; ordinary tokens follow.
_BOS, _EOS, _MASK, _FIRST_TOKEN = 2, 3, 7, 8


@dataclass(frozen=True)
class _Row:
    lengths: list[int]
    prompts: list[int]
    """Leading tokens of each document that are not learned."""
    tokens: np.ndarray
    images: list[tuple[int, int]]
    """(document, frame or -1) of each."""
    sounds: list[int]
    """Document of each."""
    has_clip: bool
    generator: np.random.Generator


class GeneratedRows:
    """A dataset of random rows of the sizes of a recipe.

    Args:
        config: sizes of rows and media, and the seed.
        documents: documents of a row, where the system packs; 1 fills the row with one.
        images: images of each row; None: 0 to `data.max_images_per_sample`, differing by row.
        sounds: sounds of each row; None: 0 to `data.max_sounds_per_sample`.
    """

    def __init__(
        self, config: Config, documents: int = 4, images: int | None = None, sounds: int | None = None
    ) -> None:
        self.config, self.documents, self.images, self.sounds = config, documents, images, sounds
        inputs = self.inputs = config.model.inputs
        ordinary = np.arange(inputs.vocab_size) >= _FIRST_TOKEN
        self.masking = Masking(inputs.mask_ratio, _MASK, ordinary) if inputs.mask_ratio else None

    def _row(self, index: int) -> _Row:
        generator = np.random.Generator(np.random.Philox(key=[self.config.training.seed, index]))
        return self._packed_row(generator) if self.inputs.packed else self._single_row(generator)

    def _packed_row(self, generator: np.random.Generator) -> _Row:
        """Documents with any number of media."""
        data, inputs = self.config.data, self.inputs
        count = int(generator.integers(1, self.documents + 1)) if self.documents > 1 else 1
        cuts = np.sort(generator.choice(np.arange(2, data.seq_length), count - 1, replace=False)) if count > 1 else []
        bounds = [0, *map(int, cuts), data.seq_length - (int(generator.integers(0, 8)) if count > 1 else 0)]
        lengths = [high - low for low, high in pairwise(bounds)]
        images = sounds = 0
        if inputs.image_size:
            most = data.max_images_per_sample
            images = self.images if self.images is not None else int(generator.integers(0, most + 1))
        if inputs.sound != "none":
            most = data.max_sounds_per_sample
            sounds = self.sounds if self.sounds is not None else int(generator.integers(0, most + 1))
        owners = np.sort(generator.integers(0, count, images)).tolist()
        most = min(4, data.frames_per_video) if inputs.video == "frames" else 0
        frames = [int(generator.integers(-1, most)) for _ in owners]
        return _Row(
            lengths,
            [0] * count,
            generator.integers(_FIRST_TOKEN, inputs.vocab_size, data.seq_length),
            list(zip(owners, frames)),
            np.sort(generator.integers(0, count, sounds)).tolist(),
            False,
            generator,
        )

    def _single_row(self, generator: np.random.Generator) -> _Row:
        """One document between its first and last token, then padding; an image, a clip or neither; a sound or none."""
        data, inputs = self.config.data, self.inputs
        length = int(generator.integers(min(4, data.seq_length), data.seq_length + 1))
        prompt = int(generator.integers(1, max(2, length // 2)))
        kinds = ["none", *["image"] * bool(inputs.image_size), *["clip"] * (inputs.video == "clips")]
        kind = kinds[min(len(kinds) - 1, int(generator.integers(0, len(kinds) + 1)))]
        if self.images is not None:
            kind = "image" if self.images and inputs.image_size else "none"
        sounds = int(generator.random() < 0.7) if self.sounds is None else min(1, self.sounds)
        tokens = np.zeros(data.seq_length, np.int64)
        tokens[:length] = generator.integers(_FIRST_TOKEN, inputs.vocab_size, length)
        tokens[0], tokens[length - 1] = _BOS, _EOS
        return _Row(
            [length],
            [prompt],
            tokens,
            [(0, -1)] if kind == "image" else [],
            [0] * sounds if inputs.sound != "none" else [],
            kind == "clip",
            generator,
        )

    def microbatch(self, index: Sequence[int], fields: Collection[str] = (), task: str = "") -> Microbatch:
        """The rows of global sample numbers, collated; every field of the format is made.

        Args:
            index: global sample numbers.
            fields: not regarded.
            task: what the microbatch learns, for its plan.
        """
        rows = [self._row(number) for number in index]
        reads_clips = self.inputs.video == "clips"
        has_clip = np.array([row.has_clip for row in rows])
        image_slots, image_documents = _slots([[owner for owner, _ in row.images] for row in rows])
        sound_slots, sound_documents = _slots([row.sounds for row in rows])
        plan = MicrobatchPlan(
            num_rows=len(rows),
            row_length=self.config.data.seq_length,
            num_images=max(1, sum(len(row.images) for row in rows)),
            num_sounds=max(1, sum(len(row.sounds) for row in rows)),
            image_slots=image_slots.shape[1],
            sound_slots=sound_slots.shape[1],
            one_document_per_row=all(len(row.lengths) == 1 for row in rows),
            max_document_length=max(size for row in rows for size in row.lengths),
            max_documents_per_row=max(len(row.lengths) for row in rows),
            num_clips=int(has_clip.sum()),
            clip_frames=self.config.data.frames_per_video if reads_clips else 0,
            task=task,
        )
        return Microbatch(
            plan=plan,
            image_slots_RK=image_slots,
            image_slot_documents_RK=image_documents,
            sound_slots_RJ=sound_slots,
            sound_slot_documents_RJ=sound_documents,
            clip_slots_R=torch.from_numpy(np.where(has_clip, has_clip.cumsum() - 1, -1)) if reads_clips else None,
            sample_numbers_R=torch.tensor(list(index)),
            sample_ids=[f"generated/{number}" for number in index],
            **{name: torch.from_numpy(value) for name, value in self._text(rows, index).items()},
            **{name: torch.from_numpy(value) for name, value in self._media(rows, plan).items()},
        )

    def _text(self, rows: list[_Row], index: Sequence[int]) -> dict[str, np.ndarray]:
        """Fields of [R, T]."""
        tokens = np.stack([row.tokens for row in rows])
        documents, positions = np.full_like(tokens, -1), np.zeros_like(tokens)
        labels, learned = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        shown, hidden = tokens.copy(), np.zeros(tokens.shape, bool)
        for r, row in enumerate(rows):
            at = 0
            for d, (size, prompt) in enumerate(zip(row.lengths, row.prompts)):
                own, end = slice(at, at + size), at + size
                documents[r, own], positions[r, own] = d, np.arange(size)
                labels[r, at : end - 1] = tokens[r, at + 1 : end]
                learned[r, at + max(0, prompt - 1) : end - 1] = 1.0
                if self.masking:
                    key = [self.config.training.seed, index[r], d]
                    shown[r, own], hidden[r, own] = self.masking(tokens[r, own], key)
                at = end
        fields = {
            "tokens_RT": tokens,
            "labels_RT": labels,
            "document_ids_RT": documents,
            "position_ids_RT": positions,
            "loss_mask_RT": learned,
        }
        if self.masking:
            fields["masked_tokens_RT"] = shown
            fields["masked_labels_RT"] = np.where(hidden, tokens, 0)
            fields["masked_loss_mask_RT"] = hidden.astype(np.float32)
        return fields

    def _media(self, rows: list[_Row], plan: MicrobatchPlan) -> dict[str, np.ndarray]:
        """Pixels, sounds and noise, drawn by each row for itself; zeros stand in where there are none."""
        inputs, size, fields = self.inputs, self.inputs.image_size, {}

        def draw(counts: list[int], *shape: int, stand_in: int = 1) -> np.ndarray:
            drawn = [row.generator.standard_normal(shape, np.float32) for row, n in zip(rows, counts) for _ in range(n)]
            return np.stack(drawn) if drawn else np.zeros((stand_in, *shape), np.float32)

        images, sounds = [len(row.images) for row in rows], [len(row.sounds) for row in rows]
        if size:
            fields["images_ICHW"] = draw(images, 3, size, size)
            fields["image_frames_I"] = np.array([frame for row in rows for _, frame in row.images] or [-1])
        if inputs.video == "clips":
            clips = [int(row.has_clip) for row in rows]
            fields["clips_VFCHW"] = draw(clips, plan.clip_frames, 3, size, size, stand_in=0)
        if inputs.sound == "log_mel":
            fields["sounds_AMF"] = draw(sounds, inputs.num_mel_bins, inputs.num_frames)
        elif inputs.sound == "waveform":
            fields["waveforms_AN"] = draw(sounds, inputs.num_samples)
            fields["waveforms_AN"][::2, inputs.num_samples // 2 :] = 0.0  # every other sound ends early
        if inputs.patches:
            noise = [row.generator.random(inputs.patches, np.float32) for row in rows for _ in row.images]
            fields["patch_noise_IP"] = np.stack(noise) if noise else np.zeros((1, inputs.patches), np.float32)
        return fields


def _slots(owners: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot tables [R, K]: number in the microbatch's list (-1: none) and document (-2: none) of each slot of a row."""
    width = max(1, *(len(row) for row in owners)) if owners else 1
    numbers = torch.full((len(owners), width), -1)
    documents = torch.full((len(owners), width), -2)
    first = 0
    for r, row in enumerate(owners):
        numbers[r, : len(row)] = torch.arange(first, first + len(row))
        documents[r, : len(row)] = torch.tensor(row, dtype=torch.int64)
        first += len(row)
    return numbers, documents
