"""Outputs of the builders: what --overwrite replaces, and what it never does, nor an empty path.

Truth: the files of the user's are the same before and after a command that is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_mm.config.outputs import OutputError
from megatron_mm.data.build.merge import merge_datasets
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.split import split_dataset
from megatron_mm.data.build.text import build_text
from megatron_mm.data.build.train_tokenizer import train_tokenizer
from megatron_mm.data.cleaning.clean_corpus import clean_corpus
from megatron_mm.data.jobs import unfinished
from megatron_mm.data.jobs.unfinished import Replacing, UnfinishedBuild
from megatron_mm.data.store.indexed import IndexedWriter
from megatron_mm.data.store.shards import Shard
from megatron_mm.media.errors import DataError
from tests.support.programs import PYTHON

TOOLS = Path(__file__).parents[2] / "tools"
FOLDERS = ("multimodal", "clean", "merge", "split")


@pytest.fixture
def build(samples, folder, tokenizer_path) -> Callable[..., str]:
    """build(kind, output): makes an output of a kind with --overwrite, and returns what it made."""

    def make(kind: str, output: str, overwrite: bool = True) -> str:
        how = {"overwrite": overwrite, "progress": False}
        if kind == "multimodal":
            build_multimodal([str(samples)], output, tokenizer_path, workers=0, **how)
        elif kind == "clean":
            clean_corpus([str(samples)], output, workers=0, **how)
        elif kind == "merge":
            merge_datasets([folder, folder], output, **how)
        elif kind == "split":
            return next(iter(split_dataset(folder, output, parts=1, **how)))
        else:
            build_text([str(samples)], output, tokenizer_path, workers=0, **how)
            return f"{output}_text_document"
        return output

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """The folder in which a command runs, with files of the user's."""
    (tmp_path / "here" / "run").mkdir(parents=True)
    (tmp_path / "here" / "run" / "notes.txt").write_text("mine")
    (tmp_path / "here" / "thesis.tex").write_text("years of work")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("output", ["", "/", "//"])
@pytest.mark.parametrize("kind", [*FOLDERS, "text"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_path_and_the_root_are_refused(kind, output, overwrite, build, mine):
    """An empty --output was the folder in which the command ran, which was then replaced, even without --overwrite."""
    before = contents(mine)
    with pytest.raises(OutputError, match=r"is empty|the root is no place"):
        build(kind, output, overwrite)
    assert contents(mine) == before and os.listdir(mine) == ["here"]


def test_a_tool_ends_with_status_2(mine, samples, tokenizer_path):
    before = contents(mine)
    command = [PYTHON, str(TOOLS / "preprocess_multimodal.py"), "--input", str(samples), "--tokenizer-model"]
    for output in ("", ".", str(mine / "here")):
        done = subprocess.run(
            [*command, tokenizer_path, "--output", output, "--overwrite"],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
        assert contents(mine) == before


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_users_folder_is_never_replaced(kind, build, mine):
    path = "here" if kind != "split" else "here_part1"
    if kind == "split":
        shutil.copytree("../here", "../here_part1")
    (mine / path / "manifest.json").write_text('{"format": "of somebody else"}')
    before = contents(mine)
    for output in (str(mine / "here"), f"{mine / 'here'}/")[: 1 if kind == "split" else 2]:
        with pytest.raises(OutputError, match=rf"{path}/?: holds no manifest.json of the format 'megatron_mm .*'"):
            build(kind, output)
    assert contents(mine) == before and not list(mine.glob("*.building"))


@pytest.mark.parametrize("kind", FOLDERS)
def test_of_an_output_with_something_of_the_users_nothing_is_removed(kind, build, mine):
    made = Path(build(kind, str(mine / "out"), overwrite=False))
    (made / "README.md").write_text("what is in here")
    before = contents(mine)
    with pytest.raises(OutputError, match=r"holds README.md, which is not of the format"):
        build(kind, str(mine / "out"))
    assert contents(mine) == before
    (made / "README.md").unlink()
    assert build(kind, str(mine / "out")) == str(made)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_file_and_the_folder_of_another_kind_are_not_replaced(kind, build, mine):
    path = mine / ("out_part1" if kind == "split" else "out")
    path.write_text("notes")
    with pytest.raises(OutputError, match="is no folder of the format"):
        build(kind, str(mine / "out"))
    assert path.read_text() == "notes"
    path.unlink()
    path.symlink_to(mine / "nothing")
    with pytest.raises(DataError, match="exists already"):
        build(kind, str(mine / "out"), overwrite=False)
    path.unlink()
    other = "multimodal" if kind == "clean" else "clean"
    build(other, str(path))
    before = contents(mine)
    with pytest.raises(OutputError, match=r"holds no manifest.json of the format|which is not of the format"):
        build(kind, str(mine / "out"))
    assert contents(mine) == before


def test_a_dataset_of_an_earlier_version_is_replaced(build, mine):
    """Its manifest has no checksum, and there are none of its documents; a damaged one is known by its format."""
    made = Path(build("multimodal", str(mine / "out")))
    whole = contents(made)
    manifest = json.loads((made / "manifest.json").read_text())
    earlier = {key: manifest[key] for key in ("format", "version", "counts", "tokenizer")}
    (made / "manifest.json").write_text(json.dumps(earlier))
    for path in made.glob("*.crc"):
        path.unlink()
    build("multimodal", str(mine / "out"))
    assert contents(made) == whole
    (made / "manifest.json").write_text(json.dumps({**manifest, "checksum": "0"}))
    build("multimodal", str(mine / "out"))
    assert contents(made) == whole


def test_a_link_is_replaced_and_what_it_leads_to_stays(build, mine):
    build("multimodal", str(mine / "elsewhere"))
    whole = contents(mine / "elsewhere")
    (mine / "out").symlink_to(mine / "elsewhere")
    build("multimodal", str(mine / "out"))
    assert not (mine / "out").is_symlink() and contents(mine / "elsewhere") == whole


@pytest.mark.parametrize("ending", [".bin", ".crc", ".json", ".idx", "skipped"])
@pytest.mark.parametrize("content", ["a user's file", None])
def test_a_users_file_is_no_part_of_a_shard(ending, content, build, mine):
    path = mine / ("out_skipped.jsonl" if ending == "skipped" else f"out_text_document{ending}")
    if content is None:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    else:
        path.write_text(content)
    before = contents(mine)
    with pytest.raises(OutputError, match=rf"{path.name}: (is no|has neither index nor manifest)"):
        build("text", str(mine / "out"))
    assert contents(mine) == before


def test_shards_are_replaced_ours_and_megatrons(build, mine):
    made = build("text", str(mine / "out"))
    whole = contents(mine)
    build("text", str(mine / "out"))
    assert contents(mine) == whole
    Path(f"{made}.crc").unlink(), Path(f"{made}.json").unlink()  # as Megatron's own, and our first ones, are
    (mine / "out_skipped.jsonl").write_text(json.dumps({"file": "a", "line": 1, "cause": "b"}) + "\n")
    build("text", str(mine / "out"))
    assert contents(mine) == whole, "the list of lines that the earlier build skipped is gone"
    Path(f"{made}.idx").unlink()  # killed before the index had its name
    build("text", str(mine / "out"))
    assert contents(mine) == whole


def test_merged_and_split_shards_are_replaced_and_a_users_file_is_not(mine):
    writer = IndexedWriter(str(mine / "text"), np.uint16)
    writer.add_documents(np.arange(40), np.full(20, 2))
    writer.finalize()
    writer.tidy()
    for _ in range(2):
        split_dataset(str(mine / "text"), str(mine / "part"), parts=2, overwrite=True, progress=False)
        merge_datasets([str(mine / "part_part1")] * 2, str(mine / "all"), overwrite=True, progress=False)
    assert len(Shard(str(mine / "all"))) == 20
    for name, act in (
        ("part_part2.json", lambda: split_dataset(str(mine / "text"), str(mine / "part"), parts=2, overwrite=True)),
        ("all.idx", lambda: merge_datasets([str(mine / "part_part1")], str(mine / "all"), overwrite=True)),
    ):
        (mine / name).write_text("{}")
        before = contents(mine)
        with pytest.raises(OutputError, match=rf"{name}: is no "):
            act()
        assert contents(mine) == before


@pytest.mark.parametrize("kind", ["multimodal", "text"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_while_it_is_built_stays(kind, overwrite, build, mine, monkeypatch):
    """The same command goes on when the name is free again."""
    monkeypatch.setattr(unfinished, "JOURNAL_SECONDS", -1)
    name = "out" if kind == "multimodal" else "out_text_document.idx"
    place = UnfinishedBuild.place

    def late(self, *arguments):
        (mine / name).mkdir()
        (mine / name / "notes.txt").write_text("mine")
        place(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(OutputError if overwrite else DataError, match=name):
        patched.setattr(UnfinishedBuild, "place", late)
        build(kind, str(mine / "out"), overwrite)
    assert (mine / name / "notes.txt").read_text() == "mine" and (mine / "out.building").is_dir()
    assert os.listdir(mine / name) == ["notes.txt"] and not (mine / "out_text_document.bin").exists()
    shutil.rmtree(mine / name)
    build(kind, str(mine / "out"), overwrite)
    assert not (mine / "out.building").exists() and (mine / name).exists()


@pytest.mark.parametrize(
    "names",
    [("notes.txt",), ("data/notes.txt",), ("data/text.bin", "lock"), ("lock", "journal.json", "old-x"),
     ("names.json",), ("options.json", "data/x")],
)  # fmt: skip
@pytest.mark.parametrize("kind", [*FOLDERS, "text"])
def test_a_users_folder_of_that_name_is_no_build(kind, names, build, mine):
    for name in names:
        path = mine / "out.building" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('["a user"]')
    before = contents(mine)
    with pytest.raises(OutputError, match=r"out.building: holds .*, so it is not of a build"):
        build(kind, str(mine / "out"))
    assert contents(mine) == before


def test_what_is_put_into_a_build_stays(build, mine, monkeypatch):
    place = UnfinishedBuild.place

    def late(self, *arguments):
        (mine / "out.building" / "notes.txt").write_text("mine")
        place(self, *arguments)

    monkeypatch.setattr(UnfinishedBuild, "place", late)
    build("multimodal", str(mine / "out"))
    assert contents(mine / "out.building") == {"notes.txt": b"mine"} and (mine / "out" / "manifest.json").exists()


@pytest.mark.parametrize("left", [(), ("lock",), ("lock", "options.json"), ("lock", "options.json", "names.json")])
def test_who_was_killed_while_a_build_was_removed_is_in_nobodys_way(left, build, mine):
    """In the order in which they are removed, these are what is left."""
    (mine / "out.building").mkdir()
    for name in left:
        (mine / "out.building" / name).write_text({"names.json": "[]", "options.json": "{}"}.get(name, ""))
    build("multimodal", str(mine / "out"), overwrite=False)
    assert not (mine / "out.building").exists()


def test_the_order_of_removal(mine, monkeypatch):
    """Killed at any moment, what is left is known as a build: `data` needs its options, all need the lock."""
    build, removed = UnfinishedBuild(str(mine / "out"), {}).begin(), []
    for name in ("journal.json", "names.json"):
        (mine / "out.building" / name).write_text("[]")
    (mine / "out.building" / "old-0").mkdir()
    remove, rmtree = os.remove, shutil.rmtree
    monkeypatch.setattr(os, "remove", lambda path: (removed.append(Path(path).name), remove(path)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (removed.append(Path(path).name), rmtree(path, **how)))
    build.place([], Replacing(False, lambda _: None, ""))
    assert sorted(removed[:3]) == ["data", "journal.json", "old-0"]
    assert removed[3:] == ["names.json", "options.json", "lock"]


def test_a_tokenizer_replaces_a_tokenizer_alone(mine, samples):
    out = mine / "t.model"
    for _ in range(2):
        train_tokenizer([str(samples)], str(out), 330, num_threads=1)
    assert sorted(os.listdir(mine)) == ["here", "t.model"]
    corpus = mine / "corpus.txt"
    corpus.write_text("a red ball\n" * 50)
    for path in (str(corpus), "", str(mine), "/"):
        with pytest.raises(OutputError, match="--output"):
            train_tokenizer([str(corpus)], path, 330, num_threads=1)
    assert corpus.read_text() == "a red ball\n" * 50
    fifo = mine / "fifo"
    os.mkfifo(fifo)
    with (mine / "read").open("wb") as read, subprocess.Popen(["cat", fifo], stdout=read):
        train_tokenizer([str(samples)], str(fifo), 330, num_threads=1)
    assert (mine / "read").read_bytes() == out.read_bytes() and fifo.is_fifo(), "as /dev/null would stay what it is"


def test_a_page_replaces_a_page_alone(mine, folder, tokenizer_path):
    command = [PYTHON, str(TOOLS / "inspect_dataset.py"), "--path", folder, "--samples", "1", "--html"]
    site = mine / "here" / "index.html"
    site.write_text("<!DOCTYPE html>\n<html><head><title>a user's site</title></head></html>\n")
    before = contents(mine)
    done = subprocess.run([*command, str(site)], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and "holds something else than a page of datasets" in done.stderr
    assert contents(mine) == before
    for _ in range(2):
        subprocess.run([*command, str(mine / "page.html")], capture_output=True, check=True)
    assert sorted(os.listdir(mine)) == ["here", "page.html"]
