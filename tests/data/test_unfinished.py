"""Builds that are killed, fail or find bad lines continue, and end with the bytes of a build that nobody disturbed.

Truth: the folder that an undisturbed build with another number of workers makes, compared file by file.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.text import build_text
from megatron_mm.data.jobs import unfinished
from megatron_mm.media.errors import DataError
from tests.support.killing import kill_and_continue, undisturbed
from tests.support.programs import INTERPRETER

#: python -c BUILD kind input output tokenizer workers.
BUILD = """
import sys
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.text import build_text
kind, source, output, tokenizer, workers = sys.argv[1:]
if kind == "text":
    build_text([source], output, tokenizer, workers=int(workers), progress=False)
else:
    build_multimodal([source], output, tokenizer, workers=int(workers), progress=False)
"""


@pytest.fixture
def journal_every_block(monkeypatch):
    monkeypatch.setattr(unfinished, "JOURNAL_SECONDS", -1)


@pytest.fixture(scope="module")
def many(samples) -> Path:
    """The samples many times over, beside their media; several blocks for either builder."""
    path = samples.parent / "many.jsonl"
    path.write_bytes(samples.read_bytes() * 10)
    return path


def contents(path: Path) -> dict[str, bytes]:
    """Bytes of a folder's files, or of those whose names begin with a prefix, but for the names of sources."""
    files = sorted(path.iterdir()) if path.is_dir() else sorted(path.parent.glob(path.name + "*"))
    return {file.name: file.read_bytes() for file in files if not file.name.endswith(".json")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multimodal", "text"])
def test_killed_again_and_again(kind, many, tmp_path, tokenizer_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    out.mkdir(), whole.mkdir()
    source = many.parent / "more.jsonl"
    source.write_bytes(many.read_bytes() * 3)
    if kind == "text":
        source = tmp_path / "text.jsonl"
        source.write_bytes(many.read_bytes() * 200)

    def words(folder: Path, workers: int) -> list[object]:
        return [kind, source, folder / "x", tokenizer_path, workers]

    undisturbed(BUILD, *words(whole, 0))
    said = kill_and_continue(BUILD, lambda attempt: words(out, attempt % 3), out / "x.building", 6, 0.2)
    assert ["continues an unfinished build" in text for text in said] == [False, *[True] * 6]
    name = "x" if kind == "multimodal" else "x_text_document"
    assert contents(out / name) == contents(whole / name)


@pytest.mark.parametrize("packed", [False, True])
def test_a_mended_line_continues(packed, many, samples, tmp_path, tokenizer_path, journal_every_block, capsys):
    lines = many.read_bytes().split(b"\n")
    source = samples.parent / ("mended.jsonl.gz" if packed else "mended.jsonl")

    def write(middle: bytes) -> None:
        data = b"\n".join([*lines[:300], middle, *lines[300:]])
        source.write_bytes(gzip.compress(data) if packed else data)

    write(b'{"text": 5}')
    with pytest.raises(DataError, match=r"mended.jsonl.*, line 301: field \"text\" must be a string"):
        build_multimodal([str(source)], str(tmp_path / "x"), tokenizer_path, progress=False)
    assert "keeps what was built, and the same command continues" in capsys.readouterr().err
    write(b'{"text": "a red ball"}')
    for file in (tmp_path / "x.building" / "data").iterdir():  # written after the journal, before the kill
        with file.open("ab") as stream:
            stream.write(b"x" * (1 << 20))
    build_multimodal([str(source)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False)
    assert "continues an unfinished build" in capsys.readouterr().err
    build_multimodal([str(source)], str(tmp_path / "whole"), tokenizer_path, workers=0, progress=False)
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("change", ["options", "source", "journal", "files"])
def test_what_does_not_fit_starts_anew(change, many, samples, tmp_path, tokenizer_path, journal_every_block, capsys):
    source, out = samples.parent / "changing.jsonl", tmp_path / "x"
    good = many.read_bytes()
    source.write_bytes(good + b"[]\n")
    with pytest.raises(DataError, match="must be a JSON object"):
        build_multimodal([str(source)], str(out), tokenizer_path, progress=False)
    building, check = tmp_path / "x.building", True
    source.write_bytes(good)
    if change == "options":
        check = False
    elif change == "source":
        source.write_bytes(good.replace(b"red", b"tan", 1))
    elif change == "journal":
        (building / "journal.json").write_text("{")
    else:
        (building / "data" / "text.bin").write_bytes(b"")
    build_multimodal([str(source)], str(out), tokenizer_path, check=check, progress=False)
    said = capsys.readouterr().err
    assert "continues" not in said.split("\n", 1)[1]
    assert ("starts anew" in said) == (change != "journal")
    build_multimodal([str(source)], str(tmp_path / "whole"), tokenizer_path, check=check, progress=False)
    assert contents(out) == contents(tmp_path / "whole")


def test_text_continues_after_a_bad_line(many, tmp_path, tokenizer_path, journal_every_block):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_bytes(many.read_bytes() * 30)
    second.write_bytes(b'{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(DataError, match=r"second.jsonl, line 2: lacks the field"):
        build_text([str(first), str(second)], str(tmp_path / "x"), tokenizer_path, progress=False)
    second.write_bytes(b'{"text": "a"}\n{"text": "b"}\n')
    build_text([str(first), str(second)], str(tmp_path / "x"), tokenizer_path, progress=False)
    build_text([str(first), str(second)], str(tmp_path / "whole"), tokenizer_path, workers=0, progress=False)
    names = [tmp_path / f"{name}_text_document" for name in ("x", "whole")]
    assert list(contents(names[0]).values()) == list(contents(names[1]).values())


@pytest.mark.parametrize("kind", ["multimodal", "text"])
def test_what_fails_at_the_very_end_continues(
    kind, many, samples, tmp_path, tokenizer_path, journal_every_block, monkeypatch, capsys
):
    """Indexes and checksums of a large build take minutes; here the disk is full when the manifest is written."""
    source = samples.parent / f"nameless-{kind}.jsonl"
    source.write_text("".join(json.dumps({**json.loads(line), "id": None}) + "\n" for line in many.open()))
    module = sys.modules[(build_multimodal if kind == "multimodal" else build_text).__module__]

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    def build(name: str) -> dict[str, bytes]:
        if kind == "multimodal":
            build_multimodal([str(source)], str(tmp_path / name), tokenizer_path, workers=0, progress=False)
            return contents(tmp_path / name)
        build_text([str(source)], str(tmp_path / name), tokenizer_path, workers=0, progress=False)
        return {file.split(".")[-1]: data for file, data in contents(tmp_path / f"{name}_text_document").items()}

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_manifest", full)
        with pytest.raises(OSError, match="No space left"):
            build("x")
    capsys.readouterr()
    continued = build("x")
    assert "continues an unfinished build" in capsys.readouterr().err
    assert continued == build("whole") and not any("ids" in name for name in continued)


@pytest.mark.parametrize("named", range(5))
def test_killed_while_files_get_their_names(named, many, tmp_path, tokenizer_path, capfd):
    """The next command gives the rest, and says so; nothing is built again."""
    build_text([str(many)], str(tmp_path / "whole"), tokenizer_path, workers=0, progress=False)
    replace, rmtree, done = os.replace, shutil.rmtree, []

    def end_after(count: int) -> None:
        if len(done) == count == named:
            os.kill(os.getpid(), signal.SIGKILL)

    def renamed(source: str, target: str) -> None:
        if not source.endswith(".new"):
            end_after(len(done))
            done.append(target)
        replace(source, target)

    def removed(folder: str, **options: bool) -> None:
        end_after(4)  # all have their names, and the folder is there
        rmtree(folder, **options)

    def build() -> None:
        os.replace, shutil.rmtree = renamed, removed
        build_text([str(many)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False)

    process = multiprocessing.get_context("fork").Process(target=build)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "x.building").exists()
    with pytest.raises(DataError, match="exists already"):
        build_text([str(many)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False)
    assert "complete but for its names" in capfd.readouterr().err and not (tmp_path / "x.building").exists()
    for suffix in (".bin", ".crc", ".idx", ".json"):
        whole, made = (tmp_path / f"{name}_text_document{suffix}" for name in ("whole", "x"))
        assert made.read_bytes() == whole.read_bytes()


def test_one_builder_at_a_time(samples, tmp_path, tokenizer_path):
    hold = "import signal, sys\nfrom megatron_mm.data.jobs.unfinished import UnfinishedBuild\n"
    hold += "build = UnfinishedBuild(sys.argv[1], {}).begin()\nprint('held', flush=True)\nsignal.pause()"
    other = subprocess.Popen(
        [INTERPRETER, "-c", hold, str(tmp_path / "x")], stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert other.stdout.readline() == "held\n"
    try:
        with pytest.raises(DataError, match="another process is building"):
            build_multimodal([str(samples)], str(tmp_path / "x"), tokenizer_path, progress=False)
        assert (tmp_path / "x.building").exists()
    finally:
        other.kill()
        other.wait()
    build_multimodal([str(samples)], str(tmp_path / "x"), tokenizer_path, progress=False)
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["counts"]["samples"] == 60
