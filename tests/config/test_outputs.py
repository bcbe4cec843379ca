"""Outputs that a user names: places that are refused, files and folders that are not replaced.

Truth: what is there stays as it was, byte for byte, after a refusal or a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_mm.config.load import dump_config, load_config
from megatron_mm.config.outputs import (
    MARKER,
    OutputError,
    begin_folder,
    check_file,
    check_place,
    figures,
    records,
)
from megatron_mm.platform.atomic_files import write_figures, write_whole
from tests.support.programs import PYTHON
from tests.support.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
KIND = figures("rows")


@pytest.mark.parametrize("path", ["", "/", "//", "/tmp/..", Path(""), Path("/")])
def test_no_place_for_an_output(path):
    with pytest.raises(OutputError, match=r"--json is empty|--json .*the root is no place"):
        check_place(path, "--json")


def test_a_link_to_the_root_is_the_root(tmp_path):
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(OutputError, match="the root"):
        check_place(tmp_path / "link", "--json")
    check_place(tmp_path / "link" / "x", "--json")


@pytest.mark.parametrize(
    "content", ['{"rows": []}', '[{"rows": 1, "b": 2}, {"rows": 2}]', "[]", ""], ids=["object", "list", "none", "empty"]
)
def test_a_file_of_the_kind_is_replaced(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    check_file(path, "--json", KIND)
    write_figures(path, {"rows": [1]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    check_file(None, "--json", KIND)


@pytest.mark.parametrize(
    "content", ['{"lines": []}', '[{"rows": 1}, {"b": 2}]', '{"rows": [', "model:\n  system: vlm\n", '"rows"', "\x80"]
)
def test_a_file_of_another_kind_is_not(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(OutputError, match=r"--json .*recipe.yaml: holds something else than figures \(rows\)"):
        check_file(path, "--json", KIND)


def test_lines_are_known_by_the_first(tmp_path):
    path, kind = tmp_path / "a.jsonl", records("id", "generated")
    path.write_text('{"id": 1, "generated": "x"}\nwhatever\n')
    check_file(path, "--output", kind)
    path.write_text('{"id": 1, "prompt": "x"}\n{"id": 1, "generated": "x"}\n')
    with pytest.raises(OutputError, match="JSONL with id, generated"):
        check_file(path, "--output", kind)


def test_what_cannot_be_written_is_said_before(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="taken is no folder"):
        check_file(tmp_path / "taken" / "new" / "a.json", "--json", KIND)
    with pytest.raises(OutputError, match="is a folder; name a file"):
        check_file(tmp_path, "--json", KIND)
    with pytest.raises(OutputError, match=r"--json is empty"):
        check_file(Path(""), "--json", KIND)
    check_file(tmp_path / "new" / "er" / "a.json", "--json", KIND)
    if os.geteuid():  # root may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(OutputError, match="closed cannot be written"):
            check_file(tmp_path / "closed" / "a.json", "--json", KIND)


def test_devices_and_pipes_are_written_not_replaced(tmp_path):
    """As root, a file renamed to /dev/null would take its place for the whole machine; a fifo stands in for it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE, encoding="utf-8")
    check_file(fifo, "--json", KIND)
    write_whole(fifo, "figures\n")
    assert reader.communicate(timeout=HANG_SECONDS)[0] == "figures\n" and fifo.is_fifo()
    code = "from megatron_mm.config.outputs import *; from megatron_mm.platform.atomic_files import *; "
    code += "check_file('/dev/stdout', '-', figures('a')); print('before', flush=True); write_figures('/dev/stdout', 1)"
    out = tmp_path / "out"
    with out.open("w") as stream:
        subprocess.run([PYTHON, "-c", code], stdout=stream, check=True, cwd=ROOT)
        assert os.fstat(stream.fileno()).st_ino == out.stat().st_ino and "1" in out.read_text()


def never(_folder: Path) -> bool:
    return False


def test_a_folder_of_results_is_marked_and_taken_up(tmp_path):
    for _ in range(2):
        begin_folder(tmp_path / "a" / "b", "tool.py", "--output", never)
        (tmp_path / "a" / "b" / "result").write_text("x")
    assert (tmp_path / "a" / "b" / MARKER).read_text() == "tool.py\n"
    with pytest.raises(OutputError, match=r"is a folder of tool.py, not of other.py"):
        begin_folder(tmp_path / "a" / "b", "other.py", "--output", lambda _: True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / MARKER).write_text("")  # by a full disk
    begin_folder(tmp_path / "cut", "tool.py", "--output", never)
    assert (tmp_path / "cut" / MARKER).read_text() == "tool.py\n"


def test_a_users_folder_is_not(tmp_path):
    (tmp_path / "run").mkdir()
    for path in (tmp_path, tmp_path / "link"):
        if path.name == "link":
            path.symlink_to(tmp_path)
        with pytest.raises(OutputError, match=rf"holds (link|run) and no {MARKER} of tool.py"):
            begin_folder(path, "tool.py", "--output", never)
    assert not (tmp_path / MARKER).exists()
    begin_folder(tmp_path, "tool.py", "--output", lambda folder: folder == tmp_path)
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("path", [Path(""), Path("/")])
def test_no_place_for_results(path):
    with pytest.raises(OutputError, match="--output"):
        begin_folder(path, "tool.py", "--output", lambda _: True)
    assert not (path / MARKER).exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    for name in ("file", "nowhere"):
        with pytest.raises(OutputError, match="is no folder"):
            begin_folder(tmp_path / name, "tool.py", "--output", never)


@pytest.mark.slow
def test_json_of_the_tools_is_checked_before_they_work(tmp_path):
    """Each tool ends within its start: what it should work on is not even there."""
    recipe = tmp_path / "recipe.yaml"
    dump_config(load_config(ROOT / "megatron_mm/recipes/synapse-tiny.yaml"), recipe)
    before = recipe.read_bytes()
    tools = {
        "tools/evaluate.py": ["--model", "none", "--input", "none"],
        "tools/score_objectives.py": ["--checkpoint", "none", "--input", "none"],
        "tools/inspect_dataset.py": ["--path", "none"],
        "tools/inspect_checkpoint.py": ["none"],
        "tools/estimate_build.py": ["text", "--input", "none", "--output-prefix", "x", "--tokenizer-model", "none"],
        "tools/count_parameters.py": ["--config", "none"],
        "tools/verify_layouts.py": ["--config", "none"],
        "tools/check_gpus.py": ["one", "--output", str(tmp_path / "checks")],
        "pretrain_multimodal.py": ["--config", str(recipe), "--dry-run", "--world-size", "1"],
        "benchmarks/data.py": ["--folder", str(tmp_path / "benchmarks")],
        "benchmarks/towers.py": [],
        "benchmarks/train_step.py": [],
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name, words in tools.items():
        option = "--dry-run-json" if "--dry-run" in words else "--json"
        command = [PYTHON, str(ROOT / name), *words, option, str(recipe)]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == 2 and "holds something else than" in done.stderr, (name, done.stderr[-500:])
    assert recipe.read_bytes() == before and os.listdir(tmp_path) == ["recipe.yaml"]
