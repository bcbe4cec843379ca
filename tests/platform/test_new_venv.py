"""tools/new_venv.sh: which folders become an environment, and that no other is emptied.

Truth: files of the user's are there afterwards; an environment that was made runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import INTERPRETER

ROOT = Path(__file__).resolve().parents[2]
SITE = f"lib/python3.{sys.version_info.minor}/site-packages"
#: Files of environments that may be emptied: made here now, by earlier versions, or interrupted early.
OURS = {
    "marked": [".megatron_mm-output", "pyvenv.cfg", f"{SITE}/torch.py"],
    "complete": ["installed", "pyvenv.cfg", f"{SITE}/torch.py"],
    "overlay": ["pyvenv.cfg", f"{SITE}/main.pth", f"{SITE}/transformer_engine/__init__.py"],
    "with its tools alone": ["pyvenv.cfg", f"{SITE}/pip/__init__.py", f"{SITE}/setuptools-65.5.0.dist-info/RECORD"],
    "without anything": ["pyvenv.cfg", "bin/activate"],
}
OTHERS = {
    "a user's": ["thesis.tex"],
    "another tool's": ["pyvenv.cfg", "bin/activate", f"{SITE}/torch.py"],  # uv installs no pip
    "one with a name of ours": ["installed"],
    "a project": ["lib/python3.11/site-packages/main.pth", "thesis.tex"],
}


def fill(folder: Path, files: list[str]) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} as it was")
    return folder


def new_venv(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "tools/new_venv.sh"), INTERPRETER, str(folder), "--without-pip", *options]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


@pytest.mark.parametrize("kind", [*OURS, "nothing", "empty folders"])
def test_what_was_made_here_is_made_anew(tmp_path, kind):
    venv = tmp_path / "a b" / "venv"
    if kind == "empty folders":
        (venv / "bin").mkdir(parents=True)
    else:
        fill(venv, OURS.get(kind, []))
    for _ in range(2):
        done = new_venv(venv, "--system-site-packages")
        assert done.returncode == 0, done.stderr
        assert not any("as it was" in path.read_text() for path in venv.glob("[!bl]*") if path.is_file())
        assert not (venv / SITE / "torch.py").exists() and (venv / ".megatron_mm-output").is_file()
        assert re.search("^include-system-site-packages = true", (venv / "pyvenv.cfg").read_text(), re.MULTILINE)
        subprocess.run([venv / "bin/python", "-c", ""], check=True)


@pytest.mark.parametrize("kind", OTHERS)
def test_another_folder_is_not_emptied(tmp_path, kind):
    venv = fill(tmp_path / "venv", OTHERS[kind])
    done = new_venv(venv)
    assert done.returncode == 2 and f"error: {venv} is not empty and was not made by the scripts here" in done.stderr
    assert {str(path.relative_to(venv)) for path in venv.rglob("*") if path.is_file()} == set(OTHERS[kind])
    assert all((venv / name).read_text() == f"{name} as it was" for name in OTHERS[kind])


def test_the_checks_of_the_gpu_stack_empty_no_other_environment(tmp_path):
    """With a stand-in for Python, which cannot make one: there the script ends."""
    for name in ("tests/gpu_stack/run.sh", "tools/new_venv.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tools/setup_env.sh").write_text("python_release() { echo 3.11; }\n")
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks/gpu-stack-3.11.txt").write_text("")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/called; [ "$1" = -c ]\n')
    (tmp_path / "bin/python").chmod(0o755)
    fill(tmp_path / "venv", ["installed"]), fill(tmp_path / "mine", OTHERS["another tool's"])
    given = {"MEGATRON_MM_VENV": "venv", "MEGATRON_MM_GPU_STACK_VENV": "mine"}
    environment = {**os.environ, **given, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", tmp_path / "tests/gpu_stack/run.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and "error: mine is not empty" in done.stderr
    assert "--clear" not in (tmp_path / "called").read_text() and (tmp_path / "mine" / SITE / "torch.py").exists()
