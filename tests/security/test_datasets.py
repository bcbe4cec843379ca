"""Datasets that others built: every file of one is tried as a pickle, a pipe, a device, nonsense, or a bomb."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mm.data.build.merge import merge_datasets
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.cleaning.clean_corpus import clean_corpus
from megatron_mm.data.cleaning.drop_list import DropList
from megatron_mm.data.store.indexed import MAGIC
from megatron_mm.data.store.manifest import CHECKSUM
from megatron_mm.data.store.remote import localize
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.view.inspection import verify
from megatron_mm.media.errors import DataError
from tests.support.hostile import SECRET, Hostile, check_refused, returns, tool

DEEP = "[" * 100_000
FILES = ("manifest.json", "samples.npy", "text.idx", "text.bin", "images.idx", "images.bin", "ids.idx", "text.crc")


@pytest.fixture(scope="module")
def built(tmp_path_factory, bytes_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("built")
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    lines = [{"id": f"n{i}", "prompt": "<image>", "text": "red", "images": ["a.png"]} for i in range(3)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = (str(folder / "a.jsonl"),)
    build_multimodal(words, str(folder / "x"), str(bytes_tokenizer), workers=0, progress=False)
    clean_corpus(words, str(folder / "clean"), workers=0, progress=False)
    return folder


@pytest.fixture
def dataset(built, tmp_path) -> Path:
    return shutil.copytree(built / "x", tmp_path / "x")


def read(folder: Path) -> None:
    """Opens, verifies and copies a dataset.

    Raises:
        DataError: what is wrong.
    """
    shard = Shard(str(folder))
    if problems := verify(shard, None, progress=False):
        raise DataError(problems[0])
    merge_datasets([str(folder)], str(folder.parent / "merged"), progress=False)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Changes a manifest, without its checksum, as an older one is."""
    manifest = json.loads(path.read_text())
    manifest.pop(CHECKSUM)
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_the_dataset_itself_is_read(dataset):
    read(dataset)


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_is_refused(name, kind, dataset, hostile):
    (dataset / name).unlink()
    hostile.special(kind, dataset / name)
    with pytest.raises(DataError, match=rf"x/{name[:-4]}"):
        returns(lambda: read(dataset))


@pytest.mark.parametrize("name", FILES)
def test_so_is_a_link_to_a_file_without_an_end(name, dataset, hostile):
    hostile.special("device", dataset / name)
    with pytest.raises(DataError):
        returns(lambda: read(dataset))


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_the_place_of_a_file_is_not_loaded(name, dataset, hostile):
    (dataset / name).write_bytes(hostile.pickled)
    with pytest.raises(DataError):
        read(dataset)


def test_objects_in_the_table_are_not_made(dataset, hostile):
    out = io.BytesIO()
    np.lib.format.write_array(out, np.empty(3, object), allow_pickle=True)
    header = out.getvalue()[: out.getvalue().rindex(b"\n") + 1]
    (dataset / "samples.npy").write_bytes(header + hostile.pickled)
    with pytest.raises(DataError, match=r"samples\.npy: missing or damaged"):
        read(dataset)


def huge_table(dataset: Path) -> None:
    data = (dataset / "samples.npy").read_bytes()
    (dataset / "samples.npy").write_bytes(data.replace(b"(3,), }           ", b"(300000000000,), }"))


def huge_index(dataset: Path) -> None:
    (dataset / "text.idx").write_bytes(MAGIC + struct.pack("<QBQQ", 1, 4, 1 << 60, 1 << 60))


@pytest.mark.parametrize(("make", "message"), [(huge_table, r"samples\.npy: missing"), (huge_index, "truncated")])
def test_counts_are_compared_with_the_file_before_memory_is_taken(make, message, dataset):
    before = (dataset / "samples.npy").read_bytes(), (dataset / "text.idx").read_bytes()
    make(dataset)
    assert before != ((dataset / "samples.npy").read_bytes(), (dataset / "text.idx").read_bytes())
    with pytest.raises(DataError, match=message):
        read(dataset)


OUTSIDE = {"bytes": 0, "sha256": "0" * 64}
MANIFESTS = {
    "a device elsewhere": lambda m: m["files"].update({"../../../../../../../dev/zero": OUTSIDE}),
    "an absolute path": lambda m: m["files"].update({"/dev/zero": OUTSIDE}),
    "the folder": lambda m: m["files"].update({"..": OUTSIDE}),
    "files as a list": lambda m: m.update(files=["a"]),
    "a file without a size": lambda m: m["files"].update({"text.idx": 3}),
    "counts as a list": lambda m: m.update(counts=[3]),
    "counts of text": lambda m: m.update(counts={"images": "many"}),
    "a tokenizer's name alone": lambda m: m.update(tokenizer="bytes"),
    "a tokenizer of numbers": lambda m: m.update(tokenizer={"identity": 5}),
    "sources of text": lambda m: m.update(sources=["a"]),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_names_its_own_files_and_has_the_form_of_one(change, dataset, bytes_tokenizer):
    edit(dataset / "manifest.json", change)
    with pytest.raises(DataError, match=r"manifest\.json: damaged \((files|counts|tokenizer|sources)"):
        returns(lambda: read(dataset))


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 50_000, "null", "\ud800".encode("utf-8", "surrogatepass"), b"\xff"])
def test_a_manifest_that_no_parser_takes(text, dataset):
    (dataset / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"manifest\.json: damaged"):
        read(dataset)


CLEANED = ("manifest.json", "drops.npy")


@pytest.mark.parametrize("name", CLEANED)
@pytest.mark.parametrize("how", ["pickle", "pipe", "socket", "device", "folder"])
def test_a_list_of_what_to_drop(name, how, built, tmp_path, hostile):
    folder = shutil.copytree(built / "clean", tmp_path / "clean")
    (folder / name).unlink()
    if how == "pickle":
        (folder / name).write_bytes(hostile.pickled)
    else:
        hostile.special(how, folder / name)

    def use() -> None:
        DropList(str(folder)).check_inputs([str(built / "a.jsonl")])

    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        returns(use)


@pytest.mark.parametrize("sources", [None, 3, [3], [{"path": "a"}], [{"path": "a", "dropped": "x"}]])
def test_a_list_of_what_to_drop_without_its_fields(sources, built, tmp_path):
    folder = shutil.copytree(built / "clean", tmp_path / "clean")
    edit(folder / "manifest.json", lambda m: m.update(sources=sources))
    with pytest.raises(DataError, match=r"manifest\.json: damaged"):
        DropList(str(folder))


def test_a_chain_of_stores_is_not_opened(tmp_path, hostile):
    """One kind of store runs the templates of the file that it is given."""
    (hostile.folder / "r.json").write_text(json.dumps({"version": 1, "templates": {"u": "{{ 7 * 7 }}"}, "refs": {}}))
    with pytest.raises(DataError, match=r"a chain of stores \(::\)"):
        localize(f"reference::file://{hostile.folder}/r.json", str(tmp_path))


def test_a_file_by_which_the_copies_are_noted_is_not_copied(dataset, tmp_path, hostile):
    (dataset / "cache").write_bytes(hostile.pickled)  # fsspec of before 2025 reads it as JSON, and then as a pickle
    for _ in range(2):
        copied = localize(f"file://{dataset}", str(tmp_path / "copies"))
        assert hostile.pickled not in [path.read_bytes() for path in Path(copied).iterdir()]
    read(Path(copied))


def test_what_is_left_of_a_build_renames_nothing_elsewhere(tmp_path, hostile, built, bytes_tokenizer):
    left = tmp_path / "x.building"
    (left / "data").mkdir(parents=True)
    (left / "data" / "0").write_text("mine now")
    (left / "lock").touch()
    (left / "options.json").write_text("{}")
    (left / "names.json").write_text(json.dumps([["0", str(hostile.secret)]]))
    with pytest.raises(DataError, match=r"names\.json"):
        build_multimodal([str(built / "a.jsonl")], str(tmp_path / "x"), str(bytes_tokenizer), workers=0, progress=False)
    assert SECRET in hostile.secret.read_text()


@pytest.mark.slow
def test_tools_say_it_in_one_line(dataset, tmp_path, hostile: Hostile):
    edit(dataset / "manifest.json", MANIFESTS["a device elsewhere"])
    page = ("--html", tmp_path / "page.html", "--json", tmp_path / "figures.json", "--verify")
    check_refused(tool("tools/inspect_dataset.py", "--path", dataset, *page), "manifest.json")
    (dataset / "manifest.json").write_text(DEEP)
    check_refused(tool("tools/merge_datasets.py", "--input", dataset, "--output", tmp_path / "m"), "nested too deeply")
    assert not (tmp_path / "page.html").exists() and not (tmp_path / "m").exists()
