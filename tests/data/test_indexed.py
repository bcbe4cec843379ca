"""The .bin/.idx format against megatron-core's own builder and reader, and damage found at open."""

from __future__ import annotations

import filecmp
import struct

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_mm.data.store.indexed import IndexedReader, IndexedWriter
from megatron_mm.media.errors import DataError


def documents(dtype) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 200, size).astype(dtype) for size in (5, 1, 0, 300, 7, 0, 12)]


def write_ours(prefix: str, dtype) -> list[np.ndarray]:
    docs = documents(dtype)
    writer = IndexedWriter(prefix, dtype)
    writer.add_documents(np.concatenate(docs[:4]), np.array([d.size for d in docs[:4]]))
    writer.add_documents(np.concatenate(docs[4:]), np.array([d.size for d in docs[4:]]))
    writer.finalize()
    return docs


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_same_bytes_as_megatron_and_read_both_ways(tmp_path, dtype):
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    docs = write_ours(ours, dtype)
    builder = IndexedDatasetBuilder(theirs + ".bin", dtype=dtype)
    for doc in docs:
        builder.add_document(doc, [doc.size] if doc.size else [])
    builder.finalize(theirs + ".idx")
    for suffix in (".bin", ".idx"):
        assert filecmp.cmp(ours + suffix, theirs + suffix, shallow=False)
    megatron, reader = IndexedDataset(ours), IndexedReader(theirs)
    assert len(reader) == len(docs)
    assert reader.document_lengths().tolist() == [d.size for d in docs]
    for i, doc in enumerate(docs):
        assert np.array_equal(reader.document(i), doc)
        first, last = megatron.document_indices[i : i + 2]
        assert np.array_equal(np.concatenate([np.empty(0, dtype), *(megatron[s] for s in range(first, last))]), doc)
    assert np.array_equal(reader.document(3, 10, 20), docs[3][10:30])


def test_documents_of_several_sequences(tmp_path):
    """Megatron's --split-sentences writes documents of several sequences."""
    prefix = str(tmp_path / "s")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    for _ in range(2):
        builder.add_item(torch.arange(3))
        builder.add_item(torch.arange(4))
        builder.end_document()
    builder.finalize(prefix + ".idx")
    reader = IndexedReader(prefix)
    assert reader.document(1).tolist() == [0, 1, 2, 0, 1, 2, 3]
    writer = IndexedWriter(str(tmp_path / "copy"), np.int32)
    writer.add_copies(reader, range(len(reader)))
    writer.add_copies(reader, range(len(reader)))
    writer.finalize()
    copy = IndexedReader(str(tmp_path / "copy"))
    assert len(copy) == 4 and copy.document(3).tolist() == [0, 1, 2, 0, 1, 2, 3]


def damage(path, change) -> None:
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))


def put(offset: int, format: str, value: int):
    def change(data: bytearray) -> bytearray:
        struct.pack_into(format, data, offset, value)
        return data

    return change


# 5 of the 7 documents have items. Layout: 34 bytes of header, 4 × 5 lengths, 8 × 5 pointers, 8 × 8 documents.
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("idx", lambda d: d[:20], "truncated in its header"),
        ("idx", lambda d: d[:-3], "truncated"),
        ("idx", lambda d: d + b"12345678901", "too long"),
        ("idx", lambda d: b"", "not a Megatron index"),
        ("idx", lambda d: b"RIFF" + d[4:], "not a Megatron index"),
        ("idx", put(9, "<Q", 2), "version 2"),
        ("idx", put(17, "<B", 99), "unknown dtype code 99"),
        ("idx", put(17, "<B", 4), "sequence 1 has pointer"),
        ("idx", put(18, "<Q", 6), "truncated"),
        ("idx", put(34, "<i", 6), "sequence 1 has pointer"),
        ("idx", put(34 + 16, "<i", 11), "longer than its index"),
        ("idx", put(34, "<i", -1), "sequence 0 has pointer"),
        ("idx", put(34 + 20 + 8, "<q", 1 << 40), "sequence 1 has pointer"),
        ("idx", put(34 + 60, "<q", 1), "must run from 0"),
        ("idx", put(34 + 60 + 8, "<q", 4), "document 1 ends before it begins"),
        ("idx", put(34 + 60 + 56, "<q", 4), "must run from 0 to 5"),
        ("bin", lambda d: d[:-1], "truncated"),
        ("bin", lambda d: b"", "truncated"),
        ("bin", lambda d: d + b"x", "longer than its index"),
    ],
)
def test_damage_is_found_at_open(tmp_path, file, change, message):
    write_ours(str(tmp_path / "s"), np.uint16)
    IndexedReader(tmp_path / "s")
    damage(tmp_path / f"s.{file}", change)
    with pytest.raises(DataError, match=message) as error:
        IndexedReader(tmp_path / "s")
    assert f"s.{'bin' if file == 'bin' else 'idx'}" in str(error.value) or f"s.{file}" in str(error.value)


@pytest.mark.parametrize("file", ["idx", "bin"])
def test_missing_file(tmp_path, file):
    write_ours(str(tmp_path / "s"), np.uint16)
    (tmp_path / f"s.{file}").unlink()
    with pytest.raises(DataError, match=rf"s\.{file}: missing"):
        IndexedReader(tmp_path / "s")
