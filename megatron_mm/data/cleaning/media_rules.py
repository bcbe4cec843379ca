"""Rules about a record's images, sounds and videos. Each is off until it has a threshold; one medium that breaks one
drops the record, whose placeholders would no longer fit without it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from megatron_mm.data.cleaning.verdict import Verdict
from megatron_mm.data.errors import DataError

_FRAME_SECONDS = 0.02


class _MediaRules:
    """Rules whose fields are `min_x` and `max_x` of what is measured, in the order of the fields."""

    def _judge(self, kind: str, number: int, measured: dict[str, float | None]) -> Verdict | None:
        for field in fields(self):  # type: ignore[arg-type]
            bound, _, name = field.name.partition("_")
            limit, value = getattr(self, field.name), measured.get(name)
            if limit is None or value is None or bound not in ("min", "max"):
                continue
            if value < limit if bound == "min" else value > limit:
                detail = {"number": number, "value": round(value, 4), "limit": limit}
                return Verdict(f"{kind}: {field.name}", detail)
        return None

    @property
    def wanted(self) -> bool:
        """Whether any rule is on."""
        limits = (field.name for field in fields(self) if field.name[:4] in ("min_", "max_"))  # type: ignore[arg-type]
        return any(getattr(self, name) is not None for name in limits)


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
            measured = {"aspect": long / short, "pixels": short * long}
            sides = {"min_side": short, "max_side": long}
            for name, side in sides.items():
                limit = getattr(self, name)
                if limit is not None and (side < limit if name == "min_side" else side > limit):
                    return Verdict(f"images: {name}", {"number": number, "value": side, "limit": limit})
            if verdict := self._judge("images", number, measured):
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
            if verdict := self._judge("audios", number, measured):
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

    def judge(self, videos: Iterable[bytes]) -> Verdict | None:
        """The first rule that a video (its file) breaks; `number` is the video's, from 1.

        Raises:
            DataError: not a video.
        """
        for number, data in enumerate(videos, 1):
            if verdict := self._judge("videos", number, measure_video(data)):
                return verdict
        return None


def measure_video(data: bytes) -> dict[str, float | None]:
    """Seconds, frames, shorter side and aspect of a video; None where its container does not tell. Nothing is decoded
    but animations' headers.

    Raises:
        DataError: not a video.
    """
    if data[:4] in (b"GIF8", b"\x89PNG") or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
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
        image = Image.open(io.BytesIO(data))
        frames = getattr(image, "n_frames", 1)
        milliseconds: float = 0.0
        for frame in range(frames):
            image.seek(frame)
            image.load()  # WebP tells a frame's duration when it is read
            milliseconds += image.info.get("duration", 0) or 0
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, Image.DecompressionBombError) as error:
        raise DataError(f"corrupt animation ({error})") from error
    return {"seconds": milliseconds / 1000 or None, "frames": frames, **_shape(*image.size)}


def _shape(width: int, height: int) -> dict[str, float | None]:
    short, long = sorted((width, height))
    return {"side": short or None, "aspect": long / short if short else None}
