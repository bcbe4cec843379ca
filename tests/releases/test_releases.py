"""Short form of tests/releases/run.sh: the release that is installed here, and what its table says of failures."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.releases.table import table
from tests.support.programs import INTERPRETER

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.interface


@pytest.mark.slow
def test_folders_of_every_system_are_right_in_this_release_and_raise_where_their_cache_is_lost(tmp_path):
    folders, figures = tmp_path / "folders", tmp_path / "figures.json"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    for command in (
        [INTERPRETER, "-m", "tests.releases.prepare", str(folders)],
        [INTERPRETER, "-W", "ignore", "tests/releases/check.py", str(folders), str(figures)],
    ):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    systems = json.loads(figures.read_text())["systems"]
    assert sorted(systems) == ["avt", "dual_encoder", "perceiver_fusion", "synapse", "vlm"]
    assert all(results["processor"] == "ok" for results in systems.values())
    assert {"cache-not-returned", "cache-not-taken", "Trainer", "accelerate", "PEFT", "sounds"} <= set(systems["avt"])


def test_one_wrong_way_is_seen_in_the_table():
    good = {"transformers": "5.0.0", "systems": {"avt": {"load": "ok", "greedy": "ok"}, "vlm": {"load": "ok"}}}
    lines, right = table([good])
    assert right and lines[0].split() == ["transformers", "system", "load", "greedy"] and "WRONG" not in "".join(lines)
    bad = {"transformers": "5.9.0", "systems": {"avt": {"load": "ok", "greedy": "Wrong: [1] for [2]"}}}
    lines, right = table([good, bad])
    assert not right and lines[-1].split() == ["5.9.0", "avt", "ok", "WRONG"]
