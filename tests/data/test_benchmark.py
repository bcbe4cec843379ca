"""benchmarks/data.py runs every case, and the check of killed builds its small form."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.support.programs import INTERPRETER, PYTHON

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def test_every_case_runs(tmp_path):
    command = [PYTHON, str(ROOT / "benchmarks" / "data.py"), "--smoke", "--repeats", "1"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {figure["case"] for figure in figures} == {"text", "memory", "order", "images", "loader"}
    # Of so little text nothing remains when start-up is taken off.
    assert all(figure["value"] > 0 for figure in figures if figure["case"] != "text")
    assert sum(bool(figure["wanted"]) for figure in figures) >= 8


def test_text_of_ones_own(tmp_path):
    text = tmp_path / "mine.jsonl"
    pages = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py"))
    text.write_text("".join(json.dumps({"text": page.read_text(encoding="utf-8")}) + "\n" for page in pages))
    command = [PYTHON, str(ROOT / "benchmarks" / "data.py"), "--smoke", "--cases", "text", "--text", str(text)]
    made = tmp_path / "made"
    done = subprocess.run([*command, "--folder", str(made)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "unigram: our encoder / SentencePiece's batch encoding" in done.stdout
    assert {path.name for path in made.glob("*.model")} == {"bpe-1000-other.model", "unigram-1000-other.model"}
    assert (made / "work" / "ours-mine_text_document.bin").stat().st_size > 1000
    assert not (made / "text-smoke.jsonl").exists()  # nothing was asked of the dictionaries


def test_a_case_that_is_none(tmp_path):
    command = [PYTHON, str(ROOT / "benchmarks" / "data.py"), "--folder", str(tmp_path), "--cases", "texts"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and "no case texts; there are text, memory" in done.stderr


def test_killed_builds_end_with_the_same_bytes(tmp_path):
    command = [INTERPRETER, "-m", "tests.data.killed_builds", "--smoke", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("the same bytes") == 2 and done.stdout.count("killed 10 times") == 2
