"""Decoding and transforms against transformers' feature extractor, Pillow, soundfile and known videos."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from megatron_mm.data.reading.augmentation import random_crop_box
from megatron_mm.media import decoding as media
from megatron_mm.media.decoding import decode_image, decode_sound, decode_video, evenly_spaced, read_image, resample
from megatron_mm.media.errors import DataError
from megatron_mm.media.transforms import center_crop_box, image_tensor, log_mel_spectrogram, resize, waveform
from tests.support import media_files

pytestmark = pytest.mark.interface

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)


@pytest.mark.parametrize(("bins", "seconds"), [(80, 30.0), (128, 30.0), (80, 4.0)])
@pytest.mark.parametrize("length", [1, 16000, 70000, 600000])
def test_log_mel_is_whispers(bins, seconds, length):
    rng = np.random.default_rng(length)
    samples = (0.3 * np.sin(np.arange(length) * 0.05) + 0.01 * rng.standard_normal(length)).astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=bins, chunk_length=int(seconds))
    expected = extractor(samples, sampling_rate=16000, return_tensors="pt").input_features[0]
    ours = log_mel_spectrogram(samples, 16000, seconds, bins)
    assert ours.shape == expected.shape == (bins, int(seconds * 100))
    assert (ours - expected).abs().max() < 1e-5


def encoded(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    decoded = decode_image(encoded(image, format="PNG"))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((0, 0)) == (10, 20, 30) and decoded.getpixel((3, 3)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == (127, 127, 127)
    for mode in ("L", "P", "1", "CMYK", "I;16"):
        assert decode_image(encoded(Image.new(mode, (3, 3)), format="TIFF")).mode == "RGB"


def test_image_errors(monkeypatch):
    jpeg = encoded(Image.effect_noise((64, 64), 90), format="JPEG")
    with pytest.raises(DataError, match="corrupt image"):
        decode_image(jpeg[: len(jpeg) // 2])
    with pytest.raises(DataError, match="not an image"):
        decode_image(b"text")
    monkeypatch.setattr("megatron_mm.media.decoding.MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="64 × 64 pixels; the limit"):
        decode_image(jpeg)


def test_image_tensor_normalises_and_crops():
    flat = Image.new("RGB", (50, 30), (255, 128, 0))
    out = image_tensor(flat, 8, center_crop_box(50, 30), MEAN, STD)
    expected = (torch.tensor([1.0, 128 / 255, 0.0]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert out.shape == (3, 8, 8) and torch.allclose(out, expected[:, None, None].expand(3, 8, 8), atol=1e-5)
    halves = Image.new("RGB", (60, 20))
    halves.paste((255, 255, 255), (20, 0, 40, 20))
    out = image_tensor(halves, 20, center_crop_box(60, 20), (0, 0, 0), (1, 1, 1))
    assert out.min() > 0.99, "the centre square is all white"


def test_random_crops_have_the_stated_distribution_and_depend_on_the_key_only():
    boxes = np.array([random_crop_box(200, 150, [7, 3, i]) for i in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 200).all() and (boxes[:, 3] <= 150).all()
    area, ratio = width * height / 30000, width / height
    fallback = (width == 150) & (height == 150)
    assert fallback.mean() < 0.02
    assert area[~fallback].min() > 0.48 and area.max() <= 1.0 and 0.55 < area.mean() < 0.8
    assert 0.73 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.36
    assert random_crop_box(200, 150, [7, 3, 5]) == tuple(boxes[5])
    assert len({tuple(b) for b in boxes}) > 1900


def wav(samples: np.ndarray, rate: int, format: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=format, subtype=subtype)
    return out.getvalue()


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_sound_formats_are_mixed_to_mono(format):
    t = np.arange(16000) / 16000
    stereo = np.stack([0.5 * np.sin(2 * np.pi * 440 * t), np.zeros_like(t)], axis=1)
    samples, rate = decode_sound(wav(stereo, 16000, format))
    assert rate == 16000 and samples.dtype == np.float32 and abs(samples.size - 16000) < 1200
    spectrum = np.abs(np.fft.rfft(samples[2000:14000]))
    assert abs(np.argmax(spectrum) * 16000 / 12000 - 440) < 3
    assert 0.2 < np.abs(samples[4000:12000]).max() < 0.3, "half of the left channel's amplitude"


@pytest.mark.parametrize("length", [1, 700, 4000, 9000])
def test_waveforms_are_wav2vec2s(length):
    """Cut or padded, mean 0 and deviation 1 over the sound's own samples; silence stays silence."""
    samples = np.random.default_rng(length).normal(0.1, 0.3, length).astype(np.float32)
    extract = Wav2Vec2FeatureExtractor(sampling_rate=16000, do_normalize=True, return_attention_mask=True)
    padded = extract(samples, sampling_rate=16000, padding="max_length", max_length=4000, truncation=True)
    out = waveform(samples, 4000)
    assert out.dtype == torch.float32 and out.shape == (4000,)
    assert np.abs(out.numpy() - padded["input_values"][0]).max() < 1e-5
    assert (out[length:] == 0).all()
    assert waveform(np.zeros(100, np.float32), 50).abs().max() == 0


def test_resample_keeps_the_pitch():
    tone = np.sin(2 * np.pi * 500 * np.arange(8000) / 8000).astype(np.float32)
    out = resample(tone, 8000, 16000)
    assert out.size == 16000 and out.dtype == np.float32
    assert np.argmax(np.abs(np.fft.rfft(out))) == 500
    with pytest.raises(DataError, match="1 samples at 48000 Hz are none at 16000 Hz"):
        resample(np.ones(1, np.float32), 48000, 16000)


def video(num_frames: int, sound: bool = False, layout: str = "mono") -> bytes:
    """Frame i is grey 16 + 12·i. The sound is a tone on the first channel, half as loud on the second."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout=layout) if sound else None
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 16 + 12 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            tone = (0.4 * np.sin(np.arange(16384) * 0.2)).astype(np.float32)
            channels = np.stack([tone, tone / 2][: audio.channels])
            frame = av.AudioFrame.from_ndarray(channels, format="fltp", layout=layout)
            frame.rate = 16000
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return out.getvalue()


def greys(frames: list[Image.Image]) -> list[int]:
    return [round((np.asarray(f).mean() - 16) / 12) for f in frames]


@pytest.mark.parametrize(("total", "wanted"), [(12, 4), (5, 5), (3, 8), (1, 3), (16, 1)])
def test_video_frames_are_evenly_spaced(total, wanted):
    expected = [((2 * i + 1) * total) // (2 * wanted) for i in range(wanted)]
    assert evenly_spaced(total, wanted).tolist() == expected
    assert greys(decode_video(video(total), wanted)) == expected
    for format in ("WEBP", "GIF", "PNG"):
        frames = [Image.new("RGB", (16, 16), (16 + 12 * i,) * 3) for i in range(total)]
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format=format, save_all=True, append_images=frames[1:], **options)
        assert greys(decode_video(data, wanted)) == expected, format


def test_sound_tracks_are_mixed_to_mono():
    """The mean of the channels, as of a sound file."""
    for layout, loudness in (("mono", 0.4), ("stereo", 0.3)):
        samples, rate = decode_sound(video(3, sound=True, layout=layout))
        assert rate == 16000 and samples.ndim == 1 and 16000 <= samples.size < 19000
        middle = samples[4000:12000]
        assert np.abs(middle).max() == pytest.approx(loudness, rel=0.1), layout
        assert np.argmax(np.abs(np.fft.rfft(middle))) == round(0.2 / (2 * np.pi) * middle.size)


def test_video_and_sound_errors():
    with pytest.raises(DataError, match="no sound track"):
        decode_sound(video(3))
    with pytest.raises(DataError, match="without samples"):
        decode_sound(wav(np.zeros(0), 8000))
    with pytest.raises(DataError, match="not all numbers"):
        decode_sound(wav(np.array([0.1, np.nan, 0.2]), 8000, subtype="FLOAT"))
    with pytest.raises(DataError, match="not a sound"):
        decode_sound(b"nothing at all")
    with pytest.raises(DataError, match="no video track"):
        decode_video(wav(np.ones(100), 8000), 2)
    with pytest.raises(DataError, match="not a video"):
        decode_video(b"nothing at all", 2)
    data = video(12)
    with pytest.raises(DataError):
        decode_video(data[: len(data) // 2], 2)


# ------------------------------------------------------------------------------------------------------- JPEG


def photo(width: int = 90, height: int = 70) -> Image.Image:
    """Smooth colours with noise."""
    random = np.random.default_rng(4)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], -1) * 90 + 128
    return Image.fromarray(np.clip(waves + random.normal(0, 9, waves.shape), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options", [{"quality": 90}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"optimize": True}]
)
def test_jpeg_is_read_as_pillow_reads_it(mode, options):
    data = encoded(photo().convert(mode), format="JPEG", **options)
    pixels = read_image(data)
    assert isinstance(pixels, np.ndarray) and np.array_equal(pixels, np.asarray(decode_image(data)))


def test_what_is_no_common_jpeg_goes_to_pillow(monkeypatch):
    for data in (encoded(photo().convert("CMYK"), format="JPEG"), encoded(photo(), format="PNG")):
        assert np.array_equal(np.asarray(read_image(data)), np.asarray(decode_image(data)))
    jpeg = encoded(photo(), format="JPEG")
    for data in (jpeg[: len(jpeg) // 2], jpeg[:3]):
        with pytest.raises(DataError, match=r"corrupt image|not an image"):
            read_image(data)
    monkeypatch.setattr(media, "MAX_IMAGE_PIXELS", 90 * 70 - 1)
    with pytest.raises(DataError, match="90 × 70 pixels"):
        read_image(jpeg)


def test_resizing_by_torch_is_pillows_but_for_rounding():
    image = photo(300, 240)
    for box in ((0, 0, 240, 240), (31, 5, 200, 190), (100, 100, 130, 150)):
        for size in (224, 32):
            ours = np.asarray(resize(np.array(image), size, box), np.int16)
            pillows = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC), np.int16)
            # The weights have 15 bits in torch and 22 in Pillow; two passes, a rounding each.
            difference = np.abs(ours - pillows)
            assert difference.max() <= 2 and (difference > 1).mean() < 1e-3
    halves = (0.5, 0, 240.5, 240)
    assert resize(np.array(image), 32, halves) == resize(image, 32, halves)


def test_a_clip_whose_frames_shrink_is_refused():
    """The first frame's crop would reach beyond the others. Frames that are seen one by one may have any sizes."""
    large, small = (media_files.picture(photo(*size), "JPEG") for size in ((48, 36), (24, 18)))
    shrinking, growing = large + small, small + large
    assert [frame.size for frame in decode_video(shrinking, 2)] == [(48, 36), (24, 18)]
    with pytest.raises(DataError, match="frame 1 of 24 × 18 pixels is smaller than the first, of 48 × 36"):
        media.decode_clip(shrinking, 2)
    assert [frame.size for frame in media.decode_clip(growing, 2)] == [(24, 18), (48, 36)]
