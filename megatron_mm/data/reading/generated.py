"""Samples made of random numbers, for checks of layouts and speed that must not depend on any corpus.

A row is a pure function of (seed, global sample number), in the format of the recipe's system: a few documents of
random lengths, each with none, one or several images and sounds; or, where a row is one document, a text of random
length with an image, a clip or neither, and a sound or none. So a batch holds every case. What a system declares of
its own (config/fields.py) is drawn from its declaration: any number in a row, up to the most, of what is listed; values
between low and high, or normal where there is no range. `GeneratedRows` reads like a split of a dataset.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch

from megatron_mm.config.fields import Field
from megatron_mm.config.schema import Config
from megatron_mm.data.reading.masking import Masking
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.data.reading.rows import Document, collate

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
    """Pixels, sounds and noise are drawn from it, by each row for itself."""
    listed: dict[str, list[int]] = field(default_factory=dict)
    """Document of each thing of the system's own, by the list's name."""


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
        row = self._packed_row(generator) if self.inputs.packed else self._single_row(generator)
        for one in self.inputs.own_lists:
            number = int(generator.integers(0, one.most + 1))
            row.listed[one.name] = np.sort(generator.integers(0, len(row.lengths), number)).tolist()
        return row

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
        """One document between its first and last token; an image, a clip or neither; a sound or none."""
        data, inputs = self.config.data, self.inputs
        length = int(generator.integers(min(4, data.seq_length), data.seq_length + 1))
        prompt = int(generator.integers(1, max(2, length // 2)))
        kinds = ["none", *["image"] * bool(inputs.image_size), *["clip"] * (inputs.video == "clips")]
        kind = kinds[min(len(kinds) - 1, int(generator.integers(0, len(kinds) + 1)))]
        if self.images is not None:
            kind = "image" if self.images and inputs.image_size else "none"
        sounds = int(generator.random() < 0.7) if self.sounds is None else min(1, self.sounds)
        tokens = generator.integers(_FIRST_TOKEN, inputs.vocab_size, length)
        tokens[0], tokens[-1] = _BOS, _EOS
        return _Row(
            [length],
            [prompt],
            tokens,
            [(0, -1)] if kind == "image" else [],
            [0] * sounds if inputs.sound != "none" else [],
            kind == "clip",
            generator,
        )

    def _documents(self, number: int, row: _Row) -> list[Document]:
        documents, sizes = [], {"T": self.config.data.seq_length}
        for d, (first, last) in enumerate(pairwise(np.cumsum([0, *row.lengths]).tolist())):
            tokens = row.tokens[first:last]
            frames = [frame for owner, frame in row.images if owner == d]
            document = Document(
                tokens=tokens,
                learned=np.arange(tokens.size) >= row.prompts[d],
                images=[row.generator] * len(frames),
                frames=frames,
                clips=[row.generator] * row.has_clip,
                sounds=[row.generator] * row.sounds.count(d),
            )
            document.listed = {name: [row.generator] * owners.count(d) for name, owners in row.listed.items()}
            for own in self.inputs.own_fields:
                if own.shape[0] == "R":
                    shape = tuple(tokens.size if size == "T" else size for size in own.shape[1:])
                    document.own[own.name] = _drawn(own, row.generator, shape, sizes)
            if self.masking:
                document.shown, document.hidden = self.masking(tokens, [self.config.training.seed, number, d])
            documents.append(document)
        return documents

    def microbatch(self, index: Sequence[int], fields: Collection[str] = (), task: str = "") -> Microbatch:
        """The rows of global sample numbers, collated; every field of the format is made.

        Args:
            index: global sample numbers.
            fields: not regarded.
            task: what the microbatch learns, for its plan.
        """
        inputs, size = self.inputs, self.inputs.image_size
        frames = self.config.data.frames_per_video if inputs.video == "clips" else 0
        rows = [self._documents(number, self._row(number)) for number in index]
        collated = collate(rows, inputs, self.config.data.seq_length, index, task, frames)
        made = {}
        if size:
            made["images_ICHW"] = _normal(collated.images, 3, size, size)
        if inputs.video == "clips":
            made["clips_VFCHW"] = _normal(collated.clips, frames, 3, size, size, stand_in=0)
        if inputs.sound == "log_mel":
            made["sounds_AMF"] = _normal(collated.sounds, inputs.num_mel_bins, inputs.num_frames)
        elif inputs.sound == "waveform":
            made["waveforms_AN"] = _normal(collated.sounds, inputs.num_samples)
            for samples, generator in zip(made["waveforms_AN"], collated.sounds):  # of any length
                samples[int(generator.integers(inputs.num_samples // 2, inputs.num_samples + 1)) :] = 0.0
        if inputs.patches:
            noise = [generator.random(inputs.patches, np.float32) for generator in collated.images]
            made["patch_noise_IP"] = np.stack(noise) if noise else np.zeros((1, inputs.patches), np.float32)
        for name, value in made.items():
            setattr(collated.microbatch, name, torch.from_numpy(value))
        things = {"I": collated.images, "A": collated.sounds}
        things |= {one.letter: collated.listed[one.name] for one in inputs.own_lists}
        sizes = collated.microbatch.plan.sizes
        for own in inputs.own_fields:
            if own.shape[0] in things:
                values = [_drawn(own, generator, own.shape[1:], sizes) for generator in things[own.shape[0]]]
                collated.fill(own.name, values)
        collated.microbatch.sample_ids = [f"generated/{number}" for number in index]
        return collated.microbatch


def build(config: Config) -> SimpleNamespace:
    """Random rows as the datasets of a run: `data.builder: megatron_mm.data.reading.generated:build`."""
    return SimpleNamespace(train=GeneratedRows(config), valid=None, test=None, tokenizer=None)


def _drawn(
    declared: Field, generator: np.random.Generator, shape: tuple[int, ...], sizes: dict[str, int]
) -> np.ndarray:
    """Values of a field in its range; without one, normal."""
    low, high = declared.low, declared.high
    high = sizes[high] - 1 if isinstance(high, str) else high
    if declared.dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    if low is None and high is None:
        return generator.standard_normal(shape, np.float32)
    if declared.dtype in ("int64", "int32", "uint8"):
        return np.asarray(generator.integers(int(low), int(high) + 1, shape), declared.dtype)
    low, high = (high - 1 if low is None else low), (low + 1 if high is None else high)
    return np.asarray(generator.uniform(low, high, shape), np.float32)


def _normal(generators: list[np.random.Generator], *shape: int, stand_in: int = 1) -> np.ndarray:
    """A normal array from each generator; zeros stand in where there are none."""
    drawn = [generator.standard_normal(shape, np.float32) for generator in generators]
    return np.stack(drawn) if drawn else np.zeros((stand_in, *shape), np.float32)
