"""Outputs where nothing can be written: a read-only disk, one without room, one without room for names.

Each program ends with one line that names the place, and leaves nothing half made.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.hostile import ROOT, check_refused, tool

RECIPE = ROOT / "megatron_mm" / "recipes" / "synapse-tiny.yaml"


@contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A disk in memory."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


#: Options of the mount, and what the error says. The second has room for its root and one name, the third for nothing.
DISKS = {
    "read-only": ("ro", "Read-only file system|cannot be written"),
    "no names left": ("nr_inodes=1", "No space left on device"),
}


@pytest.fixture(params=DISKS, scope="module")
def disk(request, tmp_path_factory) -> Iterator[tuple[Path, str]]:
    options, said = DISKS[request.param]
    with mounted(tmp_path_factory.mktemp("disk") / "d", options) as place:
        yield place, said


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """Small inputs of the tools, by name."""
    folder = tmp_path_factory.mktemp("inputs")
    found = {name: folder / name for name in ("t.json", "a.jsonl", "shard")}
    found["t.json"].write_text('{"kind": "bytes"}\n')
    found["a.jsonl"].write_text("".join(f'{{"text": "the text of line {i}"}}\n' for i in range(40)))
    text = ("--input", found["a.jsonl"], "--tokenizer-model", found["t.json"], "--workers", 0)
    done = tool("tools/preprocess_data.py", *text, "--output-prefix", found["shard"])
    assert done.returncode == 0, done.stderr[-2000:]
    found["shard"] = folder / "shard_text_document"
    return found


TOOLS = {
    "preprocess_data": "--input {a.jsonl} --tokenizer-model {t.json} --workers 0 --output-prefix {out}",
    "preprocess_multimodal": "--input {a.jsonl} --tokenizer-model {t.json} --workers 0 --output {out}",
    "estimate_build": "multimodal --input {a.jsonl} --tokenizer-model {t.json} --seconds 1 --output {out}",
    "clean_corpus": "--input {a.jsonl} --workers 0 --output {out}",
    "train_tokenizer": "--input {a.jsonl} --vocab-size 300 --output {out}",
    "inspect_dataset": "--path {shard} --html {out}.html",
    "merge_datasets": "--input {shard} {shard} --output {out}",
    "split_dataset": "--input {shard} --split 1,1 --output {out}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_ends_with_one_line(name, disk, inputs):
    place, said = disk
    paths = {**inputs, "out": place / "out"}
    words = TOOLS[name].split()
    for key, path in paths.items():
        words = [word.replace(f"{{{key}}}", str(path)) for word in words]
    done = tool(f"tools/{name}.py", *words)
    check_refused(done, str(place))
    assert any(phrase in done.stderr for phrase in said.split("|")), done.stderr[-1000:]
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_run_ends_with_one_line(disk):
    place, said = disk
    words = ("--config", RECIPE, "--train-iters", 1, "--lr-warmup-iters", 0, "--logging.output", place / "run")
    builder = "megatron_mm.data.reading.generated:build"
    done = tool("pretrain_multimodal.py", *words, "--data.builder", builder)
    check_refused(done, str(place))
    assert any(phrase in done.stderr for phrase in said.split("|")), done.stderr[-1000:]
    assert list(place.iterdir()) == []
