"""The benchmark runs, and refuses to compare sides whose losses differ (it exits with 1 then)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.programs import PYTHON

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_smoke(tmp_path):
    command = [PYTHON, ROOT / "benchmarks" / "train_step.py", "--smoke", "--threads", "1", "--json"]
    done = subprocess.run([*command, tmp_path / "figures.json"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ratio"] > 0 and f"{figures['ratio']:.3f}" in done.stdout
