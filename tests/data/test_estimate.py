"""Estimates of builds, compared with the builds themselves."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.data.build.estimate import (
    Estimate,
    Figure,
    Outcome,
    _scaled,
    _time,
    estimate,
    multimodal_build,
    text_build,
)
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.text import build_text
from megatron_mm.data.corpus.line_samples import MAX_HEADS, LineSamples
from megatron_mm.media.errors import DataError
from tests.support.programs import PYTHON

ROOT = Path(__file__).parents[2]
#: Seconds for an estimate of which megabytes alone are the limit, so that every machine draws the same samples.
ANY_TIME = 1e9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """3 MB of lines whose lengths are spread widely and grow threefold from the first to the last."""
    draw = random.Random(1)
    words = [name for name in dir(random) + dir(json) + dir(subprocess) + dir(sys) if name.isascii()]
    path, size = tmp_path_factory.mktemp("corpus") / "c.jsonl", 0
    with open(path, "w") as stream:
        while size < 3e6:
            count = int(draw.lognormvariate(2.5 + 1.1 * size / 3e6, 0.8)) + 1
            size += stream.write(json.dumps({"text": " ".join(draw.choices(words, k=count)), "n": count}) + "\n")
    return path


def near(figure: Figure, true: float, tolerance: float) -> None:
    """Within the tolerance, and within twice the margin that the estimate gives itself."""
    assert abs(figure.value / true - 1) <= tolerance, (figure, true)
    assert figure.margin is not None and abs(figure.value / true - 1) <= 2 * figure.margin + 0.002, (figure, true)


def sizes(paths) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in paths}


def test_text_from_a_tenth_of_it(tmp_path, corpus, tokenizer_path):
    """Documents within 15 %, tokens and bytes within 5 %, of a tenth of the corpus at most."""
    output = str(tmp_path / "new" / "out")
    build = text_build(output, tokenizer_path, ("text",), True, 0)
    found = estimate([str(corpus)], build, seconds=ANY_TIME, megabytes=0.3)
    assert list(tmp_path.iterdir()) == [], "samples are removed"
    assert 0.02 < found.share < 0.12 and found.samples == 5 and not found.notes
    (report,) = build_text([str(corpus)], output, tokenizer_path, append_eod=True, workers=0, progress=False).values()
    near(found.counts["documents"], report["documents"], 0.15)
    near(found.counts["tokens"], report["tokens"], 0.05)
    true = sizes((tmp_path / "new").iterdir())
    assert found.outputs.keys() == true.keys()
    near(found.outputs[output + "_text_document.bin"], true[output + "_text_document.bin"], 0.05)
    near(found.outputs[output + "_text_document.idx"], true[output + "_text_document.idx"], 0.15)
    assert sum(true.values()) * 0.95 < found.disk_bytes.value < sum(true.values()) * 1.3
    assert found.seconds.value > 0 and found.fits


def test_the_first_lines_alone_would_mislead(corpus):
    """The corpus is one on which it matters that samples are spread."""
    lines = corpus.read_bytes().splitlines(keepends=True)
    first = len(lines[: len(lines) // 10]) / sum(map(len, lines[: len(lines) // 10]))
    assert first > 1.3 * len(lines) / sum(map(len, lines))


def test_mixed_media_from_several_files(tmp_path, samples, tokenizer_path):
    """Samples with every mix of media, from two files in different folders: bytes of all files within 25 %."""
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    (tmp_path / "link").symlink_to(samples.parent)
    prefixes = ("", "link/")
    inputs = []
    for prefix, folder in zip(prefixes, (samples.parent, tmp_path)):
        lines = []
        for number in range(600):
            record = dict(records[number * 7 % 60])
            for kind in ("images", "audios", "videos"):
                if kind in record:
                    record[kind] = [prefix + name for name in record[kind]]
            lines.append(json.dumps(record) + "\n")
        inputs.append(folder / "many.jsonl")
        inputs[-1].write_text("".join(lines))
    inputs = list(map(str, inputs))
    output = str(tmp_path / "out")
    found = estimate(inputs, multimodal_build(output, tokenizer_path, None, 0, True), seconds=ANY_TIME, megabytes=0.06)
    assert found.share < 0.6
    manifest = build_multimodal(inputs, output, tokenizer_path, workers=0, check=False, progress=False)
    for name, count in manifest["counts"].items():
        assert abs(found.counts[name].value / count - 1) < 0.25, name
    true = sizes(Path(output).iterdir())
    assert found.outputs.keys() == true.keys()
    total = sum(figure.value for figure in found.outputs.values())
    assert abs(total / sum(true.values()) - 1) < 0.25


def test_small_input_is_built_whole(tmp_path, samples, tokenizer_path):
    output = str(tmp_path / "out")
    arguments = ["--input", str(samples), "--output", output, "--tokenizer-model", tokenizer_path, "--workers", "0"]
    command = [PYTHON, str(ROOT / "tools" / "estimate_build.py"), "multimodal", *arguments]
    run = subprocess.run(
        [*command, "--json", str(tmp_path / "e.json")], capture_output=True, encoding="utf-8", check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["share"] == 1 and "enough" in run.stdout.splitlines()[-1]
    command[1:3] = [str(ROOT / "tools" / "preprocess_multimodal.py")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0, "the same arguments build it"
    for path, size in sizes(Path(output).iterdir()).items():
        if not path.endswith(".json"):
            assert found["outputs"][path] == {"value": size, "margin": 0.0}
    assert {name: figure["value"] for name, figure in found["counts"].items()}["samples"] == 60


def test_compressed_input_is_read_from_its_beginning(tmp_path, corpus, tokenizer_path):
    """Two halves: of the first file of each kind only the head is unpacked, and the report says so."""
    lines = corpus.read_bytes().splitlines(keepends=True)
    random.Random(2).shuffle(lines)
    paths = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"]
    paths[0].write_bytes(gzip.compress(b"".join(lines[::2]), 1))
    paths[1].write_bytes(b"".join(lines[1::2]))
    build = text_build(str(tmp_path / "out"), tokenizer_path, ("text",), False, 0)
    found = estimate(list(map(str, paths)), build, seconds=ANY_TIME, megabytes=0.3)
    assert found.notes == ["read from the beginning only: a.jsonl.gz; margins (±) know nothing of the rest"]
    assert abs(found.counts["documents"].value / len(lines) - 1) < 0.15


def test_many_compressed_files_are_represented(tmp_path):
    paths = []
    for number in range(2 * MAX_HEADS):
        paths.append(str(tmp_path / f"{number:02d}.jsonl.gz"))
        Path(paths[-1]).write_bytes(gzip.compress(b'{"text": "x"}\n' * 100))
    drawn = LineSamples(paths, str(tmp_path), 1 << 20)
    assert drawn.notes == [f"{MAX_HEADS} of {2 * MAX_HEADS} compressed files, tables and tars were read"]
    assert drawn.line_bytes == pytest.approx(2 * MAX_HEADS * 1400, rel=0.01) and not drawn.is_exact


def test_samples_are_whole_lines_spread_over_all_files(tmp_path):
    for name, size in (("a", 3000), ("b", 1000)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"{name}": {n:05d}}}\n' for n in range(size)))
    drawn = LineSamples([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], str(tmp_path), 1 << 20)
    samples = [drawn.draw(number, 5, 8, 8 * 13 * 10) for number in range(5)]
    lines = [line for sample in samples for line in sample.lines]
    assert len(set(lines)) == len(lines), "samples do not overlap"
    assert 400 <= len(lines) <= 440 and all(len(line) == 13 and line.endswith(b"}\n") for line in lines)
    assert 0.7 < sum(line.startswith(b'{"a') for line in lines) / len(lines) < 0.8
    for sample in samples:
        for line, (path, at) in zip(sample.lines, sample.origins):
            assert Path(path).read_bytes()[at : at + 13] == line
    whole = drawn.all()
    assert b"".join(whole.lines) == (tmp_path / "a.jsonl").read_bytes() + (tmp_path / "b.jsonl").read_bytes()


def test_errors_name_the_place_in_the_input(tmp_path, tokenizer_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": 7}\n')
    build = text_build(str(tmp_path / "out"), tokenizer_path, ("text",), False, 0)
    with pytest.raises(DataError, match=r'bad.jsonl, the line at byte 17: field "text" must be a string, not int'):
        estimate([str(path)], build)
    multimodal = multimodal_build(str(tmp_path / "out"), tokenizer_path, None, 0, True)
    path.write_text('{"text": "<image>", "images": ["gone.png"]}\n')
    with pytest.raises(DataError, match=rf"byte 0: no such file: {tmp_path}/gone.png"):
        estimate([str(path)], multimodal)
    path.write_text("")
    with pytest.raises(DataError, match=r"bad\.jsonl: no lines"):
        estimate([str(path)], build)
    with pytest.raises(ValueError, match="--seconds is 0"):
        estimate([str(path)], build, seconds=0)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def outcome(size: int, seconds: float, tokens: int) -> Outcome:
    return Outcome(size, seconds, {"tokens": tokens}, {})


def test_arithmetic_of_time_and_margin():
    """Builds that take 2 s and 1 s a kB are found to; equal samples leave no margin, different ones do."""
    first, equal = outcome(100, 2.1, 10), [outcome(1000, 3.0, 100)] * 5
    assert _time(first, equal, 10_000, False).value == pytest.approx(2 + 10)
    assert _time(first, equal, 10_000, False).margin == pytest.approx(0, abs=1e-9)
    assert _scaled(equal, lambda o: o.counts["tokens"], 10_000) == Figure(1000.0, 0.0)
    unequal = [outcome(1000, 3.0 + n / 10, 90 + 5 * n) for n in range(5)]
    # Standard deviation of 90, 95 … 110 is 7.906; of their mean 3.536; half of the input was not read.
    assert _scaled(unequal, lambda o: o.counts["tokens"], 10_000).margin == pytest.approx(
        2.78 * 0.03536 * 0.5**0.5, rel=1e-3
    )
    assert _time(first, unequal, 10_000, False).margin > 0.1
    assert _time(first, [first] * 5, 10_000, False) == Figure(pytest.approx(210), None), "at most as long as that"


def test_too_little_room_is_said(tmp_path, corpus, tokenizer_path, monkeypatch):
    build = text_build(str(tmp_path / "out"), tokenizer_path, ("text",), False, 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1 << 20})())
    found: Estimate = estimate([str(corpus)], build, seconds=1, megabytes=0.1)
    assert not found.fits and found.free_bytes == 1 << 20 and found.disk == str(tmp_path)
