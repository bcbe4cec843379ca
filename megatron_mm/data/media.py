"""Encoded bytes → pixels and samples: images (Pillow, simplejpeg), sounds (soundfile, PyAV), videos (PyAV, Pillow).

Builders use it to check that a file decodes, datasets to read it. It imports no torch, so tools start fast. Every
failure is a `DataError` that says what the bytes are not; callers add file or shard and record.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageSequence, UnidentifiedImageError

from megatron_mm.data.errors import DataError

#: Pixels above which an image is refused before it is decoded.
MAX_IMAGE_PIXELS = 1 << 28


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparent pixels show white, not the arbitrary colour stored beneath them."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image.alpha_composite(rgba)
    return image.convert("RGB")


def _open_image(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data))
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise DataError(f"an image of {image.width} × {image.height} pixels; the limit is {MAX_IMAGE_PIXELS} pixels")
    return image


def decode_image(data: bytes) -> Image.Image:
    """Decodes a still image (the first frame of an animated one) to RGB.

    Raises:
        DataError: not an image, truncated, corrupt or larger than `MAX_IMAGE_PIXELS`.
    """
    try:
        image = _open_image(data)
        image.load()
        return to_rgb(image)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError("not an image that Pillow can read") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, EOFError) as error:
        raise DataError(f"corrupt image ({error})") from error


def read_image(data: bytes) -> Image.Image | np.ndarray:
    """A still image for training: a JPEG as uint8 [height, width, 3], anything else as `decode_image` gives it.

    Both hold the same pixels: Pillow and simplejpeg decode with libjpeg-turbo, but simplejpeg in half the time.

    Raises:
        DataError: as `decode_image`.
    """
    if data[:3] == b"\xff\xd8\xff":
        with contextlib.suppress(ValueError):  # then Pillow says what is wrong, or reads what is only unusual
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if height * width <= MAX_IMAGE_PIXELS and colours in ("YCbCr", "Gray"):
                return simplejpeg.decode_jpeg(data)
    return decode_image(data)


def decode_sound(data: bytes) -> tuple[np.ndarray, int]:
    """Decodes a sound (or a video's sound track) to mono.

    Returns:
        Samples, float32 in [-1, 1], [samples], and their rate in Hz.

    Raises:
        DataError: not a sound, corrupt, without samples, or with samples that are no numbers.
    """
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        mono = samples.mean(axis=1)
    except (soundfile.LibsndfileError, RuntimeError):
        mono, rate = _decode_sound_av(data)
    if mono.size == 0:
        raise DataError("a sound without samples")
    if not np.isfinite(mono).all():
        raise DataError("a sound whose samples are not all numbers")
    return mono, int(rate)


def _decode_sound_av(data: bytes) -> tuple[np.ndarray, int]:
    import av

    parts, rate = [], 0
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.audio:
                raise DataError("no sound track")
            rate = container.streams.audio[0].codec_context.sample_rate
            resampler = av.AudioResampler(format="fltp", layout=None, rate=None)
            for frame in container.decode(audio=0):
                for out in resampler.resample(frame):
                    parts.append(out.to_ndarray().mean(axis=0))
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"not a sound that libsndfile or FFmpeg can read ({error})") from error
    return np.concatenate(parts).astype(np.float32) if parts else np.empty(0, np.float32), rate


def evenly_spaced(total: int, wanted: int) -> np.ndarray:
    """Frame numbers in the middle of `wanted` equal parts of `total` frames; frames repeat evenly where too few."""
    return (2 * np.arange(wanted) + 1) * total // (2 * wanted)


def decode_video(data: bytes, num_frames: int) -> list[Image.Image]:
    """Decodes `num_frames` evenly spaced frames, RGB; a video with fewer repeats them evenly. Animated WebP, GIF and
    PNG count as videos.

    Raises:
        DataError: not a video, corrupt, or without frames.
    """
    animated = data[:4] in (b"GIF8", b"\x89PNG") or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    return _animation_frames(data, num_frames) if animated else _video_frames(data, num_frames)


def _animation_frames(data: bytes, num_frames: int) -> list[Image.Image]:
    try:
        image = _open_image(data)
        wanted = evenly_spaced(getattr(image, "n_frames", 1), num_frames)
        needed = set(wanted.tolist())
        frames = {i: to_rgb(frame.copy()) for i, frame in enumerate(ImageSequence.Iterator(image)) if i in needed}
        return [frames[i] for i in wanted.tolist()]
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, Image.DecompressionBombError) as error:
        raise DataError(f"corrupt animation ({error})") from error


def _video_frames(data: bytes, num_frames: int) -> list[Image.Image]:
    import av

    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise DataError("no video track")
            total = sum(1 for packet in container.demux(video=0) if packet.size)
        # Packets are counted without decoding; where some hold no frame, the frames really there are counted instead.
        for _ in range(2):
            if total == 0:
                break
            wanted = evenly_spaced(total, num_frames).tolist()
            needed, frames, count = set(wanted), {}, 0
            with av.open(io.BytesIO(data)) as container:
                for frame in container.decode(video=0):
                    if count in needed:
                        frames[count] = frame.to_image()
                    count += 1
                    if count > wanted[-1]:
                        break
            if len(frames) == len(needed):
                return [frames[i] for i in wanted]
            total = count
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"not a video that FFmpeg can read ({error})") from error
    raise DataError("a video without frames")


def check_medium(kind: str, data: bytes) -> None:
    """Decodes a file of `kind` ('images', 'audios' or 'videos'). Raises DataError if it does not decode."""
    if kind == "images":
        decode_image(data)
    elif kind == "audios":
        decode_sound(data)
    else:
        decode_video(data, 1)
