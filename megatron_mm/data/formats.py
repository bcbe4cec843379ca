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

    @property
    def num_samples(self) -> int:
        """Samples of one waveform."""
        return round(self.seconds * self.sample_rate)

    @property
    def num_frames(self) -> int:
        """Frames of one spectrogram (10 ms hop)."""
        return round(self.seconds * 100)
