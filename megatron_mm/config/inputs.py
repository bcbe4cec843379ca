"""What a system asks of its samples: which media, in which form, and what is drawn per sample for its objectives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_mm.config.fields import Field, Listed, check_own


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
        own_fields: fields of the system's own (config/fields.py), which its dataset (`data.builder`) fills.
        own_lists: what such fields list, beside images and sounds.
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
    own_fields: tuple[Field, ...] = ()
    own_lists: tuple[Listed, ...] = ()

    def __post_init__(self) -> None:
        if self.packed and self.video == "clips":
            raise ValueError("a row of packed documents has no place for clips; give their frames (video='frames')")
        if not self.packed and self.video == "frames":
            raise ValueError("a row of one document has place for one image; give videos as clips (video='clips')")
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; it must be at least 0 and below 1")
        if self.video != "none" and not self.image_size:
            raise ValueError(f"video={self.video!r} needs an image_size")
        if self.own_fields or self.own_lists:
            check_own(self.own_fields, self.own_lists, built_in_names(), self.packed)
        for field in self.own_fields:
            if (field.shape[0] == "I" and not self.image_size) or (field.shape[0] == "A" and self.sound == "none"):
                raise ValueError(f"field {field.name!r}: it has a value for each {field.shape[0]}, which are not read")

    @property
    def declared(self) -> tuple[Field, ...]:
        """Every field that a microbatch of this format has."""
        size, text, most = self.image_size, ("R", "T"), self.vocab_size - 1
        declared = [
            Field("position_ids_RT", text, "int64", 0, "T", always=True),
            Field("document_ids_RT", text, "int64", -1, "D", always=True),
            Field("loss_mask_RT", text, always=True),
            Field("image_slots_RK", ("R", "K"), "int64", -1, "I", pad=-1, always=True),
            Field("image_slot_documents_RK", ("R", "K"), "int64", always=True),
            Field("sound_slots_RJ", ("R", "J"), "int64", -1, "A", pad=-1, always=True),
            Field("sound_slot_documents_RJ", ("R", "J"), "int64", always=True),
            Field("sample_numbers_R", ("R",), "int64", always=True),
            Field("tokens_RT", text, "int64", 0, most),
            Field("labels_RT", text, "int64", 0, most),
        ]
        if self.image_size:
            declared.append(Field("images_ICHW", ("I", 3, size, size)))
            declared.append(Field("image_frames_I", ("I",), "int64"))
        if self.video == "clips":
            declared.append(Field("clip_slots_R", ("R",), "int64", -1, "V", pad=-1, always=True))
            declared.append(Field("clips_VFCHW", ("V", "F", 3, size, size)))
        if self.sound == "log_mel":
            declared.append(Field("sounds_AMF", ("A", self.num_mel_bins, self.num_frames)))
        if self.sound == "waveform":
            declared.append(Field("waveforms_AN", ("A", self.num_samples)))
        if self.mask_ratio:
            declared.append(Field("masked_loss_mask_RT", text, always=True))
            declared.append(Field("masked_tokens_RT", text, "int64", 0, most))
            declared.append(Field("masked_labels_RT", text, "int64", 0, most))
        if self.patches:
            declared.append(Field("patch_noise_IP", ("I", self.patches)))
        slots = (field for one in self.own_lists for field in one.fields())
        return (*declared, *slots, *self.own_fields)

    @property
    def fields(self) -> frozenset[str]:
        """Fields of a microbatch that this format fills when they are asked for, beyond those always read."""
        return frozenset(field.name for field in self.declared if not field.always)

    @property
    def always_read(self) -> frozenset[str]:
        """Fields of a microbatch of this format that every stage has."""
        return frozenset(field.name for field in self.declared if field.always)

    @property
    def num_samples(self) -> int:
        """Samples of one waveform."""
        return round(self.seconds * self.sample_rate)

    @property
    def num_frames(self) -> int:
        """Frames of one spectrogram (10 ms hop)."""
        return round(self.seconds * 100)


def built_in_names() -> frozenset[str]:
    """Names of the fields that the package declares, over all formats."""
    clips = InputFormat(1, packed=False, image_size=1, video="clips", sound="log_mel", mask_ratio=0.5, patches=1)
    return frozenset(field.name for one in (clips, replace(clips, sound="waveform")) for field in one.declared)


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
