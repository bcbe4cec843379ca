"""Media as a dataset stores them: as they came, or encoded anew, smaller and quicker to read.

What is encoded anew is what training would have read (`decoding.py`), so a medium means the same before and after: an
image is RGB on white and as its pixels lie in the file, because readers follow no EXIF orientation and no colour
profile, and neither is stored; a sound is mono; of a video only the frames that training takes are left, without sound.

A medium that needs no other size or rate, and that would not get smaller, is stored as it came. So a drawing of 300
bytes does not become a JPEG of 900, and nothing is the worse for having been through twice.

Frames of a video are stored as Motion JPEG in QuickTime. Measured on 8 frames of 342 × 256 at equal fidelity, animated
WebP is a third smaller and as quick to read, but takes twenty times as long to write, and its encoder merges equal
neighbours, after which the frames are no longer evenly spaced; H.264 is half the size and takes twice as long to read,
and not every FFmpeg can write it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from PIL import Image

from megatron_mm.media.decoding import decode_image, decode_sound, decode_video, package, resample
from megatron_mm.media.errors import DataError

_QUALITY = 90


@dataclass(frozen=True)
class Encoding:
    """How media are stored.

    Raises:
        ValueError: a number is out of range, or says something of what is kept as it is.
    """

    image_encoding: Literal["keep", "jpeg", "webp", "png"] = "keep"
    """Format of images; keep: as they are. One that fits and would get larger is kept too."""
    image_size: int | None = None
    """Pixels of the shorter side above which an image is made smaller; aspect ratios are kept."""
    image_quality: int | None = None
    """1 to 100, of JPEG, WebP and the frames of videos; 90 if not given."""
    audio_encoding: Literal["keep", "flac"] = "keep"
    """flac: mono FLAC of 16 bits; keep: as they are."""
    audio_rate: int | None = None
    """Hz above which a FLAC is resampled; 16000 if not given."""
    video_encoding: Literal["keep", "frames"] = "keep"
    """frames: evenly spaced frames as Motion JPEG, without sound; keep: as they are."""
    video_frames: int | None = None
    """Frames of a video, as many as data.frames_per_video will ask for; 8 if not given."""
    video_size: int | None = None
    """Pixels of the shorter side above which frames are made smaller."""

    def __post_init__(self) -> None:
        lossy = self.image_encoding in ("jpeg", "webp") or self.video_encoding == "frames"
        rules = {
            "image_size": (self.image_encoding != "keep", "--image-encoding jpeg, webp or png", 1, 1 << 14),
            "image_quality": (lossy, "--image-encoding jpeg or webp, or --video-encoding frames", 1, 100),
            "audio_rate": (self.audio_encoding != "keep", "--audio-encoding flac", 1000, 192000),
            "video_frames": (self.video_encoding != "keep", "--video-encoding frames", 1, 1 << 12),
            "video_size": (self.video_encoding != "keep", "--video-encoding frames", 1, 1 << 14),
        }
        for name, (used, needs, least, most) in rules.items():
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            if value is not None and not used:
                raise ValueError(f"{flag} {value}: needs {needs}")
            if value is not None and not least <= value <= most:
                raise ValueError(f"{flag} {value}: must lie within {least} … {most}")

    def changes(self, kind: str) -> bool:
        """Whether media of a kind ('images', 'audios' or 'videos') are encoded anew."""
        wanted = {"images": self.image_encoding, "audios": self.audio_encoding, "videos": self.video_encoding}
        return wanted[kind] != "keep"


#: Media as they came.
KEEP = Encoding()


def encode_medium(kind: str, data: bytes, encoding: Encoding) -> bytes:
    """A medium as it is to be stored: encoded anew, or its own bytes.

    Args:
        kind: 'images', 'audios' or 'videos'.
        data: encoded bytes.
        encoding: how; the bytes returned depend on nothing else but the versions of the encoders.

    Raises:
        DataError: it does not decode, or is too large for the format.
    """
    if not encoding.changes(kind):
        return data
    encode = {"images": _image, "audios": _sound, "videos": _video}[kind]
    made, fits = encode(data, encoding)
    return data if fits and len(data) <= len(made) else made


def _image(data: bytes, encoding: Encoding) -> tuple[bytes, bool]:
    """The image encoded anew, and whether its size was right."""
    image = decode_image(data)
    smaller = _fitted(image, encoding.image_size)
    return _picture(smaller, encoding.image_encoding, encoding.image_quality or _QUALITY), smaller is image


def _fitted(image: Image.Image, size: int | None) -> Image.Image:
    """The image itself, or a copy whose shorter side is `size`."""
    shorter = min(image.size)
    if size is None or shorter <= size:
        return image
    width, height = (round(side * size / shorter) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _picture(image: Image.Image, form: str, quality: int) -> bytes:
    out = io.BytesIO()
    try:
        image.save(out, form, **({} if form == "png" else {"quality": quality}))
    except (OSError, ValueError) as error:  # a side of WebP has at most 16383 pixels, of JPEG 65535
        raise DataError(f"{image.width} × {image.height} pixels cannot be stored as {form} ({error})") from error
    return out.getvalue()


def _sound(data: bytes, encoding: Encoding) -> tuple[bytes, bool]:
    """The sound as FLAC, and whether its rate was right."""
    samples, rate = decode_sound(data)
    wanted = min(rate, encoding.audio_rate or 16000)
    return flac(resample(samples, rate, wanted), wanted), rate == wanted


def flac(samples: np.ndarray, rate: int) -> bytes:
    """Mono FLAC of 16 bits, of samples [n] in [-1, 1] (others are clipped) at a rate in Hz."""
    soundfile = package("soundfile", "writing FLAC")
    out = io.BytesIO()
    soundfile.write(out, np.clip(samples, -1.0, 1.0), rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def _video(data: bytes, encoding: Encoding) -> tuple[bytes, bool]:
    """Frames as Motion JPEG, and whether their size was right."""
    av = package("av", "writing videos")
    # Where a video has too few frames, some are repeated: they are stored once, and repeated again by who reads them.
    frames = list({id(frame): frame for frame in decode_video(data, encoding.video_frames or 8)}.values())
    fitted = [_fitted(frame, encoding.video_size) for frame in frames]
    out = io.BytesIO()
    with av.open(out, "w", format="mov", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height = fitted[0].size
        stream.pix_fmt = "yuvj420p"
        for number, frame in enumerate(fitted):
            packet = av.Packet(_picture(frame, "jpeg", encoding.image_quality or _QUALITY))
            packet.stream, packet.time_base = stream, Fraction(1)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    return out.getvalue(), all(new is old for new, old in zip(fitted, frames))
