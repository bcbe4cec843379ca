"""Encoded bytes → pixels and samples: images (Pillow, simplejpeg), sounds (soundfile, PyAV), videos (PyAV, Pillow).

Builders use it to check that a file decodes, datasets to read it, and the processor of an exported folder, which
carries this file, to read prompts. It imports no torch, so tools start fast, and the packages of a kind of media with
the first file of that kind (`package`: an ImportError where one is missing). Every other failure is a `DataError` that
says what the bytes are not; callers add file or shard and record. What a header claims is compared with limits before
it is decoded: a file of a few kilobytes can claim, and hold, gigabytes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from types import ModuleType

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from megatron_mm.media.errors import DataError

#: Pixels above which an image is refused before it is decoded.
MAX_IMAGE_PIXELS = 1 << 27
#: Pixels above which a video's frame is refused (8K has 33 million); a decoder holds up to 16 of them at once.
MAX_FRAME_PIXELS = 1 << 25
#: Pixels of all frames together that are taken from a video.
MAX_VIDEO_PIXELS = 1 << 28
#: Samples above which a sound is refused: 2 h 19 min at 16 kHz.
MAX_SOUND_SAMPLES = 1 << 27
_SOUND_BLOCK = 1 << 20


def package(name: str, purpose: str) -> ModuleType:
    """A package that some media need, imported when the first of them comes.

    No import statement: transformers finds those of an exported folder's files even within functions, and would refuse
    the folder of a model that never reads such media.

    Raises:
        ImportError: it is not installed, or does not load; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package {name}: pip install {name} ({error})") from error


def refuse_empty(data: bytes) -> None:
    """Raises DataError for a file without a byte."""
    if not data:
        raise DataError("an empty file")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparent pixels show white, not the arbitrary colour stored beneath them."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image.alpha_composite(rgba)
    return image.convert("RGB")


def open_image(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:  # Pillow's own limit is higher
            raise DataError(f"an image of more pixels than the limit of {MAX_IMAGE_PIXELS} ({error})") from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise DataError(f"an image of {image.width} × {image.height} pixels; the limit is {MAX_IMAGE_PIXELS} pixels")
    return image


def decode_image(data: bytes) -> Image.Image:
    """Decodes a still image (the first frame of an animated one) to RGB.

    Raises:
        DataError: empty, not an image, truncated, corrupt or larger than `MAX_IMAGE_PIXELS`.
    """
    refuse_empty(data)
    try:
        image = open_image(data)
        image.load()
        return to_rgb(image)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError("not an image that Pillow can read") from error
    except Exception as error:  # a damaged header ends in whatever Pillow's parsers raise
        raise DataError(f"corrupt image ({error})") from error


def read_image(data: bytes) -> Image.Image | np.ndarray:
    """A still image for a model: a JPEG as uint8 [height, width, 3], anything else as `decode_image` gives it.

    Both hold the same pixels: both decode with libjpeg-turbo, but simplejpeg in two thirds of Pillow's time.

    Raises:
        DataError: as `decode_image`.
    """
    if data[:3] == b"\xff\xd8\xff":
        simplejpeg = package("simplejpeg", "reading JPEG images")
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
        DataError: empty, not a sound, corrupt, without samples, or with samples that are no numbers.
    """
    refuse_empty(data)
    soundfile = package("soundfile", "reading sounds")
    try:
        mono, rate = _decode_sound_file(data)
    except (soundfile.LibsndfileError, RuntimeError):
        mono, rate = _decode_sound_av(data)
    check_samples(mono)
    return mono, int(rate)


def check_samples(samples: np.ndarray) -> None:
    """Raises DataError for a sound without samples, or with some that are no numbers."""
    if samples.size == 0:
        raise DataError("a sound without samples")
    if not np.isfinite(samples).all():
        raise DataError("a sound whose samples are not all numbers")


def _decode_sound_file(data: bytes) -> tuple[np.ndarray, int]:
    """By libsndfile, a block at a time: the length in a header may be a lie, or missing (then it is 2^63 - 1)."""
    soundfile = package("soundfile", "reading sounds")
    parts, count = [], 0
    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        if sound.frames < np.iinfo(np.int64).max:
            _limit_samples(sound.frames)
        step = max(1, _SOUND_BLOCK // sound.channels)
        while (block := sound.read(step, dtype="float32", always_2d=True)).size:
            count += len(block)
            _limit_samples(count)
            parts.append(block.mean(axis=1))
    return np.concatenate([np.empty(0, np.float32), *parts]), sound.samplerate


def _limit_samples(count: int) -> None:
    if count > MAX_SOUND_SAMPLES:
        raise DataError(f"a sound of {count} samples or more; the limit is {MAX_SOUND_SAMPLES} samples")


def _decode_sound_av(data: bytes) -> tuple[np.ndarray, int]:
    av = package("av", "reading a sound that libsndfile does not know, or a video's,")
    parts, rate, count = [], 0, 0
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.audio:
                raise DataError("no sound track")
            rate = container.streams.audio[0].codec_context.sample_rate
            # Packed: PyAV reads beyond the planes of a planar frame of more than 16 channels.
            resampler = av.AudioResampler(format="flt", layout=None, rate=None)
            for frame in container.decode(audio=0):
                for out in resampler.resample(frame):
                    count += out.samples
                    _limit_samples(count)
                    parts.append(out.to_ndarray().reshape(out.samples, -1).mean(axis=1))
    except DataError:
        raise
    except Exception as error:  # whatever a damaged container makes PyAV raise
        raise DataError(f"not a sound that libsndfile or FFmpeg can read ({error})") from error
    return np.concatenate(parts).astype(np.float32) if parts else np.empty(0, np.float32), rate


def resample(samples: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """Mono samples at another rate, float32.

    Raises:
        DataError: so short a sound that none are left.
    """
    if rate == sample_rate:
        return samples
    soxr = package("soxr", f"hearing a sound of {rate} Hz at {sample_rate} Hz")
    resampled = soxr.resample(samples, rate, sample_rate).astype(np.float32)
    if resampled.size == 0:
        raise DataError(f"a sound too short to hear: {samples.size} samples at {rate} Hz are none at {sample_rate} Hz")
    return resampled


def evenly_spaced(total: int, wanted: int) -> np.ndarray:
    """Frame numbers in the middle of `wanted` equal parts of `total` frames; frames repeat evenly where too few."""
    return (2 * np.arange(wanted) + 1) * total // (2 * wanted)


def decode_video(data: bytes, num_frames: int) -> list[Image.Image]:
    """Decodes `num_frames` evenly spaced frames, RGB; a video with fewer repeats them evenly. Animated WebP, GIF and
    PNG count as videos.

    Raises:
        DataError: empty, not a video, corrupt, without frames, or with frames that are larger than `MAX_FRAME_PIXELS`,
            or together than `MAX_VIDEO_PIXELS`.
    """
    refuse_empty(data)
    return _animation_frames(data, num_frames) if is_animation(data) else _video_frames(data, num_frames)


def decode_clip(data: bytes, num_frames: int) -> list[Image.Image]:
    """As `decode_video`, of a video whose frames are all cropped as the first is.

    Raises:
        DataError: also where a frame is smaller than the first.
    """
    frames = decode_video(data, num_frames)
    (width, height), *others = (frame.size for frame in frames)
    for number, (w, h) in enumerate(others, 1):
        if w < width or h < height:
            raise DataError(f"frame {number} of {w} × {h} pixels is smaller than the first, of {width} × {height}")
    return frames


def is_animation(data: bytes) -> bool:
    """Whether a video is an image format's (GIF, PNG, WebP), read by Pillow; any other is FFmpeg's."""
    return data[:4] in (b"GIF8", b"\x89PNG") or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def limit_frames(width: int, height: int, count: int) -> None:
    """Refuses frames that would fill the memory; `count` is how many are kept."""
    if width * height > MAX_FRAME_PIXELS:
        raise DataError(f"a video of {width} × {height} pixels; the limit is {MAX_FRAME_PIXELS} pixels a frame")
    if width * height * count > MAX_VIDEO_PIXELS:
        raise DataError(
            f"{count} frames of {width} × {height} pixels; the limit is {MAX_VIDEO_PIXELS} pixels of all frames"
        )


def _animation_frames(data: bytes, num_frames: int) -> list[Image.Image]:
    try:
        image = open_image(data)
        wanted = evenly_spaced(getattr(image, "n_frames", 1), num_frames)
        needed = set(wanted.tolist())
        limit_frames(*image.size, len(needed))
        frames = {i: to_rgb(frame.copy()) for i, frame in enumerate(ImageSequence.Iterator(image)) if i in needed}
        return [frames[i] for i in wanted.tolist()]
    except DataError:
        raise
    except Exception as error:  # a damaged header ends in whatever Pillow's parsers raise
        raise DataError(f"corrupt animation ({error})") from error


def _video_frames(data: bytes, num_frames: int) -> list[Image.Image]:
    av = package("av", "reading videos")
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise DataError("no video track")
            context = container.streams.video[0].codec_context
            limit_frames(context.width, context.height, 1)
            total = sum(1 for packet in container.demux(video=0) if packet.size)
        # Packets are counted without decoding; where some hold no frame, the frames really there are counted instead.
        for _ in range(2):
            if total == 0:
                break
            wanted = evenly_spaced(total, num_frames).tolist()
            needed, frames, count = set(wanted), {}, 0
            with av.open(io.BytesIO(data)) as container:
                # Frames may be larger than the header says: FFmpeg compares each with this.
                container.streams.video[0].codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
                for frame in container.decode(video=0):
                    if count in needed:
                        limit_frames(frame.width, frame.height, len(needed))
                        frames[count] = frame.to_image()
                    count += 1
                    if count > wanted[-1]:
                        break
            if len(frames) == len(needed):
                return [frames[i] for i in wanted]
            total = count
    except DataError:
        raise
    except Exception as error:  # whatever a damaged container makes PyAV raise
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
