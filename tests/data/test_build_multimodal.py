"""Multimodal folders: what is stored, worker independence, bad input, damage, inspection, merging."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_mm.data.build.merge import merge_datasets
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.data.view.inspection import summary, verify
from megatron_mm.media.errors import DataError
from tests.support.killing import start
from tests.support.programs import PYTHON
from tests.support.waiting import wait_until

TOOLS = Path(__file__).parents[2] / "tools"


def same_files(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and all(
        (a / n).read_bytes() == (b / n).read_bytes() for n in names
    )


def test_everything_is_stored(samples, folder, tokenizer_path):
    tokenizer = open_tokenizer(tokenizer_path)
    shard = Shard(folder, tokenizer)
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(shard) == len(records)
    for d, record in enumerate(records):
        prompt = tokenizer.encode(record.get("prompt", ""))
        text = tokenizer.encode(record["text"])
        assert shard.text.document(d).tolist() == [tokenizer.bos_id, *prompt, *text, tokenizer.eos_id]
        assert shard.prompt_length(d) == 1 + len(prompt)
        learned = [*text, tokenizer.eos_id]
        assert shard.table["num_loss_tokens"][d] == len(learned) - learned.count(tokenizer.audio_id)
        for kind in ("images", "audios", "videos"):
            stored = [shard.medium(kind, r) for r in shard.records(kind, d)]
            assert stored == [(samples.parent / name).read_bytes() for name in record.get(kind, [])]
        assert shard.document_id(d) == record.get("id", str(d))
    counts = shard.manifest["counts"]
    assert counts["samples"] == 60 and counts["images"] == sum(len(r.get("images", [])) for r in records)
    assert shard.manifest["tokenizer"]["identity"] == tokenizer.identity
    assert summary(shard)["videos"]["count"] == counts["videos"] == 6
    assert verify(shard, tokenizer, progress=False) == []


def test_ids_that_are_numbers_keep_all_digits(tmp_path, tokenizer_path):
    source = tmp_path / "numbers.jsonl"
    source.write_text("".join(json.dumps({"text": "a ball", "id": 7**n}) + "\n" for n in (1, 40)))
    build_multimodal([str(source)], str(tmp_path / "out"), tokenizer_path, workers=0, progress=False)
    shard = Shard(tmp_path / "out", open_tokenizer(tokenizer_path))
    assert [shard.document_id(number) for number in range(2)] == ["7", str(7**40)]


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_workers(tmp_path, samples, folder, tokenizer_path, workers):
    output = tmp_path / "balls"
    build_multimodal([str(samples)], str(output), tokenizer_path, workers=workers, progress=False)
    assert same_files(output, Path(folder))


@pytest.fixture
def source(tmp_path, samples) -> Path:
    """A private copy of the media, to damage."""
    shutil.copytree(samples.parent, tmp_path / "in")
    return tmp_path / "in"


BAD = [
    ("{oops", "not JSON"),
    ('"text"', "must be a JSON object, not str"),
    ('{"images": []}', 'lacks the field "text"'),
    ('{"text": "<image>", "images": ["gone.png"]}', r"no such file: .*gone\.png"),
    ('{"text": "<image>"}', '1 <image> in prompt and text, but 0 files in "images"'),
    ('{"text": "no placeholder", "images": ["1-0.png"]}', '0 <image> in prompt and text, but 1 files in "images"'),
    ('{"text": "<image>", "images": "1-0.png"}', 'field "images" must be a list of paths'),
    ('{"text": "<audio>", "audios": ["silent.wav"]}', r"silent\.wav: a sound without samples"),
    ('{"text": "<audio>", "audios": ["1-0.png"]}', r"1-0\.png: "),
    ('{"text": "<image>", "images": ["cut.jpg"]}', r"cut\.jpg: corrupt image"),
    ('{"text": "<image>", "images": ["empty.png"]}', r"empty\.png: an empty file"),
    ('{"text": "<image>", "images": ["samples.jsonl"]}', r"samples\.jsonl: not an image"),
    ('{"text": "<video>", "videos": ["0.wav"]}', r"0\.wav: no video track"),
    ('{"text": "<image>", "images": ["."]}', "Is a directory"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_line_is_named_and_nothing_is_left(source, tmp_path, tokenizer_path, line, message, workers):
    from PIL import Image

    soundfile.write(source / "silent.wav", np.zeros(0), 8000)
    Image.effect_noise((64, 64), 50).save(source / "cut.jpg")
    (source / "cut.jpg").write_bytes((source / "cut.jpg").read_bytes()[:800])
    (source / "empty.png").touch()
    path = source / "bad.jsonl"
    lines = (source / "samples.jsonl").read_text().splitlines()
    path.write_text("\n".join([*lines[:40], "", line, *lines[40:], "{later error"]))
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 42: .*{message}"):
        build_multimodal([str(path)], str(tmp_path / "out" / "x"), tokenizer_path, workers=workers, progress=False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_tool_exit_status_no_check_and_media_root(source, tmp_path, tokenizer_path):
    (source / "1-0.png").write_bytes(b"\x89PNG garbage")
    elsewhere = tmp_path / "lines" / "s.jsonl"
    elsewhere.parent.mkdir()
    shutil.move(source / "samples.jsonl", elsewhere)
    command = [PYTHON, str(TOOLS / "preprocess_multimodal.py"), "--input", str(elsewhere), "--output",
               str(tmp_path / "out"), "--tokenizer-model", tokenizer_path, "--media-root", str(source)]  # fmt: skip
    run = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert run.returncode == 1 and "s.jsonl, line 2: " in run.stderr and "1-0.png" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()
    run = subprocess.run([*command, "--no-check"], capture_output=True, encoding="utf-8")
    assert run.returncode == 0 and "60 samples" in run.stdout, run.stderr
    run = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert run.returncode == 1 and "exists already" in run.stderr
    command = [PYTHON, str(TOOLS / "inspect_dataset.py"), "--path", str(tmp_path / "out"), "--tokenizer-model",
               tokenizer_path, "--verify", "--json", str(tmp_path / "i.json")]  # fmt: skip
    run = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert run.returncode == 1 and "images.bin, record 0 (sample ball-1): " in run.stderr
    assert "1 damaged records" in run.stdout and "a red ball" in run.stdout
    (figures,) = json.loads((tmp_path / "i.json").read_text())["datasets"]
    assert figures["documents"] == 60 and len(figures["problems"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["preprocess_multimodal", "preprocess_data"])
def test_disk_full_leaves_nothing(samples, tmp_path, tokenizer_path, tool):
    """A limit on the size of files stands in for the full disk: writes fail in the middle in the same way."""
    out = tmp_path / "out"
    out.mkdir()
    name = "--output" if tool == "preprocess_multimodal" else "--output-prefix"
    run = subprocess.run(
        [PYTHON, str(TOOLS / f"{tool}.py"), "--input", str(samples), name, str(out / "x"), "--tokenizer-model",
         tokenizer_path, "--workers", "0"],
        capture_output=True, encoding="utf-8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)),
    )  # fmt: skip
    assert run.returncode == 1 and "File too large" in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert list(out.iterdir()) == []


#: Runs a tool that writes no journal: as long as there is none, nothing of a build is kept.
WITHOUT_JOURNAL = """
import runpy, sys
unfinished.JOURNAL_SECONDS = float("inf")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_terminated_leaves_nothing(source, tmp_path, tokenizer_path):
    path = source / "many.jsonl"
    path.write_text((source / "samples.jsonl").read_text() * 200)
    out = tmp_path / "out"
    out.mkdir()
    command = ["--input", str(path), "--output", str(out / "x"), "--tokenizer-model", tokenizer_path]
    run = start(WITHOUT_JOURNAL, TOOLS / "preprocess_multimodal.py", *command, held=True)
    wait_until(lambda: any(out.iterdir()), "the build has begun", run)
    run.terminate()
    _, stderr = run.communicate()
    assert run.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr, stderr
    assert list(out.iterdir()) == []


def test_merge_equals_building_together(tmp_path, samples, folder, tokenizer_path):
    lines = samples.read_text().splitlines()
    for name, part in (("a", lines[:25]), ("b", lines[25:])):
        (samples.parent / f"{name}.jsonl").write_text("\n".join(part))
        build_multimodal(
            [str(samples.parent / f"{name}.jsonl")], str(tmp_path / name), tokenizer_path, workers=0, progress=False
        )
    command = [PYTHON, str(TOOLS / "merge_datasets.py"), "--input", str(tmp_path / "a"), str(tmp_path / "b")]
    run = subprocess.run([*command, "--output", str(tmp_path / "m")], capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    for name in ("text.bin", "text.idx", "images.bin", "sounds.idx", "videos.bin", "samples.npy", "ids.bin"):
        assert (tmp_path / "m" / name).read_bytes() == (Path(folder) / name).read_bytes(), name
    Shard(str(tmp_path / "m"), open_tokenizer(tokenizer_path))


def test_merge_refuses_another_tokenizer(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    manifest["tokenizer"]["identity"] = "0" * 64
    del manifest["checksum"]
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="another tokenizer"):
        merge_datasets([folder, str(tmp_path / "other")], str(tmp_path / "m"), progress=False)
    assert not (tmp_path / "m").exists()


def edit_table(folder: Path, field: str, row: int, value: int) -> None:
    table = np.load(folder / "samples.npy")
    table[field][row] = value
    np.save(folder / "samples.npy", table)


DAMAGE = {
    "samples.npy: missing": lambda f: (f / "samples.npy").unlink(),
    "samples.npy: missing or damaged": lambda f: (f / "samples.npy").write_bytes((f / "samples.npy").read_bytes()[:-9]),
    "59 samples, but text.idx has 60": lambda f: np.save(f / "samples.npy", np.load(f / "samples.npy")[:-1]),
    "samples.npy: has fields None": lambda f: np.save(f / "samples.npy", np.zeros(60)),
    "sample 7: refers beyond the 48 records of images.idx": lambda f: edit_table(f, "first_image", 7, 48),
    "sample 3: refers beyond the 20 records of sounds.idx": lambda f: edit_table(f, "first_audio", 3, -1),
    "sample 4: token count differs": lambda f: edit_table(f, "num_tokens", 4, 3),
    "sample 4: prompt longer than text": lambda f: edit_table(f, "prompt_length", 4, 300),
    "images.idx: missing": lambda f: (f / "images.idx").unlink(),
    "videos.bin: truncated": lambda f: (f / "videos.bin").write_bytes((f / "videos.bin").read_bytes()[:-1]),
    "it has no manifest.json": lambda f: (f / "manifest.json").unlink(),
    "manifest.json: damaged": lambda f: (f / "manifest.json").write_text("{"),
    "ids.idx: not a Megatron": lambda f: (f / "ids.idx").write_bytes(b"x" * 500),
    "48 images, but samples.npy has 50": lambda f: edit_table(f, "num_images", 1, 3),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_found_at_open(tmp_path, folder, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    DAMAGE[message](copy)
    with pytest.raises(DataError, match=message) as error:
        Shard(str(copy))
    assert str(copy) in str(error.value)


def test_tokenizer_must_match(tmp_path, folder, samples, tokenizer_path):
    from megatron_mm.data.build.train_tokenizer import train_tokenizer

    other = str(tmp_path / "other.model")
    train_tokenizer([str(samples)], other, 320)
    with pytest.raises(DataError, match="made with another tokenizer"):
        Shard(folder, open_tokenizer(other))
    with pytest.raises(DataError, match=r"neither a folder .* nor the prefix"):
        Shard(str(tmp_path / "nothing"))
