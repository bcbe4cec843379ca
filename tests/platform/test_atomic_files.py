"""Files and folders that appear whole: what an error or a kill leaves, and what is on the disk before it has a name.

Truth: the names in the folder, and what a process that is killed between two steps leaves.
"""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from megatron_mm.platform import atomic_files
from megatron_mm.platform.atomic_files import give_name, write_whole, written_whole
from tests.support.programs import PYTHON


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_whole(path, "before")
    with pytest.raises(KeyError), written_whole(path) as stream:
        stream.write("half")
        raise KeyError
    assert path.read_text() == "before" and os.listdir(path.parent) == ["a.txt"]
    with written_whole(path, "xb") as stream:
        stream.write(b"after")
    assert path.read_bytes() == b"after" and os.listdir(path.parent) == ["a.txt"]


def test_links_are_followed_and_no_other_file_is_used(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    mine = tmp_path / f"target.{os.getpid()}.partial"
    mine.write_text("mine")
    with pytest.raises(FileExistsError):
        write_whole(link, "x")
    assert mine.read_text() == "mine" and not target.exists()
    mine.unlink()
    write_whole(link, "x")
    assert link.is_symlink() and target.read_text() == "x"


KILLED = """
import os, signal, sys
from megatron_mm.platform.atomic_files import written_whole
with written_whole(sys.argv[1], partial=sys.argv[2]) as stream:
    stream.write("half")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_what_was_there_and_a_leftover_that_the_next_replaces(tmp_path):
    path, partial = tmp_path / "journal.json", tmp_path / "journal.json.new"
    write_whole(path, "before")
    done = subprocess.run([PYTHON, "-c", KILLED, path, partial], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "before" and partial.read_text() == "half"
    with written_whole(path, partial=partial) as stream:
        stream.write("after")
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["journal.json"]


def test_what_must_outlive_the_machine_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, steps = tmp_path / "a", []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(atomic_files.os, "fsync", lambda number: (steps.append("on the disk"), sync(number)))
    monkeypatch.setattr(atomic_files.os, "replace", lambda *paths: (steps.append("named"), replace(*paths)))
    for durable, wanted in ((True, ["on the disk", "named"]), (False, ["named"])):
        steps.clear()
        with written_whole(path, durable=durable) as stream:
            stream.write("x" * 9)
        assert steps == wanted and path.read_text() == "x" * 9


def test_a_folder_replaces_one_that_goes_aside(tmp_path):
    made, final, aside = (tmp_path / name for name in ("made", "final", "aside"))
    made.mkdir(), (made / "new").write_text("1")
    assert not give_name(made, final, aside)
    assert os.listdir(final) == ["new"] and not aside.exists() and not made.exists()
    made.mkdir(), (made / "newer").write_text("2")
    with pytest.raises(OSError, match="not empty"):
        give_name(made, final)
    assert give_name(made, final, aside)
    assert os.listdir(final) == ["newer"] and os.listdir(aside) == ["new"]


def test_a_folder_that_went_aside_comes_back(tmp_path):
    final, aside = tmp_path / "final", tmp_path / "aside"
    final.mkdir(), (final / "old").write_text("1")
    with pytest.raises(FileNotFoundError):
        give_name(tmp_path / "never made", final, aside)
    assert os.listdir(final) == ["old"] and not aside.exists()


def test_permissions_are_those_of_any_new_file(tmp_path):
    """Not of a temporary file, which others may not read."""
    plain, whole = tmp_path / "plain", tmp_path / "whole"
    plain.write_text("x")
    write_whole(whole, "x")
    assert whole.stat().st_mode == plain.stat().st_mode
