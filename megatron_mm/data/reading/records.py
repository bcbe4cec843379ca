"""Records of shards → pixels, samples and noise of one microbatch, each medium seen as its key says.

A medium that does not decode ends the run, or under `data.on_corrupt: skip` it is read as an image of the mean colour
(zeros, once normalised) or as silence. Its row keeps its place, tokens and loss: only the processes that decode know
that it is corrupt, those of other pipeline stages have read tables and tokens alone, and all of them, in every layout,
must see the same row. So the text beside a corrupt image is learned as if it had been written of a grey one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from megatron_mm.config.inputs import InputFormat, Limits
from megatron_mm.data.reading.augmentation import Augmentation, View
from megatron_mm.data.reading.masking import patch_noise
from megatron_mm.data.reading.order import Purpose
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import Tokenizer
from megatron_mm.media.decoding import decode_clip, decode_sound, decode_video, read_image, resample
from megatron_mm.media.errors import DataError
from megatron_mm.media.transforms import log_mel_spectrogram, pixel_tensor, size_of, waveform


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
class Medium:
    """One still, frame, video or sound: where it comes from."""

    shard: Shard
    piece: Piece
    kind: str
    """'images', 'videos' or 'audios'."""
    record: int
    number: int
    """Number of the medium within its document, each kind counted apart."""
    frame: int = -1
    """Frame of a video among the images."""

    @property
    def name(self) -> list[int]:
        """Integers that name the epoch and the medium, the same for all frames of a video."""
        kind = ("images", "videos", "audios").index(self.kind)
        return [self.piece.epoch, self.piece.source, self.piece.document, kind, self.number]

    def decode(self, decoder: Callable, *args):
        """`decoder(bytes, *args)`. Raises DataError that names shard, record and document."""
        try:
            return decoder(self.shard.medium(self.kind, self.record), *args)
        except DataError as error:
            where = self.shard.describe_record(self.kind, self.record, self.piece.document)
            raise DataError(f"{where}: {error}") from error


def media_of(
    shard: Shard, piece: Piece, inputs: InputFormat, limits: Limits
) -> tuple[list[Medium], list[Medium], list[Medium]]:
    """Images, clips and sounds of a document that a row has place for.

    Packed: stills, then the frames of each video. One document a row: its first still; if it has none, its first video.
    """

    def records(kind: str) -> list[tuple[int, int]]:
        return [(record, number) for number, record in enumerate(shard.records(kind, piece.document))]

    images = [Medium(shard, piece, "images", *place) for place in records("images")] if limits.max_images else []
    videos = records("videos") if limits.max_images and inputs.video != "none" else []
    clips: list[Medium] = []
    if inputs.video == "frames":
        frames = range(limits.frames_per_video)
        images += [Medium(shard, piece, "videos", *place, frame) for place in videos for frame in frames]
    elif not images:
        clips = [Medium(shard, piece, "videos", *place) for place in videos[: limits.max_images]]
    sounds = [Medium(shard, piece, "audios", *place) for place in records("audios")[: limits.max_sounds]]
    return images[: limits.max_images], clips, sounds


#: Samples in place of a sound that does not decode.
_SILENCE = np.zeros(1, np.float32)


class MediaReader:
    """Reads media in the form that a system asks for.

    Args:
        inputs: the format.
        frames_per_video: frames of a video; one that has fewer repeats them evenly.
        mean: channel means.
        std: channel deviations.
        augmentation: what is done to images; the default crops their centre.
        seed: of augmentation and noise.
        fixed: the same noise at every reading, whatever the seed (validation).
        tokenizer: of the texts that forbid a flip.
        skip_corrupt: read media that do not decode as grey or silence, rather than raise.
    """

    def __init__(
        self,
        inputs: InputFormat,
        frames_per_video: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation,
        seed: int,
        fixed: bool,
        tokenizer: Tokenizer | None,
        skip_corrupt: bool = False,
    ) -> None:
        self.inputs, self.frames_per_video, self.mean, self.std = inputs, frames_per_video, mean, std
        self.augmentation, self.seed, self.fixed, self.tokenizer = augmentation, seed, fixed, tokenizer
        self.skip_corrupt = skip_corrupt
        self._corrupt: list[str] = []

    def key(self, purpose: Purpose, name: Sequence[int]) -> list[int]:
        """The key of what is drawn for a name, which begins with the epoch."""
        return [0, purpose, 0, *name[1:]] if self.fixed else [self.seed, purpose, *name]

    def take_corrupt(self) -> list[str]:
        """What did not decode since the last call: shard, record and cause of each."""
        taken, self._corrupt = self._corrupt, []
        return taken

    def _decode(self, medium: Medium, decoder: Callable, *args):
        """What `Medium.decode` gives, or None for a corrupt medium that is to be stood in for."""
        try:
            return medium.decode(decoder, *args)
        except DataError as error:
            if not self.skip_corrupt:
                raise
            self._corrupt.append(str(error))
            return None

    def _view(self, medium: Medium, image: Image.Image | np.ndarray) -> View:
        def text() -> str:
            assert self.tokenizer is not None, "documents with media are opened with their tokenizer"
            return self.tokenizer.decode(medium.shard.text.document(medium.piece.document).tolist())

        return self.augmentation.view(*size_of(image), self.seed, medium.name, text)

    def _pixels(self, image: Image.Image | np.ndarray, view: View) -> torch.Tensor:
        return pixel_tensor(view.apply(image, self.inputs.image_size), self.mean, self.std)

    def images(self, media: list[Medium]) -> torch.Tensor:
        """Stills and frames of videos, float32 [max(1, n), 3, size, size]; zeros stand in where there are none
        and for those that are corrupt."""
        size = self.inputs.image_size
        out = torch.zeros(max(1, len(media)), 3, size, size)
        videos: dict[tuple[Piece, int], list[Image.Image] | None] = {}  # decoded once for all its frames
        for i, medium in enumerate(media):
            if medium.kind == "images":
                image = self._decode(medium, read_image)
            else:
                video = (medium.piece, medium.number)
                if video not in videos:
                    videos[video] = self._decode(medium, decode_video, self.frames_per_video)
                frames = videos[video]
                image = frames[medium.frame] if frames is not None else None
            if image is not None:
                out[i] = self._pixels(image, self._view(medium, image))
        return out

    def clips(self, media: list[Medium]) -> torch.Tensor:
        """Videos, float32 [n, frames, 3, size, size]; all frames of one are seen alike."""
        size = self.inputs.image_size
        out = torch.zeros(len(media), self.frames_per_video, 3, size, size)
        for clip, medium in zip(out, media):
            frames = self._decode(medium, decode_clip, self.frames_per_video)
            if frames is None:
                continue
            view = self._view(medium, frames[0])
            for f, frame in enumerate(frames):
                clip[f] = self._pixels(frame, view)
        return out

    def _samples(self, medium: Medium) -> np.ndarray:
        samples = self._decode(medium, lambda data: resample(*decode_sound(data), self.inputs.sample_rate))
        return _SILENCE if samples is None else samples

    def spectrograms(self, media: list[Medium]) -> torch.Tensor:
        """Log-mel spectrograms, float32 [max(1, n), num_mel_bins, num_frames]."""
        inputs = self.inputs
        out = torch.zeros(max(1, len(media)), inputs.num_mel_bins, inputs.num_frames)
        for i, medium in enumerate(media):
            samples = self._samples(medium)
            out[i] = log_mel_spectrogram(samples, inputs.sample_rate, inputs.seconds, inputs.num_mel_bins)
        return out

    def waveforms(self, media: list[Medium]) -> torch.Tensor:
        """Waveforms, float32 [max(1, n), num_samples]."""
        out = torch.zeros(max(1, len(media)), self.inputs.num_samples)
        for i, medium in enumerate(media):
            out[i] = waveform(self._samples(medium), self.inputs.num_samples)
        return out

    def noise(self, media: list[Medium]) -> torch.Tensor:
        """Noise of the patches of each image, float32 [max(1, n), patches]."""
        out = torch.zeros(max(1, len(media)), self.inputs.patches)
        for i, medium in enumerate(media):
            out[i] = torch.from_numpy(patch_noise(self.inputs.patches, self.key(Purpose.NOISE, medium.name)))
        return out
