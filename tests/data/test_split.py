"""Splitting: the parts are the original's documents, byte for byte, each exactly once."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_mm.data.build.merge import merge_datasets
from megatron_mm.data.build.split import NAMES, split_dataset
from megatron_mm.data.corpus.samples import KINDS
from megatron_mm.data.reading.order import split_documents
from megatron_mm.data.store.indexed import IndexedWriter
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.data.view.inspection import verify
from megatron_mm.media.errors import DataError
from tests.support.programs import PYTHON

TOOLS = Path(__file__).parents[2] / "tools"


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [PYTHON, str(TOOLS / name), *arguments], capture_output=True, encoding="utf-8", check=False
    )


def same_data(a: Path, b: Path) -> None:
    """All files but the manifest, which says how each was made."""
    names = {path.name for path in a.iterdir()} - {"manifest.json"}
    assert names == {path.name for path in b.iterdir()} - {"manifest.json"}
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def contents(shard: Shard, document: int) -> tuple:
    """All that a document is."""
    media = [[shard.medium(kind, record) for record in shard.records(kind, document)] for kind in KINDS]
    return shard.text.document(document).tolist(), shard.prompt_length(document), shard.document_id(document), media


@pytest.fixture
def text(tmp_path) -> str:
    """A text shard of 37 documents with none to two sequences each, as Megatron's --split-sentences makes them."""
    prefix = str(tmp_path / "text")
    writer = IndexedWriter(prefix, np.uint16)
    for number in range(37):
        writer.add_documents(np.arange(number % 5) + number, np.array([number % 5]))
    writer.finalize()
    writer.tidy()
    return prefix


def test_folder_is_split_by_proportions_and_merged_again(tmp_path, folder, tokenizer_path):
    run = run_tool("split_dataset.py", "--input", folder, "--output", str(tmp_path / "b"), "--split", "70,20,10")
    assert run.returncode == 0, run.stderr
    paths = [str(tmp_path / f"b_{name}") for name in NAMES]
    assert sorted(str(path) for path in tmp_path.iterdir()) == sorted(paths), "nothing else is left"
    tokenizer, whole = open_tokenizer(tokenizer_path), Shard(folder)
    for path, documents in zip(paths, split_documents("70,20,10", len(whole))):
        part = Shard(path, tokenizer)
        assert len(part) == len(documents)
        assert not verify(part, tokenizer, progress=False)
        made = part.manifest["options"]["split"]
        assert (made["of"], made["first"], made["end"]) == ("balls", documents.start, documents.stop)
        assert part.manifest["options"]["check"] is True, "options of the original still hold"
        assert part.manifest["sources"] == whole.manifest["sources"]
    merge_datasets(paths, str(tmp_path / "merged"), progress=False)
    same_data(tmp_path / "merged", Path(folder))


@pytest.mark.parametrize("parts", [1, 4, 37])
def test_text_in_equal_parts_and_merged_again(tmp_path, text, parts):
    made = split_dataset(text, str(tmp_path / "new" / "t"), parts=parts, progress=False)
    sizes = [counts["documents"] for counts in made.values()]
    assert len(sizes) == parts and sum(sizes) == 37 and max(sizes) - min(sizes) <= 1
    assert list(made) == sorted(made), "names sort in order"
    merge_datasets(list(made), str(tmp_path / "merged"), progress=False)
    for suffix in (".bin", ".idx", ".crc"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == Path(text + suffix).read_bytes()


def test_shuffled_parts_hold_every_document_once(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("megatron_mm.data.build.copying._CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr("megatron_mm.data.build.copying._BLOCK_BYTES", 2000)
    whole = Shard(folder)
    made = split_dataset(folder, str(tmp_path / "a"), split="1,1", shuffle_seed=5, progress=False)
    assert list(made) == [str(tmp_path / "a_train"), str(tmp_path / "a_valid")], "no test: its proportion is 0"
    parts = [[contents(Shard(path), number) for number in range(30)] for path in made]
    # Samples without an id are named by their number, which is another in a part.
    drawn = [[(tokens, prompt, media) for tokens, prompt, _, media in part] for part in parts]
    original = [(tokens, prompt, media) for tokens, prompt, _, media in (contents(whole, n) for n in range(60))]
    assert sorted(map(repr, drawn[0] + drawn[1])) == sorted(map(repr, original))
    assert drawn[0] != original[:30], "drawn, not cut"
    names = {f"ball-{number}" for number in range(1, 60, 2)}
    assert names == {name for part in parts for _, _, name, _ in part if name.startswith("ball")}

    split_dataset(folder, str(tmp_path / "again"), split="1,1", shuffle_seed=5, progress=False)
    same_data(tmp_path / "a_train", tmp_path / "again_train")
    split_dataset(folder, str(tmp_path / "other"), split="1,1", shuffle_seed=6, progress=False)
    other = Shard(str(tmp_path / "other_train"))
    assert [contents(other, number) for number in range(30)] != parts[0]


def test_bad_requests_are_named_and_leave_nothing(tmp_path, text):
    before = sorted(tmp_path.iterdir())
    output = str(tmp_path / "t")
    for message, arguments in {
        "--parts 38; 1 to 37 are possible": {"parts": 38},
        "--parts 0": {"parts": 0},
        "leaves no document for test": {"split": "999,1000,1"},
        '--split: "a,b" must be up to three proportions': {"split": "a,b"},
        "give one of --split": {},
        "give one of": {"split": "1,1", "parts": 2},
        "--seed: -1": {"parts": 2, "shuffle_seed": -1},
    }.items():
        with pytest.raises(ValueError, match=message):
            split_dataset(text, output, **arguments, progress=False)
    assert sorted(tmp_path.iterdir()) == before
    run = run_tool("split_dataset.py", "--input", text, "--output", output)
    assert run.returncode == 1 and run.stderr.startswith("error: give one of"), run.stderr


def test_existing_parts_are_replaced_only_when_asked(tmp_path, text):
    split_dataset(text, str(tmp_path / "t"), parts=2, progress=False)
    first = (tmp_path / "t_part1.bin").read_bytes()
    with pytest.raises(DataError, match=r"t_part1\.bin: exists already"):
        split_dataset(text, str(tmp_path / "t"), parts=2, shuffle_seed=1, progress=False)
    assert (tmp_path / "t_part1.bin").read_bytes() == first
    split_dataset(text, str(tmp_path / "t"), parts=2, shuffle_seed=1, overwrite=True, progress=False)
    assert (tmp_path / "t_part1.bin").read_bytes() != first


@pytest.mark.parametrize("name", ["text.bin", "images.bin", "ids.bin"])
def test_damage_is_not_copied(tmp_path, folder, name):
    """A copy would get new checksums, under which the damage is no longer seen."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    for copy in (
        lambda: split_dataset(str(damaged), str(tmp_path / "part"), parts=3, progress=False),
        lambda: merge_datasets([str(damaged)], str(tmp_path / "part"), progress=False),
    ):
        with pytest.raises(DataError, match=rf"{name}, document \d+: its CRC-32"):
            copy()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_a_shard_of_megatrons_own_is_split(tmp_path, text):
    """It has neither checksums nor a manifest."""
    Path(text + ".crc").unlink()
    made = split_dataset(text, str(tmp_path / "t"), parts=2, progress=False)
    for path in made:
        assert json.loads(Path(path + ".json").read_text())["tokenizer"] == {}
        assert not verify(Shard(path), None, progress=False)
