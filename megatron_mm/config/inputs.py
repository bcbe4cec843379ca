"""What a system asks of its samples: which media, in which form, and what is drawn per sample for its objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class InputFormat:
    """The inputs of a system, as its section of the recipe implies them.

    Attributes:
        vocab_size: rows of the text embedding.
        packed: a row is a pack of whole documents with any number of media; otherwise a row is one document, truncated
            to the row, with at most one image or video and at most one sound.
        image_size: pixels on a side; 0: no images.
        video: `frames` gives a video as frames among the images, `clips` as a clip of its own; `none` leaves it out.
        sound: `log_mel` spectrograms, 16 kHz `waveform`, or `none`.
        sample_rate: samples a second of sounds.
        seconds: length to which sounds are padded or cut.
        num_mel_bins: mel bands of spectrograms.
        mask_ratio: share of a document's tokens that masked language modelling hides; 0: none.
        patches: patches of an image, for each of which noise is drawn that orders random masks; 0: none.
        tasks: objectives among which microbatches are divided, with their weights; empty: every microbatch has all.
    """

    vocab_size: int
    packed: bool = True
    image_size: int = 0
    video: Literal["none", "frames", "clips"] = "none"
    sound: Literal["none", "log_mel", "waveform"] = "none"
    sample_rate: int = 16000
    seconds: float = 0.0
    num_mel_bins: int = 0
    mask_ratio: float = 0.0
    patches: int = 0
    tasks: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.packed and self.video == "clips":
            raise ValueError("a row of packed documents has no place for clips; give their frames (video='frames')")
        if not self.packed and self.video == "frames":
            raise ValueError("a row of one document has place for one image; give videos as clips (video='clips')")
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; it must be at least 0 and below 1")
        if self.video != "none" and not self.image_size:
            raise ValueError(f"video={self.video!r} needs an image_size")

    @property
    def fields(self) -> frozenset[str]:
        """Fields of a microbatch that this format fills when they are asked for, beyond those always read."""
        names = {"tokens_RT", "labels_RT"}
        if self.image_size:
            names |= {"images_ICHW", "image_frames_I"}
        if self.video == "clips":
            names.add("clips_VFCHW")
        if self.sound != "none":
            names.add("sounds_AMF" if self.sound == "log_mel" else "waveforms_AN")
        if self.mask_ratio:
            names |= {"masked_tokens_RT", "masked_labels_RT"}
        if self.patches:
            names.add("patch_noise_IP")
        return frozenset(names)

    @property
    def num_samples(self) -> int:
        """Samples of one waveform."""
        return round(self.seconds * self.sample_rate)

    @property
    def num_frames(self) -> int:
        """Frames of one spectrogram (10 ms hop)."""
        return round(self.seconds * 100)


@dataclass(frozen=True)
class Limits:
    """What one row may hold."""

    seq_length: int
    max_images: int
    """Stills and video frames; where a row is one document, stills and clips: 0 or 1."""
    max_sounds: int
    frames_per_video: int
    """Frames that a video takes; 0 where videos are not read."""

    @classmethod
    def of(cls, data, inputs: InputFormat) -> Limits:
        """Limits of a recipe's rows.

        Args:
            data: `config.data`.
            inputs: what the system asks for.
        """
        images = data.max_images_per_sample if inputs.image_size else 0
        sounds = data.max_sounds_per_sample if inputs.sound != "none" else 0
        if not inputs.packed:
            images, sounds = min(1, images), min(1, sounds)
        return cls(data.seq_length, images, sounds, 0 if inputs.video == "none" else data.frames_per_video)
