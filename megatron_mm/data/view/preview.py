"""Media as a browser shows them without any other file: data: URIs, scaled down or cut so that a page stays small."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

from PIL import Image

from megatron_mm.media.decoding import decode_image, decode_sound, decode_video
from megatron_mm.media.encoding import flac
from megatron_mm.media.errors import DataError

#: Longest side in pixels of an image and of a video's frame.
IMAGE_SIDE, FRAME_SIDE = 320, 144
#: Frames of a video that are shown.
FRAMES = 6
#: A playable sound of at most so many bytes is shown as it is; of a longer one so many seconds.
SOUND_BYTES, SOUND_SECONDS = 1 << 20, 30
_PNG_BYTES = 1 << 15
#: What all browsers play, by libsndfile's names of a file's format and encoding.
_PLAYABLE = {
    **{(form, kind): "audio/wav" for form in ("WAV", "WAVEX") for kind in ("PCM_U8", "PCM_16", "PCM_24", "FLOAT")},
    **{("FLAC", kind): "audio/flac" for kind in ("PCM_S8", "PCM_16", "PCM_24")},
    ("OGG", "VORBIS"): "audio/ogg",
    ("OGG", "OPUS"): "audio/ogg",
    ("MP3", "MPEG_LAYER_III"): "audio/mpeg",
}


@dataclass
class Preview:
    """A medium for a page."""

    kind: str
    """'images', 'audios' or 'videos'."""
    caption: str
    """What the stored medium is."""
    uris: list[str] = field(default_factory=list)
    """An image, a sound, or the frames of a video."""
    error: str = ""
    """Why there is nothing to show."""


def preview(kind: str, data: bytes) -> Preview:
    """A medium ready to show; a damaged one says what is wrong with it.

    Args:
        kind: 'images', 'audios' or 'videos'.
        data: the encoded file.
    """
    size = f"{len(data):,} bytes"
    try:
        if kind == "images":
            image = decode_image(data)
            return Preview(kind, f"{image.width} × {image.height}, {size}", [_image_uri(image, IMAGE_SIDE)])
        if kind == "audios":
            return _sound(data, size)
        # A video with fewer frames repeats them.
        frames = list({id(frame): frame for frame in decode_video(data, FRAMES)}.values())
        width, height = frames[0].size
        caption = f"{width} × {height}, {len(frames)} frames, evenly spaced, {size}"
        return Preview(kind, caption, [_image_uri(frame, FRAME_SIDE) for frame in frames])
    except DataError as error:
        return Preview(kind, size, error=str(error))


def _uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _image_uri(image: Image.Image, side: int) -> str:
    """PNG, which drawings need; JPEG where that would be large, as for photographs."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG")
    if out.tell() <= _PNG_BYTES:
        return _uri("image/png", out.getvalue())
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return _uri("image/jpeg", out.getvalue())


def _sound(data: bytes, size: str) -> Preview:
    samples, rate = decode_sound(data)
    caption = f"{samples.size / rate:.2f} s at {rate:,} Hz, {size}"
    mime = _playable_type(data) if len(data) <= SOUND_BYTES else None
    if mime is not None:
        return Preview("audios", caption, [_uri(mime, data)])
    seconds = samples.size / rate
    caption += f"; here its first {SOUND_SECONDS} s as FLAC" if seconds > SOUND_SECONDS else "; here as FLAC"
    return Preview("audios", caption, [_uri("audio/flac", flac(samples[: SOUND_SECONDS * rate], rate))])


def _playable_type(data: bytes) -> str | None:
    """MIME type of a sound that browsers play; None for any other."""
    import soundfile

    try:
        info = soundfile.info(io.BytesIO(data))
    except (soundfile.LibsndfileError, RuntimeError):
        return None
    return _PLAYABLE.get((info.format, info.subtype))

