"""Media encoded anew: the same picture, pitch and frames, smaller; the same bytes for any number of workers.

Truth: what `decode_*` gives of the originals, resized by Pillow; tones of known pitch; frames of known greys.
"""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw

from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.jobs import unfinished
from megatron_mm.data.store.shards import Shard
from megatron_mm.media.decoding import decode_image, decode_sound, decode_video, resample
from megatron_mm.media.encoding import Encoding, encode_medium
from megatron_mm.media.errors import DataError
from tests.support.programs import PYTHON

pytestmark = pytest.mark.interface

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_multimodal.py"
EVERYTHING = Encoding("webp", 24, 80, "flac", 4000, "frames", 3, 20)


def photo(width: int = 120, height: int = 80) -> Image.Image:
    """Smooth colours with grain: what lossy formats are for."""
    y, x = np.mgrid[:height, :width]
    colours = np.stack([128 + 90 * np.sin(x / 19), 128 + 90 * np.cos(y / 13), 128 + 60 * np.sin((x + y) / 23)], axis=2)
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 1))
    return Image.fromarray(np.clip(colours + grain, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean over pixels and channels, of 255."""
    assert a.size == b.size
    return float(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).mean())


@pytest.mark.parametrize("form", ["jpeg", "webp", "png"])
def test_an_image_is_the_same_picture_smaller(form):
    data = encoded(photo(), "BMP")
    same = encode_medium("images", data, Encoding(form))
    assert len(same) < len(data) and Image.open(io.BytesIO(same)).format == form.upper()
    assert difference(decode_image(same), photo()) < (1e-9 if form == "png" else 5)
    small = decode_image(encode_medium("images", data, Encoding(form, image_size=40)))
    assert small.size == (60, 40), "the shorter side is 40, the aspect that of 120 × 80"
    assert difference(small, photo().resize((60, 40), Image.Resampling.LANCZOS)) < (1e-9 if form == "png" else 5)
    tall = decode_image(encode_medium("images", encoded(photo(30, 400), "PNG"), Encoding(form, image_size=3)))
    assert tall.size == (3, 40)


def test_quality_is_the_encoders():
    sizes = [len(encode_medium("images", encoded(photo(), "BMP"), Encoding("jpeg", None, q))) for q in (20, 60, 90, 98)]
    assert sizes == sorted(set(sizes))
    default = encode_medium("images", encoded(photo(), "BMP"), Encoding("jpeg"))
    assert len(default) == sizes[2]


@pytest.mark.parametrize("form", ["jpeg", "webp", "png"])
def test_a_picture_means_what_it_meant(form):
    """Readers follow no orientation, and show transparent pixels white: what is stored says nothing else."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90°
    turned = encoded(photo(), "JPEG", quality=95, exif=exif)
    stored = encode_medium("images", turned, Encoding(form, image_size=70))
    assert decode_image(stored).size == (105, 70) and 0x0112 not in Image.open(io.BytesIO(stored)).getexif()
    before = decode_image(turned).resize((105, 70), Image.Resampling.LANCZOS)
    assert difference(decode_image(stored), before) < 5
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    ImageDraw.Draw(clear).rectangle((0, 0, 31, 63), fill=(0, 0, 200, 255))
    stored = decode_image(encode_medium("images", encoded(clear, "TIFF"), Encoding(form)))
    assert min(stored.getpixel((60, 30))) > 250 and stored.getpixel((4, 30))[2] > 180


def test_what_fits_and_would_get_larger_is_kept():
    drawing = encoded(Image.new("RGB", (64, 64), "red"), "PNG")
    jpeg = encoded(photo(), "JPEG", quality=30)
    for data in (drawing, jpeg):
        assert encode_medium("images", data, Encoding("jpeg", image_size=80, image_quality=95)) == data
        assert encode_medium("images", data, Encoding("png")) == data
    assert decode_image(encode_medium("images", drawing, Encoding("jpeg", image_size=20))).size == (20, 20)
    bad = encoded(Image.new("RGB", (17000, 2)), "BMP")
    with pytest.raises(DataError, match="17000 × 2 pixels cannot be stored as webp"):
        encode_medium("images", bad, Encoding("webp"))
    with pytest.raises(DataError, match="not an image"):
        encode_medium("images", b"text", Encoding("webp"))
    assert encode_medium("images", b"text", Encoding(audio_encoding="flac")) == b"text"


def tone(rate: int, channels: int = 2, seconds: float = 1.0, form: str = "WAV") -> bytes:
    """440 Hz at 0.5 on the first channel, silence on the second."""
    t = np.arange(int(rate * seconds)) / rate
    samples = np.stack([0.5 * np.sin(2 * np.pi * 440 * t), np.zeros_like(t)][:channels], axis=1)
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form)
    return out.getvalue()


def test_sounds_become_mono_flac_of_the_wanted_rate():
    data = encode_medium("audios", tone(44100), Encoding(audio_encoding="flac"))
    info = soundfile.info(io.BytesIO(data))
    assert (info.format, info.subtype, info.channels, info.samplerate) == ("FLAC", "PCM_16", 1, 16000)
    samples, _ = decode_sound(data)
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert samples.size == 16000 and np.abs(samples - expected)[500:-500].max() < 1e-3
    low = encode_medium("audios", tone(8000), Encoding(audio_encoding="flac"))
    before, rate = decode_sound(tone(8000))
    after, stored_rate = decode_sound(low)
    assert rate == stored_rate == 8000, "a lower rate is left: its reader resamples"
    assert np.abs(before - after).max() <= 1 / 65536 + 1e-6, "16 bits, nothing else changed"
    ogg = tone(16000, 1, form="OGG")
    assert encode_medium("audios", ogg, Encoding(audio_encoding="flac")) == ogg, "smaller than its FLAC"
    assert soundfile.info(io.BytesIO(encode_medium("audios", ogg, Encoding(audio_encoding="flac", audio_rate=8000))))
    loud = io.BytesIO()
    soundfile.write(loud, np.sign(np.sin(np.arange(48000) * 0.05)), 48000, subtype="FLOAT", format="WAV")
    resampled = resample(*decode_sound(loud.getvalue()), 16000)
    samples, _ = decode_sound(encode_medium("audios", loud.getvalue(), Encoding(audio_encoding="flac")))
    assert resampled.max() > 1.01
    assert np.abs(samples - np.clip(resampled, -1, 1)).max() < 1e-4, "what rises above 1 is cut off, not wrapped"


def greys_of(frames: list[Image.Image]) -> list[int]:
    return [round((np.asarray(frame).mean() - 16) / 12) for frame in frames]


def grey_video(numbers: list[int], size: tuple[int, int] = (64, 48)) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in numbers:
            pixels = np.full((size[1], size[0], 3), 16 + 12 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def animation(numbers: list[int], form: str = "PNG") -> bytes:
    frames = [Image.new("RGB", (300, 200), (16 + 12 * number,) * 3) for number in numbers]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("total", [1, 2, 3, 8, 13])
def test_stored_frames_are_those_that_training_would_have_read(total):
    """Also where neighbours are equal, which an animation's encoder would merge."""
    wanted = Encoding(video_encoding="frames", video_frames=8, video_size=31)
    for numbers in (list(range(total)), [5] * (total - 1) + [9]):
        data = grey_video(numbers)
        stored = encode_medium("videos", data, wanted)
        with av.open(io.BytesIO(stored)) as container:
            assert sum(1 for packet in container.demux(video=0) if packet.size) == min(8, total)
        frames = decode_video(stored, 8)
        assert greys_of(frames) == greys_of(decode_video(data, 8))
        assert {frame.size for frame in frames} == {(41, 31)}


def test_frames_look_as_before_and_a_small_video_is_kept():
    y, x = np.mgrid[:97, :133]
    frames = [Image.fromarray(np.stack([x + 9 * i, y * 2, x + y], axis=2).astype(np.uint8)) for i in range(6)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    stored = encode_medium("videos", data, Encoding(video_encoding="frames", video_frames=6, image_quality=95))
    for before, after in zip(decode_video(data, 6), decode_video(stored, 6)):
        assert difference(before, after) < 3, "odd sizes and full-range colours survive"
    small = grey_video(list(range(12)), (32, 32))
    assert encode_medium("videos", small, Encoding(video_encoding="frames", video_frames=12)) == small
    assert decode_video(encode_medium("videos", animation([1, 2]), Encoding(video_encoding="frames")), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 224}, "--image-size 224: needs --image-encoding"),
        ({"image_encoding": "png", "image_quality": 80}, "--image-quality 80: needs --image-encoding jpeg or webp"),
        ({"image_encoding": "jpeg", "image_quality": 101}, "--image-quality 101: must lie within 1 … 100"),
        ({"image_encoding": "jpeg", "image_size": 0}, "--image-size 0: must lie within 1"),
        ({"audio_rate": 16000}, "--audio-rate 16000: needs --audio-encoding flac"),
        ({"video_frames": 8}, "--video-frames 8: needs --video-encoding frames"),
        ({"video_encoding": "frames", "video_frames": 0}, "--video-frames 0: must lie within 1"),
    ],
)
def test_options_that_say_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Encoding(**options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_build_for_any_number_of_workers(tmp_path, samples, tokenizer_path, folder):
    for workers in (0, 3):
        build_multimodal([str(samples)], str(tmp_path / f"{workers}"), tokenizer_path, workers=workers, progress=False,
                         encoding=EVERYTHING)  # fmt: skip
    assert contents(tmp_path / "0") == contents(tmp_path / "3")
    plain, small = Shard(folder), Shard(str(tmp_path / "0"))
    assert small.manifest["options"]["encoding"] == {
        "image_encoding": "webp", "image_size": 24, "image_quality": 80, "audio_encoding": "flac", "audio_rate": 4000,
        "video_encoding": "frames", "video_frames": 3, "video_size": 20,
    }  # fmt: skip
    assert (plain.table == small.table).all(), "tokens and counts are the same"
    for kind, reader in plain.media.items():
        for record in range(len(reader)):
            assert small.medium(kind, record) == encode_medium(kind, plain.medium(kind, record), EVERYTHING)


def test_the_tool_and_another_encoding_starts_anew(tmp_path, samples, tokenizer_path, monkeypatch, capsys):
    monkeypatch.setattr(unfinished, "JOURNAL_SECONDS", -1)
    source = samples.parent / "encoded.jsonl"
    source.write_bytes(samples.read_bytes() + b"[]\n")
    with pytest.raises(DataError, match="must be a JSON object"):
        build_multimodal([str(source)], str(tmp_path / "x"), tokenizer_path, progress=False)
    source.write_bytes(samples.read_bytes())
    command = [PYTHON, str(TOOL), "--input", str(source), "--output", str(tmp_path / "x"),
               "--tokenizer-model", tokenizer_path, "--image-encoding", "webp", "--image-size", "24",
               "--audio-encoding", "flac"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert run.returncode == 0 and "begun with other options: starts anew" in run.stderr, run.stderr
    assert "60 samples" in run.stdout
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["options"]["encoding"]["image_size"] == 24
    run = subprocess.run([*command, "--image-size", "0"], capture_output=True, encoding="utf-8")
    assert run.returncode and "--image-size 0: must lie within 1" in run.stderr + run.stdout
