"""What tools/inspect_checkpoint.py says. Truth: what was written, and where damage was done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints import torch_dist
from megatron_mm.checkpoints.block_file import BLOCK
from megatron_mm.checkpoints.inspection import Inspection, damage, find, printable, unfinished
from megatron_mm.checkpoints.reader import CheckpointReader
from tests.fixtures import archive
from tests.support.checkpoints import sample_tensors, write_sample
from tests.support.hostile import tool

TENSORS = sample_tensors()
SMALL = {"layers.0.weight": torch.arange(40.0).reshape(8, 5), "optimizer.exp_avg.layers.0.weight": torch.zeros(8, 5)}


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_figures_are_those_of_what_was_written(tmp_path):
    folder = write_sample(tmp_path, 7, 3, TENSORS)
    figures = Inspection(folder).figures(optimizer=True, pattern=None)
    assert (figures["format"], figures["iteration"], figures["consumed_samples"]) == ("pieces", 7, 56)
    assert (figures["optimizer_step"], figures["seconds"]) == (7, 0.5)
    assert figures["tokenizer"] == {"file": "byte_tokenizer.json", "kind": "bytes"}
    layout = {"TP": 1, "PP": 1, "VPP": 1, "CP": 1, "processes": 3, "DP": 3, "distributed_optimizer": False}
    assert figures["layout"] == layout
    weights = {key: tensor for key, tensor in TENSORS.items() if not key.startswith("optimizer.")}
    values = sum(tensor.numel() for tensor in weights.values())
    assert figures["recipe"] == {"system": "synapse", "precision": "fp32", "parameters": values}
    assert figures["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    listed = {entry["key"]: entry for entry in figures["weights"]}
    assert listed.keys() == weights.keys() and figures["optimizer"].keys() == {"step", "exp_avg"}
    for state in figures["optimizer"].values():
        listed |= {entry["key"]: entry for entry in state["listed"]}
    for key, tensor in TENSORS.items():
        entry = listed[key]
        assert (entry["shape"], entry["bytes"]) == (list(tensor.shape), tensor.nbytes)
        assert entry["dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert sum(entry["pieces"].values()) >= 1 and entry["pieces"].keys() <= figures["files"].keys()
    chosen = Inspection(folder).figures(optimizer=False, pattern="*embedding*")
    assert [entry["key"] for entry in chosen["weights"]] == ["text.embedding.weight"]
    assert "listed" not in chosen["optimizer"]["step"] and chosen["optimizer"]["step"]["values"] == 120


def test_every_damaged_block_and_file_is_named(tmp_path):
    folder = write_sample(tmp_path, 1, 2, TENSORS)
    assert list(damage(folder, everything=True)) == []
    longest = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    other = next(path for path in folder.glob("*.safetensors") if path != longest)
    assert longest.stat().st_size > 2 * BLOCK
    for at in (5, BLOCK - 1, 2 * BLOCK):
        flip(longest, at)
    flip(other, other.stat().st_size - 1)
    assert list(damage(folder, everything=False)) == [], "blocks are not read"
    read: list[int] = []
    said = list(damage(folder, everything=True, read=read.append))
    assert len(said) == 3 and sum(longest.name in line for line in said) == 2
    assert any(f"{longest} is damaged between bytes {2 * BLOCK} and " in line for line in said)
    assert sum(read) >= longest.stat().st_size + other.stat().st_size
    (folder / "config.yaml").unlink()
    assert any("config.yaml is missing" in line for line in damage(folder, everything=False))
    assert Inspection(folder).settings == {}


def test_both_formats_are_read(tmp_path):
    folder = archive.unpack(archive.BEFORE / "avt-tiny.tar.gz", tmp_path) / "checkpoint" / "iter_0000002"
    found = Inspection(folder)
    figures = found.figures(optimizer=False, pattern=None)
    assert figures["format"] == "torch_dist" and found.of_before
    assert (figures["iteration"], figures["consumed_samples"], figures["optimizer_step"]) == (2, 16, 2)
    assert figures["recipe"]["system"] == "avt" and figures["tokenizer"]["kind"] == "sentencepiece"
    assert set(figures["optimizer"]) == {"exp_avg", "exp_avg_sq"}
    assert list(damage(folder, everything=True)) == []
    path = folder / "__0_0.distcp"
    content = path.read_bytes()
    stored = CheckpointReader(folder).tensors.values()
    wheres = sorted((where for tensor in stored for _, where in tensor.pieces), key=lambda where: where[2])
    damaged = [where for where in wheres if where[1] == path][3:5]
    numbers = [torch_dist.read_piece(where).contiguous().view(torch.uint8).numpy().tobytes() for where in damaged]
    for where, data in zip(damaged, numbers):
        flip(path, content.index(data, where[2]) + len(data) // 2)
    said = list(damage(folder, everything=True))
    assert len(said) == 2 and all(f"{path}: {where[0]} cannot be read" in line for where, line in zip(damaged, said))


def test_what_is_found_at_a_path(tmp_path):
    run = tmp_path / "run"
    folders = [write_sample(run / "checkpoints", number, 1, SMALL) for number in (2, 10)]
    part = checkpoint_folder.begin(run / "checkpoints", 11)
    assert find(run) == find(run / "checkpoints") == folders and find(folders[0]) == [folders[0]]
    assert unfinished(run) == [part] and unfinished(folders[0]) == []
    with pytest.raises(ValueError, match="holds no checkpoint; give one"):
        find(tmp_path)


def test_control_characters_are_printed_as_what_they_are():
    assert printable("a\x1b[2Jb\nü") == "a\\x1b[2Jb\\nü"
    assert printable("x" * 300) == "x" * 200 + "…"


@pytest.mark.slow
def test_the_tool_names_damage_and_ends_with_status_1(tmp_path):
    run = tmp_path / "run"
    first, second = (write_sample(run / "checkpoints", number, 2, SMALL) for number in (1, 2))
    figures = tmp_path / "figures.json"
    done = tool("tools/inspect_checkpoint.py", run, "--verify", "--json", figures)
    assert done.returncode == 0, done.stderr
    assert f"{first}: iteration 1, samples 8" in done.stdout and done.stdout.count(": whole") == 2
    assert "no damage" in done.stdout and "/s)" in done.stdout
    flip(second / "pieces_00001.safetensors", (second / "pieces_00001.safetensors").stat().st_size - 1)
    done = tool("tools/inspect_checkpoint.py", run, "--verify", "--json", figures)
    assert done.returncode == 1 and f"error: {second}/pieces_00001.safetensors is damaged" in done.stderr
    assert done.stdout.count(": whole") == 1 and done.stdout.count(": damaged") == 1
    problems = [checkpoint["problems"] for checkpoint in json.loads(figures.read_text())["checkpoints"]]
    assert problems[0] == [] and len(problems[1]) == 1
    done = tool("tools/inspect_checkpoint.py", first, "--match", "*.weight")
    assert done.returncode == 0 and "layers.0.weight  [8, 5]  float32  160 bytes" in done.stdout
    assert "optimizer exp_avg: 1 entries" in done.stdout
    shutil.rmtree(second), (first / "pieces_00000.json").write_text("[")
    done = tool("tools/inspect_checkpoint.py", run)
    assert done.returncode == 1 and "pieces_00000.json" in done.stderr and "Traceback" not in done.stderr
