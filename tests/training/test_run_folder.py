"""The output folder of a run: files of a user's that have the names of a run's own are not replaced.

Truth: they are the same, byte for byte, after a command that is refused; a run of an earlier version goes on.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_mm.config.load import dump_config, load_config
from megatron_mm.config.outputs import OutputError
from megatron_mm.config.schema import Config
from megatron_mm.config.section import changed
from megatron_mm.training import run_folder
from tests.support.programs import PYTHON

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "megatron_mm/recipes/synapse-tiny.yaml"


@pytest.fixture
def config(tmp_path) -> Config:
    config = changed(load_config(TINY), {"logging.output": str(tmp_path)})
    return config


def test_a_new_folder_and_that_of_a_run(config, tmp_path):
    run_folder.check(config)
    dump_config(config, tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0, "grad_norm": 1.0}\n{"iteration": 2, "lo')
    (tmp_path / "preflight.json").write_text('{"passed": true, "problems": []}')
    run_folder.check(config, measures=True)


def test_settings_of_an_earlier_version_are_a_runs(config, tmp_path):
    """Fields that were not there then, and one that is there no more."""
    dump_config(config, tmp_path / "config.yaml")
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    kept = [line for line in lines if "attention_backend" not in line]
    (tmp_path / "config.yaml").write_text("\n".join([*kept, "gone: null", ""]))
    assert len(kept) < len(lines)
    run_folder.check(config)


@pytest.mark.parametrize("line", ["", "{", '{"iter', '{"iteration": ', '{"iteration": 1, "loss": 2.'])
def test_a_first_line_that_was_cut_off_is_a_runs(config, tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line)
    run_folder.check(config)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", TINY.read_text()),  # a recipe, with comments and a layout of its own
        ("config.yaml", "theme: dark\n"),
        ("config.yaml", ""),
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n'),
        ("metrics.jsonl", "iteration,loss\n1,2.0\n"),
        ("metrics.jsonl", "no line of a run's"),
        ("preflight.json", '{"aircraft": "D-EABC"}'),
    ],
)
def test_a_users_file_is_not_replaced(config, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    if not content:
        return run_folder.check(config, measures=True)
    with pytest.raises(OutputError, match=rf"logging.output .*{name}: holds something else than"):
        run_folder.check(config, measures=True)
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("output", ["", "/"])
@pytest.mark.parametrize("field", ["output", "save"])
def test_an_empty_path_and_the_root_are_refused(config, output, field):
    if field == "output":
        config = changed(config, {"logging.output": output})
    else:
        config = changed(config, {"checkpoint.save": output})
    with pytest.raises(OutputError, match=r"(logging.output|checkpoint.save).*(is empty|the root)"):
        run_folder.check(config)


@pytest.mark.parametrize("output", [".", ""])
def test_the_command_ends_before_it_trains(tmp_path, output):
    """A recipe config.yaml in the folder where its run is to leave its own: what is lost would be its comments."""
    (tmp_path / "config.yaml").write_text(TINY.read_text())
    (tmp_path / "metrics.jsonl").write_text("mine\n")
    words = [PYTHON, str(ROOT / "pretrain_multimodal.py"), "--config", "config.yaml"]
    environment, words = {**os.environ, "PYTHONPATH": str(ROOT)}, [*words, "--logging.output", output]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False, env=environment)
    assert done.returncode == 2 and "error: logging.output" in done.stderr, done.stderr[-1000:]
    assert (tmp_path / "config.yaml").read_text() == TINY.read_text()
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "metrics.jsonl"]
