"""Small files that claim or hold far more than memory has are refused by name, before they fill it.

Truth: the peak of a process of its own, from /proc (ru_maxrss would count the process that started it). The bound is
1 GiB; what is refused by its header takes a fraction of that.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import resource
import struct
import subprocess
import zlib
from pathlib import Path

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from PIL import Image

from megatron_mm.data.corpus import columns
from megatron_mm.data.corpus.text_input import open_lines, zstd
from megatron_mm.media import decoding as media
from megatron_mm.media.errors import DataError
from tests.support.programs import INTERPRETER, PYTHON

MIB = 1 << 20
#: python -c DECODE kind file …: tries to decode each, prints [peak in MiB, message] of each.
DECODE = """
import json, sys
from megatron_mm.media.errors import DataError
from megatron_mm.media.decoding import decode_image, decode_sound, decode_video
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10
for path in sys.argv[1:]:
    kind, data = path.rsplit(".", 2)[-2], open(path, "rb").read()
    try:
        {"image": decode_image, "sound": decode_sound, "video": lambda d: decode_video(d, 9)}[kind](data)
        message = "decoded"
    except DataError as error:
        message = str(error)
    print(json.dumps([path, peak(), message]))
"""
#: python -c BUILD input output tokenizer: builds with --on-error skip, prints [peak in MiB, message].
BUILD = """
import json, sys
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.media.errors import DataError
try:
    message = build_multimodal([sys.argv[1]], sys.argv[2], sys.argv[3], workers=0, progress=False, on_error="skip")
    message = str(message["counts"])
except DataError as error:
    message = str(error)
print(json.dumps([sys.argv[1], int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10, message]))
"""
#: python -c READ file: reads four lines.
READ = """
import json, sys
from megatron_mm.media.errors import DataError
from megatron_mm.data.corpus.text_input import open_lines
message = "read"
try:
    with open_lines(sys.argv[1]) as (stream, _):
        for _ in range(4):
            stream.readline()
except DataError as error:
    message = str(error)
print(json.dumps([sys.argv[1], int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10, message]))
"""


def outcome(program: str, *words: str | Path) -> list[tuple[str, int, str]]:
    """(file, peak in MiB so far, message) of each file that a program was given."""
    run = subprocess.run([INTERPRETER, "-c", program, *map(str, words)], capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr[-2000:]
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *extra: bytes, pixels: bytes = b"") -> bytes:
    """An RGB image with chunks between its header and its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def deflated_zeros(mebibytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(mebibytes)) + packer.flush()


def animation(form: str, width: int, height: int, frames: int = 2) -> bytes:
    """Frames of 8 × 8 pixels on a canvas that the header says is larger."""
    out = io.BytesIO()
    images = [Image.new("RGB", (8, 8), (6 * i, 255 - 6 * i, 128 * (i % 2))) for i in range(frames)]
    images[0].save(out, form, save_all=True, append_images=images[1:])
    data = bytearray(out.getvalue())
    if form == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    else:
        at = data.index(b"VP8X") + 12
        data[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def huge_frames() -> bytes:
    """Motion JPEG whose frames say that they have 256 million pixels."""
    out = io.BytesIO()
    with av.open(out, "w", format="mov") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32)))))
        container.mux(stream.encode())
    data, at = bytearray(out.getvalue()), 0
    while (at := data.find(b"\xff\xc0", at + 1)) > 0:
        data[at + 5 : at + 9] = struct.pack(">HH", 16000, 16000)
    return bytes(data)


def flac(total: int | None = None) -> bytes:
    """Three hours of silence, half a megabyte; its header says another number of samples, 0 for unknown."""
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", 16000, 1, format="FLAC", subtype="PCM_16") as stream:
        for _ in range(18):
            stream.write(np.zeros(16000 * 600, np.int16))
    data = bytearray(out.getvalue())
    if total is not None:
        data[18:26] = (int.from_bytes(data[18:26], "big") >> 36 << 36 | total).to_bytes(8, "big")
    return bytes(data)


@pytest.mark.slow
def test_media_that_claim_gigabytes_are_refused(tmp_path):
    bomb = deflated_zeros(256)
    wav = io.BytesIO()
    soundfile.write(wav, np.zeros(80000, np.int16), 8000, format="WAV", subtype="PCM_16")
    cases = {
        "billion.image.png": (png(40000, 25000), "more pixels than the limit of 134217728"),
        "large.image.png": (png(12000, 12500), "12000 × 12500 pixels; the limit is 134217728"),
        "ztxt.image.png": (png(4, 4, chunk(b"zTXt", b"k\0\0" + bomb), pixels=bytes(52)), "corrupt image .*too large"),
        "iccp.image.png": (png(4, 4, chunk(b"iCCP", b"k\0\0" + bomb), pixels=bytes(52)), "corrupt image .*too large"),
        "canvas.image.webp": (animation("WEBP", 16380, 16380), "more pixels than the limit of 134217728"),
        "canvas.video.webp": (animation("WEBP", 16380, 16380), "more pixels than the limit of 134217728"),
        "canvas.video.gif": (animation("GIF", 65535, 65535), "more pixels than the limit of 134217728"),
        "frame.video.gif": (animation("GIF", 11000, 11000), "11000 × 11000 pixels; the limit is 33554432"),
        "frames.video.gif": (animation("GIF", 5700, 5800, 40), "9 frames of 5700 × 5800 pixels; the limit"),
        "frames.video.mov": (huge_frames(), "not a video that FFmpeg can read"),
        "hours.sound.flac": (flac(), "a sound of 172800000 samples or more; the limit is 134217728"),
        "day.sound.flac": (flac(16000 * 86400), "a sound of 1382400000 samples or more"),
    }  # fmt: skip
    for name, (data, _) in cases.items():
        assert len(data) < MIB
        (tmp_path / name).write_bytes(data)
    found = outcome(DECODE, *(tmp_path / name for name in cases))
    for (path, peak, message), (_, expected) in zip(found, cases.values()):
        assert re.search(expected, message), (path, message)
        assert peak < 200, path
    assert len(found) == len(cases)


@pytest.mark.slow
def test_a_sound_whose_length_nobody_says_is_refused_while_it_decodes(tmp_path):
    (tmp_path / "unknown.sound.flac").write_bytes(flac(0))
    ((_, peak, message),) = outcome(DECODE, tmp_path / "unknown.sound.flac")
    assert "samples or more; the limit is 134217728 samples" in message and peak < 1024


def test_sounds_of_unknown_or_wrong_length_are_read(monkeypatch):
    """A streamed FLAC says 0; a limit counts what is there."""
    out = io.BytesIO()
    soundfile.write(out, 0.5 * np.sin(np.arange(3000) * 0.1), 8000, format="FLAC")
    data = bytearray(out.getvalue())
    expected, _ = media.decode_sound(bytes(data))
    data[18:26] = (int.from_bytes(data[18:26], "big") >> 36 << 36).to_bytes(8, "big")
    samples, rate = media.decode_sound(bytes(data))
    assert rate == 8000 and np.array_equal(samples, expected) and samples.size == 3000
    for limit, refused in ((3000, False), (2999, True)):
        monkeypatch.setattr(media, "MAX_SOUND_SAMPLES", limit)
        if refused:
            with pytest.raises(DataError, match="a sound of 3000 samples or more; the limit is 2999"):
                media.decode_sound(bytes(data))
        else:
            assert media.decode_sound(bytes(data))[0].size == 3000


@pytest.mark.parametrize("channels", [1, 2, 17, 40])
def test_any_number_of_channels_is_mixed(channels):
    """PyAV reads beyond the planes of frames with more than 16 channels, and ends the process."""
    tone = np.sin(np.arange(4000) * 0.05)
    out = io.BytesIO()
    soundfile.write(out, np.stack([tone * (i + 1) / channels for i in range(channels)], axis=1), 8000, format="CAF",
                    subtype="FLOAT")  # fmt: skip
    samples, rate = media._decode_sound_av(out.getvalue())
    assert rate == 8000 and np.abs(samples - tone * (channels + 1) / (2 * channels)).max() < 1e-5


@pytest.fixture(scope="module")
def zeros(tmp_path_factory) -> Path:
    """Ten gigabytes of zeros as one line, in megabytes: the same 64 MiB, packed once, 160 times."""
    folder, data = tmp_path_factory.mktemp("zeros"), bytes(64 * MIB)
    (folder / "zeros.jsonl.gz").write_bytes(gzip.compress(data, 9) * 160)
    (folder / "zeros.jsonl.zst").write_bytes(zstd.compress(data) * 160)
    with open(folder / "zeros.jsonl", "wb") as stream:
        stream.truncate(1 << 30)  # a sparse file
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".gz", ".zst", ""])
def test_a_line_without_end_is_refused(zeros, tmp_path, tokenizer_path, ending):
    ((_, peak, message),) = outcome(BUILD, zeros / f"zeros.jsonl{ending}", tmp_path / "x", tokenizer_path)
    assert f"zeros.jsonl{ending}, line 1: longer than 268435456 bytes" in message and peak < 1024
    assert list(tmp_path.iterdir()) == []


def write_parquet(path: Path, values: str, rows: list[int], **fields) -> Path:
    """A column "images" of lists that repeat one value."""
    indices = pyarrow.array(np.zeros(sum(rows)), pyarrow.int32())
    repeated = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([values]))
    ends = pyarrow.array(np.cumsum([0, *rows]), pyarrow.int32())
    table = pyarrow.table({"images": pyarrow.ListArray.from_arrays(ends, repeated), **fields})
    pyarrow.parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30,
                                write_statistics=False, store_schema=False)  # fmt: skip
    return path


@pytest.mark.slow
def test_columns_that_expand_are_measured_first(tmp_path):
    """200 GB of one repeated megabyte, in 500 bytes; 260 MiB of zeros, in 8 KB; the first, as Arrow."""
    path = write_parquet(tmp_path / "list.parquet", "x" * MIB, [200_000], text=["a"])
    assert path.stat().st_size < 10_000
    zeros = pyarrow.table({"text": ["a", "\0" * (260 << 20)]})
    pyarrow.parquet.write_table(zeros, tmp_path / "page.parquet", compression="zstd", use_dictionary=False,
                                write_statistics=False)  # fmt: skip
    del zeros
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(100_000), pyarrow.int32()), ["x" * MIB])
    lists = pyarrow.ListArray.from_arrays([0, 100_000], repeated)
    schema = pyarrow.schema([("images", lists.type)])
    with pyarrow.OSFile(str(tmp_path / "list.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pyarrow.record_batch({"images": lists}))
    for name, expected in (
        ("list.parquet", r"line 1: 2097\d+ bytes; a row has at most 268435456"),
        ("page.parquet", "column text has 2726.* bytes packed into"),
        ("list.arrow", r"line 1: 1048\d+ bytes; a row has at most 268435456"),
    ):
        ((_, peak, message),) = outcome(READ, tmp_path / name)
        assert re.search(expected, message), message
        assert peak < 300, name


def test_dictionaries_that_are_not_expanded_give_the_same_lines(tmp_path, monkeypatch):
    """Truth: the lines of the same file where no column is suspected."""
    picture = {"bytes": bytes(range(200)) * 10, "path": None}
    rows = [{"images": [picture] * (i % 4), "text": f"text {i % 7} <image>", "note": "n" * (i % 3)} for i in range(300)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("images", pyarrow.list_(kind)), ("text", pyarrow.string()), ("note", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "a.parquet", row_group_size=90)

    def lines() -> bytes:
        with open_lines(str(tmp_path / "a.parquet")) as (stream, _):
            return stream.read()

    with open(tmp_path / "a.parquet", "rb") as raw:
        metadata = pyarrow.parquet.read_metadata(tmp_path / "a.parquet")
        assert columns._dictionaries("a", raw, metadata)[0] == []
        plain = lines()
        monkeypatch.setattr(columns, "MAX_LINE_BYTES", 20_000)
        monkeypatch.setattr(columns, "_CHUNK_BYTES", 9_000)
        assert columns._dictionaries("a", raw, metadata)[0] == ["images.list.element.bytes"]
    assert lines() == plain and plain.count(b"\n") == 300


#: python -c FILL input output tokenizer: builds with a journal after every block.
FILL = """
import sys
from megatron_mm.data.jobs import unfinished
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.platform.tool import run_tool
unfinished.JOURNAL_SECONDS = -1
run_tool(lambda: build_multimodal([sys.argv[1]], sys.argv[2], sys.argv[3], workers=1, progress=False) and 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_stops_cleanly_and_is_gone_on_from(samples, tmp_path, tokenizer_path):
    """A disk of 400 KiB is filled, enlarged, and the same command ends with the bytes of an undisturbed build."""
    source, disk = samples.parent / "filling.jsonl", tmp_path / "disk"
    source.write_bytes(samples.read_bytes() * 8)
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        def build(output: Path) -> subprocess.CompletedProcess:
            words = [PYTHON, "-c", FILL, str(source), str(output), tokenizer_path]
            return subprocess.run(words, capture_output=True, encoding="utf-8")

        full = build(disk / "x")
        assert full.returncode == 1 and "No space left on device" in full.stderr and "Traceback" not in full.stderr
        assert "keeps what was built, and the same command continues there" in full.stderr
        assert not (disk / "x").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        rest = build(disk / "x")
        assert rest.returncode == 0 and "continues an unfinished build" in rest.stderr, rest.stderr
        assert build(tmp_path / "whole").returncode == 0
        for file in (tmp_path / "whole").iterdir():
            assert (disk / "x" / file.name).read_bytes() == file.read_bytes(), file.name
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.slow
def test_bombs_among_samples_are_left_out_and_named(samples, tmp_path, tokenizer_path):
    """With --on-error skip, a build goes on past them; its memory is limited to 4 GiB of addresses."""
    (samples.parent / "billion.png").write_bytes(png(40000, 25000))
    (samples.parent / "day.flac").write_bytes(flac(16000 * 86400))
    (samples.parent / "canvas.gif").write_bytes(animation("GIF", 65535, 65535))
    lines = samples.read_text().splitlines()
    bad = {"images": ("<image>", "billion.png"), "audios": ("<audio>", "day.flac"), "videos": ("<video>", "canvas.gif")}
    for kind, (mark, name) in bad.items():
        lines.insert(10, json.dumps({"text": mark, kind: [name]}))
    path = samples.parent / "bombs.jsonl"
    path.write_text("\n".join(lines))
    run = subprocess.run(
        [INTERPRETER, "-c", BUILD, str(path), str(tmp_path / "x"), tokenizer_path],
        capture_output=True, encoding="utf-8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )  # fmt: skip
    _, peak, message = json.loads(run.stdout)
    assert "'samples': 60" in message and "'skipped': 3" in message and peak < 400
    listed = [json.loads(line) for line in (tmp_path / "x" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in listed] == [11, 12, 13]
    for entry, name in zip(listed, ("canvas.gif", "day.flac", "billion.png")):
        assert name in entry["cause"]
