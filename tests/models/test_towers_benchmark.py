"""The benchmark of towers runs every case it has, and exits with 1 where the two sides do not compute the same."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.programs import PYTHON

ROOT = Path(__file__).resolve().parents[2]


def run(*options: object) -> subprocess.CompletedProcess:
    command = [PYTHON, ROOT / "benchmarks" / "towers.py", "--threads", "1", *options]
    return subprocess.run([*map(str, command)], capture_output=True, encoding="utf-8", check=False)


@pytest.mark.slow
def test_smoke(tmp_path):
    cases = sorted(path.stem for path in (ROOT / "benchmarks" / "tower_cases").glob("[a-z]*.py"))
    done = run("--smoke", "--json", tmp_path / "figures.json", "--cases", *cases)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["case"] for row in figures["cases"]] == cases
    for row in figures["cases"]:
        assert row["ratio"] > 0 and f"{row['ratio']:.3f}" in done.stdout


def test_an_unknown_case_is_a_usage_error():
    done = run("--cases", "vti")
    assert done.returncode == 2
    assert "--cases vti" in done.stderr and "vit" in done.stderr
