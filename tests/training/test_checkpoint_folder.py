"""Folders are whole or not there; a cut-off one is found and the one before is used."""

from pathlib import Path

import pytest

from megatron_mm.training import checkpoint_folder


def write(root: Path, iteration: int, content: bytes = b"weights") -> Path:
    part = checkpoint_folder.begin(root, iteration)
    (part / "shard.distcp").write_bytes(content)
    return checkpoint_folder.finish(part, {"iteration": iteration})


def test_a_finished_folder_is_found_and_an_unfinished_one_is_not(tmp_path):
    first = write(tmp_path, 10)
    checkpoint_folder.begin(tmp_path, 20)
    assert checkpoint_folder.newest_whole(tmp_path) == (first, [])
    assert (tmp_path / checkpoint_folder.TRACKER).read_text() == "10"


def test_a_cut_off_folder_is_passed_over_and_named(tmp_path):
    first, second = write(tmp_path, 10), write(tmp_path, 20)
    (second / "shard.distcp").write_bytes(b"wei")
    found, problems = checkpoint_folder.newest_whole(tmp_path)
    assert found == first and "shard.distcp has 3 bytes instead of 7" in problems[0]
    with pytest.raises(ValueError, match="3 bytes instead of 7"):
        checkpoint_folder.resolve(second)
    assert checkpoint_folder.resolve(tmp_path) == first


def test_old_ones_are_removed(tmp_path):
    for iteration in (1, 2, 3, 10):
        write(tmp_path, iteration)
    checkpoint_folder.prune(tmp_path, keep=2, newest=10)
    assert [folder.name for folder in checkpoint_folder.checkpoints(tmp_path)] == ["iter_0000003", "iter_0000010"]
    checkpoint_folder.prune(tmp_path, keep=0, newest=10)
    assert len(checkpoint_folder.checkpoints(tmp_path)) == 2


def test_the_one_just_written_stays_whatever_else_is_there(tmp_path):
    """Later checkpoints of an abandoned branch and damaged ones do not count."""
    for iteration in (3, 4, 9):
        write(tmp_path, iteration)
    (checkpoint_folder.folder_of(tmp_path, 3) / "shard.distcp").write_bytes(b"")
    checkpoint_folder.prune(tmp_path, keep=1, newest=4)
    left = [checkpoint_folder.iteration_of(folder) for folder in checkpoint_folder.checkpoints(tmp_path)]
    assert left == [3, 4, 9]
    assert [path.name for path in checkpoint_folder.set_aside_later(tmp_path, 4)] == ["iter_0000009.abandoned"]
    assert checkpoint_folder.newest_whole(tmp_path)[0].name == "iter_0000004"


def test_nothing_to_resolve_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint_folder.resolve(tmp_path)
