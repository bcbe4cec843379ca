"""Media files of every common kind, and files that every reader refuses: generated, small, always the same."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import av
import numpy as np
import soundfile
from PIL import Image


@dataclass(frozen=True)
class MediaFile:
    """A file, and what is wrong with it."""

    kind: str
    """'images', 'audios' or 'videos'."""
    data: bytes
    cause: str = ""
    """Pattern of the refusal; none of a file that is read."""


# ------------------------------------------------------------------------------------------------------------- images


def photo(width: int = 90, height: int = 70, seed: int = 4) -> Image.Image:
    """Smooth colours with noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9 + seed), np.cos(y / 7), np.sin((x + y) / 11)], -1) * 90 + 128
    noise = np.random.default_rng(seed).normal(0, 9, waves.shape)
    return Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8))


def picture(image: Image.Image, form: str, **options) -> bytes:
    """An image in a format of Pillow's."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def clear(width: int = 90, height: int = 70) -> Image.Image:
    """A photo that fades from left to right."""
    image = photo(width, height)
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))))
    return image


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def claimed_png(width: int, height: int) -> bytes:
    """A PNG whose header says how large it is; there are no pixels."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")


def claimed_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header says another size."""
    data = bytearray(picture(photo(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def claimed_gif(width: int, height: int, frames: int = 2) -> bytes:
    """A small animation whose header says another size."""
    data = bytearray(animation("GIF", frames))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def _images() -> dict[str, bytes]:
    rows = np.tile(np.linspace(0, 400, 90).astype(np.uint16), (70, 1))
    return {
        "420.jpg": picture(photo(), "JPEG", quality=90),
        "odd.jpg": picture(photo(91, 70), "JPEG", quality=80),  # its centre has half pixels: Pillow resizes it
        "tall.jpg": picture(photo(40, 126), "JPEG"),
        "444.jpg": picture(photo(), "JPEG", subsampling=0),
        "422.jpg": picture(photo(), "JPEG", subsampling=1),
        "progressive.jpg": picture(photo(), "JPEG", progressive=True),
        "grey.jpg": picture(photo().convert("L"), "JPEG"),
        "cmyk.jpg": picture(photo().convert("CMYK"), "JPEG"),
        "rgb.png": picture(photo(), "PNG"),
        "alpha.png": picture(clear(), "PNG"),
        "grey-alpha.png": picture(clear().convert("LA"), "PNG"),
        "palette.png": picture(photo().quantize(64), "PNG"),
        "palette-transparent.png": picture(photo().quantize(64), "PNG", transparency=3),
        "bilevel.png": picture(photo().convert("1"), "PNG"),
        "16-bit.png": picture(Image.fromarray(rows), "PNG"),
        "still.gif": picture(photo(), "GIF"),
        "first-frame.gif": animation("GIF", 3),
        "lossy.webp": picture(photo(), "WEBP"),
        "alpha.webp": picture(clear(), "WEBP", lossless=True),
        "photo.bmp": picture(photo(), "BMP"),
        "small.tiff": picture(photo(5, 3), "TIFF"),
    }


# ------------------------------------------------------------------------------------------------------------- sounds


def tones(channels: int, rate: int, seconds: float = 0.3) -> np.ndarray:
    """Samples [n, channels], another tone on each channel."""
    times = np.arange(round(rate * seconds))[:, None] / rate
    return 0.6 * np.sin(2 * np.pi * times * (200 + 37 * np.arange(channels))) / (1 + 0.1 * np.arange(channels))


def sound(samples: np.ndarray, rate: int, form: str = "WAV", subtype: str | None = None) -> bytes:
    """A sound file of libsndfile's."""
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form, subtype=subtype)
    return out.getvalue()


def matroska_sound(channels: int) -> bytes:
    """Uncompressed samples in a container that libsndfile does not read."""
    out = io.BytesIO()
    layout = {1: "mono", 2: "stereo"}.get(channels, f"{channels} channels")
    with av.open(out, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("pcm_f32le", rate=16000, layout=layout)
        samples = np.ascontiguousarray(tones(channels, 16000).astype(np.float32).reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
        frame.rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def claimed_flac(count: int) -> bytes:
    """A short FLAC whose header says another number of samples."""
    data = bytearray(sound(tones(1, 16000), 16000, "FLAC"))
    data[18:26] = (int.from_bytes(data[18:26], "big") >> 36 << 36 | count).to_bytes(8, "big")
    return bytes(data)


def _sounds() -> dict[str, bytes]:
    subtypes = {"8": "PCM_U8", "16": "PCM_16", "24": "PCM_24", "32": "PCM_32", "float": "FLOAT", "double": "DOUBLE"}
    found = {f"{name}.wav": sound(tones(1, 16000), 16000, "WAV", subtype) for name, subtype in subtypes.items()}
    found |= {f"{n}-channels.wav": sound(tones(n, 16000), 16000) for n in (2, 6, 24)}
    found |= {f"{rate}-hz.wav": sound(tones(2, rate), rate) for rate in (8000, 11025, 22050, 44100, 48000, 96000)}
    found |= {f"tone.{form.lower()}": sound(tones(2, 16000), 16000, form) for form in ("FLAC", "OGG", "MP3", "AIFF")}
    found |= {f"{n}-channels.mka": matroska_sound(n) for n in (1, 2, 24)}
    return found | {
        "long.wav": sound(tones(1, 16000, 2.0), 16000),
        "silence.wav": sound(np.zeros(4000), 16000),
        "track.mp4": video("mp4", "mpeg4", 3, with_sound=True),
    }


# ------------------------------------------------------------------------------------------------------------- videos


def animation(form: str, frames: int, **options) -> bytes:
    """An animated image."""
    first, *others = (photo(48, 36, seed) for seed in range(frames))
    return picture(first, form, save_all=True, append_images=others, **options)


def video(form: str, codec: str, frames: int, pixels: str = "yuv420p", with_sound: bool = False) -> bytes:
    """Photos in a container of FFmpeg's."""
    out = io.BytesIO()
    with av.open(out, "w", format=form, options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 36, pixels
        track = container.add_stream("aac", rate=16000, layout="mono") if with_sound else None
        container.start_encoding()  # a container without packets would have no header
        for seed in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(photo(48, 36, seed))))
        container.mux(stream.encode())
        if track is not None:
            samples = np.ascontiguousarray(tones(1, 16000).astype(np.float32).T)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.rate = 16000
            container.mux(track.encode(frame))
            container.mux(track.encode())
    return out.getvalue()


def _videos() -> dict[str, bytes]:
    return {
        "twelve.mp4": video("mp4", "mpeg4", 12),
        "two.mp4": video("mp4", "mpeg4", 2),
        "sound.mp4": video("mp4", "mpeg4", 5, with_sound=True),
        "frames.mov": video("mov", "mjpeg", 6, "yuvj420p"),
        "lossless.mkv": video("matroska", "ffv1", 7),
        "animated.gif": animation("GIF", 7),
        "still-video.gif": animation("GIF", 1),
        "animated.webp": animation("WEBP", 5, lossless=True),
        "animated.png": animation("PNG", 4),
    }


# --------------------------------------------------------------------------------------------------------------- all


def readable() -> dict[str, MediaFile]:
    """Files that are read, by name."""
    kinds = {"images": _images(), "audios": _sounds(), "videos": _videos()}
    return {name: MediaFile(kind, data) for kind, files in kinds.items() for name, data in files.items()}


def refused() -> dict[str, MediaFile]:
    """Files that are refused, by name."""
    holes = tones(1, 16000)
    holes[7] = np.nan
    loud = tones(1, 16000)
    loud[7] = np.inf
    jpeg, png, webp = (picture(photo(), form) for form in ("JPEG", "PNG", "WEBP"))
    mp4 = video("mp4", "mpeg4", 12)
    return {
        "empty.jpg": MediaFile("images", b"", "an empty file"),
        "text.png": MediaFile("images", b"words", "not an image that Pillow can read"),
        "cut.jpg": MediaFile("images", jpeg[: len(jpeg) // 2], "corrupt image"),
        "cut.png": MediaFile("images", png[: len(png) // 2], "corrupt image"),
        "cut.webp": MediaFile("images", webp[: len(webp) // 2], "not an image|corrupt image"),
        "billion.png": MediaFile("images", claimed_png(40000, 25000), "more pixels than the limit of 134217728"),
        "large.png": MediaFile("images", claimed_png(12000, 12500), "12000 × 12500 pixels; the limit is 134217728"),
        "large.jpg": MediaFile("images", claimed_jpeg(12000, 12500), "12000 × 12500 pixels; the limit is 134217728"),
        "empty.wav": MediaFile("audios", b"", "an empty file"),
        "text.wav": MediaFile("audios", b"words", "not a sound that libsndfile or FFmpeg can read"),
        "nan.wav": MediaFile("audios", sound(holes, 16000, "WAV", "FLOAT"), "samples are not all numbers"),
        "infinite.wav": MediaFile("audios", sound(loud, 16000, "WAV", "FLOAT"), "samples are not all numbers"),
        "none.wav": MediaFile("audios", sound(np.zeros(0), 16000), "a sound without samples"),
        "day.flac": MediaFile("audios", claimed_flac(16000 * 86400), "a sound of 1382400000 samples or more"),
        "mute.mp4": MediaFile("audios", mp4, "no sound track"),
        "empty.mp4": MediaFile("videos", b"", "an empty file"),
        "text.mp4": MediaFile("videos", b"words", "not a video that FFmpeg can read"),
        "cut.mp4": MediaFile("videos", mp4[: len(mp4) // 2], "not a video that FFmpeg can read"),
        "frameless.avi": MediaFile("videos", video("avi", "mjpeg", 0, "yuvj420p"), "a video without frames"),
        "tone.wav": MediaFile("videos", sound(tones(1, 16000), 16000), "no video track"),
        "canvas.gif": MediaFile("videos", claimed_gif(65535, 65535), "more pixels than the limit of 134217728"),
        "frame.gif": MediaFile("videos", claimed_gif(11000, 11000), "11000 × 11000 pixels; the limit is 33554432"),
    }
