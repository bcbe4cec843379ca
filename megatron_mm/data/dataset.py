"""From a configuration to microbatches: opened shards, split, packed, blended, and collated on request.

    config ─ open ─ split by documents ─ pack into rows ─┐
    sample number ─ Blend ─ epoch, place ─ Permutation ──┴─ row ─ pieces ─ tokens, media ─ Microbatch

The plan and the fields that every stage has come from tables and tokens; images and sounds are decoded only where a
field that needs them is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_mm.config.schema import Config
from megatron_mm.data.errors import DataError
from megatron_mm.data.formats import InputFormat, Limits
from megatron_mm.data.media import decode_image, decode_sound, decode_video
from megatron_mm.data.microbatch import ALWAYS_READ, Microbatch, MicrobatchPlan
from megatron_mm.data.order import Blend, Permutation, epoch_and_place, split_documents
from megatron_mm.data.packing import Packing, pack
from megatron_mm.data.shards import Shard
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.data.transforms import center_crop_box, image_tensor, log_mel_spectrogram, random_crop_box, resample

_PACK, _VISIT, _CROP = 1, 2, 3  # what a key is for


@dataclass(frozen=True)
class MediaFormat:
    """Sizes that the towers read."""

    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    frames_per_video: int
    sample_rate: int
    seconds: float
    num_mel_bins: int
    modalities: frozenset[str]
    """Of "image" and "sound": media of other kinds are not read."""
    inputs: InputFormat


@dataclass(frozen=True)
class Piece:
    """A document, or a piece of one, in a row of a microbatch."""

    source: int
    """Dataset of the blend."""
    epoch: int
    document: int
    offset: int
    length: int


@dataclass(frozen=True)
class ImageSlot:
    """One still or frame: where it comes from."""

    piece: Piece
    kind: str
    record: int
    number: int
    """Number of the medium within its document, stills and videos counted apart."""
    frame: int
    """Frame of a video; -1 for a still."""


@dataclass(frozen=True)
class SoundSlot:
    """One sound: where it comes from."""

    piece: Piece
    record: int


@dataclass
class Source:
    """One dataset's part of a split."""

    shard: Shard
    packing: Packing
    weight: float
    name: str


class BlendedDataset:
    """One split of the blend, addressed by global sample number (endless: epochs follow one another).

    Args:
        split: "train", "valid" or "test".
        sources: datasets that have rows in this split.
        tokenizer: None where only text shards are read without one.
        limits: of one row.
        media: what the towers read.
        seed: of order and crops.
        shuffle: visit rows in a keyed order, another each epoch; else in the order of packing.
        augment: random crops.
    """

    def __init__(
        self,
        split: str,
        sources: list[Source],
        tokenizer: Tokenizer | None,
        limits: Limits,
        media: MediaFormat,
        seed: int,
        shuffle: bool,
        augment: bool,
    ) -> None:
        self.split, self.sources, self.tokenizer = split, sources, tokenizer
        self.limits, self.media, self.seed, self.inputs = limits, media, seed, media.inputs
        self.shuffle, self.augment = shuffle, augment
        self.blend = Blend([source.weight for source in sources])
        self._unlearned = np.array(tokenizer.unlearned_ids if tokenizer else [], dtype=np.int64)
        self._pad = tokenizer.pad_id if tokenizer is not None and tokenizer.pad_id is not None else 0

    @property
    def num_rows(self) -> int:
        """Rows of all datasets: samples of one pass over everything."""
        return sum(len(source.packing) for source in self.sources)

    def report(self) -> dict[str, dict[str, int]]:
        """What packing did, for each dataset (`Packing.report`)."""
        return {source.name: dict(source.packing.report) for source in self.sources}

    def locate(self, index: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Dataset, epoch and row of each global sample number; int64 arrays."""
        index = np.asarray(index, dtype=np.int64)
        if index.size and index.min() < 0:
            raise ValueError(f"negative sample number {int(index.min())}")
        which, within = self.blend.locate(index)
        epochs, rows = np.zeros_like(index), np.zeros_like(index)
        for number in np.unique(which):
            here = which == number
            num_rows = len(self.sources[number].packing)
            epoch, place = epoch_and_place(within[here], num_rows)
            if self.shuffle:
                row = np.empty_like(place)
                for e in np.unique(epoch):
                    of_epoch = epoch == e
                    permutation = Permutation(num_rows, [self.seed, _VISIT, int(number), int(e)])
                    row[of_epoch] = permutation(place[of_epoch])
            else:
                row = place
            epochs[here], rows[here] = epoch, row
        return which, epochs, rows

    def pieces(self, index: Sequence[int]) -> list[list[Piece]]:
        """The documents of each sample, in the order in which they stand in the row."""
        samples = []
        for source, epoch, row in zip(*(column.tolist() for column in self.locate(index))):
            packing = self.sources[source].packing
            span = range(int(packing.row_starts[row]), int(packing.row_starts[row + 1]))
            samples.append(
                [
                    Piece(
                        source, epoch, int(packing.documents[i]), int(packing.offsets[i]), int(packing.lengths[i])
                    )
                    for i in span
                ]
            )
        return samples

    def sample_id(self, piece: Piece) -> str:
        """ "dataset/id", with "@offset" for a later piece of a long document."""
        source = self.sources[piece.source]
        name = f"{source.name}/{source.shard.document_id(piece.document)}"
        return f"{name}@{piece.offset}" if piece.offset else name

    # -------------------------------------------------------------------------------------------------- collation

    def microbatch(self, index: Sequence[int], fields: Collection[str], task: str = "") -> Microbatch:
        """Reads and collates samples.

        Args:
            index: global sample numbers, one a row.
            fields: names of optional fields to read; plan and always-read fields do not depend on it.
            task: what the microbatch learns, for its plan.

        Raises:
            ValueError: an unknown field.
            DataError: a medium does not decode; dataset, record and cause are named.
        """
        fields = set(fields) - ALWAYS_READ
        if fields - self.inputs.fields:
            unknown, known = sorted(fields - self.inputs.fields), sorted(self.inputs.fields)
            raise ValueError(f"unknown fields {unknown}; this system's samples have {known}")
        samples = self.pieces(index)
        rows, length = len(samples), self.limits.seq_length
        tokens = np.full((rows, length), self._pad, np.int64)
        labels = np.zeros((rows, length), np.int64)
        positions = np.zeros((rows, length), np.int64)
        documents = np.full((rows, length), -1, np.int64)
        loss_mask = np.zeros((rows, length), np.float32)
        images: list[list[tuple[int, ImageSlot]]] = []
        sounds: list[list[tuple[int, SoundSlot]]] = []
        for r, pieces in enumerate(samples):
            images.append([])
            sounds.append([])
            at = 0
            for d, piece in enumerate(pieces):
                shard = self.sources[piece.source].shard
                text = shard.text.document(piece.document, piece.offset, piece.length)
                end = at + piece.length
                tokens[r, at:end] = text
                labels[r, at : end - 1] = text[1:]
                positions[r, at:end] = np.arange(piece.length)
                documents[r, at:end] = d
                label_numbers = piece.offset + np.arange(1, piece.length)
                learned = label_numbers >= shard.prompt_length(piece.document)
                loss_mask[r, at : end - 1] = learned & ~np.isin(text[1:], self._unlearned)
                images[r] += [(d, slot) for slot in self._image_slots(piece)]
                sounds[r] += [(d, slot) for slot in self._sound_slots(piece)]
                at = end
        image_slots, image_documents = _slot_tables(images)
        sound_slots, sound_documents = _slot_tables(sounds)
        flat_images = [slot for row in images for _, slot in row]
        flat_sounds = [slot for row in sounds for _, slot in row]
        plan = MicrobatchPlan(
            num_rows=rows,
            row_length=length,
            num_images=max(1, len(flat_images)),
            num_sounds=max(1, len(flat_sounds)),
            image_slots=image_slots.shape[1],
            sound_slots=sound_slots.shape[1],
            one_document_per_row=all(len(pieces) <= 1 for pieces in samples),
            max_document_length=max(piece.length for pieces in samples for piece in pieces),
            max_documents_per_row=max(len(pieces) for pieces in samples),
            task=task,
        )
        frames = [slot.frame for slot in flat_images] or [-1]
        return Microbatch(
            plan=plan,
            document_ids_RT=torch.from_numpy(documents),
            position_ids_RT=torch.from_numpy(positions),
            loss_mask_RT=torch.from_numpy(loss_mask),
            image_slots_RK=torch.from_numpy(image_slots),
            image_slot_documents_RK=torch.from_numpy(image_documents),
            sound_slots_RJ=torch.from_numpy(sound_slots),
            sound_slot_documents_RJ=torch.from_numpy(sound_documents),
            sample_numbers_R=torch.tensor(list(index)),
            tokens_RT=torch.from_numpy(tokens) if "tokens_RT" in fields else None,
            labels_RT=torch.from_numpy(labels) if "labels_RT" in fields else None,
            images_ICHW=self._read_images(flat_images) if "images_ICHW" in fields else None,
            image_frames_I=torch.tensor(frames) if "image_frames_I" in fields else None,
            sounds_AMF=self._read_sounds(flat_sounds) if "sounds_AMF" in fields else None,
            sample_ids=[self.sample_id(piece) for pieces in samples for piece in pieces],
        )

    def _image_slots(self, piece: Piece) -> list[ImageSlot]:
        """Stills, then the frames of each video, as far as the limit of a row allows."""
        if "image" not in self.media.modalities:
            return []
        shard = self.sources[piece.source].shard
        slots = [ImageSlot(piece, "images", r, i, -1) for i, r in enumerate(shard.records("images", piece.document))]
        for i, record in enumerate(shard.records("videos", piece.document)):
            slots += [ImageSlot(piece, "videos", record, i, f) for f in range(self.media.frames_per_video)]
        return slots[: self.limits.max_images]

    def _sound_slots(self, piece: Piece) -> list[SoundSlot]:
        if "sound" not in self.media.modalities:
            return []
        records = self.sources[piece.source].shard.records("audios", piece.document)
        return [SoundSlot(piece, record) for record in records][: self.limits.max_sounds]

    def _read_images(self, slots: list[ImageSlot]) -> torch.Tensor:
        size = self.media.image_size
        out = torch.zeros(max(1, len(slots)), 3, size, size)
        frames: dict[tuple[Piece, int], list] = {}  # a video is decoded once for all its frames
        for i, slot in enumerate(slots):
            shard = self.sources[slot.piece.source].shard
            try:
                if slot.kind == "images":
                    image = decode_image(shard.medium("images", slot.record))
                else:
                    video = (slot.piece, slot.number)
                    if video not in frames:
                        frames[video] = decode_video(shard.medium("videos", slot.record), self.media.frames_per_video)
                    image = frames[video][slot.frame]
            except DataError as error:
                raise DataError(
                    f"{shard.describe_record(slot.kind, slot.record, slot.piece.document)}: {error}"
                ) from error
            if self.augment:
                kind = int(slot.kind == "videos")
                key = [self.seed, _CROP, slot.piece.epoch, slot.piece.source, slot.piece.document, kind, slot.number]
                box = random_crop_box(*image.size, key)
            else:
                box = center_crop_box(*image.size)
            out[i] = image_tensor(image, size, box, self.media.image_mean, self.media.image_std)
        return out

    def _read_sounds(self, slots: list[SoundSlot]) -> torch.Tensor:
        media = self.media
        out = torch.zeros(max(1, len(slots)), media.num_mel_bins, round(media.seconds * 100))
        for i, slot in enumerate(slots):
            shard = self.sources[slot.piece.source].shard
            try:
                samples, rate = decode_sound(shard.medium("audios", slot.record))
            except DataError as error:
                raise DataError(
                    f"{shard.describe_record('audios', slot.record, slot.piece.document)}: {error}"
                ) from error
            samples = resample(samples, rate, media.sample_rate)
            out[i] = log_mel_spectrogram(samples, media.sample_rate, media.seconds, media.num_mel_bins)
        return out


def _slot_tables(rows: list[list[tuple[int, object]]]) -> tuple[np.ndarray, np.ndarray]:
    """Slot indexes and slot documents, [rows, most slots of a row, at least 1]; media are numbered in row order."""
    width = max(1, max(len(row) for row in rows))
    slots, documents = np.full((len(rows), width), -1, np.int64), np.full((len(rows), width), -2, np.int64)
    number = 0
    for r, row in enumerate(rows):
        for k, (document, _) in enumerate(row):
            slots[r, k], documents[r, k] = number, document
            number += 1
    return slots, documents


# ------------------------------------------------------------------------------------------------------ building


@dataclass(frozen=True)
class Datasets:
    """The three splits; a split without documents is None."""

    train: BlendedDataset
    valid: BlendedDataset | None
    test: BlendedDataset | None
    tokenizer: Tokenizer | None

    def report_lines(self) -> list[str]:
        """What will be read, one line a dataset and split, for the console."""
        lines = []
        for dataset in (self.train, self.valid, self.test):
            for name, r in dataset.report().items() if dataset is not None else ():
                padding = r["padding"] / max(1, r["padding"] + r["tokens"])
                line = f"{dataset.split} {name}: {r['documents']:,} documents, {r['tokens']:,} tokens in {r['rows']:,} "
                line += f"rows ({padding:.1%} padding)"
                notes = {
                    "documents_split": "longer than a row, split",
                    "documents_truncated": "with media longer than a row, truncated",
                    "documents_too_short": "shorter than two tokens, left out",
                    "media_dropped": "images, frames or sounds beyond the limits of a row, not read",
                }
                line += "".join(f"; {r[key]:,} {note}" for key, note in notes.items() if r[key])
                lines.append(line)
        return lines


def build_datasets(config: Config) -> Datasets:
    """Opens, checks, splits and packs everything that `config.data` names.

    Args:
        config: the resolved tree; `data`, `model.inputs` and `training.seed` are read.

    Raises:
        ValueError: a field of `config.data` cannot be used, or a dataset is damaged; field or file are named.
    """
    data = config.data
    if not data.datasets:
        raise ValueError("data.datasets: empty; name at least one dataset, such as {path: data/emoji}")
    inputs = config.model.inputs
    modalities = {"image"} if inputs.image_size else set()
    modalities |= {"sound"} if inputs.sound != "none" else set()
    tokenizer = Tokenizer(data.tokenizer, require_media=False) if data.tokenizer else None
    shards = [Shard(entry.path, tokenizer) for entry in data.datasets]
    if any(shard.is_multimodal for shard in shards):
        if tokenizer is None:
            raise ValueError("data.tokenizer: not set; multimodal datasets need the model that made them")
        tokenizer = Tokenizer(data.tokenizer)
    for entry, shard in zip(data.datasets, shards):
        if not 0 < entry.weight < float("inf"):
            raise ValueError(f"data.datasets: weight {entry.weight} of {entry.path} must be positive")
        if shard.is_multimodal and int(shard.column("num_videos").max()) > 0:
            _check_frames(config, entry.path, modalities)
    limits = Limits.of(data, inputs)
    if limits.seq_length < 2:
        raise ValueError(f"data.seq_length: {limits.seq_length}; at least 2")
    media = MediaFormat(
        image_size=inputs.image_size,
        image_mean=tuple(data.image_mean),
        image_std=tuple(data.image_std),
        frames_per_video=data.frames_per_video,
        sample_rate=inputs.sample_rate,
        seconds=inputs.seconds,
        num_mel_bins=inputs.num_mel_bins,
        modalities=frozenset(modalities),
        inputs=inputs,
    )
    names = _unique_names([shard.path for shard in shards])
    seed = config.training.seed
    splits: list[BlendedDataset | None] = []
    for s, split in enumerate(("train", "valid", "test")):
        sources = []
        for i, (entry, shard) in enumerate(zip(data.datasets, shards)):
            documents = split_documents(data.split, len(shard))[s]
            packing = pack(shard, documents, limits, [seed, _PACK, i] if split == "train" else None)
            if len(packing):
                sources.append(Source(shard, packing, entry.weight, names[i]))
            elif split == "train":
                raise ValueError(f'data.split: "{data.split}" leaves no training documents of {entry.path}')
        train = split == "train"
        args = (split, sources, tokenizer, limits, media, seed, train, train and data.random_crop)
        splits.append(BlendedDataset(*args) if sources else None)
    assert splits[0] is not None
    return Datasets(splits[0], splits[1], splits[2], tokenizer)


def _check_frames(config: Config, path: str, modalities: Collection[str]) -> None:
    """Refuses settings under which a video would never fit."""
    if "image" not in modalities:
        return
    frames = config.data.frames_per_video
    if not 1 <= frames <= config.data.max_images_per_sample:
        raise ValueError(
            f"data.frames_per_video: {frames}, but data.max_images_per_sample is {config.data.max_images_per_sample}; "
            f"a video of {path} must fit in a row"
        )


def _unique_names(paths: Sequence[str]) -> list[str]:
    """The last component of each path; where two agree, as many components as tell them apart, then a number."""
    parts = [path.strip("/").split("/") for path in paths]
    depth = 1
    while depth < max(map(len, parts)) and len({tuple(p[-depth:]) for p in parts}) < len(parts):
        depth += 1
    names = ["/".join(p[-depth:]) for p in parts]
    return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]
