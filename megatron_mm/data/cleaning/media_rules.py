"""Rules about a record's images, sounds and videos. Each is off until it has a threshold; one medium that breaks one
drops the record, whose placeholders would no longer fit without it."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from megatron_mm.data.cleaning.verdict import Verdict
from megatron_mm.media.decoding import is_animation, limit_frames, open_image
from megatron_mm.media.errors import DataError

_FRAME_SECONDS = 0.02


class _MediaRules:
    """Rules whose fields are `min_x` and `max_x`, in the order in which they are looked at."""

    def _limits(self) -> list[tuple[str, float]]:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return [(name, limit) for name, limit in values if limit is not None and name[:4] in ("min_", "max_")]

    @functools.cached_property
    def wanted(self) -> bool:
        """Whether any rule is on."""
        return bool(self._limits())

    def _first_broken(self, kind: str, number: int, measured: dict[str, float | None]) -> Verdict | None:
        """The first rule, in the order of the fields, that a medium breaks.

        Args:
            kind: of the medium.
            number: of the medium among its record's.
            measured: what it has, by x, or by min_x or max_x where these differ; None is not judged.
        """
        for name, limit in self._limits():
            value = measured.get(name, measured.get(name[4:]))
            if value is not None and (value < limit if name.startswith("min") else value > limit):
                return Verdict(f"{kind}: {name}", {"number": number, "value": round(value, 4), "limit": limit})
        return None


@dataclass(frozen=True)
class ImageRules(_MediaRules):
    """Thresholds of images; None is off."""

    min_side: int | None = None
    """Pixels of the shorter side."""
    max_side: int | None = None
    """Pixels of the longer side."""
    max_aspect: float | None = None
    """Longer side over shorter side."""
    min_pixels: int | None = None
    max_pixels: int | None = None

    def judge(self, images: Iterable[Image.Image]) -> Verdict | None:
        """The first rule that an image breaks; `number` is the image's, from 1."""
        for number, image in enumerate(images, 1):
            short, long = sorted(image.size)
            measured = {"min_side": short, "max_side": long, "aspect": long / short, "pixels": short * long}
            if verdict := self._first_broken("images", number, measured):
                return verdict
        return None


@dataclass(frozen=True)
class SoundRules(_MediaRules):
    """Thresholds of sounds; None is off."""

    min_seconds: float | None = None
    max_seconds: float | None = None
    max_silence: float | None = None
    """Share of the time that is silent."""
    silence_dbfs: float = -60.0
    """Level (RMS of 20 ms, 0 dB being a square wave of full scale) below which a sound is silent."""

    def judge(self, sounds: Iterable[tuple[np.ndarray, int]]) -> Verdict | None:
        """The first rule that a sound (samples [n], Hz) breaks; `number` is the sound's, from 1."""
        for number, (samples, rate) in enumerate(sounds, 1):
            measured: dict[str, float | None] = {"seconds": samples.size / rate}
            if self.max_silence is not None:
                measured["silence"] = silent_share(samples, rate, self.silence_dbfs)
            if verdict := self._first_broken("audios", number, measured):
                return verdict
        return None


def silent_share(samples: np.ndarray, rate: int, dbfs: float) -> float:
    """Share of a sound's time in frames of 20 ms (the last may be shorter) whose RMS is below a level.

    Args:
        samples: in [−1, 1], [n].
        rate: Hz.
        dbfs: 20·log10 of the RMS.
    """
    frame = max(1, round(rate * _FRAME_SECONDS))
    starts = np.arange(0, samples.size, frame)
    energy = np.add.reduceat(np.square(samples, dtype=np.float64), starts)
    sizes = np.minimum(frame, samples.size - starts)
    silent = energy / sizes < 10 ** (dbfs / 10)
    return float(sizes[silent].sum() / samples.size)


@dataclass(frozen=True)
class VideoRules(_MediaRules):
    """Thresholds of videos; None is off. What a container does not tell is not judged."""

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_side: int | None = None
    """Pixels of the shorter side."""
    max_aspect: float | None = None
    """Longer side over shorter side."""

    def judge(self, videos: Iterable[dict[str, float | None]]) -> Verdict | None:
        """The first rule that a video (what `measure_video` says of it) breaks; `number` is the video's, from 1."""
        for number, measured in enumerate(videos, 1):
            if verdict := self._first_broken("videos", number, measured):
                return verdict
        return None


def measure_video(data: bytes) -> dict[str, float | None]:
    """Seconds, frames, shorter side and aspect of a video; None where its container does not tell. Nothing is decoded
    but animations' headers.

    Raises:
        DataError: not a video.
    """
    if is_animation(data):
        return _measure_animation(data)
    import av

    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise DataError("no video track")
            stream = container.streams.video[0]
            size = (stream.codec_context.width, stream.codec_context.height)
            seconds = container.duration / av.time_base if container.duration else None
            if seconds is None and stream.duration and stream.time_base:
                seconds = float(stream.duration * stream.time_base)
            frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    except av.FFmpegError as error:
        raise DataError(f"not a video that FFmpeg can read ({error})") from error
    return {"seconds": seconds, "frames": frames, **_shape(*size)}


def _measure_animation(data: bytes) -> dict[str, float | None]:
    try:
        image = open_image(data)
        limit_frames(*image.size, 1)
        frames = getattr(image, "n_frames", 1)
        milliseconds: float = 0.0
        for frame in range(frames):
            image.seek(frame)
            image.load()  # WebP tells a frame's duration when it is read
            milliseconds += image.info.get("duration", 0) or 0
    except DataError:
        raise
    except Exception as error:  # a damaged header ends in whatever Pillow's parsers raise
        raise DataError(f"corrupt animation ({error})") from error
    return {"seconds": milliseconds / 1000 or None, "frames": frames, **_shape(*image.size)}


def _shape(width: int, height: int) -> dict[str, float | None]:
    short, long = sorted((width, height))
    return {"side": short or None, "aspect": long / short if short else None}
