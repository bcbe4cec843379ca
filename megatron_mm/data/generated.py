"""Samples made of random numbers, for checks of layouts and speed that must not depend on any corpus.

A row is a pure function of (seed, global sample number): a few documents of random lengths and tokens, each with none,
one or several images and sounds, so that a batch holds every case. `GeneratedRows` reads like a split of a dataset.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from megatron_mm.config.schema import Config
from megatron_mm.data.microbatch import Microbatch, MicrobatchPlan

_FIRST_TOKEN = 8  # after the special tokens


@dataclass(frozen=True)
class _Row:
    lengths: list[int]
    tokens: np.ndarray
    images: list[tuple[int, int]]
    """(document, frame or -1) of each."""
    sounds: list[int]
    """Document of each."""
    generator: np.random.Generator


class GeneratedRows:
    """A dataset of random rows of the sizes of a recipe.

    Args:
        config: sizes of rows and media, and the seed.
        documents: documents of a row; 1 fills the row with one.
        images: images of each row; None: 0 to `data.max_images_per_sample`, differing by row.
        sounds: sounds of each row; None: 0 to `data.max_sounds_per_sample`.
    """

    def __init__(
        self, config: Config, documents: int = 4, images: int | None = None, sounds: int | None = None
    ) -> None:
        self.config, self.documents, self.images, self.sounds = config, documents, images, sounds

    def _row(self, index: int) -> _Row:
        data = self.config.data
        generator = np.random.Generator(np.random.Philox(key=[self.config.training.seed, index]))
        count = int(generator.integers(1, self.documents + 1)) if self.documents > 1 else 1
        cuts = np.sort(generator.choice(np.arange(2, data.seq_length), count - 1, replace=False)) if count > 1 else []
        bounds = [0, *map(int, cuts), data.seq_length - (int(generator.integers(0, 8)) if count > 1 else 0)]
        lengths = [high - low for low, high in pairwise(bounds)]
        images = self.images if self.images is not None else int(generator.integers(0, data.max_images_per_sample + 1))
        sounds = self.sounds if self.sounds is not None else int(generator.integers(0, data.max_sounds_per_sample + 1))
        owners = np.sort(generator.integers(0, count, images)).tolist()
        frames = [int(generator.integers(-1, min(4, self.config.model.vision.max_frames))) for _ in owners]
        return _Row(
            lengths,
            generator.integers(_FIRST_TOKEN, self.config.model.decoder.vocab_size, data.seq_length),
            list(zip(owners, frames)),
            np.sort(generator.integers(0, count, sounds)).tolist(),
            generator,
        )

    def microbatch(self, index: Sequence[int], fields: Collection[str] = ()) -> Microbatch:
        """The rows of global sample numbers, collated; every field is made."""
        vision, audio, length = self.config.model.vision, self.config.model.audio, self.config.data.seq_length
        rows = [self._row(number) for number in index]
        documents = np.full((len(rows), length), -1, np.int64)
        positions = np.zeros((len(rows), length), np.int64)
        mask = np.zeros((len(rows), length), np.float32)
        for r, row in enumerate(rows):
            at = 0
            for d, size in enumerate(row.lengths):
                documents[r, at : at + size] = d
                positions[r, at : at + size] = np.arange(size)
                mask[r, at : at + size - 1] = 1.0
                at += size
        tokens = np.stack([row.tokens for row in rows])
        labels = np.concatenate([tokens[:, 1:], np.zeros((len(rows), 1), np.int64)], axis=1)
        images = [row.generator.standard_normal((3, vision.image_size, vision.image_size), np.float32)
                  for row in rows for _ in row.images]  # fmt: skip
        sounds = [row.generator.standard_normal((audio.num_mel_bins, audio.num_frames), np.float32)
                  for row in rows for _ in row.sounds]  # fmt: skip
        image_slots, image_documents = _slots([[owner for owner, _ in row.images] for row in rows])
        sound_slots, sound_documents = _slots([row.sounds for row in rows])
        plan = MicrobatchPlan(
            num_rows=len(rows),
            row_length=length,
            num_images=max(1, len(images)),
            num_sounds=max(1, len(sounds)),
            image_slots=image_slots.shape[1],
            sound_slots=sound_slots.shape[1],
            one_document_per_row=all(len(row.lengths) == 1 for row in rows),
            max_document_length=max(size for row in rows for size in row.lengths),
            max_documents_per_row=max(len(row.lengths) for row in rows),
        )
        no_image = np.zeros((1, 3, vision.image_size, vision.image_size), np.float32)
        no_sound = np.zeros((1, audio.num_mel_bins, audio.num_frames), np.float32)
        return Microbatch(
            plan=plan,
            document_ids_RT=torch.from_numpy(documents),
            position_ids_RT=torch.from_numpy(positions),
            loss_mask_RT=torch.from_numpy(mask),
            image_slots_RK=image_slots,
            image_slot_documents_RK=image_documents,
            sound_slots_RJ=sound_slots,
            sound_slot_documents_RJ=sound_documents,
            tokens_RT=torch.from_numpy(tokens),
            labels_RT=torch.from_numpy(labels),
            images_ICHW=torch.from_numpy(np.stack(images) if images else no_image),
            image_frames_I=torch.tensor([frame for row in rows for _, frame in row.images] or [-1]),
            sounds_AMF=torch.from_numpy(np.stack(sounds) if sounds else no_sound),
            sample_ids=[f"generated/{number}" for number in index],
        )


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
