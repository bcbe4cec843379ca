"""Packing plans in files: the same rows as in memory, made once, block by block; and large shards that open unread."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_mm.config.inputs import Limits
from megatron_mm.data.reading import packing, plans
from megatron_mm.data.reading.packing import pack
from megatron_mm.data.reading.plans import plan
from megatron_mm.data.store import indexed, shards
from megatron_mm.data.store.indexed import IndexedReader, IndexedWriter
from megatron_mm.data.store.shards import Shard
from megatron_mm.media.errors import DataError
from tests.support.waiting import HANG_SECONDS

LIMITS = Limits(128, 2, 1, 3)


@pytest.fixture
def text(tmp_path) -> str:
    """500 documents of 0 to 299 tokens."""
    random = np.random.default_rng(3)
    lengths = random.integers(0, 300, 500)
    writer = IndexedWriter(tmp_path / "text", np.uint16)
    writer.add_documents(random.integers(0, 100, lengths.sum()).astype(np.uint16), lengths)
    writer.finalize()
    writer.tidy()
    return str(tmp_path / "text")


@pytest.fixture
def everything_large(monkeypatch):
    monkeypatch.setattr(plans, "KEPT_FROM", 1)
    for module in (indexed, shards):
        monkeypatch.setattr(module, "CHECKED_AT_OPEN", 0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_blocks_and_files_do_not_change_the_rows(text, folder, monkeypatch, packed, block):
    for path in (text, folder):
        shard, documents = Shard(path), range(3, 57)
        wanted = pack(shard, documents, LIMITS, [1, 2], packed)
        with monkeypatch.context() as patch:
            patch.setattr(plans, "KEPT_FROM", 1)
            patch.setattr(packing, "_BLOCK", block)
            stored = plan(shard, documents, LIMITS, [1, 2], packed, os.path.dirname(text) + "/plans")
        for found in (stored, pickle.loads(pickle.dumps(stored))):
            assert np.array_equal(found.pieces, wanted.pieces) and found.report == wanted.report
            assert np.array_equal(found.row_starts, wanted.row_starts)
            assert isinstance(found.pieces, np.memmap)
        assert len(pickle.dumps(stored)) < 1000, "workers that are spawned open the files, they are not sent them"


def test_every_piece_is_in_one_row_and_fits(text):
    shard = Shard(text)
    found = pack(shard, range(500), LIMITS, [5])
    covered = {}
    for r in range(len(found)):
        pieces = found.row(r)
        assert 0 < sum(length for _, _, length in pieces) <= 128
        for document, offset, length in pieces:
            covered.setdefault(document, []).append((offset, offset + length))
    for document, length in enumerate(shard.document_lengths().tolist()):
        ends = sorted(covered.get(document, []))
        starts = [0, *(end for _, end in ends)]
        assert [begin for begin, _ in ends] == starts[:-1]
        assert starts[-1] == (length - (length > 128 and length % 128 == 1) if length >= 2 else 0)


def test_made_once_and_anew_for_anything_else(text, everything_large, monkeypatch):
    shard = Shard(text)
    first = plan(shard, range(500), LIMITS, [1], True)
    assert Path(first.folder).parent == Path(text + ".plans")
    with monkeypatch.context() as patch:
        patch.setattr(plans, "pack", lambda *_: pytest.fail("packed again"))
        assert plan(Shard(text), range(500), LIMITS, [1], True).folder == first.folder
    others = [
        plan(shard, range(499), LIMITS, [1], True),
        plan(shard, range(500), Limits(64, 2, 1, 3), [1], True),
        plan(shard, range(500), LIMITS, [2], True),
        plan(shard, range(500), LIMITS, [1], False),
    ]
    os.utime(text + ".idx", ns=(1, 1))
    others.append(plan(Shard(text), range(500), LIMITS, [1], True))
    assert len({first.folder, *(other.folder for other in others)}) == 6


def _plan_elsewhere(text: str, found) -> None:
    plans.KEPT_FROM = 1
    found.put(plan(Shard(text), range(500), LIMITS, [9], True).folder)


def test_processes_that_start_together_make_it_once(text, everything_large):
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    processes = [context.Process(target=_plan_elsewhere, args=(text, found)) for _ in range(4)]
    for process in processes:
        process.start()
    folders = {found.get(timeout=HANG_SECONDS) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 1
    assert sorted(os.listdir(text + ".plans")) == sorted([Path(*folders).name, Path(*folders).name + ".lock"])


def test_what_a_killed_process_left_is_made_again(text, everything_large):
    made = plan(Shard(text), range(500), LIMITS, [1], True)
    wanted = np.array(made.pieces)
    os.rename(made.folder, made.folder + ".making")
    Path(made.folder + ".making", "plan.json").unlink()
    assert np.array_equal(plan(Shard(text), range(500), LIMITS, [1], True).pieces, wanted)


def test_damaged_plans_and_folders_without_room_are_named(text, everything_large, tmp_path):
    folder = plan(Shard(text), range(500), LIMITS, [1], True).folder
    path = Path(folder, "pieces.npy")
    whole = path.read_bytes()
    for data in (b"", whole[:50], whole[:-16], b"\0" * len(whole)):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"damaged packing plan.*remove the folder"):
            plan(Shard(text), range(500), LIMITS, [1], True)
    for wrong in (np.zeros(3, packing.PIECE_DTYPE), np.frombuffer(whole[128:], np.uint8)):  # whole, of another plan
        np.save(path, wrong)
        with pytest.raises(DataError, match="its arrays are not of its report"):
            plan(Shard(text), range(500), LIMITS, [1], True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: the packing plan .* set data\.plan_folder"):
        plan(Shard(text), range(500), LIMITS, [1], True, str(tmp_path / "file"))


# ------------------------------------------------------------------------------------- large shards open unread


def test_damage_of_a_large_index_is_found_where_it_is_read(text, everything_large, tmp_path):
    """A bit of a pointer or a length flipped: found by check; a document is read as it was, or not at all."""
    reader = IndexedReader(text)
    wanted = [reader.document(d).tolist() for d in range(500)]
    sequences = reader.sequence_lengths.size
    whole = Path(text + ".idx").read_bytes()
    Path(tmp_path / "bad.bin").write_bytes(Path(text + ".bin").read_bytes())
    random = np.random.default_rng(1)
    found = 0
    for _ in range(60):
        data = bytearray(whole)
        at = indexed.HEADER_SIZE + int(random.integers(0, 12 * sequences))
        data[at] ^= 1 << int(random.integers(0, 8))
        Path(tmp_path / "bad.idx").write_bytes(data)
        try:
            bad = IndexedReader(tmp_path / "bad")
            with pytest.raises(DataError):
                bad.check()
        except DataError:
            found += 1
            continue
        for document in range(500):
            try:
                tokens = bad.document(document).tolist()
            except DataError as error:
                assert str(tmp_path / "bad.idx") in str(error)
            else:
                assert tokens == wanted[document]
    assert found < 60


def test_a_large_table_is_checked_by_its_plan(folder, everything_large, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "bad")
    table = np.load(tmp_path / "bad" / "samples.npy")
    table["first_image"][11] = 1 << 40
    table["num_images"][11] = 1
    np.save(tmp_path / "bad" / "samples.npy", table)
    shard = Shard(str(tmp_path / "bad"))
    with pytest.raises(DataError, match="sample 11: refers beyond"):
        shard.records("images", 11)
    with pytest.raises(DataError, match="sample 11: refers beyond"):
        plan(shard, range(len(shard)), LIMITS, [1], True)
