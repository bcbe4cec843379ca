"""Datasets in stores that fsspec knows: copied once, again when they change, named when they cannot be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatron_mm.config.section import changed
from megatron_mm.data.build.text import build_text
from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.data.store import remote
from megatron_mm.data.store.remote import localize
from megatron_mm.data.store.shards import Shard
from megatron_mm.media.errors import DataError

pytestmark = pytest.mark.interface


@pytest.fixture
def store(folder):
    """A store in memory with the folder of samples at memory://bucket/balls."""
    store = fsspec.filesystem("memory")
    for name in os.listdir(folder):
        store.pipe(f"/bucket/balls/{name}", Path(folder, name).read_bytes())
    yield store
    store.rm("/bucket", recursive=True)


def test_a_folder_trains_as_the_local_one_does(store, folder, config, tmp_path):
    local = build_datasets(config).train
    there = [changed(config.data.datasets[0], {"path": "memory://bucket/balls"})]
    config = changed(config, {"data.datasets": there, "data.cache_folder": str(tmp_path)})
    copied = build_datasets(config).train
    for index in ([0, 1, 2], [7]):
        ours, theirs = (d.microbatch(index, {"tokens_RT", "images_ICHW"}) for d in (copied, local))
        assert (ours.tokens_RT == theirs.tokens_RT).all() and (ours.images_ICHW == theirs.images_ICHW).all()
        assert ours.sample_ids == theirs.sample_ids
    for name in os.listdir(folder):
        assert Path(copied.sources[0].shard.path, name).read_bytes() == Path(folder, name).read_bytes()


def test_a_text_shard(store, samples, tokenizer_path, tmp_path):
    build_text([str(samples)], str(tmp_path / "t"), tokenizer_path, workers=0, progress=False)
    for path in tmp_path.glob("t_text_document.*"):
        store.pipe(f"/bucket/text/{path.name}", path.read_bytes())
    path = localize("memory://bucket/text/t_text_document", str(tmp_path / "cache"))
    assert len(Shard(path)) == len(Shard(str(tmp_path / "t_text_document"))) == 60


def test_copied_once_and_what_changed_again(store, tmp_path, monkeypatch):
    opened = []
    open_file = MemoryFileSystem._open
    monkeypatch.setattr(
        MemoryFileSystem, "_open", lambda self, path, *a, **k: opened.append(path) or open_file(self, path, *a, **k)
    )
    first = localize("memory://bucket/balls", str(tmp_path))
    count = len(opened)
    assert count == len(store.ls("/bucket/balls"))
    assert localize("memory://bucket/balls", str(tmp_path)) == first and len(opened) == count
    other = bytes(len(Path(first, "samples.npy").read_bytes()))  # of the same size
    store.pipe("/bucket/balls/samples.npy", other)
    os.truncate(Path(first, "text.bin"), 3)
    opened.clear()
    localize("memory://bucket/balls", str(tmp_path))
    assert sorted(map(os.path.basename, opened)) == ["samples.npy", "text.bin"]
    assert Path(first, "samples.npy").read_bytes() == other


def test_a_copy_that_was_cut_off_is_made_again(store, folder, tmp_path, monkeypatch):
    get_file = MemoryFileSystem.get_file

    def fails(self, source, target, **options):
        get_file(self, source, target, **options)
        if source.endswith("text.bin"):
            os.truncate(target, 100)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(MemoryFileSystem, "get_file", fails)
    with pytest.raises(DataError, match=r"memory://bucket/balls.*No space left"):
        localize("memory://bucket/balls", str(tmp_path))
    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    path = localize("memory://bucket/balls", str(tmp_path))
    assert Path(path, "text.bin").read_bytes() == Path(folder, "text.bin").read_bytes()
    Shard(path).check()


def test_what_is_wrong_is_named(store, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"memory://bucket/none: neither a dataset folder nor"):
        localize("memory://bucket/none", str(tmp_path))
    with pytest.raises(DataError, match=r"nosuch://a/b.*Protocol not known"):
        localize("nosuch://a/b", str(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(DataError, match=r"has room for 10; set data\.cache_folder"):
        localize("memory://bucket/balls", str(tmp_path))
    assert localize("data/balls") == "data/balls"
