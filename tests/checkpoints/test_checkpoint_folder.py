"""Folders are whole or not there; a cut-off one is found and the one before is used."""

from pathlib import Path

import pytest

from megatron_mm.checkpoints import folder as checkpoint_folder


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


def foreign(folder: Path) -> Path:
    """A folder of the user's."""
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    return folder


def test_a_folder_that_no_run_wrote_is_not_pruned(tmp_path):
    """By its name it is the oldest checkpoint: with files of the user's, or another iteration's under a new name."""
    mine = foreign(tmp_path / "iter_0000001")
    renamed = write(tmp_path, 7).rename(tmp_path / "iter_0000002")
    linked = write(tmp_path / "elsewhere", 3)
    (tmp_path / "iter_0000003").symlink_to(linked)
    for iteration in (10, 20):
        write(tmp_path, iteration)
    checkpoint_folder.prune(tmp_path, keep=1, newest=20)
    names = [folder.name for folder in checkpoint_folder.checkpoints(tmp_path)]
    assert names == ["iter_0000001", "iter_0000002", "iter_0000003", "iter_0000020"]
    assert (mine / "thesis.tex").exists() and checkpoint_folder.verify(renamed) is None
    assert checkpoint_folder.verify(linked) is None


def test_a_checkpoint_with_something_of_the_users_stays_and_is_named(tmp_path, caplog):
    for iteration in (1, 2, 3):
        write(tmp_path, iteration)
    (tmp_path / "iter_0000001" / "exported").mkdir()
    (tmp_path / "iter_0000001" / "exported" / "model.safetensors").write_bytes(b"weights")
    checkpoint_folder.prune(tmp_path, keep=1, newest=3)
    assert [folder.name for folder in checkpoint_folder.checkpoints(tmp_path)] == ["iter_0000001", "iter_0000003"]
    assert checkpoint_folder.verify(tmp_path / "iter_0000001") is None
    assert "iter_0000001 holds exported/model.safetensors, which is no part of a checkpoint" in caplog.text


def test_what_a_checkpoint_lists_goes_with_it(tmp_path):
    """Whatever its files are called: another version may write others."""
    part = checkpoint_folder.begin(tmp_path, 1)
    (part / "state").mkdir()
    (part / "state" / "more.bin").write_bytes(b"x")
    checkpoint_folder.finish(part, {"iteration": 1})
    write(tmp_path, 2)
    checkpoint_folder.prune(tmp_path, keep=1, newest=2)
    assert [folder.name for folder in checkpoint_folder.checkpoints(tmp_path)] == ["iter_0000002"]


@pytest.mark.parametrize("ending", [".part", ".old", ""])
def test_a_users_folder_in_the_way_is_refused_before_anything_is_written(tmp_path, ending):
    mine = foreign(tmp_path / f"iter_0000005{ending}")
    with pytest.raises(ValueError, match=rf"iter_0000005{ending} holds thesis.tex, which is no part of a checkpoint"):
        checkpoint_folder.begin(tmp_path, 5)
    assert (mine / "thesis.tex").read_text() == "years of work" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="it stays"):
        checkpoint_folder.remove(mine)
    (tmp_path / "file").write_text("x"), (tmp_path / "link").symlink_to(mine)
    for name in ("file", "link"):
        with pytest.raises(ValueError, match="is no folder of a checkpoint"):
            checkpoint_folder.remove(tmp_path / name)
    assert (mine / "thesis.tex").exists()


def test_a_leftover_of_an_interrupted_write_is_removed(tmp_path):
    """Of any moment: shards alone, or all but the name; an earlier version's too."""
    part = checkpoint_folder.begin(tmp_path, 5)
    for name in ("__0_0.distcp", ".metadata.tmp", ".metadata", "common.pt", "metadata.json", "config.yaml"):
        (part / name).write_bytes(b"half")
    part = checkpoint_folder.begin(tmp_path, 5)
    assert not any(part.iterdir())
    (part / "tokenizer.model").write_bytes(b"half"), (part / "byte_tokenizer.json").write_bytes(b"half")
    (part / "manifest.json").write_text('{"iterat')
    assert not any(checkpoint_folder.begin(tmp_path, 5).iterdir())


def test_a_damaged_checkpoint_is_written_again(tmp_path):
    (write(tmp_path, 5) / "manifest.json").write_text("{")
    (tmp_path / "iter_0000005.old").mkdir()
    assert checkpoint_folder.verify(write(tmp_path, 5)) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", checkpoint_folder.TRACKER]


def test_what_came_while_a_checkpoint_was_written_stays(tmp_path):
    part = checkpoint_folder.begin(tmp_path, 5)
    mine = foreign(tmp_path / "iter_0000005")
    with pytest.raises(ValueError, match=r"holds thesis\.tex"):
        checkpoint_folder.finish(part, {"iteration": 5})
    assert (mine / "thesis.tex").exists()


def test_of_what_was_set_aside_only_checkpoints_are_replaced(tmp_path):
    write(tmp_path, 9), write(tmp_path, 4)
    assert checkpoint_folder.set_aside_later(tmp_path, 4)
    write(tmp_path, 9)
    assert checkpoint_folder.set_aside_later(tmp_path, 4), "an abandoned checkpoint gives way to the next one"
    (tmp_path / "iter_0000009.abandoned" / "why.txt").write_text("mine")
    write(tmp_path, 9)
    with pytest.raises(ValueError, match=r"iter_0000009.abandoned holds why.txt"):
        checkpoint_folder.set_aside_later(tmp_path, 4)
    assert (tmp_path / "iter_0000009.abandoned" / "why.txt").exists()


def test_another_programs_tracker_is_not_replaced(tmp_path):
    """Megatron-LM's says `release` of weights without an iteration, which stand in a folder of that name."""
    (tmp_path / checkpoint_folder.TRACKER).write_text("release\n")
    with pytest.raises(ValueError, match="names no iteration"):
        checkpoint_folder.begin(tmp_path, 5)
    assert (tmp_path / checkpoint_folder.TRACKER).read_text() == "release\n"
