"""Damage of any kind is found when a dataset is opened or verified, by the name of the file, and never crashes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.text import build_text
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import Tokenizer, open_tokenizer
from megatron_mm.data.view.inspection import verify
from megatron_mm.media.errors import DataError


def flip(data: bytearray, dice: random.Random) -> bytearray:
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return data


def zero(data: bytearray, dice: random.Random) -> bytearray:
    begin = dice.randrange(len(data))
    end = min(len(data), begin + 1 + dice.randrange(64))
    data[begin:end] = bytes(end - begin)
    return data


def truncate(data: bytearray, dice: random.Random) -> bytearray:
    return data[: dice.randrange(len(data))]


def lengthen(data: bytearray, dice: random.Random) -> bytearray:
    return data + dice.randbytes(1 + dice.randrange(16))


def swap(data: bytearray, dice: random.Random) -> bytearray:
    half = max(1, min(len(data) // 2, 1 + dice.randrange(64)))
    first, second = dice.randrange(len(data) - half), dice.randrange(len(data) - half)
    data[first : first + half], data[second : second + half] = (
        data[second : second + half],
        data[first : first + half],
    )
    return data


DAMAGE = (flip, flip, zero, truncate, lengthen, swap)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path) -> Tokenizer:
    return open_tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def few(samples) -> Path:
    path = samples.parent / "few.jsonl"
    path.write_bytes(b"\n".join(samples.read_bytes().split(b"\n")[:12]))
    return path


def damaged_everywhere(folder: Path, opened: Path, tokenizer: Tokenizer, times: int) -> dict[str, list[str]]:
    """What is said of each damage, by file; the files of `folder` are damaged one at a time."""
    files = sorted(folder.iterdir())
    original = {file: file.read_bytes() for file in files}
    said: dict[str, list[str]] = {}
    dice = random.Random(0)
    for number in range(times):
        file = files[number % len(files)]
        while (data := bytes(dice.choice(DAMAGE)(bytearray(original[file]), dice))) == original[file]:
            pass
        file.write_bytes(data)
        try:
            problems = verify(Shard(str(opened), tokenizer), tokenizer, progress=False)
        except DataError as error:
            problems = [str(error)]
        file.write_bytes(original[file])
        assert problems, f"damage {number} of {file.name} was not noticed"
        said.setdefault(file.name, []).append(problems[0])
    assert verify(Shard(str(opened), tokenizer), tokenizer, progress=False) == []
    return said


def test_of_a_folder(few, tmp_path, tokenizer, tokenizer_path):
    build_multimodal([str(few)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False)
    said = damaged_everywhere(tmp_path / "x", tmp_path / "x", tokenizer, 180)
    for name, problems in said.items():
        stem = name.split(".")[0]
        assert all(stem in problem for problem in problems), (name, problems)


def test_of_a_text_shard(few, tmp_path, tokenizer, tokenizer_path):
    (tmp_path / "t").mkdir()
    build_text([str(few)], str(tmp_path / "t" / "x"), tokenizer_path, workers=0, progress=False)
    damaged_everywhere(tmp_path / "t", tmp_path / "t" / "x_text_document", tokenizer, 60)


def test_one_byte_names_its_record(few, tmp_path, tokenizer, tokenizer_path):
    build_multimodal([str(few)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False)
    shard = Shard(str(tmp_path / "x"))
    begin = int(shard.media["images"].sequence_pointers[3])
    del shard
    path = tmp_path / "x" / "images.bin"
    data = np.fromfile(path, np.uint8)
    data[begin] ^= 1
    data.tofile(path)
    problems = verify(Shard(str(tmp_path / "x"), tokenizer), tokenizer, progress=False)
    assert "images.bin, record 3: its CRC-32" in problems[0]


def test_a_plausible_table_is_told_by_its_checksum(few, tmp_path, tokenizer_path):
    """A prompt that is one token shorter breaks no rule that can be checked without the tokenizer."""
    build_multimodal([str(few)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False)
    table = np.load(tmp_path / "x" / "samples.npy")
    table["prompt_length"][table["prompt_length"].argmax()] -= 1
    np.save(tmp_path / "x" / "samples.npy", table)
    (problem,) = verify(Shard(str(tmp_path / "x")), None, progress=False)
    assert problem.endswith("samples.npy: its SHA-256 is not the one with which it was written")


def test_a_folder_without_checksums_opens(few, tmp_path, tokenizer, tokenizer_path):
    """Folders of earlier versions, and Megatron's own shards, have none."""
    build_text([str(few)], str(tmp_path / "x"), tokenizer_path, workers=0, progress=False)
    for suffix in (".crc", ".json"):
        (tmp_path / f"x_text_document{suffix}").unlink()
    assert verify(Shard(str(tmp_path / "x_text_document"), tokenizer), tokenizer, progress=False) == []
    shutil.rmtree(tmp_path)
